"""How workers of one machine divide its GPUs, with a stand-in for nvidia-smi: no GPU and no TensorFlow is needed."""

import os
import subprocess
import sys

import pytest

from tfzero.launch import run_local
from tfzero.workers import gpus
from tfzero.workers.gpus import Machine, divide_gpus, machine_gpus, visible_gpus

LIMIT_SECONDS = 100
MIG = """GPU 0: NVIDIA A100 (UUID: GPU-0)
  MIG 3g.20gb     Device  0: (UUID: MIG-a)
  MIG 3g.20gb     Device  1: (UUID: MIG-b)
GPU 1: NVIDIA A100 (UUID: GPU-1)
"""


def listing(count):
    return "".join(f"GPU {k}: NVIDIA H200 (UUID: GPU-{k}{k}{k}-{k})\n" for k in range(count))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this a machine on which nvidia-smi prints something, with nothing in /proc."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_DRIVER_FOLDER", tmp_path / "none")

    def become(printed, exit_code=0):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        note = tmp_path / "asked"
        program.write_text(f"#!/bin/sh\necho \"$@\" >> {note}\ncat <<'END'\n{printed}END\nexit {exit_code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return note

    return become


def shown(divided):
    return [each.get("CUDA_VISIBLE_DEVICES") for each in divided]


@pytest.mark.parametrize(("printed", "found"), [(listing(8), Machine(8)), (MIG, Machine(2, ("MIG-a", "MIG-b"))),
                                                ("No devices were found\n", Machine(0)), ("", Machine(0))])  # fmt: skip
def test_what_nvidia_smi_lists(machine, printed, found):
    note = machine(printed)
    assert machine_gpus() == found
    assert note.read_text() == "-L\n"


@pytest.mark.parametrize(("printed", "exit_code"), [("NVIDIA-SMI has failed\n", 9), (listing(1), 15), (None, 0)])
def test_where_nvidia_smi_tells_nothing_the_driver_does(machine, tmp_path, monkeypatch, printed, exit_code):
    monkeypatch.setattr(gpus.shutil, "which", gpus.shutil.which if printed else lambda name: None)
    if printed:
        machine(printed, exit_code)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine_gpus() == Machine(0)
    for address in ("0000:00:04.0", "0000:00:05.0"):
        (tmp_path / "proc" / address).mkdir(parents=True)
    monkeypatch.setattr(gpus, "_DRIVER_FOLDER", tmp_path / "proc")
    assert machine_gpus() == Machine(2)
    assert shown(divide_gpus(2, None)) == ["0", "1"]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, "01234567"), ("3,1, 2", "312"), ("GPU-5,0", ["GPU-5", "0"]), ("MIG-x", ["MIG-x"]), ("", []), ("-1", []),
        ("NoDevFiles", []), ("2,-1,3", "2"), ("00,1", "01"),
    ],
)  # fmt: skip
def test_what_is_visible(machine, visible, names):
    machine(listing(8))
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environ) == tuple(names)


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("0,8", "names GPU 8, but this machine has 8, numbered from 0: .*Received: '0,8'"),
        ("1,2,01", "names 1 twice. Name each GPU once. Received: '1,2,01'"),
        ("GPU-a,GPU-a", "names GPU-a twice"),
    ],
)
def test_lists_that_cuda_would_cut_short_are_refused(machine, visible, message):
    machine(listing(8))
    with pytest.raises(ValueError, match=message):
        visible_gpus({"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize(
    ("visible", "workers", "each", "expected"),
    [
        (None, 4, None, ["0,1", "2,3", "4,5", "6,7"]),
        (None, 3, 2, ["0,1", "2,3", "4,5"]),
        (None, 8, 1, list("01234567")),
        (None, 1, None, [None]),
        (None, 1, 3, ["0,1,2"]),
        (None, 20, 0, ["-1"] * 20),
        ("7,0,GPU-5,3", 2, None, ["7,0", "GPU-5,3"]),
        ("7,0,GPU-5,3", 3, 1, ["7", "0", "GPU-5"]),
        ("MIG-a,MIG-b", 2, None, ["MIG-a", "MIG-b"]),
        ("-1", 3, None, [None] * 3),
    ],
)
def test_each_worker_gets_its_own(machine, visible, workers, each, expected):
    machine(listing(8))
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert shown(divide_gpus(workers, each, environ)) == expected


def test_mig_devices_are_divided_by_their_names(machine):
    machine(MIG)
    assert shown(divide_gpus(2, None, {})) == ["MIG-a", "MIG-b"]
    with pytest.raises(ValueError, match="A process sees one MIG device only, but each of 1 workers would get 2: .*"):
        divide_gpus(1, 2, {})


@pytest.mark.parametrize(
    ("count", "workers", "each", "message"),
    [
        (8, 3, None, r"8 GPUs are visible \(0, 1, 2, 3, 4, 5, 6, 7\), which 3 workers cannot divide evenly.*"
                     r"--gpus-per-worker 2 \(gpus_per_worker=2\) to leave 2 unused"),
        (2, 3, None, r"3 workers need a GPU each, but 2 GPUs are visible \(0, 1\). Start fewer.*--gpus-per-worker 0"),
        (8, 4, 3, "4 workers of 3 GPUs need 12, but 8 GPUs are visible"),
        (0, 2, 1, r"2 workers of 1 GPUs need 2, but 0 GPUs are visible \(none\)"),
        (8, 4, -1, "gpus_per_worker must be an integer of at least 0.* Received: -1"),
        (8, 4, True, "gpus_per_worker must be an integer of at least 0.* Received: True"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(machine, count, workers, each, message):
    machine(listing(count))
    with pytest.raises(ValueError, match=message):
        divide_gpus(workers, each, {})


def test_where_there_is_no_gpu_nothing_changes(machine):
    machine("No devices were found\n")
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        assert divide_gpus(3, None, visible) == [{}] * 3


def test_who_needs_no_division_asks_nobody(machine):
    note = machine(listing(8))
    divide_gpus(1, None, {})
    divide_gpus(2, None, {"CUDA_VISIBLE_DEVICES": ""})
    assert not note.exists()


def launch(*arguments):
    command = [sys.executable, "-m", "tfzero.launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.fixture
def script(tmp_path):
    def write(body):
        path = tmp_path / "train.py"
        path.write_text("import os, sys, time\n" + body)
        return path

    return write


def test_the_launcher_divides_gpus_and_starts_no_cuda(machine, script):
    machine(listing(4))
    body = "print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))"
    done = launch("--workers", 2, script(body))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[worker 0] sees 0,1", "[worker 1] sees 2,3"]
    done = launch("--workers", 3, script(body))
    assert done.returncode == 2 and "which 3 workers cannot divide evenly" in done.stderr
    done = launch("--workers", 6, "--gpus-per-worker", 0, script(body))
    assert done.stdout.count("sees -1") == 6


def test_who_does_not_come_back_takes_its_gpus_along(machine, script):
    """And the others keep as many as they had."""
    machine(listing(7))
    body = (
        "print('fleet', os.environ['TFZERO_RESTARTS'], 'sees', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "time.sleep(0.3)\n"
        "if '3' in os.environ['CUDA_VISIBLE_DEVICES']: sys.exit(9)\n"
        "time.sleep(1)\n"
    )
    restarts = ["--max-restarts", 3, "--min-workers", 2]
    done = launch("--workers", 3, "--gpus-per-worker", 2, *restarts, script(body))
    assert done.returncode == 0
    assert sorted(line for line in done.stdout.splitlines() if "fleet 2" in line) == [
        "[worker 0] fleet 2 sees 0,1",
        "[worker 1] fleet 2 sees 4,5",
    ]


def test_run_local_divides_gpus(machine, monkeypatch):
    machine(listing(4))

    def sees():
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert run_local(sees, 2, timeout_seconds=LIMIT_SECONDS) == ["0,1", "2,3"]
    assert run_local(sees, 3, gpus_per_worker=1, timeout_seconds=LIMIT_SECONDS) == ["0", "1", "2"]
    named = {"CUDA_VISIBLE_DEVICES": "3,GPU-000-0"}
    assert run_local(sees, 2, env=named, timeout_seconds=LIMIT_SECONDS) == ["3", "GPU-000-0"]
    with pytest.raises(ValueError, match="5 workers need a GPU each, but 4 GPUs are visible"):
        run_local(sees, 5)
