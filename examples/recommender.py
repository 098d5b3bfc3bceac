"""A recommender of words for documents. To learn here: large embeddings, whose gradients are sparse.

    python -m tfzero.launch --workers 2 examples/recommender.py

Documents are the paragraphs of scikit-learn's descriptions of its data sets, and a document "likes" the words in it.
Each batch touches few rows of the two tables; their slots lie in shards all the same. With stage 3 the tables do too,
so that tables of which one device holds no more than a part can be trained.
"""

import argparse
import re
from pathlib import Path

import keras
import numpy as np
import sklearn.datasets
from keras import layers, ops

import tfzero

WIDTH = 32


def load():
    """Pairs of document and word `[pairs, 2]`, and the number of documents and of words."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    texts = [path.read_text(encoding="utf-8").lower() for path in sorted(folder.glob("*.rst"))]
    documents = [re.findall("[a-z]{4,}", part) for text in texts for part in text.split("\n\n")]
    documents = [words for words in documents if len(words) >= 8]
    vocabulary = {word: k for k, word in enumerate(sorted({word for words in documents for word in words}))}
    pairs = {(k, vocabulary[word]) for k, words in enumerate(documents) for word in words}
    return np.array(sorted(pairs), "int32"), len(documents), len(vocabulary)


def with_strangers(pairs: np.ndarray, words: int, random: np.random.Generator):
    """Each pair once as it is, liked, and once with a word at random, which is taken for not liked."""
    strange = np.stack([pairs[:, 0], random.integers(0, words, len(pairs))], 1)
    x = np.concatenate([pairs, strange]).astype("int32")
    return (x[:, 0], x[:, 1]), np.repeat([1.0, 0.0], len(pairs)).astype("float32")


def make_model(documents: int, words: int) -> keras.Model:
    document, word = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    taste = layers.Embedding(documents, WIDTH, name="documents")(document)
    character = layers.Embedding(words, WIDTH, name="words")(word)
    fame = layers.Embedding(words, 1, name="fame")(word)
    score = ops.sum(taste * character, -1) + ops.squeeze(fame, -1)
    return keras.Model([document, word], ops.sigmoid(score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=options.stage)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    pairs, documents, words = load()
    random = np.random.default_rng(0)  # the same on every worker
    random.shuffle(pairs)
    held_out, training = pairs[: len(pairs) // 10], pairs[len(pairs) // 10 :]
    with strategy.scope():
        model = make_model(documents, words)
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    x, y = with_strangers(training, words, random)
    model.fit(x, y, batch_size=256, epochs=options.epochs, verbose=2 if is_chief else 0)
    x, y = with_strangers(held_out, words, random)
    auc = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)["auc"]
    if is_chief:
        print(f"\na liked word is told from a strange one in {auc:.1%} of the cases (AUC)")


if __name__ == "__main__":
    main()
