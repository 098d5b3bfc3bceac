"""SavedModels and TFLite: what is exported at any stage is an ordinary file of the one device's model.

Plain TensorFlow loads and serves it, in a process that does not know tfzero.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers
from marks import sweep

import tfzero

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
WAYS = ("export", "archive", "saved", "lite.tflite", "lite_of_function.tflite")


def data():
    random = np.random.default_rng(5)
    x = random.normal(size=(16, 8)).astype("float32")
    return x, x[:, :3] * 2 - 1


def export_all(strategy, folder: Path) -> dict:
    """Trains, exports in all ways, and trains on."""
    keras.utils.set_random_seed(3)
    x, y = data()
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        hidden = [layers.Dense(17, activation="tanh"), layers.BatchNormalization(synchronized=True)]
        model = keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    arguments = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, y, **arguments)

    model.export(folder / "export", verbose=False)
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, 8), tf.float32)]
    archive.add_endpoint("serve", lambda x: model(x, training=False), signature)
    archive.add_endpoint("doubled", lambda x: 2 * model(x, training=False), signature)
    archive.write_out(str(folder / "archive"), verbose=False)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        tf.saved_model.save(model, folder / "saved")
    lite = [tf.lite.TFLiteConverter.from_keras_model(model).convert()]
    with contextlib.nullcontext() if strategy is None else strategy.gathered(model.variables):
        function = tf.function(lambda x: model(x, training=False)).get_concrete_function(tf.TensorSpec((1, 8)))
        lite.append(tf.lite.TFLiteConverter.from_concrete_functions([function]).convert())
    if strategy is None or strategy.extended.mesh.worker == 0:
        for name, content in zip(WAYS[3:], lite, strict=True):
            (folder / name).write_bytes(content)

    served = model.predict(x, batch_size=8, verbose=0)
    written = [(folder / name / "saved_model.pb").exists() for name in WAYS[:3]]
    weights = [np.array(w) for w in model.weights]
    model.fit(x, y, **arguments)
    return {"served": served, "written": written, "weights": weights, "after": [np.array(w) for w in model.weights]}


def export_in_worker(folder: str) -> dict:
    from tensorflow.python.lib.io import file_io  # of the test alone

    results: dict = {"written": []}
    original = file_io.atomic_write_string_to_file

    def noting(path, *args, **kwargs):
        results["written"] += [path] if str(path).startswith(folder) else []  # TFLite has folders of its own
        return original(path, *args, **kwargs)

    file_io.atomic_write_string_to_file = noting
    for _ in range(json.loads(os.environ["TF_CONFIG"])["task"]["index"]):  # names are counted up in each process
        layers.Dense(3), layers.BatchNormalization()
    for stage in (2, 3):
        strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8)
        results[stage] = export_all(strategy, Path(folder, str(stage)))
    first = strategy.extended.mesh.worker == 0
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), layers.Dense(3)])
    file = Path(folder, "file")
    if first:
        file.write_text("in the way of a directory")
    strategy.channel.all_gather("a file is there", None)
    try:
        model.export(file / "model", verbose=False)
    except Exception as error:
        results["error"] = f"{type(error).__name__}: {error}"
    with strategy.scope():
        models = [keras.Sequential([keras.Input((8,)), layers.Dense(9, name=name)]) for name in ("one", "other")]
    try:
        models[not first].export(Path(folder, "whose"), verbose=False)
    except ValueError as error:
        results["differ"] = str(error)
    return results


SERVE = """
import sys, numpy as np, tensorflow as tf
folder, x = sys.argv[1], np.load(sys.argv[2])
loaded = {name: tf.saved_model.load(f"{folder}/{name}") for name in ("export", "archive", "saved")}
served = {
    "export": loaded["export"].serve(x),
    "archive": loaded["archive"].serve(x),
    "doubled": loaded["archive"].doubled(x) / 2,
    "saved": list(loaded["saved"].signatures["serving_default"](tf.constant(x)).values())[0],
    "signature": list(loaded["export"].signatures["serving_default"](tf.constant(x)).values())[0],
}
for name in ("lite", "lite_of_function"):
    interpreter = tf.lite.Interpreter(f"{folder}/{name}.tflite")
    interpreter.allocate_tensors()
    rows = []
    for row in x:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    served[name] = np.stack(rows)
assert not any(name.split(".")[0] == "tfzero" for name in sys.modules)
np.savez(sys.argv[3], **{name: np.array(value) for name, value in served.items()})
"""


def serve(folder: Path) -> dict:
    np.save(folder / "x.npy", data()[0])
    command = [sys.executable, "-c", SERVE, str(folder), str(folder / "x.npy"), str(folder / "served.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "served.npz"))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, export_all(None, folder)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for stage in (2, 3):
        (folder / str(stage)).mkdir()
    results = pool.run(export_in_worker, workers=2, args=(str(folder),))
    return folder, results


RUNS = [sweep("devices-2"), sweep("devices-3"), "workers-2", "workers-3"]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    kind, stage = request.param.split("-")
    if kind == "workers":
        folder, results = request.getfixturevalue("fleet")
        return folder / stage, [result[int(stage)] for result in results]
    folder = tmp_path_factory.mktemp("devices")
    strategy = tfzero.ZeroStrategy(int(stage), min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    return folder, [export_all(strategy, folder)]


def test_plain_tensorflow_serves_what_the_model_gives(run, one_device):
    folder, results = run
    served = serve(folder)
    assert set(served) == {"export", "archive", "doubled", "saved", "signature", "lite", "lite_of_function"}
    for result in results:
        assert all(result["written"]), "the others go on before it is there"
        np.testing.assert_allclose(result["served"], one_device[1]["served"], **CLOSE)
        for name, values in served.items():
            np.testing.assert_allclose(values, result["served"], **CLOSE, err_msg=name)


@pytest.mark.parametrize("way", WAYS[:3])
def test_the_file_holds_the_variables_of_one_device(run, one_device, way):
    mine, theirs = ([shape for _, shape in tf.train.list_variables(str(each[0] / way / "variables/variables"))]
                    for each in (run, one_device))  # fmt: skip
    if way == "saved":  # the optimizer has a wrapper
        assert {tuple(shape) for shape in mine} == {tuple(shape) for shape in theirs}
    else:
        assert sorted(mine) == sorted(theirs)
    kinds = {path.name for path in (run[0] / way).iterdir()}
    assert kinds == {path.name for path in (one_device[0] / way).iterdir()}


def test_training_goes_on(run, one_device):
    for result in run[1]:
        for name in ("weights", "after"):
            for mine, theirs in zip(result[name], one_device[1][name], strict=True):
                np.testing.assert_allclose(mine, theirs, **CLOSE)


def test_one_worker_writes(fleet):
    first, second = (result["written"] for result in fleet[1])
    assert len(first) >= 6 and second == []


def test_all_workers_are_told_that_it_could_not_be_written(fleet):
    first, second = (result["error"] for result in fleet[1])
    assert first == second
    assert first.startswith("OSError: worker 0: ") and str(fleet[0] / "file") in first


def test_workers_that_save_different_models_are_told(fleet):
    for result in fleet[1]:
        assert "workers' variables to save differ" in result["differ"]
        assert "[8, 9]' on worker 0 and missing on worker 1" in result["differ"] and "kernel" in result["differ"]
    assert not (fleet[0] / "whose").exists()


def test_other_strategies_are_untouched(tmp_path):
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.export(tmp_path / "model", verbose=False)
    assert tf.saved_model.load(tmp_path / "model").serve(np.ones((4, 3), "float32")).shape == (4, 2)
