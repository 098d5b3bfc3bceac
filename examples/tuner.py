"""Which network tells tumours apart best, by KerasTuner. To learn here: a search whose trials train on all replicas.

    python -m tfzero.launch --workers 2 examples/tuner.py --directory search

All workers run each trial together. Each worker has an oracle of its own, and with the same `seed` and the same scores
all oracles choose the same trials. Started again, the search goes on. Needs `pip install -e ".[examples,hub]"`.
"""

import argparse

import keras
import keras_tuner
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


def build(hp: keras_tuner.HyperParameters) -> keras.Model:
    keras.utils.set_random_seed(1)
    hidden = [layers.Dense(hp.Int("units", 16, 64, step=16), activation="relu") for _ in range(hp.Int("depth", 1, 2))]
    model = keras.Sequential([keras.Input((30,)), *hidden, layers.Dense(1, activation="sigmoid")])
    rate = hp.Float("rate", 1e-4, 1e-1, sampling="log")
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, help="of the search; all workers must see it")
    parser.add_argument("--trials", type=int, default=4)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    training, held_out = load()
    tuner = keras_tuner.RandomSearch(
        build, objective="val_loss", max_trials=options.trials, seed=1, directory=options.directory,
        project_name="tumours", distribution_strategy=strategy,
    )  # fmt: skip
    tuner.search(*training, validation_data=held_out, batch_size=32, epochs=3, verbose=0)
    (best,) = tuner.get_best_models()
    figures = best.evaluate(*held_out, batch_size=32, verbose=0, return_dict=True)
    if is_chief:
        print(f"\nthe best of {options.trials}: {tuner.get_best_hyperparameters()[0].values}")
        print(f"{figures['accuracy']:.1%} are told apart")


if __name__ == "__main__":
    main()
