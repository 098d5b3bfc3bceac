"""Gathers that overlap with the next step's forward pass: the same result, to the bit, and nobody sees old values."""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import losses, ops
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.training.late_gathers import LateGathers

DATA = oracle.Data(90)  # six batches: one execution of four steps and one of two
STEPS = 4


def make_strategy(late=True, stage=2, replicas=2, **settings):
    """Every variable of the dense model lies in shards, but for its last bias, and every one in a bucket of its own."""
    devices = [f"CPU:{k}" for k in range(replicas)]
    return tfzero.ZeroStrategy(
        stage, devices=devices, min_shard_elements=4, bucket_bytes=8, overlap_param_gather=late, **settings
    )


def arguments(optimizer, **others):
    return {"optimizer": optimizer, "loss": losses.CategoricalCrossentropy(), "steps_per_execution": STEPS} | others


def compiled(strategy, model=None, **others):
    with strategy.scope():
        model = oracle.dense_model() if model is None else model()
    model.compile(**arguments(ko.Adam(0.02), **others))
    return model


def components(model):
    """What each replica holds of each variable."""
    return [[part.numpy() for part in variable.value.values] for variable in model.trainable_variables]


def replicas_are_equal(model):
    return all((part == parts[0]).all() for parts in components(model) for part in parts)


def constrained_model():
    kernel = keras.layers.Dense(17, activation="relu", kernel_constraint=keras.constraints.MaxNorm(0.7))
    return keras.Sequential([keras.Input((8,)), kernel, keras.layers.Dense(3, activation="softmax")])


CASES = {
    "everything": (
        {"replicas": 3, "stage": 1},
        lambda: ko.AdamW(
            0.02, global_clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3
        ),
    ),
    "owned": ({}, lambda: ko.Muon(0.02)),
    "int8": ({"compression": "int8"}, lambda: ko.Adam(0.02)),
    "int8 with feedback": ({"compression": "int8", "error_feedback": True}, lambda: ko.Adam(0.02)),
    "scaled": ({}, lambda: ko.LossScaleOptimizer(ko.SGD(0.1), initial_scale=2.0**10)),
}
SWEPT = {"int8 with feedback", "scaled"}


@pytest.mark.parametrize("case", [sweep(case) if case in SWEPT else case for case in CASES])
def test_result_is_that_of_gathers_at_once(case):
    """And so that of one device, where the gradient is exact."""
    settings, make_optimizer = CASES[case]
    only_fit = case in ("owned", "int8")  # the others see that evaluation and prediction meet gathered parameters
    with make_strategy(late=False, **settings).scope():
        model = oracle.dense_model()
    initial = model.get_weights()
    at_once = oracle.train(model, *DATA.arrays(), arguments(make_optimizer()), only_fit=only_fit)
    with make_strategy(late=True, **settings).scope():
        model = oracle.dense_model()
    model.set_weights(initial)
    late = oracle.train(model, *DATA.arrays(), arguments(make_optimizer()), only_fit=only_fit)
    oracle.assert_same(late, at_once, rtol=0, atol=0)
    if "compression" not in settings:
        reference = oracle.dense_model()
        reference.set_weights(initial)
        expected = oracle.train(reference, *DATA.arrays(), arguments(make_optimizer()), only_fit=only_fit)
        oracle.assert_same(late, expected)


def test_what_a_constraint_needs_whole_is_gathered_at_once():
    strategy = make_strategy()
    ours, reference = oracle.train_both(strategy, constrained_model, lambda: arguments(ko.Adam(0.05)), DATA)
    oracle.assert_same(ours, reference)
    assert np.linalg.norm(ours.weights[0], axis=0).max() == pytest.approx(0.7, abs=1e-5)


def test_replicas_are_apart_until_the_execution_ends(monkeypatch):
    """Nothing is gathered twice or never: the next execution gathers what the former one has left."""
    x, y = DATA.arrays()
    model, other = compiled(make_strategy()), compiled(make_strategy())
    other.set_weights(model.get_weights())
    other.fit(x, y, batch_size=15, shuffle=False, verbose=0)
    before = model.get_weights()
    with monkeypatch.context() as patched:
        patched.setattr(LateGathers, "run", lambda self, execution, iterator: execution(iterator))
        model.fit(x[:15], y[:15], verbose=0)
    for (first, second), old in zip(components(model)[:2], before[:2], strict=True):
        mine = np.arange(old.size).reshape(old.shape) < -(-old.size // 2)  # the first replica's
        for part, own in ((first, mine), (second, ~mine)):
            assert (part != old)[own].any() and not (part != old)[~own].any()
    model.fit(x[15:], y[15:], batch_size=15, shuffle=False, verbose=0)
    assert replicas_are_equal(model)
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_an_interrupt_leaves_nothing_ungathered(monkeypatch):
    """Python raises it when an execution has ended."""
    model = compiled(make_strategy())
    original = LateGathers.run

    def run(self, execution, iterator):
        def interrupted(iterator):
            execution(iterator)
            assert not replicas_are_equal(model)
            raise KeyboardInterrupt

        return original(self, interrupted, iterator)

    monkeypatch.setattr(LateGathers, "run", run)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*DATA.arrays(), batch_size=15, verbose=0)
    assert replicas_are_equal(model)


def test_an_error_tells_what_it_leaves():
    x, y = DATA.arrays()
    x[40] = np.nan  # in the third batch
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(15)
    checked = batches.map(lambda x, y: (tf.debugging.check_numerics(x, "a bad batch"), y))
    with pytest.raises(tf.errors.InvalidArgumentError, match="a bad batch") as caught:
        compiled(make_strategy()).fit(checked, shuffle=False, verbose=0)
    assert "parts are of different steps" in caught.value.__notes__[0]


def test_training_by_single_batches():
    x, y = DATA.arrays()
    model, other = compiled(make_strategy()), compiled(make_strategy(late=False))
    other.set_weights(model.get_weights())
    for begin in range(0, 45, 15):
        logs = [m.train_on_batch(x[begin : begin + 15], y[begin : begin + 15]) for m in (model, other)]
        assert logs[0] == logs[1] and replicas_are_equal(model)


# What it cannot do.


@pytest.mark.parametrize(("value", "stage"), [(True, 0), (True, 3), ("auto", 2)])
def test_without_effect_it_is_refused(value, stage):
    with pytest.raises(ValueError, match=f"`overlap_param_gather` must be.*Received.*{value!r}, stage={stage}"):
        make_strategy(value, stage)


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def own_step_model():
    return OwnStep([keras.Input((8,)), keras.layers.Dense(17), keras.layers.Dense(3, activation="softmax")])


@pytest.mark.parametrize(
    ("model", "settings"),
    [(None, {"steps_per_execution": 1}), (None, {"run_eagerly": True}), (own_step_model, {})],
    ids=["single", "eager", "own train_step"],
)
def test_where_parameters_may_be_read_between_steps_it_is_refused(model, settings):
    model = compiled(make_strategy(), model, **settings)
    before = model.get_weights()
    with pytest.raises(RuntimeError, match=r"overlap_param_gather=True needs compiled `fit`.*Leave"):
        model.fit(*DATA.arrays(), batch_size=15, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_custom_loops_are_refused():
    strategy = make_strategy()
    model = compiled(strategy)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([2, 8])))
        model.optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    with pytest.raises(RuntimeError, match="overlap_param_gather=True needs"):
        strategy.run(tf.function(step))


@pytest.mark.parametrize("index", [0, -1], ids=["in shards", "whole"])
def test_a_metric_that_reads_what_is_not_gathered_is_refused(index):
    """The bias of 3 is whole, and there at once."""

    def size(y_true, y_pred):
        return ops.sum(ops.abs(model.weights[index])) + 0 * ops.sum(y_pred)

    model = compiled(make_strategy(), metrics=[size])
    if index == -1:
        model.fit(*DATA.arrays(), batch_size=15, verbose=0)
        return
    with pytest.raises(RuntimeError, match=r"'sequential.*kernel' is read after it has been updated"):
        model.fit(*DATA.arrays(), batch_size=15, verbose=0)
