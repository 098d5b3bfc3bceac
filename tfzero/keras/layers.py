"""Patches that make Keras's layers aware of replicas: randomness, dtypes and regularizers. See `host/patches.py`."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime
from tfzero.host.patches import patch
from tfzero.rows.dependence import OTHER, mark
from tfzero.strategy import ZeroStrategy
from tfzero.training import losses
from tfzero.variables.classes import ShardedParameter

_FOLD = 0x9E3779B9  # the golden ratio in 32 bits: odd, and its multiples lie far apart


# Mixed precision: a parameter that is cast for a layer travels in the layer's dtype.


@patch(
    runtime.AutocastScope,
    "maybe_cast",
    "self value",
    "in mixed precision a parameter in shards travels in the dtype of the layer that reads it",
    "test_stage3.py::test_mixed_precision_moves_half_the_bytes",
)
def _maybe_cast(original: Callable[..., Any], self: runtime.AutocastScope, value: Any) -> Any:
    is_parameter = isinstance(value, ShardedParameter) and losses.current_extended() is not None
    return value.whole(tf.as_dtype(self.dtype)) if is_parameter and self.dtype is not None else original(self, value)


# Randomness.


@patch(
    keras.random.SeedGenerator,
    "next",
    "self ordered",
    "all replicas would draw the same dropout masks",
    "test_step.py::test_dropout_draws_its_own_mask_on_each_replica_and_again_for_the_same_seed",
)
def _next_seed(original: Callable[..., Any], self: keras.random.SeedGenerator, *args: Any, **kwargs: Any) -> tf.Tensor:
    """Gives every replica a random stream of its own; rank 0 has the stream of one device."""
    seed = original(self, *args, **kwargs)
    extended = losses.current_extended()
    if extended is None:
        return seed
    rank = extended.fleet.rank(runtime.replica_index())
    return mark(seed + tf.constant([rank * _FOLD % 2**31, 0], seed.dtype), OTHER)


# Activity regularizers are sums over the batch until Keras 3.13; since 3.14 layers divide them by its size.


@patch(
    keras.layers.Layer,
    "activity_regularizer",
    None,
    "a sum over one replica's rows would be taken for a mean over the batch",
    "test_step.py::test_added_losses_and_regularizers",
    until="3.13",
)
def _activity_regularizer(value: Callable[..., Any] | None, layer: keras.layers.Layer) -> Callable[..., Any] | None:
    del layer
    extended = losses.current_extended()
    if value is None or extended is None:
        return value
    return lambda output: losses.sum_as_mean(value(output), extended) if len(output.shape) else value(output)


# Recomputing activations: TensorFlow's `recompute_grad` takes no keyword arguments in a graph, and layers pass some.


@patch(
    runtime.keras_core,
    "remat",
    "f",
    "TensorFlow's `recompute_grad` takes no keyword arguments in a graph, and layers pass some",
    "test_stage3.py::test_remat_composes_with_stage_3",
)
def _remat(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(tf.distribute.get_strategy(), ZeroStrategy):
        return original(function)

    @functools.wraps(function)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return original(functools.partial(function, **kwargs))(*args)

    return recomputed
