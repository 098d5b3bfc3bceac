"""Variables that their gradient overwrites (float8), and optimizers whose overrides would have no effect."""

import functools

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.variables.classes import ShardedParameter


def make_model() -> keras.Model:
    """Float8 in its first layer; the histories have 1,024 elements, which stage 3 would shard."""
    keras.utils.set_random_seed(3)
    first, second = keras.layers.Dense(17, activation="tanh"), keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((8,)), first, second])
    first.quantize("float8")
    return model


def data():
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(46, 8)).astype("f4"), random.normal(size=(46, 3)).astype("f4")


OPTIMIZERS = {
    "sgd": lambda: ko.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
    "adam": lambda: ko.AdamW(0.01, weight_decay=0.1),
    "averaged": lambda: ko.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
    "scaled": lambda: ko.LossScaleOptimizer(ko.Adam(0.01), initial_scale=2.0**4),
    "accumulating": lambda: ko.SGD(0.1, gradient_accumulation_steps=2),
}


def trained(name, strategy=None, **arguments):
    """Weights and optimizer variables after two epochs of batches of 15, 15, 15 and 1, each by its path."""
    with strategy.scope() if strategy else tf.device("CPU:0"):
        model = make_model()
    x, y = data()
    model.compile(OPTIMIZERS[name](), "mse", **arguments)
    model.fit(x, y, batch_size=15, epochs=2, shuffle=False, verbose=0)
    assert not any(isinstance(v.value, ShardedParameter) for v in model.variables if v.overwrite_with_gradient)
    # The names of slots count models up.
    slots = {f"slot {place} {v.shape}": v for place, v in enumerate(model.optimizer.variables[2:])}
    found = {f"{place} {v.name}": v for place, v in enumerate(model.variables)} | slots
    return {name: np.array(v.numpy()) for name, v in found.items()}


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)  # the same slots, in the same order
    for name, value in found.items():
        is_scale = "scale" in name or "amax" in name
        # A value beside a boundary between two float8 numbers may round the other way.
        tolerance = {"rtol": 1e-5, "atol": 0} if "inputs" in name else {"rtol": 1e-2, "atol": 1e-3}
        np.testing.assert_allclose(value, expected[name], err_msg=name, **tolerance)
        if is_scale:
            assert value.max() > 0 and not np.array_equal(value, np.zeros_like(value)), name


def on_two_devices(stage):
    return tfzero.ZeroStrategy(stage, devices=["CPU:0", "CPU:1"], min_shard_elements=8)


@functools.cache
def on_one_device(name):
    return trained(name, jit_compile=False)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("scaled", 3),
        ("accumulating", 0),
        sweep("sgd", 2),
        sweep("adam", 3),
        sweep("accumulating", 2),
        sweep("accumulating", 3),
    ],
)
def test_float8_scales_are_those_of_one_device(name, stage):
    assert_same(trained(name, on_two_devices(stage)), on_one_device(name))


def test_what_is_overwritten_has_no_moving_average():
    """Plain Keras fails at the end of such a training."""
    found = trained("averaged", on_two_devices(3))
    assert all(value.max() > 0 for name, value in found.items() if "amax" in name)


def _in_worker(cases):
    return [trained(name, tfzero.ZeroStrategy(stage, min_shard_elements=8)) for name, stage in cases]


@pytest.mark.parametrize("devices", [2, sweep(1)])
def test_float8_on_two_workers(devices):
    cases = [("sgd", 3), ("adam", 2), ("accumulating", 1)]
    for of_worker in pool.run(_in_worker, workers=2, args=(cases,), cpu_devices=devices):
        for (name, _), found in zip(cases, of_worker, strict=True):
            assert_same(found, on_one_device(name))


def test_at_stage_3_a_loop_must_build_first():
    strategy = tfzero.ZeroStrategy(3, min_shard_elements=8)
    with strategy.scope():
        model = make_model()
        optimizer = tfzero.ZeroOptimizer(ko.SGD(0.1))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    with pytest.raises(RuntimeError, match=r"optimizer\.build.*inputs_amax_history.*must be whole"):
        strategy.run(step, args=(strategy.cut_batch(data()[0]),))


class ClipsByItself(ko.SGD):
    def _clip_gradients(self, grads):
        return [g * 0 for g in grads]


class Further(ClipsByItself):
    """Overrides nothing more."""


class AppliesGradients(ko.Adam):
    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients(grads_and_vars)


class AppliesInTheBackend(ko.Adam):
    def _backend_apply_gradients(self, grads, trainable_variables):
        super()._backend_apply_gradients(grads, trainable_variables)


class Accumulates(ko.SGD):
    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        """Nothing is accumulated."""


class ScalesByItself(ko.LossScaleOptimizer):
    def check_finite(self, grads):
        return True


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [
        (ClipsByItself, "_clip_gradients"),
        (Further, "_clip_gradients"),
        (AppliesGradients, "apply_gradients"),
        (AppliesInTheBackend, "_backend_apply_gradients"),
        (Accumulates, "_backend_increment_gradient_accumulators"),
        (lambda: ScalesByItself(ko.SGD()), "check_finite"),
        (lambda: ko.LossScaleOptimizer(ClipsByItself()), "_clip_gradients"),
    ],
)
def test_overrides_without_effect_are_refused_by_name(optimizer, method):
    with pytest.raises(TypeError, match=rf"overrides `{method}`.*no effect.*`update_step`"):
        tfzero.ZeroOptimizer(optimizer())
    strategy = tfzero.ZeroStrategy(2)
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    with pytest.raises(TypeError, match=f"overrides `{method}`"):
        model.compile(optimizer(), "mse")
