"""The places where Keras's layers must be told about replicas: randomness, dtypes, and batches without samples.

They are patched as the training's are (`patches.py`).
"""

import functools

import keras
import tensorflow as tf

from tfzero import _compat, losses
from tfzero.dependence import MEAN, OTHER, mark
from tfzero.patches import patch
from tfzero.strategy import ZeroStrategy
from tfzero.variables import ShardedParameter

_FOLD = 0x9E3779B9  # the golden ratio in 32 bits: far apart and odd


# Mixed precision: what is cast for a layer travels in the layer's dtype.


@patch(
    _compat.AutocastScope,
    "maybe_cast",
    "self value",
    "in mixed precision a parameter in shards travels in the dtype of the layer that reads it",
    "test_stage3.py::test_mixed_precision_moves_half_the_bytes",
)
def _maybe_cast(original, self, value):
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
def _next_seed(original, self, *args, **kwargs):
    """Every replica draws from a stream of its own; rank 0's is the stream of one device."""
    seed = original(self, *args, **kwargs)
    extended = losses.current_extended()
    if extended is None:
        return seed
    rank = extended.group.rank(_compat.replica_index())
    return mark(seed + tf.constant([rank * _FOLD % 2**31, 0], seed.dtype), OTHER)


# Recomputing activations: TensorFlow's `recompute_grad` takes no keyword arguments in a graph, and layers pass some.


@patch(
    _compat.keras_core,
    "remat",
    "f",
    "TensorFlow's `recompute_grad` takes no keyword arguments in a graph, and layers pass some",
    "test_stage3.py::test_remat_composes_with_stage_3",
)
def _remat(original, function):
    if not isinstance(tf.distribute.get_strategy(), ZeroStrategy):
        return original(function)

    @functools.wraps(function)
    def recomputed(*args, **kwargs):
        return original(functools.partial(function, **kwargs))(*args)

    return recomputed


# A replica without samples: oneDNN's convolutions and poolings give a wrong shape for an empty batch.


def _on_samples(original, inputs, *args, **kwargs):
    """Lets an empty batch on a CPU pass as one sample that is dropped again."""
    extended = losses.current_extended()
    if extended is None or extended.group.hint == "NCCL" or tf.executing_eagerly() or inputs.shape[0] is not None:
        return original(inputs, *args, **kwargs)
    args = [tf.convert_to_tensor(each) if isinstance(each, keras.Variable) else each for each in args]

    def on_one_sample():
        return original(tf.zeros([1, *tf.unstack(tf.shape(inputs))[1:]], inputs.dtype), *args, **kwargs)[:0]

    return tf.cond(tf.shape(inputs)[0] > 0, lambda: original(inputs, *args, **kwargs), on_one_sample)


_KERNELS = {
    "conv": "inputs kernel strides padding data_format dilation_rate",
    "depthwise_conv": "inputs kernel strides padding data_format dilation_rate",
    "separable_conv": "inputs depthwise_kernel pointwise_kernel strides padding data_format dilation_rate",
    "conv_transpose": "inputs kernel strides padding output_padding data_format dilation_rate",
    "max_pool": "inputs pool_size strides padding data_format",
    "average_pool": "inputs pool_size strides padding data_format",
}
for _name, _arguments in _KERNELS.items():
    patch(
        _compat.keras_nn,
        _name,
        _arguments,
        "of a batch without samples oneDNN gives a wrong shape",
        "test_step.py::test_a_replica_without_samples_convolves_nothing",
    )(_on_samples)


@patch(
    _compat.keras_nn,
    "moments",
    "x axes keepdims synchronized",
    "the moments of no samples are NaN",
    "test_step.py::test_a_replica_without_samples_normalizes_nothing",
)
def _moments(original, x, axes, keepdims=False, synchronized=False):
    """The moments of no samples are 0, not NaN, which would spread in the sum of gradients."""
    result = original(x, axes, keepdims=keepdims, synchronized=synchronized)
    if losses.current_extended() is None or synchronized or tf.executing_eagerly():
        return result
    if x.shape[0] is None:
        result = tuple(tf.where(tf.size(x) > 0, moment, tf.zeros_like(moment)) for moment in result)
    # The variance is one about the replica's own mean; README.md names it among the exceptions.
    return tuple(mark(tf.identity(moment), MEAN) for moment in result)
