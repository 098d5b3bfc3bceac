"""`python -m tfzero.doctor`: what it prints, its verdict and exit code, on devices of one process and on workers."""

import contextlib
import ctypes
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero import doctor
from tfzero.views import examination, facts, trials
from tfzero.views.speeds import measure_speeds
from tfzero.workers.cuda_devices import CudaDevice, cuda_devices

PRIMITIVES = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]


def run(*arguments):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FLEET_SECONDS)
    return done.returncode, done.stdout, done.stderr


def test_quick_on_two_devices_of_one_process():
    code, printed, errors = run("tfzero.doctor", "--quick", "--cpu-devices", 2)
    assert code == 0, printed + errors
    lines = printed.splitlines()
    assert lines[-1].startswith("SOUND (2 replicas, 2 CPU devices in each of 1): models end within")
    assert f"  tfzero             {tfzero.__version__}" in lines
    assert any(line.startswith("  0       CPU:1 ") for line in lines)
    assert "  because all replicas are CPU devices of one process." in lines
    assert [line.split()[:2] for line in lines if line.endswith("right")][-4:] == [["dense", str(k)] for k in range(4)]


def test_quick_on_two_workers_of_the_launcher():
    code, printed, errors = run("tfzero.launch", "--workers", 2, "-m", "tfzero.doctor", "--quick")
    assert code == 0, printed + errors
    lines = printed.splitlines()
    assert "[worker 0] SOUND (2 replicas, 1 CPU devices in each of 2): models end within" in printed
    assert any(line.startswith("[worker 0]   1       CPU:0 ") for line in lines)
    assert "own connections" in printed or "connections between every two workers" in printed
    assert not [line for line in lines if line.startswith("[worker 1]") and "right" in line]


def _examined_with_faults():
    """In a worker: verdicts of a model that goes wrong on the second one, and of a primitive that does; and speeds."""
    from tfzero.collectives.group import Group

    def verdict():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = doctor.main(["--quick"])
        return code, printed.getvalue()

    strategy = tfzero.ZeroStrategy(0)
    speeds = measure_speeds(strategy.extended.group, [2**10])
    right_trained, right_scatter = trials._trained, Group.reduce_scatter

    def trained(model, *arguments):
        weights = right_trained(model, *arguments)
        if strategy.extended.mesh.worker == 1 and getattr(model.distribute_strategy, "settings", None) is not None:
            weights[-1] = weights[-1] + (0.5 if model.distribute_strategy.settings.stage == 3 else 0.0)
        return weights

    def scatter(group, rows, replica, dtype=None):
        return right_scatter(group, rows, replica, dtype) + tf.cast(group.rank(replica), dtype or rows.dtype)

    trials._trained = trained
    of_model = verdict()
    trials._trained, Group.reduce_scatter = right_trained, scatter
    return of_model, verdict(), [(s.primitive, s.seconds > 0, s.stock_seconds is None) for s in speeds]


@pytest.fixture(scope="module")
def faults():
    return tfzero.run_local(_examined_with_faults, workers=2, timeout_seconds=FLEET_SECONDS)


def test_a_model_that_differs_on_one_worker_is_named(faults):
    (code, printed), (other_code, other_printed) = (each[0] for each in faults)
    assert (code, other_code, other_printed) == (1, 1, "")
    verdict = printed.splitlines()[-1]
    assert verdict.startswith("NOT SOUND (2 replicas, 1 CPU devices in each of 2): the dense model at stage 3 differs ")
    assert "by 0.5 in " in verdict and "bias on worker 1" in verdict and "stage 2" not in verdict


def test_a_primitive_that_goes_wrong_is_named(faults):
    pytest.importorskip("tfzero.collectives.self_test")
    for code, printed in (each[1] for each in faults):
        assert code == 1
        assert not printed or "reduce_scatter of float32" in printed.splitlines()[-1]
    assert "NOT SOUND" in faults[0][1][1].splitlines()[-1]


def test_workers_time_each_primitive_beside_tensorflows(faults):
    for each in faults:
        assert each[2] == [(name, True, name in ("reduce_scatter", "broadcast")) for name in PRIMITIVES]


def test_devices_time_each_primitive_beside_tensorflows():
    group = tfzero.ZeroStrategy(0, devices=["CPU:0", "CPU:1", "CPU:2"]).extended.group
    speeds = measure_speeds(group, [2**10, 2**14])
    assert [(s.primitive, s.size_bytes) for s in speeds] == [
        (name, size) for name in PRIMITIVES for size in (2**10, 2**14)
    ]
    assert all(s.bytes_per_second == s.size_bytes / s.seconds for s in speeds)
    assert measure_speeds(tfzero.ZeroStrategy(0, devices=["CPU:0"]).extended.group) == []


@pytest.mark.parametrize("name", ["convolutional", sweep("recurrent"), sweep("attention")])
def test_every_model_ends_as_on_one_device(name):
    found = trials.run_trials([name], ["CPU:0", "CPU:1"], 2, lambda name, stage: None)
    assert [(each.model, each.stage, each.is_right) for each in found] == [(name, stage, True) for stage in range(4)]
    assert max(each.largest for each in found) < 1e-5


def test_models_lie_in_shards():
    """Or a wrong gather would not be noticed."""
    strategy = tfzero.ZeroStrategy(3, devices=["CPU:0", "CPU:1"], min_shard_elements=trials._MIN_SHARD_ELEMENTS)
    for make in trials.MODELS.values():
        with strategy.scope():
            model = make()
        model.compile("sgd", "categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
    placements = [variable.placement for variable in strategy.report().variables]
    assert placements.count("sharded") > len(placements) / 3


def test_not_a_number_is_not_right():
    nothing = np.array([0.0, np.nan], "float32")
    trial = trials._compared("dense", 1, ["kernel", "bias"], [nothing, nothing[:1]], [nothing, nothing[:1]])
    assert (trial.is_right, trial.variable) == (False, "kernel")


def test_a_cluster_that_does_not_meet_is_not_sound(capsys, monkeypatch):
    monkeypatch.setattr(examination.Examination, "run", lambda self: tfzero.ZeroStrategy(7))
    assert doctor.main(["--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT SOUND: ValueError: `stage` must be one of")


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--cpu-devices", "0"])
    assert "--cpu-devices must be at least 1. Received: 0" in capsys.readouterr().err


# GPUs, with stand-ins for the driver.


class Driver:
    """libcuda with two GPUs."""

    def __init__(self, broken=""):
        self._broken = broken

    def __getattr__(self, name):
        return lambda *arguments: 999 if name == self._broken else getattr(Driver, f"_{name}")(*arguments)

    def _cuInit(flags):  # noqa: N802, N805
        return flags

    def _cuDeviceGetCount(count):  # noqa: N802, N805
        count._obj.value = 2
        return 0

    def _cuDeviceGet(handle, index):  # noqa: N802, N805
        handle._obj.value = index
        return 0

    def _cuDeviceGetName(name, size, handle):  # noqa: N802, N805
        name.value = f"NVIDIA H{handle.value}".encode()
        return 0

    def _cuDeviceTotalMem_v2(size, handle):  # noqa: N802, N805
        size._obj.value = 150 * 10**9
        return 0

    def _cuDeviceGetUuid_v2(identity, handle):  # noqa: N802, N805
        identity._obj[:] = bytes(range(handle.value, handle.value + 16))
        return 0


FIRST, SECOND = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", "GPU-01020304-0506-0708-090a-0b0c0d0e0f10"


def test_what_the_driver_tells_of_gpus(monkeypatch):
    found = cuda_devices(Driver())
    assert found == [CudaDevice(FIRST, "NVIDIA H0", 150 * 10**9), CudaDevice(SECOND, "NVIDIA H1", 150 * 10**9)]
    with pytest.raises(RuntimeError, match="answers cuDeviceGetCount with error 999"):
        cuda_devices(Driver("cuDeviceGetCount"))

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert cuda_devices() == []


def test_gpus_are_described_by_name_memory_and_uuid(monkeypatch):
    monkeypatch.setattr(facts, "cuda_devices", lambda: cuda_devices(Driver()))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [None, None])
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [None, None])
    (line,) = facts.describe_devices(["/job:worker/replica:0/task:0/device:GPU:1"])
    assert line == f"GPU:1 NVIDIA H1, 150 GB ({SECOND})"


def test_gpus_that_tensorflow_does_not_see_are_told_of(monkeypatch):
    monkeypatch.setattr(facts, "visible_gpus", lambda: ("0", "1"))
    assert "(0, 1 visible), but TensorFlow sees none: CUDA's libraries are missing" in facts.unseen_gpus()
    monkeypatch.setattr(facts, "visible_gpus", lambda: ())
    assert facts.unseen_gpus() == ""
