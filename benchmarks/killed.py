"""What becomes of a run with parameter servers whose workers, or servers, are killed again and again.

    python benchmarks/killed.py worker                       # of three: the loss, against an undisturbed run
    python benchmarks/killed.py server --kills 20 --seeds 1  # of two: how many updates there were, of how many

The launcher starts again what is killed. Of a worker the run learns digits with wrong labels, so that the loss does not
vanish. Of a server each gradient is 1, whatever the weights are, and a `CheckpointCallback` saves every five steps: so
every weight tells how many updates it has had.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEP_SECONDS = 0.06


def train(folder: Path, what: str, seed: int, epochs: int) -> None:
    """The program of a worker. Writes what has come out."""
    import keras
    import numpy as np
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import tfzero

    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    def note(batch, logs):
        if logs:
            with open(folder / f"steps{index}", "a") as file:
                file.write(".")
            time.sleep(STEP_SECONDS)

    class Sum(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(3000,), initializer="zeros")

        def call(self, x):
            return tf.reduce_sum(self.weight) + 0 * x[:, :1]

    strategy = tfzero.ZeroStrategy(timeout_seconds=20, max_staleness=None)
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    y = np.where(generator.random(len(y)) < 0.25, generator.integers(0, 10, len(y)), y)
    order = generator.permutation(len(y))
    x, y = (x[order] / 16).astype("float32"), y[order]
    keras.utils.set_random_seed(seed)
    calls = [keras.callbacks.LambdaCallback(on_train_batch_end=note)]
    with strategy.scope():
        layers = [keras.layers.Dense(32, "tanh"), keras.layers.Dense(10)] if what == "worker" else [Sum()]
        model = keras.Sequential([keras.Input((64,)), *layers])
    if what == "worker":
        model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    else:
        model.compile(keras.optimizers.SGD(1.0), lambda y, outputs: outputs[:, 0])
        calls.append(tfzero.CheckpointCallback(folder / "saved", save_every_steps=5))
    model.fit(x[:1344], y[:1344], batch_size=48, epochs=epochs, verbose=0, callbacks=calls)
    updates = int(model.optimizer.iterations)
    found = {"updates": updates, "loss": model.evaluate(x[1344:], y[1344:], verbose=0) if what == "worker" else None,
             "least": -float(model.get_weights()[0].max()), "most": -float(model.get_weights()[0].min())}  # fmt: skip
    (folder / f"result{index}").write_text(json.dumps(found))


def kill(run: subprocess.Popen, folder: Path, what: str) -> bool:
    """Kills the second worker, or one of the servers, if there is one. Returns whether."""
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(run.pid)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    found = [int(line.split()[0]) for line in lines if ("tfzero.servers" in line) == (what == "server")]
    if what == "worker":
        found = [pid for pid in found if b'"index": 1}' in Path(f"/proc/{pid}/environ").read_bytes()]
    for pid in random.sample(found, min(1, len(found))):
        os.kill(pid, signal.SIGKILL)
    return bool(found)


def one_run(what: str, kills: int, seed: int, epochs: int) -> dict:
    """A run of the launcher, disturbed so often."""
    workers, servers = (3, 1) if what == "worker" else (2, 2)
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), 0
        own = [what, "--folder", name, "--seed", str(seed), "--epochs", str(epochs)]
        command = [sys.executable, "-m", "tfzero.launch", "--workers", workers, "--servers", servers, "--max-restarts",
                   4 * kills, __file__, *own]  # fmt: skip
        with open(folder / "log", "w") as log:
            run = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        watched = folder / ("steps1" if what == "worker" else "steps0")
        while made < kills and run.poll() is None:
            before = watched.stat().st_size if watched.exists() else 0
            while run.poll() is None and (watched.stat().st_size if watched.exists() else 0) < before + 10:
                time.sleep(0.02)
            time.sleep(random.random() * 2)
            made += kill(run, folder, what)
        code = run.wait()
        if code:
            raise SystemExit((folder / "log").read_text()[-5000:])
        results = [json.loads((folder / f"result{index}").read_text()) for index in range(workers)]
    return {**max(results, key=lambda result: result["updates"]), "kills": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("worker", "server"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=45, help="of 28 steps")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return train(options.folder, options.what, options.seed, options.epochs)
    for seed in range(1, options.seeds + 1):
        random.seed(seed)
        disturbed = one_run(options.what, options.kills, seed, options.epochs)
        if options.what == "server":
            print(f"{disturbed['kills']} kills: {disturbed['least']:.0f} to {disturbed['most']:.0f} updates of each "
                  f"weight, of {2 * 28 * options.epochs}", flush=True)  # fmt: skip
            continue
        calm = one_run("worker", 0, seed, options.epochs)
        more = 100 * (disturbed["loss"] / calm["loss"] - 1)
        print(f"seed {seed}: loss {disturbed['loss']:.4f} after {disturbed['kills']} kills, {calm['loss']:.4f} without,"
              f" {more:+.2f} %; {disturbed['updates']} and {calm['updates']} updates", flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
