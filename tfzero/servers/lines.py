"""A worker's line to a server: what it asks, and the answers."""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tfzero.servers.frames import (
    FOREVER,
    check_sizes,
    discard_arrays,
    receive_arrays,
    receive_message,
    send_frame,
)
from tfzero.servers.layer_state import Change
from tfzero.servers.models import Assignments, Flight, Push
from tfzero.servers.server import Server
from tfzero.servers.store import Definition
from tfzero.workers.meeting import told


class Line:
    """One worker's connection to a server: reads what it asks, and answers.

    Args:
        server: the server.
        connection: to the worker.
        worker: its index.
        life: of the worker's process; its pulse tells the same.
    """

    def __init__(self, server: Server, connection: socket.socket, worker: int, life: str) -> None:
        self.server, self._connection, self._worker, self.life = server, connection, worker, life
        self._seconds = server.clocks.timeout_seconds
        self.is_lost = False

    def close(self) -> None:
        """Ends the connection: the worker is lost."""
        self.is_lost = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def serve(self) -> bool:
        """Answers until the worker leaves or is lost. Returns whether it has taken leave."""
        with self._connection:
            while True:
                try:
                    message, size = receive_message(self._connection, FOREVER, self._seconds)
                except OSError:
                    return False
                if message.get("do") == "leave":
                    with contextlib.suppress(OSError):
                        self._send({})
                    return True
                try:
                    self._answer(message, size)
                except OSError:
                    return False
                except Exception as error:  # of whatever kind: the worker is told, and raises it
                    with contextlib.suppress(OSError):
                        send_frame(self._connection, told(error), (), self._seconds)
                    return False

    def _answer(self, message: dict[str, Any], size: int) -> None:
        kinds = (self._take_step, self._prepare, self._keep, self._tell)
        if not any(answer(message, size) for answer in kinds):
            raise ValueError(f"A worker sent something that no server knows: {str(message)[:200]}.")

    def _take_step(self, message: dict[str, Any], size: int) -> bool:
        """What a worker asks in each step. Returns whether it was that."""
        server, worker = self.server, self._worker
        match message:
            case {"do": "push", "key": int(key), "message": int(number), "step": int(step), "rows": int(rows)}:
                definition = server.models[key].store.definition
                active = definition.places(number, message.get("active"))
                gradient = definition.empty(number, active)
                self._read(size, [gradient])
                rates = {int(index): float(rate) for index, rate in message["rates"].items()}
                server.push(worker, key, number, step, Push(active, gradient, rows, rates))
            case {"do": "end", "step": int(step), "rows": int(rows), "state": list(specs)}:
                check_sizes([(shape, "float64") for _, _, shape in specs] * 2, size)
                changes = dict(map(Change.empty, specs))
                self._read(size, [array for each in changes.values() for array in (each.before, each.change)])
                server.end(worker, step, rows, changes)
            case {"do": "pull", "keys": list(keys), "ahead": ahead, "ends": bool(ends)}:
                if ahead is not None:
                    server.wait_for_others(worker, int(ahead), ends, lambda: self.is_lost)
                scalars, names, arrays = server.values(worker, keys)
                self._send({"scalars": scalars, "state": names}, arrays)
            case _:
                return False
        return True

    def _prepare(self, message: dict[str, Any], size: int) -> bool:
        """What a worker asks before it trains. Returns whether it was that."""
        server, worker = self.server, self._worker
        match message:
            case {"do": "define", "key": int(key), "definition": dict(definition)}:
                if worker == 0 and key not in server.models:
                    values = self._values(Definition.read(definition), size)
                else:
                    discard_arrays(self._connection, size, self._seconds)
                    values = None
                server.define(key, definition, values, lambda: self.is_lost)
                self._send({})
            case {"do": "share", "name": str(name), "specs": list(specs)}:
                shapes = [(tuple(map(int, shape)), np.dtype(str(dtype))) for shape, dtype in specs]
                own = None
                if worker == 0:
                    check_sizes(specs, size)
                    own = [np.empty(shape, dtype) for shape, dtype in shapes]
                self._read(size, own or [])
                shared = server.share(name, own, bool(message.get("anew")), lambda: self.is_lost)
                if [(array.shape, array.dtype) for array in shared] != shapes and not self.is_lost:
                    raise ValueError(
                        f"The first worker has other variables that are not trained in the model {name}. Make the same "
                        "model on every worker."
                    )
                self._send({}, shared)
            case {"do": "enter"}:
                self._send(server.enter(worker))
            case {"do": "begin", "step": int(step)}:
                server.begin(worker, step)
            case _:
                return False
        return True

    def _keep(self, message: dict[str, Any], size: int) -> bool:
        """What a worker assigns, saves and restores. Returns whether it was that."""
        server = self.server
        match message:
            case {"do": "assign", "number": list(number), "key": int(key), "part": list(part)}:
                where, elements = self._place(key, part)
                self._read(size, [elements])
                server.assign(tuple(map(int, number)), key, where, elements)
            case {"do": "end of assignments", "number": list(number), "state": list(specs), "scalars": dict(scalars)}:
                check_sizes([(shape, "float64") for _, shape in specs], size)
                state = {str(name): np.empty(tuple(map(int, shape)), np.float64) for name, shape in specs}
                self._read(size, list(state.values()))
                flight = Flight.read(message.get("flight"), server.clocks.workers)
                ended = Assignments(state, {int(key): values for key, values in scalars.items()}, flight)
                server.end_assignments(tuple(map(int, number)), ended)
            case {"do": "snapshot", "keys": list(keys)}:
                taken = server.snapshot(keys)
                facts = {"flight": asdict(taken.flight), "scalars": taken.scalars, "state": taken.names}
                self._send(facts, taken.state)
            case {"do": "read", "key": int(key), "part": list(part), "is_copied": bool(is_copied)}:
                where, _ = self._place(key, part)
                self._send({}, [server.read(key, where, is_copied)])
            case {"do": "drop copies"}:
                server.drop_copies()
            case _:
                return False
        return True

    def _place(self, key: int, part: list) -> tuple[tuple[int, int, int], np.ndarray]:
        """Message, place and slot that another process names, and an array of that size."""
        of, place, slot = map(int, part)
        known = self.server.models[key].store.definition
        return (of, place, slot), known.empty(of, known.places(of, [place]))

    def _tell(self, message: dict[str, Any], size: int) -> bool:
        """What workers tell each other by a server, and what it tells of itself. Returns whether it was that."""
        match message:
            case {"do": "post", "name": str(name), "value": value}:
                self._send({"value": self.server.post(self._worker, name, value, lambda: self.is_lost)})
            case {"do": "announce", "name": str(name), "value": value}:
                self.server.announce(name, value)
                self._send({})
            case {"do": "hear", "name": str(name), "step": step}:
                self._send({"told": self.server.hear(name, step, lambda: self.is_lost)})
            case {"do": "claim", "name": str(name)}:
                self._send({"value": self.server.claim(name, self._worker)})
            case {"do": "tell"}:
                self._send(self.server.tell())
            case _:
                return False
        return True

    def _values(self, definition: Definition, size: int) -> list[np.ndarray]:
        check_sizes([([sum(definition.widths(n))], dtype) for n, dtype in enumerate(definition.dtypes)], size)
        values = [definition.empty(number) for number in range(len(definition.messages))]
        self._read(size, values)
        return values

    def _read(self, size: int, arrays: Sequence[np.ndarray]) -> None:
        receive_arrays(self._connection, size, arrays, self._seconds)

    def _send(self, message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        send_frame(self._connection, message, arrays, self._seconds)
