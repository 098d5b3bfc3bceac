"""Tasks of one job exchange their addresses at the first one, which alone they know.

[Note: rendezvous] Task 0 listens, and every other task calls it and waits. Both prove by the handshake that they know
the same `TFZERO_SECRET` before either reads more. A caller tells one number, the port that it has reserved; its host is
where the call comes from, as task 0 sees it. When all have called, each gets the list of all addresses. Messages are
bounded, and callers are heard beside each other, each for a limited time, as in the workers' own meeting.
"""

import contextlib
import functools
import socket
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from tfzero.workers import handshake
from tfzero.workers.addresses import address_of, host_of, is_address
from tfzero.workers.cluster import Cluster
from tfzero.workers.host_names import is_loopback
from tfzero.workers.meeting import (
    CALL_SECONDS,
    HELLO_SECONDS,
    RETRY_SECONDS,
    callers,
    dial,
    error_of,
    hang_up,
    listen,
)
from tfzero.workers.messages import STRANGER_BYTES, receive, send

_BYTES_OF_AN_ADDRESS = 300  # at most, in a list of them
_ADVICE = (
    "All tasks must reach it: see that MASTER_ADDR names the machine of task 0, and give a free port of it in "
    "MASTER_PORT or TFZERO_PORT."
)


@dataclass(frozen=True)
class Place:
    """A task's place in its job.

    Args:
        rank: the task's number.
        size: number of tasks.
        meeting: "host:port" of task 0.
    """

    rank: int
    size: int
    meeting: str


def exchange(place: Place, port: int, secret: bytes, timeout_seconds: float) -> list[str]:
    """The addresses of all tasks, in their order. All call it. Task 0's is where they meet.

    Args:
        place: this task's place.
        port: that this task has reserved for itself; task 0 needs none.
        secret: the key of the handshake; empty without one.
        timeout_seconds: for all tasks to come.

    Raises:
        TimeoutError: if a task is missing; it is named on all.
        ValueError: if two tasks have one rank, or tell different numbers of tasks.
        OSError: if task 0 cannot listen.
    """
    if place.size == 1:
        return [place.meeting]
    if place.rank == 0:
        return _collect(place, secret, timeout_seconds)
    return _call(place, port, secret, timeout_seconds)


@dataclass(frozen=True)
class _Caller:
    rank: int
    size: int
    address: str


def _collect(place: Place, secret: bytes, timeout_seconds: float) -> list[str]:
    found: dict[int, tuple[socket.socket, str]] = {}  # connection and address by rank
    try:
        _hear_all(place, secret, timeout_seconds, found)
        addresses = [place.meeting, *(found[rank][1] for rank in range(1, place.size))]
        for connection, _ in found.values():
            send(connection, {"addresses": addresses}, monotonic() + CALL_SECONDS)
    except BaseException as error:
        hang_up([connection for connection, _ in found.values()], error)
        raise
    hang_up([connection for connection, _ in found.values()], None)
    return addresses


def _hear_all(place: Place, secret: bytes, timeout_seconds: float, found: dict[int, tuple[socket.socket, str]]) -> None:
    """Fills `found` with all tasks but the first."""
    here = Cluster((place.meeting,), ("task 0",), 0)
    refusals: list[str] = []
    greet = functools.partial(_greet, place, secret)
    with (
        listen(here) as listener,
        contextlib.closing(callers(listener, greet, monotonic() + timeout_seconds, refusals)) as heard,
    ):
        for connection, caller in heard:
            problem = _problem_of(place, caller, found)
            if problem:
                hang_up([connection], error := ValueError(problem))
                raise error
            found[caller.rank] = (connection, caller.address)
            if len(found) == place.size - 1:
                return
    missing = ", ".join(str(rank) for rank in range(1, place.size) if rank not in found)
    strangers = [f" {len(refusals)} callers were turned away, the last one: {why}." for why in refusals[-1:]]
    raise TimeoutError(
        f"{place.size - 1 - len(found)} of {place.size} tasks did not call task 0 at {place.meeting} within "
        f"{timeout_seconds:g} s: {missing[:200]}.{''.join(strangers)} {_ADVICE}"
    )


def _greet(place: Place, secret: bytes, connection: socket.socket) -> _Caller:
    """Who calls. Raises OSError for a stranger, or what cannot be a task."""
    rank, size = handshake.hear(connection, secret, monotonic() + HELLO_SECONDS)
    port = receive(connection, monotonic() + HELLO_SECONDS, HELLO_SECONDS, STRANGER_BYTES).get("port")
    if type(port) is not int or not 1 <= port <= 65535 or not 1 <= rank < max(size, place.size):
        raise ConnectionError("a caller is no task of this job")
    host = connection.getpeername()[0].removeprefix("::ffff:")
    if is_loopback(host):  # it is on task 0's machine: the others know that by this name
        host = host_of(place.meeting)
    return _Caller(rank, size, address_of(host, port))


def _problem_of(place: Place, caller: _Caller, found: dict[int, tuple[socket.socket, str]]) -> str:
    if caller.size != place.size:
        return (
            f"Task 0 knows of {place.size} tasks, and task {caller.rank} of {caller.size}. Start all with one number."
        )
    if caller.rank in found:
        return f"Two tasks say that they are task {caller.rank} of {place.size}. Give each its own rank."
    others = {address: rank for rank, (_, address) in found.items()}
    if caller.address in others or caller.address == place.meeting:
        return f"Tasks {others.get(caller.address, 0)} and {caller.rank} have the same address {caller.address}."
    return ""


def _call(place: Place, port: int, secret: bytes, timeout_seconds: float) -> list[str]:
    deadline = monotonic() + timeout_seconds
    reason = "no answer"
    while monotonic() < deadline:
        try:
            message = _ask(place, port, secret, deadline)
        except (OSError, ValueError) as error:  # ValueError: an impossible host name
            reason = str(error)
            sleep(RETRY_SECONDS)
            continue
        if "error" in message:
            raise error_of(message)
        return _addresses_in(message, place, port)
    raise TimeoutError(
        f"Task {place.rank} of {place.size} did not hear from task 0 at {place.meeting} within {timeout_seconds:g} s: "
        f"{reason}. {_ADVICE}"
    )


def _ask(place: Place, port: int, secret: bytes, deadline: float) -> dict[str, Any]:
    """One call: what task 0 says at the end."""
    with dial(place.meeting, CALL_SECONDS) as connection:
        handshake.call(connection, secret, (place.rank, place.size), monotonic() + CALL_SECONDS)
        send(connection, {"port": port}, monotonic() + CALL_SECONDS)
        limit_bytes = STRANGER_BYTES + _BYTES_OF_AN_ADDRESS * place.size
        return receive(connection, deadline + CALL_SECONDS, CALL_SECONDS, limit_bytes)


def _addresses_in(message: dict[str, Any], place: Place, port: int) -> list[str]:
    """The addresses in task 0's answer.

    Raises:
        ValueError: if it is not an address of each task, with this task's port.
    """
    told: Any = message.get("addresses")
    known = isinstance(told, list) and len(told) == place.size and all(map(is_address, told))
    if not known or not told[place.rank].endswith(f":{port}"):
        raise ValueError(
            f"Task 0 at {place.meeting} did not send an address of each task. Received: {str(told)[:500]}."
        )
    addresses: list[str] = told
    return addresses
