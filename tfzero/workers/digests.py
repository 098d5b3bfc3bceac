"""Checks that all workers read the same batches in the same order.

[Note: digests] Every worker reads the global batches and keeps its rows. If batches differ between workers, some
samples are silently trained twice and others never. So each worker makes a digest of shapes and content for the first
batches of every pass over a data set. The workers compare the digests before a step takes such a batch. This draws no
extra batches: the digest travels with its batch through the pipeline, past the prefetched ones, and is removed where
the batch is handed out.

A difference is an error, with two exceptions. During `predict`, other values only cause a warning. And random
operations (`tf.image.random_flip_left_right` in `Dataset.map`, an augmentation in a generator) rightly give each worker
other values. If a part of the batch that varies by sample, such as the labels, is the same everywhere, so is the order.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.workers.channel import Channel

MOST_BYTES = 2**24  # hashed per tensor; of a larger one only parts, spread evenly
_PART_BYTES = 64
_SCATTER = 0x9E3779B9  # the golden ratio in 32 bits: its multiples are spread evenly
_SHOWN = 3  # first values of a tensor, for messages
_MOST_CHARACTERS = 1000  # of an error, for the other workers
_NAMES = ("x", "y", "sample_weight")
_SHAPE, _VALUES, _SAME_ROWS = " (shape)", " (values)", "in every row "
_OF_SPARSE = (".indices", ".shape")  # parts of a sparse tensor that may look alike in any order of its rows
# Operations in `Dataset.map` that draw random numbers. Shuffling there is not one of them: it changes the order.
_RANDOM = ("Random", "Multinomial", "TruncatedNormal", "StatefulUniform", "StatefulStandardNormal", "RngRead")
TAKEN, DOUBTED, REFUSED = "taken", "doubted", "refused"
_PYTHON = ("PyFunc", "EagerPyFunc")
_ADVICE = (
    "Every worker must read the same global batches in the same order, of which each replica takes its rows: give what "
    "shuffles or draws the same seed on every worker. If each worker reads rows of its own, say so by "
    "`tfzero.own_rows(dataset)`. `ZeroStrategy(compare_batches=0)` leaves the comparison away."
)

# Errors for which no file is to blame.
_NOT_OF_DATA = (
    tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
    tf.errors.ResourceExhaustedError,
)  # fmt: skip
_OF_PREDICTIONS = "Nothing is trained with them; the predictions are of the rows that each worker kept of its own."
_OF_DRAWS = "Random operations may rightly draw other numbers on each worker, so it goes on."


@dataclass(frozen=True)
class Source:
    """What is known about the source of batches.

    Args:
        name: for messages.
        draws: whether random operations of TensorFlow take part.
        is_python: whether Python code takes part, which may draw random numbers.
        may_warn: whether nothing is trained with the batches, so other content only causes a warning.
    """

    name: str
    draws: bool = False
    is_python: bool = True
    may_warn: bool = False

    @classmethod
    def of_operations(cls, name: str, kinds: set[str], may_warn: bool) -> "Source":
        """The source for a pipeline with these kinds of operations in its functions."""
        draws = any(word in kind for kind in kinds - {"RandomShuffle"} for word in _RANDOM)
        return cls(name, draws, any(kind in _PYTHON for kind in kinds), may_warn)


class BatchComparison:
    """Compares the first batches of each pass over data between workers. [Note: digests]

    Args:
        channel: a channel for nothing else, as TensorFlow's threads may prepare batches.
        workers: number of workers.
        count: number of batches to compare at the start of a pass.
        on_loss: called with the error if a worker does not come to compare.
    """

    def __init__(self, channel: Channel, workers: int, count: int, on_loss: Callable[[Exception], object]) -> None:
        self._channel = channel
        self._on_loss = on_loss
        self.count = count if workers > 1 else 0
        self._readers: weakref.WeakSet = weakref.WeakSet()  # of files; they know which one is to blame for an error
        self._during: str | None = None  # the model's method that reads data now
        self._failure: Exception | None = None
        self._owed: str | None = None  # the topic on which the others wait for this worker
        self._data_sets = 0
        self._warned: set[Source] = set()

    def source(self, kinds: set[str]) -> Source:
        """The source for a new data set, from the kinds of operations in its functions."""
        return Source.of_operations(self.new_data_set(), kinds, self.only_predicts)

    def of_given(self, name: str) -> Callable:
        """A function that takes whole batches and compares the first `count` of them. `name` is for messages."""
        indexes = itertools.count()

        def check(batch: Any) -> None:
            index = next(indexes)
            if index < self.count:
                named = _named_arrays(batch)
                arrays = [_as_array(value) for _, value in named]
                noted = digest([name for name, _ in named], index, *arrays)
                self._compare(noted, Source(name, may_warn=self.only_predicts))

        return check

    @contextlib.contextmanager
    def during(self, method: str) -> Iterator[None]:
        """Context in which a model's method reads data. It raises errors of a comparison as they were."""
        before, self._during, self._failure, self._owed = self._during, method, None, None
        try:
            yield
        except tf.errors.OpError as error:
            if self._failure is not None:
                raise self._failure from None
            if isinstance(error, _NOT_OF_DATA):
                raise
            explained = self._blame(error)
            if self._owed is not None:
                self._answer(self._owed, explained or error)
            elif explained is not None:
                self._channel.fail(explained)
            if explained is None:
                raise
            raise explained from error
        finally:
            self._during = before

    def _blame(self, error: tf.errors.OpError) -> Exception | None:
        return next((found for reader in list(self._readers) if (found := reader.blame(error)) is not None), None)

    def _answer(self, topic: str, error: Exception) -> None:
        """Tells the other workers of an error, as they wait for this one's batch. The channel stays open."""
        with contextlib.suppress(ConnectionError, TimeoutError, RuntimeError):  # they have failed as well
            self.gather(topic, f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS])

    def note_reader(self, reader: Any) -> None:
        """Notes who can tell which file is to blame for an error while reading: by `reader.blame(error)`."""
        self._readers.add(reader)

    def new_data_set(self) -> str:
        """A name for a new data set, for messages."""
        self._data_sets += 1
        return f"data set {self._data_sets}{f' of `{self._during}`' if self._during else ''}"

    @property
    def only_predicts(self) -> bool:
        """Whether the data that are read now are predicted from."""
        return self._during in ("predict", "predict_on_batch")

    def noted(self, make_batch: Callable, index: tf.Tensor) -> tf.Tensor:
        """In a pipeline: the digest of batch number `index`, a scalar string; "" after the batches to compare.

        `make_batch` gives the whole batch, which is made only if it is compared.
        """

        def of_batch() -> tf.Tensor:
            named = _named_arrays(make_batch())
            make = functools.partial(digest, [name for name, _ in named])
            return tf.numpy_function(make, [index, *(tensor for _, tensor in named)], tf.string)

        return tf.cond(index < self.count, of_batch, lambda: "")

    def compared(self, noted: tf.Tensor, source: Source) -> tf.Tensor:
        """In a pipeline: waits until the digest has been compared with the other workers' digests."""
        compare = functools.partial(self._compare, source=source)
        is_noted = tf.strings.length(noted) > 0
        return tf.cond(is_noted, lambda: tf.numpy_function(compare, [noted], tf.bool), lambda: True)

    def owes(self, topic: str) -> None:
        """Notes that a step asks for a batch, which all workers will `gather` about."""
        self._owed = topic

    def gather(self, topic: str, value: Any) -> list[Any]:
        """In a pipeline, as a batch is handed out: the values of all workers, in rank order."""
        self._owed = None
        with self._noting_failure():
            return self._channel.all_gather(topic, value)

    def refuse(self, error: Exception) -> Exception:
        """Notes an error of a pipeline's Python function, so that the model's method raises it as it is."""
        self._failure = error
        return error

    def _compare(self, noted: bytes, source: Source) -> bool:
        with self._noting_failure():
            own = json.loads(noted)
            where = f"batch {own.pop('index')} of {source.name}"
            values, differences = self._channel.compare(f"comparing {where}", own)
            verdict = judge(values, source)
            text = f"The workers' batches differ ({where}): {differences}. {_ADVICE}"
            if verdict == REFUSED:
                raise ValueError(text)
            if verdict == DOUBTED and source not in self._warned:
                self._warned.add(source)
                warnings.warn(f"{text} {_OF_PREDICTIONS if source.may_warn else _OF_DRAWS}", stacklevel=2)
        return True

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = error
            if isinstance(error, ConnectionError | TimeoutError):
                self._on_loss(error)
            raise


def judge(values: Sequence[Mapping], source: Source) -> str:
    """The verdict on a batch, from the workers' digests in rank order. [Note: digests]"""
    parts = dict.fromkeys(name for each in values for name in each)
    differing = [name for name in parts if len({each.get(name) for each in values}) > 1]
    if not differing:
        return TAKEN
    if any(name.endswith(_SHAPE) for name in differing):
        return REFUSED
    agreeing = [name for name in parts if name.endswith(_VALUES) and name not in differing]
    telling = [name for name in agreeing if not name.removesuffix(_VALUES).endswith(_OF_SPARSE)]
    is_in_order = any(not values[0][name].startswith(_SAME_ROWS) for name in telling)
    if source.draws and is_in_order:
        return TAKEN
    return DOUBTED if source.draws or source.may_warn or (source.is_python and is_in_order) else REFUSED


def digest(names: Sequence[str], index: int | np.integer, *arrays: np.ndarray) -> bytes:
    """JSON with shape, digest and first values of each named part of batch number `index`."""
    described: dict[str, Any] = {"index": int(index)}
    for name, array in zip(names, arrays, strict=True):
        array = np.asarray(array)
        described[name + _SHAPE] = f"{array.dtype} {list(array.shape)}"
        described[name + _VALUES] = _values(array)
    return json.dumps(described).encode()


def _values(array: np.ndarray) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for part in _parts(array):
        hashed.update(part)
    first = [each.item() if isinstance(each, np.generic) else each for each in array.reshape(-1)[:_SHOWN]]
    shown = ", ".join(f"{each:.6g}" if isinstance(each, float) else str(each)[:20] for each in first)
    more = ", ..." if array.size > _SHOWN else ""
    return f"{_SAME_ROWS if _has_same_rows(array) else ''}{shown}{more} (digest {hashed.hexdigest()})"


def _has_same_rows(array: np.ndarray) -> bool:
    """Whether all rows are equal, so the array says nothing about their order."""
    if array.ndim == 0 or len(array) < 2 or array.size == 0:
        return True
    rows = array.reshape(len(array), -1)
    rows = rows if array.dtype == object else np.ascontiguousarray(rows).view(np.uint8)
    return np.array_equal(rows[0], rows[1]) and bool(np.all(rows == rows[0]))


def _parts(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """The bytes of an array, or parts of a large one.

    A large array is cut into many equal stretches, with one part from each. The part's place differs between stretches:
    at one fixed place, all parts might show margins of images.
    """
    if array.dtype == object:
        for each in array.reshape(-1):
            text = each if isinstance(each, bytes) else str(each).encode()
            yield len(text).to_bytes(8, "little") + text
        return
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if raw.size <= MOST_BYTES:
        yield raw.data
        return
    stride = -(-raw.size * _PART_BYTES // MOST_BYTES)
    stretches = np.arange(raw.size // stride)
    places = stretches * stride + (stretches * _SCATTER % 2**32 * (stride - _PART_BYTES + 1) >> 32)
    yield np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(raw, _PART_BYTES)[places]).data
    yield raw[-_PART_BYTES:].data


def _as_array(value: Any) -> np.ndarray:
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def _named_arrays(batch: Any) -> list[tuple[str, object]]:
    """The dense parts of a batch, with their names."""
    named: Iterable[tuple[str, Any]]
    if isinstance(batch, tuple) and len(batch) <= len(_NAMES):
        named = zip(_NAMES, batch, strict=False)
    else:
        named = (("x", batch),)
    return [part for name, value in named for part in _walk(name, value)]


def _walk(name: str, value: Any) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=str) for part in _walk(f"{name}[{key!r}]", value[key])]
    if isinstance(value, tuple | list):
        return [part for k, each in enumerate(value) for part in _walk(f"{name}[{k}]", each)]
    if isinstance(value, tf.SparseTensor):
        return [
            (f"{name}.indices", value.indices),
            (f"{name}.values", value.values),
            (f"{name}.shape", value.dense_shape),
        ]
    if isinstance(value, tf.RaggedTensor):
        lengths = [(f"{name}.lengths[{k}]", each) for k, each in enumerate(value.nested_row_lengths())]
        return [(f"{name}.values", value.flat_values), *lengths]
    is_array = value is not None and (not tf.is_tensor(value) or value.dtype not in (tf.variant, tf.resource))
    return [(name, value)] if is_array else []
