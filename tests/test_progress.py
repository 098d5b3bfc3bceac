"""Promises of `workers/progress.py`: one bar at a time on a terminal, which leaves prints readable; else nothing."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import time

import gpt
import pytest

from tfzero.launch import run_local
from tfzero.workers import progress
from tfzero.workers.fleet import LineSplitter

LIMIT_SECONDS = 300
BAR = "━"


def screens(output):
    """What a terminal shows: its lines before each time that one is erased, and at the end."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            lines, column = [*lines, ""], 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            yield lines
            lines = [*lines[:-1], ""]
        elif token.startswith("\x1b"):
            assert token.endswith("m"), f"neither a colour nor an erasure: {token!r}"
        else:
            lines = [*lines[:-1], lines[-1][:column] + token + lines[-1][column + len(token) :]]
            column += len(token)
    yield lines


def bars(output):
    """The bars that a terminal shows one after the other, when never two are shown and none is left."""
    found = []
    for lines in screens(output):
        shown = [line for line in lines if BAR in line]
        assert len(shown) <= 1 and (not shown or lines[-1] == shown[0]), lines
        found += [line for line in shown if found[-1:] != [line]]
    assert not shown
    return found


def environment(**settings):
    return {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **settings}


def on_terminal(*arguments, stdout=None, **settings):
    """Runs Python with a terminal; what it shows, and the exit code."""
    ours, theirs = pty.openpty()
    try:
        streams = {"stdin": theirs, "stdout": theirs if stdout is None else stdout, "stderr": theirs}
        process = subprocess.Popen([sys.executable, *map(str, arguments)], env=environment(**settings), **streams)
    finally:
        os.close(theirs)
    output, stop_seconds = b"", time.monotonic() + LIMIT_SECONDS
    with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO: all have left
        while time.monotonic() < stop_seconds and (piece := terminal.read(65536)):
            output += piece
    try:
        return output.decode(), process.wait(LIMIT_SECONDS)
    finally:
        process.kill()


def in_pipes(*arguments, **settings):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=LIMIT_SECONDS)
    return done.stdout, done.stderr, done.returncode


@pytest.fixture
def script(tmp_path):
    """Writes a script in which all work shows a bar, each time that it advances."""

    def write(body):
        head = "import os, subprocess, sys, time\nfrom tfzero.workers import progress\n"
        head += "progress.QUICK_SECONDS = progress.REDRAW_SECONDS = 0\n"
        path = tmp_path / "script.py"
        path.write_text(head + body)
        return path

    return write


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def take_terminal(monkeypatch):
    """In place of this process's stderr; all is drawn. Called in the test itself, as pytest changes stderr before."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "QUICK_SECONDS", 0)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


WORK = """
with progress.progress("saving", 3_000_000, unit="bytes") as bar:
    for step in range(3):
        bar.advance(1_000_000)
        with progress.progress("within it", 5) as inner:
            inner.advance()
print("rich" in sys.modules)
"""


def test_work_shows_one_bar_on_a_terminal(script):
    output, exit_code = on_terminal(script(WORK))
    assert exit_code == 0
    assert [re.findall(r"^saving .* (\d.\d/3.0 MB)", bar) for bar in bars(output)] == [
        ["1.0/3.0 MB"], ["2.0/3.0 MB"], ["3.0/3.0 MB"],
    ]  # fmt: skip
    assert list(screens(output))[-1] == ["True", ""]
    assert "\x1b[?25l" not in output  # a cursor that is hidden stays so when the process is killed


@pytest.mark.parametrize("settings", [{}, {"FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1"}, {"TFZERO_PROGRESS": "1"}])
def test_nothing_is_shown_in_a_pipe(script, settings):
    assert in_pipes(script(WORK), **settings) == ("False\n", "", 0)


def test_nothing_is_shown_on_a_terminal_that_cannot_erase(script):
    output, _ = on_terminal(script(WORK), TERM="dumb")
    assert output == "True\r\n"


def test_a_narrow_terminal_shows_one_line(script):
    output, _ = on_terminal(script(WORK), COLUMNS="20")
    assert all(len(lines) <= 2 and len(lines[0]) <= 20 for lines in screens(output))
    assert "1.0/3.0 MB" in output


def test_quick_work_and_that_of_other_workers_show_no_bar(monkeypatch):
    terminal = take_terminal(monkeypatch)
    with progress.progress("another's", 5, shown=False) as bar:
        bar.advance()
    assert not bar.is_shown
    monkeypatch.setattr(progress, "QUICK_SECONDS", 60)
    with progress.progress("quick", 5) as bar:
        bar.advance()
    assert bar.is_shown and terminal.getvalue() == ""


def test_bars_are_drawn_ten_times_a_second_only(monkeypatch):
    terminal = take_terminal(monkeypatch)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.1)
    start_seconds = time.monotonic()
    with progress.progress("saving", 100_000) as bar:
        for _ in range(100_000):
            bar.advance()
    assert 1 <= len(bars(terminal.getvalue())) <= 1 + (time.monotonic() - start_seconds) / 0.1


def test_a_bar_ends_with_its_work_whatever_happens(monkeypatch):
    terminal = take_terminal(monkeypatch)
    with contextlib.suppress(KeyError), progress.progress("saving", 5) as bar:
        bar.advance()
        raise KeyError
    with progress.progress("restoring", 5) as bar:
        bar.advance()
    assert [line.split()[0] for line in bars(terminal.getvalue())] == ["saving", "restoring"]


def test_a_terminal_that_has_gone_is_no_error(monkeypatch):
    terminal = take_terminal(monkeypatch)
    with progress.progress("saving", 5) as bar:
        terminal.close()
        bar.advance()


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_reports_are_cut_out_of_what_a_worker_prints(piece_bytes):
    task = progress.Task("saving", 10, 3, "bytes")
    report = "\x1e" + json.dumps([vars(task)]) + "\n"
    stream = f"a\nb{report}c\n{report}\x1e[null]\n\r1/2{report}\r\x1e[1, 2]\n\x1e no report\n\x1e[5]\nlast".encode()
    splitter = LineSplitter()
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.feed(b"", final=True)
    assert lines == ["a", "bc", "1/2", "\x1e[1, 2]", "\x1e no report", "\x1e[5]", "last"]
    assert splitter.reports == [task, task, None, task]


# Both workers and a child of the first one have work; the first one's alone is shown.
FLEET = """
index = int(os.environ["TF_CONFIG"].rpartition(": ")[2].strip("}"))
for step in range(20):
    print("line", step, end="")
    with progress.progress(f"work of {index}", 3) as bar:
        for _ in range(3):
            bar.advance()
            time.sleep(0.02)
    print(" ends")
child = "from tfzero.workers import progress\\nprogress.QUICK_SECONDS = 0\\n"
child += "with progress.progress('work of a child', 3) as bar: bar.advance()"
subprocess.run([sys.executable, "-c", child])
"""


def test_a_fleet_shows_one_bar_below_the_lines_of_its_workers(script):
    output, exit_code = on_terminal("-m", "tfzero.launch", "--workers", 2, script(FLEET))
    assert exit_code == 0
    expected = [f"[worker {index}] line {step} ends" for index in (0, 1) for step in range(20)]
    assert sorted(list(screens(output))[-1]) == sorted([*expected, ""])
    titles = {re.split(f" *[{BAR}╸╺ ]{{5}}", bar)[0] for bar in bars(output)}
    assert titles == {"running", "work of 0"}
    assert any("0/2 workers have finished" in bar for bar in bars(output))


def test_a_fleet_shows_no_bar_in_pipes(script):
    output, errors, exit_code = in_pipes("-m", "tfzero.launch", "--workers", 2, script(FLEET))
    assert (errors, exit_code) == ("", 0)
    assert BAR not in output and "\x1e" not in output and "\x1b" not in output
    assert len(output.splitlines()) == 40


def test_lines_go_to_stdout_though_a_bar_is_on_the_terminal(script, tmp_path):
    with open(tmp_path / "lines", "w") as lines:
        output, _ = on_terminal("-m", "tfzero.launch", "--workers", 2, script(FLEET), stdout=lines)
    assert bars(output) and list(screens(output))[-1] == [""]
    lines = (tmp_path / "lines").read_text()
    assert len(lines.splitlines()) == 40 and BAR not in lines and "\x1e" not in lines and "\x1b" not in lines


def work_a_little(seconds):
    time.sleep(seconds * (1 + json.loads(os.environ["TF_CONFIG"])["task"]["index"]))
    return os.environ.get("TFZERO_PROGRESS")


def test_run_local_shows_how_many_have_finished(monkeypatch):
    terminal = take_terminal(monkeypatch)
    assert run_local(work_a_little, 2, args=(0.5,)) == [str(os.getpid()), None]
    amounts = list(dict.fromkeys(re.search(r"\d/2 workers have finished", bar)[0] for bar in bars(terminal.getvalue())))
    assert amounts == ["0/2 workers have finished", "1/2 workers have finished"]


def test_a_fleet_within_other_work_shows_that_alone(monkeypatch):
    terminal = take_terminal(monkeypatch)
    with progress.progress("rounds", 3):
        assert run_local(work_a_little, 2, args=(0.1,)) == [None, None]
    assert {line.split()[0] for line in bars(terminal.getvalue())} == {"rounds"}


def test_the_benchmark_shows_one_bar_on_a_terminal_and_lines_in_a_pipe(monkeypatch, capsys):
    terminal = take_terminal(monkeypatch)
    monkeypatch.setattr(gpt.Contestant, "run", lambda *_: {})
    monkeypatch.setattr(gpt, "summarize", lambda *_: {"name": "", "step_ms": 1.0})
    gpt.main(["--rounds", "2", "--stages", "3"])
    shown = bars(terminal.getvalue())
    assert [line.split(f" {BAR}")[0] for line in shown] == [f"round {k} of 2: {n}" for k in (1, 2) for n in NAMES]
    assert [re.search(r"\d/4 runs", line)[0] for line in shown] == [f"{done}/4 runs" for done in range(4)]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    gpt.main(["--rounds", "2", "--stages", "3"])
    assert sys.stderr.getvalue().splitlines() == [f"round {k} of 2: {n}" for k in (1, 2) for n in NAMES]


NAMES = ("stock", "stage 3")

# The second worker comes late; disk and network are slow, as the launcher draws ten times a second only.
TRAINING = """
import tfzero
index = int(os.environ["TF_CONFIG"].rpartition(": ")[2].strip("}"))
time.sleep(3 * index)
strategy = tfzero.ZeroStrategy(2, min_shard_elements=1)
import keras, tensorflow as tf
from tfzero import extended
from tfzero.checkpoint import pieces as checkpoint

def slowed(function):
    def slow(*args, **arguments):
        time.sleep(0.06)
        return function(*args, **arguments)
    return slow

tf.raw_ops.SaveV2, tf.raw_ops.RestoreV2 = slowed(tf.raw_ops.SaveV2), slowed(tf.raw_ops.RestoreV2)
checkpoint._LEAST_BATCH_BYTES = 1
extended.ZeroExtended.whole_value = slowed(extended.ZeroExtended.whole_value)
with strategy.scope():
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100), keras.layers.Dense(100)])
model.compile("adam", "mse")
model.optimizer.build(model.trainable_variables)
folder = os.path.dirname(__file__)
print("saves")
tfzero.save_checkpoint(model, os.path.join(folder, "run"))
print("restores")
tfzero.load_checkpoint(model, os.path.join(folder, "run"))
print("writes")
model.save(os.path.join(folder, "model.keras"))
print("has ended")
"""


def test_two_workers_meet_save_and_restore_with_one_bar(script):
    output, exit_code = on_terminal("-m", "tfzero.launch", "--workers", 2, script(TRAINING), TF_CPP_MIN_LOG_LEVEL="3")
    assert exit_code == 0, output
    shown = bars(output)
    titles = [title for title in dict.fromkeys(bar.split()[0] for bar in shown) if title != "running"]
    assert titles == ["meeting", "saving", "restoring", "gathering"]
    for title, amount in {
        "meeting": "1/2 workers", "saving": r"0.\d/0.2 MB", "restoring": r"0.\d/0.2 MB", "gathering": r"\d/8 variables",
    }.items():  # fmt: skip
        assert any(re.search(f"^{title} .* {amount}", bar) for bar in shown), title
    lines = [f"[worker {index}] {what}" for index in (0, 1) for what in ("saves", "restores", "writes", "has ended")]
    assert set(lines) <= set(list(screens(output))[-1])


def test_two_workers_show_nothing_in_pipes(script):
    output, errors, exit_code = in_pipes(
        "-m", "tfzero.launch", "--workers", 2, script(TRAINING), TF_CPP_MIN_LOG_LEVEL="3"
    )
    assert (errors, exit_code) == ("", 0), output
    assert output.count("has ended") == 2
    assert not any(mark in output for mark in (BAR, "\x1e", "\x1b[2K", "MB"))
