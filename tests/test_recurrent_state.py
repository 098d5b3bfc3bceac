"""Stateful recurrent layers: each replica carries the states of its own rows from batch to batch."""

import functools

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers
from marks import sweep

import tfzero
from tfzero.checkpoint.state import state_of
from tfzero.variables.row_state import RowsVariable

BATCH = 7  # not even for any number of replicas but 7


def data(batches=4):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(BATCH * batches, 5, 3)), random.normal(size=(BATCH * batches, 1))
    return x.astype("f4"), y.astype("f4")


def make_model() -> keras.Model:
    keras.utils.set_random_seed(1)
    cells = [layers.GRUCell(4), layers.SimpleRNNCell(5)]
    return keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, 5, 3)),
            layers.LSTM(6, stateful=True, return_sequences=True),
            layers.Bidirectional(layers.GRU(4, stateful=True, return_sequences=True)),
            layers.SimpleRNN(9, stateful=True, return_sequences=True, unroll=True),
            layers.RNN(cells, stateful=True),
            layers.Dense(1),
        ]
    )


def make_small_model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input(batch_shape=(BATCH, 5, 3)), layers.LSTM(6, stateful=True), layers.Dense(1)],
    )


NUMBERS = {make_model: 7, make_small_model: 2}  # of states


def carried_through(strategy=None, checkpoint=None, make_model=make_model, **arguments) -> list[np.ndarray]:
    """Losses, predictions, weights and states, as training, evaluation, prediction and resets leave them."""
    x, y = data()
    with strategy.scope() if strategy else tf.device("CPU:0"):
        model = make_model()
    model.compile(keras.optimizers.SGD(0.05), "mse", **arguments)
    fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    found = [np.array(model.fit(x, y, **fit).history["loss"])]
    states = [item.variable for item in state_of(model) if "rnn_state" in item.name]
    assert len(states) == NUMBERS[make_model]
    assert strategy is None or all(isinstance(v.value, RowsVariable) for v in states)
    found += [np.array(v.numpy()) for v in states]
    found.append(model.predict(x, batch_size=BATCH, verbose=0))
    found.append(np.array(model.evaluate(x, y, batch_size=BATCH, verbose=0)))
    model.layers[0].reset_state()
    found.append(np.array(model.train_on_batch(x[:BATCH], y[:BATCH])))
    if checkpoint and strategy:
        tfzero.save_checkpoint(model, checkpoint)
        for state in states:
            state.assign(np.zeros(state.shape))
        tfzero.load_checkpoint(model, checkpoint)
    found.append(np.array(model.fit(x, y, epochs=2, **fit).history["loss"]))
    return found + [np.array(v.numpy()) for v in [*states, *model.trainable_variables]]


def assert_same(found, expected) -> None:
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5, err_msg=str(place))


@functools.cache
def on_one_device(make_model=make_model):
    return carried_through(make_model=make_model, jit_compile=False)


@pytest.mark.parametrize(("stage", "make_model"), [(2, make_small_model), sweep(3, make_model)])
def test_states_are_carried_as_on_one_device(stage, make_model):
    strategy = tfzero.ZeroStrategy(stage, devices=["CPU:0", "CPU:1", "CPU:2"], min_shard_elements=8)
    assert_same(carried_through(strategy, make_model=make_model), on_one_device(make_model))


def test_eagerly_keras_refuses_them():
    x, y = data(1)
    with tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input(batch_shape=(BATCH, 5, 3)), layers.GRU(4, stateful=True)])
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"GRU(.|\n)*Expected batch size: 7"):
        model.train_on_batch(x, np.repeat(y, 4, 1))


def test_a_smaller_batch_is_refused_by_the_number_of_rows():
    with tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input(batch_shape=(BATCH, 5, 3)), layers.LSTM(6, stateful=True)])
    model.compile("sgd", "mse")
    x = np.zeros((BATCH + 2, 5, 3), "f4")
    told = r"(?s)Every batch must have 7 samples.*takes [34] of them. Rows received:\] \[1\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=told):
        model.fit(x, np.zeros((BATCH + 2, 6)), batch_size=BATCH, verbose=0)


def _in_worker(stage, folder):
    return carried_through(tfzero.ZeroStrategy(stage, min_shard_elements=8), folder)


@pytest.mark.parametrize(("stage", "devices"), [(3, 2), sweep(2, 2), sweep(2, 1), sweep(3, 1)])
def test_on_two_workers(stage, devices, tmp_path):
    for found in pool.run(_in_worker, workers=2, args=(stage, str(tmp_path / "saved")), cpu_devices=devices):
        assert_same(found, on_one_device())
