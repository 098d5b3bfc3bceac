"""The loss of one replica: its part of the whole batch's loss.

[Note: the divisor] Keras divides each loss by the count that one replica sees, and then by the number of replicas. This
mean of means is wrong as soon as replicas see different numbers of samples, unmasked elements or weights. Here each
replica's sum is divided by the count over all replicas, so that the parts add up to the loss that one device computes.

[Note: a user's own loss] Within `Model._compute_loss` all values are means over this replica's samples. At the end the
total is multiplied by the batch fraction. So a `compute_loss` that takes its own mean is as right as one that adds up
Keras losses.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import tensorflow as tf
from keras import ops

from tfzero.extended import ZeroExtended
from tfzero.host import keras_objects
from tfzero.rows.padding import counted

_scope = threading.local()


def current_extended() -> ZeroExtended | None:
    """The `extended` of the ZeroStrategy whose replica is running, or None."""
    replica = tf.distribute.get_replica_context()
    if replica is None or not hasattr(replica.strategy, "settings"):
        return None
    return replica.strategy.extended


@contextlib.contextmanager
def local_unit(batch_is_static: bool) -> Iterator[None]:
    """While active, losses are means over this replica's samples. [Note: a user's own loss]"""
    before = getattr(_scope, "static", None)
    _scope.static = batch_is_static
    try:
        yield
    finally:
        _scope.static = before


def scale(value: tf.types.experimental.TensorLike, extended: ZeroExtended) -> tf.Tensor:
    """Scales a mean over this replica's samples to its part of the mean over all samples.

    A loss for each sample (`reduction="none"`) is no mean: on one device its gradient is that of the sum.
    """
    if getattr(_scope, "static", None) is not None:
        return value
    value = ops.convert_to_tensor(value)
    if value.shape.rank:
        return value
    fraction = ops.cast(extended.batch_fraction(), value.dtype)
    return ops.where(fraction > 0, value * fraction, ops.zeros_like(value))


def unscale(value: tf.types.experimental.TensorLike, extended: ZeroExtended) -> tf.Tensor:
    """The inverse of `scale`, for metrics that weigh replicas by their samples.

    If the batch size is unknown while tracing, Keras counts each replica as one within `_compute_loss`. Then the parts
    must add up to the batch's mean times the number of replicas.
    """
    static = getattr(_scope, "static", None)
    if static is True or ops.convert_to_tensor(value).shape.rank:
        return value
    fraction = ops.cast(extended.batch_fraction(), value.dtype)
    if static is False:
        return value * fraction * extended.group.world_size
    return ops.divide_no_nan(value, fraction)


def sum_as_mean(value: tf.Tensor, extended: ZeroExtended) -> tf.Tensor:
    """What stands for a sum over the batch among means over a replica's samples: `value` is the replica's own sum.

    Multiplied by the batch fraction, those of all replicas add up to the sum. A replica without rows adds nothing.
    """
    return ops.divide_no_nan(value, ops.cast(extended.batch_fraction(), value.dtype))


def reduce_loss(
    values: tf.types.experimental.TensorLike,
    sample_weight: tf.types.experimental.TensorLike | None,
    mask: tf.types.experimental.TensorLike | None,
    reduction: str | None,
    dtype: str | tf.DType | None,
    extended: ZeroExtended,
) -> tf.Tensor:
    """`reduce_weighted_values` of keras/src/losses/loss.py with a global divisor. [Note: the divisor]"""
    reduction = keras_objects.standardize_reduction(reduction)
    values = ops.convert_to_tensor(values, dtype=dtype)
    sample_weight = None if sample_weight is None else ops.convert_to_tensor(sample_weight, dtype=values.dtype)
    unmasked = tf.size(values, tf.int64) if mask is None else tf.math.count_nonzero(mask)
    maskable = unmasked if mask is None else tf.size(mask, tf.int64)
    if mask is not None:
        mask = ops.cast(mask, values.dtype)
        if sample_weight is None:
            sample_weight = mask
        else:
            mask, sample_weight = keras_objects.squeeze_or_expand_to_same_rank(mask, sample_weight)
            sample_weight = sample_weight * mask
    if sample_weight is not None:
        values, sample_weight = keras_objects.squeeze_or_expand_to_same_rank(values, sample_weight)
        values = values * sample_weight
    if reduction in (None, "none"):
        return values
    if values.shape.rank == 0:
        return scale(values, extended)
    total = counted(ops.sum(values), extended)
    if reduction != "sum":
        weighs = reduction == "mean_with_sample_weight" and sample_weight is not None
        if weighs:
            counts = [ops.sum(sample_weight)]
        else:
            counts = [tf.size(values, tf.int64), unmasked, maskable]
        total = ops.divide_no_nan(total, _global_divisor(counts, total.dtype, extended))
    if getattr(_scope, "static", None) is not None:
        total = ops.divide_no_nan(total, ops.cast(extended.batch_fraction(), total.dtype))
    return total


def _global_divisor(counts: Sequence[tf.Tensor], dtype: tf.DType, extended: ZeroExtended) -> tf.Tensor:
    """The whole batch's divisor as in Keras: `elements * unmasked / maskable`, or the sum of weights."""
    local = tf.stack([tf.stop_gradient(tf.cast(counted(count, extended), tf.float64)) for count in counts])
    total = extended.replica_collective(extended.group.all_reduce, local)
    if len(counts) == 1:
        return tf.cast(total[0], dtype)
    return tf.cast(tf.math.divide_no_nan(total[0] * total[1], total[2]), dtype)
