"""Access to TensorFlow's runtime and to Keras by private names.

`host/registry.py` has a row for each name, with its reason and with the test that notices when a release changes it.
"""

from tfzero.host import backend  # noqa: F401, isort: skip. It refuses other backends before Keras imports them.

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend import core as keras_core
from keras.src.backend.common.variables import AutocastScope
from keras.src.backend.tensorflow import trainer as keras_tensorflow_trainer
from keras.src.legacy.saving import legacy_h5_format
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.saving import saving_lib
from keras.src.trainers.trainer import Trainer
from tensorflow.python.distribute.distribute_utils import create_mirrored_variable, regroup
from tensorflow.python.distribute.values import (
    DistributedVariable,
    Mirrored,
    PerReplicaSpec,
    SyncOnReadVariable,
)
from tensorflow.python.eager import context, record, tape
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from tfzero.host import versions

if versions.is_between("keras", "3.15", ""):
    from keras.src.optimizers.multi_optimizer import MultiOptimizer
else:

    class MultiOptimizer:  # type: ignore[no-redef]
        """Stands for the class that Keras has since 3.15: no optimizer is one."""


__all__ = [
    "AutocastScope",
    "BaseOptimizer",
    "DistributedVariable",
    "MultiOptimizer",
    "SyncOnReadVariable",
    "Trainer",
    "create_mirrored_variable",
    "keras_core",
    "keras_loss",
    "keras_tensorflow_trainer",
    "legacy_h5_format",
    "saving_lib",
]


def replica_index() -> int | None:
    """The running replica's index in this process; None outside replicas of a distribution strategy."""
    replica = tf.distribute.get_replica_context()
    if replica is None or not tf.distribute.has_strategy():
        return None
    # There is no public name for the local index.
    return replica._replica_id


def replica_thread() -> threading.Thread | None:
    """The thread that runs a replica's function, one for each call of `strategy.run`; None elsewhere.

    `main_args` are that replica's arguments. Wrapping the function instead would hide from TensorFlow that it is a
    `tf.function`. Replicas would then run one after the other, each waiting for the next one's collectives.
    """
    thread = threading.current_thread()
    return thread if hasattr(thread, "main_args") else None


def per_replica(values: Iterable) -> Any:
    """One value for each local replica, as `strategy.run` returns and takes them."""
    return regroup(tuple(values))


def mirrored(values: Iterable) -> Any:
    """One equal value for each local replica."""
    return regroup(tuple(values), wrap_class=Mirrored)


def runtime_is_initialized() -> bool:
    """Whether TensorFlow has already created its devices. Afterwards collectives cannot be configured."""
    return context.context()._initialized


def collectives_are_configured() -> bool:
    """Whether TensorFlow's server for collectives between workers already runs in this process."""
    return context.context()._collective_ops_server_def is not None


def abort_collectives(reason: str) -> None:
    """Ends all collectives of this process, running and future, with an error of this text."""
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)


def random_state() -> dict:
    """State of TensorFlow's global seed and of Python's `random`, as JSON."""
    version, internal, gauss = random.getstate()
    return {"seed": context.global_seed(), "python": [version, list(internal), gauss]}


def set_random_state(state: dict) -> None:
    """Sets a `random_state` of another process. Leaves an equal global seed alone, and its counter with it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if state["seed"] != context.global_seed():
        tf.random.set_seed(state["seed"])


def shuffle_seeds(dataset: tf.data.Dataset) -> list[list[int]]:
    """Pair of seeds of every `shuffle` in a pipeline; `[0, 0]` for one without a seed."""
    seeds = [seed for source in dataset._inputs() for seed in shuffle_seeds(source)]
    if type(dataset).__name__ == "_ShuffleDataset":
        seeds.append([int(tf.get_static_value(seed)) for seed in (dataset._seed, dataset._seed2)])
    return seeds


def replica_element_spec(dataset: tf.data.Dataset | tf.distribute.DistributedDataset) -> Any:
    """Specs of one replica's part of a distributed dataset's elements; None for anything but tensors."""

    def of_replica(spec: tf.TypeSpec) -> tf.TypeSpec | None:
        spec = spec._value_specs[0] if isinstance(spec, PerReplicaSpec) else spec
        return spec if hasattr(spec, "shape") and hasattr(spec, "dtype") else None

    return tf.nest.map_structure(of_replica, dataset.element_spec)


def dataset_of(
    epoch_iterator: keras_tensorflow_trainer.TFEpochIterator,
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """The distributed dataset behind Keras's loop over epochs."""
    return epoch_iterator._distributed_dataset


def length_of(epoch_iterator: keras_tensorflow_trainer.TFEpochIterator) -> dict:
    """How much data Keras's loop will give, as far as it knows."""
    last = None
    with contextlib.suppress(NotImplementedError):  # for some kinds of data
        last = epoch_iterator.data_adapter.partial_batch_size
    return {"number of batches": epoch_iterator.num_batches, "size of the last batch": last}


def is_at_first_batch(epoch_iterator: keras_tensorflow_trainer.TFEpochIterator) -> bool:
    """Whether Keras's loop over data of unknown length is still at its very first execution."""
    return epoch_iterator._num_batches is None and epoch_iterator._steps_seen == epoch_iterator.steps_per_execution


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch from which `fit` goes on, as `BackupAndRestore` does; None for the one that `fit` was given."""
    model._initial_epoch = epoch


def draw_batches(epoch_iterator: keras_tensorflow_trainer.TFEpochIterator, steps: Iterator, count: int | None) -> None:
    """Skips `count` batches of an epoch (None: all) in the loop `steps` that Keras's iterator makes over it."""
    drawn = 0
    with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
        while count is None or drawn < count:
            *_, iterator = next(steps)  # of two values until Keras 3.10, then of three
            for _ in range(epoch_iterator.steps_per_execution):
                next(iterator)
                drawn += 1


_MORE_THAN_THERE_ARE = 2**60  # batches


def rest_of_epoch(
    epoch_iterator: keras_tensorflow_trainer.TFEpochIterator, steps: Iterator, begin: int, drawn: int
) -> Iterator:
    """What is left of an epoch's loop `steps` behind its first `begin` batches, with the numbers of its batches.

    The run that trained on those may have had other `steps_per_execution`.

    Args:
        epoch_iterator: Keras's, which made the loop.
        steps: the whole loop.
        begin: number of batches that are left out.
        drawn: number of batches that are drawn and left out; the data may begin behind `begin`, or before the epoch.
    """
    size, length = epoch_iterator.steps_per_execution, epoch_iterator.num_batches
    behind = begin // size
    if length is not None:
        behind = -(-length // size) + -max(0, length - begin) // size
    for number, (*numbers, iterator) in enumerate(steps):
        if number == 0:
            with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
                for _ in range(drawn):
                    next(iterator)
        if number >= behind:
            moved = begin - behind * size
            yield (*(each + moved for each in numbers), iterator)


def batches_behind(model: keras.Model, batch: int) -> int:
    """Batches of an epoch that are behind it, by what `on_train_batch_end` is given.

    An execution of several steps ends it with the number of its last batch; until Keras 3.10, with that of its first.
    """
    return batch + (1 if versions.is_between("keras", "3.11", "") else model.steps_per_execution)


def end_epoch(epoch_iterator: keras_tensorflow_trainer.TFEpochIterator) -> None:
    """Does what Keras's loop does after an epoch, for a loop that was stopped before its end.

    Keras makes an iterator that it never uses, which moves a `shuffle` on to its next order. After data of unknown
    length it makes none, as it has then already tried to take more than there are; it also does so from then on.
    """
    known = getattr(epoch_iterator, "known", None) or (epoch_iterator.data_adapter.num_batches,)
    if known == (None,):
        epoch_iterator._num_batches = _MORE_THAN_THERE_ARE
    else:
        epoch_iterator._current_iterator = iter(epoch_iterator._get_iterator())
    epoch_iterator.data_adapter.on_epoch_end()


def input_structure(model: keras.Model) -> Any:
    """The Keras tensors that a model of `keras.Input`s takes, in their structure; None for any other model."""
    functional = getattr(model, "_functional", None) or model
    return getattr(functional, "_inputs_struct", None)


def made_trainable(model: keras.Model) -> set[int]:
    """Ids of the variables that layers made as trainable; some may be frozen now."""
    return {id(variable) for layer in model._flatten_layers() for variable in layer._trainable_variables}


def rows_counted(model: keras.Model) -> list[int]:
    """Samples that each local replica has trained with since metrics were reset, from the count of the loss's mean."""
    return [int(count.numpy()) for count in model._loss_tracker.count.value.values]


def is_train_step_of_keras(step: Callable[..., Any]) -> bool:
    """Whether a model's step is Keras's own `train_step`, not overridden."""
    return getattr(step, "__func__", None) is keras.Model.train_step


def training_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
    """The loss as Keras's own `train_step` computes it, even with a `compute_loss` of an older signature."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)


def is_backward(operation: tf.Operation) -> bool:
    """Whether a gradient tape made an operation, by its name."""
    return "gradient_tape/" in operation.name


def creation_order(operation: tf.Operation) -> int:
    """A number that grows with every operation of a graph."""
    return operation._id


def uses_of_variable(variable: tf.Variable) -> list[tf.Operation]:
    """The operations of the current graph that read or change a variable, or call functions that may."""
    return tf.compat.v1.get_default_graph().capture(variable.handle).consumers()


def is_recorded(value: tf.Tensor) -> bool:
    """Whether the active gradient tape knows how a value was made; True without one."""
    return not record.could_possibly_record() or record.should_record_backprop([value])


def unrecorded() -> contextlib.AbstractContextManager[None]:
    """Stops gradient tapes from recording within it."""
    return record.stop_recording()


def note_read(variable: tf.Variable) -> None:
    """Tells whatever watches reads of variables (tapes, `tf.recompute_grad` within another) of a read."""
    if variable.trainable:
        tape.variable_accessed(variable)


def record_read(variable: tf.Variable, value: tf.Tensor) -> None:
    """Makes gradient tapes take `value` for a read of a variable: its gradient then has the shape of `value`."""
    note_read(variable)
    record.record_operation("ReadVariableOp", [value], [variable.handle], lambda upstream: [upstream])


def graph_around_control_flow(outermost: tf.Graph) -> tuple:
    """The nearest graph, up to `outermost`, that is no branch or loop; and whether it lies in a branch or loop."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not outermost and isinstance(graph, ControlFlowFuncGraph):
        graph = graph.outer_graph
    around = graph
    while around is not outermost and not isinstance(around, ControlFlowFuncGraph) and hasattr(around, "outer_graph"):
        around = around.outer_graph
    return graph, around is not outermost and isinstance(around, ControlFlowFuncGraph)


def plain_variable(value: tf.Tensor, name: str | None = None, shape: tf.TensorShape | None = None) -> tf.Variable:
    """A variable of this process alone, even within the scope of a strategy."""
    with tf.init_scope():
        return ResourceVariable(value, trainable=False, name=name, shape=shape)


def remake(variable: keras.Variable) -> None:
    """Makes a Keras variable's `tf.Variable` anew, under the current scope. The Keras variable stays the same."""
    variable._initialize(tf.constant(variable.numpy()))


# What the wrapper takes over from a Keras optimizer's `apply` (keras/src/optimizers/base_optimizer.py).


def iteration_counter(optimizer: BaseOptimizer) -> keras.Variable:
    """The counter of micro-steps. The public `iterations` divides it by the accumulation steps."""
    return optimizer._iterations


def own_scalars(optimizer: BaseOptimizer) -> list[keras.Variable]:
    """Variables that an optimizer makes in its constructor: iterations, and the learning rate if it is a number."""
    return list(optimizer._variables)


def begin_update(optimizer: BaseOptimizer, learning_rate: tf.types.experimental.TensorLike) -> None:
    """Does what an optimizer does once a step, before the updates of variables (Nadam keeps a product there)."""
    optimizer._backend_update_step([], [], learning_rate)


def decay_weight(optimizer: BaseOptimizer, variable: Any) -> None:
    """Applies the optimizer's weight decay to one variable, if it is not excluded."""
    optimizer._apply_weight_decay([variable])


def decays(optimizer: BaseOptimizer, variable: Any) -> bool:
    """Whether an optimizer's weight decay applies to a variable."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)


def accumulator(optimizer: BaseOptimizer, variable: Any) -> keras.Variable:
    """The gradient accumulator of one variable."""
    return optimizer._accumulated_gradients[optimizer._get_variable_index(variable)]


def moving_average(optimizer: BaseOptimizer, variable: Any) -> keras.Variable:
    """The exponential moving average of one variable."""
    return optimizer._model_variables_moving_average[optimizer._get_variable_index(variable)]


def optimizer_for(optimizer: MultiOptimizer, variable: keras.Variable) -> BaseOptimizer:
    """The optimizer that a MultiOptimizer chooses for a variable, by its path."""
    return optimizer._optimizer_map(variable)


def is_accumulator_name(name: str) -> bool:
    """Whether a slot's name says that it accumulates gradients (`BaseOptimizer.build`)."""
    return name.endswith("gradient_accumulator")


def adopt(optimizer: BaseOptimizer, home: Any, variables: Iterable[keras.Variable] | None = None) -> None:
    """Makes `home` an optimizer's strategy, and `variables` the ones that it trains.

    Keras's TensorFlow optimizer sends slot creation, updates and the swapping of averages through
    `_distribution_strategy.extended`.
    """
    optimizer._distribution_strategy = home
    if variables is not None:
        # Not by assignment: Keras would then count them among the optimizer's own variables.
        optimizer.__dict__["_trainable_variables"] = list(variables)


def home_of(optimizer: BaseOptimizer) -> Any:
    """The object that serves as an optimizer's strategy."""
    return optimizer._distribution_strategy
