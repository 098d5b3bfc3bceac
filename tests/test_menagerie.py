"""What people train at stage 3, on devices and on workers: each does as plain Keras on one device.

A case makes a model and trains it: `case(strategy)`, with None for one device. All cases of a fleet run one after the
other in the same processes. The hardest run on two workers with two devices each, the others on two devices, and every
case at every place with `-m sweep`.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers, ops
from keras import optimizers as ko
from marks import sweep

import tfzero

ROWS = 24
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 11, (ROWS, 6))
TARGETS = RANDOM.integers(0, 3, ROWS)
X = RANDOM.normal(size=(ROWS, 8)).astype("float32")
CASES: dict[str, Callable] = {}
# The cases whose graphs are the most tangled.
HARDEST = ("frozen_and_twice", "gradient_penalty", "second_derivatives", "two_optimizers", "own_operations", "saliency")


def case(function):
    CASES[function.__name__] = function
    return function


def scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def fit(strategy, make_model, x=TOKENS, y=TARGETS, then=lambda model: [], **compile_arguments) -> dict:
    """The weights before and after two epochs, what comes of evaluation and prediction, and of `then(model)`."""
    with scope(strategy):
        model = make_model()
        model(x[:4])
    before = model.get_weights()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": ko.SGD(0.3), "loss": loss, "jit_compile": False} | compile_arguments)
    model.fit(x, y, batch_size=12, epochs=2, shuffle=False, verbose=0)
    evaluated = model.evaluate(x, y, batch_size=12, verbose=0)
    predicted = keras.tree.flatten(model.predict(x, batch_size=12, verbose=0))
    return {"before": before, "after": model.get_weights(), "results": [np.array(evaluated), *predicted, *then(model)]}


def embedded(*more):
    return keras.Sequential([keras.Input((6,)), layers.Embedding(11, 8), *more, layers.Dense(3)])


def mean(losses) -> tf.Tensor:
    """Of the whole batch, when replicas add theirs up."""
    return tf.reduce_mean(losses) / tf.distribute.get_strategy().num_replicas_in_sync


# Through `fit`.


class Tied(keras.Model):
    """An embedding that is the output projection too."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(11, 8)
        self.hidden = layers.Dense(8, activation="tanh")
        self.last = layers.Dense(3)

    def call(self, x):
        hidden = self.hidden(self.embedding(x))
        logits = ops.matmul(hidden, ops.transpose(self.embedding.embeddings))
        return self.last(ops.mean(logits, 1))


@case
def tied(strategy):
    return fit(strategy, Tied)


@case
def frozen_and_twice(strategy):
    def make_model():
        x = keras.Input((8,))
        frozen, twice = layers.Dense(8, activation="tanh"), layers.Dense(8, activation="tanh")
        frozen.trainable = False
        return keras.Model(x, layers.Dense(3)(twice(frozen(twice(layers.Dense(8)(x))))))

    return fit(strategy, make_model, X)


@case
def several_heads(strategy):
    def make_model():
        x = keras.Input((8,))
        trunk = layers.Dense(9, activation="tanh")(layers.Dense(7, activation="tanh")(x))
        heads = {"a": layers.Dense(3, name="a")(trunk), "b": layers.Dense(8, name="b")(trunk)}
        return keras.Model(x, heads)

    losses = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    return fit(strategy, make_model, X, {"a": TARGETS, "b": X}, loss=losses)


@case
def adapted(strategy):
    """Frozen layers with LoRA beside them."""

    def make_model():
        model = embedded(layers.Flatten(), layers.Dense(16, activation="relu"), layers.Dense(16))
        for layer in model.layers[2:4]:
            layer.enable_lora(2)
        return model

    return fit(strategy, make_model)


@case
def recurrent(strategy):
    return fit(strategy, lambda: embedded(layers.LSTM(7, return_sequences=True), layers.GRU(6)))


@case
def rematerialized(strategy):
    """Keras's own remat fails in a graph on TensorFlow if a layer takes keyword arguments: one device goes without."""

    def make_model():
        with contextlib.nullcontext() if strategy is None else keras.RematScope(mode="full"):
            dense = [layers.Dense(16, activation="gelu") for _ in range(3)]
        return embedded(layers.Flatten(), *dense)

    return fit(strategy, make_model)


class Looped(layers.Layer):
    """Its kernel is read in a loop, in a branch and in a `tf.function`."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    def call(self, x):
        x = tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ self.kernel)), [0, x])[1]
        x = tf.cond(tf.shape(x)[-1] > 3, lambda: x @ self.kernel, lambda: -x @ self.kernel)
        return tf.function(lambda x: tf.tanh(x @ self.kernel))(x)


@case
def control_flow(strategy):
    return fit(strategy, lambda: embedded(layers.Flatten(), layers.Dense(8), Looped(), Looped()))


class Own(layers.Layer):
    """Operations that TensorFlow runs in the order of the program, forward and backward."""

    def call(self, x):
        doubled = tf.py_function(lambda x: 2 * x, [x], tf.float32)
        doubled = tf.ensure_shape(doubled, x.shape)
        tf.debugging.assert_less(tf.reduce_max(x), 1e9)
        return tf.tanh(doubled)


@case
def own_operations(strategy):
    def make_model():
        x = keras.Input((8,))
        twice = layers.Dense(8)
        h = Own()(twice(Own()(twice(Own()(layers.Dense(8)(x))))))
        return keras.Model(x, layers.Dense(3)(h))

    return fit(strategy, make_model, X)


# With tapes of their own.


def perceptron(outputs=1, **arguments):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(12, activation="tanh"),
            layers.Dense(9, activation="tanh"),
            layers.Dense(outputs, **arguments),
        ]
    )


class Trained(keras.Model):
    """A model that is trained by its own step."""

    def __init__(self):
        super().__init__()
        self.network = perceptron()
        self.built = True

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss_of(x)
        variables = self.network.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}


def step(strategy, make_model) -> dict:
    with scope(strategy):
        model = make_model()
    before = model.get_weights()
    model.compile(ko.SGD(0.1), jit_compile=False)
    model.fit(X, batch_size=12, epochs=2, shuffle=False, verbose=0)
    return {"before": before, "after": model.get_weights(), "results": []}


class Penalized(Trained):
    def loss_of(self, x):
        with tf.GradientTape() as inner:
            inner.watch(x)
            score = self.network(x, training=True)
        slopes = inner.gradient(score, x)
        return mean(tf.square(tf.norm(slopes, axis=1) - 1)) + mean(score)


@case
def gradient_penalty(strategy):
    return step(strategy, Penalized)


class ThricePenalized(Trained):
    """Tapes in a tape in a tape."""

    def loss_of(self, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = self.network(x, training=True)
            slopes = inner.gradient(score, x)
            total = tf.reduce_sum(tf.square(slopes))
        return mean(tf.square(outer.gradient(total, x))) + mean(score)


@case
def third_derivatives(strategy):
    return step(strategy, ThricePenalized)


class Adapting(Trained):
    """Descends along a gradient of the sum over replicas, and trains through that."""

    def loss_of(self, x):
        kernels = [layer.kernel for layer in self.network.layers]
        with tf.GradientTape() as inner:
            loss = mean(tf.square(self.network(x, training=True) - 1))
        gradients = inner.gradient(loss, kernels)
        # Each replica has its own shards of the sums.
        return loss + 0.03 * sum(tf.reduce_sum(tf.square(gradient)) for gradient in gradients)


@case
def second_derivatives(strategy):
    return step(strategy, Adapting)


class Adversarial(keras.Model):
    """A generator and a critic, each with an optimizer, and one tape for both or one for each."""

    def __init__(self, persistent):
        super().__init__()
        self.persistent = persistent
        self.generator, self.critic = perceptron(8), perceptron()
        self.built = True

    def compile(self):
        super().compile(jit_compile=False)
        self.optimizers = [ko.SGD(0.1), ko.SGD(0.05)]
        if isinstance(self.distribute_strategy, tfzero.ZeroStrategy):
            self.optimizers = [tfzero.ZeroOptimizer(optimizer) for optimizer in self.optimizers]

    def losses_of(self, x):
        made = self.generator(x[:, ::-1], training=True)
        real, fake = self.critic(x, training=True), self.critic(made, training=True)
        return mean(-fake), mean(fake - real) + mean(tf.square(real)) + mean(tf.square(fake))

    def train_step(self, x):
        networks = (self.generator, self.critic)
        if self.persistent:
            with tf.GradientTape(persistent=True) as tape:
                losses = self.losses_of(x)
            gradients = [tape.gradient(losses[k], networks[k].trainable_variables) for k in range(2)]
            for k in range(2):
                self._apply(k, gradients[k])
        else:
            for k in range(2):
                with tf.GradientTape() as tape:
                    losses = self.losses_of(x)
                self._apply(k, tape.gradient(losses[k], networks[k].trainable_variables))
        return {"loss": losses[0]}

    def _apply(self, place, gradients):
        variables = (self.generator, self.critic)[place].trainable_variables
        self.optimizers[place].apply_gradients(zip(gradients, variables, strict=True))


def train_adversarial(strategy, persistent):
    with scope(strategy):
        model = Adversarial(persistent)
    before = model.get_weights()
    model.compile()
    model.fit(X, batch_size=12, epochs=2, shuffle=False, verbose=0)
    return {"before": before, "after": model.get_weights(), "results": []}


@case
def two_optimizers(strategy):
    return train_adversarial(strategy, persistent=False)


@case
def two_optimizers_one_tape(strategy):
    return train_adversarial(strategy, persistent=True)


# Outside replicas.


def gradients_of(model, x) -> list:
    """Of a score: by the input, if it is no number of a token, and by the parameters."""
    watched = [x] if x.dtype.is_floating else []
    with tf.GradientTape() as tape:
        tape.watch(watched)
        score = tf.reduce_sum(model(x)[:, 0])
    return [tf.convert_to_tensor(g) for g in tape.gradient(score, [*watched, *model.trainable_variables])]


def gradients_outside(strategy, x):
    def gradients(model):
        tensor = tf.constant(x[:5])
        found = [*gradients_of(model, tensor), *tf.function(gradients_of)(model, tensor)]
        is_sharded = strategy is not None and strategy.settings.stage == 3
        with strategy.gathered(model.trainable_variables) if is_sharded else contextlib.nullcontext():
            found += gradients_of(model, tensor)
        if x.dtype.kind == "f":  # a tape around a function finds the input's gradient
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                score = tf.reduce_sum(tf.function(model)(tensor))
            found.append(tape.gradient(score, tensor))
        return [gradient.numpy() for gradient in found]

    return gradients


@case
def saliency(strategy):
    return fit(strategy, lambda: perceptron(3), X, then=gradients_outside(strategy, X))


@case
def saliency_of_tokens(strategy):
    return fit(strategy, lambda: embedded(layers.Flatten()), then=gradients_outside(strategy, TOKENS))


# Places where they run.


SETTINGS = {"again": {}, "kept": {"reshard_after_forward": False}, "whole": {"stage": 2}}


def cases(names=None):
    """Each case at stage 3, with parameters gathered again and kept; and what happens outside replicas at stage 2."""
    found = [(name, settings) for name in CASES if names is None or name in names for settings in ("again", "kept")]
    return found + [(name, "whole") for name, settings in found if name.startswith("saliency") and settings == "kept"]


# Those that run by default. "kept" is the simpler setting: nothing is gathered in the backward pass.
ON_WORKERS = (*((name, "again") for name in HARDEST), ("frozen_and_twice", "kept"))
ON_DEVICES = {(name, "again") for name in CASES if name not in (*HARDEST, "recurrent", "adapted")}
ON_DEVICES |= {(name, "kept") for name in ("gradient_penalty", "second_derivatives", "control_flow", "saliency")}
ON_DEVICES |= {("saliency", "whole")}


def swept(found, default):
    """All cases that are found, of which those that are not the default's only `-m sweep` runs."""
    return [each if each in default else sweep(*each) for each in found]


def make_strategy(devices, settings):
    names = [f"CPU:{k}" for k in range(devices)]
    return tfzero.ZeroStrategy(**{"stage": 3, "devices": names, "min_shard_elements": 8} | SETTINGS[settings])


def run_cases(found, devices) -> dict:
    """In a worker: what comes of each case, or the text of its error."""
    results: dict = {}
    for name, settings in found:
        try:
            results[name, settings] = run(name, make_strategy(devices, settings))
        except Exception:
            results[name, settings] = traceback.format_exc()
    return results


def run(name, strategy):
    keras.utils.set_random_seed(5)
    return CASES[name](strategy)


@functools.cache
def on_one_device(name):
    return run(name, None)


@functools.cache
def on_workers(devices, found):
    return pool.run(run_cases, workers=2, cpu_devices=devices, args=(found, devices))


def assert_as_on_one_device(results, name):
    expected = on_one_device(name)
    moves = [np.abs(new - old).max() for new, old in zip(expected["after"], expected["before"], strict=True)]
    assert max(moves) > 1e-2, "a training that does not move proves nothing"
    for result in results:
        assert not isinstance(result, str), result
        for kind, arrays in expected.items():
            for mine, theirs in zip(result[kind], arrays, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize(("name", "settings"), swept(cases(), ON_DEVICES))
def test_on_devices(name, settings):
    assert_as_on_one_device([run(name, make_strategy(2, settings))], name)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "settings"), cases())
def test_on_workers(name, settings):
    assert_as_on_one_device([results[name, settings] for results in on_workers(1, tuple(cases()))], name)


@pytest.mark.parametrize(("name", "settings"), swept(cases(HARDEST), ON_WORKERS))
def test_on_workers_with_two_devices(name, settings):
    others = tuple(each for each in cases(HARDEST) if each not in ON_WORKERS)
    fleet = on_workers(2, ON_WORKERS if (name, settings) in ON_WORKERS else others)
    assert_as_on_one_device([results[name, settings] for results in fleet], name)
