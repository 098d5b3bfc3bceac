"""Counts the steps that workers take apart, and merges them. [Note: local steps] in `plan/merging.py`

[Note: meeting to merge] Workers meet after every `sync_every` steps; at the end of an epoch; and before a validation, a
prediction and a save, as these need common values. They meet over their control channel first. So a worker waits there
for a slower one, not in a collective, for as long as its own window took, several times over.

A callback may stop one worker in the middle of a window, as it sees that worker's own logs. If it ended its epoch
there, the others would wait for it, for instance to compare the next batch. So it goes on until all meet, and stop.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.rows.apart import ADDED, AVERAGED, EQUAL, TOTAL
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
        self._stopped: keras.Model | None = None  # the model whose training stops when workers meet
        self._takes_steps_apart = False
        self._begun = monotonic()

    @property
    def _strategy(self) -> Any:
        return self._of_strategy()

    def warms_up(self, model: keras.Model) -> bool:
        """Whether a model's next steps are synchronous."""
        done = int(model.optimizer.iterations) if model.optimizer is not None else 0
        return done < self._strategy.settings.merging.warmup

    @contextlib.contextmanager
    def training(self, model: keras.Model) -> Iterator[None]:
        """While an execution of training steps is traced or runs: this worker trains apart. Merges when it is time.

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
        together = self.warms_up(model)
        self._takes_steps_apart = not together
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
            ValueError: if what they changed cannot be merged.
            TimeoutError: if a worker does not come.
        """
        start, apart = monotonic(), self._strategy.extended.apart
        self._heed_assigned()
        told = {"reason": reason, "rows": apart.take_rows(), "stop": self._stopped is not None}
        told |= {way: list(apart.changed(way)) for way in (ADDED, TOTAL, AVERAGED)}
        told[EQUAL] = {key: str(each.numpy()) for key, each in apart.changed(EQUAL).items()}
        patience = self._strategy.settings.timeout_seconds + _PATIENCE * (start - self._begun)
        answers = self._strategy.channel.all_gather("merging workers", told, patience)
        reasons = sorted({answer["reason"] for answer in answers})
        if len(reasons) > 1:
            raise RuntimeError(f"The workers merge at different places of the program: {' and '.join(reasons)}.")
        _check_equal([answer[EQUAL] for answer in answers])
        if sum(answer["rows"] for answer in answers):
            self._merge(answers, monotonic() - start)
        if any(answer["stop"] for answer in answers):
            for model in self._models:
                model.stop_training = True
            self._stopped, self._takes_steps_apart = None, False
        self.steps, self._models = 0, []
        self._begun = monotonic()

    def put_off_stop(self, model: keras.Model) -> None:
        """After the other callbacks have seen the end of a batch: lets the worker stop when all meet."""
        if self._takes_steps_apart and model.stop_training:
            model.stop_training, self._stopped = False, model

    def forget(self) -> None:
        """After the variables of a model have been restored: a new window begins."""
        self.steps, self._models, self._stopped = 0, [], None
        self._strategy.extended.apart.take_rows()

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
        self._heed_assigned()
        if not self._models:
            self._begun = monotonic()
            self._strategy.extended.apart.begin()
        if not any(each is model for each in self._models):
            self._models.append(model)
            for merger in self.mergers_of(model):
                merger.begin()

    def _mergers(self) -> list[Merger]:
        """Those of all models of this window."""
        return [merger for model in self._models for merger in self.mergers_of(model)]

    def _heed_assigned(self) -> None:
        """Takes weights that a program has assigned within a window for common ones: it gave all workers the same."""
        apart, mergers = self._strategy.extended.apart, self._mergers()
        assigned = apart.take_assigned()
        trained = {id(variable.value) for merger in mergers for variable in merger.variables}
        if trained and trained <= assigned:
            self.steps, self._models = 0, []
            apart.take_rows()
            return
        for merger in mergers:
            merger.begin(assigned)

    def _merge(self, answers: list[dict], waited: float) -> None:
        mergers = self._mergers()
        rows = np.array([answer["rows"] for answer in answers], np.float64)
        weights = (rows / rows.sum()).astype(np.float32)
        products = sum(merger.merge(weights.tolist()) for merger in mergers)
        if isinstance(products, np.ndarray):
            self.latest = Merge(self.steps, cosine(products), distance(products, weights), waited)
        self.merges += 1
        self._average(_in_all(answers, AVERAGED), float(weights[self._strategy.extended.mesh.worker]))
        self._add_up(_in_all(answers, ADDED), ADDED)
        self._add_up(_in_all(answers, TOTAL), TOTAL)
        for model in self._models:
            _constrain(model)
        self._strategy.extended.apart.take_assigned()

    def _average(self, keys: list[str], weight: float) -> None:
        """Takes the workers' weighted mean of the state of layers, without what optimizers train."""
        changed = self._strategy.extended.apart.changed(AVERAGED)
        trained = {id(variable.value) for merger in self._mergers() for variable in merger.variables}
        variables = [changed[key] for key in keys if id(changed[key]) not in trained]
        weighted = [[weight * _wide(part) for part in variable.values] for variable in variables]
        for variable, parts in zip(variables, self._summed(weighted), strict=True):
            _assign(variable, parts)

    def _add_up(self, keys: list[str], way: str) -> None:
        """Adds all workers' changes of the state of layers, or their values."""
        changed = self._strategy.extended.apart.changed(way)
        variables = [changed[key] for key in keys]
        before = [[_wide(part) for part in variable.common] for variable in variables]
        added = [
            [_wide(part) - former for part, former in itertools.zip_longest(variable.values, of, fillvalue=0)]
            for variable, of in zip(variables, before, strict=True)
        ]
        for variable, of, sums in zip(variables, before, self._summed(added), strict=True):
            _assign(variable, [total + former for total, former in itertools.zip_longest(sums, of, fillvalue=0)])

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
