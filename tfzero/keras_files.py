"""Keras's own files under a ZeroStrategy: all workers take part, one writes.

Reading a sharded variable gathers it, so every worker walks over the model as Keras's saving does, variable by
variable, but only the first of those that name a path writes there. The files are ordinary ones, for plain Keras too.
"""

import contextlib
from pathlib import Path

import keras
import numpy as np

from tfzero import _compat
from tfzero.keras_hooks import shows, strategy_of
from tfzero.patches import patch
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


patch(
    _compat.saving_lib,
    "save_model",
    "model filepath weights_format zipped",
    "reading a variable in shards is a collective: all workers save, one writes",
    "test_keras_files.py::test_one_worker_writes",
)(_save_together)
patch(
    _compat.saving_lib,
    "save_weights_only",
    "model filepath max_shard_size objects_to_skip",
    "reading a variable in shards is a collective: all workers save, one writes",
    "test_keras_files.py::test_one_worker_writes",
)(_save_together)


@patch(
    _compat.legacy_h5_format,
    "save_model_to_hdf5",
    "model filepath overwrite include_optimizer",
    "several workers would write one file; it is refused",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_model_to_hdf5(original, model, filepath, *args, **kwargs):
    strategy = strategy_of(model)
    if strategy is not None and strategy.extended.seats.workers > 1:
        raise ValueError(
            f"Several workers cannot save in the legacy HDF5 format. Save as `.keras`. Received: {filepath}"
        )
    return original(model, filepath, *args, **kwargs)


# Callbacks that handle files themselves.


@patch(
    keras.callbacks.ModelCheckpoint,
    "_save_model",
    "self epoch batch logs",
    "making its folder fails if another worker is as fast",
    "test_keras_files.py::test_a_folder_that_another_worker_has_just_made_is_no_error",
)
def _save_model_checkpoint(original, self, epoch, batch, logs):
    if strategy_of(self.model) is not None:
        Path(self._get_file_path(epoch, batch, logs)).parent.mkdir(parents=True, exist_ok=True)
    return original(self, epoch, batch, logs)


@patch(
    keras.callbacks.BackupAndRestore,
    "_save_model",
    "self",
    "one worker writes what is beside the weights",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_backup(original, self):
    if _is_chief(self.model):
        return original(self)
    return self.model.save_weights(self._weights_path, overwrite=True)


@patch(
    keras.callbacks.BackupAndRestore,
    "on_train_end",
    "self logs",
    "one worker deletes the backup, when all have ended",
    "test_keras_files.py::test_one_worker_writes",
)
def _end_backups(original, self, logs=None):
    if _is_chief(self.model):
        original(self, logs)
    if (strategy := strategy_of(self.model)) is not None:
        strategy.channel.all_gather("deleting the backup", None)


def _is_chief(model) -> bool:
    strategy = strategy_of(model)
    return strategy is None or strategy.extended.seats.worker == 0


# What all callbacks are told.


@patch(
    keras.callbacks.CallbackList,
    "set_model",
    "self model",
    "of several workers the first one shows progress; at stage 3 the best weights are kept in parts",
    "test_report.py::test_one_of_several_workers_prints_it_and_shows_progress",
)
def _set_model(original, self, model):
    if model and not shows(model):
        _compat.drop_progress_bar(self)
    result = original(self, model)
    if model and strategy_of(model) is not None:
        for callback in self.callbacks:
            # Not of a subclass, whose code may need the model itself.
            if type(callback) is keras.callbacks.EarlyStopping and _lies_in_parts(model):
                callback.set_model(WeightsInParts(model))
    return result


def _lies_in_parts(model: keras.Model) -> bool:
    return any(isinstance(variable.value, ShardedVariable) for variable in model.weights)


class WeightsInParts:
    """A model for who only takes its weights and gives them back: they are what this process holds of them."""

    def __init__(self, model: keras.Model) -> None:
        self.__dict__["model"] = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.model, name, value)

    def get_weights(self) -> list[np.ndarray]:
        return [part.numpy() for part in self._parts()]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        for part, weight in zip(self._parts(), weights, strict=True):
            part.assign(weight)

    def _parts(self) -> list:
        return [part for variable in self.model.weights for part in variable.value.values]
