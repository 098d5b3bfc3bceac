"""What tfzero uses of TensorFlow's private parts to change a graph that is being traced. `_compat.py` holds the rest.

[Note: automatic order] When a `tf.function` has been traced, TensorFlow makes operations wait that are to run in the
order of the program (`AutomaticControlDependencies`): those that use one resource, of which one writes to it; and all
stateful ones without a resource, in one chain. An operation can be declared to run whenever its inputs are there.
"""

from collections.abc import Callable, Iterator

import tensorflow as tf

# Tells which operations will wait for which, once a function has been traced.
from tensorflow.python.framework import auto_control_deps

_RUNS_FREELY = "_independent_side_effects"


def run_after(operation: tf.Operation, awaited: tf.Operation) -> None:
    """Makes one operation of a graph wait for another; `tf.control_dependencies` only serves new operations."""
    operation._add_control_input(awaited)


def replace_input(operation: tf.Operation, place: int, value: tf.Tensor) -> None:
    """Makes an operation take another tensor, of the same dtype and shape, as one of its inputs."""
    operation._update_input(place, value)


def copy_operation(operation: tf.Operation, value: tf.Tensor) -> tf.Tensor:
    """The first output of a copy that takes `value` as its first input."""
    with tf.device(operation.device):
        copy = operation.graph.create_op(
            operation.type,
            [value, *operation.inputs[1:]],
            [output.dtype for output in operation.outputs],
            attrs=dict(operation.node_def.attr),
            op_def=operation.op_def,
        )
    return copy.outputs[0]


def run_freely(operation: tf.Operation) -> None:
    """Lets a stateful operation run as soon as its inputs are there, and surely. [Note: automatic order]"""
    manager = operation.graph.experimental_acd_manager
    if manager is not None:
        manager.run_independently(operation)


def is_chained(operation: tf.Operation) -> bool:
    """Whether an operation will wait for the one before it of which this is true. [Note: automatic order]"""
    if not auto_control_deps.op_is_stateful(operation) or any(t.dtype == tf.resource for t in operation.inputs):
        return False
    try:
        return not operation.get_attr(_RUNS_FREELY)
    except ValueError:  # has no such attribute
        return True


def used_resources(operation: tf.Operation) -> Iterator[tuple[int, bool]]:
    """A number for each resource that an operation uses, and whether it writes to it. [Note: automatic order]"""
    if any(tensor.dtype == tf.resource for tensor in operation.inputs):
        for tensor, kind in auto_control_deps._get_resource_inputs(operation):
            yield auto_control_deps.ops.tensor_id(tensor), kind is auto_control_deps.ResourceType.READ_WRITE


def fill(function: Callable, value: tf.Tensor, shape: tf.Tensor, name: str) -> tf.Tensor:
    """A tensor of `shape` after `function(value, tensor)` has written into it, both as NumPy arrays, with an axis.

    Calls run as soon as their inputs are there, several at once: their caller orders those that need it.
    [Note: automatic order]

    That a CPU tensor and the array that stands for it share memory is not promised (`TensorToNdarray` in
    tensorflow/python/lib/core/py_func.cc); a result of `tf.numpy_function` would not lie in the allocator's memory.
    """
    out = tf.raw_ops.Empty(shape=shape, dtype=value.dtype)
    run_freely(out.op)
    filled = tf.numpy_function(function, [value, out], [], name=name)
    run_freely(filled)
    with tf.control_dependencies([filled]):
        return tf.identity(out)
