"""Forked children of workers, as `PyDataset(use_multiprocessing=True)` has them: SIGTERM ends them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.workers import stopping

SCRIPT = """
import multiprocessing, os, signal, sys, time
import keras, numpy as np, tfzero

class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.full((12, 8), 0.1 * index, "f4"), np.ones((12, 1), "f4")

strategy = tfzero.ZeroStrategy(2)
with strategy.scope():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
callbacks = [tfzero.CheckpointCallback(sys.argv[1])] if len(sys.argv) > 1 else []

class Look(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True)
            child.start()
            time.sleep(0.5)
            child.terminate()
            child.join(10)
            print("child", child.exitcode, flush=True)
            child.kill()

model.fit(Rows(workers=2, use_multiprocessing=True, max_queue_size=4), verbose=0, callbacks=[*callbacks, Look()])
print("fit is done", flush=True)
"""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("saves", [True, sweep(False)])
def test_children_of_workers_end_and_so_do_the_workers(tmp_path, saves):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "tfzero.launch", "--workers", "2", "--timeout-seconds", "150", script]
    command += [tmp_path / "checkpoints"] * saves
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FLEET_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"child {-signal.SIGTERM}\n") == 2, done.stdout
    assert done.stdout.count("fit is done") == 2


def _children_of(handler):
    """In a process of its own: how a child ends at SIGTERM whose parent has this handler."""
    signal.signal(signal.SIGTERM, handler)
    stopping.let_children_end()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True)
    child.start()
    time.sleep(0.3)
    child.terminate()
    child.join(3)
    code = child.exitcode
    child.kill()
    return code


def _end_with_7(*_):
    os._exit(7)


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, -15), (signal.SIG_IGN, None), (_end_with_7, 7)])
def test_a_handler_of_the_users_own_stays_that_of_children(handler, code):
    assert tfzero.run_local(_children_of, workers=1, args=(handler,), timeout_seconds=FLEET_SECONDS) == [code]
