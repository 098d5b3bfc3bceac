"""Scripts as people write them, of keras.io's kind: what plain Keras trains on one device trains here, to the same.

A case is a program `run(strategy)` that returns arrays; its strategy is None on one device. By default some run at
stage 3 on two workers with two devices each, and some at stage 2 on two logical devices. `-m sweep` runs every case
everywhere.
"""

import contextlib
import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers, ops
from marks import sweep

import tfzero

SEED = 7
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
CASES: dict[str, Callable] = {}


def case(function):
    CASES[function.__name__] = function
    return function


def scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def replicas() -> int:
    """What a step's own mean is divided by, as everywhere in `tf.distribute`."""
    return tf.distribute.get_strategy().num_replicas_in_sync


@contextlib.contextmanager
def shared_folder(strategy):
    """A folder that all workers see until all are through with it."""
    with tempfile.TemporaryDirectory() as folder:
        if strategy is None:
            yield Path(folder)
            return
        yield Path(strategy.channel.broadcast("naming a folder", folder))
        strategy.channel.all_gather("through with a folder", None)


def whole(variables) -> list[np.ndarray]:
    return [np.array(variable) for variable in variables]


def images(samples=24) -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 1, (samples, 8, 8, 1)).astype("float32")


def noise_of(rows, width):
    """Noise for each sample that is the same on every number of replicas."""
    flat = ops.reshape(rows, (ops.shape(rows)[0], -1))
    return ops.cos(20.0 * flat[:, :width])


def normalization():
    return layers.BatchNormalization(synchronized=True)


# Models of several networks, with a step of their own and no `call`.


class Sampling(layers.Layer):
    def call(self, inputs):
        mean, log_var = inputs
        return mean + ops.exp(0.5 * log_var) * ops.cos(3.0 * mean)


class VAE(keras.Model):
    """https://keras.io/examples/generative/vae/, smaller."""

    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.decoder = decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            z_mean, z_log_var, z = self.encoder(data)
            reconstruction = self.decoder(z)
            reconstruction_loss = ops.mean(ops.sum(keras.losses.binary_crossentropy(data, reconstruction), axis=(1, 2)))
            kl_loss = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
            kl_loss = ops.mean(ops.sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
            scaled_loss = total_loss / replicas()
        grads = tape.gradient(scaled_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {"loss": self.total_loss_tracker.result(), "kl_loss": self.kl_loss_tracker.result()}


def make_vae() -> VAE:
    encoder_inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, activation="relu", strides=2, padding="same")(encoder_inputs)
    x = layers.Dense(9, activation="relu")(layers.Flatten()(x))
    z_mean, z_log_var = layers.Dense(2, name="z_mean")(x), layers.Dense(2, name="z_log_var")(x)
    encoder = keras.Model(encoder_inputs, [z_mean, z_log_var, Sampling()([z_mean, z_log_var])])
    latent_inputs = keras.Input((2,))
    x = layers.Reshape((4, 4, 3))(layers.Dense(4 * 4 * 3, activation="relu")(latent_inputs))
    x = layers.Conv2DTranspose(6, 3, activation="relu", strides=2, padding="same")(x)
    decoder = keras.Model(latent_inputs, layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x))
    return VAE(encoder, decoder)


@case
def vae(strategy):
    with scope(strategy):
        model = make_vae()
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    history = model.fit(images(), epochs=2, batch_size=8, shuffle=False, verbose=0).history
    return {"history": history, "weights": whole(model.weights), "slots": whole(model.optimizer.variables)}


@case
def vae_that_goes_on(strategy):
    """In two runs with a checkpoint between, of which the second restores before the first step."""
    if strategy is None:
        model = make_vae()
        model.compile(optimizer=keras.optimizers.Adam(0.01))
        model.fit(images(), epochs=2, batch_size=8, shuffle=False, verbose=0)
        return {"weights": whole(model.weights), "slots": whole(model.optimizer.variables)}
    with shared_folder(strategy) as folder:
        for epochs in (1, 2):
            keras.utils.set_random_seed(SEED)
            with strategy.scope():
                model = make_vae()
            model.compile(optimizer=keras.optimizers.Adam(0.01))
            keep = tfzero.CheckpointCallback(folder)
            model.fit(images(), epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=[keep])
    return {"weights": whole(model.weights), "slots": whole(model.optimizer.variables)}


def make_discriminator() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(5, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(7, 4, strides=2, padding="same"),
            normalization(),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Flatten(),
            layers.Dropout(0.0),
            layers.Dense(1, activation="sigmoid"),
        ],
        name="discriminator",
    )


def make_generator(activation="sigmoid") -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(2 * 2 * 4, use_bias=False),
            normalization(),
            layers.Reshape((2, 2, 4)),
            layers.Conv2DTranspose(5, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2DTranspose(5, 4, strides=2, padding="same"),
            layers.Conv2D(1, 5, padding="same", activation=activation),
        ],
        name="generator",
    )


class GAN(keras.Model):
    """https://keras.io/examples/generative/dcgan_overriding_train_step/, smaller."""

    def __init__(self, discriminator, generator, latent_dim):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn
        self.d_metric = keras.metrics.Mean(name="d_loss")
        self.g_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_metric, self.g_metric]

    def train_step(self, real_images):
        batch_size = ops.shape(real_images)[0]
        noise = noise_of(real_images, self.latent_dim)
        generated_images = self.generator(noise)
        combined_images = ops.concatenate([generated_images, real_images], axis=0)
        labels = ops.concatenate([ops.ones((batch_size, 1)), ops.zeros((batch_size, 1))], axis=0)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(combined_images)
            d_loss = self.loss_fn(labels, predictions)
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(grads, self.discriminator.trainable_weights, strict=True))
        misleading_labels = ops.zeros((batch_size, 1))
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(noise))
            g_loss = self.loss_fn(misleading_labels, predictions)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(grads, self.generator.trainable_weights, strict=True))
        self.d_metric.update_state(d_loss * replicas())
        self.g_metric.update_state(g_loss * replicas())
        return {"d_loss": self.d_metric.result(), "g_loss": self.g_metric.result()}


@case
def dcgan(strategy):
    with scope(strategy):
        model = GAN(make_discriminator(), make_generator(), latent_dim=6)
    model.compile(
        d_optimizer=keras.optimizers.Adam(0.01, epsilon=1e-3),
        g_optimizer=keras.optimizers.Adam(0.01, epsilon=1e-3),
        loss_fn=keras.losses.BinaryCrossentropy(),
    )
    history = model.fit(images(), epochs=2, batch_size=8, shuffle=False, verbose=0).history
    slots = whole(model.d_optimizer.variables) + whole(model.g_optimizer.variables)
    return {"history": history, "weights": whole(model.weights), "slots": slots}


class WGAN(keras.Model):
    """https://keras.io/examples/generative/wgan_gp/, smaller: several critic steps, and a gradient of a gradient."""

    def __init__(self, discriminator, generator, latent_dim, discriminator_extra_steps=2, gp_weight=10.0):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.d_steps = discriminator_extra_steps
        self.gp_weight = gp_weight

    def compile(self, d_optimizer, g_optimizer, d_loss_fn, g_loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.d_loss_fn = d_loss_fn
        self.g_loss_fn = g_loss_fn

    def gradient_penalty(self, real_images, fake_images):
        alpha = ops.reshape(ops.abs(noise_of(real_images, 1)), (-1, 1, 1, 1))
        interpolated = real_images + alpha * (fake_images - real_images)
        with tf.GradientTape() as gp_tape:
            gp_tape.watch(interpolated)
            pred = self.discriminator(interpolated, training=True)
        grads = gp_tape.gradient(pred, [interpolated])[0]
        norm = ops.sqrt(ops.sum(ops.square(grads), axis=[1, 2, 3]))
        return ops.mean((norm - 1.0) ** 2)

    def train_step(self, real_images):
        if isinstance(real_images, tuple):
            real_images = real_images[0]
        noise = noise_of(real_images, self.latent_dim)
        for _ in range(self.d_steps):
            with tf.GradientTape() as tape:
                fake_images = self.generator(noise, training=True)
                fake_logits = self.discriminator(fake_images, training=True)
                real_logits = self.discriminator(real_images, training=True)
                d_cost = self.d_loss_fn(real_img=real_logits, fake_img=fake_logits)
                d_loss = d_cost + self.gradient_penalty(real_images, fake_images) * self.gp_weight
                scaled_loss = d_loss / replicas()
            d_gradient = tape.gradient(scaled_loss, self.discriminator.trainable_variables)
            self.d_optimizer.apply_gradients(zip(d_gradient, self.discriminator.trainable_variables, strict=True))
        with tf.GradientTape() as tape:
            generated_images = self.generator(noise, training=True)
            g_loss = self.g_loss_fn(self.discriminator(generated_images, training=True))
            scaled_loss = g_loss / replicas()
        gen_gradient = tape.gradient(scaled_loss, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(zip(gen_gradient, self.generator.trainable_variables, strict=True))
        return {"d_loss": d_loss, "g_loss": g_loss}


@case
def wgan_gp(strategy):
    with scope(strategy):
        critic = [keras.Input((8, 8, 1)), layers.Conv2D(5, 5, strides=2, padding="same", activation="tanh")]
        critic = keras.Sequential([*critic, layers.Flatten(), layers.Dense(1)])
        model = WGAN(critic, make_generator("tanh"), latent_dim=6)
    model.compile(
        d_optimizer=keras.optimizers.Adam(0.01, beta_1=0.5, beta_2=0.9, epsilon=1e-3),
        g_optimizer=keras.optimizers.Adam(0.01, beta_1=0.5, beta_2=0.9, epsilon=1e-3),
        d_loss_fn=lambda real_img, fake_img: ops.mean(fake_img) - ops.mean(real_img),
        g_loss_fn=lambda fake_img: -ops.mean(fake_img),
    )
    model.fit(images(16), epochs=2, batch_size=8, shuffle=False, verbose=0)
    return {"weights": whole(model.weights)}


class Wrapped(keras.Model):
    """Metrics and losses of `compile`, networks without inputs that are built by the first step, and an own test."""

    def __init__(self):
        super().__init__()
        hidden = layers.Dense(17, activation="tanh", kernel_initializer=keras.initializers.GlorotUniform(1))
        last = layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(2))
        self.net = keras.Sequential([hidden, last])

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self.net(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(x, y, y_pred)

    def test_step(self, data):
        x, y = data
        return self.compute_metrics(x, y, self.net(x, training=False))

    def predict_step(self, data):
        return self.net(data[0] if isinstance(data, tuple) else data)


class CalledWithSomethingElse(Wrapped):
    """Has a `call`, which no step calls and which does not take the data."""

    def call(self, noise):
        return self.net(noise["latent"])


def regression(samples=30):
    random = np.random.default_rng(5)
    x = random.normal(size=(samples, 8)).astype("float32")
    return x, x[:, :3] * 2 - 1


def fit_wrapped(strategy, kind):
    x, y = regression()
    with scope(strategy):
        model = kind()
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae", keras.metrics.RootMeanSquaredError()])
    arguments = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, validation_data=(x[:13], y[:13]), **arguments).history
    evaluated = model.evaluate(x, y, batch_size=7, verbose=0, return_dict=True)
    predicted = model.predict(x, batch_size=7, verbose=0)
    return {"history": history, "weights": whole(model.weights), "evaluated": evaluated, "predicted": predicted}


@case
def built_by_the_step(strategy):
    return fit_wrapped(strategy, Wrapped)


@case
def called_with_something_else(strategy):
    return fit_wrapped(strategy, CalledWithSomethingElse)


class Scaled:
    """Makes variables when it is first called: of a value of its own, and of a tensor of the graph."""

    def __init__(self, layer):
        self.layer, self.made = layer, None

    def __call__(self, x):
        y = self.layer(x)
        if self.made is None:
            self.made = [tf.Variable(0.5, trainable=False), tf.Variable(tf.ones(y.shape[-1:]) / 2, trainable=False)]
        return y * self.made[0] + self.made[1]


class Scaling(Wrapped):
    def __init__(self):
        super().__init__()
        hidden, last = self.net.layers
        self.first, self.second = Scaled(hidden), Scaled(last)
        self.layers_in_use = [hidden, last]
        self.net = lambda x, training: self.second(self.first(x))


@case
def variables_made_by_the_step(strategy):
    x, y = regression()
    with scope(strategy):
        model = Scaling()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    if strategy is not None and strategy.extended.mesh.workers > 1:
        with pytest.raises(ValueError, match="'from_rows' depends on the arguments of the traced function"):
            strategy.run(tf.function(lambda rows: tf.Variable(rows, name="from_rows")), args=(tf.ones([2]),))
    return {"history": history, "weights": whole(model.trainable_weights)}


# Optimizers.


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Without `get_config`, as in the Transformer tutorial of tensorflow.org."""

    def __init__(self, width, warm):
        self.width = tf.cast(width, "float32")
        self.warm = warm

    def __call__(self, step):
        step = tf.cast(step, "float32") + 1.0
        return tf.math.rsqrt(self.width) * tf.minimum(tf.math.rsqrt(step), step * self.warm**-1.5)


def fit_dense(strategy, optimizer):
    x, y = regression()
    with scope(strategy):
        model = keras.Sequential([keras.Input((8,)), layers.Dense(17, activation="tanh"), layers.Dense(3)])
    model.compile(optimizer, "mse")
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": whole(model.weights), "slots": whole(model.optimizer.variables)}


@case
def schedule_without_get_config(strategy):
    return fit_dense(strategy, keras.optimizers.Adam(Warmup(16, 4), epsilon=1e-3))


@case
def two_schedules_without_get_config(strategy):
    sgd, adam = keras.optimizers.SGD(Warmup(16, 4)), keras.optimizers.Adam(Warmup(64, 4))
    return fit_dense(strategy, keras.optimizers.MultiOptimizer(lambda v: sgd if "kernel" in v.path else adam))


@case
def schedules_that_differ(strategy):
    """Are refused by their numbers, on all workers."""
    if strategy is None or strategy.extended.mesh.workers == 1:
        return {"told": 1}
    warm = 4 + strategy.extended.mesh.worker
    with pytest.raises(ValueError, match="optimizer.learning_rate.warm is 4 on worker 0 and 5 on worker 1"):
        fit_dense(strategy, keras.optimizers.Adam(Warmup(16, warm)))
    return {"told": 1}


# Variables that are made outside the scope, after the model or before it.


@case
def lora_outside_the_scope(strategy):
    x, y = regression()
    with scope(strategy):
        table = [layers.Dense(17, activation="tanh"), layers.EinsumDense("bi,ij->bj", 9), layers.Dense(3)]
        model = keras.Sequential([keras.Input((8,)), *table])
    arguments = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, **arguments)
    frozen = np.array(model.layers[0].kernel)
    for layer in model.layers:
        layer.enable_lora(2, b_initializer=keras.initializers.GlorotUniform(5))
    model.compile(keras.optimizers.Adam(0.01, epsilon=1e-3), "mse")
    history = model.fit(x, y, **arguments).history
    unchanged = np.array_equal(np.array(model.layers[0]._kernel), frozen)
    homes = {getattr(v.value, "distribute_strategy", None) for v in model.variables}
    slots = [slot.shape for slot in model.optimizer.variables]
    return {
        "history": history, "weights": whole(model.weights), "predicted": model.predict(x, verbose=0),
        "frozen": float(unchanged), "homes": float(homes == {strategy}), "slots": float(len(slots)),
    }  # fmt: skip


@case
def pretrained_layers_from_outside_the_scope(strategy):
    x, y = regression()
    backbone = keras.Sequential([keras.Input((8,)), layers.Dense(17, activation="tanh"), normalization()])
    if strategy is not None:  # every worker has drawn its own
        backbone.set_weights([w + strategy.extended.mesh.worker for w in backbone.get_weights()])
    with scope(strategy):
        model = keras.Sequential([backbone, layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return {"history": history, "weights": whole(model.weights), "backbone": whole(backbone.weights)}


# All cases, everywhere.

ON_DEVICES = ("vae", "dcgan", "called_with_something_else", "schedule_without_get_config")  # by default, at stage 2
ON_WORKERS = (
    "vae_that_goes_on", "wgan_gp", "built_by_the_step", "called_with_something_else", "variables_made_by_the_step",
    "two_schedules_without_get_config", "schedules_that_differ", "lora_outside_the_scope",
    "pretrained_layers_from_outside_the_scope",
)  # by default, at stage 3 on 2 workers with 2 devices each  # fmt: skip


@functools.cache
def on_one_device(name: str) -> dict:
    keras.utils.set_random_seed(SEED)
    return CASES[name](None)


def run_cases(cases: dict[str, Callable], stage: int) -> dict:
    """In a worker: what each case returned, or the text of its failure."""
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8)
    results: dict = {}
    for name, run in cases.items():
        keras.utils.set_random_seed(SEED)
        try:
            results[name] = run(strategy)
        except Exception:
            results[name] = traceback.format_exc()
        failed = strategy.channel.all_gather(f"after {name}", isinstance(results[name], str))
        if len(set(failed)) > 1:
            results[name] = f"{results[name]}\nThe workers have parted: {failed}"
            break
    return results


@functools.cache
def on_workers(stage: int, devices: int, names: tuple[str, ...]) -> list[dict] | str:
    try:
        return pool.run(run_cases, 2, args=({name: CASES[name] for name in names}, stage), cpu_devices=devices)
    except (tfzero.WorkerError, TimeoutError) as error:
        return str(error)


def check(mine, name: str) -> None:
    if isinstance(mine, str):
        pytest.fail(f"{name}: {mine}")
    assert_close(mine, on_one_device(name), name)


def assert_close(mine, theirs, where: str) -> None:
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs), where
        for key in theirs:
            assert_close(mine[key], theirs[key], f"{where}, {key}")
    elif isinstance(theirs, list) and theirs and isinstance(theirs[0], np.ndarray):
        assert len(mine) == len(theirs), where
        for index, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_close(own, other, f"{where}, {index}")
    else:
        np.testing.assert_allclose(mine, theirs, **CLOSE, err_msg=where)


@pytest.mark.parametrize(
    ("name", "stage"),
    [*((name, 2) for name in ON_DEVICES)]
    + [sweep(name, stage) for name in CASES for stage in (2, 3) if (name, stage) not in [(n, 2) for n in ON_DEVICES]],
)
def test_on_logical_devices(name, stage):
    keras.utils.set_random_seed(SEED)
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    check(CASES[name](strategy), name)


@pytest.mark.parametrize(
    ("name", "stage", "devices"),
    [*((name, 3, 2) for name in ON_WORKERS)]
    + [sweep(name, 3, 2) for name in CASES if name not in ON_WORKERS]
    + [sweep(name, stage, 1) for name in CASES for stage in (2, 3)],
)
def test_on_two_workers(name, stage, devices):
    is_default = (stage, devices) == (3, 2) and name in ON_WORKERS
    others = tuple(each for each in CASES if (stage, devices) != (3, 2) or each not in ON_WORKERS)
    results = on_workers(stage, devices, ON_WORKERS if is_default else others)
    if isinstance(results, str):
        pytest.fail(f"the fleet failed: {results}")
    for result in results:
        check(result.get(name, "was not reached: the workers parted before"), name)


# What is said of objects without a config.


def test_the_memory_of_a_schedule_without_get_config_is_estimated():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(17)])
    own = tfzero.estimate_memory(model, keras.optimizers.Adam(Warmup(16, 4)), world_size=2)
    number = tfzero.estimate_memory(model, keras.optimizers.Adam(0.1), world_size=2)
    assert [e.slot_bytes for e in own] == [e.slot_bytes for e in number]
