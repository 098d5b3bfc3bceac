"""Who the workers are, and a control channel among their Python processes.

`Channel.join` makes the workers of TF_CONFIG meet over plain TCP before TensorFlow starts its own cluster,
which would wait for a missing worker in C++, holding the GIL, for up to an hour. The first worker, the
leader, dials every other at its port of TF_CONFIG. Listening ends before `join` returns, so TensorFlow can
bind the port; the connections stay open. A message is a magic line, its length, and JSON. Each worker sends
one to the leader and gets one answer. Who receives a message with the key "error" raises that error.
"""

import contextlib
import json
import os
import re
import selectors
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from time import monotonic, sleep

from tfzero.differences import differences_of
from tfzero.progress import progress

MAGIC = b"tfzero channel 1\n"
CALL_SECONDS = 3.0  # for each step of a call: the called worker may be busy with a stranger
HELLO_SECONDS = 1.0  # for a caller to say who it is; strangers often say nothing
RETRY_SECONDS = 0.1  # between two rounds of calls
NOTICE_SECONDS = 0.5  # after so long the leader tells the others that it has arrived and waits too
GRACE_SECONDS = 2.0  # how much longer than the leader a worker waits, to hear the leader's reason
_EXAMPLE = """Set it to, for example, {"cluster": {"worker": ["host1:2222", "host2:2222"]}, \
"task": {"type": "worker", "index": 0}}, or unset it to train in one process."""
_ADVICE = "Start each process with the same cluster and its own task index in TF_CONFIG."
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_HEADER = struct.Struct(f"!{len(MAGIC)}sQ")
_ERRORS = {kind.__name__: kind for kind in (ConnectionError, TimeoutError, TypeError, ValueError)}


@dataclass(frozen=True)
class Cluster:
    """The workers in rank order: the chief first if there is one, then the workers of TF_CONFIG."""

    addresses: tuple[str, ...]  # "host:port"
    names: tuple[str, ...]  # as in TF_CONFIG: "chief 0", "worker 0", "worker 1"
    index: int  # this process's place in that order

    @property
    def size(self) -> int:
        return len(self.addresses)

    @property
    def name(self) -> str:
        return self.names[self.index]

    def describe(self, *indexes: int) -> str:
        """Names and addresses of these workers, or of all, for messages."""
        return ", ".join(f"{self.names[i]} at {self.addresses[i]}" for i in indexes or range(self.size))

    def group(self, indexes: list[int]) -> str:
        """Names in short: "chief 0 and workers 1, 3"."""
        numbers = {}
        for index in indexes:
            kind, number = self.names[index].rsplit(" ", 1)
            numbers.setdefault(kind, []).append(number)
        return " and ".join(f"{kind}{'s' * (len(ns) > 1)} {', '.join(ns)}" for kind, ns in numbers.items())


def read_tf_config(environ=os.environ) -> Cluster | None:
    """The `Cluster` of TF_CONFIG, or None if TF_CONFIG is absent, empty, or holds no cluster."""
    text = environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text or "{}")
        _require(isinstance(config, dict), "It must be a JSON object.")
        if not config.get("cluster"):
            return None
        task = config.get("task")
        known = isinstance(task, dict) and {"type", "index"} <= set(task)
        _require(known, 'It needs a "task" with "type" and "index", to tell which worker this process is.')
    except ValueError as error:  # also what is not JSON
        raise ValueError(f"TF_CONFIG is not JSON as needed: {error} {_EXAMPLE} Received: {text!r}.") from None
    return cluster_from_spec(config["cluster"], task["type"], task["index"])


def cluster_from_spec(spec: dict, task_type: str, task_id: int | str) -> Cluster | None:
    """The `Cluster` of a cluster resolver's specification (jobs are lists or dicts); None if it is empty."""
    if not spec:
        return None
    try:
        _check_jobs(spec, task_type)
        jobs = [job for job in ("chief", "worker") if job in spec]
        tasks = {(job, number): address for job in jobs for number, address in _list_tasks(job, spec[job])}
        names, addresses = tuple(f"{job} {number}" for job, number in tasks), tuple(tasks.values())
        unique = len(set(addresses)) == len(addresses)
        _require(unique, "Two workers have the same address. Give each its own host or port.")
        task = (task_type, _read_index(task_id))
        advice = f"The cluster has only {', '.join(names)}. Correct the task, or add its address."
        _require(task in tasks, f"The index is out of range: this process is {task[0]} {task[1]}. {advice}")
    except ValueError as error:
        raise ValueError(f"{error} Received: cluster {spec}, task {task_type!r} {task_id!r}.") from None
    return Cluster(addresses, names, list(tasks).index(task))


def _require(condition, advice):
    if not condition:
        raise ValueError(advice)


def _check_jobs(spec, task_type):
    advice = "Run `model.evaluate` on checkpoints, in a process without TF_CONFIG or with a plain strategy."
    _require(task_type != "evaluator", f"An evaluator task takes no part in training. {advice}")
    advice = 'The cluster must be an object with lists of addresses, "worker" and perhaps "chief".'
    _require(isinstance(spec, dict) and set(spec) <= {"chief", "worker", "evaluator", "ps"}, advice)
    advice = 'tfzero is synchronous: all processes are workers. List them under "worker" and leave "ps" out.'
    _require(task_type != "ps" and not spec.get("ps"), f"There is a parameter server (ps). {advice}")
    advice = 'The task type is unknown. Make it "worker", or "chief" for the first worker.'
    _require(task_type in ("chief", "worker"), advice)


def _list_tasks(job, tasks):
    """Sorted pairs of task index and address."""
    advice = f'"{job}" must be a list of at least one "host:port". Fill it, or leave it out.'
    _require(isinstance(tasks, (list, tuple, dict)) and tasks, advice)
    advice = 'There is more than one chief. Leave one, and list the others under "worker".'
    _require(job != "chief" or len(tasks) == 1, advice)
    pairs = tasks.items() if isinstance(tasks, dict) else enumerate(tasks)
    pairs = sorted((_read_index(number), address) for number, address in pairs)
    for _, address in pairs:
        match = isinstance(address, str) and _ADDRESS.fullmatch(address)
        advice = '"host:port" with a port of 1 to 65535. Write host1:2222 or [::1]:2222, without grpc://.'
        _require(match and 1 <= int(match[2]) <= 65535, f'{address!r} under "{job}" is not {advice}')
    return pairs


def _read_index(value):
    integer = value.strip().isdecimal() if isinstance(value, str) else type(value) is int
    _require(integer, f"The task index {value!r} is not an integer. Number each type's tasks 0, 1, 2, ...")
    return int(value)


def seconds_left(deadline):
    """Seconds until the deadline; never 0, which sockets take for "do not wait"."""
    return max(deadline - monotonic(), 0.001)


def _send(connection, message, deadline):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection.settimeout(seconds_left(deadline))
    connection.sendall(_HEADER.pack(MAGIC, len(text)) + text)


def _read_bytes(connection, count, deadline):
    view = memoryview(data := bytearray(count))
    while view:
        connection.settimeout(seconds_left(deadline))
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("the connection was closed")
        view = view[received:]
    return data


def _receive(connection, deadline, transfer_seconds):
    """The next message: it must begin before the deadline, and may then take `transfer_seconds`."""
    magic, length = _HEADER.unpack(_read_bytes(connection, _HEADER.size, deadline))
    if magic != MAGIC:
        raise ConnectionError("the process there is no tfzero worker")
    return json.loads(_read_bytes(connection, length, monotonic() + transfer_seconds))


def _part(connections, error):
    """Close the connections. If there is an error, tell it first to the peers that still hear."""
    for connection in connections:
        with connection, contextlib.suppress(OSError):
            if error is not None:
                told = {"error": type(error).__name__, "text": str(error) or repr(error)}
                _send(connection, told, monotonic() + HELLO_SECONDS)


def listen(cluster):
    """A socket that listens on the port of this worker's address, on all interfaces, with SO_REUSEADDR."""
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = f"{cluster.describe(cluster.index)} cannot listen on its port: {os.strerror(error.errno)}."
        advice = "Stop the process that uses it (another with the same task index?), or change the port."
        raise OSError(error.errno, f"{reason} {advice}") from None


def _call(cluster, index, deadline):
    """Dial a worker once. Returns its connection and its answer, or None and the reason."""
    host, port = cluster.addresses[index].rsplit(":", 1)
    try:
        with contextlib.ExitStack() as stack:
            seconds = min(CALL_SECONDS, seconds_left(deadline))
            connection = stack.enter_context(socket.create_connection((host.strip("[]"), port), seconds))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if connection.getsockname() == connection.getpeername():  # the system gave it the port it dials
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # free it
                raise ConnectionError("nobody listens there")
            _send(connection, asdict(cluster), monotonic() + CALL_SECONDS)
            answer = _receive(connection, monotonic() + CALL_SECONDS, CALL_SECONDS)
            _send(connection, {"seconds_left": seconds_left(deadline)}, monotonic() + CALL_SECONDS)  # welcome
            stack.pop_all()
            return connection, answer
    except (OSError, ValueError) as error:  # ValueError: an impossible host name, an answer that is no JSON
        return None, str(error)


def _call_all(cluster, _listener, timeout_seconds):
    """The leader's part of the meeting: dial until all answer. Returns connections by worker index."""
    deadline = monotonic() + timeout_seconds
    calls, connections, conflict, missing = {}, {}, "", range(1, cluster.size)
    try:
        with ThreadPoolExecutor(cluster.size) as pool, progress("meeting", cluster.size, unit="workers") as bar:
            while missing and (not calls or monotonic() < deadline):
                tries = pool.map(_call, repeat(cluster), missing, repeat(deadline))
                calls = dict(zip(missing, tries, strict=True))
                connections |= {index: connection for index, (connection, _) in calls.items() if connection}
                bar.reach(1 + len(connections))
                for index in calls.keys() & connections.keys():
                    conflict = conflict or _find_conflict(cluster, index, calls[index][1])
                if conflict:  # a little time to reach the rest, so that they are told too
                    deadline = min(deadline, monotonic() + GRACE_SECONDS)
                missing = [index for index in missing if index not in connections]
                sleep(RETRY_SECONDS if missing else 0)
        _require(not conflict, conflict)
        if missing:
            who = "; ".join(f"{cluster.describe(index)} ({calls[index][1]})" for index in missing)
            what = f"{len(missing)} of {cluster.size} workers missing after {timeout_seconds:g} s: {who}."
            raise TimeoutError(f"{what} {_ADVICE}")
    except BaseException as error:
        _part(connections.values(), error)
        raise
    return connections


def _find_conflict(cluster, index, answer):
    theirs = Cluster(tuple(answer["addresses"]), tuple(answer["names"]), answer["index"])
    ours = f"To {cluster.name} the process at {cluster.addresses[index]} is {cluster.names[index]} of: "
    what = f"{ours}{cluster.describe()}. To itself it is {theirs.name} of: {theirs.describe()}."
    return "" if theirs == replace(cluster, index=index) else f"The workers disagree. {what} {_ADVICE}"


def _await_call(cluster, listener, timeout_seconds):
    """The others' part: wait for the leader's call, dropping strangers and calls that it has given up."""
    deadline = monotonic() + timeout_seconds
    while monotonic() < deadline:
        listener.settimeout(seconds_left(deadline))
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
            connection = stack.enter_context(listener.accept()[0])
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _receive(connection, monotonic() + HELLO_SECONDS, HELLO_SECONDS)
            _send(connection, asdict(cluster), monotonic() + HELLO_SECONDS)
            connection.settimeout(CALL_SECONDS)
            if connection.recv(1, socket.MSG_PEEK):  # the welcome, which all_gather reads
                stack.pop_all()
                return {0: connection}
    what = f"{cluster.describe(0)} never called within {timeout_seconds:g} s. Start it with the same cluster"
    raise TimeoutError(f"{what} in TF_CONFIG; it must reach {cluster.describe(cluster.index)}.")


class Channel:
    """Connects the processes of all workers, which make the same calls. What goes wrong with it closes it for all."""

    def __init__(self, cluster: Cluster, connections: dict[int, socket.socket], timeout_seconds: float):
        self._cluster = cluster
        self._connections = connections  # by worker index: the leader has all, the others the leader's
        self._timeout_seconds = timeout_seconds
        self._failure = None  # the kind and the text of the first error

    @classmethod
    def join(cls, cluster: Cluster, timeout_seconds: float) -> "Channel":
        """Meet the other workers, which all call this, in any order.

        Raises TimeoutError if one does not come, ValueError if they disagree, OSError if the port is taken.
        """
        # The leader listens too, but only to keep its port from a second leader.
        with listen(cluster) if cluster.size > 1 else contextlib.nullcontext() as listener:
            meet = _call_all if cluster.index == 0 else _await_call
            channel = cls(cluster, meet(cluster, listener, timeout_seconds), timeout_seconds)
        channel.all_gather("join", None)  # afterwards all are here, and nobody listens any more
        return channel

    def all_gather(self, topic: str, value, timeout_seconds: float | None = None) -> list:
        """The values of all workers in rank order, as JSON has them: tuples come back as lists.

        Raises on all: RuntimeError if topics differ, TimeoutError if one is late, ConnectionError if lost.
        """
        if self._failure is not None:
            raise self._failure[0](self._failure[1])
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        gather = self._gather_as_leader if self._cluster.index == 0 else self._gather_as_worker
        try:
            return gather(topic, json.dumps({"topic": topic, "value": value}).encode(), seconds)
        except BaseException as error:
            self._fail(error)
            raise

    def compare(self, topic: str, value) -> tuple[list, str]:
        """The values of all workers, as `all_gather` gives them; and who has what, or "" if all have the same."""
        values = self.all_gather(topic, value)
        return values, differences_of(values, self._cluster.group)

    def agree(self, topic: str, value, what: str) -> None:
        """Raise ValueError on all, who may go on, unless all give the same value. `what` names it: "settings"."""
        _, differences = self.compare(topic, value)
        if differences:
            raise ValueError(f"The workers' {what} differ: {differences}. Give every worker the same {what}.")

    def broadcast(self, topic: str, value):
        """The first worker's value, on all workers. What the others give is not used."""
        return self.all_gather(topic, value if self._cluster.index == 0 else None)[0]

    def close(self) -> None:
        """Close the connections. If the others call again, they see this worker as lost."""
        self._fail(None)

    def _fail(self, error):
        if self._failure is None:
            text = "The channel among the workers was closed." if error is None else str(error)
            self._failure = (_ERRORS.get(type(error).__name__, RuntimeError), text)
        _part(self._connections.values(), error)
        self._connections = {}

    def _gather_as_worker(self, topic, own, seconds):
        deadline = monotonic() + seconds + GRACE_SECONDS
        with contextlib.suppress(OSError):  # the reason why sending failed is read next
            _send(self._connections[0], own, deadline)
        while True:
            message = self._read(0, topic, deadline, seconds)
            if "values" in message:
                return message["values"]
            deadline = monotonic() + message["seconds_left"] + GRACE_SECONDS

    def _gather_as_leader(self, topic, own, seconds):
        arrived = {0: json.loads(own)}
        deadline, noticed = monotonic() + seconds, False
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while monotonic() < deadline:
                complete = len(arrived) == self._cluster.size
                ready = selector.select(0 if complete else min(NOTICE_SECONDS, seconds_left(deadline)))
                for key, _ in ready:  # one that has arrived speaks again only to tell an error
                    arrived[key.data] = self._read(key.data, topic, deadline, seconds)
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
            raise TimeoutError(self._describe_absence(missing, topic, seconds))
        values = [arrived[index]["value"] for index in range(self._cluster.size)]
        self._send_all({"values": values}, topic, seconds)
        return values

    def _send_all(self, message, topic, seconds):
        text = json.dumps(message).encode()
        for index, connection in self._connections.items():
            try:
                _send(connection, text, monotonic() + seconds)
            except OSError:
                self._read(index, topic, monotonic(), seconds)  # raises what it told at last, or its loss
                raise

    def _read(self, index, topic, deadline, seconds):
        """The next message of a worker. Raises the error that it tells, or that it is late or lost."""
        try:
            message = _receive(self._connections[index], deadline, seconds)
        except TimeoutError:
            raise TimeoutError(self._describe_absence([index], topic, seconds)) from None
        except OSError:
            what = f"{self._cluster.describe(index)} was lost at {topic!r}: its connection has ended."
            raise ConnectionError(f"{what} Look at its output, then start all workers again.") from None
        if "error" in message:
            raise _ERRORS.get(message["error"], RuntimeError)(message["text"])
        return message

    def _describe_absence(self, missing, topic, seconds):
        what = f"{self._cluster.describe(*missing)} did not arrive at {topic!r} within {seconds:g} s."
        return f"{what} Look there whether it is stuck or elsewhere in the program, or give a longer timeout."
