"""`strategy.reduce` of structures, and whose rows weigh a replica's part of the batch."""

import contextlib

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf

import tfzero


def reduced(strategy) -> dict:
    """Sums and means of structures of values that differ by replica."""

    @tf.function
    def run():
        def of_replica():
            rank = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
            return {"loss": rank + 1.0, "counts": [tf.fill([2], rank), tf.cast(rank, tf.int32) + 5]}

        values = strategy.run(of_replica)
        return strategy.reduce("SUM", values, axis=None), strategy.reduce("MEAN", values, axis=None)

    values = strategy.run(tf.function(lambda: {"a": tf.ones([3]), "none": None}))
    along = strategy.reduce("SUM", values, axis=0)
    scalars = strategy.run(tf.function(lambda: {"a": tf.constant(2.0)}))
    scalar = strategy.reduce("SUM", scalars, axis=0)["a"]  # as Keras asks for
    total, mean = tf.nest.map_structure(lambda leaf: leaf.numpy(), run())
    return {"total": total, "mean": mean, "along": [float(along["a"]), float(scalar)], "none": along["none"]}


def assert_reduced(found: dict, replicas: int) -> None:
    ranks = np.arange(replicas)
    assert float(found["total"]["loss"]) == (ranks + 1).sum()
    assert found["total"]["counts"][0].tolist() == [ranks.sum()] * 2
    assert int(found["total"]["counts"][1]) == (ranks + 5).sum()
    assert float(found["mean"]["loss"]) == (ranks + 1).mean()
    assert (found["along"], found["none"]) == ([3 * replicas, 2 * replicas], None)


def test_each_value_of_a_structure_is_reduced():
    assert_reduced(reduced(tfzero.ZeroStrategy(2)), 4)


def weighed_by(strategy, pass_on) -> list:
    """Mean losses of batches of 5 samples and 1, in a loop that passes a vector before the batch."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
    loss_of = keras.losses.MeanSquaredError()
    vector = tf.constant([1.0, 1.0, 2.0])

    def loss(vector, x, y):
        return loss_of(y, model(x * vector)) + loss_of(y * vector[2], model(x))

    random = np.random.default_rng(0)
    data = tf.data.Dataset.from_tensor_slices(tuple(random.normal(size=(6, n)).astype("f4") for n in (3, 1))).batch(5)
    if strategy is None:
        return [float(loss(vector, *batch)) for batch in data]
    return [float(total) for total in pass_on(strategy, loss, vector, data)]


def of_data_sets(strategy, loss, vector, data):
    @tf.function
    def step(batch):
        return strategy.reduce("SUM", strategy.run(loss, args=(vector, *batch)), axis=None)

    return [step(batch) for batch in strategy.experimental_distribute_dataset(data)]


def of_cut_batches(strategy, loss, vector, data):
    step = tf.function(loss)
    return [
        strategy.reduce("SUM", strategy.run(step, args=(vector, *strategy.cut_batch(batch))), axis=None)
        for batch in data
    ]


@pytest.mark.parametrize("pass_on", [of_data_sets, of_cut_batches])
def test_the_batch_weighs_and_not_a_vector_beside_it(pass_on):
    np.testing.assert_allclose(weighed_by(tfzero.ZeroStrategy(2), pass_on), weighed_by(None, None), rtol=1e-5)


def share_of(strategy, *arguments):
    return strategy.run(tf.function(lambda *_: strategy.extended.batch_fraction()), args=arguments)


def test_without_a_batch_the_rows_are_asked_for():
    strategy = tfzero.ZeroStrategy(2)
    with pytest.raises(ValueError, match=r"\(7,\), \(3, 2\).*cut_batch"):
        share_of(strategy, tf.zeros([7]), tf.zeros([3, 2]))
    shares = share_of(strategy, tf.zeros([3]), tf.zeros([3, 2]))  # all have as many rows
    assert [float(share) for share in strategy.experimental_local_results(shares)] == [0.25] * 4
    shares = share_of(strategy, tf.zeros([7]), strategy.cut_batch(tf.zeros([6, 2])))
    assert [float(share) for share in strategy.experimental_local_results(shares)] == pytest.approx(
        [2 / 6, 2 / 6, 1 / 6, 1 / 6]
    )


def _in_worker():
    strategy = tfzero.ZeroStrategy(2)
    return reduced(strategy), weighed_by(strategy, of_data_sets), weighed_by(strategy, of_cut_batches)


@pytest.mark.parametrize("devices", [1, 2])
def test_on_two_workers(devices):
    expected = weighed_by(None, None)
    for found, *losses in pool.run(_in_worker, workers=2, cpu_devices=devices):
        assert_reduced(found, 2 * devices)
        for each in losses:
            np.testing.assert_allclose(each, expected, rtol=1e-5)
