"""Tests the transport between replicas: each primitive runs once, on values whose result is known.

A transport can be wrong without an error: a library may number members differently, support a dtype or a size only in
part, or add in too few bits. So every start of a strategy sends a few numbers in every way that training will use.

[Note: known values] Each rank and each element has a number of its own, and no size is divisible by the number of
replicas. Values that are only moved use many bits of their dtype. Values that are summed are whole numbers with an
exact sum in any order. 16-bit floats that must be added in float32 have a sum that 16 bits cannot hold.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.collectives.transport import LIBRARIES
from tfzero.host import graphs, runtime
from tfzero.workers.channel import Channel

_LARGE_BYTES = 2**16 + 4  # too many to sum by gathering. [Note: small sums] in `collectives/group.py`
_MOST_SHOWN = 3  # errors shown by each worker
_MOST_CHARACTERS = 2000  # of a worker's message
_TOPIC = "testing the transport"

# The dtypes in which training uses a primitive, or may. On CPUs each dtype of the first tuple has a way of its own, and
# those of the second travel as one of the first: all_gather_ragged is two all-gathers. A transport may want all tested
# always.
_DTYPES = {
    "all_reduce": ((tf.float32, tf.bfloat16, tf.int64), (tf.float64, tf.float16, tf.int32, tf.bool)),
    "reduce_scatter": ((tf.float32, tf.bfloat16), (tf.float16,)),
    "all_to_all": ((tf.int32,), (tf.float32,)),  # compressed values travel as int32
    "all_gather": ((tf.float32, tf.bfloat16, tf.bool), (tf.float16, tf.int32, tf.int64, tf.uint8)),
    "all_gather_ragged": ((), (tf.float32, tf.bool)),
    "broadcast": ((tf.float32, tf.bool), (tf.bfloat16, tf.int64)),
}


class TransportError(RuntimeError):
    """Values that replicas send each other arrive wrong, or cannot be sent."""


@dataclass(frozen=True)
class Row:
    """Result of one primitive and dtype. If it is wrong: what the first local rank with a wrong value received."""

    primitive: str  # such as "all_reduce", or "reduce_scatter within workers" for one of two levels
    dtype: str
    way: str  # the transport's name
    ok: bool
    rank: int
    expected: str  # "" if it is right
    received: str
    seconds: float  # of the whole test

    def __str__(self) -> str:
        name = f"{self.primitive} of {self.dtype} over {self.way}"
        return f"{name} gave rank {self.rank} {self.received} instead of {self.expected}" if not self.ok else name


_passed: set[tuple] = set()  # the transport and the devices of groups within this process


def check(group: Group, channel: Channel) -> None:
    """Runs the test. All workers call it together, and if it fails on one, all raise an error.

    Within one process the same devices are tested once.

    Args:
        group: the replicas of a strategy.
        channel: control channel of the workers; the test fails if it takes longer than its timeout.

    Raises:
        TransportError: a RuntimeError that names primitive, dtype and rank, the value expected and the one received.
        tf.errors.OpError: if TensorFlow fails; the text names primitive and dtype.
    """
    kind = group.transport.name, group.devices
    if group.world_size == 1 or kind in _passed:
        return
    told, failure = "", None
    try:
        wrong = [row for row in run(group, channel.timeout_seconds) if not row.ok]
        more = f"; and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        told = "; ".join(map(str, wrong[:_MOST_SHOWN])) + more
    except Exception as error:
        told, failure = f"{type(error).__name__}: {error}", error
    try:
        answers = channel.all_gather(_TOPIC, told[:_MOST_CHARACTERS])
    except Exception as error:
        if failure is None:
            raise
        raise failure from error  # a worker that waits for this one in a primitive does not answer
    if failure is not None:
        raise failure
    if any(answers):
        where = [f"worker {worker}: {answer}" for worker, answer in enumerate(answers) if answer]
        raise TransportError(
            f"The first exchange between the replicas went wrong. {'. '.join(where)}. Training "
            f"would go wrong without an error. Give all machines the same drivers and libraries {LIBRARIES}, or "
            'choose other devices: `ZeroStrategy(devices=["CPU:0"])` leaves GPUs out.'
        )
    if group.world_size == len(group.devices):
        _passed.add(kind)


def run(group: Group, timeout_seconds: float = 60.0, every_dtype: bool = False) -> list[Row]:
    """Runs each primitive that training uses. All replicas of all workers run it together.

    Args:
        group: the replicas of a strategy.
        timeout_seconds: the limit within one process. Between processes the pulse sets the limit.
        every_dtype: whether to test dtypes that travel as another one too, where the transport leaves them out.

    Returns:
        A row for each primitive and dtype, about what this process's replicas received; none for a single replica.

    Raises:
        TransportError: if a primitive cannot be traced.
        tf.errors.OpError: if TensorFlow fails; the text names primitive and dtype.
    """
    if group.world_size == 1:
        return []
    start = perf_counter()
    cases = _cases(group, every_dtype or group.transport.is_tested_in_every_dtype)
    received = _received(group, cases, timeout_seconds)
    seconds = perf_counter() - start
    name = group.transport.name
    return [_row(case, [results[k] for results in received], group, name, seconds) for k, case in enumerate(cases)]


@dataclass(frozen=True)
class _Case:
    """One primitive and dtype: the values that ranks send, and the values that they must receive."""

    primitive: str
    dtype: tf.DType
    run: Callable  # takes a value and a replica
    gives: Callable[[int], np.ndarray]  # takes a rank
    receives: Callable[[Sequence[int], int], Sequence[np.ndarray]]  # takes a group's ranks, and a place among them
    members: Callable[[int], tuple[Sequence[int], int]]  # takes a local replica; returns those ranks and that place

    @property
    def name(self) -> str:
        return f"{self.primitive} of {self.dtype.name}"

    @property
    def scope(self) -> str:
        """Name scope that appears in TensorFlow's errors."""
        return f"self_test_of_{self.primitive}_of_{self.dtype.name}_".replace(" ", "_")


def _row(case: _Case, received: Sequence, group: Group, way: str, seconds: float) -> Row:
    """The row of a case, given what each local replica received."""
    for replica, results in enumerate(received):
        parts = results if isinstance(results, list | tuple) else [results]
        wanted = case.receives(*case.members(replica))
        for part, want in zip(parts, wanted, strict=True):
            difference = _difference(part.numpy(), want)
            if difference is not None:
                return Row(case.primitive, case.dtype.name, way, False, group.rank(replica), *difference, seconds)
    return Row(case.primitive, case.dtype.name, way, True, group.rank(0), "", "", seconds)


def _difference(found: np.ndarray, wanted: np.ndarray) -> tuple[str, str] | None:
    """The wanted and the found value at the first difference; None if all are equal."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{wanted.dtype} of shape {wanted.shape}", f"{found.dtype} of shape {found.shape}"
    same = found == wanted  # False for NaN
    if same.all():
        return None
    place = np.unravel_index(int(np.argmin(same)), same.shape)
    return f"{wanted[place]!s}", f"{found[place]!s} at {[int(k) for k in place]}"


def _received(group: Group, cases: Sequence[_Case], timeout_seconds: float) -> list[list]:
    """Runs all cases in one graph, one after the other, which is cheapest; returns each local replica's results."""

    def results(values: Sequence, replica: int) -> list:
        received: list = []
        for case, value in zip(cases, values, strict=True):
            received.append(_result(case, value, replica, group, after=tf.nest.flatten(received[-1:])))
        return received

    @tf.function(autograph=False)
    def transport_test() -> list:
        if len(group.devices) > 1:
            graphs.chain_by_device(tf.compat.v1.get_default_graph(), group.devices)
        ranks = [group.rank(replica) for replica in range(len(group.devices))]
        return group.launch(results, [[case.gives(rank) for case in cases] for rank in ranks])

    traced = transport_test.get_concrete_function()
    try:
        with _unoptimized(), _limited(group, timeout_seconds):
            return traced()
    except tf.errors.OpError as error:
        found = [case.name for case in cases if case.scope in str(error) or f"self-test of {case.name}" in str(error)]
        text = f"The self-test of {', '.join(found) or 'the transport'} failed: {error.message}"
        raise type(error)(error.node_def, error.op, text) from error


def _result(case: _Case, value: np.ndarray, replica: int, group: Group, after: Sequence[tf.Tensor]) -> Any:
    """Traces one case for a replica. It waits for the previous case to end, so that errors name the one that hangs."""
    with tf.name_scope(case.scope), group.lanes.purpose(replica, f"the self-test of {case.name}"):
        with tf.control_dependencies(after):
            given = tf.constant(value, case.dtype)
        try:
            return case.run(given, replica)
        except Exception as error:
            raise TransportError(f"{case.name} cannot be traced: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _unoptimized() -> Iterator[None]:
    """While active, graphs run as traced: optimizing a graph that runs once takes longer than running it."""
    former = tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer", False)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": former})


@contextlib.contextmanager
def _limited(group: Group, timeout_seconds: float) -> Iterator[None]:
    """Ends collectives that take too long within one process; between processes the pulse does that."""
    if group.lanes.is_counted:
        yield
        return
    reason = f"the replicas of this process did not end within {timeout_seconds:g} s"
    timer = threading.Timer(timeout_seconds, runtime.abort_collectives, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# The cases.


def _dtypes(primitive: str, every_dtype: bool) -> tuple[tf.DType, ...]:
    first, others = _DTYPES[primitive]
    return first + others if every_dtype else first


def _cases(group: Group, every_dtype: bool) -> list[_Case]:
    """The cases that training may need, for one group or its two levels."""
    here, size = len(group.devices), group.world_size
    first = group.rank(0)
    everyone = list(range(size))

    def all_of(replica: int) -> tuple[Sequence[int], int]:
        return everyone, group.rank(replica)

    cases = _sums(group, size, all_of, every_dtype) + _moves(group, size, all_of, every_dtype)
    if group.within is not None:
        neighbours = list(range(first, first + here))

        def within(replica: int) -> tuple[Sequence[int], int]:
            return neighbours, replica

        def across(replica: int) -> tuple[Sequence[int], int]:
            return everyone[replica::here], first // here

        if every_dtype:  # otherwise the sum over both levels is enough
            cases += [_scatter(group.within, " within workers", tf.float32, here, size, within)]
            cases += [_scatter(group.across, " across workers", tf.float32, size // here, size, across)]
        cases += [_exchange(group.across, " across workers", tf.int32, size // here, across)]
    return cases


def _sums(group: Group, size: int, members: Callable, every_dtype: bool) -> list[_Case]:
    def reduced(dtype: tf.DType, elements: int, suffix: str = "") -> _Case:
        @functools.cache
        def gives(rank: int) -> np.ndarray:
            return _terms(dtype, rank, size, [elements])

        def receives(ranks: Sequence[int], place: int) -> list[np.ndarray]:
            del place
            return [_sum(dtype, [gives(rank) for rank in ranks])]

        return _Case(f"all_reduce{suffix}", dtype, group.all_reduce, gives, receives, members)

    cases = [reduced(dtype, size + 1) for dtype in _dtypes("all_reduce", every_dtype)]
    if group.sums_by_gathering(tf.float32.size * (size + 1)):
        elements = _LARGE_BYTES // tf.float32.size
        cases.append(reduced(tf.float32, elements + (elements % size == 0), " in a ring"))
    return cases + [_scatter(group, "", dtype, size, size, members) for dtype in _dtypes("reduce_scatter", every_dtype)]


def _scatter(group: Group, suffix: str, dtype: tf.DType, rows: int, size: int, members: Callable) -> _Case:
    is_narrow = dtype in (tf.float16, tf.bfloat16)
    total = tf.float32 if is_narrow else dtype

    def run(value: tf.Tensor, replica: int) -> tf.Tensor:
        return group.reduce_scatter(value, replica, total)

    @functools.cache
    def gives(rank: int) -> np.ndarray:
        return (_terms_beyond if is_narrow else _terms)(dtype, rank, size, [rows, size + 1])

    def receives(ranks: Sequence[int], place: int) -> list[np.ndarray]:
        return [_sum(total, [gives(rank)[place] for rank in ranks])]

    return _Case(f"reduce_scatter{suffix}", dtype, run, gives, receives, members)


def _exchange(group: Group, suffix: str, dtype: tf.DType, rows: int, members: Callable) -> _Case:
    @functools.cache
    def gives(rank: int) -> np.ndarray:
        return _numbers(dtype, rank, [rows, rows + 1])

    def receives(ranks: Sequence[int], place: int) -> list[np.ndarray]:
        return [np.stack([gives(rank)[place] for rank in ranks])]

    return _Case(f"all_to_all{suffix}", dtype, group.all_to_all, gives, receives, members)


def _moves(group: Group, size: int, members: Callable, every_dtype: bool) -> list[_Case]:
    def moved(primitive: str, dtype: tf.DType, run: Callable, receives: Callable, is_ragged: bool = False) -> _Case:
        @functools.cache
        def gives(rank: int) -> np.ndarray:
            return _numbers(dtype, rank, [size + 1 + (rank if is_ragged else 0)])

        return _Case(primitive, dtype, run, gives, lambda ranks, _: receives([gives(rank) for rank in ranks]), members)

    def backward(value: tf.Tensor, replica: int) -> tf.Tensor:
        return group.all_gather(value, replica, True)

    def broadcast(value: tf.Tensor, replica: int) -> tf.Tensor:
        with tf.control_dependencies([value]):  # ranks that only receive do not use it
            return group.broadcast(value, replica)

    def stacked(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.stack(values)]

    exchanged, gathered, parts, sent_to_all = (
        _dtypes(primitive, every_dtype) for primitive in ("all_to_all", "all_gather", "all_gather_ragged", "broadcast")
    )
    return [
        *(_exchange(group, "", dtype, size, members) for dtype in exchanged),
        *(moved("all_gather", dtype, group.all_gather, stacked) for dtype in gathered),
        moved("all_gather in the backward pass", tf.float32, backward, stacked),
        *(moved("all_gather_ragged", dtype, group.all_gather_ragged, list, True) for dtype in parts),
        *(moved("broadcast", dtype, broadcast, lambda values: values[:1]) for dtype in sent_to_all),
    ]


# Values that ranks send. [Note: known values]


def _numbers(dtype: tf.DType, rank: int, shape: Sequence[int]) -> np.ndarray:
    """A rank's numbers for primitives that move values."""
    index = np.arange(np.prod(shape)).reshape(shape)
    if dtype.is_bool:
        numbers = (rank + 1) >> (index % 16) & 1
    elif dtype.size <= 2:
        numbers = (1 + 17 * rank + 3 * index) % 251  # all these dtypes hold whole numbers below 256 exactly
    else:
        numbers = 2 ** (40 if dtype == tf.int64 else 23) + (4099 * rank + 3 * index) % 2**23
    return numbers.astype(dtype.as_numpy_dtype)


def _terms(dtype: tf.DType, rank: int, size: int, shape: Sequence[int]) -> np.ndarray:
    """A rank's terms, among `size` ranks: their sum is exact in their dtype, whatever the order of addition."""
    index = np.arange(np.prod(shape)).reshape(shape)
    if dtype.is_bool:
        terms = index % (size + 1) == rank  # True on one rank for each element, and on no rank for the last
    elif dtype.size <= 2:
        terms = (1 + (rank + index) % 7) * (rank % (1 + 7 * size // 256) == 0)  # sums up to 256
    else:
        terms = min(2**16, 2**23 // size) + 1 + 3 * rank + 5 * (index % 251)  # sums below 2^24, for 1024 ranks
    return terms.astype(dtype.as_numpy_dtype)


def _terms_beyond(dtype: tf.DType, rank: int, size: int, shape: Sequence[int]) -> np.ndarray:
    """A rank's 16-bit terms, among `size` ranks: their sum needs more bits; the large term moves from rank to rank."""
    index = np.arange(np.prod(shape)).reshape(shape)
    large = 2**8 if dtype == tf.bfloat16 else 2**11
    small = np.where((rank - index) % size == 1 % size, 1 + size % 2 + 2 * (index % 5), 1)
    return np.where(rank == index % size, large, small).astype(dtype.as_numpy_dtype)


def _sum(dtype: tf.DType, values: Sequence[np.ndarray]) -> np.ndarray:
    return sum(value.astype("float64") for value in values).astype(dtype.as_numpy_dtype)  # type: ignore[union-attr]
