"""Which worker is named, and dropped, when one keeps the others waiting; and which errors name none."""

import os
import re
import subprocess
import sys
import time

import pytest
from marks import sweep

LIMIT_SECONDS = 300
TIMEOUT_SECONDS = 5

SLOW = """
import sys, time
import keras, numpy as np, tensorflow as tf, tfzero

where, slow = sys.argv[1], int(sys.argv[2])
strategy = tfzero.ZeroStrategy(2, min_shard_elements=8, timeout_seconds=float(sys.argv[3]))
index, workers = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync


class Slow(keras.layers.Dense):
    def call(self, x):
        if where == "tracing" and index == slow and workers > 1 and tf.inside_function():
            print("slow at", time.time(), flush=True)
            time.sleep(60)
        return super().call(x)


with strategy.scope():
    model = keras.Sequential([keras.Input((5,)), Slow(17), keras.layers.Dense(3)])
model.compile("sgd", "mse", run_eagerly=False)
if where == "before" and index == slow and workers > 1:
    print("slow at", time.time(), flush=True)
    time.sleep(60)
try:
    model.fit(np.ones((16, 5)), np.ones((16, 3)), batch_size=8, verbose=0)
except BaseException:
    print("ended at", time.time(), flush=True)
    raise
print("trained by", workers, flush=True)
"""


def launch(folder, script, *arguments, options=()):
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "tfzero.launch", "--workers", "2", *options, str(path), *map(str, arguments)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.mark.parametrize(("where", "slow"), [("tracing", 0), sweep("before", 0), sweep("before", 1)])
def test_a_worker_that_is_slow_is_named_in_time_and_dropped(tmp_path, where, slow):
    options = ["--max-restarts", "2", "--min-workers", "1"]
    done = launch(tmp_path, SLOW, where, slow, TIMEOUT_SECONDS, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[worker 0] trained by 1" in done.stdout
    first, second, _ = re.split(r"restart \d of 2", done.stderr)
    for errors in (first, second):
        assert f"worker {1 - slow} (of 2) failed first, with exit code 76, because of worker {slow}" in errors
        assert f"worker {slow} does not come back" in second
    told = re.findall(rf"worker {1 - slow} exits with code 76: (.*)", done.stdout)
    assert len(told) == 2
    for text in told:
        assert re.search(rf"worker {slow} at \S+ did not arrive", text), text
    began = [float(at) for at in re.findall(r"slow at (\S+)", done.stdout)]
    ended = [float(at) for at in re.findall(rf"\[worker {1 - slow}\] ended at (\S+)", done.stdout)]
    waited = [end - begin for begin, end in zip(began, ended, strict=True)]
    assert max(waited) < TIMEOUT_SECONDS + (10 if where == "tracing" else 2)  # it traces itself meanwhile


OWN_THEN_AT_ODDS = """
import sys, time
import tensorflow as tf, tfzero

strategy = tfzero.ZeroStrategy(2, timeout_seconds=60)
for error in (ConnectionError("mine"), TimeoutError("mine"), ConnectionResetError("mine"),
              tf.errors.UnavailableError(None, None, "my bucket")):
    began = time.monotonic()
    sys.excepthook(type(error), error, None)
    print("seconds", time.monotonic() - began, flush=True)

print("at odds from", time.time(), flush=True)
strategy = tfzero.ZeroStrategy(2, timeout_seconds=20)
group = strategy.extended.group
rank = group.rank(0)
group.launch(group.all_reduce, [tf.ones([5])])
with group.lanes.purpose(0, ["the gradient of kernel", "the norm of all gradients"][rank]):
    group.launch(group.all_reduce, [tf.ones([100_000 + rank])])
"""


@pytest.fixture(scope="module")
def own_then_at_odds(tmp_path_factory):
    done = launch(tmp_path_factory.mktemp("blame"), OWN_THEN_AT_ODDS)
    return done, time.time()


def test_errors_of_the_users_own_do_not_wait_for_a_reason(own_then_at_odds):
    done, _ = own_then_at_odds
    seconds = [float(each) for each in re.findall(r"seconds (\S+)", done.stdout)]
    assert len(seconds) == 8
    assert max(seconds) < 10 and sorted(seconds)[5] < 0.5  # TensorFlow's kind is asked of the pulse


def test_collectives_at_odds_are_told_with_workers_and_places(own_then_at_odds):
    done, ended = own_then_at_odds
    began = max(float(at) for at in re.findall(r"at odds from (\S+)", done.stdout))
    assert ended - began < 40
    assert done.returncode == 1, done.stdout + done.stderr
    for told in (
        r"number, bytes and key are \(\d+, \d+, \d+\) on worker [01], \(\d+, \d+, \d+\) on worker [01]",
        "worker 0 was at the gradient of kernel",
        "worker 1 was at the norm of all gradients",
    ):
        assert re.search(told, done.stdout), done.stdout
