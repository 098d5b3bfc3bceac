"""Tracks a replica's rows of a batch, by private names of TensorFlow. See `host/registry.py`."""

from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

# A composite tensor keeps its class through datasets and `tf.function`s, so ours marks what is cut by rows.
from tensorflow.python.distribute.values import PerReplica, PerReplicaSpec

EagerTensor = tf.__internal__.EagerTensor
CompositeTensor = tf.__internal__.CompositeTensor


class BatchParts(PerReplica):
    """Each local replica's rows of a tensor of the batch. In a `tf.function` their number is not static.

    Args:
        values: one for each local replica; a replica without rows has padding. [Note: padding row]
        rows: number of rows of each without padding, an int64 scalar.
    """

    def __init__(self, values: Iterable, rows: Iterable[tf.Tensor]) -> None:
        super().__init__(values)
        self._rows = tuple(rows)

    @property
    def values(self) -> tuple:
        """One value for each local replica; `own_rows` returns its number of rows."""
        for value, rows in zip(self._values, self._rows, strict=True):
            value._tfzero_rows = rows
        return self._values

    @property
    def _type_spec(self) -> "BatchPartsSpec":
        values = (without_rows(tf.type_spec_from_value(value)) for value in self._values)
        return BatchPartsSpec(*values, *(tf.TensorSpec([], tf.int64) for _ in self._rows))


class BatchPartsSpec(PerReplicaSpec):
    """Type specification of `BatchParts`: specs of all values, then of all numbers of rows."""

    __slots__ = ()

    value_type = property(lambda self: BatchParts)

    def _to_components(self, value: BatchParts) -> tuple:
        return (*super()._to_components(value), *value._rows)

    def _from_components(self, tensor_list: Sequence) -> BatchParts:
        replicas = len(tensor_list) // 2
        return BatchParts(tensor_list[:replicas], tensor_list[replicas:])


def container_of(handle: tf.Tensor) -> tf.Variable | None:
    """The distributed variable of the component with this handle (an eager tensor), or None."""
    container = getattr(handle, "_distributed_container", None)
    return None if container is None else container()


def own_rows(value: object) -> tf.Tensor | None:
    """Number of rows in a replica's part of a tensor of the batch; None for any other value."""
    return getattr(value, "_tfzero_rows", None)


def without_rows(spec: tf.TypeSpec) -> tf.TypeSpec:
    """The same spec for any number of rows."""
    if getattr(spec, "shape", None) is None or not spec.shape.rank:
        return spec
    shape = [None, *spec.shape[1:]]
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec(shape, spec.dtype, spec.name)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype, spec.flat_values_spec)
    return spec


def is_recurrent_state(arguments: dict) -> bool:
    """Whether a variable made with these arguments is a stateful layer's state (`keras/src/layers/rnn/rnn.py`)."""
    return arguments.get("name") == "rnn_state" and arguments.get("trainable") is False


def is_moving_statistic(arguments: dict) -> bool:
    """Whether a variable made with these arguments averages over batches, as BatchNormalization's do.

    See `keras/src/layers/normalization/batch_normalization.py`, which declares no aggregation.
    """
    return arguments.get("name") in ("moving_mean", "moving_variance") and arguments.get("trainable") is False


def recurrent_states(model: keras.Model) -> list[keras.Variable]:
    """States of a model's stateful layers. Keras does not count them among its variables."""
    stateful = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    states = [state for layer in stateful for state in tf.nest.flatten(getattr(layer, "states", None) or [])]
    return list({id(state): state for state in states}.values())  # Bidirectional lists those of its layers again
