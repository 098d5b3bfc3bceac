"""Saving, loading and auditing on two workers, where one of them fails, is slow, or has something else to do."""

import contextlib
import errno
import os
import re
import threading
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import oracle
import pool
import pytest
import tensorflow as tf
from marks import sweep

import tfzero
from tfzero.checkpoint import directories
from tfzero.checkpoint.state import LAG, METRICS, RESIDUAL, state_of
from tfzero.views import audit as auditing

SECONDS = 30.0  # of the strategy
SHORT_SECONDS = 12.0  # where a wait must be longer than that
X, Y = oracle.Data().arrays()


@contextlib.contextmanager
def replaced(owner, name, make):
    """`owner.name` is `make(original)` for a while."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def local(model):
    """All that this worker holds of a model's training, by name."""
    return {
        f"{item.name} {k}": item.component(k).numpy()
        for item in state_of(model)
        for k in range(len(getattr(item.value, "values", "1")))
    }


def whole(model):
    """All that a checkpoint must give back, as whole values."""
    return dict(enumerate(np.array(v) for v in (*model.variables, *model.optimizer.variables)))


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def raised(function, *args, **kwargs):
    """What a call raises, as text."""
    began = time.monotonic()
    try:
        function(*args, **kwargs)
    except Exception as error:
        seconds = time.monotonic() - began
        assert seconds < SECONDS, f"after {seconds:.0f} s: {error}"
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Fleet:
    """One of the workers."""

    def __init__(self, stage, folder):
        self.strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, timeout_seconds=SECONDS)
        self.index = self.strategy.extended.mesh.worker
        self.folder = Path(folder)
        keras.utils.set_random_seed(self.index)

    def model(self, optimizer=None, **settings):
        strategy = self.strategy if not settings else tfzero.ZeroStrategy(**settings)
        with strategy.scope():
            model = oracle.dense_model()
        model.compile(optimizer or keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"])
        return model

    def fit(self, model, *callbacks, **arguments):
        given = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
        return model.fit(X, Y, callbacks=list(callbacks), **given)

    def only(self, worker, make):
        """A replacement that only one worker gets."""
        return make if self.index == worker else lambda original: original


def patterns_in_paths(fleet):
    model = fleet.model()
    fleet.fit(model)
    before, directory = whole(model), fleet.folder / "lr[0.1]*?\\[!a]"
    path = tfzero.save_checkpoint(model, directory)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert tfzero.load_checkpoint(model, directory) == 3
    assert_equal(whole(model), before)
    assert tfzero.load_checkpoint(model, path) == 3
    return [each.name for each in directory.iterdir() if each.name != "lock"]


def copies_under_other_names(fleet):
    """A copy by hand is loaded when asked for, and only then."""
    import shutil

    model = fleet.model()
    directory = fleet.folder / "step-size-0.1"
    original = tfzero.save_checkpoint(model, directory)
    values = whole(model)
    if fleet.index == 0:
        shutil.copytree(original, directory / "step-best")
        shutil.copytree(original, directory / "step-00000099")
    fleet.fit(model)
    tfzero.save_checkpoint(model, directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = [tfzero.load_checkpoint(model, directory), tfzero.load_checkpoint(model, directory / "step-best")]
    assert_equal(whole(model), values)
    return steps, [str(each.message) for each in caught if "step-" in str(each.message)]


def before_any_step(fleet):
    model = fleet.model()
    tfzero.save_checkpoint(model, fleet.folder / "begin")
    assert tfzero.load_checkpoint(model, fleet.folder / "begin") == 0
    fresh = fleet.model()
    assert tfzero.load_checkpoint(fresh, fleet.folder / "begin") == 0
    np.testing.assert_array_equal(fresh.get_weights()[0], model.get_weights()[0])
    fleet.fit(fresh)
    fleet.fit(model)
    for mine, theirs in zip(model.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def by_hand_beside_the_background(fleet):
    """The second worker writes slowly, so the threads of the workers would speak in different orders."""

    class ByHand(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps.append(tfzero.save_checkpoint(self.model, fleet.folder / "by hand").name)

    def slow(original):
        def save(**arguments):
            is_in_background = threading.current_thread() is not threading.main_thread()
            time.sleep(0.3 if is_in_background else 0)
            return original(**arguments)

        return save

    steps: list = []
    model = fleet.model()
    callback = tfzero.CheckpointCallback(fleet.folder / "background", save_every_steps=1)
    with replaced(tf.raw_ops, "SaveV2", fleet.only(1, slow)):
        fleet.fit(model, callback, ByHand(), epochs=2)
    assert len(steps) == 6
    for name in ("background", "by hand"):
        other = fleet.model()
        assert tfzero.load_checkpoint(other, fleet.folder / name) == 6
        assert_equal(whole(other), whole(model))
    return len(directories.checkpoints(fleet.folder / "background"))


def any_error_of_the_saver(fleet):
    def failing(original):
        def save(**arguments):
            raise LookupError("out of luck")

        return save

    def run(asynchronous):
        callback = tfzero.CheckpointCallback(fleet.folder / "lucky", save_every_steps=1, asynchronous=asynchronous)
        fleet.fit(fleet.model(), callback)

    with replaced(tf.raw_ops, "SaveV2", fleet.only(1, failing)):
        texts = [raised(run, asynchronous) for asynchronous in (True, False)]
        texts.append(raised(tfzero.save_checkpoint, fleet.model(), fleet.folder / "lucky"))
    run(True)  # the channel serves on, and the directory is free
    return texts


def unreadable_on_one(fleet):
    model = fleet.model()
    for _ in range(2):
        fleet.fit(model)
        tfzero.save_checkpoint(model, fleet.folder / "private")

    def refusing(original):
        def opened(path, *args, **kwargs):
            if "step-00000006" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *args, **kwargs)

        return opened

    with replaced(os, "open", fleet.only(1, refusing)):
        texts = [
            raised(tfzero.load_checkpoint, model, fleet.folder / "private"),
            raised(fleet.fit, model, tfzero.CheckpointCallback(fleet.folder / "private")),
        ]
    assert tfzero.load_checkpoint(model, fleet.folder / "private") == 6
    return texts


def damaged_ones_are_no_reason_to_delete(fleet):
    """All that is there is damaged: the run begins anew, and keeps what it saves."""
    directory = fleet.folder / "damaged"
    fleet.fit(fleet.model(), tfzero.CheckpointCallback(directory, save_every_steps=2), epochs=4)
    fleet.strategy.channel.all_gather("trained", None)
    if fleet.index == 0:
        for path in directory.glob("step-*/state.data-00000-*"):
            path.write_bytes(b"\0" * path.stat().st_size)
    fleet.strategy.channel.all_gather("damaged", None)
    old = [path.name for path in directories.checkpoints(directory)]
    seen = []

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)
            if len(seen) == 9:
                raise InterruptedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            callback = tfzero.CheckpointCallback(directory, save_every_steps=2, keep=2)
            fleet.fit(fleet.model(), callback, Crash(), epochs=4)
        except InterruptedError:
            pass
    told = [str(each.message) for each in caught if "is damaged" in str(each.message)]
    assert len(told) == len(old) and "There is none before it" in told[-1], told
    model = fleet.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = tfzero.load_checkpoint(model, directory)
    return old, [path.name for path in directories.checkpoints(directory)], step


def interrupted_while_writing(fleet):
    """`fit` ends by an error while a checkpoint is being written, and is called again at once."""

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise InterruptedError

    def slow(original):
        def save(**arguments):
            started.append(1)
            time.sleep(2)
            return original(**arguments)

        return save

    started: list = []
    directory = fleet.folder / "interrupted"
    with replaced(tf.raw_ops, "SaveV2", slow):
        with contextlib.suppress(InterruptedError):
            fleet.fit(fleet.model(), tfzero.CheckpointCallback(directory, save_every_steps=1), Crash())
        free = raised(lambda: directories.Lock(directory).release())
        if fleet.index == 0:
            assert "Another run" in free, free
        fleet.fit(fleet.model(), tfzero.CheckpointCallback(directory, save_every_steps=1))
    return [path.name for path in directories.checkpoints(directory)]


def slow_copies(fleet):
    """The copy on one device takes longer than the timeout; everything is as it was afterwards."""
    results = []

    def slow(original):
        def copied(*args):
            copy = original(*args)
            train = copy.train_on_batch

            def train_slowly(*batch):
                time.sleep(SHORT_SECONDS + 3)
                return train(*batch)

            copy.train_on_batch = train_slowly
            return copy

        return copied

    settings = {"stage": 2, "compression": "int8", "error_feedback": True, "min_shard_elements": 8}
    model = fleet.model(timeout_seconds=SHORT_SECONDS, **settings)
    for steps in (0, 2):
        for _ in range(steps):
            model.train_on_batch(X, Y)
        model.optimizer.build(model.trainable_variables)
        before = local(model)
        with replaced(auditing, "_copy_of", slow if steps else lambda original: original):
            results.append(len(tfzero.audit(model, (X, Y), steps=1).differences))
        after = local(model)
        groups = {name.split("/")[0] for name in before}
        assert {"model", "optimizer", METRICS, LAG, RESIDUAL} <= groups
        assert_equal({name: after[name] for name in before}, before)
        for name in after.keys() - before.keys():  # metrics that were made meanwhile
            assert name.startswith(METRICS) and not np.any(after[name]), name

    def failing(original):
        def copied(*_):
            raise LookupError("no copy")

        return copied

    with replaced(auditing, "_copy_of", failing):
        results.append(raised(tfzero.audit, model, (X, Y)))
    model.train_on_batch(X, Y)
    return results


def errors_of_the_one_that_writes(fleet):
    """The first worker writes Keras's files. Its errors are the others' too, and at once."""
    import h5py

    model = fleet.model()
    fleet.fit(model)

    def failing(original):
        def create(self, name, *args, **kwargs):
            written.append(name)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(self, name, *args, **kwargs)

        return create

    texts = []
    for name, save in (("a.weights.h5", model.save_weights), ("a.keras", model.save)):
        written: list = []
        with replaced(h5py.Group, "create_dataset", fleet.only(0, failing)):
            texts.append(raised(save, fleet.folder / name))
    folder = fleet.folder / "a folder.keras"
    folder.mkdir(exist_ok=True)
    texts.append(raised(model.save, folder))
    backup = keras.callbacks.BackupAndRestore(fleet.folder / "backup")

    def not_copied(original):
        def exists(path):
            if str(path).endswith("backup"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return original(path)

        return exists

    from keras.src.utils import file_utils  # of the test alone

    with replaced(file_utils, "exists", fleet.only(0, not_copied)):
        texts.append(raised(fleet.fit, model, backup))
    written = []
    with replaced(h5py.Group, "create_dataset", fleet.only(0, failing)):
        texts.append(raised(fleet.fit, model, keras.callbacks.BackupAndRestore(fleet.folder / "full")))
    model.save_weights(fleet.folder / "b.weights.h5")  # all goes on
    fleet.fit(model, keras.callbacks.BackupAndRestore(fleet.folder / "backup"))
    return texts


def weights_without_some_objects(fleet):
    model = fleet.model()
    path = fleet.folder / "some.weights.h5"
    skipped = [model.layers[0], model.optimizer]

    class Without(keras.Sequential):
        def save_weights(self, filepath, overwrite=True):
            keras.saving.save_weights(self, filepath, overwrite, objects_to_skip=[self.layers[0], self.optimizer])

    with fleet.strategy.scope():
        without = Without(oracle.dense_model().layers)
        without.build((None, 8))
    without.compile("adam", "categorical_crossentropy")
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    fleet.fit(without, checkpoint)
    values = without.get_weights()
    other = fleet.model()
    before = other.get_weights()
    keras.saving.load_weights(other, path, objects_to_skip=[other.layers[0], other.optimizer])
    np.testing.assert_array_equal(other.get_weights()[0], before[0])
    np.testing.assert_array_equal(other.get_weights()[2], values[2])
    keras.saving.save_weights(model, fleet.folder / "other.weights.h5", objects_to_skip=skipped)
    import io

    buffer = io.BytesIO()  # each worker has its own
    keras.src.saving.saving_lib.save_model(model, buffer)
    return len(buffer.getvalue())


CASES = {
    2: [
        copies_under_other_names, by_hand_beside_the_background, any_error_of_the_saver, unreadable_on_one,
        damaged_ones_are_no_reason_to_delete, interrupted_while_writing, slow_copies,
    ],
    3: [patterns_in_paths, before_any_step, errors_of_the_one_that_writes, weights_without_some_objects],
}  # fmt: skip
SWEPT = {2: [patterns_in_paths, before_any_step, errors_of_the_one_that_writes]}


def _run(stage, cases, folder, only):
    fleet = Fleet(stage, folder)
    results = {}
    for case in cases:
        if only and case.__name__ not in only:
            continue
        began = time.monotonic()
        results[case.__name__] = case(fleet)
        if fleet.index == 0:
            print(f"{case.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    only = os.environ.get("ONLY", "").split()
    return {
        stage: pool.run(_run, workers=2, args=(stage, cases, str(tmp_path_factory.mktemp("saving")), only))
        for stage, cases in CASES.items()
    }


@pytest.fixture(scope="module")
def swept_results(tmp_path_factory):
    return {
        stage: pool.run(_run, workers=2, args=(stage, cases, str(tmp_path_factory.mktemp("saving")), []))
        for stage, cases in SWEPT.items()
    }


@pytest.fixture(params=[3, sweep(2)])
def at_stage(request):
    """A function that gives what a case gave on both workers at a stage."""
    results = request.getfixturevalue("results" if request.param == 3 else "swept_results")
    return lambda case: of(results, request.param, case)


def of(results, stage, case):
    """What a case gave on both workers."""
    return [worker[case.__name__] for worker in results[stage]]


def test_no_path_is_taken_for_a_pattern(at_stage):
    assert at_stage(patterns_in_paths) == [["step-00000003"]] * 2


def test_copies_are_loaded_when_asked_for_and_only_then(results):
    for steps, warned in of(results, 2, copies_under_other_names):
        assert steps == [3, 0]
        (text,) = warned
        assert "step-00000099 is damaged: its manifest is of step 0, so it was renamed or copied" in text


def test_a_checkpoint_from_before_any_step_is_loaded(at_stage):
    assert at_stage(before_any_step) == [None, None]


def test_saving_by_hand_beside_the_background(results):
    assert of(results, 2, by_hand_beside_the_background) == [3, 3]


def test_any_error_of_a_saver_reaches_all(results):
    for texts in of(results, 2, any_error_of_the_saver):
        what = r"could not be written. worker 1: LookupError: out of luck$"
        assert all(re.search(what, text) and text.startswith("RuntimeError: ") for text in texts), texts


def test_what_one_cannot_read_is_damaged_to_nobody(results):
    for texts in of(results, 2, unreadable_on_one):
        for text in texts:
            assert re.search(r"^OSError: worker 1: .*manifest.json: Permission denied. It may be whole", text), text


def test_damaged_checkpoints_do_not_count_as_kept(results):
    for old, names, step in of(results, 2, damaged_ones_are_no_reason_to_delete):
        assert old == ["step-00000012", "step-00000010", "step-00000009"]
        assert names == [*old, "step-00000008", "step-00000006"]
        assert step == 8


def test_a_directory_is_held_until_the_writer_has_ended(results):
    assert of(results, 2, interrupted_while_writing) == [["step-00000003", "step-00000002", "step-00000001"]] * 2


def test_a_slow_copy_is_waited_for_and_nothing_is_changed(results):
    first, second = of(results, 2, slow_copies)
    assert first == second and first[0] == first[1] > 4
    assert first[2] == "RuntimeError: worker 0: LookupError: no copy"


def test_what_fails_on_the_one_that_writes_fails_on_all_at_once(at_stage):
    for texts in at_stage(errors_of_the_one_that_writes):
        full, zipped, folder, backup, full_backup = texts
        assert full == zipped == full_backup == "OSError: worker 0: OSError: [Errno 28] No space left on device"
        assert "IsADirectoryError" in folder and "a folder.keras" in folder
        assert backup == "OSError: worker 0: PermissionError: [Errno 13] Permission denied"


def test_weights_are_saved_without_the_objects_to_skip(results):
    assert all(size > 1000 for size in of(results, 3, weights_without_some_objects))
