"""Runs that are killed, stopped, cut off or told to end: real processes, which go on or end by name, and never hang."""

import contextlib
import functools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
from marks import sweep

import tfzero
from tfzero.launch import held_ports

LIMIT_SECONDS = 400
TIMEOUT_SECONDS = 12  # of the strategies
STEPS = 24  # four epochs of six batches, the last one smaller

SURVIVOR = """
import os, signal, sys, time
import keras, numpy as np, tensorflow as tf, tfzero

directory, out, stage, pause, timeout_seconds = *sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5])
tf.config.experimental.enable_op_determinism()
keras.utils.set_random_seed(1)
strategy = tfzero.ZeroStrategy(int(stage), min_shard_elements=8, timeout_seconds=timeout_seconds)
with strategy.scope():
    hidden = [keras.layers.Dense(17, activation="tanh"), keras.layers.BatchNormalization(synchronized=True)]
    model = keras.Sequential([keras.Input((5,)), *hidden, keras.layers.Dense(3)])
model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "mse", metrics=["mae"])
random = np.random.default_rng(0)
x, y = random.normal(size=(46, 5)).astype("float32"), random.normal(size=(46, 3)).astype("float32")
checkpoints = tfzero.CheckpointCallback(directory, save_every_steps=3, save_every_epochs=None)


class Note(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        print("step", checkpoints.step + 1, "of process", os.getpid(), flush=True)

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(pause)


def die_before(owner, name, countdown):
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        countdown[0] -= 1
        return original(*args, **kwargs)

    setattr(owner, name, call)


if os.environ.get("DIES") == f"{os.environ['TFZERO_RESTARTS']} {strategy.cluster_resolver.task_id}":
    countdown = [int(os.environ["DIES_BEFORE"])]
    for owner, name in ((os, "fsync"), (os, "rename"), (tf.raw_ops, "SaveV2"), (tf.raw_ops, "MergeV2Checkpoints")):
        die_before(owner, name, countdown)

history = model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[checkpoints, Note()]).history
values = [np.array(v) for v in (*model.variables, *model.optimizer.variables)]
if strategy.cluster_resolver.task_id == 0:
    np.savez(out, *values, **{f"history_{name}": values for name, values in history.items()})
"""


class Run:
    """A process whose output is read line by line, for tests that act in the middle of it."""

    def __init__(self, command, **environment):
        self.lines: list[str] = []
        self._queue: queue.Queue = queue.Queue()
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **environment}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([str(part) for part in command], env=environment, **streams)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.deadline = time.monotonic() + LIMIT_SECONDS

    def _read(self):
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def _next_lines(self):
        try:
            while (line := self._queue.get(timeout=max(0.1, self.deadline - time.monotonic()))) is not None:
                self.lines.append(line)
                yield line
        except queue.Empty:
            pytest.fail(f"The output went on too long:\n{''.join(self.lines)}")

    def wait_for(self, pattern):
        """The next match in the output."""
        for line in self._next_lines():
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"The output ended without {pattern!r}:\n{''.join(self.lines)}")

    def end(self):
        """Waits for the end; gives the exit code and the output."""
        output = "".join([*self.lines, *self._next_lines()])
        return self.process.wait(LIMIT_SECONDS), output

    def close(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()


@pytest.fixture
def runs():
    with contextlib.ExitStack() as stack:

        def start(command, **environment):
            run = Run(command, **environment)
            stack.callback(run.close)
            return run

        yield start


def survivor(folder, workers=2, stage=2, pause=0.0, restarts=0):
    script = folder / "survivor.py"
    script.write_text(SURVIVOR)
    head = [sys.executable, "-m", "tfzero.launch", "--workers", workers, "--max-restarts", restarts]
    return [*head, script, folder / "checkpoints", folder / "out.npz", stage, pause, TIMEOUT_SECONDS]


def result(folder):
    with np.load(folder / "out.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @functools.cache
    def of(stage):
        folder = tmp_path_factory.mktemp("uninterrupted")
        run = Run(survivor(folder, stage=stage))
        try:
            code, output = run.end()
        finally:
            run.close()
        assert code == 0, output
        return result(folder)

    return of


def assert_same(ours, theirs, rtol=0.0, atol=0.0):
    """All variables, and what the last run has of the history."""
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        expected = theirs[name][-len(values) :] if name.startswith("history") else theirs[name]
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol, err_msg=name)


def assert_went_on_from_checkpoints(output, restarts):
    """Each of the last runs begins with the step after its checkpoint's, and no checkpoint is damaged."""
    fleets = re.split(r"tfzero.launch: .*restart \d+ of", output)[-restarts:]
    assert len(fleets) == restarts, output
    for fleet in fleets:
        folder, step = map(int, re.search(r"worker 0\] Going on from \S+/step-(\d+): step (\d+),", fleet).groups())
        first = int(re.search(r"worker 0\] step (\d+) of", fleet)[1])
        assert folder == step == first - 1 > 0, output
    assert "damaged" not in output, output


def committed(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("stage", "kills", "seed"), [(2, 1, 7), (3, 1, 7), (3, 20, 0), (2, 20, 1), (3, 20, 2), (2, 20, 3), (3, 20, 4)]
)
def test_a_run_killed_at_random_instants_ends_as_if_never_killed(runs, uninterrupted, tmp_path, stage, kills, seed):
    """102 kills in all; the first long one alone is a short sweep: `-m sweep -k 3-20-0`."""
    chance = random.Random(seed)
    run = runs(survivor(tmp_path, stage=stage, pause=0.15, restarts=kills + 1))
    run.deadline += 15 * kills
    for kill in range(kills):
        # A checkpoint is there, so that a run that goes on from none is noticed.
        pids = {run.wait_for(rf"worker {k}\] step \d+ of process (\d+)")[1] for k in range(2)}
        while not committed(tmp_path):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.2 / (1 + kills / 8)))
        before = committed(tmp_path)
        os.kill(int(chance.choice(sorted(pids))), signal.SIGKILL)
        run.wait_for(rf"restart {kill + 1} of")
        assert before[-1] <= committed(tmp_path)[-1], "a checkpoint was lost"
    code, output = run.end()
    assert code == 0, output
    assert_went_on_from_checkpoints(output, kills)
    assert_same(result(tmp_path), uninterrupted(stage))


@pytest.mark.parametrize(("workers", "stage"), [sweep(3, 3), sweep(1, 0)])
def test_a_killed_run_goes_on_with_another_number_of_workers(runs, uninterrupted, tmp_path, workers, stage):
    run = runs(survivor(tmp_path, pause=0.1))
    pid = run.wait_for(r"worker 1\] step 8 of process (\d+)")[1]
    os.kill(int(pid), signal.SIGKILL)
    code, output = run.end()
    assert code == 128 + signal.SIGKILL, output
    code, output = runs(survivor(tmp_path, workers=workers, stage=stage)).end()
    assert code == 0, output
    assert_went_on_from_checkpoints(output, 1)
    assert_same(result(tmp_path), uninterrupted(2), rtol=1e-6, atol=1e-6)


# The chief's second save: SaveV2, its two files, the merge, pointer, index, manifest, folder, rename, parent.
POINTS = [*((0, k) for k in range(20)), *((1, k) for k in range(6))]


@pytest.mark.parametrize(
    ("worker", "point"),
    [pytest.param(*p, marks=[] if p == (0, 18) else pytest.mark.sweep) for p in POINTS],
)
def test_a_run_killed_at_a_write_point_ends_as_if_never_killed(runs, uninterrupted, tmp_path, worker, point):
    """And by default its last steps can be done by other workers at another stage."""
    run = runs(survivor(tmp_path, restarts=1, pause=0.05), DIES=f"0 {worker}", DIES_BEFORE=str(point))
    code, output = run.end()
    assert code == 0, output
    assert "restart 1 of 1" in output, "nobody died"
    assert "damaged" not in output, output
    if point >= (3 if worker else 10):
        assert_went_on_from_checkpoints(output, 1)
    assert_same(result(tmp_path), uninterrupted(2))
    if point == 18:
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08}")
        code, output = runs(survivor(tmp_path, workers=3, stage=3)).end()
        assert code == 0, output
        assert_went_on_from_checkpoints(output, 1)
        assert re.search(rf"Going on from .*: step {STEPS - 3},", output), output
        assert_same(result(tmp_path), uninterrupted(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("told", ["one worker", sweep("the launcher")])
def test_sigterm_saves_after_the_same_step_and_ends_all(runs, uninterrupted, tmp_path, told):
    run = runs(survivor(tmp_path, pause=0.3))
    pids = [int(run.wait_for(rf"worker {k}\] step \d+ of process (\d+)")[1]) for k in range(2)]
    os.kill(pids[1] if told == "one worker" else run.process.pid, signal.SIGTERM)
    code, output = run.end()
    assert code == 75, output
    saved = set(re.findall(r"Told to stop: saved step (\d+) in", output))
    assert len(saved) == 1 and output.count("Told to stop") >= 1, output
    code, output = runs(survivor(tmp_path)).end()
    assert code == 0, output
    assert re.findall(r"Going on from .*: step (\d+),", output) == [*saved]
    assert_same(result(tmp_path), uninterrupted(2))


def _disagree(folder):
    import keras

    strategy = tfzero.ZeroStrategy()
    index = strategy.cluster_resolver.task_id
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = tfzero.CheckpointCallback(folder, save_every_steps=3 + index)
    try:
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[callback])
    except ValueError as error:
        return str(error)
    return "no error"


def test_workers_that_would_save_at_different_steps_are_refused(tmp_path):
    for text in tfzero.run_local(_disagree, workers=2, args=(str(tmp_path),), timeout_seconds=LIMIT_SECONDS):
        assert "settings of CheckpointCallback differ: save_every_steps is '3' on worker 0 and '4' on worker 1" in text


# Workers that are lost.


def fleet(folder, addresses, stage):
    """The commands and environments of workers that nobody watches."""
    script = folder / "survivor.py"
    script.write_text(SURVIVOR)
    command = [sys.executable, script, folder / "checkpoints", folder / "out.npz", stage, 0.2, TIMEOUT_SECONDS]
    for index in range(len(addresses)):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        yield command, {"TF_CONFIG": json.dumps(config), "TFZERO_RESTARTS": "0"}


def assert_ended_by_name(run, lost, where, began):
    code, output = run.end()
    seconds = time.monotonic() - began
    assert code == 76, output
    last = output[output.rindex("exits with code 76") :]
    assert re.search(rf"worker {lost} at \S+ (was lost|did not arrive)|worker {lost} was lost", last), output
    assert re.search(rf"was in step \d+, at .*{where}", last), output
    assert seconds < TIMEOUT_SECONDS + 5, seconds


@pytest.mark.parametrize(("number", "stage"), [(signal.SIGKILL, 3), sweep(signal.SIGSTOP, 2)])
def test_the_others_name_a_lost_worker_and_end_in_time(runs, tmp_path, number, stage):
    with held_ports(3) as ports:
        commands = fleet(tmp_path, [f"127.0.0.1:{port}" for port in ports], stage)
        workers = [runs(command, **environment) for command, environment in commands]
        for worker in workers:
            worker.wait_for(r"step 4 of process")
        began = time.monotonic()
        workers[1].process.send_signal(number)
        for worker in (workers[0], workers[2]):
            assert_ended_by_name(worker, 1, r"(bucket \d+|parameter|gradient|replicas)", began)


@contextlib.contextmanager
def two_networks():
    """Two network namespaces joined by a cable; gives their names, addresses, and a function that cuts the cable."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("Network namespaces need root and the command `ip`.")
    tag = uuid.uuid4().hex[:6]
    names, ends = [f"tfzero{k}{tag}" for k in range(2)], [f"tz{k}{tag}" for k in range(2)]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"Network namespaces are not allowed here: {error.stderr.strip()}")
        for k, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.213.7.{k + 1}/24", "dev", end)
            for each in (end, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield (
            names,
            ["10.213.7.1:23456", "10.213.7.2:23456"],
            lambda: ip("-n", names[1], "link", "set", ends[1], "down"),
        )


def test_workers_whose_network_is_cut_name_each_other_and_end_in_time(runs, tmp_path):
    with two_networks() as (names, addresses, cut):
        workers = []
        for name, (command, environment) in zip(names, fleet(tmp_path, addresses, 2), strict=True):
            workers.append(runs(["ip", "netns", "exec", name, *command], **environment))
        for worker in workers:
            worker.wait_for(r"step 4 of process")
        began = time.monotonic()
        cut()
        for k, worker in enumerate(workers):
            assert_ended_by_name(worker, 1 - k, "", began)
