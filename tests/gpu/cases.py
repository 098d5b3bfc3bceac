"""What two workers and plain Keras on one CPU train: models, optimizers, policies, and how near they must end.

Imported where TensorFlow has been told already which devices there are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

from tfzero.views.trials import initial_weights

CLASSES, BATCH, EPOCHS = 5, 15, 2
# 53 samples: the last batch has 8 of 15. 46: it has one, and of two replicas one is left without.
RAGGED, ONE_LEFT = 53, 46
NARROW_LIMITS = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Args:
        name: in the table.
        make_model: makes it.
        make_optimizer: makes its optimizer.
        stages: of ZeRO at which workers train it.
        limit: of the largest difference of a weight.
        samples: how many there are.
        policy: of Keras's dtypes.
        steps_per_execution: as of `compile`.
    """

    name: str
    make_model: Callable[[], keras.Model]
    make_optimizer: Callable[[], keras.optimizers.Optimizer]
    stages: tuple[int, ...] = (2, 3)
    limit: float = 1e-4
    samples: int = RAGGED
    policy: str = "float32"
    steps_per_execution: int = 1


def dense() -> keras.Model:
    return keras.Sequential([keras.Input((19,)), layers.Dense(67, "relu"), layers.Dense(31, "tanh"), head()])


def head() -> layers.Layer:
    """The probabilities, in float32 whatever the policy."""
    return layers.Dense(CLASSES, "softmax", dtype="float32")


def transformer() -> keras.Model:
    inputs = keras.Input((13, 19))
    x = layers.Dense(24)(inputs)  # not an embedding, of which plain Keras squares rows that it has not added up
    for _ in range(2):
        normed = layers.LayerNormalization()(x)
        # Without the keys' bias, whose gradient is nothing but rounding, which Adam would magnify.
        x = x + layers.MultiHeadAttention(3, 8, use_bias=False)(normed, normed, use_causal_mask=True)
        x = x + layers.Dense(24)(layers.Dense(48, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, head()(layers.GlobalAveragePooling1D()(x)))


def normalized() -> keras.Model:
    stack = [layers.Dense(67), layers.BatchNormalization(synchronized=True), layers.ReLU(), head()]
    return keras.Sequential([keras.Input((19,)), *stack])


def recurrent() -> keras.Model:
    return keras.Sequential([keras.Input((7, 11)), layers.LSTM(23, return_sequences=True), layers.GRU(13), head()])


def convolutional() -> keras.Model:
    normalization = layers.BatchNormalization(synchronized=True)
    stack = [layers.Conv2D(17, 3, use_bias=False), normalization, layers.ReLU(), layers.MaxPooling2D(2)]
    return keras.Sequential([keras.Input((12, 12, 3)), *stack, layers.Conv2D(13, 3), layers.Flatten(), head()])


def embedding() -> keras.Model:
    tokens = keras.Input((13,), dtype="int32")
    return keras.Model(tokens, head()(layers.GlobalAveragePooling1D()(layers.Embedding(29, 41)(tokens))))


def with_lora() -> keras.Model:
    model = dense()
    model.layers[0].enable_lora(4)
    return model


class TwoLosses(keras.Model):
    """Two ways through it, and a penalty by `add_loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = [layers.Dense(67, activation) for activation in ("relu", "tanh")]
        self.last = head()

    def build(self, input_shape):
        for way in self.ways:
            way.build(input_shape)
        self.last.build((None, 2 * 67))
        self.built = True

    def call(self, x):
        wide = layers.concatenate([way(x) for way in self.ways])
        self.add_loss(1e-3 * ops.mean(ops.square(wide)))
        return self.last(wide)


def two_losses() -> keras.Model:
    model = TwoLosses()
    model.build((None, 19))
    return model


SGD = lambda: keras.optimizers.SGD(0.1, momentum=0.9)  # noqa: E731
CASES = (
    Case("dense, SGD", dense, SGD, stages=(0, 1, 2, 3)),
    Case("Adam, clipped globally", dense, lambda: keras.optimizers.Adam(1e-3, global_clipnorm=0.1), (1, 2, 3)),
    Case("transformer, AdamW", transformer, lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.01)),
    Case(
        "accumulation and EMA",
        dense,
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2, use_ema=True),
        (1, 2, 3),
    ),
    Case("synchronized BatchNormalization", normalized, SGD),
    Case("LSTM and GRU", recurrent, SGD),
    Case("LSTM and GRU, a replica without rows", recurrent, SGD, samples=ONE_LEFT),
    # In small steps, as maxima magnify rounding.
    Case("convolutional", convolutional, lambda: keras.optimizers.SGD(0.01, momentum=0.9)),
    Case(
        "convolutional, a replica without rows",
        convolutional,
        lambda: keras.optimizers.SGD(0.01, momentum=0.9),
        samples=ONE_LEFT,
    ),
    Case("embedding, sparse gradients", embedding, SGD),
    Case("LoRA", with_lora, SGD),
    Case("two losses", two_losses, SGD),
    Case("several steps an execution", dense, SGD, steps_per_execution=2),
    Case("float16, loss scale", dense, SGD, limit=NARROW_LIMITS["mixed_float16"], policy="mixed_float16"),
    Case("bfloat16", transformer, SGD, limit=NARROW_LIMITS["mixed_bfloat16"], policy="mixed_bfloat16"),
    Case("Muon", dense, lambda: keras.optimizers.Muon(1e-2, exclude_layers=["softmax"]), limit=1e-3),
)  # fmt: skip


def named(pattern: str) -> list[Case]:
    return [case for case in CASES if pattern.lower() in case.name.lower()]


def batches_of(case: Case, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """The samples of a case, the same in every process."""
    shape = (case.samples, 19) if not getattr(model, "inputs", None) else (case.samples, *model.inputs[0].shape[1:])
    tokens = bool(getattr(model, "inputs", None)) and model.inputs[0].dtype == "int32"
    random = np.random.default_rng(0)
    x = random.integers(0, 29, shape).astype("int32") if tokens else random.normal(size=shape).astype("float32")
    return x, np.eye(CLASSES, dtype="float32")[random.integers(0, CLASSES, case.samples)]


def trained(case: Case, scope) -> tuple[keras.Model, list[np.ndarray]]:
    """A model of a case and its weights after training, under a strategy's scope or none."""
    keras.config.set_dtype_policy(case.policy)
    try:
        with scope:
            model = case.make_model()
            optimizer = case.make_optimizer()
            if case.policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
        model.set_weights(initial_weights(model))
        x, y = batches_of(case, model)
        arguments = {"jit_compile": False, "steps_per_execution": case.steps_per_execution}
        model.compile(optimizer, "categorical_crossentropy", **arguments)
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
        return model, model.get_weights()
    finally:
        keras.config.set_dtype_policy("float32")


# Memory.

MEMORY_ROWS = 64  # of each replica


def wide() -> keras.Model:
    """So large that nothing else is to be seen: 8 million parameters without biases."""
    stack = [layers.Dense(1024, activation="relu", use_bias=False) for _ in range(8)]
    return keras.Sequential([keras.Input((1024,)), *stack])


def runs(cases) -> Iterator[tuple[Case, int]]:
    yield from ((case, stage) for case in cases for stage in case.stages)
