"""Patches that make Keras's losses aware of replicas: they divide by the count of the whole batch.

See `host/patches.py`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime
from tfzero.host.patches import patch
from tfzero.training import losses


@patch(
    runtime.Trainer,
    "_compute_loss",
    "self x y y_pred sample_weight training",
    "a user's `compute_loss` takes the mean of one replica's samples",
    "test_step.py::test_losses_of_the_users_own",
)
def _compute_loss(
    original: Callable[..., Any],
    self: keras.Model,
    x: Any = None,
    y: Any = None,
    y_pred: Any = None,
    sample_weight: Any = None,
    training: bool = True,
) -> tf.Tensor:
    extended = losses.current_extended()
    arguments = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight, "training": training}
    if extended is None:
        return original(self, **arguments)
    rows = next((leaf.shape[0] for leaf in tf.nest.flatten(y_pred) if leaf.shape.rank), None)
    with losses.local_unit(batch_is_static=rows is not None):
        loss = original(self, **arguments)
    return losses.scale(loss, extended)


@patch(
    runtime.keras_loss,
    "reduce_weighted_values",
    "values sample_weight mask reduction dtype",
    "each replica divides by what it sees; the divisor is that of the whole batch",
    "test_step.py::test_masked_losses",
)
def _reduce_weighted_values(
    original: Callable[..., Any],
    values: tf.types.experimental.TensorLike,
    sample_weight: tf.types.experimental.TensorLike | None = None,
    mask: tf.types.experimental.TensorLike | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: str | tf.DType | None = None,
) -> tf.Tensor:
    extended = losses.current_extended()
    if extended is None:
        return original(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
    return losses.reduce_loss(values, sample_weight, mask, reduction, dtype, extended)


@patch(
    runtime.keras_loss,
    "scale_loss_for_distribution",
    "value",
    "replicas count by their samples, not as one each",
    "test_step.py::test_added_losses_and_regularizers",
)
def _scale_loss(original: Callable[..., Any], value: tf.types.experimental.TensorLike) -> tf.Tensor:
    extended = losses.current_extended()
    return original(value) if extended is None else losses.scale(value, extended)


@patch(
    runtime.keras_loss,
    "unscale_loss_for_distribution",
    "value",
    "the inverse, for metrics",
    "test_step.py::test_ragged_batches",
)
def _unscale_loss(original: Callable[..., Any], value: tf.types.experimental.TensorLike) -> tf.Tensor:
    extended = losses.current_extended()
    return original(value) if extended is None else losses.unscale(value, extended)
