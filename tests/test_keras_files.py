"""Keras's own files and callbacks in real workers: all take part, one writes, and plain Keras reads what it wrote."""

import itertools
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.utils import file_utils
from marks import FLEET_SECONDS, sweep

import tfzero

WIDTH, DEPTH = 256, 6  # the largest variable is a sixth of the model


def _train_and_save(folder: str, stages) -> dict:
    """At each stage: trains with Keras's callbacks, saves, and gives the values, and which files were written."""
    import time

    import h5py
    import keras
    import numpy as np
    import tensorflow as tf
    from keras.src.utils import file_utils

    written: list[str] = []
    original = h5py.File.__init__

    def noting(self, name, mode="r", *args, **kwargs):
        if mode != "r":
            written.append(str(name))
        original(self, name, mode, *args, **kwargs)

    h5py.File.__init__ = noting

    def noting_call(name):
        original = getattr(file_utils, name)

        def call(path, *args, **kwargs):
            if name != "File" or "w" in args:
                written.append(f"{name} {path}")
            if name == "rmtree":
                time.sleep(0.5)  # the others wait for it
            return original(path, *args, **kwargs)

        setattr(file_utils, name, call)

    for name in ("File", "copy", "makedirs", "remove", "rmtree"):
        noting_call(name)
    results = {}
    strategies = {stage: tfzero.ZeroStrategy(stage) for stage in stages}
    keras.utils.set_random_seed(strategies[stages[0]].cluster_resolver.task_id)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(22, WIDTH)).astype("float32"), random.normal(size=(22, WIDTH)).astype("float32")
    for stage, strategy in strategies.items():
        place = Path(folder, str(stage))

        def make_model(strategy=strategy):
            with strategy.scope():
                hidden = [keras.layers.Dense(WIDTH, use_bias=False) for _ in range(DEPTH)]
                model = keras.Sequential([keras.Input((WIDTH,)), *hidden])
            model.compile(keras.optimizers.Adam(1e-4), "mse")
            return model

        model = make_model()
        initial = model.get_weights()

        class Raise(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 2:
                    raise InterruptedError

        backup = keras.callbacks.BackupAndRestore
        with np.testing.assert_raises(InterruptedError):
            model.fit(x, y, epochs=4, batch_size=8, verbose=0, callbacks=[backup(place / "backup"), Raise()])
        resumed = make_model()
        history = resumed.fit(x, y, epochs=4, batch_size=8, verbose=0, callbacks=[backup(place / "backup")])
        assert history.epoch == [2, 3] and not (place / "backup").exists()

        best = []

        class Note(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None, best=best):
                if epoch == 0:
                    best[:] = self.model.get_weights()

        model.set_weights(initial)
        stop = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9, restore_best_weights=True)
        callbacks = [
            keras.callbacks.ModelCheckpoint(place / "new" / "best-{epoch}.keras", "loss", save_best_only=True),
            keras.callbacks.ModelCheckpoint(place / "new" / "{epoch}.weights.h5", save_weights_only=True),
            stop,
            Note(),
        ]
        model.fit(x, y, epochs=4, batch_size=8, verbose=0, callbacks=callbacks)
        restored = model.get_weights()
        assert np.testing.assert_array_equal(restored, best) is None

        tf.config.experimental.reset_memory_stats("CPU:0")
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        model.save(place / "model.keras")
        extra = tf.config.experimental.get_memory_info("CPU:0")["peak"] - before
        assert (place / "model.keras").exists(), "the others go on before the file is there"
        model.save_weights(place / "model.weights.h5")
        loaded = make_model()
        loaded.load_weights(place / "model.weights.h5")
        results[stage] = {
            "weights": restored,
            "slots": [np.array(v) for v in model.optimizer.variables],
            "loaded": loaded.get_weights(),
            "extra": extra,
            "best": sum(weight.nbytes for weight in stop.best_weights),
        }
        for refused in ("model.h5", "model.hdf5"):
            with np.testing.assert_raises_regex(ValueError, "cannot save in the legacy HDF5 format. Save as `.keras`"):
                model.save(place / refused)
    return {"written": written, **results}


@pytest.fixture(scope="module", params=[(3,), sweep((2, 3))], ids=str)
def fleet(request, tmp_path_factory):
    """The stages, the folder with one of each, and what each worker found."""
    folder = tmp_path_factory.mktemp("files")
    for stage in request.param:
        (folder / str(stage)).mkdir()
    arguments = (str(folder), request.param)
    found = tfzero.run_local(_drift_and_save, workers=2, args=arguments, timeout_seconds=FLEET_SECONDS)
    return request.param, folder, found


def _drift_and_save(folder: str, stages) -> dict:
    return {"drift": _drift(2), **_train_and_save(folder, stages)}


def test_one_worker_writes(fleet):
    stages, _, (first, second) = fleet
    assert len(first["written"]) >= 6 * len(stages)
    assert second["written"] == []


def test_plain_keras_loads_what_workers_saved(fleet):
    stages, folder, results = fleet
    for stage in stages:
        check_what_workers_saved(folder, results, stage)


def check_what_workers_saved(folder, results, stage):
    model = keras.models.load_model(folder / str(stage) / "model.keras")
    assert type(model.optimizer) is keras.optimizers.Adam
    for result in results:
        np.testing.assert_array_equal(model.get_weights(), result[stage]["weights"])
        np.testing.assert_array_equal(result[stage]["loaded"], result[stage]["weights"])
        for mine, theirs in zip(model.optimizer.variables, result[stage]["slots"], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    model.load_weights(folder / str(stage) / "model.weights.h5")
    np.testing.assert_array_equal(model.get_weights(), results[0][stage]["weights"])


def test_model_checkpoints_are_ordinary_files(fleet):
    stages, folder, results = fleet
    for stage in stages:
        new = folder / str(stage) / "new"
        assert {path.name for path in new.iterdir()} >= {"best-1.keras", "1.weights.h5", "2.weights.h5"}
        # Early stopping gave the first epoch's weights back.
        np.testing.assert_array_equal(
            keras.models.load_model(new / "best-1.keras").get_weights(), results[0][stage]["weights"]
        )


def test_the_best_weights_are_kept_in_parts_at_stage_3(fleet):
    stages, _, results = fleet
    for result in results:
        for stage in stages:
            whole = sum(weight.nbytes for weight in result[stage]["weights"])
            assert result[stage]["best"] == (whole / 2 if stage == 3 else whole)


@pytest.mark.filterwarnings("ignore:Eagerly")
def test_a_subclass_of_early_stopping_has_the_model_itself():
    class Own(keras.callbacks.EarlyStopping):
        def on_epoch_end(self, epoch, logs=None):
            models.append(self.model)
            super().on_epoch_end(epoch, logs)

    models: list = []
    with tfzero.ZeroStrategy(3, devices=["CPU:0", "CPU:1"], min_shard_elements=1).scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    stop = Own("loss", restore_best_weights=True)
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[stop])
    assert models == [model]
    assert [weight.shape for weight in stop.best_weights] == [(3, 2), (2,)]


def test_a_folder_that_another_worker_has_just_made_is_no_error(tmp_path, monkeypatch):
    """Keras looks for it, finds none, and fails to make it if another worker is faster."""

    original = file_utils.makedirs

    def makedirs(path):
        if "new" in Path(path).parts:
            raise FileExistsError(path)
        original(path)

    monkeypatch.setattr("keras.src.utils.file_utils.makedirs", makedirs)
    with tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    keep = keras.callbacks.ModelCheckpoint(tmp_path / "new" / "{epoch}.keras")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[keep])
    assert (tmp_path / "new" / "1.keras").exists()


def test_saving_takes_one_variable_of_memory_at_a_time(fleet):
    stages, _, results = fleet
    for result, stage in itertools.product(results, stages):
        assert result[stage]["extra"] <= WIDTH * WIDTH * 4 * 1.05


# Replicas that drift apart.


def _drift(stage: int) -> str:
    import keras
    import numpy as np

    strategy = tfzero.ZeroStrategy(stage)
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="first"), keras.layers.Dense(2)])
    model.compile("adam", "mse")

    class Flip(keras.callbacks.Callback):
        """A cosmic ray in the second worker."""

        def on_train_batch_end(self, batch, logs=None):
            if batch == 3 and strategy.cluster_resolver.task_id == 1:
                bias = self.model.get_layer("first").bias.value.values[0]
                bias.assign(np.nextafter(bias.numpy(), np.float32(2)))

    x, y = np.ones((32, 4), "float32"), np.ones((32, 2), "float32")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[tfzero.DriftCallback(check_every=1)])
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(batch))
    try:
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[Flip(), note, tfzero.DriftCallback(check_every=2)])
    except RuntimeError as error:
        return f"after {len(seen)} batches: {error}"
    return "nothing noticed"


def test_replicas_that_drift_apart_are_stopped_by_name(fleet):
    texts = [result["drift"] for result in fleet[2]]
    assert len(set(texts)) == 1
    assert "after 4 batches: The replicas have drifted apart in 1 of " in texts[0]
    assert "'model/sequential/first/bias' (" in texts[0] and " on replica 0, " in texts[0]


@pytest.mark.parametrize("check_every", [0, -1, 2.5])
def test_drift_is_checked_after_whole_batches(check_every):
    with pytest.raises(ValueError, match="`check_every` must be an integer of at least 1"):
        tfzero.DriftCallback(check_every)


def test_files_of_other_strategies_are_untouched(tmp_path):
    """The patches of Keras ask for a ZeroStrategy first."""
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    stop = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[stop])
    assert all(isinstance(weight, np.ndarray) for weight in stop.best_weights)
    model.save(tmp_path / "model.h5")
    assert keras.models.load_model(tmp_path / "model.h5", compile=False).count_params() == 8
