"""How a model of a ZeroStrategy gets its variables before its first step.

Keras calls a model of a distribution strategy once with symbolic inputs. This makes all variables outside replicas.
Without a strategy Keras makes no such call. So a model of several networks (an autoencoder, a GAN) may lack a `call`,
or have one that does not take the data, because its own `train_step` never calls it. Such a model is left to its step
here too: whatever is not built yet is built while the step is traced.
"""

from collections.abc import Callable

import keras

from tfzero.strategy import ZeroStrategy


def build_unless_the_step_does(build: Callable[[], object], model: keras.Model) -> None:
    """Builds a model and its optimizer by Keras's symbolic call, unless the model's own steps do without that call.

    Args:
        build: Keras's own build.
        model: a model of a `ZeroStrategy`.
    """
    if type(model).call is keras.Model.call:
        # Restoring a checkpoint needs this before the first step.
        model.built = model.built or all(layer.built for layer in model.layers)
        return
    try:
        build()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        if not _has_own_step(model):
            raise
        # On one device nothing would have called the model. If the step does, it raises the same error.


def take_in_strays(model: keras.Model, strategy: ZeroStrategy) -> None:
    """Hands a model's variables that were made outside `scope()` to its strategy: adapters, pretrained layers.

    `layer.enable_lora` makes variables after the model. All workers begin with the first worker's values.
    """
    strays = [v for v in model.variables if getattr(v.value, "distribute_strategy", None) is None]
    strategy.extended.take_in(strays)


def _has_own_step(model: keras.Model) -> bool:
    """Whether a model overrides `train_step` or `test_step`, in which Keras calls it with the data."""
    steps = (("train_step", model.train_step), ("test_step", model.test_step))
    return any(getattr(step, "__func__", None) is not getattr(keras.Model, name) for name, step in steps)
