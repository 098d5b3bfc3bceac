"""Step time and memory of a GPT on two local workers: stock all-reduce beside tfzero, alternating.

    python benchmarks/gpt.py                  # 57 M parameters, batch 1 a worker, stage 2, 3 rounds
    python benchmarks/gpt.py --dim 384 --layers 6 --batch 8 --stages 0 1 2

Stock is `tf.distribute.MultiWorkerMirroredStrategy`, its `reduce` repaired so that Keras 3 can fit with it. Each round
starts a fresh fleet of each; the ratio is that of the medians of all rounds' steps.
"""

import argparse
import json
import os
import statistics
import time

import tfzero

VOCABULARY, LENGTH, HEADS = 256, 128, 6


def make_model(dim: int, layers: int):
    """A decoder-only transformer, float32, with its optimizer and loss."""
    import keras
    from keras import ops

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
    for _ in range(layers):
        x = Block()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss)
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


def run(stage: int | None, dim: int, layers: int, batch: int, steps: int) -> dict:
    """One worker's run; `stage` None is stock. Seconds of each step after the third, bytes held and at the peak."""
    import gc

    import keras
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    strategy = make_stock_strategy() if stage is None else tfzero.ZeroStrategy(stage=stage)
    with strategy.scope():
        model = make_model(dim, layers)
    count = batch * strategy.num_replicas_in_sync
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count * steps, LENGTH + 1)).astype("int32")
    seconds: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                tf.config.experimental.reset_memory_stats("CPU:0")
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])
            seconds.append(time.perf_counter() - self.start)

    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=count, shuffle=False, verbose=0, epochs=1, callbacks=[Clock()])
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    gc.collect()
    held = tf.config.experimental.get_memory_info("CPU:0")["current"]
    return {"seconds": seconds[3:], "peak": peak, "held": held, "parameters": model.count_params()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 768), ("layers", 8), ("batch", 1), ("steps", 12), ("rounds", 3), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    results: dict = {stage: [] for stage in (None, *options.stages)}
    for _ in range(options.rounds):
        for stage, runs in results.items():
            arguments = (stage, options.dim, options.layers, options.batch, options.steps)
            runs.append(tfzero.run_local(run, workers=options.workers, args=arguments, timeout_seconds=600)[0])
    stock = statistics.median(s for r in results[None] for s in r["seconds"])
    for stage, runs in results.items():
        median = statistics.median(s for r in runs for s in r["seconds"])
        parameters = runs[0]["parameters"]
        row = {
            "strategy": "stock" if stage is None else f"tfzero stage {stage}",
            "parameters": parameters,
            "step_ms": round(median * 1e3, 1),
            "ratio": round(median / stock, 3),
            "held_bytes_per_parameter": round(max(r["held"] for r in runs) / parameters, 2),
            "peak_bytes_per_parameter": round(max(r["peak"] for r in runs) / parameters, 2),
            "round_medians_ms": [round(statistics.median(r["seconds"]) * 1e3) for r in runs],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
