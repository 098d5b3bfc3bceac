"""Convolutions on images, with BatchNormalization. To learn here: what its statistics do on several replicas.

    python -m tfzero.launch --workers 2 examples/images.py

Handwritten digits that scikit-learn ships, moved about by a random layer that draws other moves on each replica.
`synchronized=True` normalises by the mean of the whole batch, so the result is that of one device; without it each
replica normalises by its own part, as everywhere, and only the moving averages are the same.
"""

import argparse

import keras
import numpy as np
import sklearn.datasets
from keras import layers

import tfzero


def load():
    """Training and held-out images `[samples, 8, 8, 1]` in 0..1, with labels `[samples]`."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))  # the same split on every worker
    held_out, rest = order[:360], order[360:]
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


def make_model() -> keras.Model:
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.RandomTranslation(0.1, 0.1)])
    for filters in (32, 64):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9, synchronized=True))
        model.add(layers.Activation("relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(10, activation="softmax"))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    training, held_out = load()
    with strategy.scope():
        model = make_model()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*training, batch_size=64, epochs=options.epochs, verbose=2 if is_chief else 0)
    accuracy = model.evaluate(*held_out, batch_size=64, verbose=0, return_dict=True)["accuracy"]
    if is_chief:
        print(f"\n{accuracy:.1%} of the held-out digits are recognised")


if __name__ == "__main__":
    main()
