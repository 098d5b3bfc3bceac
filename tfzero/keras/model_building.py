"""How a model of a ZeroStrategy comes to its variables before its first step.

Keras calls a model of a distribution strategy once with symbolic inputs, which makes all variables outside replicas.
Without a strategy it does not: a model of several networks (an autoencoder, a GAN) then needs no `call`, or one that
takes something else than the data, as its own `train_step` never calls it. Such a model is left to its step here too:
what is not built yet is built while the step is traced.
"""

from collections.abc import Callable

import keras

from tfzero.strategy import ZeroStrategy


def build_unless_the_step_does(build: Callable[[], object], model: keras.Model) -> None:
    """Builds a model and its optimizer by Keras's symbolic call, if that is what its steps will call.

    Args:
        build: Keras's own building.
        model: a model of a `ZeroStrategy`.
    """
    if type(model).call is keras.Model.call:
        # What restores a checkpoint asks for this before the first step.
        model.built = model.built or all(layer.built for layer in model.layers)
        return
    try:
        build()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        if not _has_own_step(model):
            raise
        # On one device nobody would have called it; if the step calls it, the same error comes from there.


def take_in_strays(model: keras.Model, strategy: ZeroStrategy) -> None:
    """Makes a model's variables that were made outside `scope()` its strategy's: adapters, pretrained layers.

    `layer.enable_lora` makes variables after the model. All workers begin with the first one's values.
    """
    strays = [v for v in model.variables if getattr(v.value, "distribute_strategy", None) is None]
    strategy.extended.take_in(strays)


def _has_own_step(model: keras.Model) -> bool:
    """Whether a model overrides one of the steps in which Keras calls it with the data."""
    steps = (("train_step", model.train_step), ("test_step", model.test_step))
    return any(getattr(step, "__func__", None) is not getattr(keras.Model, name) for name, step in steps)
