"""What a program assigns, saves and restores of what servers hold.

[Note: assignments] Of values that a program assigns, those of the first worker count. It gives them to the servers
before its next step, under a number: the place of the program, and how often it has assigned values there. A first
worker that was started again comes to the same places, and the servers know up to where they have its values.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfzero.rows.apart import Apart
from tfzero.servers.client import Peers
from tfzero.servers.parts import Number, RemoteValue
from tfzero.servers.remote import Remote
from tfzero.variables.remote_slots import RemoteSlot


@dataclass(frozen=True)
class Slots:
    """The slots of an optimizer that servers hold, by variable."""

    remote: Remote
    of_variables: Sequence[Sequence[RemoteSlot]]


class Program(Protocol):
    """Where a worker's program is."""

    @property
    def is_first(self) -> bool:
        """Whether this is the worker whose assignments count."""

    @property
    def place(self) -> tuple[int, int]:
        """How many `fit`s have begun, and the number of the next step."""

    def is_behind(self) -> bool:
        """Whether a former life of this worker has been here."""


class Keeping:
    """A worker's view of what servers hold. [Note: assignments]

    Args:
        peers: the servers.
        apart: notes what a program assigns.
        program: tells the place of the program.
    """

    def __init__(self, peers: Peers, apart: Apart, program: Program) -> None:
        self._peers, self._apart, self._program = peers, apart, program
        self.held: list[Slots] = []
        self.layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # untrained variables, by name
        self._number: Number = (0, 0, 0)  # of assignments: `fit`s, steps, and assignments since

    @property
    def remotes(self) -> list[Remote]:
        return [each.remote for each in self.held]

    def add(self, remote: Remote, slots: Sequence[Sequence[RemoteSlot]]) -> None:
        """Takes in the variables of an optimizer."""
        for each in self.remotes:
            each.give_up(remote.variables)
        for index, of_variable in enumerate(slots):
            for place, slot in enumerate(of_variable, start=1):
                slot.source = RemoteValue(remote.parts(index, place), self._next_number)
        self.held.append(Slots(remote, slots))

    def remotes_of(self, model: keras.Model) -> list[Remote]:
        """The remotes that train variables of a model."""
        return [each for each in self.remotes if any(each.is_trained(v.value) for v in model.trainable_variables)]

    def _next_number(self) -> Number | None:
        is_given = self._program.is_first and not self._program.is_behind()
        return self._number_after(self._number) if is_given else None

    def _number_after(self, number: Number) -> Number:
        fits, step = self._program.place
        return fits, step, (number[2] if number[:2] == (fits, step) else 0) + 1

    def take_assigned(self) -> set[int]:
        """Ids of what servers hold that the program has assigned since this was last asked."""
        assigned = self._apart.take_assigned()
        if not assigned:
            return assigned
        counters = [each.value for remote in self.remotes for of_one in remote.counters for each in of_one]
        slots = [slot for each in self.held for of_variable in each.of_variables for slot in of_variable]
        trained = [variable.value for remote in self.remotes for variable in remote.variables]
        assigned &= set(map(id, [*trained, *counters, *slots, *self.layers.values()]))
        self._number = self._number_after(self._number) if assigned else self._number
        return assigned

    def give_assigned(self) -> None:
        """Gives the servers what the program has assigned on the first worker. [Note: assignments]"""
        assigned = self.take_assigned()
        if assigned and self._program.is_first:
            self._give(assigned, None)

    def _give(self, assigned: set[int], flights: Sequence[dict] | None) -> None:
        """Gives the servers values.

        Args:
            assigned: ids of the variables.
            flights: by server, which steps it has (`Flight`) and what it counts, if a run resumes.
        """
        scalars = {}
        for remote in self.remotes:
            remote.assign(self._number, assigned)
            if any(id(each.value) in assigned for of_one in remote.counters for each in of_one):
                counted = [[float(each.numpy()) for each in of_one] for of_one in remote.counters]
                scalars[str(remote.key)] = [[*values, 0.0] for values in counted]
        layers = {name: value for name, value in self.layers.items() if id(value) in assigned}
        arrays = [np.asarray(value.values[0], np.float64) for value in layers.values()]
        specs = [[name, list(array.shape)] for name, array in zip(layers, arrays, strict=True)]
        for server, peer in enumerate(self._peers):
            flight = flights[server] if flights is not None else {}
            of_server = {**scalars, **flight.get("scalars", {})}
            steps = {name: flight[name] for name in ("done", "pushed")} if flight else None
            message = {"do": "end of assignments", "number": list(self._number), "scalars": of_server, "flight": steps}
            peer.tell({**message, "state": specs if server == 0 else []}, arrays if server == 0 else ())

    def restore(self, model: keras.Model, read: Callable[[Number], tuple[Any, list[dict] | None]]) -> Any:
        """On the first worker: restores what servers hold of a model.

        Args:
            model: the model.
            read: assigns parameters and slots on the servers, under the number that it is given, and all else here.
                Returns a value, and by server, which steps it has (`Flight`); None if workers go on where they are.

        Returns:
            The value.
        """
        self.give_assigned()
        self.count_restored()
        value, flights = read(self._number)
        keys = [str(remote.key) for remote in self.remotes_of(model)]
        for flight in flights or []:
            if "scalars" in flight:
                flight["scalars"] = dict(zip(keys, flight["scalars"], strict=True))
        counters = [each for remote in self.remotes_of(model) for of_one in remote.counters for each in of_one]
        self._give({id(variable.value) for variable in [*counters, *model.non_trainable_variables]}, flights)
        self._peers.ask_all({"do": "tell"})  # they have all of it
        return value

    def count_restored(self) -> None:
        """Counts what the first worker has restored, also where it has done so in a former life."""
        self.take_assigned()
        self._number = self._number_after(self._number)

    def snapshot(self, remotes: Sequence[Remote], known: Mapping[str, tf.Variable]) -> list[dict[str, Any]]:
        """Has all servers copy what they hold, for `RemotePart.read`, and takes their counters and state of layers.

        Args:
            remotes: of what they copy.
            known: the state of layers, by name.

        Returns:
            By server, which steps it has (`Flight`), the digest of what it holds, and by remote what it counts.
        """
        request = {"do": "snapshot", "keys": [remote.key for remote in remotes]}
        answers: list[dict[str, Any]] = []
        state: dict[str, np.ndarray] = {}
        for peer in self._peers:
            own: dict[str, np.ndarray] = {}

            def places(answer: dict[str, Any], own: dict[str, np.ndarray] = own) -> list[np.ndarray]:
                own.update({str(name): np.empty(tuple(shape), np.float64) for name, shape in answer["state"]})
                return list(own.values())

            answers.append(peer.ask(request, (), places))
            state |= own
        for place, remote in enumerate(remotes):
            remote.take_counters([answer["scalars"][place] for answer in answers])
        take_state(known, state)
        return [
            {**answer["flight"], "layout": layout, "scalars": answer["scalars"]}
            for answer, layout in zip(answers, self.layouts(remotes), strict=True)
        ]

    def layouts(self, remotes: Sequence[Remote]) -> list[str]:
        """For each server, a digest of what it holds."""
        held = [json.dumps([remote.layout(server) for remote in remotes]) for server in range(len(self._peers))]
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in held]

    def drop_copies(self) -> None:
        """The copies of the latest snapshot are not read any more."""
        for peer in self._peers:
            peer.tell({"do": "drop copies"})


def take_state(known: Mapping[str, tf.Variable], values: Mapping[str, np.ndarray]) -> None:
    """Takes the state of layers as the servers have it."""
    with tf.init_scope():
        for name, value in values.items():
            for part in known[name].values if name in known else ():
                with tf.device(part.device):
                    part.assign(tf.cast(tf.reshape(value, part.shape), part.dtype))
