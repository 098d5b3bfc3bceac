"""What saving a checkpoint costs: memory beyond training's, and how long it keeps the step waiting.

    python benchmarks/checkpoint.py                  # 57 M parameters, four workers, stages 2 and 3

In one run saves are synchronous and asynchronous by turns. Memory is the growth of the process's resident set (RSS) to
its peak and of TensorFlow's allocator, over the save or until it is written; time is that from one step's begin to the
next one's, less the median of steps without a save.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time

import gpt

import tfzero


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _reset_peaks() -> tuple[int, int]:
    """Bytes in use now: resident, and by TensorFlow's allocator."""
    import tensorflow as tf

    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    tf.config.experimental.reset_memory_stats("CPU:0")
    return _status("VmRSS"), tf.config.experimental.get_memory_info("CPU:0")["current"]


def _growth(before: tuple[int, int]) -> dict:
    import tensorflow as tf

    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    return {"rss": _status("VmHWM") - before[0], "allocator": peak - before[1]}


def run(stage: int, dim: int, layers: int, directory: str, saves: int) -> dict:
    """One worker's run."""
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    strategy = tfzero.ZeroStrategy(stage, timeout_seconds=120)
    with strategy.scope():
        model = gpt.make_model(dim, layers)
    count = strategy.num_replicas_in_sync
    steps = 4 * saves + 4
    tokens = np.random.default_rng(0).integers(0, gpt.VOCABULARY, (count * steps, gpt.LENGTH + 1)).astype("int32")
    callback = tfzero.CheckpointCallback(directory, save_every_steps=4, save_every_epochs=None, keep=1)
    begins: list[float] = []
    growths: dict[str, list] = {"synchronous": [], "asynchronous": []}

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            begins.append(time.perf_counter())

    class Before(keras.callbacks.Callback):
        """Runs before the checkpoint callback: decides how to save, and notes memory."""

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])
            if (batch + 1) % 4 == 0:
                callback.asynchronous = (batch + 1) % 8 == 0
                self.before = _reset_peaks()

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if (batch + 1) % 4 == 0 and batch + 1 != steps:
                growths["asynchronous" if callback.asynchronous else "synchronous"].append(_growth(before.before))

    before = Before()
    model.fit(
        tokens[:, :-1],
        tokens[:, 1:],
        batch_size=count,
        shuffle=False,
        verbose=0,
        callbacks=[Clock(), before, callback, After()],
    )
    seconds = [later - earlier for earlier, later in itertools.pairwise(begins)]
    normal = statistics.median(s for k, s in enumerate(seconds) if k > 3 and (k + 1) % 4 in (2, 3))
    delays = {
        "synchronous": [seconds[k] - normal for k in range(11, len(seconds), 8)],
        "asynchronous": [seconds[k] - normal for k in range(7, len(seconds), 8)],
    }
    return {
        "step": normal,
        "delays": delays,
        "growths": growths,
        "largest": max(v.shape.num_elements() for v in (w.value for w in model.weights)) * 4,
        "own": 4 * sum(c.shape.num_elements() for v in _sharded(model) for c in v.values),
        "written": _written(model, strategy),
    }


def _sharded(model):
    from tfzero.variables.classes import ShardedVariable

    variables = (v.value for v in (*model.variables, *model.optimizer.variables))
    return [v for v in variables if isinstance(v, ShardedVariable)]


def _written(model, strategy) -> int:
    """Bytes that this worker writes into a checkpoint."""
    from tfzero.checkpoint.pieces import pieces_to_write
    from tfzero.checkpoint.state import mesh_of, state_of

    pieces = pieces_to_write(state_of(model), mesh_of(strategy), lambda size_bytes: None)
    return sum(piece.rectangle.elements * piece.value.dtype.size for piece in pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 768), ("layers", 8), ("workers", 4), ("saves", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # its allocator counts bytes, and is there by default on some CPUs only
    for stage in options.stages:
        with tempfile.TemporaryDirectory() as directory:
            arguments = (stage, options.dim, options.layers, directory, options.saves)
            results = tfzero.run_local(run, workers=options.workers, args=arguments, timeout_seconds=900)
        delays = {kind: statistics.median(results[0]["delays"][kind]) for kind in results[0]["delays"]}
        row = {
            "stage": stage,
            "step_ms": round(results[0]["step"] * 1e3),
            "largest_variable_bytes": results[0]["largest"],
            "own_bytes_written": max(r["written"] for r in results),
            "delay_ms": {kind: round(delay * 1e3) for kind, delay in delays.items()},
            "delay_ratio": round(delays["asynchronous"] / delays["synchronous"], 3),
        }
        for kind in ("synchronous", "asynchronous"):
            for what in ("allocator", "rss"):
                row[f"{kind}_{what}_bytes"] = max(g[what] for r in results for g in r["growths"][kind])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
