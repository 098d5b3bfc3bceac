"""How workers find each other: one listens at its port of TF_CONFIG, and others call.

[Note: meeting] Anybody may call a port. Callers are heard concurrently, each with its own time limit, so no caller can
keep a worker from being heard. After the handshake each side sends the cluster as it sees it. The two must be equal: a
caller from another cluster is not the leader. A worker that gives up a call is called again.
"""

import contextlib
import functools
import os
import queue
import select
import socket
import struct
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from time import monotonic, sleep
from typing import Any

from tfzero.workers import handshake
from tfzero.workers.addresses import host_of, port_of
from tfzero.workers.cluster import Cluster
from tfzero.workers.host_names import endpoints
from tfzero.workers.messages import STRANGER_BYTES, receive, seconds_left, send
from tfzero.workers.progress import progress
from tfzero.workers.stopping import blamed_by, blaming

CALL_SECONDS = 3.0  # for each step of a call: the called worker may be busy
HELLO_SECONDS = 1.0  # for a caller to say who it is; strangers often say nothing
RETRY_SECONDS = 0.1  # between two rounds of calls
GRACE_SECONDS = 1.0  # how much longer than the leader a worker waits, to hear the leader's reason
MOST_CALLERS = 256  # heard concurrently
_MOST_REASONS = 3  # why one worker could not be called
_ADVICE = "Start each process with the same cluster and its own task index in TF_CONFIG."
_ERRORS = {kind.__name__: kind for kind in (ConnectionError, TimeoutError, TypeError, ValueError)}


def told(error: BaseException) -> dict[str, Any]:
    """A message that reports an error; `error_of` gives the error back."""
    blamed = blamed_by(error)
    return {"error": type(error).__name__, "text": str(error) or repr(error), "blamed": blamed}


def error_of(message: dict[str, Any]) -> Exception:
    """The error that a message with the key "error" reports; a RuntimeError if its kind is not one of ours."""
    error = _ERRORS.get(str(message["error"]), RuntimeError)(str(message.get("text")))
    blamed: Any = message.get("blamed")
    known = isinstance(blamed, list | tuple) and all(type(index) is int for index in blamed)
    return blaming(error, blamed) if known else error


def hang_up(connections: Iterable[socket.socket], error: BaseException | None) -> None:
    """Closes the connections. If there is an error, it is sent first to the peers that still listen."""
    for connection in connections:
        with connection, contextlib.suppress(OSError):
            if error is not None:
                send(connection, told(error), monotonic() + HELLO_SECONDS)


def listen(cluster: Cluster) -> socket.socket:
    """A socket that listens on the port of this worker's address, with SO_REUSEADDR.

    It listens on all interfaces, because the address may be a name that only others use for this machine. For a
    loopback address it listens on loopback only.

    Raises:
        OSError: if it cannot listen.
    """
    own = cluster.address
    host, port = host_of(own), port_of(own)
    both = socket.has_dualstack_ipv6()
    try:
        if host in ("localhost", "::1") or host.startswith("127."):
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=2 * MOST_CALLERS)
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=2 * MOST_CALLERS)
    except OSError as error:
        text = error.strerror if error.errno is None or error.errno < 0 else os.strerror(error.errno)
        reason = f"{cluster.name} at {own} cannot listen on its port: {text}."
        advice = "Stop the process that uses it (another with the same task index?), or change the port."
        raise OSError(error.errno, f"{reason} {advice}") from None


def dial(address: str, seconds: float) -> socket.socket:
    """Connects to "host:port".

    Raises:
        OSError, ValueError: if nobody listens there in time, or there is no such host.
    """
    deadline = monotonic() + seconds
    connection = _connect(endpoints(host_of(address), port_of(address), seconds), deadline)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if connection.getsockname() == connection.getpeername():  # a self-connection: the port it got is the port it dials
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # frees the port at once
        connection.close()
        raise ConnectionError("nobody listens there")
    return connection


def reach(
    address: str, secret: bytes, claim: tuple[int, int], deadline: float, each_seconds: float | None = None
) -> socket.socket:
    """Connects to "host:port" and completes the handshake. One that found this caller too slow is called again.

    Args:
        address: of the listener.
        secret: the key of the handshake.
        claim: as in `handshake.call`.
        deadline: by the monotonic clock.
        each_seconds: for each step of a call to a process that may not be listening yet; None if it is: then it is an
            error that nobody listens.

    Raises:
        ConnectionError: if it cannot be reached; the text is the last reason.
    """
    reason, is_last = "", False
    while not is_last:
        is_last = monotonic() >= deadline
        try:
            seconds = seconds_left(deadline)
            connection = dial(address, seconds if each_seconds is None else min(each_seconds, seconds))
        except (OSError, ValueError) as error:
            reason = str(error)
            if each_seconds is None:
                break
        else:
            try:
                until = deadline if each_seconds is None else monotonic() + each_seconds
                handshake.call(connection, secret, claim, until)
                return connection
            except OSError as error:
                connection.close()
                reason = str(error)
        sleep(RETRY_SECONDS)
    raise ConnectionError(reason)


def _connect(found: list[tuple[Any, ...]], deadline: float) -> socket.socket:
    """Connects to the first of these endpoints that answers."""
    failure: OSError = ConnectionError("its name has no address")
    for *_, endpoint in found:
        try:
            return socket.create_connection(endpoint[:2], seconds_left(deadline))
        except OSError as error:
            failure = error
    raise failure


def callers(
    listener: socket.socket, greet: Callable[[socket.socket], Any], deadline: float, refusals: list[str]
) -> Generator[tuple[socket.socket, Any], None, None]:
    """Yields each caller's connection and the result of `greet`, in the order of completion, until the deadline.

    Args:
        listener: the socket that they call.
        greet: gets a connection, in a thread of its own. If it raises OSError, the caller is turned away.
        deadline: by the monotonic clock.
        refusals: collects why callers were turned away.
    """
    greeted: dict[Future[Any], socket.socket] = {}  # connections by future
    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    ear, bell = socket.socketpair()

    def ring(future: Future[Any]) -> None:
        done.put(future)
        bell.send(b".")

    listener.setblocking(False)
    with ear, bell, ThreadPoolExecutor(MOST_CALLERS, "tfzero caller") as pool:
        try:
            while monotonic() < deadline:
                if _wait_for_either(ear, listener if len(greeted) < MOST_CALLERS else None, deadline):
                    connection = _accept(listener)
                    if connection is not None:
                        greeted[future := pool.submit(greet, connection)] = connection
                        future.add_done_callback(ring)
                while not done.empty():
                    future = done.get()
                    connection = greeted.pop(future)
                    try:
                        result = future.result()
                    except OSError as error:
                        connection.close()
                        refusals.append(str(error))
                    else:
                        yield connection, result
        finally:
            for connection in greeted.values():  # wakes threads that still wait for them
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            pool.shutdown()
            for connection in greeted.values():
                connection.close()


def _wait_for_either(ear: socket.socket, listener: socket.socket | None, deadline: float) -> bool:
    """Waits until the bell rings, and clears it, or somebody calls. Returns whether somebody calls."""
    poll = select.poll()
    poll.register(ear, select.POLLIN)
    if listener is not None:
        poll.register(listener, select.POLLIN)
    ready = {number for number, _ in poll.poll(1000 * seconds_left(deadline))}
    if ear.fileno() in ready:
        ear.recv(MOST_CALLERS)
    return listener is not None and listener.fileno() in ready


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:  # the caller has left
        return None
    except OSError:  # too many files are open: some will be closed soon
        sleep(RETRY_SECONDS)
        return None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


# The meeting of all workers with their leader.


@dataclass(frozen=True)
class _Call:
    """The result of dialling a worker once."""

    connection: socket.socket | None = None
    conflict: str = ""  # how its cluster differs
    reason: str = ""  # why there is no connection


def _call(cluster: Cluster, secret: bytes, index: int, deadline: float) -> _Call:
    def soon() -> float:
        return monotonic() + CALL_SECONDS

    try:
        with contextlib.ExitStack() as stack:
            seconds = min(CALL_SECONDS, seconds_left(deadline))
            connection = stack.enter_context(dial(cluster.addresses[index], seconds))
            handshake.call(connection, secret, (cluster.index, 0), soon())
            send(connection, asdict(cluster), soon())
            theirs = _read_cluster(receive(connection, soon(), CALL_SECONDS, STRANGER_BYTES))
            conflict = _find_conflict(cluster, index, theirs)
            if not conflict:
                send(connection, {"seconds_left": seconds_left(deadline)}, soon())  # welcome
                receive(connection, soon(), CALL_SECONDS, STRANGER_BYTES)  # it is here
            stack.pop_all()
            return _Call(connection, conflict)
    except (OSError, ValueError) as error:  # ValueError: an impossible host name
        return _Call(reason=str(error))


def call_all(cluster: Cluster, secret: bytes, timeout_seconds: float) -> dict[int, socket.socket]:
    """The leader's side: dials until all workers answer. Returns connections by worker index.

    Raises:
        TimeoutError: if a worker is missing.
        ValueError: if a worker has another cluster.
    """
    deadline = monotonic() + timeout_seconds
    calls: dict[int, _Call] = {}
    connections: dict[int, socket.socket] = {}
    conflict, missing = "", list(range(1, cluster.size))
    reasons: dict[int, dict[str, None]] = {index: {} for index in missing}  # in order: the last may say least
    try:
        with ThreadPoolExecutor(cluster.size) as pool, progress("meeting", cluster.size, unit="workers") as bar:
            while missing and (not calls or monotonic() < deadline):
                tries = pool.map(_call, repeat(cluster), repeat(secret), missing, repeat(deadline))
                calls = dict(zip(missing, tries, strict=True))
                connections |= {index: call.connection for index, call in calls.items() if call.connection}
                for index, call in calls.items():
                    reasons[index][call.reason] = None
                bar.reach(1 + len(connections))
                conflict = conflict or next((call.conflict for call in calls.values() if call.conflict), "")
                if conflict:  # a little time to reach the rest, so that they are told too
                    deadline = min(deadline, monotonic() + GRACE_SECONDS)
                missing = [index for index in missing if index not in connections]
                sleep(RETRY_SECONDS if missing else 0)
        if conflict:
            raise ValueError(conflict)
        if missing:
            who = "; ".join(f"{cluster.describe(index)} ({_in_short(reasons[index])})" for index in missing)
            what = f"{len(missing)} of {cluster.size} workers missing after {timeout_seconds:g} s: {who}."
            raise TimeoutError(f"{what} {_ADVICE}")
    except BaseException as error:
        hang_up(connections.values(), error)
        raise
    return connections


def _in_short(reasons: Iterable[str]) -> str:
    return ", then: ".join(list(reasons)[-_MOST_REASONS:])


def _read_cluster(message: dict[str, Any]) -> Cluster:
    """The cluster in a message. Raises ConnectionError if it holds none."""
    addresses: Any
    names: Any
    addresses, names, index = (message.get(key) for key in ("addresses", "names", "index"))
    lists = isinstance(addresses, list) and isinstance(names, list) and len(addresses) == len(names) > 0
    if not lists or not all(isinstance(text, str) for text in (*addresses, *names)):
        raise ConnectionError("the process there says nothing of its cluster that can be read")
    if type(index) is not int or not 0 <= index < len(names):
        raise ConnectionError("the process there does not say which worker it is")
    return Cluster(tuple(addresses), tuple(names), index)


def _find_conflict(cluster: Cluster, index: int, theirs: Cluster) -> str:
    if theirs == replace(cluster, index=index):
        return ""
    ours = f"To {cluster.name} the process at {cluster.addresses[index]} is {cluster.names[index]} of: "
    what = f"{ours}{cluster.describe()}. To itself it is {theirs.name} of: {theirs.describe()[:2000]}."
    return f"The workers disagree. {what} {_ADVICE}"


def _greet(cluster: Cluster, secret: bytes, connection: socket.socket) -> dict[str, Any]:
    """Answers a call. Returns the leader's last message: its welcome, {"seconds_left": s}, or an error."""
    handshake.hear(connection, secret, monotonic() + HELLO_SECONDS)
    theirs = _read_cluster(receive(connection, monotonic() + HELLO_SECONDS, HELLO_SECONDS, STRANGER_BYTES))
    send(connection, asdict(cluster), monotonic() + HELLO_SECONDS)
    is_ours = theirs == replace(cluster, index=0)
    patience = CALL_SECONDS if is_ours else 5 * CALL_SECONDS  # a leader of another cluster reports that late
    message = receive(connection, monotonic() + patience, CALL_SECONDS, STRANGER_BYTES)
    if "error" in message:
        return message
    seconds = message.get("seconds_left")
    if not is_ours or not is_seconds(seconds):
        raise ConnectionError("a caller is not the first worker of this cluster")
    send(connection, {"here": cluster.index}, monotonic() + CALL_SECONDS)
    return message


def await_call(
    cluster: Cluster, secret: bytes, listener: socket.socket, timeout_seconds: float
) -> tuple[socket.socket, float]:
    """The other workers' side: the leader's connection, and how long the leader still waits for the rest.

    Raises:
        TimeoutError: if the leader does not call in time.
        Exception: the error that the leader reports.
    """
    refusals: list[str] = []
    greet = functools.partial(_greet, cluster, secret)
    with contextlib.closing(callers(listener, greet, monotonic() + timeout_seconds, refusals)) as heard:
        for connection, message in heard:
            if "error" not in message:
                return connection, message["seconds_left"]
            connection.close()
            raise error_of(message)
    why = f" ({len(refusals)} callers were turned away: {_in_short(dict.fromkeys(refusals))})" if refusals else ""
    what = f"{cluster.describe(0)} never called within {timeout_seconds:g} s{why}. Start it with the same cluster"
    raise TimeoutError(f"{what} in TF_CONFIG; it must reach {cluster.describe(cluster.index)}.")


def is_seconds(value: Any) -> bool:
    """Whether a received value is a valid time to wait: not negative, and less than a year."""
    return type(value) in (int, float) and 0 <= value < 3e7
