"""Workers train apart and are merged: as plain Keras models that are trained one by one and merged by hand."""

import time
import warnings
from pathlib import Path

import keras
import numpy as np
import oracle
import pool
import pytest
import tensorflow as tf

import tfzero
from tfzero import costs
from tfzero.plan.merging import check_merging
from tfzero.plan.mesh import Mesh
from tfzero.plan.placement import split_rows
from tfzero.training.merging import cosine, distance
from tfzero.views.drift import check_drift
from tfzero.workers.resolvers import find_cluster

DATA = oracle.Data(samples=46)  # of 15 rows a batch, the last has one: some workers have none
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
BATCH, EPOCHS = 15, 2
NESTEROV = {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}  # DiLoCo's


def adam_outside():
    return keras.optimizers.Adam(0.05)


class Counts(keras.layers.Layer):
    """State that adds up over rows, once seen in the graph and once declared, and state that counts steps."""

    def build(self, _):
        self.seen = self.add_weight(name="seen", dtype="int64", initializer="zeros", trainable=False)
        self.summed = self.add_weight(name="summed", initializer="zeros", trainable=False, aggregation="sum")
        self.steps = self.add_weight(name="steps", dtype="int64", initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.seen.assign_add(tf.shape(x, tf.int64)[0])
            self.summed.assign_add(tf.reduce_sum(x))
            self.steps.assign_add(1)
        return x


def model_with_state():
    keras.utils.set_random_seed(5)
    layers = [keras.Input((8,)), Counts(), keras.layers.Dense(17, "tanh"), keras.layers.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(3, "softmax", kernel_constraint="non_neg")])


def small_model():
    keras.utils.set_random_seed(5)
    return oracle.dense_model()


def inner(name="adam"):
    return {"adam": lambda: keras.optimizers.Adam(0.01), "sgd": lambda: keras.optimizers.SGD(0.1)}[name]()


def compiled(model, name="adam"):
    model.compile(inner(name), "categorical_crossentropy", metrics=["accuracy"])
    return model


# By hand.


class ByHand:
    """Workers' models in plain Keras, each trained with its own rows, and merged.

    Args:
        make_model: makes each worker's model.
        workers, devices: in whose order rows are dealt.
        every: steps between two merges.
        outer: an optimizer of all workers; None to average.
        optimizer: of each worker, a name of `inner`.
    """

    def __init__(self, make_model, workers, devices, every, outer=None, optimizer="adam"):
        self.models = [make_model() for _ in range(workers)]
        for model in self.models:
            model.compile(inner(optimizer), "categorical_crossentropy", jit_compile=False)
            model.optimizer.build(model.trainable_variables)
        self.devices, self.every, self.outer = devices, every, outer
        first = self.models[0]
        self.common = [keras.Variable(v.numpy(), trainable=True) for v in first.trainable_variables]
        self.state = [v.numpy() for v in first.non_trainable_variables]
        self.rows, self.steps = np.zeros(workers), 0

    def rows_of(self, worker, count):
        workers, parts = len(self.models), len(self.models) * self.devices
        places = [Mesh(workers, self.devices, worker).part(device) for device in range(self.devices)]
        return [row for part in places for row in range(*split_rows(count, parts, part))]

    def fit(self, x, y, epochs=EPOCHS, merges_at=()):
        for _ in range(epochs):
            for number, begin in enumerate(range(0, len(x), BATCH)):
                self.step(x[begin : begin + BATCH], y[begin : begin + BATCH])
                if number in merges_at:
                    self.merge()
            self.merge()

    def step(self, x, y):
        for worker, model in enumerate(self.models):
            rows = self.rows_of(worker, len(x))
            if rows:
                model.train_on_batch(x[rows], y[rows])
                self.rows[worker] += len(rows)
            else:
                model.optimizer.iterations.assign_add(1)
                for each in model.layers:
                    if isinstance(each, Counts):
                        each.steps.assign_add(1)
        self.steps += 1
        if self.steps == self.every:
            self.merge()

    def merge(self):
        if not self.steps:
            return
        weights = self.rows / self.rows.sum()
        values = [[v.numpy() for v in model.trainable_variables] for model in self.models]
        means = [sum(w * value for w, value in zip(weights, each, strict=True)) for each in zip(*values, strict=True)]
        if self.outer is None:
            for variable, mean in zip(self.common, means, strict=True):
                variable.assign(mean)
        else:
            gradients = [variable.numpy() - mean for variable, mean in zip(self.common, means, strict=True)]
            self.outer.apply([tf.constant(g) for g in gradients], self.common)
        states = zip(*[[v.numpy() for v in model.non_trainable_variables] for model in self.models], strict=True)
        for place, (variable, each) in enumerate(zip(self.models[0].non_trainable_variables, states, strict=True)):
            if variable.name in ("seen", "summed"):
                self.state[place] = self.state[place] + sum(value - self.state[place] for value in each)
            elif variable.dtype == "float32":
                self.state[place] = sum(w * value for w, value in zip(weights, each, strict=True))
            else:
                self.state[place] = each[0]
        for variable, trained in zip(self.common, self.models[0].trainable_variables, strict=True):
            if trained.constraint is not None:
                variable.assign(trained.constraint(variable.value))
        for model in self.models:
            for variable, value in zip(model.trainable_variables, self.common, strict=True):
                variable.assign(value)
            for variable, value in zip(model.non_trainable_variables, self.state, strict=True):
                variable.assign(value)
        self.rows[:], self.steps = 0, 0

    def get_weights(self):
        return self.models[0].get_weights()


def assert_close(mine, theirs, **tolerance):
    for ours, expected in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(ours, expected, **(CLOSE | tolerance))


def fit(model, epochs=EPOCHS, **arguments):
    x, y = DATA.arrays()
    arguments = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, **arguments)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_every": 0}, "`sync_every` must be None or an integer of at least 1. Received: sync_every=0"),
        ({"sync_every": True}, "Received: sync_every=True"),
        ({"sync_every": 2.0}, "Received: sync_every=2.0"),
        ({"outer_optimizer": "average"}, "Give `sync_every`, or leave it away"),
        ({"sync_warmup": 3}, "Give `sync_every`, or leave it away"),
        ({"sync_every": 2, "sync_warmup": -1}, "at least 0. Received: sync_warmup=-1"),
        ({"sync_every": 1, "outer_optimizer": "sgd"}, "one more beside that of the model"),
        ({"sync_every": 2, "outer_optimizer": 3}, "a function that makes one"),
        ({"sync_every": 2, "rows": "measured"}, "workers do not wait for each other in a step"),
        ({"sync_every": 2, "hierarchical": True}, "gradients do not leave a worker"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], **settings)


def test_an_optimizer_itself_is_no_outer_optimizer():
    with pytest.raises(ValueError, match="would use TensorFlow before the workers have met"):
        tfzero.ZeroStrategy(2, devices=["CPU:0"], sync_every=2, outer_optimizer=keras.optimizers.SGD(0.7))


def test_what_is_given_decides_how_workers_are_merged():
    def outer(every, given):
        return check_merging(every, given, 0).outer

    assert [outer(1, None), outer(2, None), outer(2, "average"), outer(2, "sgd")] == [
        "average", "DiLoCo", "average", "given",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (lambda: keras.optimizers.Muon(0.1), "applied to parts of variables.*Muon is not known"),
        (
            lambda: keras.optimizers.SGD(0.1, clipnorm=1.0),
            r"\['clipnorm'\] of SGD does not allow",
        ),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True), "use_ema"),
        ("nonsense", r"Could not interpret.*Received: outer_optimizer='nonsense'"),
        ({"class_name": "Nope", "config": {}}, "Received: outer_optimizer="),
        (lambda: 0.7, "must make a Keras optimizer, but made 0.7"),
    ],
)
def test_outer_optimizers_that_cannot_be_applied_to_parts_are_refused(outer, message):
    with pytest.raises(ValueError, match=message):
        tfzero.ZeroStrategy(2, devices=["CPU:0"], sync_every=2, outer_optimizer=outer)


def test_windows_must_end_with_an_execution():
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0"], sync_every=3)
    with strategy.scope():
        model = small_model()
    model.compile(inner(), "categorical_crossentropy", steps_per_execution=2)
    with pytest.raises(ValueError, match="a multiple of `steps_per_execution`. Received: sync_every=3"):
        fit(model)


def test_what_cannot_train_apart_is_refused():
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], sync_every=3)
    with strategy.scope():
        model = compiled(small_model())
        with pytest.raises(ValueError, match="carries a row of state for each sample"):
            keras.Sequential([keras.Input((4, 2), batch_size=6), keras.layers.LSTM(5, stateful=True)])
    model.optimizer.build(model.trainable_variables)

    def apply():
        model.optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)

    with pytest.raises(RuntimeError, match="applied in a loop of your own"):
        tf.function(lambda: strategy.run(apply))()
    with pytest.raises(ValueError, match="Audit the model under a strategy without `sync_every`"):
        tfzero.audit(model, DATA.arrays())


def test_products_of_differences_tell_cosine_and_distance():
    random = np.random.default_rng(0)
    differences, weights = random.normal(size=(3, 50)), np.array([0.5, 0.25, 0.25])
    products = differences @ differences.T
    lengths = np.linalg.norm(differences, axis=1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([products[i, j] / lengths[i] / lengths[j] for i, j in pairs])
    assert cosine(products) == pytest.approx(expected)
    mean = weights @ differences
    spread = sum(w * np.sum((each - mean) ** 2) for w, each in zip(weights, differences, strict=True))
    assert distance(products, weights) == pytest.approx(np.sqrt(spread))
    assert cosine(products[:1, :1]) is None and cosine(np.zeros((2, 2))) is None


# One worker: its devices are synchronous, and merges are steps of the outer optimizer.


@pytest.mark.parametrize(("stage", "devices"), [(0, 2), (2, 3), (3, 2)])
def test_one_worker(stage, devices):
    names = [f"CPU:{k}" for k in range(devices)]
    strategy = tfzero.ZeroStrategy(stage, devices=names, min_shard_elements=8, sync_every=3)
    with strategy.scope():
        model = small_model()
    history = fit(compiled(model), validation_data=DATA.arrays(), validation_batch_size=BATCH).history
    hand = ByHand(small_model, 1, devices, 3, keras.optimizers.SGD(**NESTEROV))
    hand.fit(*DATA.arrays())
    assert_close(model.get_weights(), hand.get_weights())
    assert history["val_loss"][-1] == pytest.approx(hand.models[0].evaluate(*DATA.arrays(), verbose=0), rel=1e-5)


@pytest.mark.parametrize("eager", [False, True])
def test_train_on_batch_and_merge(eager):
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], min_shard_elements=8, sync_every=4)
    hand = ByHand(small_model, 1, 2, 4, keras.optimizers.SGD(**NESTEROV))
    with strategy.scope():
        model = small_model()
    model.compile(inner(), "categorical_crossentropy", run_eagerly=eager)
    x, y = DATA.arrays()
    for _ in range(5):
        model.train_on_batch(x[:BATCH], y[:BATCH])
        hand.step(x[:BATCH], y[:BATCH])
    assert strategy.local_steps.steps == 1
    strategy.merge()
    hand.merge()
    assert_close(model.get_weights(), hand.get_weights())


# Workers.


def made(strategy, make_model=model_with_state, optimizer="adam"):
    with strategy.scope():
        model = make_model()
    return compiled(model, optimizer)


# By name: settings of the strategy, what makes the model, the inner optimizer.
CASES = {
    "DiLoCo": ({"stage": 2, "sync_every": 3}, model_with_state, "adam"),
    "average, whole": ({"stage": 0, "sync_every": 3, "outer_optimizer": "average"}, small_model, "adam"),
    "another outer optimizer": ({"stage": 3, "sync_every": 2, "outer_optimizer": adam_outside}, small_model, "adam"),
    "after each step": ({"stage": 1, "sync_every": 1}, small_model, "sgd"),
    "encoded": (
        {"stage": 3, "sync_every": 3, "compression": "int8", "error_feedback": True}, small_model, "adam",
    ),
}  # fmt: skip


def run_cases() -> dict:
    import tfzero.views.drift

    found = {}
    x, y = DATA.arrays()
    for name, (settings, make_model, optimizer) in CASES.items():
        strategy = tfzero.ZeroStrategy(min_shard_elements=8, **settings)
        model = made(strategy, make_model, optimizer)
        history = fit(model, validation_data=(x, y), validation_batch_size=BATCH)
        steps = strategy.local_steps
        found[name] = {
            "weights": model.get_weights(), "history": history.history, "predictions": model.predict(x, verbose=0),
            "merges": steps.merges, "latest": steps.latest, "report": strategy.report(),
        }  # fmt: skip
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_workers_train_apart(devices):
    fleet = pool.run(run_cases, cpu_devices=devices)
    x, y = DATA.arrays()
    for name, (settings, make_model, optimizer) in CASES.items():
        if make_model is model_with_state and devices == 2:
            continue  # BatchNormalization takes each replica's own mean
        outer = settings.get("outer_optimizer", keras.optimizers.SGD(**NESTEROV))
        outer = None if outer == "average" or settings["sync_every"] == 1 else outer() if callable(outer) else outer
        hand = ByHand(make_model, 2, devices, settings["sync_every"], outer, optimizer)
        hand.fit(x, y)
        loose = {"rtol": 0.02, "atol": 2e-3} if "compression" in settings else {}
        for found in (each[name] for each in fleet):
            assert_close(found["weights"], hand.get_weights(), **loose)
            assert_close(found["weights"], fleet[0][name]["weights"], rtol=0, atol=0)
            loss = hand.models[0].evaluate(x, y, verbose=0)
            assert found["history"]["val_loss"][-1] == pytest.approx(loss, rel=2e-2 if loose else 1e-4)
            assert found["history"] == fleet[0][name]["history"]
            expected = hand.models[0].predict(x, verbose=0)
            np.testing.assert_allclose(found["predictions"], expected, **(loose or {"rtol": 1e-4, "atol": 1e-5}))
    for name, (settings, *_) in CASES.items():
        if "compression" in settings:  # in blocks of 256
            continue
        report = fleet[0][name]["report"]
        own = {key: value for key, value in settings.items() if key != "outer_optimizer"}
        setup = costs.Setup(2 * devices, replicas_per_worker=devices, **own)
        merged = settings["sync_every"] * (setup.sent_bytes() - setup.of_one_worker.sent_bytes())
        parameters = sum(np.prod(variable.shape) for variable in report.variables)
        assert report.merge_bytes == pytest.approx(merged * parameters, rel=0.35)  # so small, they are padded by a lot
    of_two = fleet[0]["DiLoCo"]
    assert of_two["merges"] == 4 and of_two["latest"].steps == 1  # 4 batches an epoch
    assert "3 steps alone, then a merge of" in of_two["report"].options["sync_every"]
    assert of_two["report"].options["outer_optimizer"] == "SGD"


def test_one_step_of_sgd_and_an_average_are_a_synchronous_step():
    arguments = {"optimizer": inner("sgd"), "loss": "categorical_crossentropy"}
    settings = {"batch_size": BATCH, "epochs": EPOCHS, "only_fit": True}
    reference = oracle.train(small_model(), *DATA.arrays(), arguments, **settings)
    fleet = pool.run(run_synchronously)
    for weights in fleet:
        assert_close(weights, reference.weights, rtol=1e-5, atol=1e-6)


def run_synchronously():
    model = made(tfzero.ZeroStrategy(2, sync_every=1, min_shard_elements=8), small_model, "sgd")
    fit(model)
    return model.get_weights()


def test_synchronous_steps_come_first():
    for weights in pool.run(run_warmed_up, cpu_devices=2):
        assert_close(weights, reference_of_warmed_up().get_weights())


def run_warmed_up():
    strategy = tfzero.ZeroStrategy(2, sync_every=2, sync_warmup=5, min_shard_elements=8)
    model = made(strategy, small_model)
    fit(model)
    assert strategy.local_steps.merges == 2  # of 8 steps 5 are synchronous
    return model.get_weights()


def reference_of_warmed_up():
    x, y = DATA.arrays()
    hand = ByHand(small_model, 2, 2, 2, keras.optimizers.SGD(**NESTEROV))
    first = hand.models[0]
    for begin in (0, 15, 30, 45, 0):
        first.train_on_batch(x[begin : begin + BATCH], y[begin : begin + BATCH])
    for model in hand.models:
        model.set_weights(first.get_weights())
        for mine, theirs in zip(model.optimizer.variables, first.optimizer.variables, strict=True):
            mine.assign(theirs.numpy())
    for variable, trained in zip(hand.common, first.trainable_variables, strict=True):
        variable.assign(trained.numpy())
    for begin in (15, 30, 45):
        hand.step(x[begin : begin + BATCH], y[begin : begin + BATCH])
    hand.merge()
    return first


# What happens in the middle of a window.


class Watch(keras.callbacks.Callback):
    """Notes weights where callbacks see them, and saves in the middle of a window."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.at_ends, self.within = Path(folder), [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.within.append(self.model.get_weights())
            check_drift(self.model)  # replicas of one worker are equal
            self.model.save_weights(self.folder / "middle.weights.h5")

    def on_epoch_end(self, epoch, logs=None):
        self.at_ends.append(self.model.get_weights())
        check_drift(self.model)


class StopsOne(keras.callbacks.Callback):
    """Stops the training on one worker only."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 and self.model.distribute_strategy.extended.mesh.worker == 1:
            self.model.stop_training = True


class Fails(keras.callbacks.Callback):
    """Ends the training with an error on all workers."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptedError


SETTINGS = {"sync_every": 3, "min_shard_elements": 8, "compression": "int8", "error_feedback": True}


def run_interrupted(folder) -> dict:
    found, folder = {}, Path(folder)
    strategy = tfzero.ZeroStrategy(2, sync_every=3, min_shard_elements=8)
    model, watch = made(strategy, small_model), Watch(folder)
    with strategy.scope():
        fit(model, callbacks=keras.callbacks.CallbackList([watch], add_history=True, model=model, epochs=EPOCHS))
    found["watched"] = {"ends": watch.at_ends, "within": watch.within, "weights": model.get_weights()}
    history = fit(made(strategy, small_model), callbacks=[StopsOne()], epochs=3, validation_data=DATA.arrays())
    found["stopped"] = history.history

    def callback(name):
        return tfzero.CheckpointCallback(folder / name, save_every_steps=2)

    model = made(tfzero.ZeroStrategy(3, **SETTINGS), small_model)
    fit(model, callbacks=[callback("whole")], epochs=3)
    found["whole"] = model.get_weights()
    model = made(tfzero.ZeroStrategy(3, **SETTINGS), small_model)
    with pytest.raises(InterruptedError):
        fit(model, callbacks=[callback("resumed"), Fails(7)], epochs=3)
    model = made(tfzero.ZeroStrategy(3, **SETTINGS), small_model)
    fit(model, callbacks=[callback("resumed")], epochs=3)
    found["resumed"] = model.get_weights()
    for name, settings in (
        ("synchronous", {}),
        ("other", {"sync_every": 2, "outer_optimizer": adam_outside}),
        ("average", {"sync_every": 4, "outer_optimizer": "average", "compression": "bf16"}),
    ):
        model = made(tfzero.ZeroStrategy(2, min_shard_elements=8, **settings), small_model)
        tfzero.load_checkpoint(model, folder / "whole")
        found[name] = model.get_weights()
        fit(model, epochs=1)
        found[f"{name}, later"] = model.get_weights()
    tfzero.save_checkpoint(model, folder / "of average")
    model = made(tfzero.ZeroStrategy(3, **SETTINGS), small_model)
    tfzero.load_checkpoint(model, folder / "of average")
    found["back"] = model.get_weights()
    fit(model, epochs=1)
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_merges_and_checkpoints_within_a_window(devices, tmp_path):
    fleet = pool.run(run_interrupted, args=(str(tmp_path),), cpu_devices=devices)
    x, y = DATA.arrays()
    hand = ByHand(small_model, 2, devices, 3, keras.optimizers.SGD(**NESTEROV))
    hand.fit(x, y, epochs=1, merges_at=(0,))
    of_first = hand.get_weights()
    hand.fit(x, y, epochs=1, merges_at=(0,))
    for found in fleet:
        assert_close(found["watched"]["ends"][0], of_first)
        assert_close(found["watched"]["weights"], hand.get_weights())
        assert len(found["stopped"]["loss"]) == 1 and found["stopped"] == fleet[0]["stopped"]
        for name, weights in found.items():
            if name not in ("watched", "stopped"):
                assert_close(weights, fleet[0][name], rtol=0, atol=0)
        assert_close(found["resumed"], found["whole"], rtol=1e-6, atol=1e-7)
        for name in ("synchronous", "other", "average"):
            assert_close(found[name], found["whole"], rtol=0, atol=0)
        assert_close(found["back"], found["average, later"], rtol=0, atol=0)
    mine, theirs = (found["watched"]["within"][0][0] for found in fleet)
    assert np.abs(mine - theirs).max() > 1e-4
    alone = small_model()
    alone.load_weights(tmp_path / "middle.weights.h5")
    single = compiled(small_model())
    tfzero.load_checkpoint(single, tmp_path / "whole")
    assert_close(single.get_weights(), fleet[0]["whole"], rtol=0, atol=0)


def run_with_other_outer_optimizers():
    index = find_cluster(None).index
    outer = keras.optimizers.SGD if index else keras.optimizers.Adam
    strategy = tfzero.ZeroStrategy(2, sync_every=2, outer_optimizer=outer)
    model = made(strategy, small_model)
    with pytest.raises(ValueError, match="The workers' outer optimizers differ"):
        fit(model)
    return True


def test_outer_optimizers_must_be_the_same():
    assert pool.run(run_with_other_outer_optimizers) == [True, True]


def run_unevenly():
    """The second worker is slower than its timeout, while the first one waits for it."""
    strategy = tfzero.ZeroStrategy(2, sync_every=4, timeout_seconds=2, compare_batches=0)
    model, waits = made(strategy, small_model), strategy.extended.mesh.worker == 1
    fit(model, epochs=1)  # the first step is traced
    pause = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: time.sleep(0.8 if waits else 0.15))
    fit(model, epochs=1, callbacks=[pause])
    return strategy.local_steps.latest.waited_seconds


def test_a_slow_worker_is_waited_for():
    first, second = pool.run(run_unevenly, is_last=True)
    assert first > 2 > second


# Models, optimizers and state of other kinds: whatever is merged, all workers have the same afterwards.


class TwoHalves(keras.Model):
    """Two parts with an optimizer each; `compile` gives it a third one, which its step never applies."""

    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(5)
        self.parts = [keras.layers.Dense(6, "tanh"), keras.layers.Dense(3, "softmax")]
        self.first, self.second = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1)

    def call(self, x):
        return self.parts[1](self.parts[0](x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        for part, optimizer in zip(self.parts, (self.first, self.second), strict=True):
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"loss": loss, "rows": tf.cast(tf.shape(x)[0], tf.float32) + tf.reduce_sum(x)}


class Follows(keras.layers.Layer):
    """State that follows weights, and what a layer knows of its latest batch."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4))
        self.followed = self.add_weight(shape=(shape[-1], 4), trainable=False, initializer="zeros")
        self.latest = self.add_weight(dtype="int64", shape=(), trainable=False, initializer="zeros")
        self.steps = self.add_weight(dtype="int64", shape=(), trainable=False, initializer="zeros")

    def call(self, x, training=False):
        if training:
            self.followed.assign(0.5 * self.followed + 0.5 * self.kernel)
            self.latest.assign(tf.shape(x, tf.int64)[0])
            self.steps.assign_add(1)
        return x @ self.kernel


def following_model():
    keras.utils.set_random_seed(5)
    layers = [keras.Input((8,)), Follows(), keras.layers.SpectralNormalization(keras.layers.Dense(5))]
    return keras.Sequential([*layers, keras.layers.Dense(3, "softmax")])


def all_values(*models):
    return [v.numpy() for model in models for v in model.variables if v.dtype != "string"]


def run_other_models(devices) -> dict:
    found = {}
    x, y = DATA.arrays()
    own = {"optimizer": None, "loss": "categorical_crossentropy"}
    for name, outer in (("once", lambda: keras.optimizers.SGD(1.0)), ("average", "average")):
        strategy = tfzero.ZeroStrategy(2, sync_every=3, outer_optimizer=outer, min_shard_elements=8)
        with strategy.scope():
            model = TwoHalves()
        model.compile(**own | {"optimizer": "rmsprop"})
        found[f"halves, logs, {name}"] = fit(model, epochs=1).history
        found[f"halves, {name}"] = all_values(model)

    strategy = tfzero.ZeroStrategy(3, sync_every=4, min_shard_elements=8)
    with strategy.scope():
        models = [following_model(), small_model()]
    for model in models:
        model.compile(inner(), "categorical_crossentropy")
    for _ in range(3):
        for model in models:
            model.train_on_batch(x[:BATCH], y[:BATCH])
    strategy.merge()
    found["two models"] = all_values(*models)
    first, second = models
    found["latest"], found["steps"] = int(first.layers[0].latest.numpy()), int(first.layers[0].steps.numpy())
    second.train_on_batch(x[:BATCH], y[:BATCH])
    with strategy.scope():
        part = keras.Model(second.inputs, second.layers[0].output)
    found["of a part"] = part.predict(x, verbose=0)
    second.train_on_batch(x[:BATCH], y[:BATCH])
    found["of a batch"] = second.predict_on_batch(x[:BATCH])
    found["expected of a batch"] = second.predict(x[:BATCH], verbose=0)
    second.train_on_batch(x[:BATCH], y[:BATCH])
    given = [np.full_like(w, 0.1) for w in second.get_weights()]
    second.set_weights(given)
    strategy.merge()
    found["given"] = second.get_weights()
    second.train_on_batch(x[:BATCH], y[:BATCH])
    second.layers[0].trainable = False
    second.compile(inner(), "categorical_crossentropy")
    fit(second, epochs=1)
    found["compiled again"] = all_values(second)

    strategy = tfzero.ZeroStrategy(2, sync_every=3, min_shard_elements=8)
    with strategy.scope():
        model = small_model()
    model.compile(inner(), "categorical_crossentropy", run_eagerly=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, epochs=1)
    found["eagerly"] = all_values(model)

    strategy = tfzero.ZeroStrategy(2, sync_every=3, min_shard_elements=8)
    model, worker = made(strategy, small_model), strategy.extended.mesh.worker

    def read(context):
        rows = tf.data.Dataset.from_tensor_slices((x, y)).take(24 if worker else 40)
        return rows.batch(context.get_per_replica_batch_size(8 * devices))

    model.fit(strategy.distribute_datasets_from_function(read), epochs=2, verbose=0, shuffle=False)
    found["uneven data"] = all_values(model)
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_other_models_and_state(devices):
    first, second = pool.run(run_other_models, args=(devices,), cpu_devices=devices)
    assert first["halves, logs, once"] == second["halves, logs, once"]
    assert_close(first["halves, once"], first["halves, average"])
    for name in ("halves, once", "two models", "compiled again", "eagerly", "uneven data"):
        assert_close(first[name], second[name], rtol=0, atol=0)
    for found in (first, second):
        assert found["latest"] == BATCH and found["steps"] == 3
        np.testing.assert_allclose(found["of a part"], first["of a part"], rtol=0, atol=0)
        np.testing.assert_allclose(found["of a batch"], found["expected of a batch"], rtol=1e-6)
        assert all(np.all(weight == np.float32(0.1)) for weight in found["given"])


def test_moving_averages_of_weights_are_refused():
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0"], sync_every=2)
    with strategy.scope():
        model = small_model()
    model.compile(keras.optimizers.Adam(0.01, use_ema=True), "categorical_crossentropy")
    with pytest.raises(ValueError, match=r"`use_ema=True` of \['Adam'\] keeps averages"):
        fit(model)


def test_late_gathers_count_no_rows():
    def outcome(overlaps):
        strategy = tfzero.ZeroStrategy(
            2, devices=["CPU:0", "CPU:1"], sync_every=2, min_shard_elements=8, overlap_param_gather=overlaps
        )
        with strategy.scope():
            model = small_model()
        model.compile(inner(), "categorical_crossentropy", steps_per_execution=2)
        fit(model)
        return model.get_weights(), strategy.extended.apart.take_rows()

    (mine, rows), (theirs, _) = outcome(True), outcome(False)
    assert_close(mine, theirs)
    assert rows == 0
