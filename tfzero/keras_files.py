"""Keras's own files under a ZeroStrategy: all workers take part, one writes.

Reading a sharded variable gathers it, so every worker walks over the model as Keras's saving does, variable by
variable, but only the first of those that name a path writes there. The files are ordinary ones, for plain Keras too.
"""

import contextlib
from pathlib import Path

import keras
import numpy as np

from tfzero import _compat
from tfzero.keras_hooks import patch, strategy_of
from tfzero.optimizer import ZeroOptimizer
from tfzero.progress import progress
from tfzero.variables import ShardedVariable

_SAVING_SECONDS = 3600.0  # for the others to wait for the one that writes


class _Discarded(_compat.saving_lib.H5IOStore):
    """Takes what Keras would write, one variable after the other, and drops it."""

    def __init__(self) -> None:
        pass

    def __bool__(self) -> bool:
        return True

    def make(self, path, metadata=None):
        return self

    def __setitem__(self, key, value) -> None:
        np.asarray(value)

    def close(self) -> None:
        pass


def _save_together(original, model, filepath, *args, **kwargs):
    strategy = strategy_of(model)
    if strategy is None:
        return original(model, filepath, *args, **kwargs)
    path = str(Path(filepath).absolute())
    index = strategy.extended.seats.worker
    writer = strategy.channel.all_gather("saving a model", path).index(path)
    with _gathers_shown(strategy, model):
        if writer == index:
            result = original(model, filepath, *args, **kwargs)
        else:
            _compat.saving_lib._save_state(model, _Discarded(), None, "", set())
            result = None
    strategy.channel.all_gather("a model is saved", None, _SAVING_SECONDS)
    return result


@contextlib.contextmanager
def _gathers_shown(strategy, model: keras.Model):
    """Shows how many of the variables that lie in parts have been gathered."""
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer else [])]
    count = sum(isinstance(variable.value, ShardedVariable) for variable in variables)
    shown = count > 0 and strategy.extended.seats.worker == 0
    with progress("gathering", count, unit="variables", shown=shown) as bar:
        former, strategy.extended.after_gathering = strategy.extended.after_gathering, bar.advance
        try:
            yield
        finally:
            strategy.extended.after_gathering = former


patch(_compat.saving_lib, "save_model")(_save_together)
patch(_compat.saving_lib, "save_weights_only")(_save_together)


@patch(_compat.saving_lib, "is_memory_sufficient")
def _is_memory_sufficient(original, model):
    """Lets a model's file be put together on the disk; Keras does it in memory where it fits."""
    return strategy_of(model) is None and original(model)


@patch(_compat.legacy_h5_format, "save_model_to_hdf5")
def _save_model_to_hdf5(original, model, filepath, *args, **kwargs):
    strategy = strategy_of(model)
    if strategy is not None and strategy.extended.seats.workers > 1:
        raise ValueError(
            f"Several workers cannot save in the legacy HDF5 format. Save as `.keras`. Received: {filepath}"
        )
    return original(model, filepath, *args, **kwargs)


# Files that were written before the optimizer had a registered name call it so.
keras.saving.get_custom_objects()["ZeroOptimizer"] = ZeroOptimizer


# Callbacks that handle files themselves.


@patch(keras.callbacks.ModelCheckpoint, "_save_model")
def _save_model_checkpoint(original, self, epoch, batch, logs):
    if strategy_of(self.model) is not None:
        # Keras's own check and `makedirs` fail if another worker is as fast.
        Path(self._get_file_path(epoch, batch, logs)).parent.mkdir(parents=True, exist_ok=True)
    return original(self, epoch, batch, logs)


@patch(keras.callbacks.BackupAndRestore, "_save_model")
def _save_backup(original, self):
    if _is_chief(self.model):
        return original(self)
    return self.model.save_weights(self._weights_path, overwrite=True)


@patch(keras.callbacks.BackupAndRestore, "on_train_end")
def _end_backups(original, self, logs=None):
    if _is_chief(self.model):
        original(self, logs)
    if (strategy := strategy_of(self.model)) is not None:
        strategy.channel.all_gather("deleting the backup", None)


def _is_chief(model) -> bool:
    strategy = strategy_of(model)
    return strategy is None or strategy.extended.seats.worker == 0


# Best weights: every replica keeps its own part.


class LocalWeights:
    """A copy of what this process holds of a model's variables."""

    def __init__(self, model: keras.Model) -> None:
        self._copies = [component.numpy() for component in _components(model)]

    def restore(self, model: keras.Model) -> None:
        for component, copy in zip(_components(model), self._copies, strict=True):
            component.assign(copy)


def _components(model: keras.Model) -> list:
    return [component for variable in model.weights for component in variable.value.values]


@patch(keras.callbacks.EarlyStopping, "on_epoch_end")
def _look_for_best(original, self, epoch, logs=None):
    if strategy_of(self.model) is None or not self.restore_best_weights:
        return original(self, epoch, logs)
    self.restore_best_weights = False
    try:
        original(self, epoch, logs)
    finally:
        self.restore_best_weights = True
    counts = epoch >= self.start_from_epoch and self.monitor in (logs or {})
    if counts and (self.best_epoch == epoch or self.best_weights is None):
        self.best_weights = LocalWeights(self.model)


@patch(keras.callbacks.EarlyStopping, "on_train_end")
def _restore_best(original, self, logs=None):
    best = self.best_weights
    if not isinstance(best, LocalWeights):
        return original(self, logs)
    self.best_weights = None
    original(self, logs)
    best.restore(self.model)
    self.best_weights = best
