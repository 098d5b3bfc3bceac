"""What a program assigns, saves and restores of what servers hold.

[Note: assignments] Of values that a program assigns, those of the first worker count. It gives them to the servers
before its next step, under a number: how often the program has assigned values. A first worker that was started again
runs the program once more, and the servers know the numbers that they have.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.rows.apart import Apart
from tfzero.servers.client import Peers
from tfzero.servers.parts import RemoteValue
from tfzero.servers.remote import Remote
from tfzero.variables.remote_slots import RemoteSlot


@dataclass(frozen=True)
class Slots:
    """The slots of an optimizer that servers hold, by variable."""

    remote: Remote
    of_variables: Sequence[Sequence[RemoteSlot]]


class Keeping:
    """A worker's view of what servers hold. [Note: assignments]

    Args:
        peers: the servers.
        apart: notes what a program assigns.
        gives: whether this is the worker whose assignments count.
        is_past: tells whether the program is where a former life of this worker has been.
    """

    def __init__(self, peers: Peers, apart: Apart, gives: bool, is_past: Callable[[], bool]) -> None:
        self._peers, self._apart, self._gives, self._is_past = peers, apart, gives, is_past
        self.held: list[Slots] = []
        self.layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # untrained variables, by name
        self._number = 0  # of assignments

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

    def _next_number(self) -> int | None:
        return self._number + 1 if self._gives and not self._is_past() else None

    def take_assigned(self) -> set[int]:
        """Ids of what servers hold that the program has assigned since this was last asked."""
        counters = [each.value for remote in self.remotes for of_one in remote.counters for each in of_one]
        slots = [slot for each in self.held for of_variable in each.of_variables for slot in of_variable]
        trained = [variable.value for remote in self.remotes for variable in remote.variables]
        held = set(map(id, [*trained, *counters, *slots, *self.layers.values()]))
        assigned = self._apart.take_assigned() & held
        self._number += bool(assigned)
        return assigned

    def give_assigned(self) -> None:
        """Gives the servers what the program has assigned on the first worker. [Note: assignments]"""
        assigned = self.take_assigned()
        if assigned and self._gives:
            self._give(assigned, None)

    def _give(self, assigned: set[int], flights: Sequence[dict] | None) -> None:
        """Gives the servers values.

        Args:
            assigned: ids of the variables.
            flights: by server, which steps it has (`Flight`), if a run resumes.
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
            flight = None if flights is None else flights[server]
            message = {"do": "end of assignments", "number": self._number, "scalars": scalars, "flight": flight}
            peer.tell({**message, "state": specs if server == 0 else []}, arrays if server == 0 else ())

    def restore(self, read: Callable[[int], tuple[Any, list[dict] | None]]) -> Any:
        """On the first worker: restores what servers hold.

        Args:
            read: assigns parameters and slots on the servers, under the number that it is given, and all else here.
                Returns a value, and by server, which steps it has (`Flight`); None if workers go on where they are.

        Returns:
            The value.
        """
        self.count_restored()
        value, flights = read(self._number)
        counters = [each.value for remote in self.remotes for of_one in remote.counters for each in of_one]
        self._give(set(map(id, [*counters, *self.layers.values()])), flights)
        self._peers.ask_all({"do": "tell"})  # they have all of it
        return value

    def count_restored(self) -> None:
        """Counts what the first worker has restored, also where it has done so in a former life."""
        self.take_assigned()
        self._number += 1

    def snapshot(self, known: Mapping[str, tf.Variable]) -> list[dict[str, Any]]:
        """Has all servers copy what they hold, for `RemotePart.read`, and takes their counters and state of layers.

        Args:
            known: the state of layers, by name.

        Returns:
            By server, which steps it has (`Flight`), and the digest of what it holds.
        """
        request = {"do": "snapshot", "keys": [remote.key for remote in self.remotes]}
        answers: list[dict[str, Any]] = []
        state: dict[str, np.ndarray] = {}
        for peer in self._peers:
            own: dict[str, np.ndarray] = {}

            def places(answer: dict[str, Any], own: dict[str, np.ndarray] = own) -> list[np.ndarray]:
                own.update({str(name): np.empty(tuple(shape), np.float64) for name, shape in answer["state"]})
                return list(own.values())

            answers.append(peer.ask(request, (), places))
            state |= own
        for place, remote in enumerate(self.remotes):
            remote.take_counters([answer["scalars"][place] for answer in answers])
        take_state(known, state)
        return [{**a["flight"], "layout": layout} for a, layout in zip(answers, self.layouts(), strict=True)]

    def layouts(self) -> list[str]:
        """For each server, a digest of what it holds."""
        held = [json.dumps([remote.layout(server) for remote in self.remotes]) for server in range(len(self._peers))]
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
