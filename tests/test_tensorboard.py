"""What TensorBoard is shown is true, reaches its page, and costs the training nothing but time."""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers
from keras import optimizers as ko
from marks import sweep
from oracle import Data, dense_model

import tfzero
from tfzero.collectives.group import Group
from tfzero.collectives.rings import Rings
from tfzero.views import gradient_time
from tfzero.views.gradient_time import UnmeasurableError, gradient_seconds
from tfzero.views.picture import MOST_ROWS, Holding, draw, holdings

SCALARS = [
    "gradient/norm", "input/read_bytes_per_step", "memory/current_bytes", "memory/peak_bytes", "time/exposed_seconds",
    "time/input_seconds", "time/step_seconds", "wire/bytes_per_step",
]  # fmt: skip
START_SECONDS, PAGE_SECONDS = 120, 200  # limits


def make_strategy(stage=2, replicas=2, **settings):
    return tfzero.ZeroStrategy(stage, devices=[f"CPU:{k}" for k in range(replicas)], min_shard_elements=16, **settings)


def random_model():
    """A model whose layers keep statistics and seeds, and add to the loss."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(17, activation="relu", activity_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.4),
            layers.Dense(3, activation="softmax"),
        ]
    )


def compiled(strategy, make_model=dense_model, optimizer="adam", **arguments):
    with strategy.scope():
        model = make_model()
    model.compile(optimizer, "categorical_crossentropy", **arguments)
    return model


def fit(model, *callbacks, **arguments):
    x, y = Data().arrays()
    return model.fit(x, y, callbacks=callbacks, **({"batch_size": 15, "verbose": 0, "shuffle": False} | arguments))


def written(log_dir) -> dict[str, dict[int, object]]:
    """By tag and step what was written: numbers, or a picture as PNG."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(log_dir) / "tfzero"), size_guidance={"tensors": 0}).Reload()

    def value(tensor):
        array = tf.make_ndarray(tensor)
        return float(array) if array.ndim == 0 else array[2]

    tags = events.Tags()["tensors"]
    return {tag: {event.step: value(event.tensor_proto) for event in events.Tensors(tag)} for tag in tags}


def norms_on_one_device(optimizer, initial, epochs=1) -> list[float]:
    """The norm of the gradient that plain Keras applies, after each batch of 15. Without graphs, which cost more."""
    x, y = Data().arrays()
    model = dense_model()
    model.set_weights(initial)
    model.compile(optimizer, "categorical_crossentropy", run_eagerly=True)
    loss, found, gathered = keras.losses.CategoricalCrossentropy(), [], []
    steps = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    for batch in [slice(k, k + 15) for k in range(0, len(x), 15)] * epochs:
        with tf.GradientTape() as tape:
            value = loss(y[batch], model(x[batch], training=True))
        gathered.append(tape.gradient(value, [v.value for v in model.trainable_variables]))
        if len(gathered) == steps:
            means = [tf.add_n(of_variable) / steps for of_variable in zip(*gathered, strict=True)]
            norm, gathered = float(tf.linalg.global_norm(means)), []
            found.append(norm)
        else:
            found.append(found[-1] if found else 0.0)
        model.train_on_batch(x[batch], y[batch])
    return found


# It shows what is there, and changes nothing.


@pytest.mark.parametrize("stage", [sweep(0), sweep(2), 3])
def test_weights_are_bit_for_bit_those_without_it(stage, tmp_path):
    left = []
    for callbacks in ([], [tfzero.TensorBoardCallback(tmp_path, every_steps=1)]):
        model = compiled(make_strategy(stage), random_model, "adam", metrics=["accuracy"])
        history = fit(model, *callbacks).history
        variables = [*model.variables, *model.optimizer.variables]
        left.append(([np.array(keras.ops.convert_to_numpy(v)) for v in variables], history))
    for without, with_it in zip(left[0][0], left[1][0], strict=True):
        np.testing.assert_array_equal(without, with_it)
    assert left[0][1] == left[1][1]
    found = written(tmp_path)
    assert sorted(found) == sorted([*SCALARS, "plan"])
    assert list(found["gradient/norm"]) == [*range(1, 5)] and list(found["time/exposed_seconds"]) == [*range(2, 5)]
    for step, seconds in found["time/step_seconds"].items():
        assert 0 <= found["time/exposed_seconds"][step] < seconds
        assert 0 < found["time/input_seconds"][step] < seconds
    assert set(found["wire/bytes_per_step"].values()) == {model.distribute_strategy.report().sent_bytes}


@pytest.mark.parametrize(
    ("stage", "make_optimizer"),
    [
        (0, lambda: ko.Adam(0.02, global_clipnorm=0.1)),
        (1, lambda: ko.Muon(0.02, gradient_accumulation_steps=2)),
        (2, lambda: ko.LossScaleOptimizer(ko.Adam(0.02, clipnorm=0.1), initial_scale=8.0)),
        (3, lambda: ko.Adam(0.02, gradient_accumulation_steps=2, clipnorm=0.1, loss_scale_factor=4.0)),
    ],
)
def test_the_norm_is_that_of_one_device(stage, make_optimizer, tmp_path):
    model = compiled(make_strategy(stage), optimizer=make_optimizer())
    initial = model.get_weights()
    fit(model, tfzero.TensorBoardCallback(tmp_path, every_steps=1, picture=False), epochs=2)
    expected = norms_on_one_device(make_optimizer(), initial, epochs=2)
    np.testing.assert_allclose(list(written(tmp_path)["gradient/norm"].values()), expected, rtol=1e-4)


def test_several_optimizers_add_to_one_norm(tmp_path):
    sgd, adam = ko.SGD(0.05), ko.Adam(0.01)
    optimizer = ko.MultiOptimizer(lambda variable: sgd if "kernel" in variable.path else adam)
    model = compiled(make_strategy(2), optimizer=optimizer)
    x, y = Data().arrays()
    with tf.GradientTape() as tape:
        loss = keras.losses.CategoricalCrossentropy()(y[:15], model(x[:15]))
    gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
    model.fit(x[:15], y[:15], batch_size=15, verbose=0, callbacks=[tfzero.TensorBoardCallback(tmp_path, 1)])
    assert len(model.optimizer.trained.optimizers) == 2
    np.testing.assert_allclose(written(tmp_path)["gradient/norm"][1], tf.linalg.global_norm(gradient), rtol=1e-4)


def test_nobody_pays_for_a_norm_that_nobody_asks_for(tmp_path):
    model = compiled(make_strategy(2))
    fit(model)
    assert model.optimizer.gradient_norm is None and model.optimizer.trained.squared_norms == ()
    fit(model, tfzero.TensorBoardCallback(tmp_path, picture=False))
    assert model.optimizer.gradient_norm > 0, "the step was traced again"
    assert not model.optimizer.watch_norm()


def test_memory_is_the_allocators(tmp_path):
    model = compiled(make_strategy(2), lambda: keras.Sequential([keras.Input((512,)), layers.Dense(1024)]), "adam")
    model.compile("adam", "mse")
    x, y = np.ones((8, 512), "float32"), np.ones((8, 1024), "float32")
    tf.config.experimental.reset_memory_stats("CPU:0")
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[tfzero.TensorBoardCallback(tmp_path, 2, picture=False)])
    found = written(tmp_path)
    kernel = model.distribute_strategy.report().variables[0]  # small memory is not counted
    held = 2 * (kernel.parameter_bytes + kernel.slot_bytes)
    for step in (2, 4):
        current, peak = found["memory/current_bytes"][step], found["memory/peak_bytes"][step]
        assert held <= current < peak
    after = tf.config.experimental.get_memory_info("CPU:0")
    assert after["peak"] < found["memory/peak_bytes"][4], "it was reset"


def test_loss_scale_and_skipped_steps(tmp_path):
    optimizer = ko.LossScaleOptimizer(ko.Adam(0.01), initial_scale=2.0**127, dynamic_growth_steps=1000)
    model = compiled(make_strategy(2), optimizer=optimizer)
    x, y = Data().arrays()
    weights = np.full(len(x), 16.0, "float32")
    callback = tfzero.TensorBoardCallback(tmp_path, every_steps=1, picture=False)
    model.fit(x, y, sample_weight=weights, batch_size=15, epochs=3, verbose=0, callbacks=[callback])
    found = written(tmp_path)
    skipped = found["loss_scale/skipped_steps"]
    assert skipped[1] == 1 and 1 <= skipped[12] < 12
    assert skipped[12] == 12 - int(model.optimizer.iterations)
    assert [found["loss_scale/scale"][step] for step in skipped] == [2.0 ** (127 - count) for count in skipped.values()]


def test_steps_go_on(tmp_path):
    """Over `fit`s, in several batches at once, and when another callback goes on with a trained model."""
    model = compiled(make_strategy(2), steps_per_execution=2)
    callback = tfzero.TensorBoardCallback(tmp_path / "a", every_steps=3, picture=False)
    fit(model, callback, epochs=2)
    fit(model, callback)
    assert list(written(tmp_path / "a")["gradient/norm"]) == [4, 6, 10, 12]
    fit(model, tfzero.TensorBoardCallback(tmp_path / "b", every_steps=2, picture=False))
    found = written(tmp_path / "b")
    assert list(found["gradient/norm"]) == [14, 16] and list(found["time/step_seconds"]) == [16]


# Two real workers.


def train_beside(log_dir) -> dict:
    """Two trainings, with the callback and without; both workers write down what they have."""
    left = []
    for callbacks in ([], [tfzero.TensorBoardCallback(log_dir, every_steps=1)]):
        strategy = tfzero.ZeroStrategy(3, min_shard_elements=16)
        keras.utils.set_random_seed(5)
        model = compiled(strategy, optimizer=ko.Adam(0.02, global_clipnorm=0.1))
        initial = model.get_weights()
        fit(model, *callbacks)
        left.append(model.get_weights())
    same = all(np.array_equal(one, other) for one, other in zip(*left, strict=True))
    sent = strategy.report().sent_bytes
    return {"initial": initial, "same": same, "norm": model.optimizer.gradient_norm, "sent": sent}


def test_two_workers(tmp_path):
    first, second = pool.run(train_beside, workers=2, args=(str(tmp_path),))
    assert first["same"] and second["same"]
    found = written(tmp_path)
    assert len(list((tmp_path / "tfzero").glob("events*"))) == 1, "one worker writes"
    expected = norms_on_one_device(ko.Adam(0.02, global_clipnorm=0.1), first["initial"])
    np.testing.assert_allclose(list(found["gradient/norm"].values()), expected, rtol=1e-4)
    assert first["norm"] == second["norm"] == pytest.approx(expected[-1], rel=1e-4)
    assert sorted(found) == sorted([*SCALARS, "plan"]) and found["wire/bytes_per_step"][1] == first["sent"]


# The gradient alone.


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.int8, tf.bool], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("two_level", [False, True])
def test_silent_collectives_give_own_values_in_the_shapes_of_results(dtype, two_level):
    group = Group([f"/CPU:{k}" for k in range(3)], 3, 0, Rings(), two_level)
    values = [tf.cast(tf.reshape(tf.range(6), [3, 2]) + k, dtype) for k in range(3)]
    methods = ["all_reduce", "broadcast", "all_gather", "all_gather_ragged"]
    if dtype in (tf.float32, tf.bfloat16):
        methods += ["all_to_all", "reduce_scatter", "sum_within"]
    before = group.keys.traced.copy()
    with group.silenced():
        silent = {name: group.launch(getattr(group, name), values) for name in methods}
    assert group.keys.traced == before
    loud = {name: group.launch(getattr(group, name), values) for name in methods}
    for name in methods:
        flat = zip(tf.nest.flatten(silent[name]), tf.nest.flatten(loud[name]), strict=True)
        assert all(mine.shape == real.shape and mine.dtype == real.dtype for mine, real in flat), name
        own = values[1][1] if name == "reduce_scatter" else values[1]
        for part in tf.nest.flatten(silent[name][1]) if name == "all_gather_ragged" else tf.unstack(silent[name][1]):
            if name in ("all_gather", "all_gather_ragged"):
                assert np.array_equal(tf.cast(part, tf.int32), tf.cast(own, tf.int32))
        if name in ("all_reduce", "broadcast", "reduce_scatter"):
            assert np.array_equal(tf.cast(silent[name][1], tf.int32), tf.cast(own, tf.int32))
    np.testing.assert_array_equal(tf.cast(loud["broadcast"][2], tf.int32), tf.cast(values[0], tf.int32))


@pytest.mark.parametrize("stage", [sweep(2), 3])
def test_the_gradient_alone_is_all_of_the_gradient_and_no_more(stage, monkeypatch):
    graphs = []
    model = compiled(make_strategy(stage), metrics=["accuracy"])
    fit(model)
    measure = gradient_time._seconds_of
    monkeypatch.setattr(gradient_time, "_seconds_of", lambda *args: (graphs.append(args[0].graph), measure(*args))[1])
    assert gradient_seconds(model, [8, 7]) > 0
    operations = graphs[-1].get_operations()
    # Of two dense layers: 2 products forward and 3 backward, on each of 2 replicas.
    assert sum(operation.type == "MatMul" for operation in operations) == 2 * (2 + 3)
    shapes = {tuple(o.outputs[0].shape) for o in operations if o.type == "MatMul" and "gradient_tape" not in o.name}
    assert shapes == {(8, 17), (7, 17), (8, 3), (7, 3)}
    kinds = {operation.type for operation in operations}
    assert not any(kind.startswith(("Assign", "Collective")) for kind in kinds) and "ReadVariableOp" in kinds


class OwnStep(keras.Model):
    """A discriminator's optimizer beside the model's own, built in the first step."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, activation="softmax")
        self.second = ko.SGD(0.01)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        for optimizer in (self.optimizer, self.second):
            optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return self.compute_metrics(x, y, self(x))


class Counting(layers.Layer):
    """Counts its calls in a variable that Keras does not know."""

    def __init__(self):
        super().__init__()
        self.calls = tf.Variable(0, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def call(self, x):
        self.calls.assign_add(1)
        return x


def test_a_train_step_of_its_own_is_not_measured_and_has_all_its_norms(tmp_path):
    model = compiled(make_strategy(2), OwnStep)
    with pytest.warns(UserWarning, match="no time/exposed_seconds.*`train_step` of its own"):
        fit(model, tfzero.TensorBoardCallback(tmp_path, every_steps=2))
    found = written(tmp_path)
    assert "time/exposed_seconds" not in found and list(found["time/step_seconds"]) == [2, 4]
    assert found["gradient/norm"].keys() == found["gradient/norm_of_second"].keys() == {2, 4}
    assert min(found["gradient/norm_of_second"].values()) > 0


def test_what_would_change_something_is_not_measured(tmp_path):
    kept = []

    def model():
        kept.append(Counting())
        return keras.Sequential([keras.Input((8,)), kept[0], layers.Dense(3, activation="softmax")])

    with pytest.warns(UserWarning, match="AssignAddVariableOp"):
        fit(compiled(make_strategy(2), model), tfzero.TensorBoardCallback(tmp_path, every_steps=1))
    assert int(kept[0].calls.numpy()) == 4, "once in each of four batches"


def test_residuals_of_error_feedback_are_left_alone():
    strategy = make_strategy(3, compression="int8", error_feedback=True)
    model = compiled(strategy, lambda: keras.Sequential([keras.Input((8,)), layers.Dense(3)]), "sgd")
    fit(model)
    with pytest.raises(UnmeasurableError, match="would change something.*Assign"):
        gradient_seconds(model, [8, 7])


def test_unknown_shapes_and_refused_zeros_are_no_error():
    class Strict(layers.Layer):
        def call(self, x):
            tf.debugging.assert_greater(tf.norm(x, axis=-1), 0.0, "nothing but zeros")
            return x

    model = compiled(make_strategy(2), lambda: keras.Sequential([keras.Input((8,)), Strict(), layers.Dense(3)]))
    fit(model)
    with pytest.raises(UnmeasurableError, match="(?s)refuses a batch of zeros.*nothing but zeros"):
        gradient_seconds(model, [8, 7])
    model.train_function.element_spec = (tf.TensorSpec([None, None]), tf.TensorSpec([None, 3]))
    with pytest.raises(UnmeasurableError, match="shapes that are not known before"):
        gradient_seconds(model, [8, 7])
    model.run_eagerly = True
    with pytest.raises(UnmeasurableError, match="run_eagerly"):
        gradient_seconds(model, [8, 7])


# The picture.


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adam"), (2, "muon"), (3, "muon"), (3, "adam")])
def test_the_picture_shows_what_the_report_says(stage, optimizer):
    strategy = make_strategy(stage)
    model = compiled(strategy, optimizer=optimizer)
    model.optimizer.build(model.trainable_variables)
    rows = holdings([model.optimizer.trained])
    reported = {v.name: (v.parameter_bytes + v.slot_bytes, v.placement) for v in strategy.report().variables}
    assert {row.name: row.ranks[0].total() for row in rows} == {name: held for name, (held, _) in reported.items()}
    assert [row.total_bytes for row in rows] == sorted((row.total_bytes for row in rows), reverse=True)
    for row in rows:
        placement = reported[row.name][1]
        if placement.startswith("owned"):
            assert [rank for rank in (0, 1) if row.ranks[rank]["owned"]] == [int(placement[-1])]
        assert (row.ranks[0]["sharded"] > 0) == (placement == "sharded" or (stage == 3 and placement != "whole"))
        assert (row.ranks[0]["whole"] > 0) == (stage < 3 or placement == "whole")


def test_the_picture_of_many_variables_on_many_ranks():
    few = draw([Holding("kernel", (Counter(sharded=8), Counter(sharded=8)))])
    rows = [Holding(f"kernel_{k}", (Counter(owned=1000 - k),) * 64) for k in range(100)]
    many = draw(rows)
    assert few.dtype == np.uint8 and few.shape[2] == 4 and many.shape > few.shape
    assert many.shape == draw(rows[: MOST_ROWS + 1]).shape, "the rest is one row"
    assert (few[..., :3] == [27, 108, 168]).all(-1).mean() > 0.1, "blue bars"
    owned = draw([Holding("kernel", (Counter(owned=8), Counter(owned=8)))])
    assert (owned[..., :3] == [217, 95, 2]).all(-1).mean() > 0.1, "orange bars"


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "`log_dir` must be the path of a directory. Received: log_dir=None"),
        (("",), "`log_dir` must be"),
        (("logs", 0), "`every_steps` must be an integer of at least 1. Received: every_steps=0"),
        (("logs", 2.5), "`every_steps` must be an integer"),
        (("logs", 1, "yes"), "`picture` must be True or False. Received: picture='yes'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tfzero.TensorBoardCallback(*arguments)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="needs the package matplotlib: `pip install matplotlib`, or pass picture=F"):
        tfzero.TensorBoardCallback("logs")
    tfzero.TensorBoardCallback("logs", picture=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="needs the package tensorboard: `pip install tensorboard`"):
        tfzero.TensorBoardCallback("logs", picture=False)


def test_a_model_of_another_strategy(tmp_path):
    model = dense_model()
    model.compile("sgd", "categorical_crossentropy")
    with pytest.raises(ValueError, match="needs a model of a ZeroStrategy; with others use keras.callbacks.TensorB"):
        fit(model, tfzero.TensorBoardCallback(tmp_path))
    assert not list(tmp_path.iterdir())


# A browser.


@contextlib.contextmanager
def tensorboard_server(log_dir, folder):
    """The address of a TensorBoard of these logs."""
    output = folder / "server.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "127.0.0.1", "--port", "0"]
    with output.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and server.poll() is None and "http://" not in output.read_text():
            time.sleep(0.1)
        found = output.read_text().partition("http://")[2].split("/")[0]
        assert found, output.read_text()
        yield f"http://{found}/"
    finally:
        server.kill()
        server.wait(10)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: `apt-get install chromium`")
def test_the_page_shows_it_beside_keras(tmp_path):
    logs = tmp_path / "logs"
    model = compiled(make_strategy(2))
    own = keras.callbacks.TensorBoard(logs, write_graph=False)
    fit(model, own, tfzero.TensorBoardCallback(logs, every_steps=1), epochs=2)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--window-size=1600,5000", "--virtual-time-budget=30000", "--dump-dom"]  # fmt: skip
    missing, deadline = ["everything"], time.monotonic() + PAGE_SECONDS
    with tensorboard_server(logs, tmp_path) as address:
        while missing and time.monotonic() < deadline:  # the server may still be reading, and cards come one by one
            with tempfile.TemporaryDirectory() as profile:
                command = ["chromium", *options, f"--user-data-dir={profile}", f"{address}?tagFilter=.%2B#timeseries"]
                page = subprocess.run(command, capture_output=True, text=True, timeout=PAGE_SECONDS).stdout
            missing = [tag for tag in [*SCALARS, "plan", "epoch_loss"] if f'title="{tag}"' not in page]
    titles = re.findall('title="([^"]*)"', page)
    assert not missing, f"{missing} are not among {titles}"
