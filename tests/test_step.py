"""What a step of `fit` and of custom loops promises: the result of one device, whatever the feature.

Data of 46 samples in batches of 15 make a last batch of a single sample, and no batch divides by two replicas; every
replica sees other samples. On one device `jit_compile` is off where only `fit` is compared: it makes no difference to
the result and saves a second for each model.
"""

import os
import traceback
import warnings

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers, losses, ops
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.optimizer import ZeroOptimizer
from tfzero.variables.classes import ShardedParameter

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # SGD
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # Adam after three epochs
DATA = oracle.Data()
# `TFZERO_TEST_STAGE=3 pytest tests/test_step.py` runs everything but stage 0 at another stage.
OTHER_STAGE = int(os.environ["TFZERO_TEST_STAGE"]) if "TFZERO_TEST_STAGE" in os.environ else None


GRID = [(2, 3), *(sweep(*pair) for pair in [(0, 2), (3, 2), (1, 3), (2, 2)])]  # stage, devices


def make_strategy(stage=2, devices=2):
    stage = OTHER_STAGE if OTHER_STAGE is not None and stage else stage
    return tfzero.ZeroStrategy(stage=stage, devices=[f"CPU:{k}" for k in range(devices)], min_shard_elements=8)


def weights_from(shapes, seed=3):
    random = np.random.default_rng(seed)
    return [random.normal(scale=0.4, size=shape).astype("float32") for shape in shapes]


def make_pair(strategy, make_model, make_arguments):
    """A compiled model under the strategy and one on one device, from the same initial weights."""
    with strategy.scope():
        ours = make_model()
    reference = make_model()
    if reference.built:
        values = weights_from([v.shape for v in ours.trainable_variables])
        for variable, value in zip(ours.trainable_variables, values, strict=True):
            variable.assign(value)
        reference.set_weights(ours.get_weights())
    ours.compile(**make_arguments())
    reference.compile(**({"jit_compile": False} | make_arguments()))
    return ours, reference


def fit(model, x, y=None, **arguments):
    batch_losses = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batch_losses.append(float(logs["loss"]))
    )
    callbacks = [note, *arguments.pop("callbacks", [])]
    if isinstance(x, np.ndarray | dict):
        arguments = {"batch_size": 15} | arguments
    arguments = {"epochs": 3, "verbose": 0, "shuffle": False} | arguments
    history = model.fit(x, y, callbacks=callbacks, **arguments).history
    return oracle.Outcome(model.get_weights(), history, batch_losses)


def slots(model):
    return [v.numpy() for v in model.optimizer.variables]


def assert_same_slots(ours, reference, **tolerance):
    assert [v.shape for v in slots(ours)] == [v.shape for v in slots(reference)]
    for mine, theirs in zip(slots(ours), slots(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, **(tolerance or CLOSE))


def assert_same_weights(ours, reference, **tolerance):
    for mine, theirs in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, **(tolerance or CLOSE))


def assert_replicas_equal(model):
    for variable in model.variables:
        if isinstance(variable.value, ShardedParameter):
            continue  # replicas hold different parts
        first, *others = [component.numpy() for component in variable.value.values]
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=variable.path)


def compare(strategy, make_model, make_arguments, x=None, y=None, tolerance=CLOSE, **arguments):
    """Fits both, asserts that weights, history, batch logs and slots are the same, and returns the models."""
    if x is None:
        x, y = DATA.arrays()
    ours, reference = make_pair(strategy, make_model, make_arguments)
    before = ours.get_weights() if ours.built else None

    def fresh(value):
        return value() if callable(value) and not isinstance(value, keras.utils.PyDataset) else value

    outcomes = []
    for model in (ours, reference):
        outcomes.append(fit(model, fresh(x), y, **{key: fresh(value) for key, value in arguments.items()}))
    oracle.assert_same(*outcomes, **tolerance)
    if reference.optimizer is not None and reference.optimizer.built:
        assert_same_slots(ours, reference, **tolerance)
    if before is not None:
        moved = max(np.abs(w - b).max() for w, b in zip(ours.get_weights(), before, strict=True) if w.size)
        assert moved > 1e-2, "a training that does not move proves nothing"
    return ours, reference


def unbuilt_model():
    first, second = (keras.initializers.HeNormal(seed) for seed in (1, 2))
    return keras.Sequential(
        [layers.Dense(5, kernel_initializer=first), layers.Dense(3, "softmax", kernel_initializer=second)]
    )


def sgd(**settings):
    return lambda: {"optimizer": ko.SGD(0.2, **settings), "loss": "categorical_crossentropy"}


def adam(**settings):
    return lambda: {"optimizer": ko.Adam(0.02, **settings), "loss": "categorical_crossentropy"}


# Batches of any size.


@pytest.mark.parametrize(
    ("stage", "devices", "batch_size"),
    [
        (2, 3, 15),
        sweep(3, 3, 1),
        sweep(0, 2, 15),
        sweep(1, 2, 1),
        sweep(2, 3, 1),
        sweep(3, 3, 15),
        sweep(3, 2, 1),
        sweep(1, 3, 15),
        sweep(0, 3, 1),
        sweep(2, 2, 15),
        sweep(2, 2, 1),
    ],
)
def test_ragged_batches(stage, devices, batch_size):
    """Batches of 15, 15, 15 and 1 samples, and of 1 only: training, evaluation and prediction."""
    data = DATA if batch_size > 1 else oracle.Data(samples=5)
    outcomes = oracle.train_both(
        make_strategy(stage, devices),
        oracle.dense_model,
        lambda: {"optimizer": ko.Adam(0.02), "loss": "categorical_crossentropy", "metrics": ["accuracy"]},
        data,
        batch_size=batch_size,
    )
    oracle.assert_same(*outcomes)
    assert np.abs(outcomes[0].history["loss"][-1] - outcomes[0].history["loss"][0]) > 1e-2


def test_batches_on_their_own():
    x, y = DATA.arrays()
    ours, reference = make_pair(
        make_strategy(), oracle.dense_model, lambda: sgd(momentum=0.9)() | {"metrics": ["accuracy"]}
    )
    for begin, end in ((0, 5), (5, 6), (6, 46)):
        part = x[begin:end], y[begin:end]
        for method in ("train_on_batch", "test_on_batch"):
            results = [getattr(model, method)(*part, return_dict=True) for model in (ours, reference)]
            assert results[0].keys() == results[1].keys()
            np.testing.assert_allclose(*[list(result.values()) for result in results], **EXACT)
        predictions = [np.asarray(model.predict_on_batch(part[0])) for model in (ours, reference)]
        np.testing.assert_allclose(*predictions, **EXACT)
    assert_same_weights(ours, reference, **EXACT)
    weighted = [m.train_on_batch(x[:7], y[:7], sample_weight=np.arange(7.0)) for m in (ours, reference)]
    np.testing.assert_allclose(*weighted, **EXACT)
    # Each replica gets its part and not everything: sums must not count samples twice.
    for model in (ours, reference):
        model.compile(ko.SGD(0.01), losses.CategoricalCrossentropy(reduction="sum"), jit_compile=False)
        model.train_on_batch(x[:7], y[:7])
    assert_same_weights(ours, reference, **EXACT)
    for model in (ours, reference):
        model.compile(**sgd()(), jit_compile=False)
    weighted = [m.train_on_batch(x[:7], y[:7], class_weight={0: 3.0, 1: 1.0, 2: 0.5}) for m in (ours, reference)]
    np.testing.assert_allclose(*weighted, **EXACT)


# The walk of one gradient.


@pytest.mark.parametrize(
    ("setting", "stage", "devices"),
    [
        ("global_clipnorm", 3, 3),
        ("clipnorm", 2, 3),
        sweep("global_clipnorm", 0, 2),
        sweep("clipvalue", 2, 2),
        sweep("clipnorm", 3, 2),
        sweep("global_clipnorm", 2, 3),
        sweep("global_clipnorm", 1, 3),
        sweep("global_clipnorm", 2, 2),
        sweep("clipnorm", 0, 3),
        sweep("clipvalue", 0, 3),
    ],
)
def test_clipping_by_the_true_norm(setting, stage, devices):
    limit = 0.02
    x, y = DATA.arrays()
    ours, reference = make_pair(
        make_strategy(stage, devices), oracle.dense_model, sgd(momentum=0.9, **{setting: limit})
    )
    before = ours.get_weights()
    for model in (ours, reference):
        fit(model, x[:15], y[:15], epochs=1)
    changes = [w - b for w, b in zip(ours.get_weights(), before, strict=True)]
    norms = [np.sqrt(np.sum(np.square(change))) for change in changes]
    clipped = {
        "global_clipnorm": np.sqrt(np.sum(np.square(norms))),
        "clipnorm": max(norms),
        "clipvalue": max(np.abs(change).max() for change in changes),
    }[setting]
    np.testing.assert_allclose(clipped, 0.2 * limit, rtol=1e-3)  # it was active
    oracle.assert_same(fit(ours, x, y), fit(reference, x, y), **EXACT)
    assert_same_slots(ours, reference, **EXACT)


@pytest.mark.parametrize(("stage", "devices"), GRID)
def test_an_overflow_in_one_part_of_the_batch(stage, devices):
    def make_arguments():
        scaled = ko.LossScaleOptimizer(ko.Adam(0.02), initial_scale=8.0, dynamic_growth_steps=2)
        return {"optimizer": scaled, "loss": "mse"}

    x, y = DATA.arrays()
    x = x[:6]
    bad_first, bad_last = x.copy(), x.copy()
    bad_first[0, 0] = bad_last[-1, 0] = 3e38
    ours, reference = make_pair(make_strategy(stage, devices), oracle.dense_model, make_arguments)
    scales, iterations, moved = [], [], []
    for batch in (x, bad_first, bad_last, x, x):
        before = ours.get_weights()
        for model in (ours, reference):
            model.train_on_batch(batch, y[:6])
        scales.append(float(ours.optimizer.loss_scale_optimizer.dynamic_scale))
        iterations.append(int(ours.optimizer.iterations))
        moved.append(any((w != b).any() for w, b in zip(ours.get_weights(), before, strict=True)))
        assert float(reference.optimizer.dynamic_scale) == scales[-1]
    assert scales == [8, 4, 2, 2, 4]
    assert iterations == [1, 1, 1, 2, 3]
    assert moved == [True, False, False, True, True]
    assert_same_weights(ours, reference)
    assert_same_slots(ours, reference)
    assert_replicas_equal(ours)


@pytest.mark.parametrize("stage", [sweep(0), sweep(1), 2, sweep(3)])
def test_gradient_accumulation(stage):
    """Twelve micro-steps in threes, with clipping and a learning rate that depends on the iteration."""
    schedule = ko.schedules.ExponentialDecay(0.02, 1, 0.9)
    ours, _ = compare(
        make_strategy(stage),
        oracle.dense_model,
        lambda: {
            "optimizer": ko.Adam(schedule, gradient_accumulation_steps=3, global_clipnorm=0.05),
            "loss": "categorical_crossentropy",
        },
    )
    assert int(ours.optimizer.iterations) == 4
    assert float(ours.optimizer.learning_rate) == pytest.approx(0.02 * 0.9**12)  # Keras schedules by micro-steps


@pytest.mark.parametrize("stage", [sweep(0), 1, 3])
def test_gradients_accumulate_under_a_loss_scale(stage):
    """The scale grows after every fourth micro-step, in the middle of what is accumulated."""
    ours, reference = compare(
        make_strategy(stage),
        oracle.dense_model,
        lambda: {
            "optimizer": ko.LossScaleOptimizer(
                ko.SGD(0.1, gradient_accumulation_steps=3), initial_scale=4.0, dynamic_growth_steps=4
            ),
            "loss": "categorical_crossentropy",
        },
    )
    scales = [float(model.optimizer.dynamic_scale) for model in (ours, reference)]
    assert scales[0] == scales[1] > 4.0


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        sweep(0, {"ema_overwrite_frequency": 2}),
        (3, {"ema_overwrite_frequency": 2}),
        sweep(2, {"ema_overwrite_frequency": 2}),
        sweep(1, {}),
        sweep(2, {"gradient_accumulation_steps": 3, "ema_overwrite_frequency": 2}),
        sweep(1, {"gradient_accumulation_steps": 3, "ema_overwrite_frequency": 2}),
        sweep(2, {"gradient_accumulation_steps": 3}),
    ],
)
def test_moving_averages(stage, settings):
    """`fit` finalizes: without overwriting the model ends with the averages."""
    compare(make_strategy(stage), oracle.dense_model, adam(use_ema=True, ema_momentum=0.8, **settings))


@pytest.mark.parametrize(
    ("stage", "swap_on_epoch"),
    [sweep(0, False), (2, True), sweep(3, True), sweep(0, True), sweep(1, False), sweep(2, False)],
)
def test_swapping_moving_averages_for_evaluation(stage, swap_on_epoch):
    x, y = DATA.arrays()
    compare(
        make_strategy(stage),
        oracle.dense_model,
        adam(use_ema=True, ema_momentum=0.8),
        validation_data=(x[:7], y[:7]),
        callbacks=lambda: [keras.callbacks.SwapEMAWeights(swap_on_epoch)],
    )


def constrained_model():
    """A kernel used twice and constrained, a frozen layer, a frozen variable between trained ones."""
    inputs = keras.Input((8,))
    shared = layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.7), name="shared")
    frozen = layers.Dense(9, trainable=False, name="frozen")
    output = layers.Dense(3, kernel_constraint="non_neg", bias_regularizer="l2")
    return keras.Model(inputs, output(frozen(shared(shared(inputs)))))


@pytest.mark.parametrize("stage", [sweep(0), sweep(2), 3])
def test_constraints_shared_and_frozen_layers(stage):
    ours, reference = compare(
        make_strategy(stage),
        constrained_model,
        lambda: {"optimizer": ko.Adam(0.02), "loss": losses.CategoricalCrossentropy(from_logits=True)},
    )
    assert np.linalg.norm(ours.get_layer("shared").kernel.numpy(), axis=0).max() == pytest.approx(0.7, abs=1e-5)
    assert ours.get_weights()[-2].min() == 0
    before = ours.get_layer("frozen").get_weights()[0]
    for model in (ours, reference):
        model.get_layer("frozen").trainable = True
        model.compile(ko.Adam(0.02), losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
    oracle.assert_same(*[fit(model, *DATA.arrays()) for model in (ours, reference)])
    assert np.abs(ours.get_layer("frozen").get_weights()[0] - before).max() > 1e-2


# Ways to compile.


@pytest.mark.parametrize(
    "settings",
    [
        sweep({"steps_per_execution": 3}),
        {"run_eagerly": True},
        sweep({"optimizer": "adam"}),
        {"optimizer": {"class_name": "Adam", "config": {"learning_rate": 0.02}}},
        sweep({"optimizer": None, "loss": "mse"}),
    ],
    ids=["steps_per_execution", "run_eagerly", "name", "config", "default"],
)
def test_ways_to_compile(settings):
    def make_arguments():
        arguments = adam()() | settings
        return {key: value for key, value in arguments.items() if value is not None}

    ours, _ = compare(make_strategy(), oracle.dense_model, make_arguments, epochs=4)
    assert isinstance(ours.optimizer, ZeroOptimizer)
    assert int(ours.optimizer.iterations) == 16
    assert isinstance(float(ours.optimizer.learning_rate), float)


def test_gradients_accumulate_within_steps_per_execution():
    compare(
        make_strategy(),
        oracle.dense_model,
        lambda: (
            adam(gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3)() | {"steps_per_execution": 4}
        ),
    )


def test_xla_over_all_replicas_is_refused():
    with make_strategy().scope():
        model = oracle.dense_model()
    with pytest.raises(ValueError, match="jit_compile"):
        model.compile("adam", "mse", jit_compile=True)


def test_metric_objects_made_outside_the_scope():
    ours, reference = compare(
        make_strategy(),
        oracle.dense_model,
        lambda: {
            **adam()(),
            "metrics": [
                "accuracy",
                keras.metrics.AUC(multi_label=True, num_labels=3, name="auc"),
                keras.metrics.F1Score(average="macro"),
                keras.metrics.OneHotMeanIoU(3, name="iou"),
                keras.metrics.RootMeanSquaredError(),
            ],
            "weighted_metrics": [keras.metrics.Precision(name="precision"), keras.metrics.CategoricalCrossentropy()],
        },
        sample_weight=np.linspace(0.1, 3, 46),
        validation_split=0.3,
    )
    x, y = DATA.arrays()
    evaluated = [model.evaluate(x, y, batch_size=4, verbose=0) for model in (ours, reference)]
    np.testing.assert_allclose(*evaluated, **CLOSE)


# Layers that look at the batch.


def image_model():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Reshape((4, 2, 1)),
            layers.Conv2D(5, 3, padding="same", activation="relu"),
            layers.DepthwiseConv2D(2, padding="same"),
            layers.MaxPooling2D((2, 1)),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def test_a_replica_without_samples_convolves_nothing():
    """The last batch has one sample for two replicas."""
    compare(make_strategy(), image_model, sgd(), tolerance=EXACT)


def test_a_replica_without_samples_normalizes_nothing():
    """The moments of no samples would be NaN, and the sum of gradients with them."""

    def make_model():
        return keras.Sequential([keras.Input((8,)), layers.BatchNormalization(), layers.Dense(3)])

    ours, _ = make_pair(make_strategy(), make_model, sgd())
    fit(ours, *DATA.arrays())
    assert all(np.isfinite(weights).all() for weights in ours.get_weights())


def test_batch_normalization_leaves_replicas_equal():
    """Parts are normalised by themselves, but moving statistics are averages over the whole batch."""

    def make_model():
        return keras.Sequential([keras.Input((8,)), layers.BatchNormalization(momentum=0.7), layers.Dense(3)])

    ours, reference = make_pair(make_strategy(), make_model, lambda: {"optimizer": ko.SGD(0.1), "loss": "mse"})
    for model in (ours, reference):
        fit(model, *DATA.arrays())
    assert_replicas_equal(ours)
    means = [model.layers[0].moving_mean.numpy() for model in (ours, reference)]
    np.testing.assert_allclose(*means, **EXACT)
    assert np.abs(means[0]).max() > 1e-2


@pytest.mark.parametrize(("stage", "devices"), [sweep(2, 3), sweep(0, 2)])
def test_synchronized_batch_normalization(stage, devices):
    def make_model():
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(17),
                layers.BatchNormalization(momentum=0.7, synchronized=True),
                layers.Dense(3, activation="softmax"),
            ]
        )

    ours, _ = compare(make_strategy(stage, devices), make_model, sgd(), tolerance=EXACT)
    assert_replicas_equal(ours)


class DenseEmbedding(layers.Layer):
    """An embedding by matrix product: its gradient is dense."""

    def build(self, _):
        self.table = self.add_weight(shape=(11, 5), name="embeddings")

    def call(self, x):
        return ops.one_hot(x, 11) @ self.table


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (2, {}),
        sweep(0, {}),
        sweep(2, {"clipnorm": 0.02}),
        sweep(1, {"gradient_accumulation_steps": 2}),
        sweep(3, {}),
    ],
)
def test_an_embedding_has_the_dense_gradient(stage, settings):
    """Rows occur several times in a batch and on several replicas."""
    tokens = np.random.default_rng(0).integers(0, 9, (46, 4))
    _, y = DATA.arrays()

    def make_model(layer):
        return keras.Sequential(
            [keras.Input((4,), dtype="int32"), layer, layers.Flatten(), layers.Dense(3, activation="softmax")]
        )

    with make_strategy(stage).scope():
        ours = make_model(layers.Embedding(11, 5))
    reference = make_model(DenseEmbedding())
    for model in (ours, reference):
        model.set_weights(weights_from([(11, 5), (20, 3), (3,)]))
        model.compile(**({"jit_compile": False} if model is reference else {}), **adam(**settings)())
    oracle.assert_same(*[fit(model, tokens, y) for model in (ours, reference)])
    assert_same_slots(ours, reference)


def test_dropout_draws_its_own_mask_on_each_replica_and_again_for_the_same_seed():
    def draw(seed, fits=True):
        keras.utils.set_random_seed(seed)
        strategy = make_strategy(2, 2)
        with strategy.scope():
            layer = layers.Dropout(0.5)
            model = keras.Sequential([keras.Input((8,)), layers.Dense(16), layer, layers.Dense(3)])
        model.compile("sgd", "mse")
        masks = strategy.run(tf.function(lambda: layer(tf.ones([4, 16]), training=True)))
        masks = [mask.numpy() for mask in strategy.experimental_local_results(masks)]
        return masks, fit(model, *DATA.arrays()).history["loss"] if fits else None, model.get_weights()

    masks, epochs, weights = draw(1)
    assert (masks[0] != masks[1]).any()
    again = draw(1)
    np.testing.assert_array_equal(again[0], masks)
    np.testing.assert_allclose(again[1], epochs, rtol=1e-6)
    for mine, theirs in zip(again[2], weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (np.array(draw(2, fits=False)[0]) != np.array(masks)).any()


# Losses.


def sequences():
    """46 sequences of 1 to 6 tokens, padded with 0, with a target per token; the first third is much shorter."""
    random = np.random.default_rng(5)
    x = random.integers(1, 11, (46, 6))
    lengths = np.where(np.arange(46) % 15 < 5, 1, random.integers(2, 7, 46))
    x[np.arange(6) >= lengths[:, None]] = 0
    return x, random.integers(0, 3, (46, 6)), random.uniform(0, 4, (46, 6)).astype("float32")


@pytest.mark.parametrize(
    ("reduction", "weighted"),
    [
        sweep("sum_over_batch_size", True),
        sweep("sum", False),
        ("mean_with_sample_weight", True),
        sweep("sum_over_batch_size", False),
        sweep("sum", True),
        sweep("mean_with_sample_weight", False),
    ],
)
def test_masked_losses(reduction, weighted):
    x, y, weights = sequences()

    def make_model():
        return keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                layers.Embedding(11, 5, mask_zero=True),
                layers.Dense(3, activation="softmax"),
            ]
        )

    def make_arguments():
        loss = losses.SparseCategoricalCrossentropy(reduction=reduction)
        rate = 0.01 if reduction == "sum" else 0.5
        return {"optimizer": ko.SGD(rate), "loss": loss, "metrics": ["accuracy"], "weighted_metrics": ["accuracy"]}

    more = {"sample_weight": weights} if weighted else {}
    ours, reference = compare(make_strategy(), make_model, make_arguments, x, y, tolerance=EXACT, **more)
    evaluated = [model.evaluate(x, y, batch_size=7, verbose=0, **more) for model in (ours, reference)]
    np.testing.assert_allclose(*evaluated, **EXACT)


@pytest.mark.parametrize("reduction", [sweep("sum_over_batch_size"), sweep("sum"), "mean_with_sample_weight"])
def test_weighted_samples(reduction):
    weights = np.where(np.arange(46) % 15 < 5, 0.0, np.linspace(0.1, 5, 46)).astype("float32")  # a part that weighs 0
    compare(
        make_strategy(2, 3),
        oracle.dense_model,
        lambda: {
            "optimizer": ko.SGD(0.01 if reduction == "sum" else 0.2),
            "loss": losses.CategoricalCrossentropy(reduction=reduction),
            "weighted_metrics": ["accuracy"],
        },
        tolerance=EXACT,
        sample_weight=weights,
    )


def test_weighted_classes():
    compare(
        make_strategy(1, 2),
        oracle.dense_model,
        lambda: sgd()() | {"weighted_metrics": ["accuracy"]},
        tolerance=EXACT,
        class_weight={0: 5.0, 1: 1.0, 2: 0.1},
    )


def many_headed_model():
    inputs = {"left": keras.Input((8,), name="left"), "right": keras.Input((8,), name="right")}
    hidden = layers.Dense(17, activation="tanh")(layers.Concatenate()([inputs["left"], inputs["right"]]))
    outputs = {
        "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
        "size": layers.Dense(2, name="size")(hidden),
        "rank": layers.Dense(3, name="rank")(hidden),
    }
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("stage", [sweep(0), sweep(2), 3])
def test_several_inputs_and_outputs(stage):
    x, y = DATA.arrays()
    weights = {"kind": np.linspace(0, 3, 46), "size": np.linspace(2, 0, 46), "rank": np.ones(46)}
    compare(
        make_strategy(stage),
        many_headed_model,
        lambda: {
            "optimizer": ko.SGD(0.1),
            "loss": {
                "kind": losses.CategoricalCrossentropy(reduction="mean_with_sample_weight"),
                "size": losses.Huber(),
                "rank": losses.MeanSquaredError(reduction="sum"),
            },
            "loss_weights": {"kind": 0.3, "size": 2.0, "rank": 0.02},
            "metrics": {"kind": ["accuracy"], "size": ["mae"]},
        },
        {"left": x, "right": x[::-1].copy()},
        {"kind": y, "size": x[:, :2], "rank": y[::-1].copy()},
        tolerance=EXACT,
        sample_weight=weights,
    )


class Penalty(layers.Layer):
    """Adds a mean over the samples to the loss."""

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


def test_added_losses_and_regularizers():
    def make_model():
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(17, activation="tanh", kernel_regularizer=keras.regularizers.L1L2(0.01, 0.02)),
                Penalty(),
                layers.Dense(3, activation="softmax", activity_regularizer=keras.regularizers.L2(0.1)),
                layers.ActivityRegularization(l1=0.02),
            ]
        )

    ours, reference = compare(make_strategy(), make_model, sgd(), tolerance=EXACT)
    evaluated = [model.evaluate(*DATA.arrays(), batch_size=7, verbose=0) for model in (ours, reference)]
    np.testing.assert_allclose(*evaluated, **EXACT)


class OwnMean(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred) * (1 + ops.abs(y_pred)))


class MoreLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * ops.mean(ops.square(y_pred)) + 0.01 * ops.sum(ops.square(self.trainable_variables[0]))


class OwnStep(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(losses.categorical_crossentropy(y, y_pred))
            else:
                metric.update_state(y, y_pred)
        return self.get_metrics_result()


def functional(kind):
    def make_model():
        inputs = keras.Input((8,))
        hidden = layers.Dense(17, activation="tanh")(inputs)
        return kind(inputs, layers.Dense(3, activation="softmax", kernel_regularizer="l2")(hidden))

    return make_model


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (OwnMean, "categorical_crossentropy"),
        (MoreLoss, "categorical_crossentropy"),
        (OwnStep, "scalar"),
        sweep(MoreLoss, "scalar"),
        sweep(OwnStep, "categorical_crossentropy"),
    ],
)
def test_losses_of_the_users_own(kind, loss):
    def scalar(y, y_pred):
        return ops.mean(ops.square(y - y_pred) * (1.0 + y))

    compare(
        make_strategy(),
        functional(kind),
        lambda: {"optimizer": ko.SGD(0.2), "loss": scalar if loss == "scalar" else loss, "metrics": ["accuracy"]},
        tolerance=EXACT,
    )


# Models of the user's own.


class BuiltLate(keras.Model):
    """Has no variables before the first batch."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(17, activation="tanh", kernel_initializer=keras.initializers.GlorotUniform(1))
        self.last = layers.Dense(3, activation="softmax", kernel_initializer=keras.initializers.GlorotUniform(2))

    def call(self, x):
        return self.last(self.hidden(x))


@pytest.mark.parametrize("devices", [2, sweep(3)])
def test_a_model_that_is_built_by_its_first_batch(devices):
    ours, _ = compare(make_strategy(2, devices), BuiltLate, adam())
    assert_replicas_equal(ours)


class Gan(keras.Model):
    """Two optimizers in one step; each network sees the other's update."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((4,)), layers.Dense(17, activation="tanh"), layers.Dense(8)])
        self.critic = keras.Sequential([keras.Input((8,)), layers.Dense(9, activation="tanh"), layers.Dense(1)])
        self.built = True

    def compile(self, generator_optimizer, critic_optimizer, **kwargs):
        super().compile(**kwargs)
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.cross_entropy = losses.BinaryCrossentropy(from_logits=True)
        self.critic_tracker = keras.metrics.Mean(name="critic")
        self.generator_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.critic_tracker, self.generator_tracker]

    def train_step(self, data):
        real, _ = data
        noise = real[:, :4]
        with tf.GradientTape() as tape:
            fake = self.generator(noise)
            judged = tf.concat([self.critic(real), self.critic(fake)], 0)
            truth = tf.concat([tf.ones([tf.shape(real)[0], 1]), tf.zeros([tf.shape(real)[0], 1])], 0)
            loss = self.cross_entropy(truth, judged)
        gradients = tape.gradient(loss, self.critic.trainable_variables)
        self.critic_optimizer.apply_gradients(zip(gradients, self.critic.trainable_variables, strict=True))
        self.critic_tracker.update_state(tf.reduce_mean(judged, 1))
        with tf.GradientTape() as tape:
            judged = self.critic(self.generator(noise))
            loss = self.cross_entropy(tf.ones_like(judged), judged)
        gradients = tape.gradient(loss, self.generator.trainable_variables)
        self.generator_optimizer.apply_gradients(zip(gradients, self.generator.trainable_variables, strict=True))
        self.generator_tracker.update_state(tf.reduce_mean(judged, 1))
        return {m.name: m.result() for m in self.metrics}


@pytest.mark.parametrize("stage", [sweep(0), sweep(2), 3])
def test_two_optimizers_in_one_step(stage):
    ours, reference = make_pair(make_strategy(stage), Gan, lambda: {
        "generator_optimizer": ko.Adam(0.02), "critic_optimizer": ko.SGD(0.1, momentum=0.5),
    })  # fmt: skip
    oracle.assert_same(*[fit(model, *DATA.arrays()) for model in (ours, reference)])
    for name in ("generator_optimizer", "critic_optimizer"):
        pairs = zip(getattr(ours, name).variables, getattr(reference, name).variables, strict=True)
        for mine, theirs in pairs:
            np.testing.assert_allclose(mine.numpy(), theirs.numpy(), **CLOSE)


# Sources of data.


class Rows(keras.utils.PyDataset):
    """Batches of 7 rows, the last of 4."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        x, y = DATA.arrays()
        return x[7 * index : 7 * index + 7], y[7 * index : 7 * index + 7]


def generate():
    """A generator of batches of 1 to 6 rows; Keras takes one more batch than it trains on."""
    x, y = DATA.arrays()
    while True:
        for begin, end in ((0, 6), (6, 7), (7, 12), (12, 14)):
            yield x[begin:end], y[begin:end]


@pytest.mark.sweep
def test_a_generator():
    compare(make_strategy(), oracle.dense_model, adam(), generate, steps_per_epoch=4)


def test_a_pydataset():
    compare(make_strategy(), oracle.dense_model, adam(), Rows, validation_data=Rows)


@pytest.mark.parametrize("drop_remainder", [sweep(False), sweep(True)])
def test_a_tf_dataset(drop_remainder):
    dataset = tf.data.Dataset.from_tensor_slices(DATA.arrays())
    dataset = dataset.shuffle(46, seed=1, reshuffle_each_iteration=False).batch(13, drop_remainder)
    compare(make_strategy(2, 2), oracle.dense_model, adam(), dataset, validation_data=dataset.take(2))


@pytest.mark.parametrize("make_model", [sweep(oracle.dense_model), unbuilt_model])
def test_a_tf_dataset_that_shuffles_anew_in_each_epoch(make_model):
    """Each training has a pipeline of its own, as a shuffled one goes on to another order whenever it is read."""

    def make_dataset():
        return tf.data.Dataset.from_tensor_slices(DATA.arrays()).shuffle(46, seed=1).batch(13)

    compare(make_strategy(2, 2), make_model, adam(), make_dataset, validation_data=lambda: make_dataset().take(2))


def test_a_model_without_trainable_variables():
    """Nothing is trained, and the metrics are those of one device."""

    def make_model():
        return keras.Sequential([keras.Input((8,)), layers.Dense(3, activation="softmax", trainable=False)])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model does not have any trainable weights")
        ours, reference = make_pair(make_strategy(2, 2), make_model, adam())
        oracle.assert_same(*[fit(model, *DATA.arrays(), epochs=1) for model in (ours, reference)])


@pytest.mark.parametrize(
    "make_callbacks",
    [
        lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5 if epoch else rate)],
        sweep(lambda: [keras.callbacks.ReduceLROnPlateau("loss", factor=0.3, patience=1, min_delta=10.0)]),
        sweep(
            lambda: [keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True, min_delta=10.0)]
        ),
    ],
    ids=["scheduler", "plateau", "early_stopping"],
)
def test_callbacks_that_steer(make_callbacks):
    x, y = DATA.arrays()
    ours, _ = compare(
        make_strategy(),
        oracle.dense_model,
        adam(),
        epochs=4,
        validation_data=(x[:7], y[:7]),
        callbacks=make_callbacks,
    )
    assert float(ours.optimizer.learning_rate) == float(ours.optimizer.inner_optimizer.learning_rate)


# 16-bit compute.


@pytest.mark.parametrize(
    ("stage", "policy"),
    [
        (2, "mixed_bfloat16"),
        (3, "mixed_float16"),
        sweep(0, "mixed_bfloat16"),
        sweep(0, "mixed_float16"),
        sweep(2, "mixed_float16"),
        sweep(3, "mixed_bfloat16"),
    ],
)
def test_mixed_precision(policy, stage):
    """One step of SGD moves the weights as on one device, to 1e-2; then it trains on."""

    def make_model():
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(17, activation="tanh", dtype=policy),
                layers.Dense(3, activation="softmax", dtype=policy),
            ]
        )

    def make_arguments():
        scaled = ko.LossScaleOptimizer(ko.SGD(0.5), initial_scale=256.0) if policy == "mixed_float16" else ko.SGD(0.5)
        return {"optimizer": scaled, "loss": "categorical_crossentropy"}

    x, y = DATA.arrays()
    ours, reference = make_pair(make_strategy(stage), make_model, make_arguments)
    before = ours.get_weights()
    for model in (ours, reference):
        model.train_on_batch(x, y)
    for w, r, b in zip(ours.get_weights(), reference.get_weights(), before, strict=True):
        change = np.linalg.norm(r - b)
        assert change > 1e-3
        assert np.linalg.norm(w - r) <= 1e-2 * change
    history = fit(ours, x, y).history["loss"]
    assert history[-1] < history[0]


# Custom loops.


@pytest.mark.filterwarnings("ignore:.*the memory of stage 2")
@pytest.mark.parametrize(
    ("stage", "compiled"),
    [sweep(2, True), sweep(0, False), (3, True), sweep(3, False), sweep(2, False), sweep(1, True)],
)
def test_a_custom_loop(stage, compiled):
    """The mean over the global batch is the user's: sums over the parts, divided by the number of all samples."""
    x, y = DATA.arrays()
    strategy = make_strategy(stage)
    with strategy.scope():
        model = oracle.dense_model()
        optimizer = tfzero.ZeroOptimizer(ko.Adam(0.02, global_clipnorm=0.1))
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(15)

    def replica_step(x, y, samples):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(losses.categorical_crossentropy(y, model(x, training=True))) / samples
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def step(x, y, samples):
        return strategy.reduce("SUM", strategy.run(replica_step, (x, y, samples)), axis=None)

    if compiled:
        step = tf.function(step)
    reference = oracle.dense_model()
    values = weights_from([v.shape for v in model.trainable_variables])
    model.set_weights(values)
    reference.set_weights(values)
    reference.compile(ko.Adam(0.02, global_clipnorm=0.1), "categorical_crossentropy", jit_compile=False)
    for (mine, targets), rows in zip(strategy.experimental_distribute_dataset(dataset), (15, 15, 15, 1), strict=True):
        loss = step(mine, targets, tf.constant(float(rows)))
    first = [reference.train_on_batch(x[b : b + 15], y[b : b + 15]) for b in (0, 15, 30, 45)]
    assert np.isfinite(first).all()
    last = float(loss)
    assert_same_weights(model, reference)
    for mine, theirs in zip(optimizer.variables, reference.optimizer.variables, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), **CLOSE)
    assert last > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_autograph_converts_the_users_functions_alone(stage):
    """It would take 17 s over those of tfzero."""
    converted = set()

    def note_converted():
        converted.update(frame.name for frame in traceback.extract_stack() if frame.name.startswith("tf__"))

    class Watched(ko.SGD):
        def build(self, variables):
            note_converted()
            super().build(variables)

        def update_step(self, *arguments):
            note_converted()
            super().update_step(*arguments)

    strategy = make_strategy(stage)
    with strategy.scope():
        model = oracle.dense_model()
        optimizer = tfzero.ZeroOptimizer(Watched(0.1))

    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, (x,))

    step(tf.ones([2, 8]))
    assert converted == {"tf__step", "tf__replica_step"}


def test_values_of_replicas():
    strategy = make_strategy(2, 3)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant([float(context.replica_id_in_sync_group), 1.0])
    )
    assert strategy.reduce("SUM", values, axis=None).numpy().tolist() == [3, 3]
    assert strategy.reduce("MEAN", values, axis=None).numpy().tolist() == [1, 1]
    assert float(strategy.reduce("SUM", values, axis=0)) == 6
    assert float(strategy.reduce("MEAN", values, axis=0)) == 1
    assert strategy.gather(values, axis=0).numpy().tolist() == [0, 1, 1, 1, 2, 1]
    total = strategy.run(
        tf.function(lambda v: tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, v)), (values,)
    )
    for replica in strategy.experimental_local_results(total):
        assert replica.numpy().tolist() == [3, 3]


def test_a_dataset_of_the_users_own_parts():
    strategy = make_strategy(2, 2)
    seen = []

    def make_dataset(context):
        seen.append(context.num_replicas_in_sync)
        return tf.data.Dataset.range(8).batch(2)

    batches = list(strategy.distribute_datasets_from_function(make_dataset))
    assert seen == [2]
    rows = [[part.numpy().tolist() for part in strategy.experimental_local_results(batch)] for batch in batches]
    assert rows == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


# Refusals.


def test_an_optimizer_without_its_wrapper_is_refused_in_a_replica():
    strategy = make_strategy(2, 2)
    with strategy.scope():
        model = oracle.dense_model()
        optimizer = ko.SGD(0.1)

    def replica_step():
        optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)

    with pytest.raises(RuntimeError, match="ZeroOptimizer"):
        strategy.run(tf.function(replica_step))


def test_a_wrapper_outside_a_replica_is_refused():
    strategy = make_strategy(2, 2)
    with strategy.scope():
        model = oracle.dense_model()
    optimizer = tfzero.ZeroOptimizer(ko.SGD(0.1))
    gradients = [tf.ones(v.shape) for v in model.trainable_variables]
    with pytest.raises(RuntimeError, match=r"strategy\.run"):
        optimizer.apply(gradients, model.trainable_variables)
    with strategy.scope(), pytest.raises(RuntimeError, match=r"strategy\.run"):
        optimizer.apply(gradients, model.trainable_variables)


class OverridesApply(ko.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)


def test_optimizers_that_cannot_be_wrapped():
    with pytest.raises(TypeError, match="overrides the whole of `apply`"):
        tfzero.ZeroOptimizer(OverridesApply(0.1))
    with pytest.raises(TypeError, match="overrides the whole of `apply`"):
        tfzero.ZeroOptimizer(ko.LossScaleOptimizer(OverridesApply(0.1)))
    with pytest.raises(ValueError, match="already"):
        tfzero.ZeroOptimizer(tfzero.ZeroOptimizer("adam"))
    built = ko.Adam()
    built.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="built already"):
        tfzero.ZeroOptimizer(built)


def test_variables_that_cannot_be_trained():
    strategy, other = make_strategy(2, 2), make_strategy(2, 2)
    with strategy.scope():
        model = oracle.dense_model()
        counter = keras.Variable([1, 2], dtype="int32", trainable=True)
    with other.scope():
        foreign = oracle.dense_model()
    with pytest.raises(ValueError, match="int32"):
        tfzero.ZeroOptimizer("sgd").build([*model.trainable_variables, counter])
    with pytest.raises(ValueError, match="2 strategies"):
        tfzero.ZeroOptimizer("sgd").build([*model.trainable_variables, *foreign.trainable_variables])
    with pytest.raises(ValueError, match="strategies"):
        tfzero.ZeroOptimizer("sgd").build(oracle.dense_model().trainable_variables)
    optimizer = ko.SGD(0.1)
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="another ZeroStrategy"):
        foreign.compile(optimizer, "mse")


# Files.


@pytest.mark.parametrize(
    ("stage", "make_optimizer"),
    [
        sweep(0, lambda: ko.Adam(0.02)),
        sweep(2, lambda: ko.Adam(0.02)),
        (2, lambda: ko.LossScaleOptimizer(ko.Muon(0.02), initial_scale=4.0)),
        sweep(3, lambda: ko.Adam(0.02)),
    ],
    ids=["adam-0", "adam-2", "scaled-muon-2", "adam-3"],
)
def test_files_are_plain_keras_files(stage, make_optimizer, tmp_path):
    """A model saved here goes on in plain Keras, and one saved by plain Keras goes on here, as on one device."""
    ours, reference = compare(
        make_strategy(stage),
        oracle.dense_model,
        lambda: {"optimizer": make_optimizer(), "loss": "categorical_crossentropy"},
        epochs=1,
    )
    ours.save(tmp_path / "ours.keras")
    reference.save(tmp_path / "plain.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = keras.models.load_model(tmp_path / "ours.keras")
    assert not isinstance(plain.optimizer, ZeroOptimizer)
    plain.jit_compile = False
    assert_same_weights(plain, ours, rtol=0)
    assert_same_slots(plain, ours, rtol=0)
    strategy = make_strategy(2, 2)
    with strategy.scope():
        resumed = keras.models.load_model(tmp_path / "plain.keras")
    assert isinstance(resumed.optimizer, ZeroOptimizer)
    outcomes = [fit(model, *DATA.arrays(), epochs=1) for model in (resumed, plain, ours, reference)]
    for outcome in outcomes[:-1]:
        oracle.assert_same(outcome, outcomes[-1])
    for model in (resumed, plain, ours):
        assert_same_slots(model, reference)


# Others.


def test_models_of_other_strategies_run_keras_own_code():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x, y = DATA.arrays()
    with strategy.scope():
        model = oracle.dense_model()
        optimizer = ko.SGD(0.2)
    reference = oracle.dense_model()
    values = weights_from([v.shape for v in reference.trainable_variables])
    model.set_weights(values)
    reference.set_weights(values)
    with strategy.scope():
        model.compile(optimizer, "categorical_crossentropy", jit_compile=False)
    reference.compile(ko.SGD(0.2), "categorical_crossentropy", jit_compile=False)
    assert model.optimizer is optimizer
    outcomes = [fit(m, x[:32], y[:32], batch_size=8, epochs=2) for m in (model, reference)]
    for mine, theirs in zip(outcomes[0].weights, outcomes[1].weights, strict=True):
        np.testing.assert_allclose(mine, theirs, **EXACT)
