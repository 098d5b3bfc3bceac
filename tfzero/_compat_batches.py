"""Private symbols of TensorFlow by which a replica's rows of a batch are known. See `_compat.py`."""

import keras
import tensorflow as tf

# A composite tensor keeps its class through data sets and `tf.function`s, so ours tells what is cut by rows.
from tensorflow.python.distribute.values import PerReplica, PerReplicaSpec

# Has no public name.
EagerTensor = tf.__internal__.EagerTensor


class BatchParts(PerReplica):
    """Each local replica's rows of a tensor of the batch. In a `tf.function` their number is not static."""

    @property
    def values(self):
        """One value for each local replica, which is known to be rows of the batch by `is_part`."""
        for value in self._values:
            value._tfzero_is_part = True
        return self._values

    @property
    def _type_spec(self):
        return BatchPartsSpec(*(_without_rows(tf.type_spec_from_value(value)) for value in self._values))


class BatchPartsSpec(PerReplicaSpec):
    """Type specification of `BatchParts`."""

    __slots__ = ()

    value_type = property(lambda self: BatchParts)

    def _from_components(self, tensor_list):
        return BatchParts(tensor_list)


def container_of(handle):
    """The distributed variable of one of whose components this is the handle, an eager tensor; or None."""
    container = getattr(handle, "_distributed_container", None)
    return None if container is None else container()


def is_part(value) -> bool:
    """Whether what a replica was given is its rows of a tensor of the batch."""
    return getattr(value, "_tfzero_is_part", False)


def _without_rows(spec: tf.TypeSpec) -> tf.TypeSpec:
    """The spec of any number of rows; of ragged and sparse tensors it is what it was."""
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
        return spec
    return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype, spec.name)


def is_recurrent_state(arguments: dict) -> bool:
    """Whether a variable made with these arguments is a stateful layer's (`keras/src/layers/rnn/rnn.py`)."""
    return arguments.get("name") == "rnn_state" and arguments.get("trainable") is False


def recurrent_states(model: keras.Model) -> list[keras.Variable]:
    """The states of a model's stateful layers, which Keras does not count among its variables."""
    stateful = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    states = [state for layer in stateful for state in tf.nest.flatten(getattr(layer, "states", None) or [])]
    return list({id(state): state for state in states}.values())  # Bidirectional has those of its layers
