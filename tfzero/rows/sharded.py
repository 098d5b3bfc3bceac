"""Data in files, of which each worker reads its own: `sharded_dataset`. [Note: virtual shards]

The pipeline of each shard gives raw elements, in chunks. The chunks of all shards of a worker make its part of a batch.
Only then are elements decoded, so skipping decodes nothing. A shard that has ended gives empty chunks.
"""

import functools
import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.host import datasets
from tfzero.plan.file_shards import FileShards
from tfzero.plan.settings import check_number
from tfzero.rows.inputs import not_ahead, truth_of, without_tuning
from tfzero.rows.raw_elements import packed, packed_specs, unpacked

_SHUFFLE_SEED = 20221  # beside the seed of each file; the global seed must make no difference
_SMALL_BYTES = 4096  # smaller files are looked into for elements before they are read
_BLAME_SECONDS = 20.0  # most time to find out which file is damaged
_SIZE_BITS = 32
_MOST_SIZES = 1000  # files whose sizes workers compare: asking a distant file system takes time

READ_WHOLE = (
    "A dataset was made from a sharded_dataset by `map`, `repeat`, `class_weight` or the like, so every worker reads "
    "and decodes all of it. Put what it does into `decode`, and give the sharded_dataset to `fit` as it is."
)

_sources: weakref.WeakKeyDictionary[tf.data.Dataset, "ShardedFiles"] = weakref.WeakKeyDictionary()


def sharded_dataset(
    files: Sequence[str | os.PathLike],
    make: Callable[[tf.Tensor], tf.data.Dataset],
    *,
    shards: int,
    batch_size: int,
    decode: Callable | None = None,
    shuffle: int = 0,
    seed: int = 0,
    counts: Sequence[int] | None = None,
    parallel_calls: int | None = None,
) -> tf.data.Dataset:
    """A dataset of whole batches from files, of which each worker of a ZeroStrategy reads only its own.

    Files are dealt to `shards` virtual shards in turn. Batch `k` holds the `k`-th `batch_size / shards` elements of
    every shard, whatever the number of workers: worker `w` of W reads shards `w`, `w + W`, ... The last batches may be
    smaller. Elsewhere, as with plain Keras, it is an ordinary `tf.data.Dataset` that reads all shards.

    Args:
        files: paths, the same list on all workers. There are at least as many as shards.
        make: gives a file's elements before they are decoded, as a `tf.data.Dataset`; it is called in a graph, with the
            path as a scalar string tensor. `tf.data.TFRecordDataset` will do.
        shards: number of virtual shards, which the number of workers must divide.
        batch_size: elements of a whole batch, over all workers; a multiple of `shards`.
        decode: turns one element of `make` into one sample, such as `(features, target)`; None leaves it as it is.
        shuffle: elements in the buffer that shuffles within each file; the files of a shard then come in another order
            in every pass. 0 keeps the order.
        seed: of the order, which depends on it and on the number of passes that have ended.
        counts: number of elements of each file; a resumed run then skips whole files. Fewer elements are an error.
        parallel_calls: elements that are decoded at the same time; None lets `tf.data` choose.

    Returns:
        A dataset of batches `[batch_size, ...]`. Give it to `fit` as it is: what is made from it by `map` and the like
        is read whole by every worker.

    Raises:
        ValueError: for invalid arguments; from `fit`, if the number of workers does not divide `shards`, workers
            differ, or a file is missing, empty or damaged.

    Example:

    ```python
    files = [f"part-{part}.tfrecord" for part in range(4)]
    for part, name in enumerate(files):
        with tf.io.TFRecordWriter(name) as writer:
            for row in x[part::4]:
                writer.write(row.tobytes())
    def decode(record):
        row = tf.reshape(tf.io.decode_raw(record, tf.float32), [8])
        return row, row[:3]
    records = tf.data.TFRecordDataset
    data = tfzero.sharded_dataset(files, records, shards=4, batch_size=16, decode=decode, counts=[12] * 4)
    model.fit(data, epochs=2, shuffle=False)
    ```
    """
    source = ShardedFiles(files, make, shards, batch_size, decode, shuffle, seed, counts, parallel_calls)
    result = _sized(source.counted(source.read(range(shards))), source.dealing.batches)
    _sources[result] = source
    return result


def _sized(dataset: tf.data.Dataset, batches: int | None) -> tf.data.Dataset:
    return dataset if batches is None else dataset.apply(tf.data.experimental.assert_cardinality(batches))


def source_of(dataset: Any) -> "ShardedFiles | None":
    """What a dataset of `sharded_dataset` reads; None for any other object."""
    return _sources.get(dataset) if isinstance(dataset, tf.data.Dataset) else None


def sources_within(dataset: tf.data.Dataset | None) -> list["ShardedFiles"]:
    """What the datasets of `sharded_dataset` read that a pipeline is, or is made from."""
    return [] if dataset is None else [_sources[each] for each in datasets.pipeline(dataset) if each in _sources]


class ShardedFiles:
    """The files of one `sharded_dataset`, and how far they have been read. Arguments as there.

    A pass is counted when its last batch has been handed out: batches may be prepared ahead, or drawn only for their
    shapes.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        make: Callable,
        shards: int,
        batch_size: int,
        decode: Callable | None,
        shuffle: int,
        seed: int,
        counts: Sequence[int] | None,
        parallel_calls: int | None,
    ) -> None:
        if isinstance(files, str | bytes | os.PathLike) or not all(isinstance(f, str | os.PathLike) for f in files):
            raise ValueError(f"`files` must be a list of paths. Received: files={files!r}")
        for name, value, least in (
            ("shards", shards, 1), ("batch_size", batch_size, 1), ("shuffle", shuffle, 0), ("seed", seed, 0),
        ):  # fmt: skip
            check_number(name, value, int, least)
        if parallel_calls is not None:
            check_number("parallel_calls", parallel_calls, int, 1)
        if batch_size % shards:
            raise ValueError(
                f"Every shard gives as many elements to a batch, so `batch_size` must be a multiple of `shards`. "
                f"Received: batch_size={batch_size}, shards={shards}"
            )
        if len(files) < shards:
            raise ValueError(
                f"There are fewer files than shards, so some shards would have none. Write more files, or take fewer "
                f"shards. Received: {len(files)} files, shards={shards}"
            )
        if counts is not None and (len(counts) != len(files) or any(int(n) != n or n < 1 for n in counts)):
            raise ValueError(
                f"`counts` must have a positive number for each of {len(files)} files. Received: {counts!r}"
            )
        self.files = [os.fspath(each) for each in files]
        known = None if counts is None else tuple(map(int, counts))
        self.dealing = FileShards(len(files), shards, batch_size, shuffle > 0, seed, known)
        self.passes = 0  # that have ended
        self.reader = "this process"  # who reads, for messages
        self._make, self._decode, self._shuffle = make, decode, shuffle
        self._parallel_calls = tf.data.AUTOTUNE if parallel_calls is None else parallel_calls
        self._skipped = 0  # batches before the place where the pass begins
        self._length: int | None = None  # batches of this pass from where it began, if known
        self._open: dict[int, int] = {}  # files that are being read, by shard

    def describe(self) -> dict:
        """What workers must have in common, beside the files' names."""
        dealing = self.dealing
        return {
            "number of files": len(self.files),
            "shards": dealing.shards,
            "batch size": dealing.batch_size,
            "shuffle": self._shuffle,
            "seed": dealing.seed,
            "counts": dealing.counts,
            "passes that have ended": self.passes,
        }

    # The place in the data.

    def seek(self, passes: int, batches: int) -> None:
        """Goes to where so many passes, and so many batches of the next one, lie behind."""
        self.passes, self._skipped = passes, batches

    @property
    def is_at_start(self) -> bool:
        """Whether the pass begins with its first batch."""
        return self._skipped == 0

    def end(self) -> None:
        """Counts a pass, after its last batch."""
        self.passes += 1
        self._skipped = 0

    def handed_out(self, index: int) -> bool | None:
        """Whether the pass has a batch `index`, counted from where it began; None if that is unknown.

        After the last one the pass is counted, as Keras does not ask for more than it knows of.
        """
        if index == 0:
            batches = self.dealing.batches
            self._length = None if batches is None else batches - self._skipped
        if self._length is None:
            return None
        left = self._length - int(index)
        if left == 1 or (index == 0 and left == 0):  # or the pass began behind its last batch
            self.end()
        return left > 0

    # Files.

    def described_files(self) -> list[str]:
        """Each file's name, and the size of up to `_MOST_SIZES` files: what workers must see alike."""
        stride = -(-len(self.files) // _MOST_SIZES)
        return [name if k % stride else f"{name} ({_size_of(name)})" for k, name in enumerate(self.files)]

    def find_missing(self, shards: Sequence[int]) -> list[str]:
        """What is wrong with the files that these shards read next, as far as it shows without reading them."""
        starting = self.dealing.start(self.passes, self._skipped, shards)
        faults = (self._fault_of(file) for files in starting.files for file in files)
        return [fault for fault in faults if fault]

    def _fault_of(self, file: int) -> str:
        name = self.files[file]
        try:
            size = tf.io.gfile.stat(name).length
        except tf.errors.OpError as error:
            return f"{name!r} cannot be read ({type(error).__name__})"
        is_empty = size == 0
        if 0 < size < _SMALL_BYTES:
            try:
                is_empty = next(iter(self._make(tf.constant(name))), None) is None
            except tf.errors.OpError:
                pass  # it is damaged, which is found when it is read
            except Exception as error:  # of `make`, to be told by all workers
                return f"`make` fails for {name!r} ({type(error).__name__}: {error})"
        return f"{name!r} has no elements ({size} bytes)" if is_empty else ""

    def blame(self, error: tf.errors.OpError) -> Exception | None:
        """The error that names the damaged file, for an error while reading; None if no file is to blame."""
        deadline, text = time.monotonic() + _BLAME_SECONDS, str(error)
        read, self._open = self._open, {}  # a later error is not of these
        for file in read.values():
            name, counted = self.files[file], 0
            found = error.message if re.search(rf"{re.escape(name)}(?![\w.-])", text) else ""
            try:
                for _ in self._make(tf.constant(name)) if not found else ():
                    counted += 1
                    if time.monotonic() > deadline:
                        return None
                if not found and self.dealing.counts is not None and counted < self.dealing.counts[file]:
                    found = f"it has {counted} elements, and `counts` says {self.dealing.counts[file]}."
            except tf.errors.OpError as again:
                found = again.message
            if found:
                return ValueError(
                    f"{self.reader} cannot read {name!r}, file {file} of a sharded_dataset: "
                    f"{found.splitlines()[0]} Put the file right, or leave it out on all workers."
                )
        return None

    # The pipeline.

    def read(self, shards: Sequence[int]) -> tf.data.Dataset:
        """The part of every batch that is of these shards, from where the next pass begins."""
        begin = functools.partial(self._begin, list(shards))
        plan = tf.data.Dataset.range(1).map(_as_it_is(lambda _: tf.numpy_function(begin, [], [tf.int64] * 4)))
        samples = self._samples(plan.flat_map(_as_it_is(_of_each_shard)), len(shards))
        batch = self.dealing.chunk * len(shards)
        result = samples.group_by_window(
            key_func=lambda key, _: key,
            reduce_func=lambda _, window: window.map(lambda _, sample: sample).batch(batch),
            window_size_func=lambda key: key % 2**_SIZE_BITS,
        ).prefetch(tf.data.AUTOTUNE)
        return without_tuning(result)

    def _begin(self, shards: list[int]) -> tuple:
        """Files `[shards, most files]`, padded with -1, their seeds, what to skip, and the shards' numbers."""
        self._open = {}
        starting = self.dealing.start(self.passes, self._skipped, shards)
        width = max(1, *map(len, starting.files)) if starting.files else 1
        files, seeds = np.full([2, len(shards), width], -1, np.int64)
        for row, (own, of_own) in enumerate(zip(starting.files, starting.seeds, strict=True)):
            files[row, : len(own)], seeds[row, : len(own)] = own, of_own
        return files, seeds, np.array(starting.skips, np.int64), np.array(shards, np.int64)

    def _samples(self, plan: tf.data.Dataset, count: int) -> tf.data.Dataset:
        """Samples of a pass over so many shards, each with the key of its batch: its number, and how many are in it.

        Args:
            plan: the files, their seeds, what to skip and the number of each shard.
            count: number of shards.
        """
        chunk, raw = self.dealing.chunk, self._raw_spec
        empty = tuple(tf.zeros([0, *spec.shape], spec.dtype) for spec in packed_specs(raw))

        def chunks(files: tf.Tensor, seeds: tf.Tensor, skip: tf.Tensor, shard: tf.Tensor) -> tf.data.Dataset:
            entries = tf.data.Dataset.from_tensor_slices((files, seeds)).filter(lambda file, _: file >= 0)
            elements = entries.flat_map(_as_it_is(functools.partial(self._raw, shard=shard))).skip(skip)
            elements = elements.map(_as_it_is(lambda *each: packed(raw, each))).batch(chunk)
            endless = tf.data.Dataset.from_tensors(empty).repeat()
            return elements.concatenate(endless).map(lambda *each: (tf.shape(each[0], tf.int64)[0], *each))

        def whole(index: tf.Tensor, element: tuple) -> tuple:
            sizes, *parts = element
            is_element = tf.sequence_mask(sizes, chunk)
            rows = tuple(tf.boolean_mask(part, is_element) for part in parts)
            return index * 2**_SIZE_BITS + tf.reduce_sum(sizes), rows

        def apart(key: tf.Tensor, rows: tuple) -> tf.data.Dataset:
            slices = tf.data.Dataset.from_tensor_slices(rows)
            return slices.map(lambda *row: (key, row))

        shapes = ([], *([chunk, *spec.shape] for spec in packed_specs(raw)))
        rounds = plan.interleave(
            _as_it_is(chunks),
            cycle_length=count,
            block_length=1,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        rounds = (
            rounds.padded_batch(count, shapes).enumerate().map(_as_it_is(lambda index, *each: whole(index, each[0])))
        )
        rounds = rounds.take_while(lambda key, _: key % 2**_SIZE_BITS > 0)
        return rounds.flat_map(_as_it_is(apart)).map(
            lambda key, row: (key, self._decoded(unpacked(raw, row))),
            num_parallel_calls=self._parallel_calls,
            deterministic=True,
        )

    @functools.cached_property
    def _raw_spec(self) -> Any:
        """The structure of elements before they are decoded."""
        found = []
        zero = tf.constant(0, tf.int64)
        look = tf.function(lambda: found.append(self._raw(zero, zero, 0).element_spec), autograph=False)
        look.get_concrete_function()
        return found[0]

    def _raw(self, file: tf.Tensor, seed: tf.Tensor, shard: tf.Tensor | int) -> tf.data.Dataset:
        """Elements of one file, shuffled."""
        path = tf.ensure_shape(tf.numpy_function(self._note_open, [file, shard], tf.string), [])
        elements = self._make(path)
        if not isinstance(elements, tf.data.Dataset):
            raise ValueError(f"`make` must return a tf.data.Dataset of a file's elements. Received: {elements!r}")
        if self.dealing.counts is not None:
            count = tf.gather(tf.constant(self.dealing.counts, tf.int64), file)
            elements = elements.apply(tf.data.experimental.assert_cardinality(count))
        if self._shuffle:
            graph = tf.compat.v1.get_default_graph()
            graph.seed = _SHUFFLE_SEED
            elements = elements.shuffle(self._shuffle, seed=seed, reshuffle_each_iteration=False)
        return elements

    def _note_open(self, file: np.int64, shard: np.int64) -> bytes:
        self._open[int(shard)] = int(file)
        return self.files[int(file)].encode()

    def _decoded(self, element: Any) -> Any:
        if self._decode is None:
            return element
        return self._decode(*element) if isinstance(element, tuple) else self._decode(element)

    def counted(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same dataset, whose passes are counted when their last batch, or their end, is asked for."""
        if self.dealing.counts is not None:
            is_there = _as_it_is(lambda index, _: truth_of(self.handed_out, index))
            return not_ahead(dataset.enumerate().take_while(is_there).map(_as_it_is(lambda _, batch: batch)))

        def end() -> bool:
            self.end()
            return False

        never = tf.data.Dataset.range(1).filter(_as_it_is(lambda _: truth_of(end)))
        return not_ahead(dataset.concatenate(never.flat_map(lambda _: dataset.take(0))))


def _size_of(name: str) -> str:
    try:
        return f"{tf.io.gfile.stat(name).length} bytes"
    except tf.errors.OpError as error:
        return type(error).__name__


def _as_it_is(function: Callable) -> Callable:
    """A function that TensorFlow does not convert: it needs no Python control flow in graphs."""
    return tf.autograph.experimental.do_not_convert(function)


def _of_each_shard(*plan: tf.Tensor) -> tf.data.Dataset:
    """The plan of each shard, of those of all: `ShardedFiles._begin`."""
    for each, shape in zip(plan, ([None, None], [None, None], [None], [None]), strict=True):
        each.set_shape(shape)
    return tf.data.Dataset.from_tensor_slices(plan)
