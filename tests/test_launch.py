"""Promises of `tfzero.launch`: real processes are started, fail, hang and are ended; none is left behind."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfzero.launch import WorkerError, held_ports, run_local
from tfzero.workers.fleet import LineSplitter

LIMIT_SECONDS = 100  # of each launch here; most take half a second
FACTOR = 10
IMPORTS = "import os, sys; from tfzero import launch; from tfzero.workers import runs"


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "tfzero.launch", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment, **streams, **options)


def launch(*arguments, **options):
    process = start(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def script(tmp_path):
    """Writes a worker's script; `index`, `cluster` and `folder` are at its disposal."""

    def write(body, name="train.py"):
        head = (
            "import json, os, signal, socket, subprocess, sys, time\n"
            "config = json.loads(os.environ['TF_CONFIG'])\n"
            "index, cluster = config['task']['index'], config['cluster']['worker']\n"
            f"folder = {str(tmp_path)!r}\n"
            "def note_pid(pid):\n"
            "    open(os.path.join(folder, f'{pid}.pid'), 'w').close()\n"
            "note_pid(os.getpid())\n"
        )
        path = tmp_path / name
        path.write_text(head + body)
        return path

    return write


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.parent.parent.joinpath("self").exists() or stat.read_text().rpartition(")")[2][1] != "Z"
    return False


def noted_pids(folder, count):
    """The `count` processes that noted themselves, once they have."""
    stop_seconds = time.monotonic() + LIMIT_SECONDS
    while len(found := list(folder.glob("*.pid"))) < count and time.monotonic() < stop_seconds:
        time.sleep(0.02)
    assert len(found) == count
    return [int(path.stem) for path in found]


def assert_gone(pids, within_seconds=3.0):
    stop_seconds = time.monotonic() + within_seconds
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < stop_seconds:
        time.sleep(0.02)
    assert not left


def test_held_ports_are_for_servers_that_ask_for_them():
    with held_ports(50) as ports:
        assert len(set(ports)) == 50
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", ports[0]))
        for port in ports:
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[0]))


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
def test_splitter_loses_no_text(piece_bytes):
    stream = "a\n\nb\r\n\r1/2 ━╸\b\b\b\r2/2 ━━\n\ttabs and spaces  \nlast".encode()
    splitter = LineSplitter()
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.feed(b"", final=True)
    assert lines == ["a", "", "b", "1/2 ━╸", "2/2 ━━", "\ttabs and spaces  ", "last"]


def test_a_long_line_takes_linear_time():
    splitter, began = LineSplitter(), time.monotonic()
    for _ in range(256):
        assert splitter.feed(b"\x1e[" + b"x" * 65534) == []
    (line,) = splitter.feed(b"\n")
    assert len(line) == 256 * 65536
    assert time.monotonic() - began < 3


def test_a_long_line_does_not_keep_the_others_waiting(script):
    body = "print('early') if index else print('x' * 16_000_000)\n"
    done = launch("--workers", 2, script(body))
    assert done.returncode == 0
    assert sorted(map(len, done.stdout.splitlines())) == [len("[worker 1] early"), len("[worker 0] ") + 16_000_000]


NO_REPORTS = [
    "[" * 3000, "[" + "9" * 3900 + "]", "[1]", "[{}]", '[{"title": 1, "total": 2}]', '[{"title": "a", "total": "b"}]',
    '[{"title": "a", "total": true}]', '[{"title": "a", "total": 1' + "0" * 400 + "}]", '[{"title": "a"}]',
    "[null, null]", '[{"title": "' + "a" * 4000 + '", "unit": "", "total": 2, "done": 1}]',
]  # fmt: skip


@pytest.mark.parametrize("text", NO_REPORTS)
def test_what_looks_like_a_report_and_is_none_is_text(text):
    splitter = LineSplitter()
    assert splitter.feed(f"a\x1e{text}\nb\n".encode()) == [f"a\x1e{text}", "b"]
    assert splitter.reports == []


def test_who_is_asked_for_no_reports_may_print_what_looks_like_one(script):
    done = launch("--workers", 1, script(r"print('\x1e[null]'); print('\x1e' + '[' * 5000)"))
    assert done.returncode == 0
    assert done.stdout.split("\n") == ["[worker 0] \x1e[null]", "[worker 0] \x1e" + "[" * 5000, ""]


def test_script_gets_its_cluster_arguments_and_environment(script):
    body = (
        "print(json.dumps([sys.argv[1:], index, cluster, __name__, sys.path[0] == folder,"
        " os.environ['TFZERO_CPU_DEVICES'], os.environ['PYTHONUNBUFFERED'], sys.stdin.read()]))\n"
        "print('to stderr', file=sys.stderr)\n"
        "print('no line end', end='')\n"
    )
    own = ["--workers", "9", "--", "-m", "two words"]
    started_seconds = time.monotonic()
    done = launch("--workers", 3, "--cpu-devices", 4, script(body), *own)
    assert time.monotonic() - started_seconds < 5
    assert (done.returncode, done.stderr) == (0, "")
    clusters = []
    for index in range(3):
        prefix = f"[worker {index}] "
        lines = [line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix)]
        assert lines[1:] == ["to stderr", "no line end"]
        arguments, own_index, cluster, *rest = json.loads(lines[0])
        assert (arguments, own_index, rest) == (own, index, ["__main__", True, "4", "1", ""])
        clusters.append(cluster)
    assert len(done.stdout.splitlines()) == 9
    assert clusters[0] == clusters[1] == clusters[2]
    assert len(set(clusters[0])) == 3 and all(each.startswith("127.0.0.1:") for each in clusters[0])


def test_module_mode(script, tmp_path):
    script("print('as a module', __name__, sys.argv[1:])\n", name="a_module.py")
    done = launch("--workers", 1, "-m", "a_module", "--workers", "x", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "[worker 0] as a module __main__ ['--workers', 'x']\n"


def test_lines_come_at_once(script):
    process = start("--workers", 1, script("print('early'); time.sleep(60)\n"))
    try:
        assert process.stdout.readline() == "[worker 0] early\n"
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)


def test_first_failure_is_named_not_its_consequence(script, tmp_path):
    """Worker 0 fails when its connection to worker 1 breaks; worker 2 ignores SIGTERM like TensorFlow."""
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "host, port = cluster[1].split(':')\n"
        "if index == 1:\n"
        "    server = socket.create_server((host, int(port)))\n"
        "    client, _ = server.accept()\n"
        "    while sum(name.endswith('.pid') for name in os.listdir(folder)) < 4: time.sleep(0.01)\n"
        "    try:\n"
        "        raise KeyError('the first cause')\n"
        "    except KeyError:\n"
        "        import traceback; traceback.print_exc(); os._exit(7)\n"
        "if index == 0:\n"
        "    while True:\n"
        "        try:\n"
        "            line = socket.create_connection((host, int(port))); break\n"
        "        except OSError:\n"
        "            time.sleep(0.01)\n"
        "    line.recv(1)\n"
        "    raise ConnectionError('a consequence')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "note_pid(child.pid)\n"
        "time.sleep(60)\n"
    )
    started_seconds = time.monotonic()
    done = launch("--workers", 3, script(body))
    assert time.monotonic() - started_seconds < 8
    assert done.returncode == 7
    assert "worker 1 (of 3) failed first, with exit code 7" in done.stderr
    assert done.stderr.splitlines()[1] == "[worker 1] Traceback (most recent call last):"
    assert done.stderr.splitlines()[-1] == "[worker 1] KeyError: 'the first cause'"
    assert_gone(noted_pids(tmp_path, 4))


def test_death_by_signal(script):
    body = "print('\\n'.join(map(str, range(100))))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    done = launch("--workers", 1, script(body))
    assert done.returncode == 128 + signal.SIGKILL
    assert "worker 0 (of 1) failed first, with signal 9" in done.stderr
    assert done.stderr.splitlines()[1:] == [f"[worker 0] {number}" for number in range(80, 100)]


def test_children_of_a_finished_worker_are_ended(script, tmp_path):
    body = "note_pid(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)\n"
    assert launch("--workers", 2, script(body)).returncode == 0
    assert_gone(noted_pids(tmp_path, 4))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_ends_all(script, tmp_path, number):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note_pid(0); print('ready'); time.sleep(60)\n"
    process = start("--workers", 2, "--grace-seconds", 1, script(body))
    pids = [pid for pid in noted_pids(tmp_path, 3) if pid]
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + number
    assert f"received {number.name}; all workers have ended" in errors
    assert_gone(pids)


def test_workers_may_save_after_sigterm(script, tmp_path):
    body = (
        "def save(*_): time.sleep(2); print('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save); note_pid(0); time.sleep(60)\n"
    )
    process = start("--workers", 2, "--max-restarts", 3, script(body))
    noted_pids(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75
    assert output.count("saved") == 2 and "received SIGTERM; all workers have saved and ended" in errors


# Each worker prints a line, and none goes on before all have.
RESTARTS = (
    "restarts = int(os.environ['TFZERO_RESTARTS']); print('fleet', restarts, len(cluster), flush=True)\n"
    "name = os.path.join(folder, f'fleet {restarts} ')\n"
    "open(name + str(index), 'w').close()\n"
    "while not all(os.path.exists(name + str(k)) for k in range(len(cluster))): time.sleep(0.02)\n"
)


def test_a_failed_fleet_is_restarted(script):
    body = RESTARTS + "if restarts < 2 and index == 1: os.kill(os.getpid(), 9)\ntime.sleep(1)\n"
    done = launch("--workers", 2, "--max-restarts", 3, script(body))
    assert done.returncode == 0
    assert done.stdout.count("fleet 2 2") == 2
    assert "restart 1 of 3 in 0.5 s, with 2 workers" in done.stderr
    assert "restart 2 of 3 in 1 s, with 2 workers" in done.stderr


def test_a_fleet_is_restarted_only_so_often(script):
    done = launch("--workers", 2, "--max-restarts", 2, script(RESTARTS + "if index: sys.exit(9)\ntime.sleep(5)\n"))
    assert done.returncode == 9
    assert done.stdout.count("fleet 2 2") == 2 and done.stderr.count("restart ") == 2


def test_fewer_workers_go_on_when_one_does_not_come_back(script):
    body = RESTARTS + "if index == 2: sys.exit(9)\ntime.sleep(1)\n"
    done = launch("--workers", 3, "--max-restarts", 3, "--min-workers", 2, script(body))
    assert done.returncode == 0
    assert [done.stdout.count(f"fleet {k} {n}") for k, n in ((0, 3), (1, 3), (2, 2))] == [3, 3, 2]
    assert "worker 2 does not come back; restart 2 of 3 in 1 s, with 2 workers" in done.stderr


def test_who_is_lost_is_not_who_notices(script):
    """A stopped worker does not end; the others exit with code 76."""
    body = RESTARTS + "if index == 1 and len(cluster) == 3: time.sleep(60)\nif len(cluster) == 3: sys.exit(76)\n"
    done = launch("--workers", 3, "--max-restarts", 2, "--min-workers", 1, script(body))
    assert done.returncode == 0
    assert "worker 1 does not come back" in done.stderr


def test_who_is_blamed_is_dropped(script):
    """Of those that did not end by themselves, and are ended alike."""
    blame = "open(os.environ['TFZERO_BLAME'], 'w').write('[2]'); sys.exit(76)"
    body = RESTARTS + f"if len(cluster) == 3 and index == 1: {blame}\nif len(cluster) == 3: time.sleep(60)\n"
    done = launch("--workers", 3, "--max-restarts", 2, "--min-workers", 1, script(body))
    assert done.returncode == 0
    assert "worker 1 (of 3) failed first, with exit code 76, because of worker 2" in done.stderr
    assert "worker 2 does not come back" in done.stderr


def test_a_script_that_crashes_at_once_is_restarted_after_pauses_that_grow(script):
    began = time.monotonic()
    done = launch("--workers", 1, "--max-restarts", 3, script("sys.exit(9)"))
    assert done.returncode == 9
    for number, pause in ((1, "0.5"), (2, "1"), (3, "2")):
        assert f"restart {number} of 3 in {pause} s, with 1 workers" in done.stderr
    assert time.monotonic() - began > 3.5


def test_a_fleet_that_ran_for_a_while_is_restarted_without_a_pause(script):
    code = f"{IMPORTS}; runs._AT_ONCE_SECONDS = 0; sys.exit(launch.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--workers", "1", "--max-restarts", "2", str(script("sys.exit(9)"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 9
    assert [f"restart {number} of 2, with 1 workers" in done.stderr for number in (1, 2)] == [True, True]


def test_a_signal_in_the_pause_before_a_restart_ends_the_launcher(script):
    process = start("--workers", 1, "--max-restarts", 20, script("sys.exit(9)"))
    for line in process.stderr:
        if "restart 4 of 20 in 4 s" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert "received SIGTERM; no worker was running" in errors


def test_a_signal_between_two_fleets_ends_the_launcher_too(script):
    """Before the pause has begun: while the launcher says that there will be one."""
    told = "lambda text, **options: (print(text, **options), 'restart 1' in text and os.kill(os.getpid(), 15))"
    code = f"{IMPORTS}; runs.print = {told}; sys.exit(launch.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--workers", "1", "--max-restarts", "2", str(script("sys.exit(9)"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 128 + signal.SIGTERM
    assert "received SIGTERM; no worker was running" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--min-workers", 3), ("--min-workers", 0), ("--max-restarts", -1), ("--grace-seconds", -1)]
)
def test_bad_numbers_of_restarts_are_refused(script, arguments):
    done = launch("--workers", 2, *arguments, script(""))
    assert done.returncode == 2 and str(arguments[0]) in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_killed_launcher_takes_its_workers_along(script, tmp_path):
    process = start("--workers", 2, script("time.sleep(60)\n"))
    pids = noted_pids(tmp_path, 2)
    process.kill()
    process.communicate(timeout=LIMIT_SECONDS)
    assert_gone(pids)


def test_timeout_names_those_still_running(script, tmp_path):
    done = launch("--workers", 3, "--timeout-seconds", 1, script("if index != 1: time.sleep(60)\n"))
    assert done.returncode == 124
    assert "timeout: still running after 1 seconds: worker 0, 2;" in done.stderr
    assert_gone(noted_pids(tmp_path, 3))


def test_closed_output_ends_all(script, tmp_path):
    process = start("--workers", 1, script("while True: print('on and on'); time.sleep(0.01)\n"))
    pids = noted_pids(tmp_path, 1)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGPIPE
    assert_gone(pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0", __file__], "workers must be above 0. Received: 0"),
        (["--workers", "2", "absent.py"], "there is no script 'absent.py' in "),
        (["--workers", "2", "--timeout-seconds", "-1", __file__], "timeout_seconds must be above 0"),
        (["--workers", "2"], "required: script"),
    ],
)
def test_bad_input(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_run_local_returns_results_in_worker_order():
    offset = 5  # the closure, and FACTOR of this module, travel by value

    def work(base, unit):
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        time.sleep(0.3 * (1 - index))
        imported = any(name in sys.modules for name in ("tensorflow", "test_launch", "tests.test_launch"))
        return index, base * FACTOR + offset, os.environ["A_SETTING"], unit, imported, sys.stdin.read()

    results = run_local(
        functools.partial(work, unit="m"),
        2,
        args=(2,),
        env={"A_SETTING": "on"},
        timeout_seconds=LIMIT_SECONDS,
    )
    assert results == [(0, 25, "on", "m", False, ""), (1, 25, "on", "m", False, "")]


def test_run_local_calls_installed_functions_by_name():
    assert run_local(os.path.join, 1, args=("a", "b")) == [os.path.join("a", "b")]


class Record:
    def __init__(self, value):
        self.value = value


def test_run_local_returns_objects_of_our_own_classes():
    (record,) = run_local(Record, 1, args=(3,), timeout_seconds=LIMIT_SECONDS)
    assert isinstance(record, Record) and record.value == 3


def test_run_local_echo(capsys):
    run_local(print, 2, args=("hello",), echo=True, timeout_seconds=LIMIT_SECONDS)
    assert sorted(capsys.readouterr().out.splitlines()) == ["[worker 0] hello", "[worker 1] hello"]


def test_run_local_failure_shows_all_logs_the_failing_last(capsys):
    def work():
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        print(f"log of {index}")
        if index == 0:
            time.sleep(0.3)
            raise LookupError("no such thing")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    with pytest.raises(WorkerError, match=r"worker 0 \(of 2\) failed first, with exit code 1,") as caught:
        run_local(work, timeout_seconds=LIMIT_SECONDS)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["[worker 1] log of 1", "[worker 0] log of 0"]
    assert lines[-1] == "[worker 0] LookupError: no such thing"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("leave", "ending"),
    [
        (lambda: os._exit(0), "exit code 0"),
        (lambda: sys.exit(5), "exit code 5"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal 11"),
    ],
)
def test_run_local_without_result_is_a_failure(leave, ending):
    with pytest.raises(WorkerError, match=f"with {ending}"):
        run_local(leave, 1, timeout_seconds=LIMIT_SECONDS)


def test_run_local_holds_finished_workers_and_forgives_their_end():
    """Worker 0 aborts while it is held: its result counts, and the others go on."""

    def work():
        import threading

        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        if index == 0:
            threading.Timer(0.2, os.abort).start()
        time.sleep(0.8 * index)
        return index

    assert run_local(work, 2, timeout_seconds=LIMIT_SECONDS) == [0, 1]


def test_run_local_timeout(tmp_path):
    def work(folder):
        Path(folder, f"{os.getpid()}.pid").touch()
        print("waiting")
        time.sleep(60 * json.loads(os.environ["TF_CONFIG"])["task"]["index"])

    with pytest.raises(TimeoutError, match="still running after 1.5 seconds: worker 1;") as caught:
        run_local(work, 2, args=(str(tmp_path),), timeout_seconds=1.5)
    assert "[worker 1] waiting" in str(caught.value)
    assert_gone(noted_pids(tmp_path, 2))


def test_run_local_refuses_what_cannot_travel():
    lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match="could not pickle them. Create variables"):
        run_local(lambda: lock, 1)
    with pytest.raises(ValueError, match="workers must be above 0. Received: 0"):
        run_local(print, 0)


@pytest.mark.sweep  # as all fleets of other tests
def test_run_local_runs_tensorflow():
    def work():
        import tensorflow as tf

        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        context = strategy.run(tf.function(lambda: tf.distribute.get_replica_context().all_reduce("SUM", 1.5)))
        return strategy.num_replicas_in_sync, float(context)

    assert run_local(work, 2, timeout_seconds=LIMIT_SECONDS) == [(2, 3.0), (2, 3.0)]
