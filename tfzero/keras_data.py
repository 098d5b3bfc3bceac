"""The places where Keras's way with data must be told about replicas, and about a run that goes on.

They are patched as the training's are (`patches.py`).
"""

import contextlib

import tensorflow as tf

from tfzero import _compat
from tfzero.inputs import DataPosition
from tfzero.keras_hooks import strategy_of
from tfzero.model_building import build_unless_the_step_does
from tfzero.patches import patch
from tfzero.strategy import ZeroStrategy

_EMPTY = "The data set is empty: it has no batch. Pass at least one sample."


@patch(
    _compat.keras_tensorflow_trainer.TFEpochIterator,
    "__init__",
    "self distribute_strategy args kwargs",
    "workers shuffle alike, and agree how much data there is",
    "test_workers.py::test_every_sample_is_seen_once_in_an_epoch",
)
def _epoch_iterator(original, self, distribute_strategy=None, *args, **kwargs):
    if not isinstance(distribute_strategy, ZeroStrategy):
        return original(self, distribute_strategy, *args, **kwargs)
    # Of the training data, if a callback goes on from a checkpoint: they come first.
    position, distribute_strategy.data_position = distribute_strategy.data_position, None
    with distribute_strategy.agreed_randomness(position):
        original(self, distribute_strategy, *args, **kwargs)
    self._tfzero_position = position
    if position is not None:
        position.note_batch_size(self.data_adapter)
    if self.num_batches == 0:
        raise ValueError(_EMPTY)
    distribute_strategy.channel.agree("reading data", _compat.length_of(self), "data sets")


@patch(
    _compat.keras_tensorflow_trainer.TFEpochIterator,
    "_enumerate_iterator",
    "self",
    "a run goes on from its place in the data",
    "test_checkpoints.py::test_a_run_goes_on_from_any_place_in_an_epoch",
)
def _enumerate_iterator(original, self):
    """At first passes over the epochs and batches that a checkpoint has behind it."""
    position = self.__dict__.pop("_tfzero_position", None) or DataPosition()
    for _ in range(position.epochs):
        steps = original(self)
        if self.steps_per_epoch:  # one iterator serves all epochs
            _compat.draw_batches(self, steps, None)
        else:  # a new one shuffles anew when it gives its first batch
            _compat.draw_batches(self, steps, 1)
            steps.close()
            _compat.end_epoch(self, position.epoch_batches)
    steps = original(self)
    _compat.draw_batches(self, steps, position.batches)
    yield from steps


@patch(
    _compat.keras_tensorflow_trainer.TFEpochIterator,
    "catch_stop_iteration",
    "self",
    "data of unknown length without a batch are an error, not an epoch",
    "test_bad_input.py::test_a_dataset_of_unknown_length_without_a_batch",
)
@contextlib.contextmanager
def _catch_stop_iteration(original, self):
    with original(self):
        try:
            yield
        except (StopIteration, tf.errors.OutOfRangeError):  # an execution that found no batch
            if isinstance(self._distribute_strategy, ZeroStrategy) and _compat.is_at_first_batch(self):
                raise ValueError(_EMPTY) from None
            raise


@patch(
    _compat.keras_tensorflow_trainer.TensorFlowTrainer,
    "_maybe_symbolic_build",
    "self iterator data_batch",
    "Keras draws a batch to learn shapes from, which a shuffled pipeline then has drawn",
    "test_step.py::test_a_tf_dataset_that_shuffles_anew_in_each_epoch",
)
def _maybe_symbolic_build(original, self, iterator=None, data_batch=None):
    """Builds a model from what its data say of their elements.

    Keras draws a batch for that, which a shuffled dataset or a shared generator then has drawn.
    """
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, iterator=iterator, data_batch=data_batch)
    if iterator is not None:
        specs = _compat.replica_element_spec(_compat.dataset_of(iterator))
        if all(spec.shape.rank is not None for spec in tf.nest.flatten(specs) if spec is not None):
            iterator, data_batch = None, specs
    with strategy.extended.first_values():
        return build_unless_the_step_does(lambda: original(self, iterator=iterator, data_batch=data_batch), self)
