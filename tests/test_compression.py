"""What travels in fewer bits: a step's arithmetic against NumPy, training against one device, and checkpoints."""

import dataclasses
import functools
import itertools
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.collectives.codec import Codec
from tfzero.variables.classes import ShardedParameter

FORMATS = ["bf16", "fp16", "int8"]
X, Y = oracle.Data(features=8).arrays()


def make_strategy(stage=2, devices=2, **settings):
    names = [f"CPU:{k}" for k in range(devices)]
    return tfzero.ZeroStrategy(stage, devices=names, **{"min_shard_elements": 8} | settings)


def compiled(strategy, optimizer, make_model=oracle.dense_model):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make_model()
    model.compile(optimizer, "categorical_crossentropy")
    return model


def train(model, **arguments):
    model.fit(X, Y, **{"batch_size": 15, "epochs": 2, "shuffle": False, "verbose": 0} | arguments)
    return model


# The codec.


@pytest.mark.parametrize(("name", "precision"), [("bf16", 2**-8), ("fp16", 2**-11 * 1.01), ("int8", 1 / 254 * 1.01)])
@pytest.mark.parametrize("elements", [1, 255, 256, 257, 1000])
def test_what_is_decoded_is_near(name, precision, elements):
    """To a part of the element itself, or of the largest element of its block."""
    random = np.random.default_rng(elements)
    rows = (random.normal(size=(3, elements)) * 10.0 ** random.integers(-9, 9, (3, elements))).astype("float32")
    codec = Codec.of(name)
    payload = codec.encode(tf.constant(rows))
    assert payload.dtype == tf.int32 and payload.shape == (3, codec.format.words(elements))
    decoded = codec.decode(payload, elements).numpy()
    blocks = np.pad(rows, [(0, 0), (0, -elements % 256)]).reshape(3, -1, 256)
    largest = np.repeat(np.abs(blocks).max(2), 256, 1)[:, :elements]
    assert (np.abs(decoded - rows) <= precision * (np.abs(rows) if name == "bf16" else largest)).all()
    np.testing.assert_allclose(codec.decode_sum(payload, elements), decoded.sum(0), rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("flaw", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(name, flaw):
    """A loss scale must notice it."""
    rows = np.ones((2, 600), "float32")
    rows[1, 300] = flaw
    codec = Codec.of(name)
    is_finite = np.isfinite(codec.decode(codec.encode(tf.constant(rows)), 600).numpy())
    assert not is_finite[1, 300] and is_finite[0].all() and is_finite[1, :256].all()


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_products_with_a_scale_are_exact(name):
    """So that a machine that fuses them with a sum gets the same as one that does not."""
    rows = np.random.default_rng(0).normal(size=(1, 4096)).astype("float32")
    codec = Codec.of(name)
    payload = codec.encode(tf.constant(rows))
    scales = tf.bitcast(payload[:, -16:], tf.float32).numpy().astype("float64")
    decoded = codec.decode(payload, 4096).numpy().reshape(16, 256)
    items = decoded / scales[0][:, None]
    assert (items == np.round(items, 0 if name == "int8" else 11)).all()
    assert (np.float32(items.astype("float32").astype("float64") * scales[0][:, None]) == decoded).all()


# One step, against NumPy.


def int8(values):
    """Quantized as the format says, by blocks of 256 of each row; written without the codec's tricks."""
    count, elements = values.shape
    blocks = np.pad(values, [(0, 0), (0, -elements % 256)]).reshape(count, -1, 256)
    scales = (np.abs(blocks).max(2, keepdims=True) / np.float32(127)).astype("float32")
    scales = ((scales.view("int32") + 2047) & ~2047).view("float32")  # rounded up to 13 significant bits
    return (np.round(blocks / np.maximum(scales, 1e-30)) * scales).reshape(count, -1)[:, :elements]


def two_steps(stage, error_feedback):
    """The weights of a linear layer before and after two steps of plain SGD, and the local gradients of both."""
    strategy = make_strategy(stage, compression="int8", error_feedback=error_feedback)
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 24)).astype("float32"), random.normal(size=(8, 40)).astype("float32")
    with strategy.scope():
        model = keras.Sequential([keras.Input((24,)), layers.Dense(40, use_bias=False)])
    model.compile(ko.SGD(0.1), "mse")
    seen = [model.get_weights()[0]]
    for _ in range(2):
        model.train_on_batch(x, y)
        seen.append(model.get_weights()[0])
    return x, y, seen


def local_gradients(x, y, weights):
    """Of the mean over all, each replica's part."""
    errors = x @ weights - y
    return [x[half].T @ errors[half] * 2 / y.size for half in (slice(0, 4), slice(4, 8))]


@pytest.mark.parametrize("error_feedback", [sweep(False), True])
@pytest.mark.parametrize("stage", [sweep(1), 2])
def test_a_step_does_what_numpy_does(stage, error_feedback):
    """Each replica's gradient is rounded by itself; the parameter's difference too, whose rest is not lost."""
    x, y, seen = two_steps(stage, error_feedback)
    residuals, master = [0.0, 0.0], seen[0].reshape(2, -1)
    for before, after in itertools.pairwise(seen):
        total = 0.0
        for replica, gradient in enumerate(local_gradients(x, y, before)):
            wanted = gradient.reshape(2, -1) + residuals[replica]
            sent = int8(wanted)
            total = total + sent
            if error_feedback:
                residuals[replica] = wanted - sent
        master = master - 0.1 * total
        expected = before + int8(master - before.reshape(2, -1)).reshape(before.shape)
        step = np.abs(after - before).max()
        # An element in a thousand may fall on the other side of a rounding.
        assert np.mean(np.abs(after - expected) > 1e-3 * step) < 2e-3
        assert np.abs(after - expected).max() < 0.02 * step


def test_stage_3_computes_with_encoded_weights():
    x, y, (before, after, _) = two_steps(3, False)
    encoded = int8(before.reshape(2, -1)).reshape(before.shape)
    total = sum(int8(gradient.reshape(2, -1)) for gradient in local_gradients(x, y, encoded))
    expected = before - 0.1 * total.reshape(before.shape)
    assert np.mean(np.abs(after - expected) > 1e-3 * np.abs(after - before).max()) < 2e-3


@pytest.mark.parametrize(
    ("stage", "scaled"),
    [
        (3, True),
        *(sweep(*values) for values in [(0, False), (0, True), (2, False), (2, True), (3, False)]),
    ],
)
def test_error_feedback_keeps_what_is_too_small_to_travel(stage, scaled):
    """A gradient of 1 hides those of 1/300 beside it, unless what was lost is added up; in units of any loss scale."""

    def moved(error_feedback):
        strategy = make_strategy(stage, compression="int8", error_feedback=error_feedback)
        with strategy.scope():
            model = keras.Sequential([keras.Input((16,)), layers.Dense(16, use_bias=False, kernel_initializer="zeros")])
        optimizer = ko.SGD(1.0)
        if scaled:
            optimizer = ko.LossScaleOptimizer(optimizer, initial_scale=1024.0, dynamic_growth_steps=3)
        # The gradient of the sum over all outputs is the input: 1 in the first row of each shard, else 1/300.
        model.compile(optimizer, lambda y, z: keras.ops.sum(z, -1))
        x = np.full((2, 16), 1 / 300, "float32")
        x[:, ::8] = 1
        for _ in range(12):
            model.train_on_batch(x, np.zeros((2, 16), "float32"))
        return -np.delete(model.get_weights()[0], [0, 8], 0)

    assert np.abs(moved(False)).max() == 0
    np.testing.assert_allclose(moved(True), 12 / 300, atol=1 / 127)


# Training, against one device.


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(*pair, marks=[] if pair == (2, "int8") else pytest.mark.sweep)
        for pair in itertools.product(range(4), FORMATS)
    ],
)
def test_replicas_stay_equal_and_near_one_device(stage, name):
    strategy = make_strategy(stage, 3, compression=name)
    keras.utils.set_random_seed(0)
    reference = oracle.dense_model()
    reference.compile(ko.SGD(0.1, momentum=0.9), "categorical_crossentropy", jit_compile=False)
    model = compiled(strategy, ko.SGD(0.1, momentum=0.9))
    model.set_weights(reference.get_weights())
    before = reference.get_weights()
    train(model)
    train(reference)
    for variable, mine, theirs, old in zip(
        model.weights, model.get_weights(), reference.get_weights(), before, strict=True
    ):
        if not isinstance(variable.value, ShardedParameter):
            copies = [component.numpy() for component in variable.value.values]
            assert all((copy == copies[0]).all() for copy in copies)
        step = np.abs(theirs - old).max()
        assert step > 0.05
        assert np.abs(mine - theirs).max() < step * {"bf16": 0.02, "fp16": 0.002, "int8": 0.05}[name]
        if variable.shape.rank > 1:
            assert np.abs(mine - theirs).max() > 1e-7, "nothing was encoded"


CASES = {
    "global_clipnorm": lambda: ko.Adam(0.01, global_clipnorm=0.05),
    "clipnorm": lambda: ko.SGD(0.1, clipnorm=0.05),
    "accumulation": lambda: ko.SGD(0.1, gradient_accumulation_steps=2),
    "average": lambda: ko.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "scaled": lambda: ko.LossScaleOptimizer(ko.SGD(0.1)),
    "scaled_accumulation": lambda: ko.LossScaleOptimizer(ko.SGD(0.1, gradient_accumulation_steps=2)),
    "decay": lambda: ko.AdamW(0.01, weight_decay=0.1),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.sweep] * (case != "scaled_accumulation")) for case in CASES]
)
@pytest.mark.parametrize("stage", [sweep(1), 2, sweep(3)])
def test_compression_composes(case, stage):
    """float16, whose rounding is small, against the same without compression."""
    with_it, without = (compiled(make_strategy(stage, compression=name), CASES[case]()) for name in ("fp16", None))
    with_it.set_weights(without.get_weights())
    before = without.get_weights()
    for mine, theirs, old in zip(train(with_it).get_weights(), train(without).get_weights(), before, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.02 * np.abs(theirs - old).max())


def test_16_bit_compute_with_int8_on_the_wire():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        pair = [compiled(make_strategy(3, compression=name), ko.SGD(0.1)) for name in ("int8", None)]
    finally:
        keras.config.set_dtype_policy("float32")
    pair[0].set_weights(pair[1].get_weights())
    for mine, theirs in zip(*(train(model).get_weights() for model in pair), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.02)


@pytest.mark.parametrize("stage", [sweep(2), 3])
def test_an_overflow_leaves_weights_and_residuals_finite(stage):
    strategy = make_strategy(stage, compression="int8", error_feedback=True)
    model = compiled(strategy, ko.LossScaleOptimizer(ko.SGD(0.1), initial_scale=1024.0))
    train(model)
    before = model.get_weights()
    model.fit(np.full((4, 8), 1e38, "float32"), Y[:4], batch_size=15, shuffle=False, verbose=0)
    for mine, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, old)
    assert model.optimizer.loss_scale_optimizer.dynamic_scale == 512
    for residual in model.optimizer.wire.residuals.values():
        assert all(np.isfinite(component.numpy()).all() for component in residual.value.values)


def test_weights_that_are_set_are_trained_on():
    """The owner's master values follow."""
    model = train(compiled(make_strategy(compression="int8"), ko.SGD(0.1)))
    wanted = [weight + 1 for weight in model.get_weights()]
    model.set_weights(wanted)
    model.optimizer.learning_rate = 1e-6
    train(model, epochs=1)
    for mine, set_to in zip(model.get_weights(), wanted, strict=True):
        np.testing.assert_allclose(mine, set_to, atol=1e-2)


# Checkpoints.


def kept(model, what):
    """The sum over replicas of what compression keeps, by variable."""
    return [v.numpy() for v in getattr(model.optimizer.wire, what).values()]


def masters(model):
    """The values from which the optimizer goes on."""
    lags = {model.optimizer.trained_variables[i].path: v.numpy() for i, v in model.optimizer.wire.lags.items()}
    return [np.array(v) + lags.get(v.path, 0) for v in model.weights]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run that was saved: what it had then, and the weights after it went on."""

    folder: Path
    masters: list
    lags: list
    residuals: list
    later_weights: list


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By stage."""

    @functools.cache
    def of_stage(stage: int) -> Saved:
        folder = tmp_path_factory.mktemp(f"stage_{stage}")
        model = train(compiled(make_strategy(stage, compression="int8", error_feedback=True), "adam"))
        tfzero.save_checkpoint(model, folder)
        at_save = masters(model), kept(model, "lags"), kept(model, "residuals")
        return Saved(folder, *at_save, train(model).get_weights())

    return of_stage


@pytest.mark.parametrize("stage", [2, sweep(3)])
def test_a_run_goes_on_bit_for_bit(saved, stage):
    copy = compiled(make_strategy(stage, compression="int8", error_feedback=True), "adam")
    tfzero.load_checkpoint(copy, saved(stage).folder)
    for mine, theirs in zip(train(copy).get_weights(), saved(stage).later_weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("devices", "stage", "compression"), [(3, 1, "int8"), sweep(2, 3, None), sweep(1, 2, None)])
def test_another_run_goes_on_from_the_master_values(saved, devices, stage, compression):
    original = saved(2)
    strategy = make_strategy(stage, devices, compression=compression, error_feedback=compression is not None)
    copy = compiled(strategy, "adam")
    tfzero.load_checkpoint(copy, original.folder)
    assert max(np.abs(lag).max() for lag in original.lags) > 1e-7
    for mine, theirs in zip(masters(copy), original.masters, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7)
    if compression is not None:
        for mine, theirs in zip(kept(copy, "residuals"), original.residuals, strict=True):
            assert np.abs(theirs).max() > 0
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)
    train(copy)


def test_a_run_without_compression_goes_on_with_it(tmp_path):
    model = compiled(make_strategy(), "adam")
    model.optimizer.build(model.trainable_variables)
    tfzero.save_checkpoint(model, tmp_path)
    copy = train(compiled(make_strategy(compression="int8", error_feedback=True), "adam"))
    assert any((residual != 0).any() for residual in kept(copy, "residuals"))
    tfzero.load_checkpoint(copy, tmp_path)
    for mine, theirs in zip(masters(copy), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert all((residual == 0).all() for residual in kept(copy, "residuals"))


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": "int4"}, "`compression` must be None or one of 'bf16', 'fp16', 'int8'. Received: .*'int4'"),
        ({"compression": True}, "Received: compression=True"),
        ({"error_feedback": True}, "has an effect with compression='int8' only"),
        ({"compression": "bf16", "error_feedback": True}, "has an effect with compression='int8' only"),
        ({"compression": "int8", "error_feedback": 2}, "must be True or False"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(**settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compression_of_nothing_is_refused(stage):
    strategy = make_strategy(stage, compression="int8", min_shard_elements=10_000)
    model = compiled(strategy, "adam")
    with pytest.raises(ValueError, match="compression='int8' has no effect: none of the optimizer's variables"):
        model.optimizer.build(model.trainable_variables)


def test_variables_of_another_dtype_travel_as_they_are():
    strategy = make_strategy(compression="int8")
    with strategy.scope():
        hidden = [layers.Dense(16, activation="tanh", dtype=dtype) for dtype in ("float64", "bfloat16")]
        model = keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(3, activation="softmax")])
    model.compile("adam", "categorical_crossentropy")
    train(model)
    encoded = [s.index for bucket in model.optimizer.plan.buckets if bucket.compressed for s in bucket.segments]
    assert encoded == [4]


def test_at_stage_3_the_optimizer_must_know_of_residuals_first():
    strategy = make_strategy(3, compression="int8", error_feedback=True)
    with strategy.scope():
        model = oracle.dense_model()
        optimizer = tfzero.ZeroOptimizer(ko.SGD(0.1))

    @tf.function
    def step():
        def replica():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(X[:4]))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        strategy.run(replica)

    with pytest.raises(RuntimeError, match="call `optimizer.build"):
        step()
    optimizer.build(model.trainable_variables)
    step()
