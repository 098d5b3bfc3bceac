"""Cuts batches for the replicas.

Every worker reads the same global batches and keeps its rows, so batch `k` of the fleet is batch `k` of one device.
This holds for any pipeline: arrays, generators, unknown or ragged batch sizes. All replicas get an element of every
batch, possibly without rows, so they always run the same number of steps.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.host import batch_rows, datasets, runtime
from tfzero.host.batch_rows import own_rows
from tfzero.plan.mesh import Mesh
from tfzero.rows.shares import RowShares
from tfzero.workers.digests import BatchComparison


@dataclass
class DataPosition:
    """The position in its data at which training resumes, and the random state that shuffles the data.

    Args:
        epochs: number of epochs begun before.
        batches: batches of the current epoch that are already trained on.
        randomness: the state from which the pipeline is built (`runtime.random_state`), once known.
        passes: passes that have ended over each `sharded_dataset` that the data are, or are made from; validation may
            have made some of them. None if unknown.
        epoch_batches: batches of the previous epoch.
        batch_size: samples in a batch of the training data, if Keras knows it.
        one_iterator: whether one iterator serves all epochs, as with `steps_per_epoch`.
        sources: those `sharded_dataset`s (`ShardedFiles`), once known.
    """

    epochs: int = 0
    batches: int = 0
    randomness: dict | None = None
    passes: Sequence[int] | None = None
    epoch_batches: int = 0
    batch_size: int | None = None
    one_iterator: bool = False
    sources: Sequence = ()
    _begun: Sequence[int] = ()  # passes behind the current epoch

    def begin_epoch(self) -> None:
        """Notes the passes behind an epoch that begins. Within it, batches may be prepared ahead to its end."""
        self._begun = [each.passes for each in self.sources]

    def passes_at(self, batches: int) -> list[int] | None:
        """Passes that have ended over each source, after so many batches of an epoch; None if there is no source."""
        return list(self._begun if batches else [each.passes for each in self.sources]) or None

    def passes_of(self, source: Any) -> int:
        """Passes over one of the sources that lie behind the position."""
        known = self.passes if self.passes and len(self.passes) == len(self.sources) else None
        return source.passes + self.epochs if known is None else known[list(self.sources).index(source)]

    def note_batch_size(self, data_adapter: Any) -> None:
        """Notes the batch size of Keras's data adapter."""
        with contextlib.suppress(NotImplementedError):  # some kinds of data have none
            self.batch_size = data_adapter.batch_size


def rows_of(value: Any) -> tf.Tensor | None:
    """Number of rows of a batched dense, ragged or sparse tensor, or None for a value without rows."""
    if isinstance(value, tf.RaggedTensor):
        return value.nrows(tf.int64)
    if isinstance(value, tf.SparseTensor):
        return value.dense_shape[0]
    if tf.is_tensor(value) and value.shape.rank != 0:
        return tf.shape(value, tf.int64)[0]
    return None


def cut(
    value: tf.Tensor | tf.RaggedTensor | tf.SparseTensor,
    part: int,
    parts: int,
    rows: tf.Tensor | None = None,
    shares: tf.Tensor | None = None,
) -> tuple:
    """Part `part` of `parts` of a batched tensor, by `plan.split_rows` or `plan.shares.span`, in a graph.

    Args:
        value: the tensor.
        part: index of the part.
        parts: number of parts.
        rows: how many of the tensor's rows count, int64; the rest is padding. None for all.
        shares: of the parts, int64 `[parts]`; None splits rows as evenly as possible.

    Returns:
        The part, and the number of its rows, int64. A part without rows is one row of padding. [Note: padding row]
    """
    present = rows_of(value)
    rows = present if rows is None else rows
    if shares is None:
        size, rest = rows // parts, rows % parts
        begin = part * size + tf.minimum(tf.constant(part, tf.int64), rest)
        own = size + tf.cast(part < rest, tf.int64)
    else:
        ends = tf.concat([tf.zeros([1], tf.int64), tf.cumsum(shares)], 0)
        begin, end = ((2 * rows * ends[k] + ends[-1]) // (2 * ends[-1]) for k in (part, part + 1))
        own = end - begin
    first = tf.where(own > 0, begin, 0)
    return take_rows(value, first, tf.minimum(first + tf.maximum(own, 1), present)), own


def take_rows(
    value: tf.Tensor | tf.RaggedTensor | tf.SparseTensor, begin: tf.Tensor, end: tf.Tensor
) -> tf.Tensor | tf.RaggedTensor | tf.SparseTensor:
    """The rows from `begin` to `end` (int64) of a dense, ragged or sparse tensor; their number is not static."""
    if isinstance(value, tf.SparseTensor):
        start = tf.concat([[begin], tf.zeros_like(value.dense_shape[1:])], 0)
        return tf.sparse.slice(value, start, tf.concat([[end - begin], value.dense_shape[1:]], 0))
    part = value[begin:end]
    if isinstance(part, tf.RaggedTensor) or part.shape[0] is None or tf.executing_eagerly():
        return part
    # A constant number of rows could not be told from other numbers in the graph. [Note: kinds]
    return tf.compat.v1.placeholder_with_default(part, [None, *part.shape[1:]])


def cut_batch(batch: Any, mesh: Mesh, shares: tf.Tensor | None = None) -> Any:
    """Cuts a batch: its structure, with per-replica values that hold the rows of each of this worker's replicas.

    Args:
        batch: a global batch.
        mesh: the positions of the replicas.
        shares: as in `cut`.
    """

    def of_replicas(leaf: Any) -> Any:
        leaf = tf.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        if mesh.replicas == 1 or rows_of(leaf) is None:
            return runtime.per_replica([leaf] * mesh.devices_per_worker)
        parts = [cut(leaf, mesh.part_of_rank(rank), mesh.replicas, shares=shares) for rank in mesh.ranks]
        return batch_rows.BatchParts(*zip(*parts, strict=True))

    return tf.nest.map_structure(of_replicas, batch)


def counts_batches(value: Any) -> bool:
    """Whether a value tells how many replicas here have a batch (`tensorflow/python/distribute/input_lib.py`)."""
    is_count = tf.is_symbolic_tensor(value) and value.dtype == tf.int64
    return is_count and bool(value.shape.rank) and value.shape.num_elements() == 1


def batch_leaves(arguments: Any) -> list:
    """The tensors with rows of the batch among the arguments of a replica's function. [Note: batch fraction]

    Tensors that tfzero cut are known. If there are none, any tensor with an axis may be part of a batch.
    """
    leaves = tf.nest.flatten(arguments)
    known = [leaf for leaf in leaves if own_rows(leaf) is not None]
    return known or [leaf for leaf in leaves if rows_of(leaf) is not None]


def own_rows_of(arguments: Any) -> tf.Tensor | None:
    """Number of rows of the batch that a replica has, int64; None if there is no batch.

    Args:
        arguments: the arguments of the replica's function.

    Raises:
        ValueError: if it is unclear which argument holds rows of the batch.
    """
    leaves = batch_leaves(arguments)
    if not leaves or (rows := own_rows(leaves[0])) is not None:
        return rows if leaves else None
    if len({leaf.shape[0] for leaf in leaves}) > 1:
        raise ValueError(
            f"`strategy.run` was given tensors of shapes {[tuple(leaf.shape) for leaf in leaves]}, and it cannot be "
            "told which of them holds the replica's rows of the batch, by which it is weighed. Pass an element of a "
            "data set of `strategy.experimental_distribute_dataset`, or what `strategy.cut_batch(batch)` gives."
        )
    return rows_of(leaves[0])


def is_dealt_by_files(dataset: tf.data.Dataset) -> bool:
    """Whether a dataset asks that each worker reads other files."""
    policy = dataset.options().experimental_distribute.auto_shard_policy
    return policy == tf.data.experimental.AutoShardPolicy.FILE


def check_shardable(dataset: tf.data.Dataset, workers: int) -> None:
    """Refuses datasets that cannot be cut by rows, and warns if workers would see data in different orders."""
    policy = dataset.options().experimental_distribute.auto_shard_policy
    allowed = (tf.data.experimental.AutoShardPolicy.AUTO, tf.data.experimental.AutoShardPolicy.DATA)
    if policy not in allowed and not is_dealt_by_files(dataset):
        raise ValueError(
            f"ZeroStrategy cuts every global batch by rows (AutoShardPolicy.DATA), but the dataset asks for "
            f"{tf.data.experimental.AutoShardPolicy(policy).name}. "
            "Leave the policy at AUTO or DATA and let every worker read the whole data. If each worker reads its own "
            "rows, say so by `tfzero.own_rows(dataset)`, as OFF alone means in TensorFlow that every worker reads all, "
            "or with `strategy.distribute_datasets_from_function`; to divide files use `tfzero.sharded_dataset`."
        )
    check_batched(dataset)
    if workers > 1 and [0, 0] in runtime.shuffle_seeds(dataset):
        warnings.warn(
            "The dataset shuffles without a seed, so every worker sees another order and the global batches are not "
            "those of one device. Use `dataset.shuffle(size, seed=...)`, the same seed on every worker.",
            stacklevel=2,
        )
    unordered = datasets.unordered_stages(dataset) if workers > 1 else []
    if unordered:
        warnings.warn(
            f"The dataset takes elements as they come (deterministic=False of {', '.join(unordered)}), so workers may "
            "see other orders, and global batches that are not those of one device. Leave `deterministic` away.",
            stacklevel=2,
        )


def check_batched(dataset: tf.data.Dataset) -> None:
    """Refuses datasets whose elements hold a scalar."""
    for spec in tf.nest.flatten(dataset.element_spec):
        if getattr(spec, "shape", None) is not None and spec.shape.rank == 0:
            raise ValueError(
                f"A dataset for a ZeroStrategy must be batched, with the global batch size, but its elements hold a "
                f"scalar: {dataset.element_spec}. Call `dataset.batch(global_batch_size)` first."
            )


def describe_dataset(dataset: tf.data.Dataset) -> dict:
    """What is known before training about whether workers read the same batches in the same order."""
    specs = enumerate(tf.nest.flatten(dataset.element_spec))
    return {
        "number of batches": int(dataset.cardinality()),
        **{f"part {place} of a batch": str(spec) for place, spec in specs},
        "shuffle seeds": runtime.shuffle_seeds(dataset),
    }


def in_order(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset whose stages keep the order of their inputs.

    This is TensorFlow's default; `options.deterministic = False` would give each worker a different order.
    """
    if dataset.options().deterministic is not False:
        return dataset
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)


def cut_dataset(
    dataset: tf.data.Dataset, mesh: Mesh, comparison: BatchComparison, shares: RowShares | None = None
) -> tf.data.Dataset:
    """A dataset of per-replica values: of every batch, the parts of this worker's replicas.

    The first batches are compared with those of the other workers as they are yielded. [Note: digests]

    It is a plain dataset: TensorFlow's multi-device iterator crashes now and then when it is dropped in the middle of
    its data, as Keras does with the first batch of every `fit` and `evaluate`.
    """
    dataset = without_tuning(dataset)
    is_cut_ahead, now = (True, lambda: None) if shares is None else (not shares.is_measured, shares.now)
    # What is cut late is read whole before.
    cutting = (_of_arrays(dataset, mesh, now) if is_cut_ahead else None) or _of_batches(dataset, mesh, now)
    if is_cut_ahead and not comparison.count:
        return _prepared_ahead(cutting.elements, cutting.parts)
    source = comparison.source(datasets.operations_of(dataset))

    def prepare(index: tf.Tensor, element: tuple) -> tuple:
        noted = comparison.noted(lambda: cutting.whole(*element), index) if comparison.count else ""
        return noted, cutting.parts(*element) if is_cut_ahead else element

    @tf.autograph.experimental.do_not_convert
    def give_out(noted: tf.Tensor, prepared: Any) -> Any:
        if comparison.count:
            comparison.compared(noted, source)
        return prepared if is_cut_ahead else cutting.parts(*prepared)

    # A batch is compared when it is yielded, and cut then if shares may change between two steps.
    return not_ahead(_prepared_ahead(cutting.elements.enumerate(), prepare).map(give_out))


@dataclass(frozen=True)
class _Cutting:
    """How a dataset's batches come about.

    Args:
        elements: tuples of what is known before.
        whole: makes the batch of such a tuple.
        parts: makes the parts of this worker's replicas.
    """

    elements: tf.data.Dataset
    whole: Callable
    parts: Callable


def _of_batches(dataset: tf.data.Dataset, mesh: Mesh, shares_now: Callable) -> _Cutting:
    is_single = not isinstance(dataset.element_spec, tuple)

    def whole(*elements: Any) -> Any:
        return elements[0] if is_single else elements

    def parts(*elements: Any) -> Any:
        return cut_batch(whole(*elements), mesh, shares_now())

    in_tuple = tf.autograph.experimental.do_not_convert(lambda element: (element,))
    return _Cutting(dataset.map(in_tuple) if is_single else dataset, whole, parts)


def _of_arrays(dataset: tf.data.Dataset, mesh: Mesh, shares_now: Callable) -> _Cutting | None:
    """Of arrays, a worker gathers only its replicas' rows. None for any other dataset."""
    by_index = datasets.rows_by_index(dataset) if mesh.workers > 1 else None
    if by_index is None:
        return None
    elements, gather = by_index

    def parts(indices: tf.Tensor, arrays: Any) -> Any:
        shares = shares_now()
        cuts = [cut(indices, mesh.part_of_rank(rank), mesh.replicas, shares=shares) for rank in mesh.ranks]
        counts = [count for _, count in cuts]

        def of_replicas(*leaves: Any) -> Any:
            return runtime.per_replica(leaves) if rows_of(leaves[0]) is None else batch_rows.BatchParts(leaves, counts)

        return tf.nest.map_structure(of_replicas, *(gather(own, arrays) for own, _ in cuts))

    return _Cutting(elements, gather, parts)


def not_ahead(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset whose last stages run only when a step takes a batch.

    TensorFlow would add a `prefetch` at the end, and make each `map` without side effects a parallel one, which runs
    ahead as well.
    """
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False
    return dataset.with_options(options)


def truth_of(function: Callable, *arguments: tf.Tensor) -> tf.Tensor:
    """What a Python function answers in a pipeline, a bool scalar."""
    return tf.ensure_shape(tf.numpy_function(function, arguments, tf.bool), [])


def without_tuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset that TensorFlow does not tune, unless its options ask for tuning. [Note: tuning]

    `tf.data` has a thread for each iterator that tunes it, and that sleeps for longer the older the iterator is, up to
    a minute. Who drops the iterator waits for that thread, and the call to wake up is lost now and then: of 24 idle
    iterators that were dropped after 25 s, one took 16 s and one 41 s. Python drops iterators when it collects garbage,
    in the middle of a later step. One worker then stands still, and with it all, or they take it for lost. Without
    tuning `AUTOTUNE` means as many calls as the process has threads, at most 16.
    """
    if dataset.options().autotune.enabled is not None:
        return dataset
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def mapped(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    """A function of ours for several elements at a time, which keep their order."""
    function = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _prepared_ahead(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    return mapped(dataset, function).prefetch(tf.data.AUTOTUNE)
