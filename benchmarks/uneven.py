"""What `rows="measured"` gains where one of several local workers is slower, and whether weights equal one device.

    python benchmarks/uneven.py                     # three workers, of which one takes three times as long for a row
    python benchmarks/uneven.py --workers 2 --slower 5

The model has a layer that sleeps for each row. Even and measured rows take turns, in fleets of their own; what is told
is the median of the last epochs' steps in each, and of the ratios.
"""

import argparse
import os
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

import tfzero

ROWS, BATCHES, EPOCHS = 60, 40, 3  # of a batch; of an epoch
ROW_SECONDS = 0.002


class Sleep(keras.layers.Layer):
    """Takes ROW_SECONDS for each row, times SLOWER of its process."""

    def call(self, x):
        def sleep(rows):
            time.sleep(ROW_SECONDS * float(os.environ.get("SLOWER", "0")) * len(rows))
            return np.zeros_like(rows)

        return x + tf.stop_gradient(tf.ensure_shape(tf.numpy_function(sleep, [x], x.dtype), x.shape))


def train(strategy=None):
    """Milliseconds of a step in the last epoch, and the weights."""
    keras.utils.set_random_seed(0)
    with (strategy or tf.distribute.get_strategy()).scope():
        dense = [keras.layers.Dense(64, "relu"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((16,)), Sleep(), *dense])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    random, times = np.random.default_rng(0), []
    x, y = (random.normal(size=(ROWS * BATCHES, n)).astype("float32") for n in (16, 3))
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    model.fit(x, y, batch_size=ROWS, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[note])
    steps = np.diff(times[-BATCHES + 1 :])
    return 1000 * float(np.median(steps)), model.get_weights()


def train_here(rows: str, slower: float):
    """In a worker, of which the last one is slower."""
    strategy = tfzero.ZeroStrategy(2, rows=rows)
    mesh = strategy.extended.mesh
    os.environ["SLOWER"] = str(slower if mesh.worker == mesh.workers - 1 else 1)
    return *train(strategy), strategy.report().options["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--slower", type=float, default=3.0, help="times as long for a row, in the last worker")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _, expected = train()
    ratios = []
    for _ in range(options.rounds):
        took = {}
        for rows in ("even", "measured"):
            arguments = (rows, options.slower)
            fleet = tfzero.run_local(train_here, options.workers, args=arguments, timeout_seconds=600)
            took[rows], _, told = fleet[0]
            differ = max(np.abs(a - b).max() for _, weights, _ in fleet for a, b in zip(weights, expected, strict=True))
            print(f"{rows}: {took[rows]:.1f} ms a step; weights differ by {differ:.1e}; {told}", flush=True)
        ratios.append(took["even"] / took["measured"])
    print(f"measured rows are {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
