"""Replicas take more rows of a batch than others, as given or by their measured speed: the result of one device."""

import itertools
import os
import time
import warnings
from unittest import mock

import keras
import numpy as np
import oracle
import pool
import pytest
import tensorflow as tf

import tfzero
from tfzero.collectives import joining
from tfzero.plan import shares as plan
from tfzero.plan.mesh import Mesh
from tfzero.rows import shares

DATA = oracle.Data(samples=46)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


# The arithmetic.


@pytest.mark.parametrize("given", [(1, 1, 1), (3, 1, 2), (1, 1000, 1), (1,)])
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 2**31])
def test_every_row_is_dealt_once_and_by_its_share(rows, given):
    dealt = [plan.span(rows, part, plan.whole_shares(given)) for part in range(len(given))]
    assert dealt[0][0] == 0 and dealt[-1][1] == rows
    for (_, end), (begin, _) in itertools.pairwise(dealt):
        assert end == begin
    for (begin, end), share in zip(dealt, given, strict=True):
        assert abs(end - begin - rows * share / sum(given)) <= 1 + rows * 1e-5


def test_shares_move_until_all_take_equally_long():
    speeds, given = (1.0, 1.0, 1 / 3), plan.whole_shares([1, 1, 1])

    def measured(shares, speeds):
        rows = [share / plan.WHOLE for share in shares]
        seconds = [0.01 + each / speed for each, speed in zip(rows, speeds, strict=True)]
        return seconds, [each / second for each, second in zip(rows, seconds, strict=True)]

    even = measured(given, speeds)
    assert plan.seconds_if_even(*even) == pytest.approx(max(even[0]))
    for _ in range(3):
        given = plan.moved(given, *measured(given, speeds)) or given
    assert given[2] / given[0] == pytest.approx(1 / 3, rel=0.05)
    assert plan.seconds_if_even(*measured(given, speeds)) == pytest.approx(max(even[0]), rel=0.1)
    assert plan.moved(given, [1.0, 1.04, 0.99], [9.0, 9.0, 3.0]) is None
    recovered = plan.moved(given, *measured(given, (1.0, 1.0, 1.0)))
    assert recovered == pytest.approx([plan.WHOLE / 3] * 3, rel=0.05)
    assert min(plan.moved(given, [1.0, 1.0, 1000.0], [1e9, 1.0, 1e-3])) == plan.WHOLE // 48  # seen, should it recover
    # Rows that workers bring do not go by shares: the same speeds give the same shares for ever.
    brought = plan.moved(given, [0.5, 2.0], [8.0, 2.0])
    assert plan.moved(brought, [0.5, 2.0], [8.0, 2.0]) == brought == plan.whole_shares([4, 1])


def test_shares_of_ranks_go_to_the_parts_that_they_take():
    mesh = Mesh(workers=2, devices_per_worker=2, worker=1)
    assert plan.by_part("abcd", mesh) == ("a", "c", "b", "d")


@pytest.mark.parametrize(
    ("rows", "stage", "message"),
    [
        ([1, 2, 3], 2, r"a share for each of 2 replicas.*Received: rows=\[1.0, 2.0, 3.0\], 3 shares"),
        ([1, 0], 2, r"a positive number for each replica.*Received: rows=\[1, 0\]"),
        ([1, float("nan")], 2, "a positive number for each replica"),
        ([True, 1], 2, "a positive number for each replica"),
        ("odd", 2, r"must be 'even', 'measured', or a list.*Received: rows='odd'"),
        (3, 2, "must be 'even'"),
        ([2, 1], 2, r"in the order of device numbers.*devices=\['CPU:1', 'CPU:0'\]"),
        ("measured", 3, "works at stages 0 to 2.*Give a share for each replica.*stage=3"),
    ],
)
def test_invalid_rows_are_refused(rows, stage, message):
    devices = ["CPU:1", "CPU:0"] if "order" in message else ["CPU:0", "CPU:1"]
    with pytest.raises(ValueError, match=message):
        tfzero.ZeroStrategy(stage, devices=devices, rows=rows)


# Training.


def arguments():
    return {"optimizer": keras.optimizers.Adam(0.01), "loss": "categorical_crossentropy", "metrics": ["accuracy"]}


class Slow(keras.layers.Layer):
    """Sleeps for each row, as long as SECONDS_OF_A_ROW says in its process."""

    def call(self, x):
        def sleep(rows):
            time.sleep(float(os.environ.get("SECONDS_OF_A_ROW", "0")) * len(rows))
            return np.zeros_like(rows)

        return x + tf.stop_gradient(tf.ensure_shape(tf.numpy_function(sleep, [x], x.dtype), x.shape))


def slow_model():
    return keras.Sequential([keras.Input((8,)), Slow(), *oracle.dense_model().layers])


@pytest.mark.parametrize(("stage", "given", "rows"), [(2, [3, 1, 2], [11, 4, 7]), (3, [1, 20, 1], [1, 20, 1])])
def test_devices(stage, given, rows):
    strategy = tfzero.ZeroStrategy(stage, devices=[f"CPU:{k}" for k in range(3)], min_shard_elements=8, rows=given)
    assert [len(part) for part in strategy.cut_batch(np.arange(22.0)).values] == rows
    oracle.assert_same(*oracle.train_both(strategy, oracle.dense_model, arguments, DATA))
    assert "as given: " in strategy.report().options["rows"]


def test_state_of_rows_stays_with_its_replica():
    def model():
        keras.utils.set_random_seed(2)
        cell = keras.layers.LSTM(5, stateful=True)
        return keras.Sequential([keras.Input((4, 2), batch_size=6), cell, keras.layers.Dense(3, "softmax")])

    x, y = DATA.arrays()
    outcomes = []
    for given in ([2, 1], "measured", None):
        strategy = given and tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], min_shard_elements=8, rows=given)
        with strategy.scope() if strategy else mock.MagicMock():
            trained = model()
        trained.compile(**arguments(), **({} if strategy else {"jit_compile": False}))
        fit = {"batch_size": 6, "epochs": 2, "shuffle": False, "verbose": 0}
        if given == "measured":
            with pytest.raises(ValueError, match="a row cannot move to another replica"):
                trained.fit(x[:36].reshape(36, 4, 2), y[:36], **fit)
        else:
            trained.fit(x[:36].reshape(36, 4, 2), y[:36], **fit)
            outcomes.append(trained.get_weights())
    for mine, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


def test_what_measured_rows_cannot_do_is_told():
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], min_shard_elements=8, rows="measured")
    with strategy.scope():
        model = oracle.dense_model()
    model.compile(**arguments(), run_eagerly=True)
    x, y = DATA.arrays()
    with pytest.raises(ValueError, match="needs a compiled step"):
        model.fit(x, y, verbose=0)
    assert model.predict(x, verbose=0).shape == (46, 3)  # nothing is timed there
    model.compile(**arguments())
    apply = tf.function(lambda: strategy.run(_apply, (model,)))
    with pytest.warns(UserWarning, match="measures the steps of `fit`"):
        apply()
    for devices, rows, count in (
        (1, (2.0, 1.0), 1), (2, (2.0, 1.0, 1.0, 1.0), 0), (2, (2.0, 2.0, 1.0, 1.0), 1), (1, "even", 0),
    ):  # fmt: skip
        dealt = shares.RowShares(rows, Mesh(2, devices, 0), joining.channel_of_one())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dealt.note_own_rows()
        assert len(told) == count and all("makes no difference for these data" in str(each.message) for each in told)


def _apply(model):
    model.optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)


# Workers.


def run_cases() -> dict:
    found = {}
    x, y = DATA.arrays()
    for name, stage, rows in (("given", 3, [3, 1, 1, 2]), ("measured", 2, "measured")):
        strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, rows=rows)
        worker = strategy.extended.mesh.worker
        os.environ["SECONDS_OF_A_ROW"] = str(0.004 * worker)
        keras.utils.set_random_seed(3)
        with strategy.scope():
            model = slow_model()
        settings = {"batch_size": 15, "epochs": 3}
        with mock.patch.object(shares, "STEPS", 4):
            outcome = oracle.train(model, x, y, arguments(), **settings)
        found[name] = outcome
        found[f"{name} shares"] = strategy.extended.shares.shares
        found[f"{name} report"] = strategy.report().options["rows"]
    os.environ["SECONDS_OF_A_ROW"] = str(0.004 * (1 - worker))
    with mock.patch.object(shares, "STEPS", 4):
        model.fit(x, y, batch_size=15, epochs=4, verbose=0)
    found["shares when the other one is slow"] = strategy.extended.shares.shares
    return found


def test_two_workers_of_two_devices():
    fleet = pool.run(run_cases, cpu_devices=2)
    x, y = DATA.arrays()
    keras.utils.set_random_seed(3)
    reference = oracle.train(slow_model(), x, y, arguments())
    for found in fleet:
        for name in ("given", "measured"):
            oracle.assert_same(found[name], reference)
        assert found["measured shares"] == fleet[0]["measured shares"]
    # Parts go to workers in turn. The second worker sleeps for each row.
    of_first, of_second = (sum(fleet[0]["measured shares"][worker::2]) for worker in range(2))
    assert of_second < of_first / 2
    of_first, of_second = (sum(fleet[0]["shares when the other one is slow"][worker::2]) for worker in range(2))
    assert of_first < of_second / 2
    assert "measured: " in fleet[0]["measured report"] and "with even rows it would" in fleet[0]["measured report"]
