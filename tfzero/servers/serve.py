"""The process of a parameter server: who may call it, and when it ends.

A worker calls twice: for what it pushes and pulls, and for its pulse. It says first how it wants to be served, which
must be the same for all. The server ends when all workers have taken leave; or when none has been there for
`timeout_seconds`, as they are lost. It waits without limit for the first to come.

[Note: told to end] On SIGTERM a server tells the workers that can save and end (those with a `CheckpointCallback`) to
do so, and serves them until they are gone. If there are none, it ends at once.
"""

import contextlib
import signal
import socket
import sys
import threading
from time import monotonic
from typing import Any

from tfzero.servers.client import PULSE, WORK
from tfzero.servers.frames import receive_message, send_frame
from tfzero.servers.lines import Line
from tfzero.servers.server import Server
from tfzero.workers import handshake
from tfzero.workers.cluster import Cluster
from tfzero.workers.differences import differences_of
from tfzero.workers.meeting import CALL_SECONDS, HELLO_SECONDS, callers, is_seconds, listen, told
from tfzero.workers.stopping import EXIT_STOPPED, EXIT_WORKER_LOST

_LISTENING_SECONDS = 3600.0  # before it listens anew
_LOOK_SECONDS = 0.2  # between two looks whether it is over


def serve(cluster: Cluster) -> int:
    """Serves the workers of a cluster, of which this process is a server, until they have left.

    Returns:
        The exit code: 0; 75 after SIGTERM, if workers could save; 76 if workers were lost and did not come back.

    Raises:
        OSError: if it cannot listen on its port.
        ValueError: if `TFZERO_SECRET` is too short.
    """
    host = _Host(cluster, handshake.read_secret())
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, host.stop)
    with listen(cluster) as listener:
        threading.Thread(target=host.hear, args=(listener,), daemon=True, name="tfzero listening").start()
        exit_code = host.wait()
        host.is_over = True
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        return exit_code


class _Host:
    """Hears callers, and gives each connection a thread of its own."""

    def __init__(self, cluster: Cluster, secret: bytes) -> None:
        self._cluster, self._secret = cluster, secret
        self._server: Server | None = None
        self._wanted: dict[str, Any] = {}  # how the first worker wants to be served
        self._lines: dict[int, Line] = {}  # by worker
        self._left: set[int] = set()
        self._can_stop: set[int] = set()  # workers that save and end when they are told to stop
        self._is_told = False  # to end
        self._changed = threading.Condition()
        self.is_over = False

    def stop(self, number: int, frame: Any) -> None:
        """The handler of SIGTERM. [Note: told to end]"""
        self._is_told = True

    def hear(self, listener: socket.socket) -> None:
        """Hears callers until the run is over."""
        while not self.is_over:
            try:
                with contextlib.closing(callers(listener, self._greet, monotonic() + _LISTENING_SECONDS, [])) as heard:
                    for connection, (worker, kind) in heard:
                        target = self._work if kind == WORK else self._watch
                        threading.Thread(target=target, args=(connection, worker), daemon=True).start()
            except (OSError, ValueError):  # the listener has been closed
                if not self.is_over:
                    raise

    def wait(self) -> int:
        """Waits until the run is over. Returns the exit code."""
        alone_since = monotonic()
        while True:
            with self._changed:
                self._changed.wait(_LOOK_SECONDS)
                if self._lines or self._server is None:
                    alone_since = monotonic()
                if self._is_told and not self._lines.keys() & self._can_stop:
                    return EXIT_STOPPED if self._can_stop and not self._lines else 128 + signal.SIGTERM
                if len(self._left) == self._cluster.size:
                    return 0
                seconds = 0.0 if self._server is None else self._server.clocks.timeout_seconds
                if self._server is not None and monotonic() - alone_since > seconds:
                    if self._left:
                        return 0
                    lost = self._cluster.describe()
                    text = f"no worker was there for {seconds:g} s; lost: {lost}"
                    print(f"tfzero: {self._cluster.name}: {text}.", file=sys.stderr, flush=True)
                    return EXIT_WORKER_LOST

    def _greet(self, connection: socket.socket) -> tuple[int, int]:
        worker, kind = handshake.hear(connection, self._secret, monotonic() + HELLO_SECONDS)
        if worker >= self._cluster.size or kind not in (WORK, PULSE):
            raise ConnectionError("a caller is no worker of this cluster")
        return worker, kind

    def _work(self, connection: socket.socket, worker: int) -> None:
        """The thread of a worker's connection for pushes and pulls."""
        try:
            message, _ = receive_message(connection, CALL_SECONDS, CALL_SECONDS)
            server = self._agreed(dict(message.get("wanted") or {}), worker)
        except (OSError, ValueError) as error:
            with connection, contextlib.suppress(OSError):
                send_frame(connection, told(error), (), CALL_SECONDS)
            return
        line = Line(server, connection, worker, str(message.get("life")))
        with self._changed:
            if worker in self._lines:
                self._lines[worker].close()  # its predecessor
            self._lines[worker] = line
            self._left.discard(worker)
            server.come(worker)
        has_left = False
        try:
            send_frame(connection, {"server": self._cluster.name}, (), CALL_SECONDS)
            has_left = line.serve()
        except OSError:
            pass  # the worker is lost already
        finally:
            self._end(line, worker, has_left)

    def _agreed(self, wanted: dict[str, Any], worker: int) -> Server:
        with self._changed:
            if self._server is None:
                staleness, seconds = wanted.get("max_staleness"), wanted.get("timeout_seconds", 0)
                is_bound = staleness is None or (type(staleness) is int and staleness >= 0)
                if not is_bound or not is_seconds(seconds) or not seconds:
                    raise ValueError(f"A worker wants to be served in a way that nobody can: {str(wanted)[:200]}.")
                self._wanted = wanted
                self._server = Server(self._cluster.size, staleness, seconds, bool(wanted.get("staleness_aware")))
            difference = differences_of([self._wanted, wanted], lambda places: ("the first", "this worker")[places[0]])
            if difference:
                raise ValueError(
                    f"{self._cluster.names[worker]} wants to be served otherwise than the first worker that came: "
                    f"{difference}. Give every worker the same settings and TF_CONFIG."
                )
            return self._server

    def _end(self, line: Line, worker: int, has_left: bool) -> None:
        with self._changed:
            if self._lines.get(worker) is not line:
                return  # its successor is here
            del self._lines[worker]
            if has_left:
                self._left.add(worker)
            else:
                text = f"has lost {self._cluster.describe(worker)}; others go on without it"
                print(f"tfzero: {self._cluster.name} {text}.", file=sys.stderr, flush=True)
            line.server.lose(worker)
            self._changed.notify_all()

    def _watch(self, connection: socket.socket, worker: int) -> None:
        """The thread of a worker's pulse. When it stops, the worker is lost."""
        life = None
        with connection, contextlib.suppress(OSError):
            while True:
                seconds = CALL_SECONDS if self._server is None else self._server.clocks.timeout_seconds
                message, _ = receive_message(connection, seconds, CALL_SECONDS)
                life, idle = message.get("life"), message.get("idle")
                if self._server is not None and idle is not None and is_seconds(idle):
                    self._server.beat(worker, idle)
                with self._changed:
                    (self._can_stop.add if message.get("can_stop") else self._can_stop.discard)(worker)
                send_frame(connection, {"stop": self._is_told}, (), CALL_SECONDS)
        with self._changed:
            line = self._lines.get(worker)
        if line is not None and line.life == life:
            line.close()
