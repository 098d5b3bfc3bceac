"""Wrong input is answered before anything trains: what was received, and what to do. Nothing waits for ever."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from marks import sweep
from oracle import Data, dense_model

import tfzero
from tfzero.launch import held_ports

LIMIT_SECONDS = 150  # of each fleet, against hanging; most take 15 s
NAMED_SECONDS = 60  # until a survivor has ended with its error, start of TensorFlow included
pytestmark = pytest.mark.timeout(2 * LIMIT_SECONDS)


@pytest.fixture(scope="module")
def strategy():
    return tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"], min_shard_elements=10)


@pytest.fixture(scope="module")
def other_strategy():
    return tfzero.ZeroStrategy(2, devices=["CPU:2", "CPU:3"], min_shard_elements=10)


def make(strategy):
    with strategy.scope():
        return dense_model()


# Settings.


@pytest.mark.parametrize("stage", [4, -1, "2", True, None, 2.5])
def test_unknown_stage(stage):
    with pytest.raises(ValueError, match=re.escape(f"stage={stage!r}")):
        tfzero.ZeroStrategy(stage)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        tfzero.ZeroStrategy(2, ["CPU:0"])


@pytest.mark.parametrize(
    "devices",
    [["CPU:99"], ["GPU:0"], ["CPU:0", "CPU:0"], ["/device:CPU:0", "CPU:0"], [], "CPU:0", ["nonsense"], [None], [0], 7],
    ids=repr,
)
def test_devices(devices):
    with pytest.raises(ValueError, match="device") as caught:
        tfzero.ZeroStrategy(2, devices=devices)
    assert (devices if isinstance(devices, str) else repr(devices).strip("[]")) in str(caught.value)


def test_mixed_devices(monkeypatch):
    known = {"CPU": ["CPU:0"], "GPU": ["GPU:0"]}
    monkeypatch.setattr("tfzero.host.devices._machine_devices", known.get)
    with pytest.raises(ValueError, match=r"one type, CPU or GPU. Received: devices=\['CPU:0', 'GPU:0'\]"):
        tfzero.ZeroStrategy(2, devices=["CPU:0", "GPU:0"])


@pytest.mark.parametrize(
    "setting",
    [
        {"bucket_bytes": 0},
        {"bucket_bytes": -1},
        {"bucket_bytes": 1.5},
        {"bucket_bytes": True},
        {"bucket_bytes": "25 MiB"},
        {"bucket_bytes": None},
        {"min_shard_elements": -1},
        {"min_shard_elements": 1.0},
        {"min_shard_elements": None},
        {"compare_batches": -1},
        {"compare_batches": 1.5},
        {"compare_batches": True},
        {"timeout_seconds": 0},
        {"timeout_seconds": -5},
        {"timeout_seconds": float("nan")},
        {"timeout_seconds": float("inf")},
        {"timeout_seconds": "60"},
        {"timeout_seconds": None},
    ],
    ids=repr,
)
def test_numbers_out_of_range(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=re.escape(f"Received: {name}={value!r}")):
        tfzero.ZeroStrategy(2, **setting)


# The cluster.


@pytest.mark.parametrize("resolver", ["localhost:1", {"worker": ["a:1"]}, 3], ids=repr)
def test_cluster_resolver_of_wrong_type(resolver):
    with pytest.raises(ValueError, match="must be a ClusterResolver. Received: " + re.escape(repr(resolver))):
        tfzero.ZeroStrategy(2, cluster_resolver=resolver)


@pytest.mark.parametrize("text", ["{", '{"cluster": {"worker": ["a:1", "b:1"]}}', '{"cluster": {"ps": ["a:1"]}}'])
def test_malformed_tf_config(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG") as caught:
        tfzero.ZeroStrategy(2)
    assert text in str(caught.value)


def test_task_index_out_of_range(monkeypatch):
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(ValueError, match="worker 2.*only worker 0, worker 1"):
        tfzero.ZeroStrategy(2)


def test_tensorflow_used_before_the_strategy(monkeypatch):
    """This process has used it; the error comes before any waiting."""
    tf.constant(1)
    addresses = ["127.0.0.1:20001", "127.0.0.1:20002"]
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="used before the ZeroStrategy.*start of the program"):
        tfzero.ZeroStrategy(2)
    assert time.monotonic() - started < 2


# Models, optimizers and data, in this process.


def test_model_of_no_strategy(strategy):
    optimizer = tfzero.ZeroOptimizer("adam")
    with pytest.raises(ValueError, match="Create the whole model under `with strategy.scope"):
        optimizer.build(dense_model().trainable_variables)


def test_model_of_another_strategy(strategy, other_strategy):
    variables = make(strategy).trainable_variables + make(other_strategy).trainable_variables
    with pytest.raises(ValueError, match="one ZeroStrategy, but these belong to 2 strategies"):
        tfzero.ZeroOptimizer("adam").build(variables)


def test_model_of_mirrored_strategy():
    stock = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    variables = make(stock).trainable_variables
    with pytest.raises(ValueError, match="MirroredStrategy"):
        tfzero.ZeroOptimizer("adam").build(variables)


def test_optimizer_of_another_strategy(strategy, other_strategy):
    x, y = Data().arrays()
    optimizer = keras.optimizers.Adam()
    model = make(strategy)
    model.compile(optimizer, "categorical_crossentropy")
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="'adam.*'.*another ZeroStrategy. Pass a new optimizer"):
        make(other_strategy).compile(optimizer, "categorical_crossentropy")


def test_wrapped_optimizer_of_another_strategy(strategy, other_strategy):
    optimizer = tfzero.ZeroOptimizer("adam")
    optimizer.build(make(strategy).trainable_variables)
    model = make(other_strategy)
    x, y = Data().arrays()
    before = model.get_weights()
    with pytest.raises(ValueError, match="(?i)optimizer"):
        model.compile(optimizer, "categorical_crossentropy")
        model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_optimizer_built_elsewhere(strategy):
    optimizer = keras.optimizers.Adam()
    optimizer.build(dense_model().trainable_variables)
    with pytest.raises(ValueError, match="'adam.*' .Adam. has been built already.*Pass a new one"):
        make(strategy).compile(optimizer, "categorical_crossentropy")


class ApplyingItself(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)


def test_optimizer_that_overrides_apply(strategy):
    with pytest.raises(TypeError, match="ApplyingItself overrides the whole of `apply`.*Override `update_step`"):
        make(strategy).compile(ApplyingItself(), "categorical_crossentropy")


@pytest.mark.parametrize("optimizer", ["no such optimizer", 3, object()], ids=["name", "number", "object"])
def test_no_optimizer_at_all(strategy, optimizer):
    with pytest.raises((ValueError, TypeError), match="(?i)optimizer|interpret"):
        make(strategy).compile(optimizer, "categorical_crossentropy")


def test_wrapper_in_a_wrapper():
    with pytest.raises(ValueError, match="ZeroOptimizer already"):
        tfzero.ZeroOptimizer(tfzero.ZeroOptimizer("adam"))


def test_wrapper_in_a_loss_scale(strategy):
    with pytest.raises(ValueError, match="outermost"):
        make(strategy).compile(
            keras.optimizers.LossScaleOptimizer(tfzero.ZeroOptimizer("adam")), "categorical_crossentropy"
        )


def test_wrapped_optimizer_without_a_zero_strategy():
    x, y = Data().arrays()
    model = dense_model()
    with pytest.raises((ValueError, RuntimeError), match="strategy.scope|strategy.run"):
        model.compile(tfzero.ZeroOptimizer("adam"), "categorical_crossentropy")
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_unwrapped_optimizer_in_a_replica(strategy, compiled):
    model = make(strategy)
    with strategy.scope():
        optimizer = keras.optimizers.SGD()

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([2, 8])))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(strategy.run) if compiled else strategy.run
    with pytest.raises(RuntimeError, match="without its wrapper. *Make it `tfzero.ZeroOptimizer"):
        run(step)


def test_apply_outside_a_replica(strategy):
    model = make(strategy)
    optimizer = tfzero.ZeroOptimizer("sgd")
    with pytest.raises(RuntimeError, match="strategy.run"):
        optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)


def test_variables_of_no_float_dtype(strategy):
    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(20,), dtype="int32", initializer="zeros", trainable=True, name="count")
            self.scale = self.add_weight(shape=(20,), initializer="ones", name="scale")

        def call(self, x):
            return x * tf.reduce_sum(self.scale)

    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), Counting()])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="count.*int32.*trainable=False"):
        model.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0)


def test_jit_compile(strategy):
    with pytest.raises(ValueError, match="jit_compile=True cannot work.*Leave jit_compile at 'auto'"):
        make(strategy).compile("adam", "categorical_crossentropy", jit_compile=True)


def test_jit_compile_set_later(strategy):
    model = make(strategy)
    model.compile("adam", "categorical_crossentropy")
    model.jit_compile = True
    x, y = Data().arrays()
    with pytest.raises(ValueError, match="jit_compile"):
        model.fit(x, y, verbose=0)


def compiled(strategy):
    model = make(strategy)
    model.compile("adam", "categorical_crossentropy")
    return model


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_no_samples(strategy, method):
    x, y = Data().arrays()
    model = compiled(strategy)
    before = model.get_weights()
    with pytest.raises(ValueError, match="(?i)empty|no data|at least one|0 samples|no samples|ran out"):
        getattr(model, method)(x[:0], y[:0], verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_empty_dataset(strategy, method):
    dataset = tf.data.Dataset.from_tensor_slices(Data().arrays()).batch(15).take(0)
    model = compiled(strategy)
    before = model.get_weights()
    with pytest.raises(ValueError, match="(?i)empty|no data|at least one|0 samples|no samples|ran out"):
        getattr(model, method)(dataset, verbose=0, **({"shuffle": False} if method == "fit" else {}))
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


@pytest.mark.parametrize(
    ("method", "steps_per_execution"),
    [("fit", 1), sweep("fit", 2), sweep("evaluate", 1), ("evaluate", 2), ("predict", 1), sweep("predict", 2)],
)
def test_a_dataset_of_unknown_length_without_a_batch(strategy, method, steps_per_execution):
    dataset = tf.data.Dataset.from_tensor_slices(Data().arrays()).filter(lambda x, y: False).batch(15)
    model = make(strategy)
    model.compile("adam", "categorical_crossentropy", steps_per_execution=steps_per_execution)
    with pytest.raises(ValueError, match="The data set is empty"):
        getattr(model, method)(dataset, verbose=0, **({"shuffle": False} if method == "fit" else {}))


def test_unbatched_scalars(strategy):
    dataset = tf.data.Dataset.from_tensor_slices((np.ones(8, "float32"), np.ones(8, "float32")))
    with pytest.raises(ValueError, match="must be batched.*Call `dataset.batch"):
        compiled(strategy).fit(dataset, verbose=0, shuffle=False)
    with pytest.raises(ValueError, match="must be batched"):
        strategy.experimental_distribute_dataset(tf.data.Dataset.range(5))


def test_no_dataset_at_all(strategy):
    with pytest.raises(ValueError, match="distributes a tf.data.Dataset, but received"):
        strategy.experimental_distribute_dataset([1, 2, 3])


def test_inputs_of_different_length(strategy):
    x, y = Data().arrays()
    with pytest.raises(ValueError, match="(?i)cardinality"):
        compiled(strategy).fit(x, y[:-1], verbose=0)


# Workers that differ or leave. Each runs `scenario` in processes of its own, which end on their own.


def fit(model, samples=46, optimizer="sgd"):
    x, y = Data(samples).arrays()
    model.compile(optimizer, "categorical_crossentropy")
    model.fit(x, y, batch_size=15, verbose=0, shuffle=False)


def missing(index):
    tfzero.ZeroStrategy(2, timeout_seconds=5)


def different_settings(index):
    """One after the other: after a refusal nothing has been used yet."""
    for settings in ({"stage": index + 1}, {"bucket_bytes": 1024 + index}, {"min_shard_elements": index}):
        with contextlib.suppress(ValueError):
            try:
                tfzero.ZeroStrategy(**settings, timeout_seconds=20)
            except ValueError as error:
                print("REPORT", "settings", error)
                raise
    model = make(tfzero.ZeroStrategy(2, timeout_seconds=20))
    fit(model)
    print("REPORT", "settings", "trained")


def different_units(strategy, index):
    with strategy.scope():
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(17 + index), keras.layers.Dense(3)])


def one_layer_more(strategy, index):
    with strategy.scope():
        layers = [keras.layers.Dense(3) for _ in range(2 + index)]
        model = keras.Sequential([keras.Input((8,)), *layers])
    fit(model)


def different_learning_rates(strategy, index):
    fit(make(strategy), optimizer=keras.optimizers.Adam(0.1 * (index + 1)))


def different_optimizers(strategy, index):
    fit(make(strategy), optimizer=["adam", "sgd"][index])


def different_optimizers_of_a_loop(strategy, index):
    optimizer = tfzero.ZeroOptimizer(["adam", "sgd"][index])
    optimizer.build(make(strategy).trainable_variables)


def different_lengths(strategy, index):
    fit(make(strategy), samples=46 + 15 * index)


DIFFERENCES = (
    different_units, one_layer_more, different_learning_rates, different_optimizers, different_optimizers_of_a_loop,
    different_lengths,
)  # fmt: skip


def all_differences(index):
    """One after the other: each is refused, and the next is told apart from it. Then worker 1 leaves."""
    different_settings(index)
    strategy = tfzero.ZeroStrategy(2, timeout_seconds=10)
    for difference in DIFFERENCES:
        try:
            difference(strategy, index)
        except ValueError as error:
            print("REPORT", difference.__name__, str(error).replace("\n", " "))
    sys.stdout.flush()  # as a worker may end at once when the other has ended
    try:
        gather_alone(index, 15)
    except Exception as error:
        print("REPORT", "gather_alone", f"{type(error).__name__}: {error}")


def death_before_training(index):
    model = make(tfzero.ZeroStrategy(2, timeout_seconds=10))
    if index == 1:
        os._exit(7)
    fit(model)


def leave_in_training(index, leave):
    """Worker 1 leaves in the middle of an epoch."""
    model = make(tfzero.ZeroStrategy(2, timeout_seconds=6))
    x, y = Data().arrays()
    model.compile("sgd", "categorical_crossentropy")
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: leave() if index == 1 and batch == 1 else None
    )
    model.fit(x, y, batch_size=15, verbose=0, callbacks=[note])


def death_in_training(index):
    leave_in_training(index, lambda: os._exit(7))


def sleep_in_training(index):
    leave_in_training(index, lambda: time.sleep(LIMIT_SECONDS))


def stop_in_training(index):
    leave_in_training(index, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def one_step_more(index):
    model = make(tfzero.ZeroStrategy(2, timeout_seconds=6))
    model.compile("sgd", "categorical_crossentropy")
    x, y = Data().arrays()
    for _ in range(2 + index):
        model.train_on_batch(x, y)
    if index == 0:
        time.sleep(10)


def gather_alone(index, seconds=LIMIT_SECONDS):
    strategy = tfzero.ZeroStrategy(3, timeout_seconds=6)
    model = make(strategy)
    if index == 1:
        time.sleep(seconds)
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(strategy.gathered(model.trainable_variables))
        finally:
            print("REPORT", "seconds", time.monotonic() - began)
        print("NO ERROR")


def stall_before_training(index):
    model = make(tfzero.ZeroStrategy(2, timeout_seconds=6))
    if index == 1:
        time.sleep(LIMIT_SECONDS)
    fit(model)


def run_scenario(scenario, started=(0, 1), survivors=None) -> tuple[list[str], float]:
    """Runs it in two workers; the output of the survivors (all by default), and the seconds until the first ended.

    Only those in `started` are. Unlike `run_local` it lets the others go on when one has ended.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import traceback, os, test_bad_input\n"
        f"try: test_bad_input.{scenario.__name__}(int(sys.argv[1]))\n"
        "except Exception: traceback.print_exc()\n"
        "else: print('NO ERROR')\n"
        "sys.stdout.flush(); sys.stderr.flush(); os._exit(0)\n"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        addresses = [f"127.0.0.1:{port}" for port in stack.enter_context(held_ports(2))]
        for index in started:
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, "-c", program, str(index)]
            process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], **streams)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        outputs = [processes[0].communicate(timeout=LIMIT_SECONDS)[0]]
        seconds = time.monotonic() - began
        outputs += [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes[1:survivors]]
    return outputs, seconds


def last_error(output: str) -> str:
    """The last traceback's message."""
    assert "NO ERROR" not in output, output
    assert "Traceback (most recent call last)" in output, output
    return output.rpartition("Traceback (most recent call last)")[2]


@pytest.fixture(scope="module")
def waiting_alone():
    """What each worker says that waits for the other, and after how long; both wait at the same time."""
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda index: run_scenario(missing, started=(index,)), (0, 1)))


def test_worker_that_never_starts(waiting_alone):
    (output,), seconds = waiting_alone[0]
    assert re.search(r"TimeoutError: .*missing after 5 s: worker 1 at 127.0.0.1", last_error(output))
    assert seconds < 40


def test_leader_that_never_starts(waiting_alone):
    (output,), _ = waiting_alone[1]
    assert re.search(r"TimeoutError: worker 0 at 127.0.0.1:\d+ never called within 5 s", last_error(output))


@pytest.fixture(scope="module")
def reports():
    """What each worker was told of each difference, and of the worker that left at last: names and texts."""
    outputs, _ = run_scenario(all_differences)
    return [
        [line.split(" ", 2)[1:] for line in output.splitlines() if line.startswith("REPORT")] or pytest.fail(output)
        for output in outputs
    ]


def test_workers_with_different_settings(reports):
    """Each is told which worker has what, and the same process can then do better."""
    for report in reports:
        told = [text for name, text in report if name == "settings"]
        assert len(told) == 4, report
        assert "settings differ: stage is 1 on worker 0 and 2 on worker 1" in told[0]
        assert "bucket_bytes is 1024 on worker 0 and 1025 on worker 1" in told[1]
        assert "min_shard_elements is 0 on worker 0 and 1 on worker 1" in told[2]
        assert told[3] == "trained"


@pytest.fixture(scope="module")
def differences(reports):
    names = [difference.__name__ for difference in DIFFERENCES]
    for report in reports:
        assert [name for name, _ in report if name.startswith(("different", "one_layer"))] == names, report
    return [dict(report) for report in reports]


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        (different_units, ["models", "kernel", "(8, 17)", "(8, 18)", "on worker 0", "on worker 1"]),
        (one_layer_more, ["models", "worker 0", "(3, 3)' on worker 1"]),
        (
            different_learning_rates,
            ["arguments of `compile` differ: optimizer.learning_rate", "0.1", "0.2", "on worker 0", "on worker 1"],
        ),
        (
            different_optimizers,
            ["arguments of `compile` differ: optimizer is 'adam' on worker 0 and 'sgd' on worker 1"],
        ),
        (different_optimizers_of_a_loop, ["optimizers differ", "class is 'Adam' on worker 0 and 'SGD' on worker 1"]),
        (different_lengths, ["data sets differ: number of batches is 4 on worker 0 and 5 on worker 1"]),
    ],
)
def test_workers_that_differ(differences, difference, told):
    for report in differences:
        for text in told:
            assert text in report[difference.__name__]


@pytest.mark.sweep  # in training in test_survival.py
def test_worker_that_dies_before_training():
    outputs, seconds = run_scenario(death_before_training, survivors=1)
    error = last_error(outputs[0])
    assert re.search("ConnectionError: worker 1 at .* was lost", error), error
    assert seconds < NAMED_SECONDS


@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        sweep(stall_before_training, "worker 1 at .* did not arrive"),
        sweep(gather_alone, "worker 1 at .* did not arrive at 'gathering variables' within 6 s"),
        # The next two are also in test_survival.py. TensorFlow's own watch may notice first; it says "task:1".
        sweep(death_in_training, "worker 1 at .* was lost|/job:worker/replica:0/task:1"),
        (stop_in_training, "worker 1 at .* did not arrive at 'the pulse' within 4.8 s|/job:worker/replica:0/task:1"),
        (sleep_in_training, "waited in a collective for 6 s. worker 1 at .* did not arrive there"),
    ],
)
def test_worker_that_leaves(scenario, told):
    outputs, seconds = run_scenario(scenario, survivors=1)
    error = last_error(outputs[0])
    assert re.search(told, error), error
    assert seconds < NAMED_SECONDS


def test_a_gather_to_which_a_worker_does_not_come(reports):
    first, second = map(dict, reports)
    assert re.search("worker 1 at .* did not arrive at 'gathering variables' within 6 s", first["gather_alone"])
    assert 5 < float(first["seconds"]) < 20 and "gather_alone" not in second


@pytest.mark.sweep  # as where a worker sleeps in training
def test_worker_that_takes_a_step_more():
    """Worker 1 waits for worker 0, which has ended its program."""
    outputs, _ = run_scenario(one_step_more)
    assert re.search("worker 0 at .* did not arrive there", last_error(outputs[1])), outputs[1]
