"""What is said of an optimizer, also when it holds an object of the user's own that Keras cannot write down."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from keras import optimizers

_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))


def config_of(optimizer: optimizers.Optimizer) -> dict:
    """An optimizer's `get_config`; a learning rate that has none stands in it as the object that it is.

    Keras asks a schedule for `get_config` only when it saves a model, so many a schedule has none.
    """
    try:
        return optimizer.get_config()
    except (NotImplementedError, TypeError, ValueError):
        learning_rate = optimizer.__dict__.get("_learning_rate")
        if not callable(learning_rate):
            raise
        # Without it the rest can be asked for, of a subclass too.
        optimizer.__dict__["_learning_rate"] = None
        try:
            return optimizer.get_config() | {"learning_rate": learning_rate}
        finally:
            optimizer.__dict__["_learning_rate"] = learning_rate


def describe(thing, depth: int = 4) -> str:
    """A text that is the same in every process for objects of a class with the same attributes; no addresses."""
    if isinstance(thing, _PLAIN):
        return repr(thing)
    if isinstance(thing, np.ndarray | tf.Tensor | tf.Variable):
        return str(thing.tolist() if isinstance(thing, np.ndarray) else thing.numpy().tolist())
    if hasattr(thing, "__qualname__"):  # a function or a class
        return thing.__qualname__
    name = type(thing).__qualname__
    if depth == 0:
        return name
    if isinstance(thing, list | tuple):
        return f"[{', '.join(describe(value, depth - 1) for value in thing)}]"
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{key}: {describe(value, depth - 1)}' for key, value in thing.items())}}}"
    attributes = (f"{key}={describe(value, depth - 1)}" for key, value in getattr(thing, "__dict__", {}).items())
    return f"{name}({', '.join(attributes)})"
