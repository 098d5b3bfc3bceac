"""Seconds to trace one training step, by depth: MirroredStrategy beside tfzero on two logical devices, alternating.

python benchmarks/tracing.py
"""

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tfzero

DEPTHS, ROUNDS = (10, 40, 160), 3
DEVICES = ["CPU:0", "CPU:1"]


def trace_seconds(strategy, depth: int) -> float:
    keras.backend.clear_session()
    with strategy.scope():
        dense = [keras.layers.Dense(64, activation="relu") for _ in range(depth)]
        model = keras.Sequential([keras.Input((64,)), *dense])
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    x = tf.ones([8, 64])
    batch = next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((x, x)))))
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    began = time.perf_counter()
    step.get_concrete_function(batch)
    return time.perf_counter() - began


def main() -> None:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * len(DEVICES)
    )
    strategies = {"MirroredStrategy": tf.distribute.MirroredStrategy(DEVICES)}
    for stage in (2, 3):
        strategies[f"stage {stage}"] = tfzero.ZeroStrategy(stage, devices=DEVICES)
    for strategy in strategies.values():
        trace_seconds(strategy, 2)
    for depth in DEPTHS:
        seconds: dict = {name: [] for name in strategies}
        for _ in range(ROUNDS):
            for name, strategy in strategies.items():
                seconds[name].append(trace_seconds(strategy, depth))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{depth:4} layers:", ", ".join(f"{name} {value:.2f} s" for name, value in medians.items()), flush=True)


if __name__ == "__main__":
    main()
