"""A small GPT that learns to write, letter by letter. To learn here: stage 3 and mixed precision.

    python -m tfzero.launch --workers 2 examples/gpt.py

The text is what scikit-learn tells about its data sets. Parameters lie in shards, layers compute in bfloat16, and only
16 bits of each parameter travel.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import sklearn.datasets
from keras import layers, ops

import tfzero

CONTEXT, WIDTH, HEADS, BLOCKS = 48, 96, 4, 2


def load_text() -> str:
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))


class Position(layers.Layer):
    """Adds a vector that tells where in the text a letter stands."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, x):
        return x + ops.cast(self.table, x.dtype)


def make_model(letters: int) -> keras.Model:
    tokens = keras.Input((CONTEXT,), dtype="int32")
    x = Position()(layers.Embedding(letters, WIDTH)(tokens))
    for _ in range(BLOCKS):
        normed = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normed, normed, use_causal_mask=True)
        x = x + layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(tokens, layers.Dense(letters, dtype="float32")(layers.LayerNormalization()(x)))


def write(model: keras.Model, alphabet: list, start: str, length: int) -> str:
    """Goes on with a text, always by the likeliest letter. All workers call it, as parameters lie in shards."""
    numbers = [alphabet.index(letter) for letter in start]
    for _ in range(length):
        window = np.array([numbers[-CONTEXT:]], "int32")
        numbers.append(int(model.predict(window, verbose=0)[0, -1].argmax()))
    return "".join(alphabet[number] for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=3)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    keras.config.set_dtype_policy("mixed_bfloat16")
    alphabet, numbers = np.unique(list(load_text()), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(numbers.astype("int32"), CONTEXT + 1)
    end = len(windows) * 9 // 10
    chosen = windows[np.random.default_rng(0).integers(0, end, 32 * options.steps)]  # the same on all workers
    held_out = windows[end :: CONTEXT * 4]

    with strategy.scope():
        model = make_model(len(alphabet))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(2e-3), loss, metrics=["accuracy"])
    model.fit(chosen[:, :-1], chosen[:, 1:], batch_size=32, shuffle=False, verbose=1 if is_chief else 0)

    figures = model.evaluate(held_out[:, :-1], held_out[:, 1:], batch_size=64, verbose=0, return_dict=True)
    text = write(model, list(alphabet), "This data set ".rjust(CONTEXT), 20)
    if is_chief:
        print(f"\nof held-out letters {figures['accuracy']:.1%} are foretold (loss {figures['loss']:.3f})")
        print(f"it writes: {text.strip()!r}")


if __name__ == "__main__":
    main()
