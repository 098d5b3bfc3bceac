"""Trains small models at every stage and on one device, and compares where they end.

The optimizer is SGD with momentum, as Adam magnifies the rounding of tiny gradients. Most sizes are primes, and the
trailing batch is ragged, so that variables and rows seldom divide by the number of replicas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tfzero.plan.scheme import STAGES
from tfzero.strategy import ZeroStrategy

# The largest difference of a weight that the order of float32 additions explains.
LIMIT = 1e-4
_STEPS, _CLASSES = 4, 10
_MIN_SHARD_ELEMENTS = 64  # so that nearly all variables of such small models are sharded


@dataclass(frozen=True)
class Trial:
    """One model at one stage.

    Args:
        model: its name.
        stage: the ZeRO stage.
        largest: the largest difference of a weight from one device.
        variable: the weight with this difference.
    """

    model: str
    stage: int
    largest: float
    variable: str

    @property
    def is_right(self) -> bool:
        return self.largest <= LIMIT  # not NaN


def _dense() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([keras.Input((64,)), layers.Dense(131, "relu"), layers.Dense(_CLASSES, "softmax")])


def _convolutional() -> keras.Model:
    layers = keras.layers
    convolution, normalization = layers.Conv2D(13, 3, use_bias=False), layers.BatchNormalization(synchronized=True)
    stack = [convolution, normalization, layers.ReLU(), layers.MaxPooling2D(2)]
    return keras.Sequential([keras.Input((13, 13, 3)), *stack, layers.Flatten(), layers.Dense(_CLASSES, "softmax")])


def _recurrent() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([keras.Input((7, 11)), layers.LSTM(23), layers.Dense(_CLASSES, "softmax")])


def _attention() -> keras.Model:
    layers = keras.layers
    inputs = keras.Input((11, 16))
    x = inputs + layers.MultiHeadAttention(2, 8)(*2 * (layers.LayerNormalization()(inputs),), use_causal_mask=True)
    x = layers.Dense(37, "gelu")(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(_CLASSES, "softmax")(layers.GlobalAveragePooling1D()(x)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dense": _dense, "convolutional": _convolutional, "recurrent": _recurrent, "attention": _attention,
}  # fmt: skip


def run_trials(
    names: Sequence[str], devices: Sequence[str], replicas: int, on_stage: Callable[[str, int], object]
) -> list[Trial]:
    """Trains models on all replicas, and on the first device of each worker. All workers call it together.

    Args:
        names: keys of `MODELS`.
        devices: this worker's, for `ZeroStrategy`.
        replicas: number of replicas.
        on_stage: called with name and stage before each training.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)  # its 10 bits would hide differences
    trials = []
    for name in names:
        x, y, batch_size = _data(MODELS[name], replicas)
        with tf.device(f"/device:{devices[0]}"):
            alone = MODELS[name]()
            initial = initial_weights(alone)
            expected = _trained(alone, initial, x, y, batch_size)
        paths = [weight.path for weight in alone.weights]
        for stage in STAGES:
            on_stage(name, stage)
            strategy = ZeroStrategy(stage, devices=list(devices), min_shard_elements=_MIN_SHARD_ELEMENTS)
            with strategy.scope():
                model = MODELS[name]()
            trials.append(_compared(name, stage, paths, _trained(model, initial, x, y, batch_size), expected))
    return trials


def _data(make_model: Callable[[], keras.Model], replicas: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Samples, the same on all workers, and the batch size, which leaves a smaller trailing batch."""
    with tf.Graph().as_default():
        shape = make_model().input_shape[1:]
    batch_size = 30 if replicas < 16 else 2 * replicas - 1
    random = np.random.default_rng(0)
    x = random.normal(size=(_STEPS * batch_size - 7, *shape)).astype("float32")
    return x, np.eye(_CLASSES, dtype="float32")[random.integers(0, _CLASSES, len(x))], batch_size


def initial_weights(model: keras.Model) -> list[np.ndarray]:
    """Initial weights, the same on all workers whatever each one's model begins with."""
    random = np.random.default_rng(1)
    return [
        random.normal(0, 1 / math.sqrt(np.prod(weight.shape[:-1])), weight.shape).astype(weight.dtype)
        if len(weight.shape) > 1 and weight.dtype == "float32"
        else np.array(weight)
        for weight in model.weights
    ]


def _trained(
    model: keras.Model, initial: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    model.set_weights(initial)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    # Keras leaves XLA out under a strategy, so one device must use the same kernels.
    model.compile(optimizer, "categorical_crossentropy", jit_compile=False)
    model.fit(x, y, batch_size=batch_size, epochs=1, shuffle=False, verbose=0)
    return model.get_weights()


def _compared(name: str, stage: int, paths: Sequence[str], mine: Sequence, theirs: Sequence) -> Trial:
    gaps = [
        float(np.max(np.abs(ours.astype("float64") - other), initial=0.0))
        for ours, other in zip(mine, theirs, strict=True)
        if ours.dtype.kind == "f"
    ]
    paths = [path for path, ours in zip(paths, mine, strict=True) if ours.dtype.kind == "f"]
    worst = int(np.argmax(gaps))  # the first NaN, if there is one
    return Trial(name, stage, gaps[worst], paths[worst])
