"""What parameter servers gain where one of several local workers is slower, without a bound and with one.

    python benchmarks/servers.py                    # three workers, of which one takes five times as long for a row
    python benchmarks/servers.py --rounds 1 --seconds 10

The model has a layer that sleeps for each row. The modes take turns, in fleets of their own. Each trains for some
seconds; what is told is the rows that all workers together have trained with in a second, and how stale updates were.
"""

import argparse
import os
import statistics
import time

import keras
import numpy as np
from uneven import Sleep

import tfzero

ROWS = 60  # of a batch
MODES = {"synchronous workers": None, "servers, max_staleness=0": 0, "max_staleness=4": 4, "max_staleness=None": -1}


def train_here(mode: str, slower: float, seconds: float):
    """In a worker, of which the last one is slower: rows a second, and what the first server tells."""
    bound = MODES[mode]
    strategy = tfzero.ZeroStrategy(2, **({} if bound is None else {"max_staleness": None if bound < 0 else bound}))
    fleet = strategy.extended.fleet
    os.environ["SLOWER"] = str(slower if fleet.worker == fleet.workers - 1 else 1)
    with strategy.scope():
        dense = [keras.layers.Dense(64, "relu"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((16,)), Sleep(), *dense])
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(ROWS * 40, n)).astype("float32") for n in (16, 3))
    model.fit(x, y, batch_size=ROWS, steps_per_epoch=2, epochs=1, verbose=0)  # traced, and all are here
    times = [time.perf_counter()]

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            times.append(time.perf_counter())
            if bound is not None and times[-1] - times[0] > seconds:
                self.model.stop_training = True

    steps = 10**6 if bound is not None else round(seconds / (ROWS / fleet.workers * 0.002 * slower))
    model.fit(x, y, batch_size=ROWS, epochs=-(-steps // 40), verbose=0, callbacks=[Stop()])
    rate = ROWS / fleet.workers * (len(times) - 1) / (times[-1] - times[0])
    told = strategy.served.peers.ask_all({"do": "tell"})[0] if strategy.served else {}
    return rate, told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--slower", type=float, default=5.0, help="how many times as long the last worker takes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of training, for each mode and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode, bound in MODES.items():
            arguments = (mode, options.slower, options.seconds)
            results = tfzero.run_local(train_here, options.workers, servers=int(bound is not None), args=arguments)
            rates[mode].append(sum(rate for rate, _ in results))
            told = results[0][1]
            ahead = f", at most {told['most_ahead']} steps ahead, staleness {told['staleness']}" if told else ""
            print(f"{mode}: {rates[mode][-1]:.0f} rows a second{ahead}", flush=True)
    first = rates["servers, max_staleness=0"]
    for mode, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, first, strict=True)]
        print(f"{mode}: {statistics.median(found):.0f} rows a second, {statistics.median(ratios):.2f} times "
              f"({min(ratios):.2f} to {max(ratios):.2f}) max_staleness=0")  # fmt: skip


if __name__ == "__main__":
    main()
