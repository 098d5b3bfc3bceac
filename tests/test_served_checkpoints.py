"""Checkpoints with parameter servers: between all modes, and after the loss of servers and workers."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep
from test_checkpoints import Interruption
from test_servers import DATA, arguments, push, served, server_here, strategy_here, value, wide_model

import tfzero
from tfzero.checkpoint import commits
from tfzero.checkpoint.manifests import find_fault
from tfzero.checkpoint.served import Floor, first_does
from tfzero.servers.layer_state import Change
from tfzero.servers.models import Assignments, Flight

# What a server copies and restores.


def restored(taken, server, workers, max_staleness):
    """Another server, with what was copied of one."""
    other = served(workers, max_staleness)
    for where in ((0, 0, 0), (0, 1, 0)):
        other.assign((0, 0, 1), 0, where, server.read(0, where, is_copied=True))
    state = {name: array for (name, _), array in zip(taken.names, taken.state, strict=True)}
    flight = Flight.read(json.loads(json.dumps(dataclasses.asdict(taken.flight))), workers)
    other.end_assignments((0, 0, 1), Assignments(state, {0: taken.scalars[0]}, flight))
    return other


def test_a_step_that_was_pushed_in_part_counts_once():
    server = served(2, None)
    for step in range(3):
        push(server, 0, step, 1.0)
        server.end(0, step, 1, {})
    push(server, 1, 0, 10.0)  # has not ended
    taken = server.snapshot([0])
    push(server, 0, 3, 100.0)  # is not in the copies
    assert taken.flight == Flight([3, 0], [[0, 1, 0]])
    other = restored(taken, server, 2, None)
    assert value(other) == [-13.0] * 3
    push(other, 1, 0, 10.0)
    other.end(1, 0, 1, {})
    push(other, 0, 2, 1.0)
    push(other, 0, 3, 1.0)
    other.end(0, 3, 1, {})
    assert value(other) == [-14.0] * 3 and other.dropped == 2
    assert other.clocks.done == [4, 1] and other.models[0].store.scalars[0][0] == 5


def test_a_synchronous_step_that_has_not_ended_is_not_copied():
    server = served(2, 0)
    for worker in (0, 1):
        push(server, worker, 0, 2.0)
        server.end(worker, 0, 1, {})
    push(server, 1, 1, 50.0)
    server.end(1, 1, 1, {"m": Change("mean", np.array(1.0), np.array(8.0))})
    taken = server.snapshot([0])
    assert taken.flight == Flight([1, 1], [])
    other = restored(taken, server, 2, 0)
    for worker in (0, 1):
        push(other, worker, 1, 1.0 + worker)
        other.end(worker, 1, 1, {})
    assert value(other) == [-3.5] * 3 and other.dropped == 0


def test_copies_are_those_of_one_moment_until_they_are_dropped():
    server = served(1, 0)
    server.snapshot([0])
    push(server, 0, 0, 2.0)
    server.end(0, 0, 1, {})
    assert server.read(0, (0, 0, 0), is_copied=True).tolist() == [0.0, 0.0]
    assert server.read(0, (0, 0, 0), is_copied=False).tolist() == [-2.0, -2.0]
    server.drop_copies()
    with pytest.raises(KeyError):
        server.read(0, (0, 0, 0), is_copied=True)
    with pytest.raises(ValueError, match="no slot 1"):
        server.read(0, (0, 0, 1), is_copied=False)


def test_what_the_first_worker_does_is_heard_when_it_is_done_or_passed():
    server = served(2, None)
    assert server.hear("a 1", None, lambda: False) == []
    server.announce("a 1", {"value": 5})
    assert server.hear("a 1", 0, lambda: False) == [{"value": 5}]
    push(server, 0, 0, 1.0)
    server.end(0, 0, 1, {})
    assert server.hear("b 1", 0, lambda: False) == []  # it has trained a step since
    server.lose(0)
    with pytest.raises(RuntimeError, match="The first worker was lost"):
        server.hear("b 1", 5, lambda: False)


def test_who_restores_for_others_has_not_passed_them():
    server = served(2, None)
    server.end_assignments((0, 0, 1), Assignments({}, {}, Flight([9, 5])))
    lost = iter([False, True])
    assert server.hear("restoring", 5, lambda: next(lost)) == []  # as this worker is lost: it has waited
    assert next(lost, None) is None
    push(server, 0, 9, 1.0)
    server.end(0, 9, 1, {})
    assert server.hear("restoring", 5, lambda: False) == []


def test_what_a_synchronous_step_has_updated_already_is_in_flight():
    server = served(3, 0)
    server.lose(0)  # so the others do not wait for it
    server.end(1, 0, 1, {})
    server.end(2, 0, 1, {})
    server.wait_for_others(1, 0, False, lambda: False)
    for worker in (1, 2):
        push(server, worker, 1, 2.0)
    server.come(0)
    taken = server.snapshot([0])
    assert taken.flight == Flight([0, 1, 1], [[0, 1, 0], [0, 2, 0]])
    assert server.read(0, (0, 0, 0), is_copied=True).tolist() == [-2.0, -2.0]
    other = restored(taken, server, 3, 0)
    for worker in (1, 2):
        push(other, worker, 1, 2.0)
    assert value(other) == [-2.0] * 3 and other.dropped == 2


def test_copies_are_dropped_when_nobody_can_read_them():
    server = served(2, None)
    server.snapshot([0])
    server.lose(1)
    server.read(0, (0, 0, 0), is_copied=True)
    server.lose(0)
    with pytest.raises(KeyError):
        server.read(0, (0, 0, 0), is_copied=True)


# Where workers resume.


def manifest(step, servers, **position):
    position = {
        "first_epoch": 0,
        "finished": None,
        "epoch": 2,
        "batch": 1,
        "epoch_batches": 4,
        "epoch_steps": [0, 4, 8],
        **position,
    }
    return {"step": step, "position": position, "servers": servers}


def of_server(done, pushed=(), layout="x"):
    return {"done": list(done), "pushed": [list(each) for each in pushed], "layout": layout, "scalars": [[[len(done)]]]}


@pytest.mark.parametrize(
    ("done", "epoch", "batch", "epoch_batches"),
    [((9, 9), 2, 1, 4), ((9, 8), 2, 0, 4), ((9, 7), 1, 3, 4), ((9, 3), 0, 3, 0), ((9, 12), 2, 1, 4)],
)
def test_all_resume_where_the_slowest_was(done, epoch, batch, epoch_batches):
    # The first worker has taken 9 steps in this `fit`, after 100 before it.
    floor = Floor.of(manifest(9, [of_server([100 + each for each in done])] * 2), 2)
    assert floor.step == min(done)
    found = {name: floor.position[name] for name in ("epoch", "batch", "epoch_batches")}
    assert found == {"epoch": epoch, "batch": batch, "epoch_batches": epoch_batches}
    ahead = [20 + count - min(done) for count in done]
    assert [each["done"] for each in floor.flights(2, 20, ["x", "x"])] == [ahead, ahead]


def test_what_was_in_flight_is_known_to_the_same_servers_only():
    servers = [of_server([9, 7], [(0, 1, 3)]), of_server([9, 8], [], "y")]
    floor = Floor.of(manifest(9, servers), 2)
    assert floor.step == 7
    counted = {"scalars": [[[2]]]}
    same = [{"done": [2, 0], "pushed": [[0, 1, 3]], **counted}, {"done": [2, 1], "pushed": [], **counted}]
    assert floor.flights(2, 0, ["x", "y"]) == same
    servers[0]["pushed"] = [[0, 1, 3], [0, 0, 3]]
    other = {"done": [3, 1], "pushed": []}  # nothing twice
    assert Floor.of(manifest(9, servers), 2).flights(2, 0, ["z"]) == [other]


def test_who_is_behind_at_the_end_goes_on():
    behind = Floor.of(manifest(12, [of_server([12, 8])], epoch=3, batch=0, finished=3), 2)
    assert (behind.step, behind.position["epoch"], behind.position["finished"]) == (8, 2, None)
    further = Floor.of(manifest(8, [of_server([8, 12])], batch=0, finished=3), 2)  # the first one stopped earlier
    assert (further.step, further.position["finished"]) == (8, 3)
    assert further.flights(2, 8, ["x"]) == [{"done": [8, 8], "pushed": []}]


def test_nobody_resumes_before_this_fit():
    floor = Floor.of(manifest(4, [of_server([104, 96])], epoch=1, batch=0, epoch_steps=[0, 4]), 2)
    assert (floor.step, floor.position["epoch"], floor.position["batch"]) == (0, 0, 0)
    assert floor.flights(2, 0, ["x"])[0]["done"] == [4, 0]


def test_another_number_of_workers_resumes_where_the_first_was():
    floor = Floor.of(manifest(9, [of_server([9, 7])]), 3)
    assert (floor.step, floor.position["batch"]) == (9, 1)
    assert floor.flights(3, 5, ["x"]) == [{"done": [5, 5, 5], "pushed": []}]


# One worker, with servers in threads.


@contextlib.contextmanager
def mode(monkeypatch, servers, **settings):
    """A scope for a model: with servers, without (0), or of plain Keras (None)."""
    if servers:
        with strategy_here(monkeypatch, servers, min_shard_elements=64, **settings) as strategy:
            yield strategy.scope
    else:
        monkeypatch.delenv("TF_CONFIG", raising=False)
        yield contextlib.nullcontext if servers is None else tfzero.ZeroStrategy(**settings).scope


def made(scope, name, seed=5):
    with scope():
        model = wide_model()
        keras.utils.set_random_seed(seed)
        if seed != 5:
            model.set_weights([np.random.normal(size=w.shape).astype(w.dtype) for w in model.get_weights()])
    model.compile(**arguments(name), **({} if scope is not contextlib.nullcontext else {"jit_compile": False}))
    return model


def fit(model, epochs, **more):
    x, y = DATA.arrays()
    return model.fit(x, y, batch_size=15, epochs=epochs, shuffle=False, verbose=0, **more).history


def state_of(model):
    return [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]


def assert_equal(ours, theirs, rtol=0.0, atol=0.0):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_same(model, plain):
    """Trained alike, with all slots and counters."""
    assert_equal(state_of(model), state_of(plain), rtol=2e-4, atol=2e-5)


WIDE = {"servers": 2, "stage": 3, "devices": ["CPU:0", "CPU:1"]}
NARROW = {"servers": 1, "stage": 0, "devices": ["CPU:0"]}
SHARDED = {"servers": 0, "stage": 2, "devices": ["CPU:0", "CPU:1"]}
PLAIN = {"servers": None}


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (WIDE, NARROW, "nadam"),
        (SHARDED, WIDE, "adam"),
        (WIDE, PLAIN, "adamw"),
        *(sweep(*each) for each in ((NARROW, PLAIN, "sgd"), (PLAIN, WIDE, "nadam"), (NARROW, SHARDED, "adamw"))),
    ],
)
def test_checkpoints_go_between_all_modes(monkeypatch, tmp_path, before, after, name):
    plain = made(contextlib.nullcontext, name)
    fit(plain, 2)
    with mode(monkeypatch, **before) as scope:
        model = made(scope, name)
        fit(model, 2)
        folder = tfzero.save_checkpoint(model, tmp_path)
        assert folder.name == "step-00000008"
        saved = state_of(model)
    with mode(monkeypatch, **after) as scope:
        model = made(scope, name, seed=6)
        assert tfzero.load_checkpoint(model, tmp_path) == 8
        assert_equal(state_of(model), saved)
        fit(plain, 1)
        fit(model, 1)
        assert_same(model, plain)


@contextlib.contextmanager
def saving():
    """Waits for what is written in the background, as the end of a process does."""
    yield
    for thread in threading.enumerate():
        if thread.name == "tfzero save":
            thread.join()


@pytest.mark.parametrize(
    ("before", "after", "asynchronous"),
    [(WIDE, NARROW, False), (SHARDED, NARROW, True), sweep(WIDE, WIDE, True), sweep(NARROW, SHARDED, True)],
)
def test_a_run_resumes_in_the_middle_of_an_epoch(monkeypatch, tmp_path, before, after, asynchronous):
    plain = made(contextlib.nullcontext, "nadam")
    history = fit(plain, 3)
    saves = {"save_every_steps": 3, "asynchronous": asynchronous}
    with mode(monkeypatch, **before) as scope, saving(), pytest.raises(Interruption.Crash):
        fit(made(scope, "nadam"), 3, callbacks=[tfzero.CheckpointCallback(tmp_path, **saves), Interruption(7)])
    with mode(monkeypatch, **after) as scope:
        model = made(scope, "nadam", seed=6)
        resumed = fit(model, 3, callbacks=[tfzero.CheckpointCallback(tmp_path, **saves)])
        assert_same(model, plain)
        for name in ("loss", "accuracy"):  # those of the epoch in progress go on
            np.testing.assert_allclose(resumed[name], history[name][1:], rtol=1e-4)
        assert fit(model, 3, callbacks=[tfzero.CheckpointCallback(tmp_path)]) == {}
        fit(plain, 1)
        fit(model, 4, callbacks=[tfzero.CheckpointCallback(tmp_path)])
        assert_same(model, plain)


def test_files_hold_the_whole_optimizer(monkeypatch, tmp_path):
    plain = made(contextlib.nullcontext, "nadam")
    fit(plain, 2)
    with mode(monkeypatch, **WIDE) as scope:
        model = made(scope, "nadam")
        fit(model, 2)
        model.save(tmp_path / "model.keras")
        saved = state_of(model)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_equal(state_of(loaded), saved)
    fit(plain, 1)
    with mode(monkeypatch, **WIDE) as scope:
        with scope():
            model = keras.models.load_model(tmp_path / "model.keras")
        fit(model, 1)
        assert_same(model, plain)
    fit(loaded, 1)
    assert_same(loaded, plain)


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_assigned(monkeypatch, tmp_path):
    plain = made(contextlib.nullcontext, "sgd")
    tfzero.save_checkpoint(plain, tmp_path)
    with mode(monkeypatch, **NARROW) as scope:
        model = made(scope, "adam")
        fit(model, 1)
        before = model.get_weights()
        with pytest.raises(ValueError, match="another optimizer"):
            tfzero.load_checkpoint(model, tmp_path)
        with pytest.raises(FileNotFoundError):
            tfzero.load_checkpoint(model, tmp_path / "nothing")
        fit(model, 1, initial_epoch=1)
        for one, other in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_server_that_is_lost_while_a_checkpoint_is_written_ends_the_run(monkeypatch, tmp_path):
    with mode(monkeypatch, **NARROW) as scope:
        model = made(scope, "adam")
        fit(model, 1)
        strategy = model.distribute_strategy
        whole = strategy.served.snapshot

        def snapshot(remotes):
            taken = whole(remotes)
            strategy.served.peers[0].close("the test has ended it")
            return taken

        strategy.served.snapshot = snapshot
        with pytest.raises(OSError, match=r"could not be written.*ps 0 at .* was lost"):
            tfzero.save_checkpoint(model, tmp_path)
    assert list(tmp_path.glob("step-*/manifest*")) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda servers: servers[0].update(done=[-1]), "'servers' is"),
        (lambda servers: servers[0].update(pushed=[[0, 5, 0]]), "'servers' is"),
        (lambda servers: servers[0].update(pushed=[[0, 0]]), "'servers' is"),
        (lambda servers: servers[0].pop("layout"), "'servers' is"),
        (lambda servers: servers.clear(), "'servers' is"),
        (lambda servers: servers.append(of_server([1, 2])), "other numbers of workers"),
    ],
)
def test_a_damaged_manifest_is_no_manifest(monkeypatch, tmp_path, change, fault):
    with mode(monkeypatch, **NARROW) as scope:
        model = made(scope, "sgd")
        fit(model, 1)
        folder = tfzero.save_checkpoint(model, tmp_path)
    content = commits.read_manifest(folder)
    assert find_fault(content) == ""
    change(content["servers"])
    assert fault in find_fault(content)


@contextlib.contextmanager
def life(cluster, monkeypatch, is_last=False):
    """A strategy of the only worker, which is lost then, but for its last life."""
    spec = {"worker": list(cluster.addresses), "ps": list(cluster.servers)}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": spec, "task": {"type": "worker", "index": 0}}))
    keras.utils.clear_session()  # names are counted up in each process
    strategy = tfzero.ZeroStrategy(timeout_seconds=20, devices=["CPU:0"], min_shard_elements=64)
    try:
        yield strategy
    finally:
        for peer in strategy.served.peers:
            if not is_last:
                peer.close("the test has lost it")
        strategy.served.peers.leave()


class Assigning(keras.callbacks.Callback):
    """What a program assigns at the end of each epoch, and does there."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.saved = folder, []

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) / 2
        self.model.layers[-1].bias.assign([epoch, 0.0, 1.0])
        if epoch % 2:
            self.saved.append(tfzero.save_checkpoint(self.model, self.folder / "by hand").name)


def program(strategy, folder, crash=None):
    """Two models, each trained once. Returns the second one, and what was saved by hand."""
    with strategy.scope():
        models = wide_model(), wide_model()
    for number, model in enumerate(models):
        model.compile(keras.optimizers.SGD(0.5, momentum=0.5), "categorical_crossentropy")
        with contextlib.suppress(FileNotFoundError):
            tfzero.load_checkpoint(model, folder / "nothing")
        assigning = Assigning(folder / str(number))
        calls = [tfzero.CheckpointCallback(folder / f"saved {number}", save_every_steps=3), assigning]
        fit(model, 6, callbacks=[*calls, *([Interruption(crash)] if crash and number else [])])
    return state_of(models[1]), assigning.saved


@pytest.mark.parametrize("crash", [3, sweep(17), 20])
def test_a_first_worker_that_is_started_again_ends_as_if_it_never_was(monkeypatch, tmp_path, crash):
    with server_here(servers=2) as cluster, life(cluster, monkeypatch, is_last=True) as strategy:
        whole, saved = program(strategy, tmp_path / "whole")
    with server_here(servers=2) as cluster:
        with life(cluster, monkeypatch) as strategy, saving(), pytest.raises(Interruption.Crash):
            program(strategy, tmp_path / "again", crash)
        with life(cluster, monkeypatch, is_last=True) as strategy:
            again, saved_again = program(strategy, tmp_path / "again")
    assert_equal(again, whole, rtol=2e-4, atol=2e-5)
    assert saved_again == saved[-len(saved_again) :]


def test_errors_of_the_first_worker_are_of_the_same_kind_on_all():
    class Other:
        """Another worker, which hears of an error."""

        def first_does(self, topic, function, is_of_fit):
            raise RuntimeError(self.text)

    for text, kind, told in (
        ("FileNotFoundError: nothing there", FileNotFoundError, "^nothing there"),
        ("DamagedCheckpointError: of: this", commits.DamagedCheckpointError, "^of: this"),
        ("The first worker was lost: so", RuntimeError, "^The first worker was lost: so"),
    ):
        other = Other()
        other.text = text
        with pytest.raises(kind, match=told):
            first_does(other, "loading", lambda: 0)


# Real processes, which the launcher starts again.

WORKER = """
import json, os, pickle, sys, time
import test_served_checkpoints as tests
folder, own = sys.argv[1], json.loads(sys.argv[2])
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
tests.train_worker(folder, index, **own)
"""


class Sum(keras.layers.Layer):
    """The sum of its weights: their gradients are 1, whatever they are. With SGD(1.0) each counts the updates."""

    def build(self, shape):
        self.wide = self.add_weight(shape=(300,), initializer="zeros", name="wide")
        self.small = self.add_weight(shape=(5,), initializer="zeros", name="small")

    def call(self, x):
        return tf.reduce_sum(self.wide) + tf.reduce_sum(self.small) + 0 * x[:, :3]


def mean_of_outputs(y, outputs):
    return tf.reduce_mean(outputs, -1)


def counting_model():
    return keras.Sequential([keras.Input((8,)), Sum()])


def learning_model():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(170, "tanh"), keras.layers.Dropout(0.2, seed=3),
                             keras.layers.Dense(3, "softmax")])  # fmt: skip


COMPILED = {
    "counts": lambda: {"optimizer": keras.optimizers.SGD(1.0), "loss": mean_of_outputs},
    "learns": lambda: arguments("nadam"),
}


def train_worker(folder, index, settings, kind, every, epochs, slow):
    """The program of a worker: of other first values and another seed than the others."""
    strategy = tfzero.ZeroStrategy(timeout_seconds=30, min_shard_elements=64, **settings)
    keras.utils.set_random_seed(5 + index)
    with strategy.scope():
        model = counting_model() if kind == "counts" else learning_model()
    model.compile(**COMPILED[kind]())

    def note(batch, logs):
        with open(f"{folder}/step{index}", "a") as file:
            file.write("." * bool(logs))
        time.sleep(slow[index])

    x, y = oracle.Data(samples=64).arrays()
    calls = [tfzero.CheckpointCallback(f"{folder}/saved", save_every_steps=every),
             keras.callbacks.LambdaCallback(on_train_batch_end=note)]  # fmt: skip
    model.fit(x, y, batch_size=16, epochs=epochs, verbose=0, callbacks=calls)
    told = strategy.served.peers.ask_all({"do": "tell"})
    optimizer = [variable.numpy() for variable in model.optimizer.variables]
    with open(f"{folder}/result{index}", "wb") as file:
        pickle.dump({"weights": model.get_weights(), "told": told, "optimizer": optimizer}, file)


class Run:
    """The launcher, with a log, and processes that a test ends."""

    def __init__(self, folder, devices=1, restarts=9, **own):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "worker.py").write_text(WORKER)
        own = {"settings": {}, "kind": "counts", "every": 2, "epochs": 12, "slow": [0.03, 0.06], **own}
        options = ["--workers", 2, "--servers", 2, "--cpu-devices", devices, "--max-restarts", restarts]
        command = [sys.executable, "-m", "tfzero.launch", *map(str, options), str(folder / "worker.py"), str(folder)]
        with open(folder / "log", "a") as log:
            paths = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
            environment = {**os.environ, "PYTHONPATH": paths}
            self.process = subprocess.Popen([*command, json.dumps(own)], env=environment, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(FLEET_SECONDS)

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def wait(self):
        try:
            return self.process.wait(FLEET_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running:\n{self.log}")

    def steps(self, index):
        path = self.folder / f"step{index}"
        return path.stat().st_size if path.exists() else 0

    def wait_for_steps(self, index, count):
        """Waits until a worker has trained so many more steps, in all its lives."""
        until, deadline = self.steps(index) + count, time.monotonic() + FLEET_SECONDS
        while self.steps(index) < until:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log
            time.sleep(0.005)

    def children(self, what):
        command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)]
        listed = subprocess.run(command, text=True, capture_output=True, check=False)  # 1 if there are none
        return [int(line.split()[0]) for line in listed.stdout.splitlines() if what in line]

    def kill(self, what, number):
        """Kills a server, or a worker, as soon as there is one."""
        deadline = time.monotonic() + FLEET_SECONDS
        while not (found := self.children("tfzero.servers" if what == "server" else "worker.py")):
            assert time.monotonic() < deadline and self.process.poll() is None, self.log
        os.kill(found[number % len(found)], signal.SIGKILL)

    def results(self):
        return [pickle.loads((self.folder / f"result{index}").read_bytes()) for index in (0, 1)]


def assert_counted(run, updates):
    """Every element on both servers has had so many updates. If the first worker was lost, it ends last."""
    result = run.results()[0]
    for weights in result["weights"]:
        np.testing.assert_array_equal(weights, np.full_like(weights, -updates))
    assert result["optimizer"][0] == updates


@pytest.mark.parametrize(
    ("max_staleness", "devices", "lost"),
    [(3, 2, ["server"]), (None, 2, ["worker", "server", "worker"]), sweep(None, 1, ["server"] * 8)],
)
def test_no_update_is_lost_or_made_twice(tmp_path, max_staleness, devices, lost):
    settings = {"max_staleness": max_staleness, "stage": 2}
    with Run(tmp_path, devices, settings=settings) as run:
        for number, what in enumerate(lost):
            run.wait_for_steps(0, 7)
            time.sleep(random.random() / 5)
            run.kill(what, number)
            time.sleep(0.5)
        assert run.wait() == 0, run.log
        assert "Going on from" in run.log
        assert_counted(run, 2 * 48)


@pytest.mark.parametrize(("stage", "devices"), [(3, 2), sweep(1, 1)])
def test_a_synchronous_run_resumes_bit_for_bit(tmp_path, stage, devices):
    own = {"settings": {"stage": stage}, "kind": "learns", "epochs": 6, "every": 3}
    with Run(tmp_path / "whole", devices, **own) as run:
        assert run.wait() == 0, run.log
        whole = run.results()
    with Run(tmp_path / "resumed", devices, **own) as run:
        run.wait_for_steps(0, 10)
        run.kill("server", 0)
        assert run.wait() == 0, run.log
        assert "Going on from" in run.log
    for one, other in zip(run.results(), whole, strict=True):
        for name in ("weights", "optimizer"):
            for ours, theirs in zip(one[name], other[name], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_all_save_and_end_when_they_or_a_server_are_told_to(tmp_path):
    settings = {"max_staleness": None}
    with Run(tmp_path, settings=settings, every=1000) as run:
        run.wait_for_steps(0, 5)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.log
    with Run(tmp_path, settings=settings, every=1000) as run:
        run.wait_for_steps(0, 5)
        os.kill(run.children("tfzero.servers")[1], signal.SIGTERM)
        assert run.wait() == 0, run.log
        assert run.log.count("Told to stop: saved step") >= 2, run.log
        assert "failed first, with exit code 75" in run.log  # the server, or the worker that it told
        assert_counted(run, 2 * 48)
