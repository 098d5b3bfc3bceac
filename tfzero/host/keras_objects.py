"""What tfzero asks of Keras's models, callbacks, optimizers and files by private names. See `host/registry.py`."""

from tfzero.host import backend  # noqa: F401, isort: skip. It refuses other backends before Keras imports them.

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.losses.loss import squeeze_or_expand_to_same_rank, standardize_reduction
from keras.src.saving.saving_lib import H5IOStore, _save_state

__all__ = ["H5IOStore", "squeeze_or_expand_to_same_rank", "standardize_reduction"]


class EpochsBase(TFEpochIterator):
    """Keras's loop over the epochs of data."""

    def steps_of_epoch(self) -> Generator:
        """The first step of each execution, the first one that is not in it, and an iterator over its batches."""
        return super()._enumerate_iterator()

    def _enumerate_iterator(self) -> Generator:
        return self.steps_of_epoch()


class SlotKey:
    """What Keras's optimizers take for a variable when they look for its slots."""

    def identity(self) -> tf.Variable:
        """The variable by whose identity they are found."""
        raise NotImplementedError

    def _distributed_container(self) -> tf.Variable:
        return self.identity()


def strategy_of(model: object) -> Any:
    """The strategy under which a model was made; None of what is no model."""
    return getattr(model, "_distribute_strategy", None)


def loss_tracker(model: keras.Model) -> keras.metrics.Metric | None:
    """The mean of a compiled model's loss, which its metrics need not list."""
    return model._loss_tracker


def has_compiled_loss(model: keras.Model) -> bool:
    """Whether a model was compiled with a loss."""
    return getattr(model, "compiled", False) and getattr(model, "_compile_loss", None) is not None


def is_within_fit(keywords: dict) -> bool:
    """Whether `evaluate` was given these by `fit`, which evaluates while it trains."""
    return "_use_cached_eval_dataset" in keywords


def own_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule, the function or the variable behind `learning_rate`, if this very object has one."""
    return vars(optimizer).get("_learning_rate")


@contextlib.contextmanager
def without_rate(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within it an optimizer has no learning rate. Not by assignment, which Keras takes for a new one."""
    own = vars(optimizer)
    former, own["_learning_rate"] = own["_learning_rate"], None
    try:
        yield
    finally:
        own["_learning_rate"] = former


def walk_as_saving(model: keras.Model, store: H5IOStore, skipped: Iterable[int]) -> None:
    """Gives a store the variables of a model as Keras does when it saves, without objects of these ids."""
    _save_state(model, store, None, "", set(skipped))


def checkpoint_path(
    callback: keras.callbacks.ModelCheckpoint, epoch: int, batch: int | None, logs: Mapping[str, Any] | None
) -> str:
    """Where a ModelCheckpoint writes next."""
    return callback._get_file_path(epoch, batch, logs)


def backup_path(callback: keras.callbacks.BackupAndRestore) -> str:
    """Where a BackupAndRestore writes weights."""
    return callback._weights_path


def close_writers(callback: keras.callbacks.TensorBoard) -> None:
    """Ends what a TensorBoard has begun to write."""
    callback._close_writers()
