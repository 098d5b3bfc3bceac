"""Every row of `table.py` is right: on a GPU where there is one, and the script itself on CPU workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("table.py")
LIMIT_SECONDS = {"gpu": 600, "cpu": 1500}


def run(path, environment, device):
    command = [sys.executable, str(TABLE), "--json", str(path), "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS[device])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return json.loads(path.read_text()), done.stdout


def test_all_rows_on_one_gpu(tmp_path, needs_gpu):
    rows, printed = run(tmp_path / "rows.json", needs_gpu, "gpu")
    print(printed)
    assert len(rows) > 40 and all(row["is_right"] for row in rows)


@pytest.mark.sweep
@pytest.mark.timeout(1600)
def test_all_rows_on_cpu_workers(tmp_path):
    rows, _ = run(tmp_path / "rows.json", os.environ, "cpu")
    names = {row["name"] for row in rows}
    assert len(rows) > 40 and all(row["is_right"] for row in rows)
    assert sum(name.startswith("checkpoint read on CPU") for name in names) == 3
    assert sum(name.startswith("memory held") for name in names) == 4
