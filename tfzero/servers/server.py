"""A parameter server: it holds its part of every model, and answers its workers. [Note: servers] in `plan/serving.py`

[Note: numbered pushes] Each push carries its worker's number of the step, and the server keeps the last number of each
worker and message. So a push counts once, also when a worker that was started again repeats a step that its
predecessor has pushed in part.

[Note: a synchronous step] With `max_staleness=0` the server takes the gradients of a message in the order of ranks, as
they come, and updates when all workers that are awaited have pushed it or ended the step. So sums do not depend on who
came first. A push for a step that was taken without its worker is dropped.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfzero.servers.clocks import Clocks
from tfzero.servers.layer_state import Change, LayerState
from tfzero.servers.models import Assignments, Flight, Model, Push, Snapshot, difference_of, spread
from tfzero.servers.store import Definition, Store

_CHECK_SECONDS = 0.2  # between two looks at the clocks while a worker waits


class Server:
    """What workers ask of a server, whatever line they use. One lock guards all of it.

    Args:
        workers: number of workers.
        max_staleness: as in `Serving`.
        timeout_seconds: of silence, after which a worker counts as lost.
        staleness_aware: as in `Serving`.
    """

    def __init__(
        self, workers: int, max_staleness: int | None, timeout_seconds: float, staleness_aware: bool = False
    ) -> None:
        self.clocks = Clocks(workers, max_staleness, timeout_seconds)
        self.models: dict[int, Model] = {}
        self.board: dict[str, Any] = {}  # what the first worker that came has told the others
        self.layers = LayerState()
        self.shared: dict[str, list[np.ndarray]] = {}  # first values of variables that are not trained, by model
        self._copies: dict[int, dict[tuple[int, int, int], np.ndarray]] = {}  # of the latest snapshot, by model
        self._files: dict[str, int] = {}  # by name, the worker that writes it
        self.staleness: Counter[int] = Counter()  # updates by others between a worker's pull and its push
        self.most_ahead = 0  # steps that a worker was ever ahead of the slowest when it went on
        self.dropped = 0  # pushes that did not count, as they came twice or too late
        self._is_aware = staleness_aware
        self._synchronous_step = 0
        self._assignments: tuple[int, ...] = ()  # the number of the latest. [Note: assignments] in `keeping.py`
        self._passed = 0  # steps that the first worker has taken by itself, or that all had when a run resumed
        self._changed = threading.Condition()

    @property
    def is_synchronous(self) -> bool:
        return self.clocks.max_staleness == 0

    def come(self, worker: int) -> None:
        with self._changed:
            self.clocks.come(worker)

    def lose(self, worker: int) -> None:
        """A worker is lost or has left: others do not wait for it."""
        with self._changed:
            self.clocks.lose(worker)
            if worker == 0:
                self._copies.clear()  # which only the first worker reads
            self._changed.notify_all()

    def beat(self, worker: int, idle_seconds: float) -> None:
        with self._changed:
            self.clocks.trains(worker, idle_seconds)

    def enter(self, worker: int) -> dict[str, int]:
        """How many steps a worker has ended in a former life, and the slowest of the others."""
        with self._changed:
            return {"done": self.clocks.done[worker], "floor": self.clocks.floor(worker)}

    def begin(self, worker: int, step: int) -> None:
        """A worker's next step is this one."""
        with self._changed:
            self.clocks.done[worker] = max(self.clocks.done[worker], step)
            self.clocks.trains(worker)
            self._changed.notify_all()

    def define(self, key: int, definition: dict, values: list[np.ndarray] | None, is_lost: Callable[[], bool]) -> None:
        """Makes the store of an optimizer's variables, or checks that it is the one that a worker means.

        Args:
            key: number of the optimizer.
            definition: of the store, as JSON.
            values: the first worker's first values; None from the others, which wait for them.
            is_lost: whether the worker that asks is gone.

        Raises:
            ValueError: for another model, or one that cannot be served.
            RuntimeError: if the first worker does not define it.
        """
        with self._changed:
            if values is not None and key not in self.models:
                self.models[key] = Model(definition, Store(Definition.read(definition), values))
                self._changed.notify_all()
            if not self._await_first_worker(lambda: key in self.models, is_lost):
                return
            if self.models[key].definition != definition:
                raise ValueError(
                    f"The servers hold another model: {difference_of(self.models[key].definition, definition)}. Start "
                    "all workers and servers again, with the same program on every worker."
                )

    def share(
        self, name: str, values: list[np.ndarray] | None, anew: bool, is_lost: Callable[[], bool]
    ) -> list[np.ndarray]:
        """The first worker's values of variables that are not trained.

        Args:
            name: of the model.
            values: the first worker's; None from the others, which wait for them.
            anew: whether they take the place of earlier ones.
            is_lost: whether the worker that asks is gone.

        Raises:
            RuntimeError: if the first worker does not tell them.
        """
        with self._changed:
            if values is not None and (anew or name not in self.shared):
                self.shared[name] = values
                self._changed.notify_all()
            self._await_first_worker(lambda: name in self.shared, is_lost)
            return self.shared.get(name, [])

    def _await_first_worker(self, has_told: Callable[[], bool], is_lost: Callable[[], bool]) -> bool:
        """Waits until the first worker has told something. Returns whether the worker that waits is still here."""
        while not has_told():
            if is_lost():
                return False
            if self.clocks.is_lost(0):
                raise RuntimeError("The first worker was lost before it told the others what to train, or to restore.")
            if 0 not in self.clocks.awaited():
                raise RuntimeError(
                    f"The first worker has not come within {self.clocks.timeout_seconds:g} s to tell the servers what "
                    "to train."
                )
            self._changed.wait(_CHECK_SECONDS)
        return True

    def assign(self, number: tuple[int, ...], key: int, where: tuple[int, int, int], part: np.ndarray) -> None:
        """The first worker's program has given parameters or slots other values, for the time of this number."""
        with self._changed:
            if number > self._assignments:
                self.models[key].store.part(*where).assign(part)

    def end_assignments(self, number: tuple[int, ...], ended: Assignments) -> None:
        """All values of this number have come; also those that are no parts of variables. A number counts once."""
        with self._changed:
            if number <= self._assignments:
                return
            self._assignments = number
            self.layers.values |= {name: value for name, value in ended.state.items() if name in self.layers.values}
            for key, scalars in ended.scalars.items():
                self.models[key].store.scalars = scalars
            if ended.flight is not None:
                self.clocks.done[:] = ended.flight.done
                self.clocks.at_end.clear()
                self._synchronous_step = self._passed = min(ended.flight.done)
                for key, model in self.models.items():
                    model.resume(key, ended.flight)
            self._changed.notify_all()

    def snapshot(self, keys: Sequence[int]) -> Snapshot:
        """Copies all that is held of these models, for `read`, and tells what else belongs to it."""
        with self._changed:
            models = {key: self.models[key] for key in keys}
            flight = Flight(list(self.clocks.done))
            if self.is_synchronous:  # what has come of the next step mostly waits, and is not in the copies
                flight.done[:] = [min(count, self._synchronous_step) for count in flight.done]
            flight.pushed.extend(each for key, model in models.items() for each in model.in_flight(key, flight))
            self._copies = {key: model.store.copy() for key, model in models.items()}
            return Snapshot(flight, [model.store.scalars for model in models.values()], *self.layers.in_order())

    def read(self, key: int, where: tuple[int, int, int], is_copied: bool) -> np.ndarray:
        """A parameter's or slot's part, as it was when it was copied, or now."""
        with self._changed:
            return self._copies[key][where] if is_copied else self.models[key].store.part(*where).numpy()

    def drop_copies(self) -> None:
        """Nobody reads the copies of the latest `snapshot` any more."""
        with self._changed:
            self._copies.clear()

    def push(self, worker: int, key: int, message: int, step: int, push: Push) -> None:
        """A worker's gradients for a message. [Note: numbered pushes]"""
        with self._changed:
            model = self.models[key]
            is_late = self.is_synchronous and step < self._synchronous_step
            if step < max(self.clocks.done[worker], model.pushed.get((worker, message), 0)) or is_late:
                self.dropped += 1
                return
            model.pushed[worker, message] = step + 1
            model.is_updated.add(worker)
            if self.is_synchronous:
                model.waiting.setdefault((message, step), {})[worker] = push
                self._update_if_complete(model, message, step)
            else:
                divisor = max(1, model.staleness_of(worker)) if self._is_aware else 1
                model.store.update(message, push.active, push.gradient, push.rates, divisor)

    def end(self, worker: int, step: int, rows: int, changes: Mapping[str, Change]) -> None:
        """A worker has pushed all of a step.

        Args:
            worker: the worker.
            step: its number.
            rows: that it trained with.
            changes: of the state of layers, by name.
        """
        with self._changed:
            is_late = self.is_synchronous and step < self._synchronous_step
            if not self.clocks.end(worker, step) or is_late:
                self._changed.notify_all()
                return
            self._passed = step + 1 if worker == 0 else self._passed
            self.layers.note(worker, rows, changes)
            if self.is_synchronous:
                self._end_step_if_all_have(step)
            else:
                self.layers.merge(self.clocks.workers)
                for model in self.models.values():
                    if worker in model.is_updated:
                        model.is_updated.discard(worker)
                        model.store.count()
                        self.staleness[model.staleness_of(worker)] += 1
                        model.updates += 1
            self._changed.notify_all()

    def wait_for_others(self, worker: int, ahead: int, ends: bool, is_lost: Callable[[], bool]) -> None:
        """Waits until a worker is so many steps ahead of the slowest at most.

        Args:
            worker: the worker.
            ahead: that many steps.
            ends: whether it is at the end of `fit`.
            is_lost: whether it is gone.
        """
        with self._changed:
            if ends:
                self.clocks.at_end.add(worker)
                self._changed.notify_all()
            while not is_lost():
                if self.is_synchronous:
                    self._end_step_if_all_have(self.clocks.done[worker] - 1)
                if self.clocks.lead(worker) <= ahead:
                    return
                self._changed.wait(_CHECK_SECONDS)

    def values(self, worker: int, keys: Sequence[int]) -> tuple[list[list[list[float]]], list[list], list[np.ndarray]]:
        """For each of these models what its optimizers count (`Store.scalars`). Then names and shapes of the state of
        layers. Then all values: parameters by model and message, and that state.
        """
        with self._changed:
            self.most_ahead = max(self.most_ahead, self.clocks.lead(worker))
            scalars, arrays = [], []
            for model in (self.models[key] for key in keys):
                model.pulled[worker] = model.updates
                scalars.append(model.store.scalars)
                arrays += [model.store.values(n) for n in range(len(model.store.definition.messages))]
            names, state = self.layers.in_order()
            return scalars, names, [*arrays, *state]

    def post(self, worker: int, name: str, value: Any, is_lost: Callable[[], bool]) -> Any:
        """The value that the first worker tells under a name; without it, that of the first to come.

        Args:
            worker: that asks.
            name: of the value.
            value: this worker's.
            is_lost: whether this worker is gone.
        """
        with self._changed:
            while worker > 0 and name not in self.board and not is_lost() and 0 in self.clocks.awaited():
                self._changed.wait(_CHECK_SECONDS)
            self._changed.notify_all()
            return self.board.setdefault(name, value)

    def announce(self, name: str, value: Any) -> None:
        """The first worker tells something under a name, perhaps anew."""
        with self._changed:
            self.board[name] = value
            self._changed.notify_all()

    def hear(self, name: str, step: float | None, is_lost: Callable[[], bool]) -> Any:
        """What the first worker has announced, in a list; [] if it has not.

        Args:
            name: of it.
            step: waits for it, until the first worker has ended this step, as it has passed that place of the program
                without; None does not wait.
            is_lost: whether the worker that asks is gone.

        Raises:
            RuntimeError: if the first worker is lost before.
        """
        with self._changed:
            if step is not None:
                self._await_first_worker(lambda: name in self.board or self._passed > step, is_lost)
            return [self.board[name]] if name in self.board else []

    def claim(self, name: str, worker: int) -> bool:
        """Whether a worker writes the file of this name: the first to claim it that is still here."""
        with self._changed:
            owner = self._files.get(name)
            if owner is None or not self.clocks.is_here[owner]:
                self._files[name] = worker
            return self._files[name] == worker

    def tell(self) -> dict[str, Any]:
        """What there is to know about the run so far."""
        with self._changed:
            return {
                "staleness": {str(age): count for age, count in sorted(self.staleness.items())},
                "most_ahead": self.most_ahead,
                "dropped": self.dropped,
                "held_bytes": sum(model.store.held_bytes for model in self.models.values()),
                "done": self.clocks.done,
            }

    def _update_if_complete(self, model: Model, message: int, step: int) -> None:
        """Updates a message as soon as nobody's gradient is missing. [Note: a synchronous step]"""
        pushes = model.waiting[message, step]
        missing = [w for w in self.clocks.awaited() if w not in pushes and self.clocks.done[w] <= step]
        if missing:
            return
        del model.waiting[message, step]
        rows = sum(push.rows for push in pushes.values())
        if not rows:
            return
        first = pushes[min(pushes)]
        places = sorted({place for push in pushes.values() for place in push.active})
        total: np.ndarray | None = None
        for worker in sorted(pushes):
            share = spread(model.store.definition, message, places, pushes[worker]) * (pushes[worker].rows / rows)
            total = share if total is None else total + share
        dtype = first.gradient.dtype
        model.store.update(message, places, np.asarray(total).astype(dtype), first.rates)

    def _end_step_if_all_have(self, step: int) -> None:
        """Ends a synchronous step, if all that are awaited have."""
        if step < self._synchronous_step or not self.clocks.have_ended(step):
            return
        self._synchronous_step = step + 1
        self.layers.merge()
        for model in self.models.values():
            for message, of_step in list(model.waiting):
                if of_step == step:
                    self._update_if_complete(model, message, step)
            if model.is_updated:
                model.is_updated.clear()
                model.store.count()
                model.updates += 1
                self.staleness[0] += 1
        self._changed.notify_all()
