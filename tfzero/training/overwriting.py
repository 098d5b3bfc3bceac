"""Variables that their gradient overwrites: scales and histories of float8 layers.

[Note: overwriting] A Keras layer may give the next values of some variables as their gradients; Keras assigns them
(`_overwrite_variables_directly_with_gradients` in keras/src/optimizers/base_optimizer.py). No descent is applied to
such variables, and they have no slots. Each replica gives values for its rows, and the largest counts, as over
micro-steps in Keras: they are a history of largest absolute values, and scales that are equal. Such variables stay
whole at every stage.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.host import runtime
from tfzero.variables.classes import ShardedParameter, VariableView


def is_overwritten(variable: keras.Variable) -> bool:
    """Whether a variable's gradient is its next value. [Note: overwriting]"""
    return bool(getattr(variable, "overwrite_with_gradient", False))


class OverwrittenView(VariableView):
    """An overwritten variable as an inner optimizer sees it while it is built: no slots, at most an accumulator."""

    def __init__(self, variable: keras.Variable) -> None:
        super().__init__(variable, plan=None, index=-1)
        self.overwrite_with_gradient = True

    @property
    def sharded(self) -> bool:
        return False

    @property
    def owner(self) -> int | None:
        return None


def keep_whole(variables: Sequence[keras.Variable], strategy: tf.distribute.Strategy) -> None:
    """Makes overwritten variables whole; at stage 3 they may be sharded. All workers call it together.

    Raises:
        RuntimeError: while a step is traced, as it may have read the shards.
    """
    sharded = [variable for variable in variables if isinstance(variable.value, ShardedParameter)]
    if not sharded:
        return
    if not tf.executing_eagerly():
        raise RuntimeError(
            f"At stage 3 call `optimizer.build(model.trainable_variables)` before the first step: the variables "
            f"{[variable.path for variable in sharded]} are overwritten by their gradients, and must be whole."
        )
    with strategy.extended.creation.of_optimizer_state():
        for variable in sharded:
            runtime.remake(variable)


class Overwriting:
    """The next values of one replica's overwritten variables, while a step is traced.

    Args:
        variables: the variables, each with its optimizer.
        gradients: this replica's gradients, by place in `variables`.
        group: the replicas.
        replica: the local replica.
    """

    def __init__(self, variables: Sequence, gradients: dict[int, tf.Tensor], group: Group, replica: int) -> None:
        self._variables = variables
        self._replica = replica
        self.values = {place: self._largest(value, variables[place][0], group) for place, value in gradients.items()}

    def _largest(self, value: tf.Tensor, variable: keras.Variable, group: Group) -> tf.Tensor:
        flat = tf.ensure_shape(tf.reshape(value, [-1]), [variable.shape.num_elements()])
        return tf.reshape(tf.reduce_max(group.all_gather(flat, self._replica), 0), variable.shape)

    def assign(self) -> None:
        """Overwrites the replica's variables, or accumulates the largest values."""
        for place, value in self.values.items():
            variable, optimizer = self._variables[place]
            component = self._local(variable)
            value = tf.cast(value, component.dtype)
            steps = optimizer.gradient_accumulation_steps
            if not steps:
                component.assign(value)
                continue
            accumulator = self._local(runtime.accumulator(optimizer, variable))
            value = tf.maximum(value, accumulator)
            is_due = tf.equal((self._local(runtime.iteration_counter(optimizer)) + 1) % steps, 0)
            component.assign(tf.where(is_due, value, component))
            accumulator.assign(tf.where(is_due, tf.zeros_like(value), value))

    def _local(self, variable: keras.Variable) -> tf.Variable:
        return variable.value.values[self._replica]
