"""The best weights that `EarlyStopping` keeps of a sharded model: each process keeps its own components."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfzero.checkpoint.state import components_of
from tfzero.variables.classes import ShardedVariable


class BestWeightsInParts(keras.callbacks.Callback):
    """Gives Keras's `EarlyStopping` a model whose weights are what this process holds.

    Args:
        callbacks: those of `fit`. Subclasses of `EarlyStopping` keep the model itself, as their code may need it.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        super().__init__()
        self._callbacks = [each for each in callbacks if type(each) is keras.callbacks.EarlyStopping]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if any(isinstance(variable.value, ShardedVariable) for variable in self.model.weights):
            for callback in self._callbacks:
                callback.set_model(_ModelInParts(self.model))


class _ModelInParts:
    """A model whose `get_weights` and `set_weights` handle what this process holds; all else is the model's."""

    def __init__(self, model: keras.Model) -> None:
        self.__dict__["model"] = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    def get_weights(self) -> list[np.ndarray]:
        return [component.numpy() for component in components_of(self.model.weights)]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        for component, weight in zip(components_of(self.model.weights), weights, strict=True):
            component.assign(weight)
