"""What a digest tells of a batch, and what becomes of batches that differ. [Note: digests]"""

import threading
import time
import unittest.mock
import warnings

import numpy as np
import pytest
import tensorflow as tf

import tfzero
from tfzero.collectives.pulse import Pulse
from tfzero.rows.inputs import cut_dataset
from tfzero.workers import digests
from tfzero.workers.differences import differences_of
from tfzero.workers.digests import DOUBTED, REFUSED, TAKEN, BatchComparison, Source, digest, judge
from tfzero.workers.stopping import blaming

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(4, 3)).astype("f4")
DRAWING, PYTHON = Source("data", draws=True, is_python=False), Source("data")


class Channel:
    """Of two workers, whose other one says what `others` holds, in order."""

    def __init__(self, others=()):
        self.others, self.said = list(others), []

    def compare(self, topic, own):
        self.said.append(own)
        values = [own, self.others.pop(0) if self.others else own]
        return values, differences_of(values, lambda indexes: f"worker {indexes}")


def noted(*batches, count=9) -> list[dict]:
    """What a worker says of batches that a model is given."""
    channel = Channel()
    check = BatchComparison(channel, 2, count, print).of_given("data")
    for batch in batches:
        check(batch)
    return channel.said


def given(*batches, others, count=9) -> None:
    """Batches are given to a worker while the other one has others."""
    comparison = BatchComparison(Channel(noted(*others)), 2, count, print)
    check = comparison.of_given("data")
    for batch in batches:
        check(batch)


def sparse(values=(1.0, 2.0), indices=((0, 1), (3, 2)), shape=(4, 3)):
    return tf.SparseTensor(indices, list(values), shape)


FLOATS = np.array([1.0, 2.0], "f4")
DIFFERENT = {
    "rows in another order": (ROWS, ROWS[::-1]),
    "one element": (ROWS, ROWS + np.eye(4, 3, dtype="f4") * 1e-6),
    "same bytes, another dtype": (FLOATS, FLOATS.view("i4")),
    "same bytes, another shape": (ROWS, ROWS.reshape(3, 4)),
    "empty, another shape": (np.zeros((0, 3)), np.zeros((0, 4))),
    "signs of zero": (np.zeros(3), -np.zeros(3)),
    "swapped parts": ((ROWS, ROWS + 1), (ROWS + 1, ROWS)),
    "swapped keys": ({"a": ROWS, "b": ROWS + 1}, {"b": ROWS, "a": ROWS + 1}),
    "the third part": ((ROWS, FLOATS, FLOATS), (ROWS, FLOATS, FLOATS + 1)),
    "a part more": ((ROWS, FLOATS), (ROWS, FLOATS, FLOATS)),
    "deep within": ({"a": [{"b": (ROWS, FLOATS)}]}, {"a": [{"b": (ROWS, FLOATS + 1)}]}),
    "keys that look alike": ({1: ROWS}, {"1": ROWS}),
    "booleans": (np.array([True, False]), np.array([False, True])),
    "where strings end": (np.array([b"ab", b"c"], object), np.array([b"a", b"bc"], object)),
    "values of a ragged tensor": (tf.ragged.constant([[1], [2, 3]]), tf.ragged.constant([[1], [2, 4]])),
    "lengths of a ragged tensor": (tf.ragged.constant([[1], [2, 3]]), tf.ragged.constant([[1, 2], [3]])),
    "values of a sparse tensor": (sparse(), sparse(values=(1.0, 3.0))),
    "places of a sparse tensor": (sparse(), sparse(indices=((0, 1), (3, 1)))),
    "shape of a sparse tensor": (sparse(), sparse(shape=(5, 3))),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_batches_that_differ_are_told_apart(case):
    mine, theirs = DIFFERENT[case]
    assert noted(mine) != noted(theirs)
    refused_or_warned = (ValueError, UserWarning)  # where parts agree, random operations may be what differs
    with pytest.raises(refused_or_warned, match=r"batches differ \(batch 0 of data\): x.*seed on every worker"):
        given({"x": mine}, others=[{"x": theirs}])


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"a": ROWS, "b": FLOATS}, {"b": FLOATS, "a": ROWS}),
        (ROWS, tf.constant(ROWS)),
        (ROWS, np.asfortranarray(ROWS)),
        (np.repeat(ROWS, 2, 1)[:, ::2], ROWS),
        ((ROWS, FLOATS), (ROWS, FLOATS, None)),
        ([np.array([b"a", b"b"], object)], [tf.constant(["a", "b"])]),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0])),
        (np.zeros((0, 3)), np.zeros((0, 3))),
    ],
)
def test_equal_batches_are_taken(mine, theirs):
    given(mine, others=[theirs])


def test_only_the_first_ones_are_compared():
    assert len(noted(*[ROWS] * 5, count=2)) == 2
    given(ROWS, ROWS, ROWS, others=[ROWS, ROWS, ROWS + 1], count=2)
    with pytest.raises(ValueError, match="batch 1 of data"):
        given(ROWS, ROWS, others=[ROWS, ROWS + 1], count=2)


def test_in_a_pipeline_the_first_ones_are_compared():
    """The digest travels with its batch."""

    def run(data, others):
        channel = Channel(others)
        comparison = BatchComparison(channel, 2, 2, print)
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(2).enumerate()
        dataset = dataset.map(lambda index, batch: comparison.noted(lambda: batch, index))
        with comparison.during("fit"):
            for each in dataset.map(lambda text: comparison.compared(text, comparison.source(set()))):
                assert each
        return channel.said

    said = run(np.arange(8), [])
    assert len(said) == 2
    assert run(np.arange(8), said) == said
    with pytest.raises(ValueError, match=r"batch 1 of data set .* of `fit`\): x \(values\)"):
        run(np.array([0, 1, 3, 2, 4, 5, 6, 7]), said)


def test_who_predicts_is_warned_once():
    comparison = BatchComparison(Channel(noted(*[ROWS + 1] * 2)), 2, 9, print)
    with comparison.during("predict"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check = comparison.of_given("data")
        check(ROWS)
        check(ROWS)
    (told,) = caught
    assert "Nothing is trained with them" in str(told.message)


def test_a_worker_that_does_not_come_ends_the_run():
    class Lost(Channel):
        def compare(self, topic, own):
            raise TimeoutError("worker 1 did not arrive")

    told = []
    check = BatchComparison(Lost(), 2, 1, told.append).of_given("data")
    with pytest.raises(TimeoutError, match="did not arrive"):
        check(ROWS)
    assert list(map(str, told)) == ["worker 1 did not arrive"]


SPARSE = [((0, 1), (1, 1), (2, 2)), ((0, 1), (1, 2), (2, 1))]
IN_ANY_ORDER = {
    "sparse": [(sparse((1.0, k, 3.0), SPARSE[k]), FLOATS + k) for k in range(2)],
    "places of sparse rows": [(sparse((1.0, k, 3.0), SPARSE[0]), FLOATS + k) for k in range(2)],
    "ragged": [(tf.ragged.constant([[1, 2 + k], [3, 4]]), FLOATS + k) for k in range(2)],
}


@pytest.mark.parametrize("case", IN_ANY_ORDER)
def test_that_parts_look_alike_in_any_order_tells_of_no_order(case):
    """Nothing else agrees, so that random operations cannot be all that differs."""
    mine, theirs = IN_ANY_ORDER[case]
    values = [*noted(mine), *noted(theirs)]
    assert judge(values, DRAWING) == DOUBTED
    assert judge(values, PYTHON) == REFUSED


def test_lengths_that_vary_tell_of_an_order():
    mine, theirs = tf.ragged.constant([[1, 2], [3]]), tf.ragged.constant([[4, 5], [6]])
    assert judge([*noted(mine), *noted(theirs)], DRAWING) == TAKEN


def test_margins_of_large_images_do_not_hide_them(monkeypatch):
    """Rows of pixels are as long as the stretches of which a part is taken."""
    monkeypatch.setattr(digests, "MOST_BYTES", 2**16)
    images = np.zeros((64, 16, 64), "f4")  # of 256 KB, so that one of 256 bytes is a row
    first = digest(["x"], 0, images)
    images[:, :, 24:40] = RANDOM.normal(size=(64, 16, 16))
    assert digest(["x"], 0, images) != first


def test_many_equal_rows_take_no_time():
    began = time.monotonic()
    text = digest(["y"], 0, np.ones(2_000_000))
    assert time.monotonic() - began < 3
    assert b"in every row" in text


@pytest.mark.parametrize(
    ("array", "same"),
    [
        (np.ones((3, 2)), True),
        (np.array([[1, 2], [1, 2], [1, 3]]), False),
        (np.array([b"a", b"a"], object), True),
        (np.array([b"a", b"b"], object), False),
        (np.full(3, np.nan), True),
        (np.zeros((3, 0)), True),
        (np.array(1.0), True),
        (tf.ones([3], tf.bfloat16).numpy(), True),
        (np.ones((4, 3), "f4")[:, ::2], True),
    ],
)
def test_rows_that_are_all_equal(array, same):
    assert (b"in every row" in digest(["x"], 0, array)) == same


def test_a_worker_that_is_lost_meanwhile_is_the_reason_for_the_end():
    """As the pulse then says it, with whom to blame."""

    class Lost(Channel):
        def compare(self, topic, own):
            raise blaming(ConnectionError("worker 1 is lost"), [1])

    heard = Pulse.__new__(Pulse)  # no watch is begun
    heard._has_reason = threading.Event()
    check = BatchComparison(Lost(), 2, 9, heard.hear_of_loss).of_given("data")
    with pytest.raises(ConnectionError, match="worker 1 is lost"):
        check(ROWS)
    assert (heard._reason, heard._blamed, heard._has_reason.is_set()) == ("worker 1 is lost", (1,), True)


@pytest.mark.parametrize("compared", [0, 4])
@pytest.mark.parametrize(("asked", "tuned"), [(None, False), (True, True), (False, False)])
def test_no_pipeline_is_tuned_unless_asked_for(compared, asked, tuned):
    """Dropping an iterator that is tuned stops a worker for up to a minute now and then."""
    strategy, options, of_function = tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"]), tf.data.Options(), []
    if asked is not None:
        options.autotune.enabled = asked
    data = tf.data.Dataset.range(8).batch(4).with_options(options)
    with unittest.mock.patch.object(
        tf.distribute.MultiWorkerMirroredStrategy, "distribute_datasets_from_function",
        lambda self, function, options: of_function.append(function(None)),
    ):  # fmt: skip
        strategy.distribute_datasets_from_function(lambda context: data)
    cut = cut_dataset(data, strategy.extended.mesh, BatchComparison(Channel(), 2, compared, print))
    for each in (cut, *of_function):
        assert each.options().autotune.enabled is tuned
