"""The pool serves call after call in the same processes, as if each had fresh ones, and replaces what failed."""

import pool
import pytest
from marks import FLEET_SECONDS, sweep

import tfzero


def _train(stage) -> tuple:
    """Process, replicas, and weights after three steps."""
    import os

    import keras
    import numpy as np

    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=4, timeout_seconds=60)
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(17), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(24, 8)).astype("float32")
    model.fit(x, x[:, :3], batch_size=8, shuffle=False, verbose=0)
    return os.getpid(), strategy.num_replicas_in_sync, model.get_weights()


def _leave_behind() -> None:
    import os
    import warnings

    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(3)
    keras.layers.Dense(1)
    tf.config.run_functions_eagerly(True)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    os.environ["TFZERO_LEFT"] = "1"
    os.chdir("/")
    warnings.simplefilter("error")


def _found() -> dict:
    import os
    import warnings

    import keras
    import tensorflow as tf

    return {
        "policy": keras.config.dtype_policy().name,
        "floatx": keras.config.floatx(),
        "name": keras.layers.Dense(1).name,
        "eager": tf.config.functions_run_eagerly(),
        "options": tf.config.optimizer.get_experimental_options(),
        "left": os.environ.get("TFZERO_LEFT"),
        "directory": os.getcwd(),
        "filters": len(warnings.filters),
    }


def _draws() -> list:
    import random

    import numpy as np
    import tensorflow as tf

    return [random.random(), float(np.random.random()), float(tf.random.uniform([]))]


def _fail(index) -> None:
    import json
    import os

    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == index:
        raise LookupError("no data there")


def _pids() -> int:
    import os

    return os.getpid()


def _sleep() -> None:
    import time

    time.sleep(100)


@pytest.fixture(autouse=True, scope="module")
def few_processes():
    yield
    pool.close()


@pytest.mark.parametrize("devices", [sweep(None), 2])
def test_calls_share_processes_and_train_as_in_fresh_ones(devices):
    fresh = tfzero.run_local(_train, args=(3,), cpu_devices=devices, timeout_seconds=FLEET_SECONDS)
    runs = [pool.run(_train, args=(stage,), cpu_devices=devices) for stage in (3, 0, 3)]
    for run in runs:
        assert [worker[0] for worker in run] == [worker[0] for worker in runs[0]]
        assert [worker[1] for worker in run] == [2 * (devices or 1)] * 2
    for (*_, ours), (*_, again), (*_, theirs) in zip(runs[0], runs[2], fresh, strict=True):
        assert all((a == c).all() and (b == c).all() for a, b, c in zip(ours, again, theirs, strict=True))


def test_what_a_call_leaves_behind_is_undone():
    before, draws = pool.run(_found), pool.run(_draws)
    processes = pool.run(_pids)
    pool.run(_leave_behind)
    assert pool.run(_found) == before and pool.run(_pids) == processes
    seen = [draws, pool.run(_draws)]
    pool.run(_leave_behind)
    seen.append(pool.run(_draws))
    pool.run(_leave_behind)
    seen.append(pool.run(_draws))
    numbers = [number for run in seen for worker in run for number in worker]
    assert len(set(numbers)) == len(numbers), "a seed is left"


def test_a_fleet_that_failed_or_died_is_replaced():
    import os
    import signal

    processes = pool.run(_pids)
    with pytest.raises(tfzero.WorkerError, match=r"(?s)worker 1 \(of 2\) failed first.*LookupError: no data there$"):
        pool.run(_fail, args=(1,))
    others = pool.run(_pids)
    assert not set(others) & set(processes)
    os.kill(others[1], signal.SIGKILL)  # between two calls
    os.waitid(os.P_PID, others[1], os.WEXITED | os.WNOWAIT)
    with pytest.raises(TimeoutError, match="still running after 2 seconds: worker 0, 1"):
        pool.run(_sleep, timeout_seconds=2)
    assert (2, 1) not in pool._fleets, "the next call gets another"


def test_fleets_are_few(monkeypatch):
    monkeypatch.setattr(pool, "MOST_FLEETS", 1)
    first = pool.run(_pids, 1)
    assert pool.run(_pids, 1) == first
    for devices in (2, None):
        others = pool.run(_pids, 1, cpu_devices=devices)
        assert len(pool._fleets) == 1 and others != first
