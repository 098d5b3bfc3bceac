"""Patches that make Keras's data handling aware of replicas and of resumed runs. See `host/patches.py`."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime
from tfzero.host.keras_objects import EpochsBase
from tfzero.host.patches import patch
from tfzero.keras.model_building import build_unless_the_step_does
from tfzero.keras.training import strategy_of
from tfzero.rows.inputs import DataPosition
from tfzero.rows.sharded import source_of, sources_within
from tfzero.strategy import ZeroStrategy

_EMPTY = "The data set is empty: it has no batch. Pass at least one sample."
_USED_UP = (
    "The data gave no batch in this epoch on {worker}, so it would be an epoch without a step. An iterator or a "
    "generator that was used up gives no more: pass a data set that begins anew in every epoch, or fewer epochs."
)


class _Epochs(EpochsBase):
    """Keras's loop over the epochs of data, under a ZeroStrategy."""

    place: DataPosition | None = None  # where in the data the loop begins
    position: DataPosition | None = None  # where it is, for checkpoints
    strategy: ZeroStrategy  # whose loop it is
    worker: str = ""  # which this is
    reads_files: bool = False  # whether the data are a `sharded_dataset`, in which it can seek
    executions: int = 0  # begun in this epoch
    goes_on: bool = False  # whether this epoch began before, in a run that was resumed

    def steps_of_epoch(self) -> Generator[Any, None, None]:
        """First skips the epochs and batches that a checkpoint has behind it."""
        place, self.place = self.place or DataPosition(), None
        self.executions, self.goes_on = 0, place.batches > 0
        for step in self.steps_from(place):
            self.executions += 1
            yield step

    def steps_from(self, place: DataPosition) -> Generator[Any, None, None]:
        behind, drawn = [place.passes_of(each) for each in place.sources], place.batches
        if place.sources and self.reads_files and not self.steps_per_epoch:
            place.sources[0].seek(behind[0], place.batches)
            drawn = 0
            if place.epochs:
                runtime.end_epoch(self)
        elif self.steps_per_epoch and self.data_adapter.num_batches is None:  # one iterator serves all epochs
            drawn += place.epochs * place.epoch_batches
        elif self.steps_per_epoch:
            for _ in range(place.epochs):
                runtime.draw_batches(self, super().steps_of_epoch(), None)
        else:
            self.pass_over_epochs(place.epochs)
            for each, passes in zip(place.sources, behind, strict=True):
                each.seek(passes, 0)
        if self.position is not None:
            self.position.begin_epoch()
        yield from runtime.rest_of_epoch(self, super().steps_of_epoch(), place.batches, drawn)

    def pass_over_epochs(self, count: int) -> None:
        for _ in range(count):  # a new iterator reshuffles when it gives its first batch
            steps = super().steps_of_epoch()
            runtime.draw_batches(self, steps, 1)
            steps.close()
            runtime.end_epoch(self)

    @contextlib.contextmanager
    def catch_stop_iteration(self) -> Iterator[None]:
        """Makes data of unknown length without a batch an error, not an epoch."""
        with super().catch_stop_iteration():
            try:
                yield
            except (StopIteration, tf.errors.OutOfRangeError):  # an execution that found no batch
                if runtime.is_at_first_batch(self):
                    raise ValueError(_EMPTY) from None
                if self.executions == 1 and not self.goes_on:
                    raise ValueError(_USED_UP.format(worker=self.worker)) from None
                raise
        # Before Keras reads metrics, for which workers that train apart would wait for each other in a collective.
        self.strategy.merge("the end of the data")


@contextlib.contextmanager
def agreed_randomness(strategy: ZeroStrategy, position: DataPosition | None = None) -> Iterator[None]:
    """Makes data pipelines that are built within it shuffle alike on all workers: as the first worker would.

    A position from a checkpoint restores the shuffling with which its training began. A new position records it.
    """
    if strategy.extended.dealing.mesh.workers == 1 and position is None:
        yield
        return
    tell = strategy.channel.broadcast if strategy.served is None else strategy.served.post
    position = position or DataPosition()
    unseeded = runtime.random_state()["seed"] is None
    resumed = position.randomness
    if resumed is None or strategy.served is not None:  # workers of servers count what they are told
        position.randomness = tell("preparing data", resumed or runtime.random_state())
        is_drawn = position.randomness["seed"] is None
        unseeded = is_drawn if resumed is None else unseeded
        if is_drawn:
            draw = int.from_bytes(os.urandom(4), "little")
            position.randomness["seed"] = tell("drawing a seed to shuffle by", draw)
    runtime.set_random_state(position.randomness)
    try:
        yield
    finally:
        if unseeded:
            tf.random.set_seed(None)


@patch(
    runtime.keras_tensorflow_trainer.TFEpochIterator,
    "__init__",
    "self distribute_strategy args kwargs",
    "workers shuffle alike, and agree how much data there is; a run goes on from its place in them",
    "test_workers.py::test_every_sample_is_seen_once_in_an_epoch",
)
def _epoch_iterator(
    original: Callable[..., Any],
    self: EpochsBase,
    distribute_strategy: tf.distribute.Strategy | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    if not isinstance(distribute_strategy, ZeroStrategy):
        return original(self, distribute_strategy, *args, **kwargs)
    # A resume sets the position for the training data, and their iterator is the first to be made.
    position, distribute_strategy.data_position = distribute_strategy.data_position, None
    with agreed_randomness(distribute_strategy, position):
        original(self, distribute_strategy, *args, **kwargs)
    distribute_strategy.extended.dealing.end_training()
    self.__class__, self.place, self.position = _Epochs, position, position
    self.strategy = distribute_strategy
    self.worker = distribute_strategy.extended.name_of_worker
    if position is not None:
        given = distribute_strategy.extended.dealing.origin_of(runtime.dataset_of(self))
        source, position.sources = source_of(given), sources_within(given)
        self.reads_files, position.one_iterator = source is not None, bool(self.steps_per_epoch)
        position.note_batch_size(self.data_adapter if source is None else source.dealing)
    if distribute_strategy.extended.mesh.workers > 1:
        given, own_data = self.data_adapter.num_batches, distribute_strategy.extended.dealing.own_data
        if (known := own_data.batches_of(runtime.dataset_of(self), given)) != given:
            self.know_batches(known)
    if self.num_batches == 0:
        raise ValueError(_EMPTY)
    distribute_strategy.channel.agree("reading data", runtime.length_of(self), "data sets")


@patch(
    runtime.keras_tensorflow_trainer.TensorFlowTrainer,
    "_maybe_symbolic_build",
    "self iterator data_batch",
    "Keras draws a batch to learn shapes from, which a shuffled pipeline then has drawn",
    "test_step.py::test_a_tf_dataset_that_shuffles_anew_in_each_epoch",
)
def _maybe_symbolic_build(
    original: Callable[..., Any], self: keras.Model, iterator: Any = None, data_batch: Any = None
) -> None:
    """Builds a model from the element specs of its data.

    Keras draws a batch for that. A shuffled dataset or a shared generator would then have moved on.
    """
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, iterator=iterator, data_batch=data_batch)
    if iterator is not None:
        specs = runtime.replica_element_spec(runtime.dataset_of(iterator))
        if all(spec.shape.rank is not None for spec in tf.nest.flatten(specs) if spec is not None):
            iterator, data_batch = None, specs
    with strategy.extended.first_values():
        return build_unless_the_step_does(lambda: original(self, iterator=iterator, data_batch=data_batch), self)
