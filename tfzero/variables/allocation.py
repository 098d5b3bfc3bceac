"""Makes the `tf.Variable`s of single replicas so that they lie close together in memory.

[Note: close] TensorFlow's allocator (tensorflow/core/common_runtime/bfc_allocator.cc) hands out a free chunk unsplit if
it is less than twice as large as the request. A variable made in the hole that a larger temporary tensor left would
hold that whole hole for as long as it lives. So temporary whole values are moved out of TensorFlow's memory. A
variable's value that lies in too large a hole is made again elsewhere, before the hole is released. In training,
`training/walk.py` writes in place, so a variable stays where it was made.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tfzero.plan.placement import shard_elements

# For smaller values the waste does not matter.
_WORTH_BYTES = 1 << 16
_MOST_WASTE = 1 / 64
_MOST_TRIES = 32


def initial_value(kwargs: dict) -> tf.Tensor:
    """The initial value given by the arguments of a variable's creation."""
    value = kwargs["initial_value"]
    if callable(value):
        value = value()
    value = getattr(value, "wrapped_value", value)  # a value restored from a checkpoint
    return tf.convert_to_tensor(value, dtype=kwargs.get("dtype"))


def on_host(value: tf.Tensor) -> np.ndarray | tf.Tensor:
    """A copy in NumPy's memory if possible, else the tensor itself."""
    return np.array(value) if tf.executing_eagerly() and value.dtype != tf.string else value


def component(
    next_creator: Callable[..., tf.Variable],
    device: str,
    value: np.ndarray | tf.Tensor,
    made: Sequence[tf.Variable],
    kwargs: dict,
) -> tf.Variable:
    """Makes one replica's variable, with a name as in TensorFlow's mirrored_strategy.py."""
    kwargs = dict(kwargs)
    if made:
        kwargs["name"] = f"{made[0].name.split(':')[0]}/replica_{len(made)}/"
    with tf.device(device):
        kwargs["initial_value"] = placed(value, device) if isinstance(value, np.ndarray) else tf.identity(value)
        return next_creator(**kwargs)


def placed(value: np.ndarray, device: str) -> tf.Tensor:
    """Copies a value for a variable into memory of its own and of about its own size. [Note: close]"""
    with tf.device(device):
        tensor = tf.convert_to_tensor(value)  # it may still use the array's memory
        held_meanwhile = []
        for _ in range(_MOST_TRIES):
            before = _bytes_in_use(device)
            held_meanwhile.append(tf.raw_ops.DeepCopy(x=tensor))
            if _bytes_in_use(device) - before <= max(_WORTH_BYTES, value.nbytes) * (1 + _MOST_WASTE):
                break
        return held_meanwhile.pop()


def _bytes_in_use(device: str) -> int:
    try:
        return tf.config.experimental.get_memory_info(device)["current"]
    except ValueError:  # an allocator that keeps no statistics, and has no such chunks either
        return 0


def local_shard(
    whole: tf.types.experimental.TensorLike, owner: int | None, rank: int, shards: int
) -> np.ndarray | tf.Tensor:
    """Component of shard `rank` of `shards`, cut from a whole array or tensor.

    It is a flat shard `[shard_elements]`, padded with copies of its last element. Of an owned variable it is everything
    or nothing.
    """
    library, concatenate = (np, np.concatenate) if isinstance(whole, np.ndarray) else (tf, tf.concat)
    if library is tf:
        whole = tf.convert_to_tensor(whole)
    if owner is not None:
        return whole if owner == rank else library.zeros([0], whole.dtype)
    flat = library.reshape(whole, [-1])
    width = shard_elements(flat.shape[0], shards)
    begin = min(rank * width, flat.shape[0] - 1)
    shard = flat[begin : begin + width] if begin == rank * width else flat[begin:]
    return concatenate([shard, library.repeat(shard[-1:], width - shard.shape[0])], 0)


def fill(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns a value of any shape."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
