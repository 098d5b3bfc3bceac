"""The steps of a worker of parameter servers. [Note: servers] in `plan/serving.py`

[Note: a step with servers] In Keras's training step the worker's replicas exchange gradients among themselves, as the
ZeRO stage says, and push each bucket when it is reduced. After the step the worker tells the servers that it has ended,
waits for its turn, and pulls all parameters and the state of layers that others have changed.

[Note: a worker in place of another] A worker that comes in place of a lost one runs the program from its beginning. It
draws the batches of the steps that its predecessor has ended, and trains with none of them. If its steps are bounded it
also leaves out those that the slowest of the others has ended meanwhile.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.plan.serving import Serving
from tfzero.rows.apart import ADDED, AVERAGED, name_of
from tfzero.servers.client import Peers
from tfzero.servers.remote import Remote, assign_whole, make_remote, whole_of
from tfzero.workers.agreement import versions
from tfzero.workers.cluster import Cluster
from tfzero.workers.stopping import at_farewell


class ServedSteps:
    """Counts the steps of this worker, and exchanges them with the servers.

    Args:
        strategy: the strategy.
        cluster: the workers and servers.

    Attributes:
        step: number of the next step.
        remotes: of the optimizers built so far.
        waited_seconds: how long the latest step waited for its turn and the new parameters.

    Raises:
        ConnectionError: if a server cannot be reached.
        ValueError: if other workers have other settings.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster) -> None:
        settings = strategy.settings
        self._extended, self._worker = strategy.extended, cluster.index
        wanted = {
            "settings": asdict(settings),
            "max_staleness": settings.serving.max_staleness,
            "staleness_aware": settings.serving.staleness_aware,
            "timeout_seconds": settings.timeout_seconds,
            "cluster": [list(cluster.addresses), list(cluster.servers)],
            "versions": versions(),
        }
        self.peers = Peers(cluster, wanted, settings.timeout_seconds)
        self._serving: Serving = settings.serving
        self.remotes: list[Remote] = []
        self.step = 0
        self.waited_seconds = 0.0
        self._first: int | None = None  # the first step that it trains with; None until it has entered
        self._posts = self._assignments = self._models = 0
        self._shared: weakref.WeakSet = weakref.WeakSet()  # models whose untrained values are those of the first worker
        self._layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # their variables, by name
        at_farewell(self.peers.leave)

    def post(self, topic: str, value: Any) -> Any:
        """The value of the worker that has come here first; the same on all. All workers call it in the same order."""
        self._posts += 1
        answer = self.peers[0].ask({"do": "post", "name": f"{self._posts} {topic}", "value": value})
        return answer["value"]

    def scalars(self) -> dict[str, float]:
        """What there is to see of the run, for TensorBoard."""
        told = self.peers[0].ask({"do": "tell"})
        ages = {int(age): count for age, count in told["staleness"].items()}
        updates = sum(ages.values())
        mean = sum(age * count for age, count in ages.items()) / max(updates, 1)
        return {
            "servers/staleness_mean": mean,
            "servers/staleness_most": float(max(ages, default=0)),
            "servers/steps_ahead_most": float(told["most_ahead"]),
            "servers/updates": float(updates),
            "servers/dropped_pushes": float(told["dropped"]),
            "servers/waited_seconds": self.waited_seconds,
        }

    def claims(self, path: str) -> bool:
        """Whether this worker writes a file, as the first that asked and is still here."""
        return bool(self.peers[0].ask({"do": "claim", "name": path})["value"])

    def add(self, *arguments: Any) -> Remote:
        """The remote of an optimizer's variables, which are pulled. The arguments are those of `make_remote`."""
        remote = make_remote(len(self.remotes), *arguments)
        self._extended.apart.take_assigned()  # the first worker's values are what it defines
        remote.define(self._worker)
        remote.end_step(self.step)
        for each in self.remotes:
            each.give_up(remote.variables)
        self.remotes.append(remote)
        self._pull()
        return remote

    def refresh(self) -> None:
        """Takes what the servers have now."""
        self._give_assigned()
        self._pull()

    def end_fit(self) -> None:
        """Waits until all that are awaited have taken as many steps, and takes what the servers have then."""
        self._give_assigned()
        self._pull(ahead=0, ends=True)

    def is_behind(self) -> bool:
        """Whether the next step was taken before this process began. [Note: a worker in place of another]"""
        if self._first is None:
            self._first = self._enter()
        return self.step < self._first

    def skip(self, model: keras.Model) -> None:
        """Leaves out a step; what the servers have of the model is taken nevertheless."""
        self._share(model)
        self._take_assigned()
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self.step += 1

    @contextlib.contextmanager
    def training(self, model: keras.Model) -> Iterator[None]:
        """While a training step is traced or runs, and is exchanged. [Note: a step with servers]

        Raises:
            ConnectionError: if a server is lost.
            ValueError: for executions of several steps.
        """
        if model.steps_per_execution != 1:
            raise ValueError(
                "Workers of parameter servers pull after each step, so `steps_per_execution` must be 1. Received: "
                f"steps_per_execution={model.steps_per_execution}"
            )
        self._share(model)
        self._give_assigned()
        for remote in self.remotes:
            remote.end_step(self.step)
        apart = self._extended.apart
        apart.begin()
        with self.peers.busy():
            try:
                with apart.training(False, lambda optimizer: None):
                    yield
                for remote in self.remotes:
                    remote.check()
            except BaseException:
                self._leave_step()
                raise
            self._end_step()

    def _give_assigned(self) -> None:
        """Gives the servers what the program has assigned on the first worker. Others take what the servers have.

        A first worker that was started again assigns the same values once more; their number tells the servers.
        """
        assigned = self._take_assigned()
        if not assigned or self._worker > 0:
            return
        for remote in self.remotes:
            remote.assign(self._assignments, assigned)
        layers = {name: value for name, value in self._layers.items() if id(value) in assigned}
        arrays = [np.asarray(value.values[0], np.float64) for value in layers.values()]
        specs = [[name, list(array.shape)] for name, array in zip(layers, arrays, strict=True)]
        self._tell_all({"do": "end of assignments", "number": self._assignments}, specs, arrays)

    def _tell_all(self, message: dict[str, Any], specs: Sequence[list], arrays: Sequence[np.ndarray]) -> None:
        """Tells all servers something, and the first one also what belongs to the state of layers."""
        for number in range(len(self.peers)):
            is_first = number == 0
            self.peers[number].tell({**message, "state": specs if is_first else []}, arrays if is_first else [])

    def _take_assigned(self) -> set[int]:
        """Ids of the variables, of those that servers hold, that the program has assigned since this was last asked."""
        held = [variable.value for remote in self.remotes for variable in remote.variables] + [*self._layers.values()]
        assigned = self._extended.apart.take_assigned() & set(map(id, held))
        self._assignments += bool(assigned)
        return assigned

    def _share(self, model: keras.Model) -> None:
        """Takes the first worker's values of variables that are not trained, such as frozen weights and seeds, once."""
        if model in self._shared or not model.built:
            return
        self._shared.add(model)
        self._models += 1
        values = [v.value for v in model.non_trainable_variables if v.value.dtype != tf.string]
        self._layers.update({name_of(value): value for value in values if value.dtype.is_floating or
                             value.dtype.is_integer})  # fmt: skip
        own = [whole_of(value) for value in values]
        arrays = [array.view(np.uint8) if array.dtype == bool else array for array in own]
        specs = [[list(array.shape), array.dtype.name] for array in arrays]
        told = [np.empty_like(array) for array in arrays]
        message = {"do": "share", "name": f"number {self._models}", "specs": specs}
        self.peers[0].ask(message, arrays if self._worker == 0 else [], lambda answer: told)
        with tf.init_scope():
            for value, array, received in zip(values, own, told, strict=True):
                assign_whole(value, received.view(array.dtype))

    def _enter(self) -> int:
        """Tells the servers from which step on this worker trains, and returns it."""
        told = self.peers.ask_all({"do": "enter"})
        first = max(each["done"] for each in told)
        if self._serving.max_staleness is not None:
            first = max(first, *(each["floor"] for each in told))
        self.peers.tell_all({"do": "begin", "step": first})
        return int(first)

    def _leave_step(self) -> None:
        """After an error within a step: if a part was pushed, the step counts as taken."""
        self._extended.apart.take_rows()
        if any(remote.has_pushed for remote in self.remotes):
            with contextlib.suppress(ConnectionError):  # the error that is raised tells more
                self._tell_all({"do": "end", "step": self.step, "rows": 0}, [], [])
            self.step += 1

    def _end_step(self) -> None:
        """Ends a step that was taken."""
        rows = self._extended.apart.take_rows()
        specs, arrays = [], []
        is_first_of_successor = self.step == self._first and self.step > 0  # its layers have not seen the others' state
        for name, variable in self._state().items():
            before, now = (np.asarray(each, np.float64) for each in (variable.common[0], variable.values[0]))
            specs.append([name, variable.merged, list(before.shape)])
            arrays += [before, np.zeros_like(before) if is_first_of_successor else now - before]
        self._tell_all({"do": "end", "step": self.step, "rows": rows}, specs, arrays)
        self.step += 1
        start = monotonic()
        self._pull(self._serving.max_staleness)
        self.waited_seconds = monotonic() - start

    def _state(self) -> dict[str, tf.Variable]:
        """The state of layers that steps change, and servers merge."""
        changed = {**self._extended.apart.changed(AVERAGED), **self._extended.apart.changed(ADDED)}
        return {k: v for k, v in changed.items() if not any(remote.is_trained(v) for remote in self.remotes)}

    def _pull(self, ahead: int | None = None, ends: bool = False) -> None:
        """Pulls all parameters and the state of layers.

        Args:
            ahead: waits before, until this worker is so many steps ahead of the slowest at most; None: it does not.
            ends: whether it is at the end of `fit`.
        """
        remotes = [remote for remote in self.remotes if remote.is_in_use]
        if not remotes:
            return
        flats = [remote.empty() for remote in remotes]
        state: list[tuple[str, np.ndarray]] = []
        request = {"do": "pull", "keys": [remote.key for remote in remotes], "ahead": ahead, "ends": ends}
        steps: list[list[list[int]]] = []  # by server, optimizer and inner optimizer
        for number in range(len(self.peers)):

            def places(answer: dict[str, Any], number: int = number) -> list[np.ndarray]:
                own = [(str(name), np.empty(tuple(shape), np.float64)) for name, shape in answer["state"]]
                state.extend(own)
                parts = [part for r, f in zip(remotes, flats, strict=True) for part in r.places(f, number)]
                return [*parts, *(array for _, array in own)]

            steps.append(self.peers[number].ask(request, (), places)["steps"])
        # A server that holds nothing of an optimizer counts no step of it.
        counts = [[max(inner) for inner in zip(*of_remote, strict=True)] for of_remote in zip(*steps, strict=True)]
        for remote, of_remote, each in zip(remotes, flats, counts, strict=True):
            remote.take(of_remote, each)
        known = {**self._layers, **self._state()}
        with tf.init_scope():
            for name, value in state:
                for part in known[name].values if name in known else ():
                    with tf.device(part.device):
                        part.assign(tf.cast(tf.reshape(value, part.shape), part.dtype))
