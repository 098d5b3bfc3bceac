"""Batches whose rows the workers bring: the global batch is the union of what each worker has.

[Note: union] Here workers do not read the same batches. Each reads its own, of any number of rows, and cuts them for
its devices. All workers must run the same number of steps, so a worker whose data have ended goes on with rows of
padding ([Note: padding row]) until the last one has ended. They agree on that batch by batch, when a batch is handed
out. Nothing after that stage runs ahead, so all workers agree in the order of their program. They share the connection
on which the first batches of other data sets are compared ([Note: digests]), where the same holds.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from tfzero.host import batch_rows, datasets, runtime
from tfzero.rows.inputs import cut, mapped, not_ahead, rows_of, take_rows, truth_of, without_tuning

_own: weakref.WeakSet = weakref.WeakSet()


def own_rows(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Says that a dataset gives each worker rows of its own, not the whole batches that all workers share.

    Use it where data are divided before they reach Keras: by `dataset.shard`, by a list of files for each worker, or by
    a library that gives each worker its part. A step's global batch is then the union of the workers' batches, and the
    result equals one device that gets the union. Workers may have different numbers of rows and batches: one that has
    no more goes on without rows until the last worker's data end. `tf.data` pipelines made from it are its own as well.

    With AutoShardPolicy.OFF alone TensorFlow lets every worker read everything, so OFF does not say that data are
    divided.

    Args:
        dataset: this worker's batches, with its part of the batch size. All workers' elements have the same structure.

    Returns:
        A dataset of the same elements.

    Raises:
        ValueError: if it is no `tf.data.Dataset`; from `fit`, if a worker has no row in an epoch, or if structures
            differ.

    Example:

    ```python
    workers, worker = 1, 0  # from TF_CONFIG
    mine = tf.data.Dataset.from_tensor_slices((x, y)).shard(workers, worker).batch(16 // workers)
    model.fit(tfzero.own_rows(mine), epochs=2, shuffle=False)
    ```
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(f"`own_rows` takes a tf.data.Dataset. Received: {dataset!r}")
    result = dataset.with_options(tf.data.Options())  # a new object: what it is made from stays as it was
    _own.add(result)
    return result


def is_own(dataset: tf.data.Dataset) -> bool:
    """Whether each worker's batches are its own: whether `own_rows` is in the pipeline."""
    return any(source in _own for source in datasets.pipeline(dataset))


def describe_parts(dataset: tf.data.Dataset) -> dict:
    """What workers must have in common whose batches are their own: the structure of elements."""
    specs = enumerate(tf.nest.flatten(dataset.element_spec))
    return {f"part {place} of a batch": str(batch_rows.without_rows(spec)) for place, spec in specs}


def check_parts(dataset: tf.data.Dataset) -> None:
    """Refuses parts of batches for which no row of padding can be made."""
    for place, spec in enumerate(tf.nest.flatten(dataset.element_spec)):
        if getattr(spec, "shape", None) is None or spec.shape.rank is None:
            raise ValueError(
                "Where each worker brings its own rows, every part of a batch must be a tensor with a known number of "
                f"axes, but part {place} is {spec}. Give it one by `tf.ensure_shape`; leave out a part that is None."
            )


class Turns(Protocol):
    """The batches of a union that workers agree on. Numbers count from the beginning of a pass."""

    def asked(self, index: Any) -> Any:
        """A step asks for a batch. True."""

    def goes_on(self, index: Any, has_batch: Any) -> Any:
        """Whether any worker has the batch, by whether this one has it."""


def union(dataset: tf.data.Dataset, devices: int, turns: Turns, shares_of: Callable = lambda: None) -> tf.data.Dataset:
    """A dataset of per-replica values from this worker's own batches. [Note: union]

    Args:
        dataset: this worker's batches.
        devices: number of this worker's replicas.
        turns: what is called for each batch.
        shares_of: gives the shares of its replicas, int64 `[devices]`, or None for even ones.
    """
    spec, is_single = dataset.element_spec, not isinstance(dataset.element_spec, tuple)
    padding = _components(tf.nest.map_structure(_row_of_zeros, spec))

    def with_flag(*elements: Any) -> tuple:
        return tf.constant(True), _components(elements[0] if is_single else elements)

    def padded(last: tuple, element: tuple) -> tuple:
        has_batch, components = element
        batch = _batch_of(spec, components)
        rows = next(count for leaf in tf.nest.flatten(batch) if (count := rows_of(leaf)) is not None)
        has_rows = tf.logical_and(has_batch, rows > 0)
        first = _components(tf.nest.map_structure(_first_row, batch))
        last = tf.cond(has_rows, lambda: first, lambda: last)
        own = tf.cond(has_rows, lambda: components, lambda: last)
        return last, (has_batch, tf.where(has_rows, rows, 0), own)

    def cut_own(has_batch: tf.Tensor, rows: tf.Tensor, components: tuple) -> tuple:
        cut_leaf = functools.partial(_parts, rows=rows, devices=devices, shares=shares_of())
        return has_batch, tf.nest.map_structure(cut_leaf, _batch_of(spec, components))

    def is_handed_out(asked: tuple, element: tuple) -> tf.Tensor:
        return truth_of(turns.goes_on, asked[0], element[0])

    endless = tf.data.Dataset.from_tensors((False, padding)).repeat()
    batches = mapped(dataset, with_flag).concatenate(endless)
    batches = batches.scan(padding, tf.autograph.experimental.do_not_convert(padded))
    batches = mapped(batches, cut_own).prefetch(tf.data.AUTOTUNE)
    asked = tf.data.Dataset.counter().map(lambda index: (index, truth_of(turns.asked, index)))
    batches = tf.data.Dataset.zip(asked, batches)  # in this order
    batches = batches.take_while(tf.autograph.experimental.do_not_convert(is_handed_out))
    return without_tuning(not_ahead(batches.map(lambda _, element: element[1])))


def _components(batch: Any) -> tuple:
    """The dense tensors of a batch; those of sparse and ragged tensors, too."""
    return tuple(map(tf.convert_to_tensor, tf.nest.flatten(batch, expand_composites=True)))


def _batch_of(spec: Any, components: tuple) -> Any:
    """The batch of such dense tensors, for any number of rows."""
    loose = tf.nest.map_structure(batch_rows.without_rows, spec)
    for component, each in zip(components, tf.nest.flatten(loose, expand_composites=True), strict=True):
        if isinstance(each, tf.TensorSpec):
            component.set_shape(each.shape)
    return tf.nest.pack_sequence_as(loose, components, expand_composites=True)


def _first_row(leaf: Any) -> Any:
    return leaf if rows_of(leaf) is None else take_rows(leaf, tf.constant(0, tf.int64), tf.constant(1, tf.int64))


def _row_of_zeros(spec: tf.TypeSpec) -> Any:
    """One row of zeros: what a worker goes on with that has not had a row."""
    shape = [1, *(size or 1 for size in spec.shape[1:])] if spec.shape.rank else []
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.sparse.from_dense(tf.zeros(shape, spec.dtype))
    if isinstance(spec, tf.RaggedTensorSpec):
        inner = [size or 1 for size in spec.shape[spec.ragged_rank + 1 :]]
        splits = [[0, 0], *[[0]] * (spec.ragged_rank - 1)]
        rows = [tf.constant(each, spec.row_splits_dtype) for each in splits]
        return tf.RaggedTensor.from_nested_row_splits(tf.zeros([0, *inner], spec.dtype), rows)
    return tf.zeros(shape, spec.dtype)


def _parts(leaf: Any, rows: tf.Tensor, devices: int, shares: tf.Tensor | None) -> Any:
    """A tensor's rows for each of this worker's replicas."""
    if rows_of(leaf) is None:
        return runtime.per_replica([leaf] * devices)
    return batch_rows.BatchParts(
        *zip(*(cut(leaf, part, devices, rows, shares) for part in range(devices)), strict=True)
    )
