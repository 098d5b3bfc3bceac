"""What workers that train apart merge: parts of variables, and the outer optimizer of each part's owner.

[Note: merging] in `training/merging.py`
"""

import copy
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfzero.collectives.packing import as_rows
from tfzero.plan.merging import AVERAGE, Merging
from tfzero.training.stock_optimizers import is_elementwise

# What is kept for a part beside an optimizer's slots.
MASTER, RESIDUAL = "master", "residual"
_SLOT = re.compile(r"part\d+_")
# Settings of an outer optimizer that need more than the owner's part, or further steps.
_REFUSED = ("clipnorm", "global_clipnorm", "use_ema", "loss_scale_factor", "gradient_accumulation_steps")


@dataclass(frozen=True, eq=False)
class Part:
    """What a worker merges of one variable at one of its replicas. [Note: merging]

    Args:
        index: of the variable among those merged.
        value: the replica's component of it.
        elements: number of elements of this component, without what pads a shard.
        master: this worker's own part of the value, `[width]`, as the outer optimizer updates it.
        common: the value of the last merge, flat; None if differences are not encoded.
        residual: what encoding has lost of this worker's differences, `[workers, width]`; None without error feedback.
    """

    index: int
    value: tf.Variable
    elements: int
    master: keras.Variable
    common: tf.Variable | None
    residual: tf.Variable | None

    @property
    def flat(self) -> tf.Tensor:
        """The component's elements, `[elements]`."""
        return tf.reshape(self.value, [-1])[: self.elements]

    @property
    def width(self) -> int:
        return self.master.shape[0]

    def begin(self, flat: tf.Tensor, own: int, workers: int) -> None:
        """Begins a window of local steps. [Note: window] in `training/merging.py`

        Args:
            flat: the component's elements.
            own: which of the parts is this worker's.
            workers: number of parts.
        """
        left = tf.cast(self.master.value, self.value.dtype)
        if self.common is not None:
            left = self.rows(self.common, workers)[own]
            self.common.assign(flat)
        now = self.rows(flat, workers)[own]
        is_left = (left == now) & ~tf.math.is_nan(self.master.value)
        self.master.value.assign(tf.where(is_left, self.master.value, tf.cast(now, self.master.value.dtype)))

    def rows(self, flat: tf.Tensor, workers: int) -> tf.Tensor:
        """Elements of the component as `[workers, width]`: of each owner's part a row."""
        return as_rows(tf.convert_to_tensor(flat), workers)

    def assign(self, flat: tf.Tensor, components: Sequence[tf.Variable]) -> None:
        """Assigns elements to components that are equal to this one. What pads them stays."""
        rest = tf.reshape(self.value, [-1])[self.elements :]
        value = tf.reshape(tf.concat([flat, rest], 0), self.value.shape)
        for component in components:
            with tf.device(component.device):
                component.assign(value)


class Place:
    """The parts that one local replica merges with the replicas of the same place in all workers.

    Args:
        replica: the local replica.
        parts: of the variables.
        optimizer: the outer optimizer of their masters; None to take the mean.
        bucket_bytes: parts travel in messages of at most so many bytes, or alone.
    """

    def __init__(self, replica: int, parts: list[Part], optimizer: keras.optimizers.Optimizer | None,
                 bucket_bytes: int) -> None:  # fmt: skip
        self.replica, self.parts, self.optimizer = replica, parts, optimizer
        self.buckets: list[list[Part]] = []
        size, kind = 0, None
        for part in sorted(parts, key=lambda part: (part.common is not None, part.value.dtype.name)):
            own, own_kind = part.elements * part.value.dtype.size, (part.common is not None, part.value.dtype)
            if not self.buckets or own_kind != kind or size + own > bucket_bytes:
                self.buckets.append([])
                size, kind = 0, own_kind
            self.buckets[-1].append(part)
            size += own

    def kept(self, part: Part) -> dict[str, tf.Variable]:
        """What is kept for a part between merges, by kind."""
        begin = f"{part.master.name}_"
        own = [] if self.optimizer is None else self.optimizer.variables
        found = {slot.name.removeprefix(begin): slot.value for slot in own if slot.name.startswith(begin)}
        if part.common is not None or part.value.dtype != part.master.value.dtype:
            found[MASTER] = part.master.value
        return found if part.residual is None else {**found, RESIDUAL: part.residual}

    def scalars(self) -> dict[str, tf.Variable]:
        """Variables of the outer optimizer that belong to no part, by name."""
        own = [] if self.optimizer is None else self.optimizer.variables
        return {each.name: each.value for each in own if not _SLOT.match(each.name)}


def outer_maker(outer_optimizer: Any, merging: Merging | None) -> Callable[[], keras.optimizers.Optimizer] | None:
    """What makes an outer optimizer; None to take the mean, or if workers never train apart.

    Raises:
        ValueError: if it makes none, or one that cannot be applied to parts of variables.
    """
    if merging is None or merging.outer == AVERAGE:
        return None

    def make() -> keras.optimizers.Optimizer:
        if outer_optimizer is None:
            return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
        return outer_optimizer() if callable(outer_optimizer) else keras.optimizers.get(copy.deepcopy(outer_optimizer))

    try:
        outside_of_scopes(lambda: _check(make()))
    except ValueError as error:
        raise ValueError(f"{error} Received: outer_optimizer={outer_optimizer!r}") from error
    return make


def _check(optimizer: Any) -> None:
    """An outer optimizer that can be applied to parts of variables."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(f"`outer_optimizer` must make a Keras optimizer, but made {optimizer!r}.")
    name = type(optimizer).__name__
    if not is_elementwise(optimizer):
        raise ValueError(
            f"`outer_optimizer` is applied to parts of variables, each by its owner, but {name} is not known to treat "
            "every element by itself. Take SGD, Adam or another element-wise optimizer of Keras."
        )
    given = [setting for setting in _REFUSED if getattr(optimizer, setting, None)]
    if given:
        raise ValueError(
            f"`outer_optimizer` is applied to parts of variables, once in each merge, which {given} of {name} does not "
            "allow. Leave them away, or set them in the optimizer of the model."
        )


def outside_of_scopes(function: Callable[[], Any]) -> Any:
    """The result of a function that makes variables of this process alone, even within the scope of a strategy."""
    results: list = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tfzero outside of scopes")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
