"""Promises of `tfzero.launch` with parameter servers: real processes, and servers that are stand-ins of few lines."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_launch import IMPORTS, LIMIT_SECONDS, assert_gone, is_alive

from tfzero import launch
from tfzero.launch import WorkerError, run_local
from tfzero.workers import runs

# Of workers and servers. What one tells by a file, others can wait for.
HEAD = """
import contextlib, json, os, signal, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index, job, workers = config["task"]["index"], config["task"]["type"], len(config["cluster"]["worker"])
restarts, folder = int(os.environ.get("TFZERO_RESTARTS", 0)), {folder!r}

def tell(what):
    open(os.path.join(folder, what), "w").close()

def await_told(*whats):
    while not all(os.path.exists(os.path.join(folder, what)) for what in whats):
        time.sleep(0.02)

def await_end_of(worker):
    # Until the launcher has noticed it.
    start = f"worker {{worker}} is "
    while not (pids := [int(name[len(start):]) for name in os.listdir(folder) if name.startswith(start)]):
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pids[0], 0)
            time.sleep(0.02)

tell(f"{{job}} {{index}} is {{os.getpid()}}")
"""
LEAVE = "tell(f'left {restarts} {index}')\n"
SERVE = "await_told(*[f'left {restarts} {worker}' for worker in range(workers)])\n"
FOR_EVER = "time.sleep(LIMIT)\n".replace("LIMIT", str(LIMIT_SECONDS))


class Run:
    """Starts the launcher with scripts of a worker and a server, which tell what they do by files in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, body):
        path = self.folder / name
        path.write_text(HEAD.format(folder=str(self.folder)) + body)
        return str(path)

    def start(self, *options, worker=LEAVE, server=SERVE, **settings):
        changes = "".join(f"runs.{name} = {value}; " for name, value in settings.items())
        serve = f"runs.SERVE[1:] = [{self.write('server.py', server)!r}]"
        code = f"{IMPORTS}; {changes}{serve}; sys.exit(launch.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *map(str, options), self.write("worker.py", worker)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __call__(self, *options, **more):
        process = self.start(*options, **more)
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def pids(self, job):
        return [int(path.name.split()[3]) for path in self.folder.glob(f"{job} * is *")]

    def await_told(self, *whats):
        stop_seconds = time.monotonic() + LIMIT_SECONDS
        while not all((self.folder / what).exists() for what in whats):
            assert time.monotonic() < stop_seconds, whats
            time.sleep(0.02)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_server_is_started_by_its_module():
    assert runs.SERVE[1:] == ["-m", "tfzero.servers"]


def test_each_has_its_place_and_servers_have_no_gpus(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    show = (
        "print(json.dumps([config, os.environ['CUDA_VISIBLE_DEVICES'], os.environ['TFZERO_SECRET'], sys.argv[1:]]))\n"
    )
    done = run("--workers", 3, "--servers", 2, worker=show + LEAVE, server=show + SERVE)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line[:10]: json.loads(line[11:]) for line in done.stdout.splitlines()}
    assert sorted(told) == ["[server 0]", "[server 1]", *(f"[worker {index}]" for index in range(3))]
    cluster, secret = told["[worker 0]"][0]["cluster"], told["[worker 0]"][2]
    assert [len(cluster["worker"]), len(cluster["ps"])] == [3, 2]
    assert len({*cluster["worker"], *cluster["ps"]}) == 5
    for name, (config, gpus, own_secret, arguments) in told.items():
        job, index = ("ps" if "server" in name else "worker"), int(name[8])
        assert config == {"cluster": cluster, "task": {"type": job, "index": index}}
        assert (own_secret, arguments) == (secret, []) and len(secret) > 20
        assert gpus == ("-1" if job == "ps" else "")


def test_without_servers_nothing_names_any(run):
    done = run("--workers", 1, worker="print(sorted(config['cluster']))\n")
    assert (done.returncode, done.stdout) == (0, "[worker 0] ['worker']\n")


def test_servers_report_no_progress():
    worker = runs.environments_of_workers([1, 2], {"TFZERO_PROGRESS": "7", "A": "b"}, None, [{}])[0]
    (server,) = runs.environments_of_servers(worker)
    assert worker["TFZERO_PROGRESS"] == "7" and "TFZERO_PROGRESS" not in server and server["A"] == "b"


def test_a_worker_that_fails_is_replaced_while_the_others_go_on(run):
    worker = (
        "print('life', restarts, config, os.environ['TFZERO_SECRET'], flush=True)\n"
        "if index == 0: await_told('replaced')\n"
        "elif restarts: tell('replaced')\n"
        "else: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tell(f'left 0 {index}')\n"
    )
    done = run("--workers", 2, "--servers", 1, "--max-restarts", 3, worker=worker)
    assert done.returncode == 0, done.stderr
    assert (len(run.pids("worker")), len(run.pids("ps"))) == (3, 1)
    first, second = [line for line in done.stdout.splitlines() if line.startswith("[worker 1]")]
    assert first.replace("life 0", "life 1") == second
    (line,) = done.stderr.splitlines()
    assert line.startswith("tfzero.launch: worker 1 (of 2) failed, with signal 9 (Killed")
    assert line.endswith("; restart 1 of 3 in 0.5 s, and the others go on meanwhile.")


def test_after_the_last_restart_the_others_go_on_without_the_worker(run):
    worker = (
        "tell(f'life {restarts} of {index}')\n"
        "if index: sys.exit(9)\n"
        "await_told('life 2 of 1')\n"
        "time.sleep(1)\n"
        "print('trained')\n"
    )
    done = run("--workers", 2, "--servers", 1, "--max-restarts", 2, worker=worker)
    assert done.returncode == 9
    assert "[worker 0] trained" in done.stdout and len(run.pids("worker")) == 4
    again = [line for line in done.stderr.splitlines() if "restart " in line]
    assert [line.partition("; ")[2] for line in again[:2]] == [
        f"restart {number} of 2 in {pause} s, and the others go on meanwhile."
        for number, pause in ((1, "0.5"), (2, "1"))
    ]
    reason = "tfzero.launch: worker 1 (of 2) failed, with exit code 9, and no restart"
    assert again[2] == f"{reason} is left; the others go on without it."
    assert done.stderr.splitlines()[-2:] == [
        f"{reason} was left; all have ended. Its last output again:", "[worker 1] (no output)",
    ]  # fmt: skip
    assert_gone(run.pids("ps"))


def test_restarts_of_all_workers_are_counted_together(run):
    worker = (
        "tell(f'life {restarts} of {index}')\n"
        "if index == 0: await_told('life 1 of 1')\n"
        "if restarts == 0: sys.exit(3)\n" + "tell(f'left 0 {index}')\n"
    )
    done = run("--workers", 2, "--servers", 1, "--max-restarts", 2, worker=worker)
    assert done.returncode == 0, done.stderr
    assert "worker 1 (of 2) failed, with exit code 3; restart 1 of 2 in 0.5 s" in done.stderr
    assert "worker 0 (of 2) failed, with exit code 3; restart 2 of 2 in 0.5 s" in done.stderr
    assert (run.folder / "life 2 of 0").exists()


def test_the_first_worker_that_is_not_replaced_gives_the_exit_code(run):
    worker = (
        "if index == 1: time.sleep(0.5); tell('lost 1'); sys.exit(9)\n"
        "await_told('lost 1'); time.sleep(1)\n"
        "if index == 2: raise LookupError('the second')\n"
        "time.sleep(1)\n"
    )
    done = run("--workers", 3, "--servers", 1, worker=worker)
    assert done.returncode == 9
    assert done.stderr.count("the others go on without it") == 2


def test_when_no_worker_is_left_the_servers_are_ended(run):
    """At once: nobody takes leave of them."""
    server = "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell('serves'); time.sleep(2.5); print('still serves')\n"
    worker = "await_told('serves'); raise LookupError('no data')\n"
    done = run("--workers", 1, "--servers", 1, worker=worker, server=server + FOR_EVER)
    assert done.returncode == 1
    assert "go on" not in done.stderr and "still" not in done.stdout
    assert done.stderr.splitlines()[-1] == "[worker 0] LookupError: no data"
    assert_gone(run.pids("ps"))


def test_a_worker_that_ran_for_a_while_is_replaced_without_a_pause(run):
    options = ["--workers", 1, "--servers", 1, "--max-restarts", 2]
    done = run(*options, worker="sys.exit(9)\n", server=FOR_EVER, _AT_ONCE_SECONDS=0)
    assert done.returncode == 9
    assert [f"exit code 9; restart {number} of 2.\n" in done.stderr for number in (1, 2)] == [True, True]


COME = "tell(f'{job} {index} has come')\n"
DIES = "await_told('ps 0 has come', 'worker 0 has come', 'worker 1 has come'); raise OSError('no room')\n"
STAYS = COME + "if restarts == 0: time.sleep(60)\n" + LEAVE


def test_a_server_that_fails_ends_all_and_all_are_started_again(run):
    server = COME + "if index == 1 and restarts == 0: " + DIES + SERVE
    done = run("--workers", 2, "--servers", 2, "--max-restarts", 1, worker=STAYS, server=server)
    assert done.returncode == 0, done.stderr
    assert (len(run.pids("worker")), len(run.pids("ps"))) == (4, 4)
    lines = done.stderr.splitlines()
    assert lines[0] == (
        "tfzero.launch: server 1 (of 2) failed first, with exit code 1; all have ended. Its last output again:"
    )
    assert lines[-2] == "[server 1] OSError: no room"
    assert lines[-1] == "tfzero.launch: restart 1 of 1 in 0.5 s, with 2 workers and 2 servers."


def test_a_server_that_fails_when_no_restart_is_left_gives_the_exit_code(run):
    server = "await_told('worker 0 has come'); os.kill(os.getpid(), signal.SIGKILL)\n"
    done = run("--workers", 1, "--servers", 1, worker=STAYS, server=server)
    assert done.returncode == 128 + signal.SIGKILL
    assert "server 0 (of 1) failed first, with signal 9" in done.stderr
    assert_gone([*run.pids("worker"), *run.pids("ps")])


def test_restarts_of_workers_that_were_not_made_are_left_for_all(run):
    """A server fails while a worker waits for its replacement."""
    worker = "if restarts == 0 and index == 1: sys.exit(9)\nif restarts == 0: time.sleep(60)\n" + LEAVE
    server = "if restarts == 0: await_end_of(1); sys.exit(5)\n" + SERVE
    options = ["--workers", 2, "--servers", 1, "--max-restarts", 1]
    done = run(*options, worker=worker, server=server, _PAUSE_SECONDS=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("restart 1 of 1 in 2 s") == 2


def test_workers_may_take_their_time_after_their_leave(run):
    """The servers have ended with exit code 0 by then."""
    done = run("--workers", 2, "--servers", 1, worker=LEAVE + "time.sleep(1.5); print('saved')\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("saved") == 2


@pytest.mark.parametrize("who", ["the servers", "the worker"])
def test_a_worker_that_fails_after_all_have_left_needs_new_servers(run, who):
    """Either may end first."""
    worker = (
        LEAVE + "if restarts: sys.exit(0)\n"
        "if index == 0: time.sleep(60)\n" + "time.sleep(1)\n" * (who == "the servers") + "sys.exit(9)\n"
    )
    server = SERVE + "if restarts == 0: await_end_of(1)\n" * (who == "the worker")
    options = ["--workers", 2, "--servers", 1, "--max-restarts", 1]
    done = run(*options, worker=worker, server=server, _PAUSE_SECONDS=2)
    assert done.returncode == 0, done.stderr
    assert "worker 1 (of 2) failed first, with exit code 9; all have ended" in done.stderr
    assert "restart 1 of 1 in 2 s, with 2 workers and 1 servers" in done.stderr
    assert (len(run.pids("worker")), len(run.pids("ps"))) == (4, 2)


def test_servers_may_end_by_themselves(run):
    done = run("--workers", 1, "--servers", 1, server=SERVE + "time.sleep(1); print('ended')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[server 0] ended\n", "")


def test_servers_that_stay_are_ended(run):
    done = run("--workers", 1, "--servers", 2, server=FOR_EVER)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_gone(run.pids("ps"))


OTHERS = {"saves": "", "has ended": "if index: sys.exit(0)\n", "is to be replaced": "if index: sys.exit(9)\n"}


@pytest.mark.parametrize("other", OTHERS)
def test_workers_may_save_what_servers_hold(run, other):
    """Beside another worker that saves too, that has ended, or that waits for its replacement."""
    worker = (
        "def save(*_): tell('saving'); await_told('was asked'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "tell(f'ready {index}')\n" + OTHERS[other] + "await_end_of(1); tell('worker 1 has ended')\n" + FOR_EVER
    )
    process = run.start(
        "--workers", 2, "--servers", 1, "--max-restarts", 1, worker=worker, server=FOR_EVER, _PAUSE_SECONDS=30
    )
    run.await_told("ready 0", "ready 1" if other == "saves" else "worker 1 has ended")
    process.send_signal(signal.SIGTERM)
    run.await_told("saving")
    time.sleep(0.5)
    servers = [is_alive(pid) for pid in run.pids("ps")]
    (run.folder / "was asked").touch()
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert (servers, process.returncode) == ([True], 75)
    assert "received SIGTERM; all workers have saved and ended" in errors
    assert_gone([*run.pids("worker"), *run.pids("ps")])


def test_a_signal_ends_all(run):
    process = run.start("--workers", 1, "--servers", 1, "--grace-seconds", 0, worker=FOR_EVER, server=FOR_EVER)
    while len(pids := [*run.pids("worker"), *run.pids("ps")]) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert "received SIGTERM; all workers have ended" in errors
    assert_gone(pids)


def test_a_timeout_names_workers(run):
    worker = "if index: time.sleep(60)\n"
    done = run("--workers", 2, "--servers", 1, "--timeout-seconds", 2, worker=worker, server=FOR_EVER)
    assert done.returncode == 124
    assert "timeout: still running after 2 seconds: worker 1;" in done.stderr
    assert_gone([*run.pids("worker"), *run.pids("ps")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2", "--servers", "-1"], "servers must be an integer of at least 0. Received: -1"),
        (["--workers", "2", "--servers", "1.5"], "argument --servers: invalid int value: '1.5'"),
        (["--workers", "2", "--servers", "1", "--min-workers", "2"], "--min-workers has no effect with --servers: a"),
        (["--servers", "1"], "--servers 1 has no effect without --workers: Open MPI starts the tasks. Name servers"),
    ],
)
def test_bad_input_is_refused(monkeypatch, capsys, options, message):
    for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "1" if name.endswith("SIZE") else "0")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(SystemExit) as ended:
        launch.main([*options, __file__])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def serve(run, monkeypatch):
    """Makes a script the server of `run_local`."""
    return lambda body: monkeypatch.setattr(launch, "SERVE", [sys.executable, run.write("server.py", body)])


def work(folder):
    config = json.loads(os.environ["TF_CONFIG"])
    index = config["task"]["index"]
    while not os.path.exists(os.path.join(folder, "served")):
        time.sleep(0.02)
    return index, len(config["cluster"]["ps"]), os.environ.get("SET")


def test_run_local_returns_what_workers_return(run, serve, tmp_path):
    serve("assert os.environ['SET'] == 'a' and not sys.argv[1:]; tell('served')\n" + FOR_EVER)
    results = run_local(work, 2, servers=2, args=(str(tmp_path),), env={"SET": "a"}, timeout_seconds=LIMIT_SECONDS)
    assert results == [(0, 2, "a"), (1, 2, "a")]
    assert len(run.pids("ps")) == 2
    assert_gone(run.pids("ps"))


def test_run_local_goes_on_after_its_servers_have_ended_well(serve, tmp_path):
    def late(folder):
        time.sleep(1)
        return work(folder)

    serve("tell('served')\n")
    assert run_local(late, 1, servers=1, args=(str(tmp_path),), timeout_seconds=LIMIT_SECONDS) == [(0, 1, None)]


def test_run_local_names_a_server_that_fails(run, serve, capsys):
    serve("if index: raise OSError('no room')\nprint('serving', flush=True)\n" + FOR_EVER)

    def wait():
        print("waiting", flush=True)
        time.sleep(60)

    with pytest.raises(WorkerError, match=r"server 1 \(of 2\) failed first, with exit code 1, before all") as caught:
        run_local(wait, 1, servers=2, timeout_seconds=LIMIT_SECONDS)
    assert str(caught.value).splitlines()[-1] == "[server 1] OSError: no room"
    assert capsys.readouterr().out == ""
    assert_gone(run.pids("ps"))


def test_run_local_names_a_worker_that_fails(run, serve):
    serve("print('serving', flush=True); tell('served')\n" + FOR_EVER)

    def fail(folder):
        raise LookupError(f"no data {work(folder)[0]}")

    with pytest.raises(WorkerError, match=r"worker 0 \(of 1\) failed first, with exit code 1, before it") as caught:
        run_local(fail, 1, servers=1, args=(str(run.folder),), timeout_seconds=LIMIT_SECONDS)
    lines = str(caught.value).splitlines()
    assert (lines[1], lines[-1]) == ("[server 0] serving", "[worker 0] LookupError: no data 0")
    assert_gone(run.pids("ps"))


def test_run_local_shows_the_output_of_servers(serve, tmp_path, capsys):
    serve("print('serving', flush=True); tell('served')\n" + FOR_EVER)
    run_local(work, 1, servers=1, args=(str(tmp_path),), echo=True, timeout_seconds=LIMIT_SECONDS)
    assert capsys.readouterr().out == "[server 0] serving\n"


@pytest.mark.parametrize("servers", [-1, 1.5, "2", True, None])
def test_run_local_refuses_other_numbers_of_servers(servers):
    with pytest.raises(ValueError, match=f"servers must be an integer of at least 0. Received: {servers!r}"):
        run_local(print, 1, servers=servers)
