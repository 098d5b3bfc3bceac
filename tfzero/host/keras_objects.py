"""Access to Keras's models, callbacks, optimizers and files by private names. See `host/registry.py`."""

from tfzero.host import backend  # noqa: F401, isort: skip. It refuses other backends before Keras imports them.

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.losses.loss import squeeze_or_expand_to_same_rank, standardize_reduction
from keras.src.saving.saving_lib import H5IOStore, _save_state

__all__ = ["H5IOStore", "squeeze_or_expand_to_same_rank", "standardize_reduction"]


class EpochsBase(TFEpochIterator):
    """Keras's loop over the epochs of data."""

    known: tuple[int | None] | None = None  # the number of batches, if not that of the data that Keras was given

    def know_batches(self, batches: int | None) -> None:
        """Sets the number of batches of an epoch; None if it is unknown."""
        self.known, self._num_batches = (batches,), batches

    def reset(self) -> None:
        """Goes back to the start."""
        super().reset()
        if self.known is not None:
            self.know_batches(*self.known)

    def steps_of_epoch(self) -> Generator:
        """Yields for each execution its first step, the first step after it, and an iterator over its batches."""
        return super()._enumerate_iterator()

    def _enumerate_iterator(self) -> Generator:
        return self.steps_of_epoch()


class SlotKey:
    """Stands for a variable when Keras's optimizers look for its slots."""

    def identity(self) -> tf.Variable:
        """The variable under whose identity the slots are found."""
        raise NotImplementedError

    def _distributed_container(self) -> tf.Variable:
        return self.identity()


def strategy_of(model: object) -> Any:
    """The strategy under which a model was made; None for anything else."""
    return getattr(model, "_distribute_strategy", None)


def loss_tracker(model: keras.Model) -> keras.metrics.Metric | None:
    """The metric for the mean of a compiled model's loss. The model's `metrics` need not list it."""
    return model._loss_tracker


def has_compiled_loss(model: keras.Model) -> bool:
    """Whether a model was compiled with a loss."""
    return getattr(model, "compiled", False) and getattr(model, "_compile_loss", None) is not None


def is_within_fit(keywords: dict) -> bool:
    """Whether `fit` gave these keywords to `evaluate`, for its validation."""
    return "_use_cached_eval_dataset" in keywords


def own_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule, function or variable behind `learning_rate`, if this very object has one."""
    return vars(optimizer).get("_learning_rate")


def rate_now(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """The learning rate of the moment, also of a schedule."""
    rate = optimizer.learning_rate
    return tf.convert_to_tensor(rate.value if isinstance(rate, keras.Variable) else rate)


def counters_of(
    optimizer: keras.optimizers.Optimizer, is_slot: Callable[[keras.Variable], bool]
) -> list[keras.Variable]:
    """Variables of an optimizer beside its slots and its learning rate: what it counts."""
    return [each for each in optimizer.variables if not is_slot(each) and each is not own_rate(optimizer)]


def rate_without_schedule(optimizer: keras.optimizers.Optimizer) -> tf.Tensor | None:
    """The learning rate as it is now; None if it follows a schedule."""
    rate = own_rate(optimizer)
    return tf.convert_to_tensor(rate.value) if isinstance(rate, keras.Variable) else None


@contextlib.contextmanager
def without_rate(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Takes an optimizer's learning rate away within it. Keras would take an assignment for a new rate."""
    own = vars(optimizer)
    former, own["_learning_rate"] = own["_learning_rate"], None
    try:
        yield
    finally:
        own["_learning_rate"] = former


def walk_as_saving(model: keras.Model, store: H5IOStore, skipped: Iterable[int]) -> None:
    """Passes a model's variables to a store as Keras's saving does, without objects of these ids."""
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
    """Closes a TensorBoard's writers."""
    callback._close_writers()
