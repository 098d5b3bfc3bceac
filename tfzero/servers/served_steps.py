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
from collections.abc import Iterator
from dataclasses import asdict
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.plan.serving import Serving
from tfzero.rows.apart import ADDED, AVERAGED
from tfzero.servers.client import Peers
from tfzero.servers.remote import Remote, make_remote
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
        self._posts = 0
        self._shared: weakref.WeakSet = (
            weakref.WeakSet()
        )  # models of which the first worker has told what is not trained
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
        remote.define(self._worker)
        remote.end_step(self.step)
        self.remotes.append(remote)
        self._pull([remote])
        return remote

    def refresh(self) -> None:
        """Takes what the servers have now."""
        if self.remotes:
            self._pull(self.remotes)

    def end_fit(self) -> None:
        """Waits until all that are awaited have taken as many steps, and takes what the servers have then."""
        if self.remotes:
            self._pull(self.remotes, ahead=0, ends=True)

    def is_behind(self) -> bool:
        """Whether the next step was taken before this process began. [Note: a worker in place of another]"""
        if self._first is None:
            self._first = self._enter()
        return self.step < self._first

    def skip(self) -> None:
        """Leaves out a step."""
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
        if model not in self._shared:
            self._share(model)
        apart = self._extended.apart
        assigned = apart.take_assigned()
        if assigned and self._worker == 0:
            for remote in self.remotes:
                remote.assign(assigned)
        for remote in self.remotes:
            remote.end_step(self.step)
        apart.begin()
        with self.peers.busy():
            with apart.training(False, lambda optimizer: None):
                yield
            self._end()
        self.step += 1

    def _share(self, model: keras.Model) -> None:
        """Takes the first worker's values of variables that are not trained, such as frozen weights and seeds."""
        self._shared.add(model)
        variables = [v.value for v in model.non_trainable_variables if v.value.dtype != tf.string]
        own = [variable.values[0].numpy() for variable in variables]
        arrays = [array.view(np.uint8) if array.dtype == bool else array for array in own]
        message = {
            "do": "share", "name": f"number {len(self._shared)}",
            "specs": [[list(array.shape), array.dtype.name] for array in arrays],
        }  # fmt: skip
        told = [np.empty_like(array) for array in arrays]
        self.peers[0].ask(message, arrays if self._worker == 0 else [], lambda answer: told)
        for variable, array, value in zip(variables, own, told, strict=True):
            for part in variable.values:
                with tf.device(part.device):
                    part.assign(value.view(array.dtype))

    def _enter(self) -> int:
        """Tells the servers from which step on this worker trains, and returns it."""
        told = self.peers.ask_all({"do": "enter"})
        first = max(each["done"] for each in told)
        if self._serving.max_staleness is not None:
            first = max(first, *(each["floor"] for each in told))
        for number in range(len(self.peers)):
            self.peers[number].tell({"do": "begin", "step": first})
        return int(first)

    def _end(self) -> None:
        """Ends a step that was taken."""
        rows = self._extended.apart.take_rows()
        specs, arrays = [], []
        is_first_of_successor = self.step == self._first and self.step > 0  # its layers have not seen the others' state
        for name, variable in self._state().items():
            before, now = (np.asarray(each, np.float64) for each in (variable.common[0], variable.values[0]))
            specs.append([name, variable.merged, list(before.shape)])
            arrays += [before, np.zeros_like(before) if is_first_of_successor else now - before]
        for number in range(len(self.peers)):
            message = {"do": "end", "step": self.step, "rows": rows, "state": specs if number == 0 else []}
            self.peers[number].tell(message, arrays if number == 0 else [])
        start = monotonic()
        self._pull(self.remotes, self._serving.max_staleness)
        self.waited_seconds = monotonic() - start

    def _state(self) -> dict[str, tf.Variable]:
        """The state of layers that steps change, and servers merge."""
        changed = {**self._extended.apart.changed(AVERAGED), **self._extended.apart.changed(ADDED)}
        return {k: v for k, v in changed.items() if not any(remote.is_trained(v) for remote in self.remotes)}

    def _pull(self, remotes: list[Remote], ahead: int | None = None, ends: bool = False) -> None:
        """Pulls all parameters; before, waits until this worker is so many steps ahead of the slowest at most."""
        flats = [remote.empty() for remote in remotes]
        state: list[tuple[str, np.ndarray]] = []
        request = {"do": "pull", "keys": [remote.key for remote in remotes], "ahead": ahead, "ends": ends}
        steps: list[list[int]] = []
        for number in range(len(self.peers)):

            def places(answer: dict[str, Any], number: int = number) -> list[np.ndarray]:
                own = [(str(name), np.empty(tuple(shape), np.float64)) for name, shape in answer["state"]]
                state.extend(own)
                parts = [part for r, f in zip(remotes, flats, strict=True) for part in r.places(f, number)]
                return [*parts, *(array for _, array in own)]

            steps = self.peers[number].ask(request, (), places)["steps"]
        for remote, of_remote, counts in zip(remotes, flats, steps, strict=True):
            remote.take(of_remote, counts)
        known = self._state()
        with tf.init_scope():
            for name, value in state:
                for part in known[name].values if name in known else ():
                    with tf.device(part.device):
                        part.assign(tf.cast(tf.reshape(value, part.shape), part.dtype))
