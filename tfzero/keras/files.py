"""Keras's own files under a ZeroStrategy: all workers take part, one writes.

Reading a sharded variable gathers it. So every worker walks over the model as Keras's saving does, variable by
variable. Of the workers that name the same path, only the first writes there. The files are ordinary Keras files.

[Note: told] Before each variable is gathered, and at the end, the workers tell each other that all is well. So a
failure on one worker, such as a full disk under the writer, is raised on all at once, and no worker waits in a
collective.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfzero.checkpoint.teamwork import SAVING_SECONDS, together
from tfzero.extended import ZeroExtended
from tfzero.host import keras_objects, runtime
from tfzero.host.patches import patch
from tfzero.keras.training import strategy_of
from tfzero.optimizer import ZeroOptimizer
from tfzero.strategy import ZeroStrategy
from tfzero.variables.classes import ShardedVariable
from tfzero.workers.progress import progress

_TOPIC = "saving a model"


class _Discarded(keras_objects.H5IOStore):
    """Takes what Keras would write, one variable at a time, and drops it."""

    def __init__(self) -> None:
        pass

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: dict[str, Any] | None = None) -> "_Discarded":
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        np.asarray(value)

    def close(self) -> None:
        pass


def _exchange(strategy: ZeroStrategy, place: str | None, error: BaseException | None = None) -> list:
    """Returns each worker's place in the walk. Raises on all workers what failed on one. [Note: told]"""

    def tell() -> str | None:
        if error is not None:
            raise error
        return place

    try:
        return together(strategy.channel, _TOPIC, tell, SAVING_SECONDS)
    except BaseException as told:
        told._tfzero_told = True  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def _telling(strategy: ZeroStrategy) -> Iterator[None]:
    """Makes a failure within it fail on all workers, at their next exchange. [Note: told]"""
    try:
        yield
    except BaseException as error:
        if getattr(error, "_tfzero_told", False):
            raise
        _exchange(strategy, None, error)


def _save_together(
    model: keras.Model, filepath: str | os.PathLike[str] | io.IOBase, save: Callable[[], object], skipped: Iterable = ()
) -> object:
    """Saves by `save` on the worker that writes; the others take part in its gathers."""
    strategy = strategy_of(model)
    gathered = 0

    def before_gathering() -> None:
        nonlocal gathered
        gathered += 1
        _agree_on_place(strategy, f"variable {gathered}")

    with _telling(strategy):
        strategy.merge(_TOPIC)
        # A worker that saves into an object in memory writes its own.
        path = None if isinstance(filepath, io.IOBase) else str(Path(filepath).absolute())
        writer = _exchange(strategy, path).index(path)
        result = None
        with _gathers_shown(strategy, model), _called_before_gathering(strategy.extended, before_gathering):
            if path is None or (writer == strategy.extended.mesh.worker and _claims(strategy, path)):
                result = save()
            else:
                keras_objects.walk_as_saving(model, _Discarded(), [id(each) for each in skipped])
        _agree_on_place(strategy, "the end")
    return result


def _claims(strategy: ZeroStrategy, path: str) -> bool:
    """Whether this worker writes a file; workers of servers, which do not save together, ask a server."""
    return strategy.served is None or strategy.served.claims(path)


def _agree_on_place(strategy: ZeroStrategy, place: str) -> None:
    places = _exchange(strategy, place)
    if len(set(places)) > 1:
        where = ", ".join(f"worker {worker} at {each}" for worker, each in enumerate(places))
        error = RuntimeError(f"While a model is saved the workers are at different places: {where}. Save it alike.")
        error._tfzero_told = True  # type: ignore[attr-defined] # as all raise it
        raise error


@contextlib.contextmanager
def _called_before_gathering(extended: ZeroExtended, function: Callable[[], object]) -> Iterator[None]:
    former, extended.before_gathering = extended.before_gathering, function
    try:
        yield
    finally:
        extended.before_gathering = former


@contextlib.contextmanager
def _gathers_shown(strategy: ZeroStrategy, model: keras.Model) -> Iterator[None]:
    """Shows how many of the sharded variables have been gathered."""
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer else [])]
    count = sum(isinstance(variable.value, ShardedVariable) for variable in variables)
    shown = count > 0 and strategy.extended.mesh.worker == 0
    with progress("gathering", count, unit="variables", shown=shown) as bar:
        former, strategy.extended.after_gathering = strategy.extended.after_gathering, bar.advance
        try:
            yield
        finally:
            strategy.extended.after_gathering = former


@patch(
    runtime.saving_lib,
    "save_model",
    "model filepath weights_format zipped",
    "reading a variable in shards is a collective: all workers save, one writes",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_model(
    original: Callable[..., Any],
    model: keras.Model,
    filepath: str | os.PathLike[str] | io.IOBase,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if strategy_of(model) is None:
        return original(model, filepath, *args, **kwargs)
    return _save_together(model, filepath, lambda: original(model, filepath, *args, **kwargs))


@patch(
    runtime.saving_lib,
    "save_weights_only",
    "model filepath max_shard_size objects_to_skip",
    "reading a variable in shards is a collective: all workers save, one writes",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_weights_only(
    original: Callable[..., Any],
    model: keras.Model,
    filepath: str | os.PathLike[str] | io.IOBase,
    max_shard_size: float | None = None,
    objects_to_skip: Iterable[object] | None = None,
) -> Any:
    if strategy_of(model) is None:
        return original(model, filepath, max_shard_size, objects_to_skip)
    save = functools.partial(original, model, filepath, max_shard_size, objects_to_skip)
    return _save_together(model, filepath, save, objects_to_skip or ())


@patch(
    runtime.legacy_h5_format,
    "save_model_to_hdf5",
    "model filepath overwrite include_optimizer",
    "several workers would write one file; it is refused",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_model_to_hdf5(
    original: Callable[..., Any],
    model: keras.Model,
    filepath: str | os.PathLike[str] | io.IOBase,
    *args: Any,
    **kwargs: Any,
) -> Any:
    strategy = strategy_of(model)
    if strategy is not None and strategy.extended.mesh.workers > 1:
        raise ValueError(
            f"Several workers cannot save in the legacy HDF5 format. Save as `.keras`. Received: {filepath}"
        )
    return original(model, filepath, *args, **kwargs)


# Files written before the optimizer had a registered name use this name.
keras.saving.get_custom_objects()["ZeroOptimizer"] = ZeroOptimizer


# Callbacks that write files on their own.


@patch(
    keras.callbacks.ModelCheckpoint,
    "_save_model",
    "self epoch batch logs",
    "making its folder fails if another worker is as fast",
    "test_keras_files.py::test_a_folder_that_another_worker_has_just_made_is_no_error",
)
def _save_model_checkpoint(
    original: Callable[..., Any],
    self: keras.callbacks.ModelCheckpoint,
    epoch: int,
    batch: int | None,
    logs: dict[str, Any] | None,
) -> Any:
    if (strategy := strategy_of(self.model)) is not None:
        path = keras_objects.checkpoint_path(self, epoch, batch, logs)
        # Keras's own check and `makedirs` fail if another worker makes the folder at the same time.
        with _telling(strategy):
            if "://" not in path:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            _exchange(strategy, None)
    return original(self, epoch, batch, logs)


@patch(
    keras.callbacks.BackupAndRestore,
    "_save_model",
    "self",
    "one worker writes what is beside the weights",
    "test_keras_files.py::test_one_worker_writes",
)
def _save_backup(original: Callable[..., Any], self: keras.callbacks.BackupAndRestore) -> Any:
    if (strategy := strategy_of(self.model)) is None:
        return original(self)
    with _telling(strategy):
        if _is_chief(self.model):
            original(self)
        else:
            self.model.save_weights(keras_objects.backup_path(self), overwrite=True)
        _exchange(strategy, None)


def _is_chief(model: keras.Model) -> bool:
    strategy = strategy_of(model)
    return strategy is None or strategy.extended.should_checkpoint
