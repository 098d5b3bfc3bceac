"""What compression does to the result: validation losses with and without it, same seeds, on text and on digits.

    python benchmarks/quality.py                # stage 2, three seeds; a character model for 2,000 steps, and digits
    python benchmarks/quality.py --stage 3 --formats int8

The text is the descriptions of scikit-learn's data sets, which it ships; the last tenth is held out. The digits are
trained as in `examples/mnist.py`, for 15 epochs. The learning rate falls to zero, so that what is left at the end is
the model's loss and not the last steps' noise. Two replicas. `nudged` is no compression: each initial weight is
changed by one part in a million, which shows how much of a difference is chance.
"""

import argparse
import json
import statistics
from pathlib import Path

import keras
import numpy as np
import sklearn.datasets
import tensorflow as tf
from keras import layers

import tfzero

CONTEXT = 64
NUDGED = "nudged"


def text() -> np.ndarray:
    """Characters as numbers from 0."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    characters = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    return np.unique(list(characters), return_inverse=True)[1].astype("int32")


def characters(seed: int, steps: int) -> tuple:
    """Training and validation data of a character model, and the function that makes it."""
    numbers = text()
    windows = np.lib.stride_tricks.sliding_window_view(numbers, CONTEXT + 1)
    end = len(windows) * 9 // 10
    chosen = np.random.default_rng(seed).integers(0, end - CONTEXT, steps * 32)
    held_out = windows[end :: CONTEXT // 2]
    size = int(numbers.max()) + 1

    def make():
        tokens = keras.Input((CONTEXT,), dtype="int32")
        x = layers.Embedding(size, 96)(tokens)
        for _ in range(2):
            x = x + layers.MultiHeadAttention(4, 24)(*[layers.LayerNormalization()(x)] * 2, use_causal_mask=True)
            x = x + layers.Dense(96)(layers.Dense(384, activation="gelu")(layers.LayerNormalization()(x)))
        x = layers.Conv1D(96, 5, padding="causal")(x)  # tells positions apart
        return keras.Model(tokens, layers.Dense(size)(layers.LayerNormalization()(x)))

    rows = windows[chosen]
    return (rows[:, :-1], rows[:, 1:]), (held_out[:, :-1], held_out[:, 1:]), make, 32


def digits(seed: int, steps: int) -> tuple:
    del steps
    data = sklearn.datasets.load_digits()
    x, y = (data.data / 16).astype("float32"), data.target
    order = np.random.default_rng(0).permutation(len(x))
    random = np.random.default_rng(seed)
    train = np.concatenate([random.permutation(order[360:]) for _ in range(15)])

    def make():
        return keras.Sequential([keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)])

    return (x[train], y[train]), (x[order[:360]], y[order[:360]]), make, 64


def validation_loss(data: tuple, seed: int, stage: int, name: str | None) -> float:
    train, held_out, make, batch = data
    keras.utils.set_random_seed(seed)
    compression = None if name == NUDGED else name
    strategy = tfzero.ZeroStrategy(stage, devices=["CPU:0", "CPU:1"], compression=compression)
    with strategy.scope():
        model = make()
    if name == NUDGED:
        random = np.random.default_rng(seed)
        model.set_weights([w * (1 + 1e-6 * random.choice([-1, 1], w.shape)) for w in model.get_weights()])
    rate = keras.optimizers.schedules.CosineDecay(1e-3, -(-len(train[0]) // batch))
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*train, batch_size=batch, shuffle=False, verbose=0)
    return model.evaluate(*held_out, batch_size=200, verbose=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--formats", nargs="+", default=[NUDGED, "bf16", "int8"])
    parser.add_argument("--data", nargs="+", choices=["characters", "digits"], default=["characters", "digits"])
    options = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    for kind in options.data:
        changes: dict = {name: [] for name in options.formats}
        for seed in options.seeds:
            data = {"characters": characters, "digits": digits}[kind](seed, options.steps)
            plain = validation_loss(data, seed, options.stage, None)
            for name in options.formats:
                loss = validation_loss(data, seed, options.stage, name)
                changes[name].append(loss / plain - 1)
                row = {"data": kind, "stage": options.stage, "seed": seed, "format": name, "loss": loss, "plain": plain}
                print(json.dumps({**row, "change_percent": round(100 * (loss / plain - 1), 3)}), flush=True)
        for name, found in changes.items():
            print(f"{kind}, {name}: {100 * statistics.mean(found):+.3f} % on average", flush=True)


if __name__ == "__main__":
    main()
