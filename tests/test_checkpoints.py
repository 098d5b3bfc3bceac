"""What is saved in shards is loaded whole, in other shards, or by plain Keras, and training goes on as if nothing was.

Replicas are logical devices here; `test_survival.py` does the same with processes that are killed.
"""

import functools
import itertools
import json
import os
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras import optimizers as ko
from marks import FLEET_SECONDS, sweep

import tfzero

ALL = list(itertools.product((1, 2, 3, 4), (0, 1, 2, 3)))
SPREAD = {
    "adam": {((1, 0), (3, 3))},
    "adafactor": {((3, 3), (4, 2))},
}
TOKENS = np.random.default_rng(0).integers(0, 11, (46, 3))
TARGETS = np.random.default_rng(1).normal(size=(46, 3)).astype("float32")


def make_strategy(devices=2, stage=2, **settings):
    names = [f"CPU:{k}" for k in range(devices)]
    return tfzero.ZeroStrategy(stage, devices=names, **{"min_shard_elements": 8} | settings)


def menagerie():
    """A prime number of rows, statistics that are no weights, a seed, a layer used twice, a frozen one, a scalar."""

    class Scale(layers.Layer):
        def build(self, _):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return x * self.scale

    tokens = keras.Input((3,), dtype="int32")
    twice = layers.Dense(5, activation="tanh")
    x = twice(twice(layers.Embedding(11, 5)(tokens)))
    x = layers.Dropout(0.3, seed=3)(layers.BatchNormalization()(layers.Flatten()(x)))
    frozen = layers.Dense(6)
    frozen.trainable = False
    return keras.Model(tokens, layers.Dense(3)(Scale()(frozen(x))))


OPTIMIZERS = {
    "adam": lambda: ko.Adam(0.01),
    "adafactor": lambda: ko.Adafactor(0.01),  # whole variables, each with an owner, and slots of other shapes
    "average": lambda: ko.SGD(0.01, momentum=0.9, use_ema=True),
    "scaled": lambda: ko.LossScaleOptimizer(ko.Nadam(0.01)),
}


def small():
    hidden = [layers.Dense(5, activation="tanh"), layers.Dropout(0.2, seed=1), layers.Dense(3)]
    return keras.Sequential([keras.Input((3,)), *hidden])


def compiled(strategy, optimizer="adam", make_model=small):
    if strategy is None:
        model = make_model()
    else:
        with strategy.scope():
            model = make_model()
    model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
    return model


def values_of(model):
    """All that a checkpoint must give back, whole."""
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A function that gives a checkpoint of a trained model, and the values that it holds."""

    @functools.cache
    def of(devices, stage, optimizer):
        model = compiled(make_strategy(devices, stage), optimizer, menagerie)
        for begin in (0, 15):
            model.train_on_batch(TOKENS[begin : begin + 15], TARGETS[begin : begin + 15])
        directory = tmp_path_factory.mktemp("source")
        folder = tfzero.save_checkpoint(model, directory)
        assert folder.name == "step-00000002"
        return directory, values_of(model)

    return of


@functools.cache
def target(devices, stage, optimizer):
    model = compiled(make_strategy(devices, stage), optimizer, menagerie)
    model.train_on_batch(TOKENS[20:], TARGETS[20:])
    return model


def pairs():
    for optimizer, pair in itertools.product(SPREAD, itertools.product(ALL, ALL)):
        yield pytest.param(optimizer, *pair, marks=[] if pair in SPREAD[optimizer] else pytest.mark.sweep)


@pytest.mark.parametrize(("optimizer", "written_by", "read_by"), list(pairs()))
def test_any_number_of_replicas_at_any_stage_reads_what_any_other_wrote(source, optimizer, written_by, read_by):
    directory, values = source(*written_by, optimizer)
    model = target(*read_by, optimizer)
    # Not what is loaded must be seen: something else.
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert tfzero.load_checkpoint(model, directory) == 2
    assert_equal(values_of(model), values)


def _models(stages):
    for stage in stages:
        strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, timeout_seconds=120)
        keras.utils.set_random_seed(strategy.extended.mesh.worker)
        yield stage, strategy, compiled(strategy, "adam", menagerie)


def _write(folder, stages):
    for stage, strategy, model in _models(stages):
        for begin in (0, 15):
            model.train_on_batch(TOKENS[begin : begin + 15], TARGETS[begin : begin + 15])
        place = Path(folder, f"{strategy.num_replicas_in_sync} {stage}")
        tfzero.save_checkpoint(model, place)
        values = values_of(model)
        if strategy.extended.mesh.worker == 0:
            np.savez(place / "values.npz", *values)


def _read(folder, stages):
    read = 0
    for _, _, model in _models(stages):
        model.train_on_batch(TOKENS[20:], TARGETS[20:])
        for place in sorted(Path(folder).iterdir()):
            model.set_weights([weight + 1 for weight in model.get_weights()])
            assert tfzero.load_checkpoint(model, place) == 2
            with np.load(place / "values.npz") as file:
                assert_equal(values_of(model), list(file.values()))
            read += 1
    return read


@pytest.mark.parametrize(
    ("writers", "readers", "stages"),
    # By default `test_survival.py` goes on with another number of workers at another stage.
    [sweep([2], [3], [1, 3]), sweep([1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3])],
)
def test_any_number_of_workers_at_any_stage_reads_what_any_other_wrote(writers, readers, stages, tmp_path):
    for workers in writers:
        tfzero.run_local(_write, workers=workers, args=(str(tmp_path), stages), timeout_seconds=FLEET_SECONDS)
    for workers in readers:
        read = tfzero.run_local(_read, workers=workers, args=(str(tmp_path), stages), timeout_seconds=FLEET_SECONDS)
        assert read == [len(stages) ** 2 * len(writers)] * workers


@pytest.mark.parametrize("optimizer", [sweep("average"), "scaled"])
def test_averages_and_loss_scales_are_saved(source, optimizer):
    directory, values = source(3, 3, optimizer)
    model = target(2, 2, optimizer)
    tfzero.load_checkpoint(model, directory)
    assert_equal(values_of(model), values)


@pytest.mark.parametrize("optimizer", [sweep("adam"), "scaled"])
def test_plain_keras_loads_a_checkpoint(source, optimizer):
    directory, values = source(3, 3, optimizer)
    model = compiled(None, optimizer, menagerie)
    assert tfzero.load_checkpoint(model, directory) == 2
    assert_equal(values_of(model), values)


def test_tensorflow_reads_a_checkpoint_as_whole_variables(source):
    directory, values = source(3, 3, "scaled")
    folder = Path(directory, "step-00000002")
    reader = tf.train.load_checkpoint(str(folder))
    entries = json.loads((folder / "manifest.json").read_text())["manifest"]["variables"]
    names = [entry["name"] for entry in entries if not entry["name"].startswith("metrics/")]
    assert_equal([reader.get_tensor(name) for name in names], values)
    assert any(name.endswith("/embeddings") for name in names)


def test_the_position_of_the_model_does_not_matter(source):
    """Automatic names are counted up in a process; variables are told apart by their order."""
    directory, _ = source(3, 3, "scaled")
    names = {
        v["name"]
        for v in json.loads(Path(directory, "step-00000002", "manifest.json").read_text())["manifest"]["variables"]
    }
    model = compiled(make_strategy(), "scaled", menagerie)
    assert not {f"model/{v.path}" for v in model.trainable_variables} <= names
    tfzero.load_checkpoint(model, directory)


# Going on.


class Interruption(keras.callbacks.Callback):
    """Ends `fit` as a crash would, at the end of batch `batches`."""

    class Crash(BaseException):
        pass

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise self.Crash


def arrays(model, callbacks, **arguments):
    return model.fit(TOKENS, TARGETS, batch_size=10, callbacks=callbacks, verbose=0, **arguments)


def shuffled_dataset(model, callbacks, **arguments):
    data = tf.data.Dataset.from_tensor_slices((TOKENS, TARGETS)).shuffle(46, seed=4).batch(10)
    return model.fit(data, callbacks=callbacks, verbose=0, shuffle=False, **arguments)


def dataset_of_unknown_length(model, callbacks, **arguments):
    data = tf.data.Dataset.from_tensor_slices((TOKENS, TARGETS)).filter(lambda x, y: True)
    data = data.shuffle(46, seed=4).batch(10)
    return model.fit(data, callbacks=callbacks, verbose=0, shuffle=False, **arguments)


def endless_dataset(model, callbacks, **arguments):
    data = tf.data.Dataset.from_tensor_slices((TOKENS, TARGETS)).shuffle(46, seed=4).repeat().batch(7)
    return model.fit(data, callbacks=callbacks, verbose=0, steps_per_epoch=5, shuffle=False, **arguments)


def generator(model, callbacks, **arguments):
    def batches():
        random = np.random.default_rng(3)
        while True:
            chosen = random.integers(0, 46, 10)
            yield TOKENS[chosen], TARGETS[chosen]

    return model.fit(batches(), callbacks=callbacks, verbose=0, steps_per_epoch=5, shuffle=False, **arguments)


def py_dataset(model, callbacks, **arguments):
    class Batches(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.random = np.random.default_rng(3)
            self.order = np.arange(46)

        def __len__(self):
            return 5

        def __getitem__(self, index):
            chosen = self.order[index * 10 : index * 10 + 10]
            return TOKENS[chosen], TARGETS[chosen]

        def on_epoch_end(self):
            self.random.shuffle(self.order)

    return model.fit(Batches(), callbacks=callbacks, verbose=0, shuffle=False, **arguments)


def several_steps_at_once(model, callbacks, **arguments):
    model.steps_per_execution = 2
    return arrays(model, callbacks, **arguments)


SWEPT = [
    sweep(fit, 2)
    for fit in (
        arrays,
        shuffled_dataset,
        dataset_of_unknown_length,
        endless_dataset,
        generator,
        py_dataset,
        several_steps_at_once,
    )
]
KINDS = [(shuffled_dataset, 3), *SWEPT]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(("fit", "stage"), KINDS)
def test_an_interrupted_run_goes_on_bit_for_bit(fit, stage, tmp_path):
    check_interrupted_run(fit, 9, tmp_path, make_strategy(2, stage))


@pytest.mark.parametrize(("crash", "stage"), [sweep(3, 3), sweep(5, 1)])
def test_a_run_goes_on_from_any_place_in_an_epoch(crash, stage, tmp_path):
    check_interrupted_run(arrays, crash, tmp_path, make_strategy(2, stage), asynchronous=False)


def check_interrupted_run(fit, crash, tmp_path, strategy, asynchronous=True):
    """Four epochs of five batches, saved after every two; the crash comes in another run."""

    def run(*callbacks):
        keras.utils.set_random_seed(1)
        model = compiled(strategy)
        # The model that goes on has other weights before it loads.
        if callbacks and os.path.exists(tmp_path / "ours"):
            model.set_weights([weight + 1 for weight in model.get_weights()])
        return model, fit(model, list(callbacks), epochs=4).history

    def checkpoints(name):
        return tfzero.CheckpointCallback(
            tmp_path / name, save_every_steps=2, save_every_epochs=None, asynchronous=asynchronous
        )

    expected, history = run(checkpoints("never interrupted"))
    with pytest.raises(Interruption.Crash):
        run(checkpoints("ours"), Interruption(crash if fit is not several_steps_at_once else 5))
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    actual, rest = run(checkpoints("ours"), note)
    assert_equal(values_of(actual), values_of(expected))
    epochs = len(rest["loss"])
    assert 2 <= epochs <= 4
    for name, values in rest.items():
        np.testing.assert_array_equal(values, history[name][-epochs:])
    assert 20 - crash <= len(seen) * getattr(actual, "steps_per_execution", 1) <= 20 - crash + 4, "began too early"


@pytest.mark.parametrize(("before", "after"), [((3, 1), (2, 2)), sweep((2, 2), (3, 1)), sweep((2, 1), (2, 1))])
def test_another_number_of_replicas_goes_on_as_one_device(before, after, tmp_path):
    """In the middle of an epoch, with metrics and accumulated gradients in progress."""

    def model():
        return keras.Sequential([keras.Input((3,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])

    def compiled_with_accumulation(strategy, weights=None):
        if strategy is None:
            made = model()
        else:
            with strategy.scope():
                made = model()
        made.compile(ko.SGD(0.1, gradient_accumulation_steps=3), "mse", metrics=["mae"])
        if weights is not None:
            made.set_weights(weights)
        return made

    reference = compiled_with_accumulation(None)
    initial = reference.get_weights()
    arguments = {"shuffle": False, "epochs": 3}
    history = arrays(reference, [], **arguments).history
    first = compiled_with_accumulation(make_strategy(*before), initial)
    callback = tfzero.CheckpointCallback(tmp_path, save_every_steps=1)
    with pytest.raises(Interruption.Crash):
        arrays(first, [callback, Interruption(7)], **arguments)
    second = compiled_with_accumulation(make_strategy(*after))
    rest = arrays(second, [tfzero.CheckpointCallback(tmp_path, save_every_steps=1)], **arguments).history
    for mine, theirs in zip(second.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, values in rest.items():
        np.testing.assert_allclose(values, history[name][-2:], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("fit", [arrays, dataset_of_unknown_length])
@pytest.mark.parametrize(("before", "after", "crash"), [(1, 2, 8), (1, 4, 7), (2, 3, 4)])
def test_other_steps_per_execution_go_on_with_the_same_batch(fit, before, after, crash, tmp_path):
    """Of five batches an epoch. On Keras 3.10 as well, which numbers executions by their first batch."""

    def made():  # without a seed, which an execution may draw before it finds that there is no batch
        return keras.Sequential([keras.Input((3,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])

    def run(steps, *callbacks):
        keras.utils.set_random_seed(1)
        model = compiled(make_strategy(), make_model=made)
        model.set_weights(initial)
        model.steps_per_execution = steps
        fit(model, list(callbacks), epochs=3)
        return model

    def checkpoints():
        return tfzero.CheckpointCallback(tmp_path, save_every_steps=1)

    initial = compiled(None, make_model=made).get_weights()
    expected = run(1)
    with pytest.raises(Interruption.Crash):
        run(before, checkpoints(), Interruption(crash))
    callback = checkpoints()
    actual = run(after, callback)
    for mine, theirs in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert int(actual.optimizer.iterations) == 15
    if fit is arrays:  # else nothing tells how many steps the last execution had
        assert callback.step == 15


def test_without_a_seed_every_sample_still_comes_once(tmp_path):
    strategy = make_strategy()
    seen = []

    class Note(keras.layers.Layer):
        def call(self, x, training=False):
            if training:
                tf.py_function(lambda ids: seen.extend(ids.numpy().ravel().tolist()), [x[:, 0]], [])
            return x

    def run(*callbacks):
        seen.clear()
        with strategy.scope():
            model = keras.Sequential([keras.Input((1,)), Note(), layers.Dense(1)])
        model.compile("sgd", "mse")
        ids = np.arange(40, dtype="float32")[:, None]
        model.fit(ids, 0 * ids, batch_size=8, epochs=3, verbose=0, callbacks=list(callbacks))

    def checkpoints():
        return tfzero.CheckpointCallback(tmp_path, save_every_steps=1)

    with pytest.raises(Interruption.Crash):
        run(checkpoints(), Interruption(7))
    before = seen[:56]  # the last batches may have been lost
    run(checkpoints())
    steps_before = 15 - len(seen) // 8
    assert steps_before in (6, 7)
    assert sorted((before[: 8 * steps_before] + seen)[40:80]) == list(range(40))


def test_a_finished_run_trains_no_more_unless_for_more_epochs(tmp_path):
    def run(epochs):
        model = compiled(make_strategy())
        stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=1e9)
        callbacks = [tfzero.CheckpointCallback(tmp_path), *([stop] if epochs == 4 else [])]
        return arrays(model, callbacks, epochs=epochs).epoch, model.get_weights()

    first, weights = run(4)
    assert first == [0, 1]
    again, same = run(4)
    assert again == []
    assert_equal(same, weights)
    assert run(6)[0] == [2, 3, 4, 5]


def test_what_callbacks_change_at_the_end_of_an_epoch_is_saved(tmp_path):
    """A learning rate that is reduced after our callback was called."""
    halve = keras.callbacks.LambdaCallback()

    def on_epoch_end(epoch, logs):
        halve.model.optimizer.learning_rate = 0.5 ** (epoch + 1)

    halve.on_epoch_end = on_epoch_end
    model = compiled(make_strategy())
    arrays(model, [tfzero.CheckpointCallback(tmp_path), halve], epochs=2)
    other = compiled(make_strategy(1, 0))
    tfzero.load_checkpoint(other, tmp_path)
    assert float(other.optimizer.learning_rate) == 0.25


# Damage and other bad input.


@pytest.fixture
def two_checkpoints(tmp_path):
    model = compiled(make_strategy())
    arrays(model, [tfzero.CheckpointCallback(tmp_path)], epochs=2)
    return model, tmp_path


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(two_checkpoints):
    model, directory = two_checkpoints
    newest = directory / "step-00000010"
    for path, damage in itertools.product(sorted(newest.iterdir()), ("flipped", "truncated", "missing")):
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 1
        path.unlink() if damage == "missing" else path.write_bytes(flipped if damage == "flipped" else original[:-1])
        with pytest.raises(tfzero.DamagedCheckpointError, match=f"{newest.name}.*{path.name}"):
            tfzero.load_checkpoint(model, newest)
        with pytest.warns(UserWarning, match=f"{newest.name}.*{path.name}.* The one before it is used"):
            assert tfzero.load_checkpoint(model, directory) == 5
        path.write_bytes(original)
    path.write_bytes(flipped)
    with pytest.warns(UserWarning, match="The one before it is used"):
        history = arrays(compiled(make_strategy()), [tfzero.CheckpointCallback(directory)], epochs=2)
    assert history.epoch == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tfzero.load_checkpoint(model, directory) == 10  # written anew


def test_a_checkpoint_of_another_model_says_which_variable_differs(two_checkpoints):
    _, directory = two_checkpoints

    def other():
        return keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(3)])

    model = compiled(make_strategy(), make_model=other)
    what = (
        r"another model: 'model/.*/kernel' is float32 of shape \(3, 4\) here, and 'model/.*/kernel' is float32 of "
        r"shape \(3, 5\) there"
    )
    with pytest.raises(ValueError, match=what):
        tfzero.load_checkpoint(model, directory)
    with pytest.raises(ValueError, match=what):
        arrays(model, [tfzero.CheckpointCallback(directory)])


def test_a_checkpoint_of_fewer_variables_says_which_is_missing(tmp_path):
    def of(count):
        def make():
            return keras.Sequential([keras.Input((3,)), *[layers.Dense(3, use_bias=False) for _ in range(count)]])

        model = compiled(make_strategy(), make_model=make)
        model.optimizer.build(model.trainable_variables)
        return model

    tfzero.save_checkpoint(of(1), tmp_path)
    with pytest.raises(ValueError, match=r"`model` has 2 variables here and 1 there; only here is 'model/.*kernel"):
        tfzero.load_checkpoint(of(2), tmp_path)


def test_a_checkpoint_of_another_optimizer_is_refused(two_checkpoints):
    _, directory = two_checkpoints
    model = compiled(make_strategy(), "average")
    with pytest.raises(ValueError, match="another optimizer: `optimizer` is SGD here, Adam there"):
        tfzero.load_checkpoint(model, directory)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        tfzero.load_checkpoint(compiled(make_strategy()), tmp_path)


def test_a_checkpoint_without_position_is_no_place_to_go_on_from(tmp_path):
    model = compiled(make_strategy())
    arrays(model, [])
    tfzero.save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="does not know its place in the data"):
        arrays(model, [tfzero.CheckpointCallback(tmp_path)])


def test_a_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = compiled(make_strategy())
    before = model.get_weights()
    with pytest.raises(OSError, match="Cannot write checkpoints into"):
        arrays(model, [tfzero.CheckpointCallback(tmp_path / "file" / "inside")])
    assert_equal(model.get_weights(), before)


def test_a_directory_is_for_one_run(tmp_path):
    class Second(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            arrays(compiled(make_strategy()), [tfzero.CheckpointCallback(tmp_path)])

    with pytest.raises(OSError, match=r"Another run \(process \d+ on .*\) writes checkpoints into"):
        arrays(compiled(make_strategy()), [tfzero.CheckpointCallback(tmp_path), Second()])
    arrays(compiled(make_strategy()), [tfzero.CheckpointCallback(tmp_path)])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(asynchronous, tmp_path, monkeypatch):
    original = tf.raw_ops.SaveV2
    saves = itertools.count(1)

    def save(**arguments):
        if next(saves) == 3:
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        return original(**arguments)

    monkeypatch.setattr(tf.raw_ops, "SaveV2", save)
    callback = tfzero.CheckpointCallback(tmp_path, save_every_steps=1, asynchronous=asynchronous)
    trained = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: trained.append(batch))
    what = "step-00000003 could not be written. worker 0: ResourceExhaustedError: No space left on device"
    with pytest.raises(OSError, match=what):
        arrays(compiled(make_strategy()), [note, callback], epochs=1)
    assert len(trained) == (4 if asynchronous else 3)
    model = compiled(make_strategy())
    monkeypatch.undo()
    arrays(model, [tfzero.CheckpointCallback(tmp_path)], epochs=1)
    assert model.optimizer.iterations == 5
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "settings",
    [{"save_every_steps": 0}, {"save_every_epochs": -1}, {"keep": 0}, {"keep": 1.5}, {"save_every_steps": True}],
    ids=repr,
)
def test_settings_without_sense_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1. Received: {name}="):
        tfzero.CheckpointCallback("unused", **settings)


def test_a_callback_that_would_never_save_is_refused():
    with pytest.raises(ValueError, match="Nothing would be saved"):
        tfzero.CheckpointCallback("unused", save_every_epochs=None)


def test_a_second_callback_is_refused(tmp_path):
    callbacks = [tfzero.CheckpointCallback(tmp_path / name) for name in "ab"]
    with pytest.raises(ValueError, match="takes one CheckpointCallback"):
        arrays(compiled(make_strategy()), callbacks)


def test_plain_keras_is_told_to_use_its_own(tmp_path):
    with pytest.raises(ValueError, match="needs a model of a ZeroStrategy; with others use BackupAndRestore"):
        arrays(compiled(None), [tfzero.CheckpointCallback(tmp_path)])


def test_a_model_of_another_strategy_is_refused(tmp_path):
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with pytest.raises(ValueError, match="for models of a ZeroStrategy or of one device"):
        tfzero.load_checkpoint(compiled(mirrored), tmp_path)
