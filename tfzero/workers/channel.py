"""A control channel among the Python processes of all workers.

`Channel.join` makes the workers of TF_CONFIG meet over plain TCP before TensorFlow starts its own servers. The leader,
worker 0, dials every other worker at its port of TF_CONFIG (`workers/meeting.py`). Listening ends before `join`
returns, so TensorFlow can bind the port. The connections stay open. In each exchange a worker sends one message to the
leader and gets one answer. A worker that receives a message with the key "error" raises that error.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
from time import monotonic
from typing import Any

from tfzero.workers import meeting
from tfzero.workers.cluster import Cluster
from tfzero.workers.differences import differences_of
from tfzero.workers.handshake import read_secret
from tfzero.workers.meeting import error_of, hang_up, is_seconds, told
from tfzero.workers.messages import encode, receive, seconds_left, send
from tfzero.workers.stopping import blaming

NOTICE_SECONDS = 0.5  # after this time the leader tells the others that it has arrived and waits too


class Channel:
    """Connects the processes of all workers, which must make the same calls. Any failure closes it for all.

    Threads of a process may share it: it carries one exchange at a time.
    """

    def __init__(self, cluster: Cluster, connections: dict[int, socket.socket], timeout_seconds: float) -> None:
        self._cluster = cluster
        self._connections = connections  # by worker index: the leader has all, the others only the leader's
        self.timeout_seconds = timeout_seconds
        self._failure: Exception | None = None  # a copy of the first error
        self._in_use = threading.Lock()
        self._is_closing = False
        self._process = os.getpid()

    @classmethod
    def join(cls, cluster: Cluster, timeout_seconds: float) -> "Channel":
        """Meets the other workers. All of them call this, in any order.

        Raises TimeoutError if one does not come, ValueError if they disagree, OSError if the port is taken.
        """
        secret, seconds = read_secret(), timeout_seconds
        # The leader listens too, but only to keep its port from a second leader.
        listening: Any = meeting.listen(cluster) if cluster.size > 1 else contextlib.nullcontext()
        with listening as listener:
            if cluster.index == 0:
                connections = meeting.call_all(cluster, secret, timeout_seconds)
            else:
                connection, seconds = meeting.await_call(cluster, secret, listener, timeout_seconds)
                connections = {0: connection}
            channel = cls(cluster, connections, timeout_seconds)
        channel.all_gather("join", None, seconds)  # afterwards all are here, and nobody listens any more
        return channel

    def all_gather(self, topic: str, value: Any, timeout_seconds: float | None = None) -> list[Any]:
        """Returns the values of all workers in rank order. They travel as JSON: tuples come back as lists.

        Raises on all: RuntimeError if topics differ, TimeoutError if a worker is late, ConnectionError if one is lost,
        TypeError or ValueError if a value is not JSON or too long.
        """
        seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        gather = self._gather_as_leader if self._cluster.index == 0 else self._gather_as_worker
        with self._in_use:
            if self._failure is not None:
                raise _again(self._failure)
            try:
                return gather(topic, encode({"topic": topic, "value": value}), seconds)
            except BaseException as error:
                if self._is_closing:
                    raise self._fail(None) from None
                self._fail(error)
                raise

    def compare(self, topic: str, value: Any) -> tuple[list[Any], str]:
        """Returns the result of `all_gather`, and a text that says who has what, "" if all values are equal."""
        values = self.all_gather(topic, value)
        return values, differences_of(values, self._cluster.names_of)

    def agree(self, topic: str, value: Any, what: str) -> None:
        """Raises ValueError on all workers unless all give the same value. The channel stays usable.

        `what` names the value in the message, such as "settings".
        """
        _, differences = self.compare(topic, value)
        if differences:
            raise ValueError(f"The workers' {what} differ: {differences}. Give every worker the same {what}.")

    def broadcast(self, topic: str, value: Any) -> Any:
        """Returns the leader's value on all workers. The values of the others are ignored."""
        return self.all_gather(topic, value if self._cluster.index == 0 else None)[0]

    def fail(self, error: Exception) -> None:
        """Closes the channel because of this worker's error, which the others raise when they call next."""
        with self._in_use:
            if self._failure is None:
                self._fail(error)

    def close(self) -> None:
        """Closes the connections. If the others call again, they see this worker as lost."""
        if os.getpid() != self._process:  # a forked child, which shares the connections
            return
        self._is_closing = True
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # already ended
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
        with self._in_use:
            self._fail(None)

    def _fail(self, error: BaseException | None) -> Exception:
        """Closes all connections because of an error, or without one. Returns what every later call raises."""
        if self._failure is None:
            closed = RuntimeError("The channel among the workers was closed.")
            self._failure = closed if error is None else _again(error)
        hang_up(self._connections.values(), error)
        self._connections = {}
        return self._failure

    def _gather_as_worker(self, topic: str, own: bytes, seconds: float) -> list[Any]:
        deadline = monotonic() + seconds + meeting.GRACE_SECONDS
        with contextlib.suppress(OSError):  # the reason why sending failed is read next
            send(self._connections[0], own, deadline)
        message = self._read(0, topic, deadline, seconds)
        if "seconds_left" in message:  # the leader has arrived and says how long it waits for the rest
            if not is_seconds(message["seconds_left"]):
                raise self._broken(0, topic, "a time to wait that is none")
            deadline = monotonic() + min(message["seconds_left"], seconds) + meeting.GRACE_SECONDS
            message = self._read(0, topic, deadline, seconds)
        values = message.get("values")
        if not isinstance(values, list) or len(values) != self._cluster.size:
            raise self._broken(0, topic, f"no list of {self._cluster.size} values")
        return values

    def _gather_as_leader(self, topic: str, own: bytes, seconds: float) -> list[Any]:
        arrived = {0: json.loads(own)}
        deadline, noticed = monotonic() + seconds, False
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while monotonic() < deadline:
                complete = len(arrived) == self._cluster.size
                ready = selector.select(0 if complete else min(NOTICE_SECONDS, seconds_left(deadline)))
                for key, _ in ready:
                    message = self._read(key.data, topic, deadline, seconds)
                    if key.data in arrived:  # it may speak again only to report an error
                        raise self._broken(key.data, topic, "a second message")
                    if not isinstance(message.get("topic"), str) or "value" not in message:
                        raise self._broken(key.data, topic, "no topic or no value")
                    arrived[key.data] = message
                if complete and not ready:
                    break
                if not ready and not noticed:
                    noticed = True
                    self._send_all({"seconds_left": seconds_left(deadline)}, topic, seconds)
        if any(message["topic"] != topic for message in arrived.values()):
            places = (f'{self._cluster.names[i]}: "{arrived[i]["topic"]}"' for i in sorted(arrived))
            what = f"The workers are at different places of the program: {', '.join(places)}."
            raise RuntimeError(f"{what} Run the same program on every worker.")
        missing = [index for index in range(self._cluster.size) if index not in arrived]
        if missing:
            raise self._absence(missing, topic, seconds)
        values = [arrived[index]["value"] for index in range(self._cluster.size)]
        self._send_all({"values": values}, topic, seconds)
        return values

    def _send_all(self, message: dict[str, Any], topic: str, seconds: float) -> None:
        text = encode(message)
        for index, connection in self._connections.items():
            try:
                send(connection, text, monotonic() + seconds)
            except OSError:
                self._read(index, topic, monotonic(), seconds)  # raises the error that it sent last, or its loss
                raise

    def _read(self, index: int, topic: str, deadline: float, seconds: float) -> dict[str, Any]:
        """Reads a worker's next message. Raises the error in it, or an error that says the worker is late or lost."""
        try:
            message = receive(self._connections[index], deadline, seconds)
        except TimeoutError:
            raise self._absence([index], topic, seconds) from None
        except OSError as error:
            what = f"{self._cluster.describe(index)} was lost at {topic!r}: its connection has ended ({error})."
            what = f"{what} Look at its output, then start all workers again."
            raise blaming(ConnectionError(what), [index]) from None
        if "error" in message:
            raise error_of(message)
        return message

    def _broken(self, index: int, topic: str, what: str) -> ConnectionError:
        text = f"{self._cluster.describe(index)} sent {what} at {topic!r}. Start all workers again."
        return blaming(ConnectionError(text), [index])

    def _absence(self, missing: list[int], topic: str, seconds: float) -> TimeoutError:
        what = f"{self._cluster.describe(*missing)} did not arrive at {topic!r} within {seconds:g} s."
        advice = "Look there whether it is stuck or elsewhere in the program, or give a longer timeout."
        return blaming(TimeoutError(f"{what} {advice}"), missing)


def _again(error: BaseException) -> Exception:
    """A copy of an error, to raise again."""
    return error_of(told(error))
