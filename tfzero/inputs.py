"""Cutting a batch for the replicas.

Every worker reads the same global batches and keeps its rows, so batch `k` of the fleet is batch `k` of one device,
whatever the pipeline: arrays, generators, unknown or ragged batch sizes. All replicas get an element of every batch,
possibly of no rows, so they always run the same number of steps.
"""

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfzero import _compat


@dataclass(frozen=True)
class Seats:
    """Which part of a global batch each of this worker's replicas takes.

    Keras puts predictions back in order as (replica, worker), so part `p` goes to worker `p % workers`.
    """

    worker: int
    workers: int
    replicas_per_worker: int

    @property
    def parts(self) -> int:
        """Number of parts: the world size."""
        return self.workers * self.replicas_per_worker

    def part(self, replica: int) -> int:
        """The part of a local replica."""
        return replica * self.workers + self.worker


@dataclass
class DataPosition:
    """Where in its data a training goes on, and from which randomness it shuffles them.

    Args:
        epochs: how many times the data have been begun before.
        batches: of the current epoch, already trained with.
        epoch_batches: of the epoch before.
        randomness: the state from which the pipeline is built (`_compat.random_state`), once known.
        batch_size: samples of a batch of the data that are trained with, where Keras knows it.
    """

    epochs: int = 0
    batches: int = 0
    epoch_batches: int = 0
    randomness: dict | None = None
    batch_size: int | None = None

    def note_batch_size(self, data_adapter) -> None:
        """Notes how Keras's adapter makes batches of the data."""
        with contextlib.suppress(NotImplementedError):  # of some kinds of data
            self.batch_size = data_adapter.batch_size


def rows_of(value):
    """Number of rows of a batched dense, ragged or sparse tensor, or None for a value without rows."""
    if isinstance(value, tf.RaggedTensor):
        return value.nrows(tf.int64)
    if isinstance(value, tf.SparseTensor):
        return value.dense_shape[0]
    if tf.is_tensor(value) and value.shape.rank != 0:
        return tf.shape(value, tf.int64)[0]
    return None


def cut(value, part: int, parts: int):
    """Part `part` of `parts` of a batched tensor, dealt as evenly as possible (`plan.split_rows`, in a graph)."""
    if isinstance(value, np.ndarray):
        value = tf.convert_to_tensor(value)
    rows = rows_of(value)
    if rows is None:
        return value
    size, rest = rows // parts, rows % parts
    begin = part * size + tf.minimum(tf.constant(part, tf.int64), rest)
    end = begin + size + tf.cast(part < rest, tf.int64)
    if isinstance(value, tf.SparseTensor):
        start = tf.concat([[begin], tf.zeros_like(value.dense_shape[1:])], 0)
        return tf.sparse.slice(value, start, tf.concat([[end - begin], value.dense_shape[1:]], 0))
    return value[begin:end]


def cut_batch(batch, seats: Seats) -> list:
    """One structure of tensors for each of this worker's replicas."""

    def one(replica):
        return tf.nest.map_structure(lambda leaf: cut(leaf, seats.part(replica), seats.parts), batch)

    return [one(replica) for replica in range(seats.replicas_per_worker)]


def check_shardable(dataset: tf.data.Dataset, workers: int) -> None:
    """Refuses what cannot be cut by rows, and warns of what the workers would see in different orders."""
    policy = dataset.options().experimental_distribute.auto_shard_policy
    allowed = (tf.data.experimental.AutoShardPolicy.AUTO, tf.data.experimental.AutoShardPolicy.DATA)
    if policy not in allowed:
        raise ValueError(
            f"ZeroStrategy cuts every global batch by rows (AutoShardPolicy.DATA), but the dataset asks for "
            f"{tf.data.experimental.AutoShardPolicy(policy).name}. "
            "Leave the policy at AUTO or DATA and let every worker read the whole data, or read different files on "
            "each worker with `strategy.distribute_datasets_from_function`."
        )
    for spec in tf.nest.flatten(dataset.element_spec):
        if getattr(spec, "shape", None) is not None and spec.shape.rank == 0:
            raise ValueError(
                f"A dataset for a ZeroStrategy must be batched, with the global batch size, but its elements hold a "
                f"scalar: {dataset.element_spec}. Call `dataset.batch(global_batch_size)` first."
            )
    if workers > 1 and [0, 0] in _compat.shuffle_seeds(dataset):
        warnings.warn(
            "The dataset shuffles without a seed, so every worker sees another order and the global batches are not "
            "those of one device. Use `dataset.shuffle(size, seed=...)`, the same seed on every worker.",
            stacklevel=2,
        )


def describe_dataset(dataset: tf.data.Dataset) -> dict:
    """What can be known before training of whether workers read the same batches in the same order."""
    return {
        "number of batches": int(dataset.cardinality()),
        "elements": str(dataset.element_spec),
        "shuffle seeds": _compat.shuffle_seeds(dataset),
    }


def cut_dataset(dataset: tf.data.Dataset, seats: Seats) -> tf.data.Dataset:
    """A dataset whose elements are per-replica values: of every batch the parts of this worker's replicas.

    It is a plain dataset, as TensorFlow's multi-device iterator crashes now and then when it is dropped in the middle
    of its data, which Keras does with the first batch of every `fit` and `evaluate`.
    """
    is_single = not isinstance(dataset.element_spec, tuple)

    def cut_all(*elements):
        parts = cut_batch(elements[0] if is_single else elements, seats)
        return tf.nest.map_structure(lambda *leaves: _compat.per_replica(leaves), *parts)

    return dataset.map(cut_all, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)
