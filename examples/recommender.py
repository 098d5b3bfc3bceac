"""A recommender of words for source files. To learn here: large embeddings, whose gradients are sparse.

    python -m tfzero.launch --workers 2 examples/recommender.py

The files are scikit-learn's own, and a file "likes" the words in it. Each batch touches few rows of the two tables;
their slots lie in shards all the same. With `--stage 3` the tables do too, so that tables of which one device holds no
more than a part can be trained.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import sklearn
from keras import layers, ops

import tfzero

WIDTH = 32


def load():
    """Pairs of file and word `[pairs, 2]`, and the number of files and of words."""
    paths = sorted(Path(sklearn.__file__).parent.rglob("*.py"))
    files = [sorted(set(re.findall("[a-z]{4,}", path.read_text(encoding="utf-8").lower()))) for path in paths]
    files = [words for words in files if len(words) >= 50]
    counts = Counter(word for words in files for word in words)
    numbers = {word: k for k, word in enumerate(sorted(word for word, count in counts.items() if count >= 3))}
    pairs = [(k, numbers[word]) for k, words in enumerate(files) for word in words if word in numbers]
    return np.array(pairs, "int32"), len(files), len(numbers)


def with_strangers(pairs: np.ndarray, words: int, random: np.random.Generator):
    """Each pair once as it is, liked, and once with a word at random, which is taken for not liked."""
    strange = np.stack([pairs[:, 0], random.integers(0, words, len(pairs))], 1)
    x = np.concatenate([pairs, strange]).astype("int32")
    return (x[:, 0], x[:, 1]), np.repeat([1.0, 0.0], len(pairs)).astype("float32")


def make_model(files: int, words: int) -> keras.Model:
    file, word = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    taste = layers.Embedding(files, WIDTH, name="files")(file)
    character = layers.Embedding(words, WIDTH, name="words")(word)
    fame = layers.Embedding(words, 1, name="fame")(word)
    score = ops.sum(taste * character, -1) + ops.squeeze(fame, -1)
    return keras.Model([file, word], ops.sigmoid(score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=options.stage)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    pairs, files, words = load()
    random = np.random.default_rng(0)  # the same on every worker
    random.shuffle(pairs)
    held_out, training = pairs[: len(pairs) // 10], pairs[len(pairs) // 10 :]
    with strategy.scope():
        model = make_model(files, words)
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    x, y = with_strangers(training, words, random)
    model.fit(x, y, batch_size=1024, epochs=options.epochs, verbose=2 if is_chief else 0)
    x, y = with_strangers(held_out, words, random)
    auc = model.evaluate(x, y, batch_size=1024, verbose=0, return_dict=True)["auc"]
    if is_chief:
        print(f"\na liked word is told from a strange one in {auc:.1%} of the cases (AUC)")


if __name__ == "__main__":
    main()
