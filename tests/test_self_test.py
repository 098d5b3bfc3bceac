"""Every start tests its transport: what is right passes, and each primitive that is broken is named, on all workers."""

import contextlib
import dataclasses
import itertools
import json
import os
import time

import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.collectives import self_test
from tfzero.collectives.group import Group
from tfzero.collectives.joining import channel_of_one
from tfzero.collectives.rings import Rings

FEW = {"all_reduce", "reduce_scatter", "all_to_all", "all_gather", "all_gather in the backward pass", "broadcast"}
PRIMITIVES = FEW | {"all_gather_ragged"}
LEVELS = {"reduce_scatter within workers", "reduce_scatter across workers", "all_to_all across workers"}
DTYPES = {primitive: first + others for primitive, (first, others) in self_test._DTYPES.items()}
SHORT_SECONDS = 5


def make_group(world_size):
    return Group([f"/CPU:{k}" for k in range(world_size)], world_size, 0, Rings())


@pytest.fixture(autouse=True)
def none_has_passed(monkeypatch):
    """Within one process the same devices are tested once."""
    monkeypatch.setattr(self_test, "_passed", set())


# What is right.


def assert_right(rows, primitives=PRIMITIVES):
    assert [str(row) for row in rows if not row.ok] == []
    assert {row.primitive for row in rows} == primitives
    assert {row.dtype for row in rows} >= {"float32", "bfloat16", "int32", "int64", "bool"}


@pytest.mark.parametrize("world_size", [2, 3])
def test_right_collectives_pass(world_size):
    rows = self_test.run(make_group(world_size), every_dtype=True)
    assert_right(rows)
    assert {(row.primitive, row.dtype) for row in rows} >= {
        (primitive, dtype.name) for primitive, dtypes in DTYPES.items() for dtype in dtypes
    }
    some = self_test.run(make_group(world_size))
    assert_right(some, FEW)
    assert len(some) < len(rows)


def test_the_same_devices_are_tested_once_in_a_process(monkeypatch):
    tested = []
    original = self_test.run
    monkeypatch.setattr(self_test, "run", lambda group, *rest: tested.append(group.devices) or original(group, *rest))
    with broken("a permuted exchange"), pytest.raises(RuntimeError, match="went wrong"):
        tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"])
    for devices in (["CPU:0", "CPU:1"], ["CPU:1", "CPU:0"], ["CPU:2", "CPU:1"], ["CPU:0", "CPU:1"]):
        tfzero.ZeroStrategy(devices=devices)  # TensorFlow numbers them in their own order
    assert [[name[-1] for name in devices] for devices in tested] == [["0", "1"], ["0", "1"], ["1", "2"]]


def test_one_replica_has_nothing_to_test():
    assert self_test.run(make_group(1)) == []
    self_test.check(make_group(1), channel_of_one())


def _rows_of(counts):
    tfzero.ZeroStrategy()
    return [self_test.run(make_group(count), every_dtype=True) for count in counts]


@pytest.mark.parametrize("counts", [[12], sweep([8, 12])])
def test_right_collectives_of_many_replicas_pass(counts):
    """With 12 members in one process the group takes another way than an all-to-all."""
    [found] = tfzero.run_local(_rows_of, workers=1, cpu_devices=12, args=(counts,), timeout_seconds=FLEET_SECONDS)
    for rows in found:
        assert_right(rows)


# What ranks give.

WORLDS = (2, 3, 5, 8, 12, 36, 37, 128)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES["all_reduce"], ids=lambda dtype: dtype.name)
def test_sums_are_exact_in_any_order(dtype, size):
    terms = [self_test._terms(dtype, rank, size, [size + 1]) for rank in range(size)]
    exact = self_test._sum(dtype, terms)
    random = np.random.default_rng(0)
    for _ in range(5):
        total = terms[0] * 0 if not dtype.is_bool else terms[0] & False
        for rank in random.permutation(size):
            total = (total | terms[rank]) if dtype.is_bool else (total + terms[rank]).astype(terms[rank].dtype)
        np.testing.assert_array_equal(total, exact)
    for left_out in range(min(size, 5)):
        fewer = self_test._sum(dtype, terms[:left_out] + terms[left_out + 1 :])
        assert (fewer != exact).any() or size > 36


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_sums_of_16_bits_show_in_what_they_were_taken(dtype, size):
    terms = [self_test._terms_beyond(dtype, rank, size, [size, size + 1]) for rank in range(size)]
    exact = self_test._sum(tf.float32, terms)
    assert (exact.astype(dtype.as_numpy_dtype).astype("float32") != exact).all()


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES["all_gather"], ids=lambda dtype: dtype.name)
def test_no_two_ranks_move_the_same(dtype, size):
    numbers = [self_test._numbers(dtype, rank, [size + 1]) for rank in range(size)]
    assert all((a != b).any() for a, b in itertools.combinations(numbers, 2))
    assert all(number.any() for number in numbers)
    if dtype == tf.float32:  # not even half the bits would do
        assert all((each.astype(tf.bfloat16.as_numpy_dtype).astype("float32") != each).any() for each in numbers)


# What is wrong. Each is made of a right result, of what was given, and of the rank.


def permuted(result, value, rank):
    del value, rank
    return result[::-1] if isinstance(result, list) else tf.reverse(result, [0])


def truncated(result, value, rank):
    del value, rank
    return [part[:-1] for part in result] if isinstance(result, list) else result[:-1]


def own(result, value, rank):
    return tf.cast(value[rank] if value.shape.rank > result.shape.rank else value, result.dtype)


def not_a_number(result, value, rank):
    del value, rank
    return result * tf.cast(float("nan"), result.dtype) if result.dtype == tf.float32 else result


def in_16_bits(result, value, rank):
    del value, rank
    return tf.cast(tf.cast(result, tf.bfloat16), result.dtype) if result.dtype == tf.float32 else result


def of_another_dtype(result, value, rank):
    del value, rank
    return tf.cast(result, tf.float64)


def of_one_only(result, value, rank):
    return result if rank == 0 else value


# A method, what it gives, and what of it is then wrong.
BREAKS = {
    "unsummed": ("all_reduce", own, "float32"),
    "a sum that is none": ("all_reduce", not_a_number, "float32"),
    "a rounded sum": ("all_reduce", in_16_bits, "float32"),
    "an own row": ("reduce_scatter", own, "float32"),
    "a sum in 16 bits": ("reduce_scatter", in_16_bits, "bfloat16"),
    "a truncated row": ("reduce_scatter", truncated, "float32"),
    "rows that one received": ("all_to_all", of_one_only, "int32"),
    "a permuted exchange": ("all_to_all", permuted, "int32"),
    "permuted rows": ("all_gather", permuted, "float32"),
    "truncated rows": ("all_gather", truncated, "bool"),
    "rounded rows": ("all_gather", in_16_bits, "float32"),
    "permuted parts": ("all_gather_ragged", permuted, "float32"),
    "truncated parts": ("all_gather_ragged", truncated, "float32"),
    "an own value": ("broadcast", own, "float32"),
    "another dtype": ("broadcast", of_another_dtype, "bool"),
}


# Of the rest that every start tests, workers are told below.
IN_ONE_PROCESS = {"a rounded sum", "a permuted exchange", "permuted parts", "truncated parts", "another dtype"}


@contextlib.contextmanager
def broken(name):
    """A method of groups gives something else for a dtype."""
    method, wreck, dtype = BREAKS[name]
    original, depth = getattr(Group, method), []

    def wrecked(self, value, replica, *args):
        depth.append(method)  # it may call itself, of another group or dtype
        result = original(self, value, replica, *args)
        depth.pop()
        is_meant = value.dtype.name == dtype and not depth
        return wreck(result, value, self.rank(replica)) if is_meant else result

    setattr(Group, method, wrecked)
    try:
        yield
    finally:
        setattr(Group, method, original)


@pytest.mark.parametrize("name", [name if name in IN_ONE_PROCESS else sweep(name) for name in BREAKS])
def test_a_wrong_primitive_is_named(name):
    method, _, dtype = BREAKS[name]
    with broken(name):
        wrong = [row for row in self_test.run(make_group(3), every_dtype=True) if not row.ok]
    assert (method, dtype) in {(row.primitive, row.dtype) for row in wrong}
    assert all(row.expected and row.received and 0 <= row.rank < 3 for row in wrong)
    if method not in FEW:
        return
    with broken(name), pytest.raises(RuntimeError, match="went wrong") as raised:
        tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1", "CPU:2"])
    told = str(raised.value)
    assert f"{method} of {dtype} over ring gave rank " in told and " instead of " in told and "Give all" in told


def test_each_dtype_is_named_when_it_alone_is_wrong(monkeypatch):
    """What a primitive gives for one dtype is shifted by an element."""
    cases = self_test._cases(make_group(2), every_dtype=True)
    for number, broken_case in enumerate(cases):

        def shifted(value, replica, case=broken_case):
            result = case.run(value, replica)
            return [tf.roll(each, 1, -1) for each in result] if isinstance(result, list) else tf.roll(result, 1, -1)

        chosen = [dataclasses.replace(broken_case, run=shifted), cases[number - 1]]  # a right one beside it
        monkeypatch.setattr(self_test, "_cases", lambda *_, chosen=chosen: chosen)
        wrong = [row for row in self_test.run(make_group(2)) if not row.ok]
        assert [(row.primitive, row.dtype) for row in wrong] == [(broken_case.primitive, broken_case.dtype.name)]


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        ("CollectiveReduceV2", {"all_reduce of float32", "all_reduce of int64"}),
        ("CollectiveGatherV2", {"all_gather of float32", "all_gather of bool"}),
        ("CollectiveAllToAllV2", {"all_to_all of int32", "reduce_scatter of float32", "reduce_scatter of bfloat16"}),
        ("CollectiveBcastRecvV2", {"broadcast of float32", "broadcast of bool"}),
    ],
)
def test_a_wrong_operation_of_tensorflow_is_seen(operation, named, monkeypatch):
    original = getattr(tf.raw_ops, operation)
    monkeypatch.setattr(tf.raw_ops, operation, lambda **arguments: tf.roll(original(**arguments), 1, -1))
    wrong = {f"{row.primitive} of {row.dtype}" for row in self_test.run(make_group(2)) if not row.ok}
    assert named <= wrong


def test_members_in_another_order_are_seen(monkeypatch):
    """As if TensorFlow numbered the members of a group otherwise."""
    original = Group.rank
    monkeypatch.setattr(Group, "rank", lambda self, replica: self.world_size - 1 - original(self, replica))
    wrong = {row.primitive for row in self_test.run(make_group(2)) if not row.ok}
    assert {"all_gather", "all_to_all", "reduce_scatter"} <= wrong


def test_what_cannot_be_traced_is_named(monkeypatch):
    def refuse(self, value, replica):
        raise TypeError("no such dtype")

    monkeypatch.setattr(Group, "broadcast", refuse)
    with pytest.raises(RuntimeError, match="broadcast of float32 cannot be traced: TypeError: no such dtype"):
        tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"])


# In processes of their own, whose collectives can be used no more: errors of TensorFlow, and what hangs.


def _fails(original):
    """An all-to-all before which TensorFlow fails."""

    def all_to_all(self, rows, replica):
        begin = tf.random.uniform([], 0, 1, tf.int32)  # 0, which nobody knows before
        return original(self, tf.ensure_shape(rows[:begin], rows.shape), replica)

    return all_to_all


def _comes_late(original):
    """An all-to-all to which the last replica comes too late."""

    def late(rows):
        time.sleep(SHORT_SECONDS + 3)
        return rows

    def all_to_all(self, rows, replica):
        if self.rank(replica) == self.world_size - 1:
            rows = tf.ensure_shape(tf.numpy_function(late, [rows], rows.dtype), rows.shape)
        return original(self, rows, replica)

    return all_to_all


def _outcome(wreck, worker):
    """In a worker: the error that a strategy ends with, and after how long, when one worker has another all-to-all."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0
    if index == worker:
        Group.all_to_all = wreck(Group.all_to_all)
    began = time.monotonic()
    try:
        tfzero.ZeroStrategy(timeout_seconds=SHORT_SECONDS)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize(
    ("wreck", "reason"), [sweep(_fails, "InvalidArgumentError"), (_comes_late, f"did not end within {SHORT_SECONDS} s")]
)
def test_an_error_in_one_process_names_the_primitive(wreck, reason):
    [(error, seconds)] = tfzero.run_local(
        _outcome, workers=1, cpu_devices=2, args=(wreck, 0), timeout_seconds=FLEET_SECONDS
    )
    assert "The self-test of" in error and reason in error
    assert "reduce_scatter of" in error  # whose first part it is
    assert seconds < 4 * SHORT_SECONDS


@pytest.mark.parametrize("cpu_devices", [sweep(1), 2])
def test_an_error_on_one_worker_ends_all_in_time(cpu_devices):
    found = tfzero.run_local(
        _outcome, workers=2, cpu_devices=cpu_devices, args=(_fails, 1), timeout_seconds=FLEET_SECONDS
    )
    for error, seconds in found:
        assert "The self-test of" in error
        assert "reduce_scatter" in error or "all_to_all" in error
        assert seconds < 4 * SHORT_SECONDS
    assert "InvalidArgumentError" in found[1][0]


# Workers.

NAMES = [name for name, (method, _, _) in BREAKS.items() if method in FEW]


def _errors(names):
    """In a worker: what strategies end with when worker 1 breaks each of these, and nobody any; then the rows."""
    is_broken = json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1
    told = []
    for name in [*names, ""]:
        with broken(name) if name and is_broken else contextlib.nullcontext():
            try:
                strategy = tfzero.ZeroStrategy()
                told.append("")
            except RuntimeError as error:
                told.append(str(error))
    group = strategy.extended.group
    return told, self_test.run(group), self_test.run(group, every_dtype=True)


@pytest.mark.parametrize("cpu_devices", [sweep(1), 2])
def test_all_workers_end_when_one_receives_something_wrong(cpu_devices):
    found = tfzero.run_local(_errors, workers=2, cpu_devices=cpu_devices, args=(NAMES,), timeout_seconds=FLEET_SECONDS)
    for told, *both in found:
        for name, text in zip(NAMES, told, strict=False):
            method, _, dtype = BREAKS[name]
            assert "went wrong" in text and " gave rank " in text and " instead of " in text, (name, text)
            assert "worker 1: " in text, text
            # The first three are told, and what a primitive is made of may be wrong in more of them.
            assert f"{method} of {dtype}" in text or "more" in text, (name, text)
        assert told[len(NAMES) :] == [""]
        for rows, levels in zip(both, ({"all_to_all across workers"}, LEVELS | {"all_gather_ragged"}), strict=True):
            levels = levels if cpu_devices == 2 else levels - LEVELS
            assert_right(rows, FEW | {"all_reduce in a ring"} | levels)
            assert {row.way for row in rows} == {"links" if cpu_devices == 1 else "ring"}
    assert found[0][0] == found[1][0]
