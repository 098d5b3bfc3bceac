"""`python -m tfzero.launch` in the tasks of a job, as `srun`, `mpirun` and `torchrun` start them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from marks import FLEET_SECONDS
from test_cluster import find_ports

pytestmark = pytest.mark.timeout(FLEET_SECONDS)
LAUNCHERS = ("SLURM", "OMPI", "MV2", "PMI", "MPI", "TORCH", "MASTER", "RANK", "WORLD", "LOCAL", "TFZERO", "TF_CONFIG")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}


def slurm(rank, port, size=2):
    """As `srun --ntasks 2 --nodes 1` sets them on a node of the name localhost."""
    return {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(size), "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_JOB_NODELIST": "localhost,n[2-9]", "SLURM_STEP_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "1(x9)",
        "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_PROCID": str(rank), "SLURM_NODEID": "0",
        "SLURM_LOCALID": str(rank), "SLURMD_NODENAME": "localhost", "TFZERO_PORT": str(port),
    }  # fmt: skip


def torchrun(rank, port, size=2):
    """As PyTorch's launcher sets them for two processes of one machine."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TFZERO_SECRET": "0123456789abcdef",
    }  # fmt: skip


def open_mpi(rank, port, size=2):
    """As `mpirun --np 2` sets them on one machine."""
    names = {"SIZE": size, "RANK": rank, "LOCAL_SIZE": size, "LOCAL_RANK": rank}
    return {"TFZERO_PORT": str(port), **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}}


@contextlib.contextmanager
def started(command, environments, **more):
    """One process for each environment."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env={**CLEAN, **each}, **streams, **more) for each in environments]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_commands(command, environments, seconds=60, **more):
    """(exit code, stdout, stderr) of each process."""
    with started(command, environments, **more) as processes:
        told = [process.communicate(timeout=seconds) for process in processes]
        return [(process.returncode, *each) for process, each in zip(processes, told, strict=True)]


def launch(*arguments):
    return [sys.executable, "-m", "tfzero.launch", *map(str, arguments)]


def run(*arguments, environments, **more):
    """The same of the launcher with these arguments."""
    return run_commands(launch(*arguments), environments, **more)


def environments_of(launcher, size=2):
    port = find_ports(1)[0]
    return [launcher(rank, port, size) for rank in range(size)]


TELL = "import json, os, sys; print(json.dumps([os.environ[n] for n in sys.argv[1].split()] + sys.argv[2:]))\n"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TELL)
    return path


@pytest.mark.parametrize("launcher", [slurm, torchrun, open_mpi])
def test_each_task_gets_its_tf_config(launcher, script):
    environments = environments_of(launcher, 3)
    done = run("--cpu-devices", 4, script, "TF_CONFIG TFZERO_CPU_DEVICES", "--workers", "x", environments=environments)
    assert [code for code, *_ in done] == [0, 0, 0], done
    told = [json.loads(stdout) for _, stdout, _ in done]
    configs = [json.loads(each[0]) for each in told]
    assert all(each[1:] == ["4", "--workers", "x"] for each in told)
    assert [each["task"] for each in configs] == [{"type": "worker", "index": rank} for rank in range(3)]
    (workers,) = {tuple(each["cluster"]["worker"]) for each in configs}
    assert len(set(workers)) == 3 and {each.partition(":")[0] for each in workers} <= {"localhost", "127.0.0.1"}


def test_a_job_of_one_task_is_a_cluster_of_one(script):
    for launcher in (slurm, torchrun, open_mpi):
        ((code, stdout, _),) = run(
            "-m", "train", "TF_CONFIG", environments=environments_of(launcher, 1), cwd=script.parent
        )
        assert code == 0 and len(json.loads(json.loads(stdout)[0])["cluster"]["worker"]) == 1


def test_the_script_takes_the_launchers_place(tmp_path):
    """So it gets the site's signals, and the site its exit code, its output and nothing else."""
    path = tmp_path / "train.py"
    path.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with started(launch(path), environments_of(slurm, 1)) as (process,):
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == ("", "") and process.returncode == 75


def test_a_task_keeps_its_port_until_the_worker_listens(tmp_path):
    """Others get another one, while the worker that asks for it gets it."""
    path = tmp_path / "train.py"
    path.write_text(
        "import json, os, socket\n"
        "config = json.loads(os.environ['TF_CONFIG'])\n"
        "port = int(config['cluster']['worker'][config['task']['index']].split(':')[1])\n"
        "try:\n    socket.socket().bind(('', port)); print('free')\nexcept OSError:\n    print('held')\n"
        "socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True).close()\n"
    )
    done = run("-m", "train", environments=environments_of(torchrun), cwd=tmp_path)
    assert [(code, stdout) for code, stdout, _ in done] == [(0, "held\n")] * 2, done


def test_sigterm_ends_a_task_that_waits_for_the_others(script):
    with started(launch(script, "TF_CONFIG"), environments_of(torchrun)[1:]) as (process,):
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM and "no worker was running" in stderr


@pytest.mark.parametrize(
    "arguments, environ, problem",
    [
        ([], {}, "--workers N is needed: there is no sign of a job"),
        ([], {**slurm(0, 1), "TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, "TF_CONFIG names the workers already"),
        (["--max-restarts", "2", "--grace-seconds", "1"], slurm(0, 1),
         "--max-restarts, --grace-seconds have no effect without --workers: Slurm starts and ends the tasks"),
        (["--timeout-seconds", "2"], torchrun(0, 1), "--timeout-seconds have no effect"),
        (["--cpu-devices", "0"], slurm(0, 1), "cpu_devices must be above 0"),
        (["--gpus-per-worker", "-1"], slurm(0, 1), "gpus_per_worker must be an integer of at least 0"),
        ([], {**slurm(0, 1), "SLURM_STEP_NODELIST": "n["}, "Slurm's list of nodes has a form like"),
        ([], {**slurm(0, 1), "TFZERO_PORT": "99999"}, "TFZERO_PORT must be from 1 to 65535"),
        ([], {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI does not tell where task 0 is"),
        ([], {**torchrun(0, 1), "TFZERO_SECRET": "short"}, "TFZERO_SECRET must have 16 characters"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(arguments, environ, problem, script):
    ((code, stdout, stderr),) = run(*arguments, script, environments=[environ])
    assert code == 2 and stdout == "" and problem in stderr, stderr


def test_workers_of_every_task_alone_are_said(script):
    """`--workers N` is N workers of this machine, as ever."""
    ((code, stdout, stderr),) = run("--workers", 1, script, "TF_CONFIG", environments=environments_of(slurm)[1:])
    assert code == 0 and stdout.startswith("[worker 0] ")
    assert "each of the 2 tasks that Slurm started trains alone, with --workers 1 of its own" in stderr


def train(strategy_scope=contextlib.nullcontext):
    """The weights after two epochs, on one device or on all workers of a strategy."""
    import keras

    keras.utils.set_random_seed(3)
    with strategy_scope():
        layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    x = np.random.default_rng(5).normal(size=(22, 8)).astype("float32")
    model.fit(x, x[:, :3] ** 2, batch_size=8, epochs=2, verbose=0)
    return model.get_weights()


_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import tfzero, test_jobs, numpy as np
strategy = tfzero.ZeroStrategy(stage=3, min_shard_elements=1)
weights = test_jobs.train(strategy.scope)
print(json.dumps([strategy.num_replicas_in_sync, [each.tolist() for each in weights]]))
"""


def check_result(done):
    """Both workers end with the weights of one device."""
    expected = train()
    for code, stdout, stderr in done:
        assert code == 0, stderr
        replicas, weights = json.loads(stdout.splitlines()[-1])
        assert replicas == 2
        for value, reference in zip(weights, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6)


PATHS = json.dumps([os.path.dirname(__file__), *map(str, sys.path)])


@pytest.mark.parametrize("launcher", [slurm, torchrun])
def test_two_tasks_train_to_the_result_of_one_device(launcher, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(_WORKER)
    environments = [{**each, "TF_CPP_MIN_LOG_LEVEL": "3"} for each in environments_of(launcher)]
    check_result(run("--cpu-devices", 1, path, PATHS, environments=environments, seconds=FLEET_SECONDS))


def test_a_master_and_a_worker_of_any_number_train_to_the_result_of_one_device():
    """With the words of SageMaker and AI Platform, and indices as objects have them."""
    cluster = {"master": [f"localhost:{find_ports(1)[0]}"], "worker": {"5": f"localhost:{find_ports(1)[0]}"}}
    tasks = [{"type": "master", "index": "0"}, {"type": "worker", "index": "5"}]
    configs = [{"cluster": cluster, "task": task, "environment": "cloud", "job": {}} for task in tasks]
    environments = [{"TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"} for config in configs]
    check_result(run_commands([sys.executable, "-c", _WORKER, PATHS], environments, seconds=FLEET_SECONDS))
