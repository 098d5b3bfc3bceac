"""What it is worth that each worker reads only its own files, on 1, 2 and 4 local workers.

    python benchmarks/own_data.py                  # all parts
    python benchmarks/own_data.py --parts slow

`bytes`: what each worker reads in an epoch (`rchar` of /proc/self/io), and the largest difference of weights from plain
Keras on one device after two epochs. `slow`: seconds of an epoch that waits for its input (5 ms a sample, one at a
time in each worker). `killed`: workers are killed in the middle of such an epoch, and other numbers of workers go on;
how long the first step waits for its batch, with each file's number of samples known or not.
"""

import argparse
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfzero

FILES, SAMPLES, NUMBERS = 16, 64, 8192  # files; samples in each; float32 numbers in each sample
SHARDS, BATCH = 8, 32
KILLED_AFTER = 60  # steps, of 32 in an epoch
SAMPLES_BEHIND = (KILLED_AFTER - FILES * SAMPLES // BATCH) * BATCH  # in the epoch in which workers are killed
SLOW_SECONDS, SLOW_SAMPLES = 0.005, 128
PARTS = ["bytes", "slow", "killed"]


def write(folder: str, samples: int, numbers: int) -> list[str]:
    random, files = np.random.default_rng(0), []
    for number in range(FILES):
        files.append(str(Path(folder) / f"part-{number:02}.tfrecord"))
        with tf.io.TFRecordWriter(files[-1]) as writer:
            for _ in range(samples):
                writer.write(random.normal(size=numbers).astype("float32").tobytes())
    return files


def decode(record):
    row = tf.reshape(tf.io.decode_raw(record, tf.float32), [-1])
    return row[:16], row[16:18]


def decode_slowly(record):
    def wait(text):
        time.sleep(SLOW_SECONDS)
        return text

    return decode(tf.ensure_shape(tf.numpy_function(wait, [record], tf.string), []))


def data_of(files, **arguments):
    given = {"shards": SHARDS, "batch_size": BATCH, "decode": decode, "shuffle": 32, "seed": 1} | arguments
    return tfzero.sharded_dataset(files, tf.data.TFRecordDataset, **given)


def model_of(strategy=None):
    keras.utils.set_random_seed(0)
    with (strategy or tf.distribute.get_strategy()).scope():
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


class Account(keras.callbacks.Callback):
    """Bytes read and seconds of each epoch, and seconds that the first step waits for its batch."""

    def __init__(self):
        super().__init__()
        self.waited, self.bytes, self.seconds = None, [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = read_bytes(), time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self.waited is None and isinstance(strategy := self.model.distribute_strategy, tfzero.ZeroStrategy):
            self.waited = strategy.report().input_seconds

    def on_epoch_end(self, epoch, logs=None):
        self.bytes.append(read_bytes() - self.start[0])
        self.seconds.append(time.perf_counter() - self.start[1])


def read_bytes() -> int:
    """Bytes that this process has read by `read` and the like, from files, pipes and caches."""
    return int(Path("/proc/self/io").read_text().split()[1])


def fit(model, data, epochs, *callbacks):
    account = Account()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=[*callbacks, account])
    return account


def measure(files):
    """In a worker: bytes of the second epoch, and weights after it."""
    model = model_of(tfzero.ZeroStrategy(2))
    return fit(model, data_of(files), 2).bytes[1], model.get_weights()


def measure_slow(files):
    """In a worker: seconds of the second epoch."""
    model = model_of(tfzero.ZeroStrategy(2))
    return fit(model, slow_data_of(files), 2).seconds[1]


def die(files, folder):
    """In a worker: trains until all are killed."""

    class Killer(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

    callback = tfzero.CheckpointCallback(folder, save_every_steps=5, asynchronous=False)
    fit(model_of(tfzero.ZeroStrategy(2)), slow_data_of(files), 2, callback, Killer())


def resume(files, folder, counts):
    """In a worker: goes on; how long the first step waited for its batch, and the weights in the end."""
    model = model_of(tfzero.ZeroStrategy(2))
    account = fit(model, slow_data_of(files, counts=counts), 2, tfzero.CheckpointCallback(folder))
    return account.waited, model.get_weights()


def slow_data_of(files, **arguments):
    return data_of(files, decode=decode_slowly, parallel_calls=1, **arguments)


def difference(weights, others) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(weights, others, strict=True))


def measure_bytes(files, expected):
    size = sum(os.path.getsize(each) for each in files)
    for workers in (1, 2, 4):
        results = tfzero.run_local(measure, workers, args=(files,), timeout_seconds=300)
        shares = ", ".join(f"{each[0] / size:.4f}" for each in results)
        differ = max(difference(each[1], expected) for each in results)
        print(f"{workers} workers: read {shares} of {size / 1e6:.1f} MB; weights differ by {differ:.1e}", flush=True)


def measure_speed(folder):
    files, seconds = write(folder, SLOW_SAMPLES, 32), {}
    for workers in (1, 2, 4):
        seconds[workers] = max(tfzero.run_local(measure_slow, workers, args=(files,), timeout_seconds=300))
        times = seconds[1] / seconds[workers]
        print(f"{workers} workers: slow epoch {seconds[workers]:.2f} s, {times:.2f} times as fast as one", flush=True)


def measure_resuming(files, folder, expected):
    for before, after, counts in ((2, 4, None), (2, 4, [SAMPLES] * FILES), (2, 1, [SAMPLES] * FILES)):
        known, run = "not known" if counts is None else "known", f"{folder}/run-{after}-{counts is None}"
        try:
            tfzero.run_local(die, before, args=(files, run), timeout_seconds=300)
        except tfzero.WorkerError as error:
            print(f"killed: {str(error).splitlines()[0]}")
        results = tfzero.run_local(resume, after, args=(files, run, counts), timeout_seconds=300)
        waited, differ = max(each[0] for each in results), max(difference(each[1], expected) for each in results)
        print(
            f"killed on {before}, resumed on {after}, counts {known}: first batch after {waited:.2f} s, where replay "
            f"decodes for {SAMPLES_BEHIND * SLOW_SECONDS / after:.2f} s; weights differ by {differ:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parts = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/slow")
        files = write(folder, SAMPLES, NUMBERS)
        one_device = model_of()
        fit(one_device, data_of(files), 2)
        if "bytes" in parts:
            measure_bytes(files, one_device.get_weights())
        if "slow" in parts:
            measure_speed(f"{folder}/slow")
        if "killed" in parts:
            measure_resuming(files, folder, one_device.get_weights())


if __name__ == "__main__":
    main()
