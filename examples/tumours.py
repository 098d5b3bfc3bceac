"""Tumours, benign or malignant, by measurements under the microscope. To learn here: stop, and go on with more workers.

    python -m tfzero.launch --workers 1 examples/tumours.py --directory run --epochs 4      # and then
    python -m tfzero.launch --workers 2 examples/tumours.py --directory run --epochs 10

Each run goes on from the newest checkpoint in the directory, wherever the one before it stopped, on any number of
workers: interrupt it and see. Steps and data are those of a run that was never stopped, and so is the result.
"""

import argparse

import keras
import numpy as np
import sklearn.datasets
from keras import layers

import tfzero


def load():
    """Training and held-out measurements `[samples, 30]`, and whether each is benign `[samples]`."""
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))  # the same split on every worker
    held_out, rest = order[:120], order[120:]
    x = ((x - x[rest].mean(0)) / x[rest].std(0)).astype("float32")
    return (x[rest], y[rest]), (x[held_out], y[held_out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="of checkpoints; all workers must see it")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    keras.utils.set_random_seed(1)  # from which the data are shuffled
    training, held_out = load()
    with strategy.scope():
        hidden = [layers.Dense(64, activation="relu"), layers.Dense(64, activation="relu")]
        model = keras.Sequential([keras.Input((30,)), *hidden, layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    checkpoints = tfzero.CheckpointCallback(options.directory, save_every_steps=5)
    model.fit(*training, batch_size=32, epochs=options.epochs, callbacks=[checkpoints], verbose=2 if is_chief else 0)
    figures = model.evaluate(*held_out, batch_size=32, verbose=0, return_dict=True)
    if is_chief:
        steps, replicas = int(model.optimizer.iterations), strategy.num_replicas_in_sync
        print(f"\nafter {steps} steps, the last on {replicas} replicas: {figures['accuracy']:.1%} are told apart")
        print(f"held-out loss {figures['loss']:.5f}")


if __name__ == "__main__":
    main()
