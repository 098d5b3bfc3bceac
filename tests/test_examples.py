"""Every example runs on two workers within what two cores give in a minute, and comes to a result."""

import ast
import contextlib
import io
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pool
import pytest
import yaml
from marks import FLEET_SECONDS, sweep

import tfzero

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU_SECONDS = 2 * 60
MOST_LINES = 100
# Each in the same two workers, and each as their only program in the sweep.
PROGRAMS = {
    "gpt": ["gpt.py", "--steps", "30"],
    "images": ["images.py", "--epochs", "4"],
    "recommender": ["recommender.py", "--stage", "2"],
    "recommender 3": ["recommender.py", "--stage", "3"],
    "loans": ["loans.py", "--epochs", "5"],
    "custom loop": ["custom_loop.py", "--epochs", "5"],
}
SHARED = ["gpt", "images", "recommender", "loans", "custom loop"]


def run(name: str, *arguments: str, workers: int = 2) -> str:
    """What an example prints."""
    command = [sys.executable, "-m", "tfzero.launch", "--workers", str(workers), str(EXAMPLES / name), *arguments]
    before = _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, timeout=FLEET_SECONDS, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _cpu_seconds() - before < CPU_SECONDS
    return done.stdout


def _cpu_seconds() -> float:
    """Of the processes that have ended under this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def number_in(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found.group(1))


def run_in_turn(programs) -> list[tuple[str, float]]:
    """In a worker: what each example prints, and the seconds of processors that it took."""
    import keras

    told = []
    for path, *arguments in programs:
        before = resource.getrusage(resource.RUSAGE_SELF)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", [path, *arguments]):
            runpy.run_path(path, run_name="__main__")
        keras.config.set_dtype_policy("float32")
        after = resource.getrusage(resource.RUSAGE_SELF)
        told.append((printed.getvalue(), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return told


@pytest.fixture(scope="module")
def in_turn():
    """What the first worker printed, by example."""
    programs = [[str(EXAMPLES / name), *arguments] for name, *arguments in (PROGRAMS[each] for each in SHARED)]
    of_workers = pool.run(run_in_turn, args=(programs,))
    for both in zip(*of_workers, strict=True):
        assert sum(seconds for _, seconds in both) < CPU_SECONDS
    return {name: printed for name, (printed, _) in zip(SHARED, of_workers[0], strict=True)}


@pytest.fixture(params=["in turn", sweep("alone")])
def printed(request):
    """A function that gives what an example prints."""
    if request.param == "alone":
        return lambda name: run(*PROGRAMS[name])
    return request.getfixturevalue("in_turn").__getitem__


def test_gpt(printed):
    text = printed("gpt")
    # One letter in six is a space, and the likeliest.
    assert number_in(r"of held-out letters ([\d.]+)% are foretold", text) > 20
    assert "tfzero: stage 3, slots, gradients and parameters lie in shards" in text
    assert re.search("it writes: .This data set", text)


def test_images(printed):
    assert number_in(r"([\d.]+)% of the held-out digits", printed("images")) > 90


def test_recommender(printed):
    assert number_in(r"in ([\d.]+)% of the cases", printed("recommender")) > 80


@pytest.mark.sweep
def test_recommender_at_stage_3():
    assert number_in(r"in ([\d.]+)% of the cases", run(*PROGRAMS["recommender 3"])) > 80


def test_loans(printed):
    text = printed("loans")
    assert number_in(r"AUC ([\d.]+)", text) > 0.7
    assert number_in(r"([\d.]+)% of the rejections", text) > 50


def test_a_custom_loop(printed):
    text = printed("custom loop")
    assert number_in(r"epoch 5: generator ([\d.]+)", text) > 0
    assert len(re.findall(r"^.*[ .:*#]{16}$", text, re.MULTILINE)) >= 8


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_strategy_comes_before_all_that_uses_tensorflow(path):
    """Where examples run in turn, the first strategy is there already, so a late one would not be noticed."""
    tree = ast.parse(path.read_text())
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.If)
    assert all(isinstance(statement, harmless) for statement in tree.body)
    module = [each for each in tree.body if isinstance(each, (ast.Assign, ast.Expr))]
    (main,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == "main")
    is_strategy = ["ZeroStrategy(" in ast.unparse(statement) for statement in main.body]
    before = main.body[: is_strategy.index(True)]
    calls = [
        ast.unparse(node.func) for each in [*module, *before] for node in ast.walk(each) if isinstance(node, ast.Call)
    ]
    assert {call.partition(".")[0] for call in calls} <= {"argparse", "parser"}


def test_tumours_go_on_with_another_number_of_workers(tmp_path):
    run("tumours.py", "--directory", str(tmp_path), "--epochs", "2", workers=1)
    resumed = run("tumours.py", "--directory", str(tmp_path), "--epochs", "4")
    assert "after 60 steps, the last on 2 replicas" in resumed
    assert number_in(r"replicas: ([\d.]+)% are told apart", resumed) > 90


@pytest.mark.parametrize("way", ["in turn", sweep("alone")])
def test_notebook(monkeypatch, capsys, way):
    if way == "in turn":
        monkeypatch.setattr(tfzero, "run_local", pool.run)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    namespace = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["results"][0]["accuracy"][-1] > 0.8
    assert "2 replicas, 1 CPU devices in each of 2" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) < MOST_LINES
    assert lines[0].startswith('"""') and "examples/" in path.read_text()


# Clusters.


def test_slurm_script(tmp_path):
    """With stand-ins for Slurm's programs: every task gets its TF_CONFIG and the arguments."""
    programs = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'shift; for k in 0 1; do SLURM_PROCID=$k "$@"; done',
        "python": 'echo "$TF_CONFIG" | tr -d "\\n"; echo " $*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]"}
    script = str(EXAMPLES / "cluster" / "slurm.sh")
    done = subprocess.run(
        ["bash", script, "train.py", "--a b"], env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    for index, line in enumerate(done.stdout.splitlines()):
        config, _, rest = line.rpartition("} ")
        assert json.loads(config + "}") == {
            "cluster": {"worker": ["node1:23456", "node2:23456"]},
            "task": {"type": "worker", "index": index},
        }
        assert rest == "train.py --a b"


def test_kubernetes_manifest(tmp_path):
    """Well-formed, and the shell that it runs makes the pods' TF_CONFIG."""
    service, job = yaml.safe_load_all((EXAMPLES / "cluster" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    container = pod["containers"][0]
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$TF_CONFIG"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "JOB_COMPLETION_INDEX": "3",
        **{each["name"]: each["value"] for each in container["env"]},
    }
    done = subprocess.run(container["command"], env=environment, capture_output=True, text=True, timeout=100)
    config = json.loads(done.stdout)
    assert config["cluster"]["worker"] == [f"tfzero-{k}.tfzero:23456" for k in range(4)]
    assert config["task"] == {"type": "worker", "index": 3}
    assert container["ports"][0]["containerPort"] == 23456
