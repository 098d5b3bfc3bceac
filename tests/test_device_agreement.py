"""Devices of workers that do not go together, and an NCCL that fails, are named; with stand-ins for GPUs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from marks import FLEET_SECONDS
from test_doctor import FIRST, SECOND, Driver

import tfzero
from tfzero.collectives import nccl_failures
from tfzero.collectives.nccl_failures import describe, keep_log, naming_nccl
from tfzero.collectives.pulse import NOT_FOR_THE_SAME
from tfzero.workers import device_agreement
from tfzero.workers.cluster import Cluster
from tfzero.workers.cuda_devices import cuda_devices
from tfzero.workers.device_agreement import describe_devices, find_mixture, find_shared_gpu

THREE = Cluster(("a:1", "b:1", "c:1"), ("worker 0", "worker 1", "worker 2"), 0)


def told(*gpus, host="host", kind="GPU", sees=None):
    names = {f"GPU:{index}": uuid for index, uuid in enumerate(gpus)}
    return {"kind": kind, "count": max(1, len(gpus)), "sees": sees or len(gpus), "host": host, "gpus": names}


def test_gpus_and_cpus_are_no_mixture():
    assert find_mixture([told("a"), told("b"), told("c")], THREE) == ""
    assert find_mixture([told(kind="CPU", sees=1)] * 3, THREE) == ""
    sentence = find_mixture([told("a", "b"), told(kind="CPU"), told(kind="CPU", sees=2)], THREE)
    assert (
        "but worker 0 would compute on 2 GPUs, and workers 1, 2 would compute on 1 CPUs (TensorFlow sees no GPU on "
        in (sentence)
    )
    assert "sees no GPU on worker 1)" in sentence and "--gpus-per-worker 0" in sentence


def test_a_gpu_of_two_workers_is_named():
    assert find_shared_gpu([told("a"), told("b"), told("c")], THREE) == ""
    assert find_shared_gpu([told("a", host="x"), told("a", host="y"), told("c")], THREE) == ""  # as NCCL_HOSTID does
    assert find_shared_gpu([told(), told(), told()], THREE) == ""  # cannot be seen
    sentence = find_shared_gpu(
        [told("a", "b", host="box 1"), told("c", host="box 1"), told("d", "b", host="box 1")], THREE
    )
    assert sentence.startswith("b on box would be used by worker 0 as its GPU:1 and worker 2 as its GPU:1. ")
    sentence = find_shared_gpu([told("a", "b"), told("a", "b"), told("c")], THREE)
    assert (
        "a on host would be used by worker 0 as its GPU:0 and worker 1 as its GPU:0 (and 1 more are shared)" in sentence
    )


def test_hosts_are_those_of_nccl():
    assert device_agreement._host({"NCCL_HOSTID": "one"}) == "NCCL_HOSTID one"
    assert device_agreement._host({}) == device_agreement._host({"NCCL_HOSTID": ""})


def test_gpus_are_told_by_uuid(monkeypatch):
    """Where NCCL will take them: that is, whole."""
    logical = {"first": None, "second": None}
    monkeypatch.setattr(device_agreement, "cuda_devices", lambda: cuda_devices(Driver()))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(logical))
    monkeypatch.setattr(tf.config, "get_logical_device_configuration", logical.get)
    described = describe_devices(["GPU:1", "GPU:0"])
    assert described["gpus"] == {"GPU:1": SECOND, "GPU:0": FIRST}
    assert (described["kind"], described["count"], described["sees"]) == ("GPU", 2, 2)
    logical["first"] = [None, None]
    assert describe_devices(["GPU:1"])["gpus"] == {}
    del logical["first"]  # the driver sees more than TensorFlow
    assert describe_devices(["GPU:0"])["gpus"] == {}


def _with_pretended_gpus():
    """In a worker: what making a strategy raises, with CPUs that are said to be GPUs."""
    import json

    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    pretended = [
        [told("a"), told(kind="CPU")],
        [told("a"), told("a")],
        [told("a", host="NCCL_HOSTID 0"), told("a", host="NCCL_HOSTID 1")],
    ]
    errors = []
    for of_workers in pretended:
        device_agreement.describe_devices = lambda devices, each=of_workers[index]: each
        try:
            tfzero.ZeroStrategy(2, timeout_seconds=30)
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append("")
    return errors


def test_workers_whose_devices_do_not_go_together_are_refused_on_all():
    first, second = tfzero.run_local(_with_pretended_gpus, workers=2, timeout_seconds=FLEET_SECONDS)
    assert first == second
    assert "but worker 0 would compute on 1 GPUs, and worker 1 would compute on 1 CPUs" in first[0]
    assert "would be used by worker 0 as its GPU:0 and worker 1 as its GPU:0" in first[1]
    assert first[2] == ""


# NCCL.


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG_FILE", str(tmp_path / "%h %p.log"))
    return tmp_path / f"{os.uname().nodename} {os.getpid()}.log"


def test_the_last_line_of_nccl_is_told(log):
    log.write_text("host:1 NCCL WARN first\nhost:1 NCCL WARN Duplicate GPU detected\n\n")
    error = tf.errors.InternalError(None, None, "NCCL: invalid usage. Set NCCL_DEBUG=WARN for detail.\nmore")
    with pytest.raises(
        RuntimeError, match="NCCL failed as worker 1 met.*invalid usage.*'host:1 NCCL WARN Duplicate GPU"
    ):
        _raise(error, is_used=True)


def _raise(error, is_used, timeout_seconds=30.0):
    with naming_nccl(is_used, "worker 1", timeout_seconds):
        raise error


def test_other_errors_stay_as_they_are():
    for is_used, error in (
        (True, tf.errors.UnavailableError(None, None, "worker 0 is gone")),
        (True, ValueError("nccl")),
        (False, tf.errors.InternalError(None, None, "NCCL: invalid usage")),
    ):
        with pytest.raises(type(error)) as caught:
            _raise(error, is_used)
        assert caught.value is error


def test_who_waits_for_nccl_alone_is_told_so(log):
    error = tf.errors.AbortedError(None, None, f"worker 1 has waited. {NOT_FOR_THE_SAME}: run the same program.")
    with pytest.raises(RuntimeError, match="NCCL did not connect the GPUs of all workers within 0 s.*written nothing"):
        _raise(error, is_used=True, timeout_seconds=0.0)
    with pytest.raises(tf.errors.AbortedError):
        _raise(error, is_used=True)


def _hanging():
    """In a worker: NCCL never comes to an end."""
    nccl_failures._GRACE_SECONDS = 0.2
    keep_log()
    Path(os.environ["NCCL_DEBUG_FILE"].replace("%p", str(os.getpid()))).write_text("NCCL WARN socket: no route\n")
    with naming_nccl(True, "worker 0", 1.0):
        time.sleep(60)


def test_a_process_in_which_nccl_hangs_ends_in_time():
    with pytest.raises(tfzero.WorkerError, match=r"failed first, with exit code 76") as caught:
        tfzero.run_local(_hanging, workers=1, timeout_seconds=50)
    assert "within 1 s, as worker 0 waited. NCCL's last line: 'NCCL WARN socket: no route'" in str(caught.value)


def test_the_log_goes_with_its_process(monkeypatch):
    code = (
        "import os; from tfzero.collectives.nccl_failures import FILE_VARIABLE, keep_log\n"
        "keep_log(); keep_log(); print(os.environ[FILE_VARIABLE])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    path = Path(done.stdout.strip())
    assert path.name == "%p.log" and "tfzero_nccl_" in path.parent.name and not path.parent.exists(), done.stderr
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("NCCL_DEBUG_FILE", raising=False)
    keep_log()
    assert "NCCL_DEBUG_FILE" not in os.environ
    assert "NCCL has written nothing (NCCL_DEBUG_FILE names a file for it)" in describe("It failed.")
