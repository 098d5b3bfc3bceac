"""Counts the steps that workers take apart, and merges them. [Note: local steps] in `plan/merging.py`

[Note: meeting to merge] Workers meet after every `sync_every` steps; at the end of an epoch; and before a validation, a
prediction and a save, as these need common values. They meet over their control channel first. So a worker waits there
for a slower one, not in a collective, for as long as its own window took, several times over.

A callback may stop one worker in the middle of a window, as it sees that worker's own logs. If it ended its epoch
there, the others would wait for it, for instance to compare the next batch. So it goes on until all meet, and stop.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.rows.apart import AVERAGED, SUMMED
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
    """The local steps of one model.

    Args:
        model: the model.
        strategy: its strategy.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy) -> None:
        self._model = weakref.ref(model)
        self._strategy = weakref.ref(strategy)
        self.steps = 0  # since the last merge
        self.merges = 0
        self.latest: Merge | None = None
        self._wants_to_stop = False  # when workers meet
        self._takes_steps_apart = False
        self._begun = monotonic()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While an execution of training steps is traced or runs: this worker trains apart. Merges when it is time.

        Raises:
            ValueError: if a window does not end with an execution.
        """
        model, strategy = self._model(), self._strategy()
        every, size = strategy.settings.merging.every, model.steps_per_execution
        if every % size:
            raise ValueError(
                f"Workers merge between two executions, so `sync_every` must be a multiple of `steps_per_execution`. "
                f"Received: sync_every={every}, steps_per_execution={size}"
            )
        self._takes_steps_apart = not self.warms_up
        if self.warms_up:
            with strategy.extended.apart.training(together=True):
                yield
            return
        if self.steps == 0:
            self._begin()
        with strategy.extended.apart.training(together=False):
            yield
        self.steps += size
        if self.steps >= every:
            self.meet(_WINDOW)

    @property
    def warms_up(self) -> bool:
        """Whether the next execution is synchronous."""
        optimizer = self._model().optimizer
        done = int(optimizer.iterations) if optimizer is not None else 0
        return done < self._strategy().settings.merging.warmup

    def meet(self, reason: str) -> None:
        """Meets the other workers, and merges if any has trained. [Note: meeting to merge]

        Args:
            reason: what this worker merges for.

        Raises:
            RuntimeError: if workers are at different places of the program.
            TimeoutError: if a worker does not come.
        """
        strategy, start = self._strategy(), monotonic()
        apart = strategy.extended.apart
        told = {"reason": reason, "rows": apart.take_rows(), "stop": self._wants_to_stop}
        told |= {way: list(apart.changed(way)) for way in (AVERAGED, SUMMED)}
        patience = strategy.settings.timeout_seconds + _PATIENCE * (start - self._begun)
        answers = strategy.channel.all_gather("merging workers", told, patience)
        waited = monotonic() - start
        reasons = sorted({answer["reason"] for answer in answers})
        if len(reasons) > 1:
            raise RuntimeError(f"The workers merge at different places of the program: {' and '.join(reasons)}.")
        if sum(answer["rows"] for answer in answers):
            self._merge(answers, waited)
        self.steps = 0
        self._begun = monotonic()
        if any(answer["stop"] for answer in answers):
            self._wants_to_stop, self._takes_steps_apart = False, False
            self._model().stop_training = True

    def put_off_stop(self) -> None:
        """After the other callbacks have seen the end of a batch: lets the worker stop when all meet."""
        if self._takes_steps_apart and self._model().stop_training:
            self._model().stop_training = False
            self._wants_to_stop = True

    def forget(self) -> None:
        """After all variables have been restored: a new window begins."""
        self.steps, self._wants_to_stop = 0, False
        self._strategy().extended.apart.take_rows()
        for merger in self.mergers:
            merger.forget_lost()

    @property
    def mergers(self) -> list[Merger]:
        """Those of the model's optimizers."""
        trained = [getattr(value, "trained", None) for _, value in sorted(vars(self._model()).items())]
        return [each.merger for each in trained if getattr(each, "merger", None) is not None]

    def _begin(self) -> None:
        self._begun = monotonic()
        self._strategy().extended.apart.begin()
        for merger in self.mergers:
            merger.begin()

    def _merge(self, answers: list[dict], waited: float) -> None:
        rows = np.array([answer["rows"] for answer in answers], np.float64)
        weights = (rows / rows.sum()).astype(np.float32)
        products = sum(merger.merge(weights.tolist()) for merger in self.mergers)
        if isinstance(products, np.ndarray):
            self.latest = Merge(self.steps, cosine(products), distance(products, weights), waited)
        self.merges += 1
        worker = self._strategy().extended.mesh.worker
        self._average(_in_all(answers, AVERAGED), float(weights[worker]))
        self._add_up(_in_all(answers, SUMMED))

    def _average(self, keys: list[str], weight: float) -> None:
        """Takes the workers' weighted mean of the state of layers."""
        changed = self._strategy().extended.apart.changed(AVERAGED)
        variables = [changed[key] for key in keys]
        weighted = [[weight * _wide(part) for part in variable.values] for variable in variables]
        for variable, parts in zip(variables, self._summed(weighted), strict=True):
            _assign(variable, parts)

    def _add_up(self, keys: list[str]) -> None:
        """Adds all workers' changes of the state of layers."""
        apart = self._strategy().extended.apart
        changed = apart.changed(SUMMED)
        common = [[_wide(part) for part in apart.common(key)] for key in keys]
        changes = [
            [_wide(part) - before for part, before in zip(changed[key].values, former, strict=True)]
            for key, former in zip(keys, common, strict=True)
        ]
        for key, before, change in zip(keys, common, self._summed(changes), strict=True):
            _assign(changed[key], [a + b for a, b in zip(before, change, strict=True)])

    def _summed(self, values: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """Sums over workers of values that have a part on each local device, with one all-reduce for each dtype."""
        across: Group = self._strategy().extended.all_group.across
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


def local_steps_of(model: keras.Model, strategy: Any) -> LocalSteps:
    """The local steps of a model of a ZeroStrategy."""
    if model not in strategy.local_steps:
        strategy.local_steps[model] = LocalSteps(model, strategy)
    return strategy.local_steps[model]


def _in_all(answers: list[dict], way: str) -> list[str]:
    """The keys that all workers have; one may have dropped another model already."""
    return [key for key in answers[0][way] if all(key in answer[way] for answer in answers)]


def _wide(value: tf.Tensor | tf.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value


def _assign(variable: tf.Variable, parts: list[tf.Tensor]) -> None:
    for component, part in zip(variable.values, parts, strict=True):
        component.assign(tf.cast(part, component.dtype))
