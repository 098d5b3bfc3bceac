"""The steps of a worker of parameter servers. [Note: servers] in `plan/serving.py`

[Note: a step with servers] In Keras's training step the worker's replicas exchange gradients among themselves, as the
ZeRO stage says, and push each bucket when it is reduced. After the step the worker tells the servers that it has ended,
waits for its turn, and pulls all parameters and the state of layers that others have changed.

[Note: a worker in place of another] A worker that comes in place of a lost one runs the program from its beginning. It
draws the batches of the steps that its predecessor has ended, and trains with none of them. If its steps are bounded it
also leaves out those that the slowest of the others has ended meanwhile. Before its first step it takes what the
servers have.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.plan.placement import Plan
from tfzero.plan.serving import Serving
from tfzero.rows.apart import ADDED, AVERAGED, name_of
from tfzero.servers.client import Peers
from tfzero.servers.frames import FOREVER
from tfzero.servers.keeping import Keeping, take_state
from tfzero.servers.remote import Remote, assign_whole, make_remote, whole_of
from tfzero.variables.remote_slots import RemoteSlot
from tfzero.workers.agreement import versions
from tfzero.workers.cluster import Cluster
from tfzero.workers.meeting import error_of
from tfzero.workers.meeting import told as told_of
from tfzero.workers.stopping import at_farewell


class ServedSteps:
    """Counts the steps of this worker, and exchanges them with the servers.

    Args:
        strategy: the strategy.
        cluster: the workers and servers.

    Attributes:
        step: number of the next step.
        keeping: the variables that servers hold.
        waited_seconds: how long the latest step waited for its turn and the new parameters.

    Raises:
        ConnectionError: if a server cannot be reached.
        ValueError: if other workers have other settings.
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster) -> None:
        settings = strategy.settings
        self._strategy, self._extended, self._worker = weakref.ref(strategy), strategy.extended, cluster.index
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
        self.keeping = Keeping(self.peers, strategy.extended.apart, self)
        self.step = 0
        self.waited_seconds = 0.0
        self._first: int | None = None  # the first step that it trains with; None until it has entered
        self._is_blind = False  # whether it has not seen the state of layers before this step
        self._fits, self._is_in_fit = 0, False
        self._calls: Counter[str] = Counter()  # by topic and place of the program
        self._shared: weakref.WeakSet = weakref.WeakSet()  # models whose untrained values are those of the first worker
        at_farewell(self.peers.leave)

    def post(self, topic: str, value: Any) -> Any:
        """The first worker's value, on all. All workers call it in the same order."""
        answer = self.peers[0].ask({"do": "post", "name": self._name_of(topic, is_of_fit=True), "value": value})
        return answer["value"]

    def begin_fit(self) -> None:
        """A `fit` begins."""
        self._fits, self._is_in_fit = self._fits + 1, True

    @property
    def place(self) -> tuple[int, int]:
        """The place of the program: `fit`s begun, and the next step. It is the same for a worker started again."""
        return self._fits, self.step

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

    def staleness(self) -> np.ndarray:
        """The staleness of each update so far, for a histogram; of many updates 1,000, in proportion."""
        counts = self.peers[0].ask({"do": "tell"})["staleness"]
        per_one = max(1.0, sum(counts.values()) / 1000)
        return np.repeat([int(age) for age in counts], [math.ceil(count / per_one) for count in counts.values()])

    def claims(self, path: str) -> bool:
        """Whether this worker writes a file, as the first that asked and is still here."""
        return bool(self.peers[0].ask({"do": "claim", "name": path})["value"])

    def add(self, given: Sequence[keras.Variable], variables: Sequence[keras.Variable],
            optimizers: Sequence[keras.optimizers.Optimizer], slots: Sequence[Sequence[RemoteSlot]],
            plan: Plan) -> Remote:  # fmt: skip
        """The remote of an optimizer's variables, which are pulled.

        Args:
            given: the variables that it is built for.
            variables: those that it updates.
            optimizers: the inner optimizers.
            slots: of each variable.
            plan: of the local replicas.
        """
        remote = make_remote(len(self.keeping.remotes), given, variables, optimizers, plan, self._strategy())
        self._extended.apart.take_assigned()  # the first worker's values are what it defines
        remote.define(self._worker)
        remote.end_step(self.step)
        self.keeping.add(remote, slots)
        self._pull()
        return remote

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self._serving.workers

    @property
    def worker(self) -> int:
        """Index of this worker."""
        return self._worker

    @property
    def is_first(self) -> bool:
        """Whether this is the first worker, which saves and restores for all."""
        return self._worker == 0

    def first_does(self, topic: str, function: Callable[[], Any], is_of_fit: bool = False) -> Any:
        """What the first worker gets from a function, as JSON, on all workers. All call it alike, between steps.

        If the first worker was started again, and has called the function in a former life, it does not call it again,
        unless that has failed.

        Args:
            topic: what it does.
            function: is called on the first worker.
            is_of_fit: whether every `fit` calls it, once, before its first step.

        Returns:
            Its value; None if the first worker is past this place of the program, where it has not called it.

        Raises:
            Exception: on all workers, what the function has raised.
            RuntimeError: if the first worker is lost before.
        """
        name = self._name_of(topic, is_of_fit)
        passed = None if self.is_first else FOREVER if is_of_fit else self.step
        told = self.peers[0].ask({"do": "hear", "name": name, "step": passed})["told"]
        is_open = not told or "error" in told[0]
        if is_open and self.is_first and (is_of_fit or not self.is_behind()):
            with self.peers.busy():
                try:
                    told = [{"value": function()}]
                except Exception as error:
                    with contextlib.suppress(ConnectionError):  # the error that is raised tells more
                        self._announce(name, told_of(error))
                    raise
                self._announce(name, told[0])
        if told and "error" in told[0]:
            raise error_of(told[0])
        return told[0]["value"] if told else None

    def tell_anew(self, topic: str, value: Any) -> None:
        """On the first worker: tells workers that are started again another value of what `fit` has called."""
        self._announce(f"{topic} {self._fits} 1", {"value": value})

    def _announce(self, name: str, told: dict[str, Any]) -> None:
        self.peers[0].ask({"do": "announce", "name": name, "value": told})

    def _name_of(self, topic: str, is_of_fit: bool) -> str:
        """A name for a call, the same on all workers, and on one that is started again."""
        place = f"{topic} {self._fits}" + ("" if is_of_fit or not self._is_in_fit else f" at {self.step}")
        self._calls[place] += 1
        return f"{place} {self._calls[place]}"

    def go_on_at(self, step: int) -> None:
        """The next step is this one. All workers call it, where a run resumes."""
        self.step, self._first = step, None

    def take_restored(self, model: keras.Model) -> None:
        """Takes what the first worker has restored of a model."""
        self._share(model, anew=True)
        self._pull()

    def snapshot(self, remotes: Sequence[Remote]) -> list[dict[str, Any]]:
        """Has the servers copy what they hold (`Keeping.snapshot`)."""
        return self.keeping.snapshot(remotes, self._known())

    def refresh(self) -> None:
        """Takes what the servers have now."""
        self._give_assigned()
        self._pull()

    def end_fit(self) -> None:
        """Waits until all that are awaited have taken as many steps, and takes what the servers have then."""
        self._give_assigned()
        self._pull(ahead=0, ends=True)
        self._is_in_fit = False

    def is_behind(self) -> bool:
        """Whether the next step was taken before this process began. [Note: a worker in place of another]"""
        if self._first is None:
            self._first = self._enter()
        return self.step < self._first

    def skip(self, model: keras.Model) -> None:
        """Leaves out a step; what the servers have of the model is taken nevertheless."""
        self._share(model)
        self.keeping.take_assigned()
        self._build(model)
        self.step += 1

    def _build(self, model: keras.Model) -> None:
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

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
        if self.step == self._first and self.step > 0:  # [Note: a worker in place of another]
            self._build(model)
            self._pull()
            self._is_blind = not self.keeping.remotes
        for remote in self.keeping.remotes:
            remote.end_step(self.step)
        apart = self._extended.apart
        apart.begin()
        with self.peers.busy():
            try:
                with apart.training(False, lambda optimizer: None):
                    yield
                for remote in self.keeping.remotes:
                    remote.check()
            except BaseException:
                self._leave_step()
                raise
            self._end_step()

    def _give_assigned(self) -> None:
        """Gives the servers what the program has assigned, if it has not done so in a former life."""
        if self.is_behind():
            self.keeping.take_assigned()
        else:
            self.keeping.give_assigned()

    def _share(self, model: keras.Model, anew: bool = False) -> None:
        """Takes the first worker's values of variables that are not trained, such as frozen weights and seeds, once."""
        if (model in self._shared and not anew) or not model.built:
            return
        self._shared.add(model)
        values = [v.value for v in model.non_trainable_variables if v.value.dtype != tf.string]
        self.keeping.layers.update({name_of(value): value for value in values if value.dtype.is_floating or
                             value.dtype.is_integer})  # fmt: skip
        own = [whole_of(value) for value in values]
        arrays = [array.view(np.uint8) if array.dtype == bool else array for array in own]
        specs = [[list(array.shape), array.dtype.name] for array in arrays]
        told = [np.empty_like(array) for array in arrays]
        key = next((remote.key for remote in self.keeping.remotes_of(model)), len(self.keeping.remotes))
        message = {"do": "share", "name": f"of optimizer {key}", "specs": specs, "anew": anew and not self.is_behind()}
        self.peers[0].ask(message, arrays if self._worker == 0 else [], lambda answer: told)
        with tf.init_scope():
            for value, array, received in zip(values, own, told, strict=True):
                assign_whole(value, received.view(array.dtype))

    def _enter(self) -> int:
        """Tells the servers from which step on this worker trains, and returns it."""
        told = self.peers.ask_all({"do": "enter"})
        first = min(each["done"] for each in told)  # a server drops what it has of later steps
        if self._serving.max_staleness is not None:
            # In a bounded run others are ahead by the bound, and by the step after which they wait.
            behind = self._serving.max_staleness and self._serving.max_staleness + 1
            first = max(first, *(each["floor"] - behind for each in told))
        for peer in self.peers:
            peer.tell({"do": "begin", "step": first})
        return int(first)

    def _leave_step(self) -> None:
        """After an error within a step: if a part was pushed, the step counts as taken."""
        self._extended.apart.take_rows()
        if any(remote.has_pushed for remote in self.keeping.remotes):
            with contextlib.suppress(ConnectionError):  # the error that is raised tells more
                self.peers.tell_all({"do": "end", "step": self.step, "rows": 0})
            self.step += 1

    def _end_step(self) -> None:
        """Ends a step that was taken."""
        rows = self._extended.apart.take_rows()
        specs, arrays = [], []
        for name, variable in self._state().items():
            before, now = (np.asarray(each, np.float64) for each in (variable.common[0], variable.values[0]))
            specs.append([name, variable.merged, list(before.shape)])
            arrays += [before, np.zeros_like(before) if self._is_blind else now - before]
        self._is_blind = False
        self.peers.tell_all({"do": "end", "step": self.step, "rows": rows}, specs, arrays)
        self.step += 1
        start = monotonic()
        self._pull(self._serving.max_staleness)
        self.waited_seconds = monotonic() - start

    def _state(self) -> dict[str, tf.Variable]:
        """The state of layers that steps change, and servers merge."""
        changed = {**self._extended.apart.changed(AVERAGED), **self._extended.apart.changed(ADDED)}
        return {k: v for k, v in changed.items() if not any(remote.is_trained(v) for remote in self.keeping.remotes)}

    def _pull(self, ahead: int | None = None, ends: bool = False) -> None:
        """Pulls all parameters and the state of layers.

        Args:
            ahead: waits before, until this worker is so many steps ahead of the slowest at most; None: it does not.
            ends: whether it is at the end of `fit`.
        """
        remotes = [remote for remote in self.keeping.remotes if remote.is_in_use]
        if not remotes:
            return
        flats = [remote.empty() for remote in remotes]
        state: list[tuple[str, np.ndarray]] = []
        request = {"do": "pull", "keys": [remote.key for remote in remotes], "ahead": ahead, "ends": ends}
        scalars: list[list[list[list[float]]]] = []  # by server, and as they tell it
        for number in range(len(self.peers)):

            def places(answer: dict[str, Any], number: int = number) -> list[np.ndarray]:
                own = [(str(name), np.empty(tuple(shape), np.float64)) for name, shape in answer["state"]]
                state.extend(own)
                parts = [part for r, f in zip(remotes, flats, strict=True) for part in r.places(f, number)]
                return [*parts, *(array for _, array in own)]

            scalars.append(self.peers[number].ask(request, (), places)["scalars"])
        for remote, of_remote, counted in zip(remotes, flats, zip(*scalars, strict=True), strict=True):
            remote.take(of_remote)
            remote.take_counters(counted)
        take_state(self._known(), dict(state))

    def _known(self) -> dict[str, tf.Variable]:
        return {**self.keeping.layers, **self._state()}
