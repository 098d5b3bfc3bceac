"""A TCP connection between every two workers. Collectives on CPUs exchange their arrays over these.

TensorFlow's own collectives copy each tensor several times on its way through gRPC, which takes three times the
processor time (`benchmarks/transport.py`). Here the kernel copies from the sender's tensor and into the receiver's.

[Note: links] The connections are made while the workers meet, at their ports of TF_CONFIG; no other port is needed.
A `Links` carries one collective at a time, and refuses a second one. All workers must begin the same collectives in the
same order. The number and key of each exchange travel with it, and a worker that receives others raises an error. A
collective that waits keeps one of TensorFlow's inter-op threads. With as many threads as `Links`, a worker always has
one left for the collective that another worker waits for.
"""

import contextlib
import itertools
import select
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.handshake import hear, make_secret, read_secret
from tfzero.workers.meeting import HELLO_SECONDS, callers, listen, reach
from tfzero.workers.messages import bytes_of

_HEADER = struct.Struct("!QQI")  # number of the exchange, bytes, key
_CHUNK_BYTES = 2**21  # received before they are added
_PART_BYTES = 2**19  # handed to the kernel at once


class Links:
    """This worker's connections to all others.

    Args:
        cluster: the workers.
        connections: one to each other worker, by rank.
        timeout_seconds: how long to wait for `close` to give the reason of an ended connection or of a mismatch.
    """

    def __init__(self, cluster: Cluster, connections: Mapping[int, socket.socket], timeout_seconds: float) -> None:
        self._cluster = cluster
        self._connections = dict(connections)
        self.timeout_seconds = timeout_seconds
        self._exchanges = 0
        self._scratch = np.empty(0, np.uint8)
        self._reason = ""
        self._closed = threading.Event()
        self._in_use = threading.Lock()
        self._is_carrying = threading.Lock()  # held by one collective, through several exchanges
        self.is_lost = False
        self.at_odds = ""  # how another worker's collective differs; the reason given to `close` may say more
        for connection in self._connections.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)

    @property
    def workers(self) -> int:
        """Number of connected workers, this one included."""
        return self._cluster.size

    def close(self, reason: str) -> None:
        """Ends the connections. A waiting collective, and every later one, raises ConnectionError with this reason."""
        self._reason = self._reason or reason
        self._closed.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # already ended
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
        with self._in_use:
            for connection in self._connections.values():
                connection.close()

    # Arrays are contiguous, have the same shape and dtype on all workers, and may be flattened. `key` identifies the
    # collective. Each method raises ConnectionError if a worker is lost, and RuntimeError if another is at a different
    # collective.

    def all_reduce(self, value: np.ndarray, out: np.ndarray, key: int = 0) -> None:
        """Sums values over workers, always in rank order, into `out` of the same shape."""
        blocks, sums = (np.array_split(array.reshape(-1), self._cluster.size) for array in (value, out))
        with self._carrying(key):
            self._sum(blocks, sums[self._cluster.index], key)
            self._gather(sums, key)

    def all_gather(self, value: np.ndarray, out: np.ndarray, key: int = 0) -> None:
        """Gathers every worker's value into `out` of shape `[workers, *value.shape]`."""
        blocks = out.reshape(self._cluster.size, value.size)
        with self._carrying(key):
            blocks[self._cluster.index] = value.reshape(-1)
            self._gather(list(blocks), key)

    def all_to_all(self, value: np.ndarray, out: np.ndarray, key: int = 0) -> None:
        """Sends row `r` to worker `r`, and receives its row for this worker as row `r` of `out`, of the same shape."""
        rank, size = self._cluster.index, self._cluster.size
        sent, received = (array.reshape(size, value.size // size) for array in (value, out))
        with self._carrying(key):
            received[rank] = sent[rank]
            self._exchange(sent, received, key)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _carrying(self, key: int) -> Iterator[None]:
        """Lets one collective run at a time: a second one would take the other workers' arrays for its own."""
        if not self._is_carrying.acquire(blocking=False):
            raise RuntimeError(
                f"{self._cluster.name} began the collective {key} before the last one over the same connections had "
                "ended. Collectives of one program wait for each other: use the strategies of a process in one thread."
            )
        try:
            yield
        finally:
            self._is_carrying.release()

    def _gather(self, blocks: Sequence[np.ndarray], key: int) -> None:
        """Sends each worker's block to all others, into the same place."""
        self._exchange([blocks[self._cluster.index]] * len(blocks), blocks, key)

    def _sum(self, blocks: Sequence[np.ndarray], out: np.ndarray, key: int) -> None:
        """A reduce-scatter: worker `r` gets the sum of block `r` over all workers."""
        rank, size = self._cluster.index, self._cluster.size
        width = max(1, _CHUNK_BYTES // out.itemsize // (size - 1))
        if self._scratch.nbytes < size * width * out.itemsize:
            self._scratch = np.empty(size * width * out.itemsize, np.uint8)
        scratch = self._scratch[: size * width * out.itemsize].view(out.dtype).reshape(size, width)
        for begin in range(0, max(block.size for block in blocks), width):
            total = out[begin : begin + width]
            received = [row[: total.size] for row in scratch]
            self._exchange([block[begin : begin + width] for block in blocks], received, key)
            received[rank] = blocks[rank][begin : begin + width]
            np.add(received[0], received[1], out=total)
            for term in received[2:]:
                np.add(total, term, out=total)

    def _exchange(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray], key: int) -> None:
        """Sends `sent[r]` to each other worker `r`, and fills `received[r]` from it."""
        try:
            with self._in_use:
                self._move(sent, received, key)
        except _AtOddsError as error:
            names = self._cluster.names
            self.at_odds = (
                f"The workers are at different collectives: number, bytes and key are {error.found} on "
                f"{names[error.rank]}, {error.expected} on {self._cluster.name}. Run the same program on every worker."
            )
            self._closed.wait(self.timeout_seconds)
            raise RuntimeError(self._reason or self.at_odds) from None
        except OSError as error:
            self.is_lost = True
            self._closed.wait(self.timeout_seconds)
            raise ConnectionError(self._reason or f"{self._cluster.name} lost another worker: {error}") from None

    def _move(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray], key: int) -> None:
        self._exchanges += 1
        place = (self._exchanges, key)
        flows = [_Flow(each, rank, place, sent[rank], received[rank]) for rank, each in self._connections.items()]
        while flows := [flow for flow in flows if flow.events]:
            if not any([flow.move() for flow in flows]):
                self._wait(flows)

    def _wait(self, flows: Sequence["_Flow"]) -> None:
        """Waits until one of the connections can go on."""
        poll = select.poll()
        for flow in flows:
            poll.register(flow.connection, flow.events)
        poll.poll()


class _AtOddsError(Exception):
    """Another worker is at a different collective."""

    def __init__(self, rank: int, found: bytes, expected: bytes) -> None:
        super().__init__(rank)
        self.rank = rank
        self.found, self.expected = _HEADER.unpack(found), _HEADER.unpack(expected)


class _Flow:
    """The data that one exchange sends to another worker and receives from it."""

    def __init__(
        self, connection: socket.socket, rank: int, place: tuple[int, int], sent: np.ndarray, received: np.ndarray
    ) -> None:
        self.connection = connection
        self._rank = rank
        number, key = place
        self._out = [_HEADER.pack(number, sent.nbytes, key), bytes_of(sent)] if sent.size else []
        self._in = [memoryview(bytearray(_HEADER.size)), bytes_of(received)] if received.size else []
        self._expected = _HEADER.pack(number, received.nbytes, key)
        self._header = self._in[0] if self._in else None

    @property
    def events(self) -> int:
        """The events to `poll` for: what is left to do."""
        return (select.POLLIN if self._in else 0) | (select.POLLOUT if self._out else 0)

    def move(self) -> bool:
        """Sends and receives what is possible without waiting. Returns whether anything moved."""
        return any([self._send(), self._receive()])  # sends first, so that a worker at another collective notices

    def _receive(self) -> bool:
        if not self._in:
            return False
        try:
            count = self.connection.recv_into(self._in[0][:_PART_BYTES])
        except BlockingIOError:
            return False
        if not count:
            raise ConnectionError("the connection has ended")
        _pass(self._in, count)
        if len(self._in) == 1 and self._header is not None:
            found, self._header = bytes(self._header), None
            if found != self._expected:
                raise _AtOddsError(self._rank, found, self._expected)
        return True

    def _send(self) -> bool:
        if not self._out:
            return False
        try:
            _pass(self._out, self.connection.send(self._out[0][:_PART_BYTES]))  # type: ignore[arg-type]
        except BlockingIOError:
            return False
        return True


def _pass(views: list[Any], count: int) -> None:
    """Drops `count` bytes from the first view, and the view itself once it is empty."""
    views[0] = views[0][count:]
    if not views[0]:
        del views[0]


def link(cluster: Cluster, channel: Channel, count: int, timeout_seconds: float) -> tuple[Links, ...]:
    """Connects every two workers `count` times. All call it together, before TensorFlow listens at their ports.

    Raises:
        TimeoutError: if a worker does not call in time.
        ConnectionError: if one cannot be reached.
    """
    made: list[dict[int, socket.socket]] = [{} for _ in range(count)]
    with contextlib.ExitStack() as stack:
        with listen(cluster) as listener:
            # A secret that only this meeting knows. The broadcast is a barrier, too: after it all listen.
            secret = read_secret() + str(channel.broadcast("listening", make_secret())).encode()
            for rank, number in itertools.product(range(cluster.index + 1, cluster.size), range(count)):
                made[number][rank] = stack.enter_context(_dial(cluster, rank, secret, number, timeout_seconds))
            for rank, number, connection in _callers(cluster, listener, secret, count, timeout_seconds):
                made[number][rank] = stack.enter_context(connection)
        channel.all_gather("linking", None)  # a barrier: after it nobody listens any more
        stack.pop_all()
    return tuple(Links(cluster, connections, timeout_seconds) for connections in made)


def _dial(cluster: Cluster, rank: int, secret: bytes, number: int, timeout_seconds: float) -> socket.socket:
    """Connects to a worker and completes the handshake. A worker that found this one too slow is dialled again."""
    try:
        return reach(cluster.addresses[rank], secret, (cluster.index, number), monotonic() + timeout_seconds)
    except ConnectionError as error:
        raise ConnectionError(
            f"{cluster.describe(cluster.index)} cannot reach {cluster.describe(rank)}: {error}. Every two workers "
            "connect: let each reach the addresses of all in TF_CONFIG."
        ) from None


def _callers(
    cluster: Cluster, listener: socket.socket, secret: bytes, count: int, timeout_seconds: float
) -> Iterator[tuple[int, int, socket.socket]]:
    """Rank, number and connection of each call from the workers before this one. Strangers are turned away."""
    missing = set(itertools.product(range(cluster.index), range(count)))
    if not missing:
        return

    def greet(connection: socket.socket) -> tuple[int, int]:
        return hear(connection, secret, monotonic() + HELLO_SECONDS)

    with contextlib.closing(callers(listener, greet, monotonic() + timeout_seconds, [])) as heard:
        for connection, claim in heard:
            if claim not in missing:
                connection.close()
                continue
            missing.remove(claim)
            yield *claim, connection
            if not missing:
                return
    who = ", ".join(cluster.describe(rank) for rank in sorted({rank for rank, _ in missing}))
    raise TimeoutError(f"{cluster.name} was not called within {timeout_seconds:g} s by {who}.")
