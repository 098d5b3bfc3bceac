"""A worker's connections to all servers. No TensorFlow.

[Note: pulse of servers] A second connection to each server carries a beat in each second: how long ago this worker was
busy with a step, and the server's answer, perhaps that it is told to end. So either side notices that the other is lost
or stopped, also where no connection ends. Then this worker's first connection is closed, and whatever waits for it
raises the reason.
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np

from tfzero.servers.frames import FOREVER, receive_arrays, receive_message, send_frame
from tfzero.workers import handshake
from tfzero.workers.cluster import Cluster
from tfzero.workers.meeting import CALL_SECONDS, error_of, reach

WORK, PULSE = 0, 1  # what a worker calls for
_BEAT_SECONDS = 1.0


class Peer:
    """One server, as a worker sees it.

    Args:
        cluster: the workers and servers.
        number: of the server.
        wanted: how this worker wants to be served.
        timeout_seconds: for the server to come, and of silence after which it is lost.

    Raises:
        ConnectionError: if it cannot be reached.
        ValueError: if it serves other workers otherwise.
    """

    def __init__(self, cluster: Cluster, number: int, wanted: dict[str, Any], timeout_seconds: float) -> None:
        self.name = f"ps {number} at {cluster.servers[number]}"
        self._seconds = timeout_seconds
        self._life = secrets.token_hex(8)
        self._lost = ""  # why
        self._in_use = threading.Lock()
        secret = handshake.read_secret()
        deadline = monotonic() + timeout_seconds
        with contextlib.ExitStack() as opened:
            self._work = opened.enter_context(self._call(cluster, number, WORK, secret, deadline))
            self._send({"wanted": wanted, "life": self._life}, ())
            self._receive()
            self.pulse = opened.enter_context(self._call(cluster, number, PULSE, secret, deadline))
            opened.pop_all()

    def _call(self, cluster: Cluster, number: int, kind: int, secret: bytes, deadline: float) -> socket.socket:
        try:
            return reach(cluster.servers[number], secret, (cluster.index, kind), deadline, CALL_SECONDS)
        except ConnectionError as error:
            raise ConnectionError(
                f"{cluster.name} cannot reach the parameter server {self.name} within {self._seconds:g} s: {error}. "
                'Start it with the same TF_CONFIG and its own task, by `python -m tfzero.servers`, or leave "ps" out.'
            ) from None

    def tell(self, message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends what has no answer."""
        with self._in_use:
            self._send(message, arrays)

    def ask(self, message: dict[str, Any], arrays: Sequence[np.ndarray] = (),
            into: Callable[[dict[str, Any]], Sequence[np.ndarray]] = lambda answer: ()) -> dict[str, Any]:  # fmt: skip
        """Sends something, and returns the answer.

        Args:
            message: a JSON object.
            arrays: that follow it.
            into: for an answer, the arrays that are filled from what follows it.
        """
        with self._in_use:
            self._send(message, arrays)
            return self._receive(into)

    def beat(self, idle_seconds: float, can_stop: bool) -> bool:
        """One beat of the pulse. If the server does not answer, it is lost. [Note: pulse of servers]

        Args:
            idle_seconds: how long ago this worker was busy with a step.
            can_stop: whether it saves and ends when it is told to stop.

        Returns:
            Whether the server tells it to stop.
        """
        try:
            send_frame(self.pulse, {"idle": idle_seconds, "life": self._life, "can_stop": can_stop}, (), self._seconds)
            answer, _ = receive_message(self.pulse, self._seconds, self._seconds)
            return bool(answer.get("stop"))
        except TimeoutError:
            self.close(f"it has not answered for {self._seconds:g} s")
        except OSError as error:
            self.close(f"its connection has ended ({error})")
        return False

    def close(self, reason: str) -> None:
        """Ends both connections; whatever waits for an answer raises the reason."""
        self._lost = self._lost or reason
        for connection in (self._work, self.pulse):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it

    def leave(self) -> None:
        """Takes leave, as this worker has ended well."""
        with contextlib.suppress(OSError), self._in_use:
            send_frame(self._work, {"do": "leave"}, (), CALL_SECONDS)
            receive_message(self._work, CALL_SECONDS, CALL_SECONDS)  # it knows: an end alone would be a loss
        self.close("this worker has left")
        with self._in_use:
            self._work.close()

    def _send(self, message: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        try:
            send_frame(self._work, message, arrays, self._seconds)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may have said why before it hung up
                self._receive()
            raise self._loss(error) from None

    def _receive(self, into: Callable[[dict[str, Any]], Sequence[np.ndarray]] = lambda answer: ()) -> dict[str, Any]:
        try:
            answer, size = receive_message(self._work, FOREVER, self._seconds)
            if "error" not in answer:
                receive_arrays(self._work, size, into(answer), self._seconds)
                return answer
        except OSError as error:
            raise self._loss(error) from None
        raise error_of(answer)

    def _loss(self, error: OSError) -> ConnectionError:
        reason = self._lost or f"its connection has ended ({error})"
        return ConnectionError(
            f"The parameter server {self.name} was lost: {reason}. Look at its output, then start all workers and "
            "servers again."
        )


class Peers:
    """All servers.

    Args:
        cluster: the workers and servers.
        wanted: how this worker wants to be served; the same on all workers.
        timeout_seconds: as in `Peer`.

    Attributes:
        stop: is called when a server is told to end; None if this worker then just loses it.
    """

    def __init__(self, cluster: Cluster, wanted: dict[str, Any], timeout_seconds: float) -> None:
        self.stop: Callable[[], None] | None = None
        self._all: list[Peer] = []
        self._is_busy = 0
        self._busy_at = monotonic()
        self._closed = threading.Event()
        try:
            for number in range(len(cluster.servers)):
                peer = Peer(cluster, number, wanted, timeout_seconds)
                self._all.append(peer)
                threading.Thread(target=self._beat, args=(peer,), daemon=True, name="tfzero pulse of servers").start()
        except BaseException:
            self.leave()
            raise

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, number: int) -> Peer:
        return self._all[number]

    @contextlib.contextmanager
    def busy(self) -> Any:
        """While this worker takes steps: others wait for it."""
        self._is_busy += 1
        try:
            yield
        finally:
            self._is_busy -= 1
            self._busy_at = monotonic()

    def tell_all(self, message: dict[str, Any], specs: Sequence[list] = (), arrays: Sequence[np.ndarray] = ()) -> None:
        """Tells all servers something, and the first one also what belongs to the state of layers.

        Args:
            message: a JSON object.
            specs: of that state, as the message names it.
            arrays: its values.
        """
        for number, peer in enumerate(self._all):
            is_first = number == 0
            peer.tell({**message, "state": list(specs) if is_first else []}, arrays if is_first else ())

    def ask_all(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Asks all servers the same, one after the other."""
        return [peer.ask(message) for peer in self._all]

    def leave(self) -> None:
        """Takes leave of all servers."""
        for peer in self._all:
            peer.leave()
        self._closed.set()  # now only: a pulse that ends is a loss

    def _beat(self, peer: Peer) -> None:
        with peer.pulse:
            while True:
                stop = self.stop
                if peer.beat(0.0 if self._is_busy else monotonic() - self._busy_at, stop is not None) and stop:
                    stop()
                if self._closed.wait(_BEAT_SECONDS):
                    return
