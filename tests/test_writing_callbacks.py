"""Keras's callbacks that write: from several workers come the files of one process, with its numbers."""

import contextlib
import csv
import functools
import http.server
import json
import threading
from pathlib import Path

import keras
import numpy as np
import pool
import pytest
from keras import layers
from marks import sweep

import tfzero

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


class Comparing(keras.callbacks.CSVLogger):
    """A subclass that takes part in collectives, as a logger of predictions does."""

    def on_epoch_end(self, epoch, logs=None):
        x, _ = data()
        predicted = self.model.predict(x, batch_size=8, verbose=0)
        super().on_epoch_end(epoch, {**logs, "mean": float(predicted.mean())})


def data():
    random = np.random.default_rng(5)
    x = random.integers(0, 9, (30, 4)).astype("float32")
    return x, x[:, :3] / 4 - 1


def open_and_deleted() -> list[str]:
    """Events that this process still writes into files that are not there any more."""
    links = []
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # that of the listing itself
            links.append(str(path.readlink()))
    return [link for link in links if "tfevents" in link and "(deleted)" in link]


def train(strategy, folder: Path, address: str) -> dict:
    """Trains with all of Keras's callbacks that write, at all of the moments when they do."""
    keras.utils.set_random_seed(3)
    x, y = data()
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        last = [layers.Dense(17, activation="tanh", name="hidden"), layers.Dense(3, name="last")]
        model = keras.Sequential(
            [keras.Input((4,)), layers.Embedding(9, 4, name="table"), layers.Flatten(), *last], name="net"
        )
    no_xla = {"jit_compile": False} if strategy is None else {}
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"], **no_xla)
    board = keras.callbacks.TensorBoard(
        folder / "board", histogram_freq=1, write_images=True, update_freq=2, embeddings_freq=1, profile_batch=(2, 3)
    )
    log = keras.callbacks.CSVLogger(str(folder / "log.csv"))
    monitor = keras.callbacks.RemoteMonitor(address, send_as_json=True)
    arguments = {"batch_size": 8, "shuffle": False, "verbose": 0}
    callbacks = [log, board, Comparing(str(folder / "own.csv"), separator=";"), monitor]
    model.fit(x, y, epochs=3, validation_data=(x[:10], y[:10]), callbacks=callbacks, **arguments)
    more = keras.callbacks.CSVLogger(str(folder / "log.csv"), append=True)
    model.fit(x, y, epochs=2, validation_data=(x[:10], y[:10]), callbacks=[more, monitor], **arguments)
    listed_board = keras.callbacks.TensorBoard(folder / "listed", write_graph=False)
    several = [keras.callbacks.CSVLogger(str(folder / "list.csv")), listed_board]
    listed = keras.callbacks.CallbackList(several, model=model)  # which tells them of the model at once
    model.fit(x, y, epochs=1, callbacks=listed, **arguments)
    model.evaluate(x, y, batch_size=8, verbose=0, callbacks=[keras.callbacks.TensorBoard(folder / "evaluated")])
    model.predict(x, batch_size=8, verbose=0, callbacks=[board])
    return {
        "weights": [np.array(w) for w in model.weights],
        "lost": open_and_deleted(),
        "attributes": [log.filename, more.filename, board.log_dir, sorted(vars(monitor))],
    }


def train_in_worker(stage: int, folder: str, address: str) -> dict:
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8)
    results = train(strategy, Path(folder), address)
    with contextlib.suppress(TypeError):
        orbax = object.__new__(keras.callbacks.OrbaxCheckpoint)
        keras.callbacks.Callback.__init__(orbax)
        with strategy.scope():
            model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="OrbaxCheckpoint.*Use `tfzero.CheckpointCallback"):
            model.fit(*data(), verbose=0, callbacks=[orbax])
        results["refused"] = True
    return results


class Monitor:
    """Takes what `RemoteMonitor` sends."""

    def __enter__(self):
        self.received = received = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with Monitor() as monitor:
        result = train(None, folder, monitor.address)
    return folder, monitor.received, result


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """By stage."""

    @functools.cache
    def of_stage(stage: int):
        folder = tmp_path_factory.mktemp("fleet")
        with Monitor() as monitor:
            arguments = stage, str(folder), monitor.address
            results = pool.run(train_in_worker, workers=2, cpu_devices=2, args=arguments)
        return folder, monitor.received, results

    return of_stage


@pytest.fixture(params=[sweep("devices-2"), sweep("devices-3"), sweep("workers-2"), "workers-3"], scope="module")
def run(request, tmp_path_factory, fleet):
    """The folder, what the monitor received, and what each worker returned."""
    kind, stage = request.param.split("-")
    if kind == "workers":
        return fleet(int(stage))
    strategy = tfzero.ZeroStrategy(int(stage), min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    folder = tmp_path_factory.mktemp("devices")
    with Monitor() as monitor:
        result = train(strategy, folder, monitor.address)
    return folder, monitor.received, [result]


def rows(path: Path, separator=",") -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter=separator))


def assert_close(mine: list[dict], theirs: list[dict]) -> None:
    assert [list(row) for row in mine] == [list(row) for row in theirs]
    for own, other in zip(mine, theirs, strict=True):
        for key in other:
            if other[key] != "NA":
                np.testing.assert_allclose(float(own[key]), float(other[key]), **CLOSE, err_msg=key)
            else:
                assert own[key] == "NA"


def events(folder: Path) -> dict:
    """Of each directory and tag the steps and, for what one device draws alike, the values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = {}
    for directory in sorted({path.parent for path in folder.rglob("*tfevents*")}):
        accumulator = EventAccumulator(str(directory), size_guidance={"tensors": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["tensors"]:
            tensors = accumulator.Tensors(tag)
            found[f"{directory.relative_to(folder)} {tag}"] = (
                [event.step for event in tensors],
                [make_ndarray(event.tensor_proto) for event in tensors],
            )
    return found


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob(pattern))


def test_training_is_as_ever(run, one_device):
    folder, _, results = run
    for result in results:
        for mine, theirs in zip(result["weights"], one_device[2]["weights"], strict=True):
            np.testing.assert_allclose(mine, theirs, **CLOSE)
        assert result["lost"] == []
        # The callbacks are as their owner made them.
        log, more, board, monitor = result["attributes"]
        assert [log, more, board] == [str(folder / name) for name in ("log.csv", "log.csv", "board")]
        assert monitor == one_device[2]["attributes"][3]


@pytest.mark.parametrize(("name", "separator"), [("log.csv", ","), ("own.csv", ";"), ("list.csv", ",")])
def test_logs_have_one_row_an_epoch(run, one_device, name, separator):
    mine, theirs = rows(run[0] / name, separator), rows(one_device[0] / name, separator)
    assert len(theirs) == {"log.csv": 5, "own.csv": 3, "list.csv": 1}[name]
    assert_close(mine, theirs)


def test_a_monitor_is_told_once(run, one_device):
    assert len(one_device[1]) == 5
    assert_close(run[1], one_device[1])


def test_tensorboard_has_the_events_of_one_process(run, one_device):
    mine, theirs = events(run[0]), events(one_device[0])
    assert files(run[0], "*tfevents*") == files(one_device[0], "*tfevents*")
    assert {tag.split("/")[-1] for tag in theirs} >= {"histogram", "image", "train epoch_loss"}
    assert list(mine) == list(theirs)
    compared = 0
    for tag, (steps, values) in theirs.items():
        assert mine[tag][0] == steps, tag
        if "epoch_" in tag or "evaluation_" in tag:
            np.testing.assert_allclose(mine[tag][1], values, **CLOSE, err_msg=tag)
            compared += 1
        elif tag.endswith("/histogram"):  # [30, 3]: of each bin its left, right and count
            for own, other in zip(mine[tag][1], values, strict=True):
                np.testing.assert_allclose(own[:, :2], other[:, :2], rtol=1e-3, atol=1e-4, err_msg=tag)
                assert own[:, 2].sum() == other[:, 2].sum()
            compared += 1
    assert compared > 10


def test_profiles_and_embeddings_are_written_once(run, one_device):
    for pattern in ("*.xplane.pb", "*.weights.h5", "projector_config.pbtxt"):
        assert len(files(run[0], pattern)) == len(files(one_device[0], pattern)), pattern


def test_what_several_workers_cannot_have_is_refused(fleet):
    assert all(result["refused"] for result in fleet(3)[2])
