"""Every Keras optimizer, sharded over replicas at every stage, against the same optimizer on one device.

Three replicas, or two where the arithmetic of single elements is all that tells an optimizer from others.

One epoch of three batches (4, 4 and 3 samples, so replicas have 2, 1 and 1 samples and then one each), then all
weights and all of the optimizer's own variables, read whole outside the replicas, must be those of one device.
"""

import functools

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.collectives.group import Group
from tfzero.plan.placement import Placement
from tfzero.variables.classes import ShardedParameter

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # SGD
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # those with square roots
DATA = oracle.Data(samples=11)


@functools.cache
def make_strategy(stage, min_shard_elements=8, replicas=3):
    """One for all models, as making it tests its collectives."""
    devices = [f"CPU:{k}" for k in range(replicas)]
    return tfzero.ZeroStrategy(stage=stage, devices=devices, min_shard_elements=min_shard_elements)


def excluding_bias(optimizer):
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def mapped():
    sgd = ko.SGD(0.05, momentum=0.9)
    chosen = keras.optimizers.OptimizerMap(ko.Adam(0.02), {".*bias": sgd, ".*last/kernel": ko.Lamb(0.02)})
    return keras.optimizers.MultiOptimizer(chosen)


def chosen_by_function():
    adam, muon = ko.Adam(0.02), ko.Muon(0.02)
    return keras.optimizers.MultiOptimizer(lambda variable: muon if "kernel" in variable.path else adam)


ELEMENTWISE = {
    "sgd": lambda: ko.SGD(0.1),
    "sgd_momentum": lambda: ko.SGD(0.1, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": lambda: ko.SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: ko.RMSprop(0.02),
    "rmsprop_centered": lambda: ko.RMSprop(0.02, momentum=0.9, centered=True),
    "adam": lambda: ko.Adam(0.02),
    "adam_amsgrad": lambda: ko.Adam(0.02, amsgrad=True),
    "adamw": lambda: excluding_bias(ko.AdamW(0.02, weight_decay=0.1)),
    "adadelta": lambda: ko.Adadelta(1.0),
    "adagrad": lambda: ko.Adagrad(0.05),
    "adamax": lambda: ko.Adamax(0.02),
    "nadam": lambda: ko.Nadam(0.02),
    "ftrl": lambda: ko.Ftrl(0.05, l1_regularization_strength=0.001, l2_regularization_strength=0.01),
    "lion": lambda: ko.Lion(0.02),
    "schedule_free": lambda: ko.ScheduleFreeAdamW(0.02, warmup_steps=2, weight_decay=0.01),
}
WHOLE_TENSOR = {
    "adafactor": lambda: ko.Adafactor(0.02),
    "lamb": lambda: ko.Lamb(0.02, weight_decay=0.01),
    "muon": lambda: ko.Muon(0.02),
}
CONTAINERS = {
    "loss_scale_adam": lambda: ko.LossScaleOptimizer(ko.Adam(0.02), initial_scale=4.0, dynamic_growth_steps=2),
    "loss_scale_lamb": lambda: ko.LossScaleOptimizer(ko.Lamb(0.02), initial_scale=4.0),
    "multi_map": mapped,
    "multi_function": chosen_by_function,
    "loss_scale_multi": lambda: ko.LossScaleOptimizer(mapped(), initial_scale=4.0),
}
OPTIMIZERS = ELEMENTWISE | WHOLE_TENSOR | CONTAINERS


def make_model():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(17, activation="tanh", name="first"),
            keras.layers.Dense(3, activation="softmax", name="last"),
        ]
    )


def initial_weights(shapes, seed=3):
    random = np.random.default_rng(seed)
    return [random.normal(scale=0.4, size=shape) for shape in shapes]


def train(model, optimizer, loss="categorical_crossentropy", data=DATA):
    """One epoch of three batches from fixed initial weights; compile makes no difference, so there is no XLA."""
    initial = initial_weights([v.shape for v in model.trainable_variables])
    for variable, value in zip(model.trainable_variables, initial, strict=True):
        variable.assign(value)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)  # [Note: built first]
    x, y = data.arrays()
    history = model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0).history
    pairs = zip(model.trainable_variables, initial, strict=True)
    moved = max(np.max(np.abs(variable.numpy() - value), initial=0) for variable, value in pairs)
    assert moved > 5e-3, "a training that does not move proves nothing"
    return oracle.Outcome(model.get_weights(), history), [v.numpy() for v in model.optimizer.variables]


# [Note: built first] On one device Keras builds the optimizer within the traced function, which for ScheduleFreeAdamW
# starts the momentum anew in every step.


@functools.cache
def one_device(name):
    model = make_model()
    return train(model, OPTIMIZERS[name]())


def assert_same_training(ours, theirs, tolerance):
    (outcome, slots), (reference, reference_slots) = ours, theirs
    for mine, his in zip(outcome.weights, reference.weights, strict=True):
        np.testing.assert_allclose(mine, his, **tolerance)
    np.testing.assert_allclose(outcome.history["loss"], reference.history["loss"], **tolerance)
    assert [slot.shape for slot in slots] == [slot.shape for slot in reference_slots]
    for mine, his in zip(slots, reference_slots, strict=True):
        np.testing.assert_allclose(mine, his, **tolerance)


SECOND = {
    "sgd_momentum", "sgd_nesterov", "rmsprop_centered", "adam_amsgrad", "adamw", "adadelta", "adagrad", "adamax",
    "nadam", "ftrl", "lion",
}  # fmt: skip


def cells():
    """Every optimizer at every stage; a good part of them with `-m sweep` only."""
    always = {
        1: {"adafactor"},
        2: {*SECOND, "multi_function", "loss_scale_lamb"},
        3: {"adam", "schedule_free", "muon", "loss_scale_multi"},
    }
    for name in OPTIMIZERS:
        for stage in range(4):
            runs = name in always.get(stage, ())
            if runs and name in SECOND:
                yield pytest.param(name, stage, 2)
            yield pytest.param(name, stage, 3, marks=[] if runs and name not in SECOND else pytest.mark.sweep)


@pytest.mark.parametrize(("name", "stage", "replicas"), list(cells()))
def test_an_optimizer_does_as_on_one_device(name, stage, replicas):
    strategy = make_strategy(stage, replicas=replicas)
    with strategy.scope():
        model = make_model()
    ours = train(model, OPTIMIZERS[name]())
    assert_same_training(ours, one_device(name), EXACT if name.startswith("sgd") else CLOSE)

    plan = model.optimizer.plan
    large = [spec.elements >= 8 for spec in plan.specs]
    if name in ELEMENTWISE or name in WHOLE_TENSOR:
        expected = Placement.SHARDED if name in ELEMENTWISE else Placement.OWNED
        wanted = [expected if stage and is_large else Placement.WHOLE for is_large in large]
        assert list(plan.placements) == wanted
    assert [large, list(plan.placements).count(Placement.WHOLE)] == [[True, True, True, False], 1 if stage else 4]
    assert len(set(plan.owners) - {None}) > 1 or name not in WHOLE_TENSOR or stage == 0
    assert [isinstance(v.value, ShardedParameter) and stage == 3 for v in model.trainable_variables] == [
        stage == 3 and is_large for is_large in large
    ]
    for variable in model.trainable_variables:  # replicas end equal
        if isinstance(variable.value, ShardedParameter):
            continue
        first, *others = [component.numpy() for component in variable.value.values]
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize(("name", "held"), [("adam", [46, 46, 46]), ("muon", None)])
def test_slots_are_held_in_parts(name, held):
    """A momentum of the kernel of 8 x 17 = 136 elements is held as three shards of 46, or by one owner."""
    strategy = make_strategy(1)
    with strategy.scope():
        model = make_model()
    model.compile(optimizer=OPTIMIZERS[name](), loss="categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    momentum = next(v for v in model.optimizer.variables if "first_kernel" in v.path and "momentum" in v.path)
    sizes = [int(tf.size(component)) for component in momentum.value.values]
    assert tuple(momentum.shape) == (8, 17)
    assert momentum.numpy().shape == (8, 17)
    assert sizes == held if held else sorted(sizes) == [0, 0, 136]


# Awkward variables.


class Awkward(keras.layers.Layer):
    """Variables of every shape and dtype that a flat, padded shard could get wrong."""

    def __init__(self, narrow=None, **kwargs):
        super().__init__(**kwargs)
        self.narrow_dtype = narrow

    def build(self, _):
        self.scalar = self.add_weight(shape=(), name="scalar")
        self.prime = self.add_weight(shape=(13,), name="prime")
        self.pair = self.add_weight(shape=(2,), name="pair")
        self.unused = self.add_weight(shape=(5,), name="unused")
        self.cube = self.add_weight(shape=(2, 1, 3), name="cube")
        self.wide = self.add_weight(shape=(7,), name="wide", dtype=self.narrow_dtype or "float64", autocast=False)

    def call(self, x):
        value = keras.ops.sin(keras.ops.sum(x, -1, keepdims=True) * self.prime) * self.scalar  # [batch, 13]
        value = value[:, :2] * self.pair + keras.ops.sum(value, -1, keepdims=True)  # [batch, 2]
        wide = keras.ops.cast(keras.ops.sum(x[:, :7] * keras.ops.cast(self.wide.value, "float32"), -1), "float32")
        last = keras.ops.sum(self.cube, (0, 1)) * wide[:, None]
        return keras.ops.concatenate([value, keras.ops.mean(value, -1, keepdims=True)], -1) + last


def awkward_model(narrow=None):
    return keras.Sequential([keras.Input((8,)), Awkward(narrow)])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.filterwarnings("ignore:The model does not have")
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *[("adam", 0), ("adamw", 2), ("multi_map", 1), ("muon", 3)],
        *[sweep("adam", 1), sweep("adamw", 3), sweep("muon", 0), sweep("muon", 2)],
    ],
)
def test_awkward_variables_do_as_on_one_device(name, stage):
    strategy = make_strategy(stage, min_shard_elements=0)
    with strategy.scope():
        model = awkward_model()
    ours = train(model, OPTIMIZERS[name](), "mse")
    assert_same_training(ours, train(awkward_model(), OPTIMIZERS[name](), "mse"), CLOSE)
    assert (Placement.WHOLE in model.optimizer.plan.placements) == (stage == 0)
    assert {spec.dtype for spec in model.optimizer.plan.specs} == {"float32", "float64"}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_bfloat16_variable_follows_one_device(stage):
    """16-bit values are compared by one step of SGD, to 1e-2."""
    changes = []
    for strategy in (make_strategy(stage, min_shard_elements=0), None):
        with strategy.scope() if strategy else tf.device("CPU:0"):
            model = awkward_model("bfloat16")
        initial = initial_weights([v.shape for v in model.trainable_variables])
        for variable, value in zip(model.trainable_variables, initial, strict=True):
            variable.assign(value)
        before = [v.numpy().astype("float32") for v in model.trainable_variables]
        model.compile(optimizer=ko.SGD(0.5), loss="mse", jit_compile=False)
        x, y = DATA.arrays()
        model.train_on_batch(x, y)
        pairs = zip(model.trainable_variables, before, strict=True)
        changes.append([variable.numpy().astype("float32") - value for variable, value in pairs])
    for mine, theirs in zip(*changes, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-2)
    assert np.abs(changes[0][-1]).max() > 0.05


class Empty(keras.layers.Layer):
    def build(self, shape):
        self.nothing = self.add_weight(shape=(0, 3), name="nothing")
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        return x @ self.kernel + keras.ops.sum(self.nothing)


@pytest.mark.parametrize("name", ["sgd_momentum", "lamb"])
def test_a_variable_without_elements_is_no_hindrance(name):
    strategy = make_strategy(2, min_shard_elements=0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), Empty()])
    reference = keras.Sequential([keras.Input((8,)), Empty()])
    make = {"sgd_momentum": lambda: ko.SGD(0.05, momentum=0.9), "lamb": lambda: ko.Lamb(0.02)}[name]
    assert_same_training(train(model, make(), "mse"), train(reference, make(), "mse"), CLOSE)


# The comparison itself.


@pytest.mark.parametrize(("stage", "method"), [sweep(2, "reduce_scatter"), (3, "reduce_scatter"), (0, "all_reduce")])
def test_the_comparison_notices_a_missing_sum(monkeypatch, stage, method):
    original = getattr(Group, method)

    def broken(self, value, replica, *dtype):
        is_gradient = value.dtype == tf.float32 and (value.shape.num_elements() or 0) > 60
        if not is_gradient:
            return original(self, value, replica, *dtype)
        return value[self.rank(replica)] if method == "reduce_scatter" else tf.identity(value)

    monkeypatch.setattr(Group, method, broken)
    strategy = make_strategy(stage)
    with strategy.scope():
        model = make_model()
    ours = train(model, OPTIMIZERS["adam"]())
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_training(ours, one_device("adam"), CLOSE)


def test_the_oracle_notices_a_missing_sum(monkeypatch):
    strategy = make_strategy(2)  # tests its collectives
    monkeypatch.setattr(Group, "reduce_scatter", lambda self, rows, replica, *dtype: rows[self.rank(replica)])
    ours, reference = oracle.train_both(
        strategy, oracle.dense_model, lambda: {"optimizer": "adam", "loss": "categorical_crossentropy"},
        oracle.Data(), epochs=1,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        oracle.assert_same(ours, reference)
