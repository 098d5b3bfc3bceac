"""What one worker of the benchmark does: trains a GPT with stock all-reduce or with tfzero, and measures.

It runs in processes of its own (`gpt.py`). Keras and TensorFlow are imported there only, when threads are set.
"""

import contextlib
import gc
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import tfzero

VOCABULARY, LENGTH, HEADS = 256, 128, 6
WARM_UP_STEPS = 3  # not measured


@dataclass(frozen=True)
class Work:
    """A GPT and how it is trained.

    Args:
        dim: width of the model.
        layers: how many blocks.
        batch: samples of each worker in a step.
        steps: how many are measured.
        threads: of each worker's computations.
        steps_per_execution: as in `compile`; `steps`, and those to warm up, are then so many times as many.
    """

    dim: int = 768
    layers: int = 8
    batch: int = 1
    steps: int = 9
    threads: int = 1
    steps_per_execution: int = 1


def make_model(work: Work):
    """A decoder-only transformer, float32, with its optimizer and loss."""
    import keras
    from keras import ops

    dim = work.dim

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
            self.query_key_value = keras.layers.Dense(3 * dim)
            self.output_projection = keras.layers.Dense(dim)
            self.up = keras.layers.Dense(4 * dim, activation="gelu")
            self.down = keras.layers.Dense(dim)

        def call(self, x):
            projected = ops.reshape(self.query_key_value(self.norms[0](x)), (-1, LENGTH, 3, HEADS, dim // HEADS))
            query, key, value = ops.unstack(projected, axis=2)
            attended = ops.dot_product_attention(query, key, value, is_causal=True)
            x = x + self.output_projection(ops.reshape(attended, (-1, LENGTH, dim)))
            return x + self.down(self.up(self.norms[1](x)))

    class Position(keras.layers.Layer):
        def build(self, _):
            self.table = self.add_weight(shape=(LENGTH, dim))

        def call(self, x):
            return x + self.table

    tokens = keras.Input((LENGTH,), dtype="int32")
    x = Position()(keras.layers.Embedding(VOCABULARY, dim)(tokens))
    for _ in range(work.layers):
        x = Block()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, steps_per_execution=work.steps_per_execution)
    return model


def make_stock_strategy():
    """MultiWorkerMirroredStrategy with the one repair that Keras 3 needs."""
    import tensorflow as tf

    class Stock(tf.distribute.MultiWorkerMirroredStrategy):
        def reduce(self, reduce_op, value, axis=None):
            if tf.nest.is_nested(value) and not isinstance(value, tf.distribute.DistributedValues):
                return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)
            if axis == 0 and self.experimental_local_results(value)[0].shape.rank == 0:
                axis = None
            return super().reduce(reduce_op, value, axis)

    return Stock()


def measure(work: Work, stage: int | None, **settings) -> dict:
    """One worker's run.

    Args:
        work: the model and its training.
        stage: of tfzero; None for stock all-reduce.
        **settings: of `ZeroStrategy`.

    Returns:
        `seconds` of each step, `held` and `peak` bytes of TensorFlow's allocator between and within steps, `wire`
        bytes that this worker receives in a step, number of `parameters`, and median seconds of the gradient alone
        (`compute`) and of Adam on the elements that a replica updates (`update`).
    """
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # its allocator counts bytes, and is there by default on some CPUs only
    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2 * work.threads)
    tf.config.threading.set_intra_op_parallelism_threads(work.threads)
    strategy = make_stock_strategy() if stage is None else tfzero.ZeroStrategy(stage, **settings)
    with strategy.scope():
        model = make_model(work)
    count = work.batch * strategy.num_replicas_in_sync
    at_once = work.steps_per_execution
    shape = (count * at_once * (work.steps + WARM_UP_STEPS), LENGTH + 1)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype("int32")
    figures: dict = {"seconds": [], "parameters": model.count_params()}

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == WARM_UP_STEPS * at_once:
                tf.config.experimental.reset_memory_stats("CPU:0")
                self.received = received_bytes()
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])
            if batch >= WARM_UP_STEPS * at_once:
                figures["seconds"].append((time.perf_counter() - self.start) / at_once)
                figures["wire"] = (received_bytes() - self.received) / len(figures["seconds"]) / at_once

    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=count, shuffle=False, verbose=0, callbacks=[Clock()])
    figures["peak"] = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    gc.collect()
    figures["held"] = tf.config.experimental.get_memory_info("CPU:0")["current"]
    shards = 1 if stage in (None, 0) else strategy.num_replicas_in_sync
    del model
    meet = _meeting(strategy)
    figures["compute"] = _seconds_of_gradient(work, meet)
    figures["update"] = _seconds_of_update(-(-figures["parameters"] // shards), meet)
    return figures


def received_bytes() -> int:
    """What the TCP connections that this process holds open have received so far, without headers. Linux."""
    sockets = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(FileNotFoundError):  # closed since
            sockets[os.readlink(f"/proc/self/fd/{number}")] = number
    return sum(_received_bytes(number) for name, number in sockets.items() if name.startswith("socket:"))


def _received_bytes(number: int) -> int:
    """`tcpi_bytes_received` of the socket with this file descriptor (linux/tcp.h); 0 if it is not a TCP connection."""
    try:
        with socket.socket(fileno=os.dup(number)) as duplicate:
            info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    return struct.unpack_from("=Q", info, 128)[0]


def _meeting(strategy) -> Callable[[], object]:
    """A function that waits for all workers, so that what is timed next shares the machine as in training."""
    import tensorflow as tf

    @tf.function
    def count():
        return strategy.reduce("SUM", strategy.run(lambda: tf.ones([])), axis=None)

    return lambda: float(count())


def _median_seconds(function: Callable[[], object], meet: Callable[[], object], steps: int = 7) -> float:
    """Of single calls that all workers make at the same time, after two to warm up."""
    seconds = []
    for _ in range(steps + 2):
        meet()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _seconds_of_gradient(work: Work, meet: Callable[[], object]) -> float:
    import tensorflow as tf

    model = make_model(work)
    x = tf.zeros([work.batch, LENGTH], tf.int32)

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, x, model(x, training=True))
        # As in training, nothing is kept that is not needed any more.
        return [tf.reshape(g, [-1])[0] for g in tape.gradient(loss, model.trainable_variables)]

    return _median_seconds(lambda: gradient()[0].numpy(), meet)


def _seconds_of_update(elements: int, meet: Callable[[], object]) -> float:
    import keras
    import tensorflow as tf

    variable = keras.Variable(tf.zeros([elements]))
    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build([variable])
    gradient = tf.ones([elements])
    update = tf.function(
        lambda gradient: optimizer.update_step(gradient, variable.value, tf.constant(1e-4)), jit_compile=True
    )
    return _median_seconds(lambda: (update(gradient), variable.value[0].numpy()), meet)
