"""Counts the steps that workers take apart, and merges them. [Note: local steps] in `plan/merging.py`

[Note: meeting to merge] Workers meet after every `sync_every` steps; at the end of an epoch; and before a validation, a
prediction and a save, as these need common values. They meet over their control channel first. So a worker waits there
for a slower one, not in a collective, for as long as its own window took, several times over.

A callback may stop one worker in the middle of a window, as it sees that worker's own logs. If it ended its epoch
there, the others would wait for it, for instance to compare the next batch. So it goes on until all meet, and stop.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.rows.apart import ADDED, AVERAGED, EQUAL, FIRST, TOTAL
from tfzero.training.merging import Merger, cosine, distance

_WINDOW = "the end of a window"
_PATIENCE = 10  # times the duration of this worker's own window


@dataclass(frozen=True)
class Merge:
    """What the latest merge was about.

    Args:
        steps: that this worker took apart.
        cosine: mean cosine between the differences of each two workers; None where there is none.
        distance: root mean square of the workers' distances from their mean, over all trained variables.
        waited_seconds: how long this worker waited for the others.
    """

    steps: int
    cosine: float | None
    distance: float
    waited_seconds: float


class LocalSteps:
    """The local steps of a strategy's workers, whichever models they train. When they meet, all are merged.

    Args:
        strategy: the strategy.

    Attributes:
        steps: since the last merge.
        merges: so far.
        latest: what the latest merge was about; None before.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._of_strategy = weakref.ref(strategy)
        self.steps = 0
        self.merges = 0
        self.latest: Merge | None = None
        self._applied: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizers by model
        self._remade: weakref.WeakSet = weakref.WeakSet()  # models whose steps will be traced anew
        self._models: list[keras.Model] = []  # those of this window, in their order
        self._assigned: dict[str, tuple[str, list[tf.Tensor]]] = {}  # weights that a program gave, with their digests
        self._former_rows = 0  # trained with before a program gave all weights
        self._trains: Callable[[], keras.Model | None] = lambda: None
        self._takes_steps_apart = self._wants_to_stop = False
        self._begun = monotonic()

    @property
    def _strategy(self) -> Any:
        return self._of_strategy()

    def warms_up(self, model: keras.Model) -> bool:
        """Whether a model's next steps are synchronous, by the updates of the optimizers that its steps apply."""
        warmup = self._strategy.settings.merging.warmup
        applied = self._applied.get(model) or [model.optimizer]
        return warmup > 0 and max((int(each.iterations) for each in applied if each is not None), default=0) < warmup

    @contextlib.contextmanager
    def training(self, model: keras.Model, together: bool) -> Iterator[None]:
        """While an execution of training steps is traced or runs: this worker trains apart. Merges when it is time.

        Args:
            model: the model.
            together: whether the steps are synchronous, as they warm up.

        Raises:
            ValueError: if a window does not end with an execution.
        """
        apart = self._strategy.extended.apart
        every, size = self._strategy.settings.merging.every, model.steps_per_execution
        if every % size:
            raise ValueError(
                f"Workers merge between two executions, so `sync_every` must be a multiple of `steps_per_execution`. "
                f"Received: sync_every={every}, steps_per_execution={size}"
            )
        self._takes_steps_apart, self._trains = not together, weakref.ref(model)
        if not together:
            self._begin(model)
        with apart.training(together, lambda optimizer: self._note(model, optimizer)):
            yield
        if together:
            return
        self.steps += size
        if self.steps >= every:
            self.meet(_WINDOW)

    def meet(self, reason: str) -> None:
        """Meets the other workers, and merges if any has trained. [Note: meeting to merge]

        Args:
            reason: what this worker merges for.

        Raises:
            RuntimeError: if workers are at different places of the program.
            TimeoutError: if a worker does not come.
            ValueError: if what they changed cannot be merged.
        """
        start, apart = monotonic(), self._strategy.extended.apart
        self._note_assigned()
        changed = {way: apart.changed(way) for way in (ADDED, TOTAL, AVERAGED, FIRST)}
        told = {
            "reason": reason,
            "rows": [self._former_rows, apart.take_rows()],
            "stop": self._wants_to_stop,
            "assigned": {key: digest for key, (digest, _) in self._assigned.items()},
            EQUAL: {key: str(each.numpy()) for key, each in apart.changed(EQUAL).items()},
            **{way: list(variables) for way, variables in changed.items()},
        }
        patience = self._strategy.settings.timeout_seconds + _PATIENCE * (start - self._begun)
        answers = self._strategy.channel.all_gather("merging workers", told, patience)
        waited = monotonic() - start
        reasons = sorted({answer["reason"] for answer in answers})
        if len(reasons) > 1:
            raise RuntimeError(f"The workers merge at different places of the program: {' and '.join(reasons)}.")
        _check_equal([answer[EQUAL] for answer in answers])
        self._merge(answers, changed, waited)
        if any(answer["stop"] for answer in answers):
            self._wants_to_stop = self._takes_steps_apart = False
            if (model := self._trains()) is not None:
                model.stop_training = True
        self.forget(stops=False)

    def put_off_stop(self, model: keras.Model) -> None:
        """After the other callbacks have seen the end of a batch: lets the worker stop when all meet."""
        if self._takes_steps_apart and model.stop_training:
            model.stop_training, self._wants_to_stop = False, True

    def forget(self, stops: bool = True) -> None:
        """A new window begins, as all have merged or all variables have been restored."""
        self.steps, self._models, self._former_rows = 0, [], 0
        self._assigned.clear()
        self._strategy.extended.apart.take_rows()
        self._strategy.extended.apart.take_assigned()
        self._begun = monotonic()
        if stops:
            self._wants_to_stop = False

    def mergers_of(self, model: keras.Model) -> list[Merger]:
        """Those of the optimizers that a model's steps apply, in this order."""
        return [optimizer.trained.merger for optimizer in self._applied.get(model, ())]

    def remake(self, model: keras.Model) -> None:
        """Notes that a model's steps will be traced anew, and may apply other optimizers."""
        self._remade.add(model)

    def _note(self, model: keras.Model, optimizer: Any) -> None:
        """While a model's step is traced: notes an optimizer that it applies.

        Raises:
            ValueError: if another one trains the same variables.
        """
        former = self._applied.setdefault(model, [])
        if model in self._remade:
            self._remade.discard(model)
            self._applied[model] = []
        applied, merger = self._applied[model], optimizer.trained.merger
        if any(each is optimizer for each in applied):
            return
        known = {id(variable) for each in self.mergers_of(model) for variable in each.variables}
        if both := [variable.path for variable in merger.variables if id(variable) in known]:
            raise ValueError(
                f"Two optimizers train {both[:3]}, and what both do apart cannot be merged. Leave `sync_every` away."
            )
        applied.append(optimizer)
        if not any(each is optimizer for each in former):
            merger.begin()

    def _begin(self, model: keras.Model) -> None:
        if not self._models:
            self._begun = monotonic()
            self._strategy.extended.apart.begin()
        self._note_assigned()
        if not any(each is model for each in self._models):
            self._models.append(model)
            for merger in self.mergers_of(model):
                merger.begin()

    def _mergers(self) -> list[Merger]:
        """Those of the models of this window."""
        return [merger for model in self._models for merger in self.mergers_of(model)]

    def _trained(self) -> dict[str, tuple[Merger, int]]:
        """What the models of this window train: for each variable its merger, and its place there.

        Raises:
            ValueError: if two of them train the same variables.
        """
        mergers = self._mergers()
        variables = [variable for merger in mergers for variable in merger.variables]
        if len({id(variable) for variable in variables}) < len(variables):
            raise ValueError(
                "Two optimizers train the same variables, and what both do apart cannot be merged. Leave `sync_every` "
                "away, or call `strategy.merge()` between their steps."
            )
        return {
            f"{number} {index}": (merger, index)
            for number, merger in enumerate(mergers)
            for index in range(len(merger.variables))
        }

    def _note_assigned(self) -> None:
        """Notes weights that a program has assigned within a window. If all workers got the same, they are common."""
        assigned = self._strategy.extended.apart.take_assigned()
        if not assigned or not self._models:
            return
        trained = self._trained()
        for key, (merger, index) in trained.items():
            if id(merger.variables[index].value) in assigned:
                flats = merger.flat_parts(index)
                digest = hashlib.blake2b(digest_size=8)
                for flat in flats:
                    digest.update(np.ascontiguousarray(tf.cast(flat, tf.float64).numpy()).data)
                self._assigned[key] = digest.hexdigest(), flats
        if len(self._assigned) == len(trained):
            self._former_rows += self._strategy.extended.apart.take_rows()

    def _merge(self, answers: list[dict], changed: dict[str, dict], waited: float) -> None:
        trained = self._trained()
        common = [key for key in self._assigned if len({answer["assigned"].get(key) for answer in answers}) == 1]
        for key in common:
            merger, index = trained[key]
            merger.begin_from(index, self._assigned[key][1])
        # Of weights that are all given anew, only the steps since count.
        is_given = bool(trained) and len(common) == len(trained)
        rows = np.array([sum(answer["rows"][is_given:]) for answer in answers], np.float64)
        all_rows = np.array([sum(answer["rows"]) for answer in answers], np.float64)
        if rows.sum():
            weights = (rows / rows.sum()).astype(np.float32)
            products = sum(merger.merge(weights.tolist()) for merger in self._mergers())
            if isinstance(products, np.ndarray):
                self.latest = Merge(self.steps, cosine(products), distance(products, weights), waited)
            self.merges += 1
            for model in self._models:
                _constrain(model)
        if all_rows.sum():
            worker, keys = self._strategy.extended.mesh.worker, {way: _in_all(answers, way) for way in changed}
            names = {id(merger.variables[index].value) for merger, index in trained.values()}
            averaged = {k: changed[AVERAGED][k] for k in keys[AVERAGED] if id(changed[AVERAGED][k]) not in names}
            self._average(averaged, float(all_rows[worker] / all_rows.sum()))
            self._average({key: changed[FIRST][key] for key in keys[FIRST]}, float(worker == 0))
            self._add_up([changed[ADDED][key] for key in keys[ADDED]])
            self._total([changed[TOTAL][key] for key in keys[TOTAL]])

    def _average(self, variables: dict[str, tf.Variable], weight: float) -> None:
        """Takes the workers' weighted mean of the state of layers."""
        wide = [[_wide(part) for part in variable.values] for variable in variables.values()]
        weighted = [[tf.cast(weight, part.dtype) * part for part in parts] for parts in wide]
        for variable, parts in zip(variables.values(), self._summed(weighted), strict=True):
            _assign(variable, parts)

    def _add_up(self, variables: list[tf.Variable]) -> None:
        """Adds all workers' changes of the state of layers."""
        before = [[_wide(part) for part in variable.common] for variable in variables]
        changes = [
            [_wide(part) - former for part, former in zip(variable.values, of, strict=True)]
            for variable, of in zip(variables, before, strict=True)
        ]
        for variable, of, sums in zip(variables, before, self._summed(changes), strict=True):
            _assign(variable, [total + former for total, former in zip(sums, of, strict=True)])

    def _total(self, variables: list[tf.Variable]) -> None:
        """Adds the values of the workers that have changed them; what none has changed stays."""
        is_other = [[part != former for part, former in zip(v.values, v.common, strict=True)] for v in variables]
        values = [
            [tf.where(other, _wide(part), 0) for part, other in zip(variable.values, others, strict=True)]
            for variable, others in zip(variables, is_other, strict=True)
        ]
        sums = self._summed(values)
        counts = self._summed([[tf.cast(other, tf.int64) for other in others] for others in is_other])
        for variable, total, count in zip(variables, sums, counts, strict=True):
            kept = zip(total, count, variable.values, strict=True)
            _assign(variable, [tf.where(number > 0, new, _wide(part)) for new, number, part in kept])

    def _summed(self, values: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """Sums over workers of values that have a part on each local device, with one all-reduce for each dtype."""
        across: Group = self._strategy.extended.all_group.across
        sums: list[Any] = [None] * len(values)
        for dtype in dict.fromkeys(parts[0].dtype for parts in values):
            places = [place for place, parts in enumerate(values) if parts[0].dtype == dtype]
            flat = [
                tf.concat([tf.reshape(values[place][replica], [-1]) for place in places], 0)
                for replica in range(len(across.devices))
            ]
            of_replicas = [
                tf.split(each, [values[place][0].shape.num_elements() for place in places])
                for each in across.launch(across.all_reduce, flat)
            ]
            for number, place in enumerate(places):
                shape = values[place][0].shape
                sums[place] = [tf.reshape(of_replica[number], shape) for of_replica in of_replicas]
        return sums


def _constrain(model: keras.Model) -> None:
    for variable in model.trainable_variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))


def _check_equal(answers: list[dict]) -> None:
    """Refuses state that is whole numbers, differs, and of which eager steps do not show how to merge it."""
    differing = [key for key in answers[0] if len({answer.get(key, answers[0][key]) for answer in answers}) > 1]
    if differing:
        values = {key: [answer.get(key) for answer in answers] for key in differing[:3]}
        raise ValueError(
            f"Workers that train apart have other whole numbers in layers' variables, {values}. Declare what adds up: "
            '`self.add_weight(..., aggregation="sum")`, or leave `run_eagerly=True` away, as the graph may tell.'
        )


def _in_all(answers: list[dict], way: str) -> list[str]:
    """The keys that all workers have; one may have dropped another model already."""
    return [key for key in answers[0][way] if all(key in answer[way] for answer in answers)]


def _wide(value: tf.Tensor | tf.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value


def _assign(variable: tf.Variable, parts: list[tf.Tensor]) -> None:
    for component, part in zip(variable.values, parts, strict=True):
        component.assign(tf.cast(part, component.dtype))
