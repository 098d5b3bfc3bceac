"""What each of the two workers does: all cases at all their stages, checkpoints, and memory; it writes what came of it.

Imported in a worker only, where the environment tells TensorFlow which devices there are.
"""

import gc
import time
import traceback
from pathlib import Path

import cases
import keras
import numpy as np
import tensorflow as tf

import tfzero
from tfzero.views.facts import describe_devices

TIMEOUT_SECONDS = 40.0
# Of which a checkpoint is written, to be read on one CPU.
SAVED = (("dense, SGD", 3), ("transformer, AdamW", 2), ("Muon", 3))


def set_up(device: str) -> list[str]:
    """This worker's device, as TensorFlow names it. Takes no more of its memory than is needed."""
    if device == "cpu":
        return ["CPU:0"]
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) != 1:
        raise RuntimeError(f"This worker should see one GPU, but TensorFlow sees {len(gpus)}.")
    tf.config.experimental.set_memory_growth(gpus[0], True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return ["GPU:0"]


def run(device: str, folder: str, pattern: str) -> dict:
    """All runs. Gives what went wrong, by name and stage, and the figures of memory by stage.

    Weights go into the folder at once, so that they are there if a later run takes the process.
    """
    devices = set_up(device)
    problems, seconds, memory = {}, {}, {}
    for case, stage in cases.runs(cases.named(pattern)):
        start = time.monotonic()
        try:
            weights = train(case, stage, devices, folder)
            np.savez(Path(folder, f"{case.name} {stage} of {index_of()}.npz"), *weights)
        except Exception as error:
            traceback.print_exc()
            problems[case.name, stage] = f"{type(error).__name__}: {error}"
        seconds[case.name, stage] = time.monotonic() - start
        print(f"{case.name}, stage {stage}: {seconds[case.name, stage]:.1f} s", flush=True)
        keras.backend.clear_session()
        gc.collect()
    if pattern.lower() in "memory":
        for stage in range(4):
            memory[stage] = measure(stage, devices)
            print(f"memory, stage {stage}: {memory[stage]}", flush=True)
    return {"problems": problems, "seconds": seconds, "memory": memory, "card": describe_devices(devices)[0]}


def index_of() -> int:
    return tf.distribute.cluster_resolver.TFConfigClusterResolver().task_id


def train(case: cases.Case, stage: int, devices: list[str], folder: str) -> list[np.ndarray]:
    # So small a model would lie whole otherwise.
    strategy = tfzero.ZeroStrategy(stage, devices=devices, min_shard_elements=64, timeout_seconds=TIMEOUT_SECONDS)
    model, weights = cases.trained(case, strategy.scope())
    if (case.name, stage) in SAVED:
        tfzero.save_checkpoint(model, str(Path(folder, f"checkpoint of {case.name} {stage}")))
    return weights


def measure(stage: int, devices: list[str]) -> dict[str, int]:
    """Bytes held between steps, and at the peak of a step, of TensorFlow's allocator on this device."""

    def info():
        return tf.config.experimental.get_memory_info(devices[0])

    strategy = tfzero.ZeroStrategy(stage, devices=devices, timeout_seconds=TIMEOUT_SECONDS)
    keras.backend.clear_session()
    gc.collect()
    before = info()["current"]
    with strategy.scope():
        model = cases.wide()
    model.compile("adam", "mse")
    rows = cases.MEMORY_ROWS * strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=(rows, 1024)).astype("float32")
    peaks = []
    for _ in range(4):
        tf.config.experimental.reset_memory_stats(devices[0])
        model.train_on_batch(x, x)
        peaks.append(info()["peak"] - before)
    gc.collect()
    return {"held": info()["current"] - before, "peak": sorted(peaks[1:])[1]}
