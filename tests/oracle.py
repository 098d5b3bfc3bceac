"""The oracle of all tests: plain Keras on one device with the same global batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np

import tfzero


@dataclass(frozen=True)
class Data:
    """A small classification problem whose samples differ: `samples` rows of `features`, `classes` one-hot targets."""

    samples: int = 46
    features: int = 8
    classes: int = 3
    seed: int = 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(self.seed)
        x = random.normal(size=(self.samples, self.features)).astype("float32")
        labels = random.integers(0, self.classes, self.samples)
        return x, np.eye(self.classes, dtype="float32")[labels]


def dense_model() -> keras.Model:
    """Two layers with awkward sizes: 17 units, so that no shard is even."""
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(17, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    )


@dataclass
class Outcome:
    """What a run leaves: final weights, history, per-batch losses, evaluation and predictions."""

    weights: list
    history: dict
    batch_losses: list = field(default_factory=list)
    evaluation: dict = field(default_factory=dict)
    predictions: np.ndarray = field(default_factory=lambda: np.zeros(0))


def train(model: keras.Model, x, y, compile_arguments: dict, *, only_fit=False, **fit_arguments) -> Outcome:
    """Compiles and fits a model, evaluates and predicts unless told `only_fit`, and notes what came of it.

    Three epochs of 15 samples a batch unless told.

    On one device without `jit_compile`: it makes no difference to the result and saves a second for each model.
    """
    losses: list[float] = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"])))
    callbacks = [note, *fit_arguments.pop("callbacks", [])]
    if not isinstance(model.distribute_strategy, tfzero.ZeroStrategy):
        compile_arguments = {"jit_compile": False} | compile_arguments
    model.compile(**compile_arguments)
    arguments = {"batch_size": 15, "epochs": 3, "verbose": 0, "shuffle": False} | fit_arguments
    history = model.fit(x, y, callbacks=callbacks, **arguments).history
    outcome = Outcome(
        weights=[np.array(w) for w in model.get_weights()],
        history={name: np.array(values) for name, values in history.items()},
        batch_losses=losses,
    )
    if not only_fit:
        after = {"batch_size": arguments["batch_size"], "verbose": 0}
        outcome.evaluation = model.evaluate(x, y, return_dict=True, **after)
        outcome.predictions = model.predict(x, **after)
    return outcome


def train_both(strategy, make_model: Callable, make_compile_arguments: Callable, data: Data, **fit_arguments):
    """The same training under a strategy and on one device, from the same initial weights.

    Args:
        strategy: a ZeroStrategy; the model is made under its scope and compiled outside.
        make_model: makes a model; called twice.
        make_compile_arguments: makes fresh arguments of `compile`; called twice.
        data: the samples.
        **fit_arguments: of `fit`.

    Returns:
        Two Outcomes: under the strategy, on one device.
    """
    x, y = data.arrays()
    with strategy.scope():
        model = make_model()
    initial = model.get_weights()
    ours = train(model, x, y, make_compile_arguments(), **fit_arguments)
    reference = make_model()
    reference.set_weights(initial)
    return ours, train(reference, x, y, make_compile_arguments(), **fit_arguments)


def assert_same(ours: Outcome, one_device: Outcome, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Weights, history, logs of every batch, evaluation and predictions equal those of one device."""
    for mine, theirs in zip(ours.weights, one_device.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)
    assert list(ours.history) == list(one_device.history)
    for name, values in ours.history.items():
        np.testing.assert_allclose(values, one_device.history[name], rtol=rtol, atol=atol, err_msg=name)
    np.testing.assert_allclose(ours.batch_losses, one_device.batch_losses, rtol=rtol, atol=atol)
    np.testing.assert_allclose(
        list(ours.evaluation.values()), list(one_device.evaluation.values()), rtol=rtol, atol=atol
    )
    np.testing.assert_allclose(ours.predictions, one_device.predictions, rtol=rtol, atol=atol)
