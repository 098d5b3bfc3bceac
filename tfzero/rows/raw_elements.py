"""Elements of any structure as tensors of known shapes, which can be batched before they are decoded."""

from typing import Any

import tensorflow as tf


def packed_specs(spec: Any) -> list[tf.TensorSpec]:
    """What `packed` gives for elements of a structure: components of unknown shape become strings."""
    flat = tf.nest.flatten(spec, expand_composites=True)
    return [each if each.shape.is_fully_defined() else tf.TensorSpec([], tf.string) for each in flat]


def packed(spec: Any, element: tuple) -> tuple:
    flat = tf.nest.flatten(element if isinstance(spec, tuple) else element[0], expand_composites=True)
    return tuple(
        tensor if each.shape.is_fully_defined() else tf.io.serialize_tensor(tensor)
        for tensor, each in zip(flat, tf.nest.flatten(spec, expand_composites=True), strict=True)
    )


def unpacked(spec: Any, row: tuple) -> Any:
    flat = [
        tensor if each.shape.is_fully_defined() else tf.ensure_shape(tf.io.parse_tensor(tensor, each.dtype), each.shape)
        for tensor, each in zip(row, tf.nest.flatten(spec, expand_composites=True), strict=True)
    ]
    return tf.nest.pack_sequence_as(spec, flat, expand_composites=True)
