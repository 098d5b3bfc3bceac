"""Checks tfzero on two GPUs: stages 0, 1 and 2 over NCCL must train to the weights of one GPU.

    python examples/two_gpus.py

Exits with 0 if they do, 1 if they differ, 2 if this machine has fewer than two GPUs.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import tfzero

STEPS, BATCH, FEATURES, CLASSES = 8, 30, 64, 10
LIMIT = 1e-4  # largest difference of a weight: the order of float32 additions differs


def make_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(131, activation="relu"),  # a prime: no shard is even
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def train(model: keras.Model, weights, x, y) -> list[np.ndarray]:
    """Weights after one epoch from `weights`."""
    model.set_weights(weights)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)  # Adam would magnify rounding of tiny gradients
    model.compile(optimizer=optimizer, loss="categorical_crossentropy")
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return model.get_weights()


def main() -> int:
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) < 2:
        print(f"This check needs two GPUs; TensorFlow sees {len(gpus)} here. Nothing was checked.")
        return 2
    tf.config.experimental.enable_tensor_float_32_execution(False)  # its 10 bits would hide what is compared
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS * BATCH - 7, FEATURES)).astype("float32")  # the last batch is ragged
    y = np.eye(CLASSES, dtype="float32")[random.integers(0, CLASSES, len(x))]

    with tf.device("/GPU:0"):
        model = make_model()
        initial = model.get_weights()
        expected = train(model, initial, x, y)
    wrong = 0
    for stage in (0, 1, 2):
        strategy = tfzero.ZeroStrategy(stage, devices=["GPU:0", "GPU:1"])
        with strategy.scope():
            model = make_model()
        weights = train(model, initial, x, y)
        difference = max(np.abs(a - b).max() for a, b in zip(weights, expected, strict=True))
        same = difference <= LIMIT  # also False for NaN
        print(f"stage {stage}: largest difference of a weight {difference:.1e}: {'OK' if same else 'DIFFERENT'}")
        wrong += not same
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
