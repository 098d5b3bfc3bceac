"""The benchmark measures what it says, in real workers, and writes it down."""

import json
import socket
import sys

import gpt
import pytest
from gpt_worker import received_bytes

from tfzero import benchmark

SMALL = ["--dim", "48", "--layers", "1", "--steps", "3", "--rounds", "1"]


def test_a_small_model_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")  # as by default on CPUs where TensorFlow counts no bytes
    path = tmp_path / "figures.json"
    assert benchmark.main([*SMALL, "--stages", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["stock", "stage 2"] and written["workers"] == 2
    for row in rows.values():
        assert row["parameters"] == 59_344
        assert row["step_ms"] > row["compute_ms"] > 0 and row["update_ms"] > 0
        assert row["samples_per_second"] == pytest.approx(2 / row["step_ms"] * 1e3)
        # Of such small tensors TensorFlow counts some only, and messages have heads; `test_memory.py` is exact.
        assert row["wire_formula"] * 0.8 < row["wire_bytes"] and row["peak_bytes"] > 0
        assert row["held_formula"] == {"stock": 12, "stage 2": 8}[row["name"]]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| | step ms | ratio |") and len(printed) == 2 + len(rows)
    assert printed[2].startswith("| stock |") and "| 1.00 |" in printed[2]


def test_received_bytes_are_those_of_the_connections_of_this_process():
    before = received_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver, receiver.dup():
            sender.sendall(b"x" * 1000)
            assert receiver.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
            assert received_bytes() - before == 1000


def test_the_table_leaves_out_what_is_not_known():
    rows = [{"name": "stock", "step_ms": 200.0, "held_bytes": 12.0}, {"name": "torch ddp", "step_ms": 100.0}]
    lines = gpt.table(rows).splitlines()
    assert lines[2].startswith("| stock | 200 | 1.00 |  |") and "| 12.00 |" in lines[2]
    assert lines[3].startswith("| torch ddp | 100 | 0.50 |") and "12.00" not in lines[3]


def test_stock_comes_first_and_options_add_contestants():
    options = gpt.read_options(["--stages", "2", "3", "--compression", "bf16", "--error-feedback"])
    names = [contestant.name for contestant in gpt.contestants(options)]
    assert names == [
        "stock", "stage 2", "stage 3", "stage 2 bf16", "stage 3 bf16", "stage 2 int8 with feedback",
        "stage 3 int8 with feedback",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be at least 1. Received: 0"),
        (["--stages", "4"], "invalid choice"),
        (["--compression", "int4"], "invalid choice"),
        (["--peers", "jax"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpt.read_options(arguments)
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpt.read_options(["--peers", "torch"])
    assert "torch is not installed: `pip install torch`" in capsys.readouterr().err


def test_apart_from_a_checkout_it_says_where_it_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CHECKOUT", tmp_path)
    before = list(sys.path)
    assert benchmark.main(["--rounds", "1"]) == 2 and sys.path == before
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "run `python -m tfzero.benchmark` from a checkout" in printed.err
    assert str(tmp_path / "benchmarks" / "gpt.py") in printed.err
