"""Every example runs on two workers within what two cores give in a minute, and comes to a result."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from marks import FLEET_SECONDS, sweep

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU_SECONDS = 2 * 60
MOST_LINES = 100


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


def test_gpt():
    printed = run("gpt.py", "--steps", "30")
    # One letter in six is a space, and the likeliest.
    assert number_in(r"of held-out letters ([\d.]+)% are foretold", printed) > 20
    assert "tfzero: stage 3, slots, gradients and parameters lie in shards" in printed
    assert re.search("it writes: .This data set", printed)


def test_images():
    assert number_in(r"([\d.]+)% of the held-out digits", run("images.py", "--epochs", "4")) > 90


@pytest.mark.parametrize("stage", [2, sweep(3)])
def test_recommender(stage):
    printed = run("recommender.py", "--stage", str(stage))
    assert number_in(r"in ([\d.]+)% of the cases", printed) > 80


def test_loans():
    printed = run("loans.py")
    assert number_in(r"AUC ([\d.]+)", printed) > 0.7
    assert number_in(r"([\d.]+)% of the rejections", printed) > 50


def test_tumours_go_on_with_another_number_of_workers(tmp_path):
    run("tumours.py", "--directory", str(tmp_path), "--epochs", "2", workers=1)
    resumed = run("tumours.py", "--directory", str(tmp_path), "--epochs", "4")
    assert "after 60 steps, the last on 2 replicas" in resumed
    assert number_in(r"replicas: ([\d.]+)% are told apart", resumed) > 90


def test_a_custom_loop():
    printed = run("custom_loop.py", "--epochs", "5")
    assert number_in(r"epoch 5: generator ([\d.]+)", printed) > 0
    assert len(re.findall(r"^.*[ .:*#]{16}$", printed, re.MULTILINE)) >= 8


def test_notebook(monkeypatch, capsys):
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
