"""The classic listing: a 784-128-10 network on handwritten digits, trained with sharded optimizer state.

    python -m tfzero.launch --workers 2 examples/mnist.py                    # scikit-learn's 8x8 digits: 64-128-10
    python -m tfzero.launch --workers 2 examples/mnist.py --data mnist       # downloads MNIST

Exits with 1 if less than 95 % of the held-out digits are recognised.
"""

import argparse
import math
import sys

import keras
import numpy as np

import tfzero


def load(name: str, worker: int):
    """Training and held-out images `[samples, pixels]` in 0..1, with labels `[samples, 10]`, one-hot."""
    if name == "mnist":
        # A file for each worker: those of one machine would write the same one at the same time.
        (x, y), (x_test, y_test) = keras.datasets.mnist.load_data(path=f"mnist_{worker}.npz")
        x, x_test = (images.reshape(len(images), -1) / 255 for images in (x, x_test))
    else:
        import sklearn.datasets  # not needed for MNIST

        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))  # the same split on every worker
        held_out, rest = order[:360], order[360:]
        x, y, x_test, y_test = images[rest] / 16, labels[rest], images[held_out] / 16, labels[held_out]
    x, x_test = x.astype("float32"), x_test.astype("float32")
    return (x, keras.utils.to_categorical(y, 10)), (x_test, keras.utils.to_categorical(y_test, 10))


def held_and_whole_bytes(variables) -> tuple[int, int]:
    """Bytes of this worker's first replica, and of a replica that holds every variable whole."""
    held = sum(math.prod(v.value.values[0].shape) * v.value.dtype.size for v in variables)
    return held, sum(math.prod(v.value.shape) * v.value.dtype.size for v in variables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="by default 15 for digits, 5 for mnist")
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=options.stage)  # before anything else of TensorFlow
    worker = strategy.cluster_resolver.task_id if strategy.cluster_resolver else 0
    is_chief = strategy.extended.should_checkpoint
    (x, y), held_out = load(options.data, worker)

    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((x.shape[1],)),
                keras.layers.Dense(128, activation="relu"),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    epochs = options.epochs or {"digits": 15, "mnist": 5}[options.data]
    model.fit(x, y, batch_size=64, epochs=epochs, validation_data=held_out, verbose=2 if is_chief else 0)
    accuracy = model.evaluate(*held_out, batch_size=64, verbose=0, return_dict=True)["accuracy"]

    if is_chief:
        replicas = strategy.num_replicas_in_sync
        print(f"\nstage {options.stage}, {replicas} replicas: {accuracy:.2%} of {len(held_out[0])} held-out digits")
        for name, variables in (("parameters", model.variables), ("optimizer slots", model.optimizer.variables)):
            held, whole = held_and_whole_bytes(variables)
            print(f"{name:16}{held:>9,} bytes on each replica; {whole:>9,} if replicated")
    return 0 if accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
