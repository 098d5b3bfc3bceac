"""Slots of an optimizer that parameter servers hold, as a worker sees them."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfzero.variables.classes import ShardedVariable, VariableView

SERVERS = -1  # the owner of such a slot: no rank


class Source(Protocol):
    """Where a slot is held."""

    def read(self) -> np.ndarray:
        """The whole value, flat."""

    def write(self, flat: np.ndarray) -> None:
        """Assigns a whole value."""


class RemoteSlot(ShardedVariable):
    """A slot that servers hold. Of it no replica holds anything.

    Outside replicas it behaves as the whole variable: reading asks the servers, assigning tells them.
    """

    source: Source | None = None  # None while the optimizer is built: servers make slots of their own

    def value_outside(self) -> tf.Tensor:
        if self.held is not None:
            return self.held_value()
        if self.source is None:
            return tf.zeros(self.shape, self.dtype)
        return tf.reshape(tf.constant(self.source.read(), self.dtype), self.shape)

    def update_outside(self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any) -> Any:
        if self.held is not None:
            return super().update_outside(update, value, **kwargs)
        if self.source is not None:
            whole = tf.Variable(self.value_outside())
            update(whole, self.fitting(value), **kwargs)
            self.source.write(whole.numpy().reshape(-1))
            self.distribute_strategy.extended.apart.note_assigned(self)
        return self


class RemoteSlotsView(VariableView):
    """A model variable as an optimizer sees it that makes its slots for servers."""

    @property
    def sharded(self) -> bool:
        return True

    @property
    def owner(self) -> int | None:
        return SERVERS
