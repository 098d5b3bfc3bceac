"""Measures how long the gradient of a step takes by itself: nothing is sent, and nothing changes.

[Note: alone] The forward and the backward pass of Keras's own training step, with loss and metrics, run on zeros of a
batch's shapes. Collectives are silent (`Group.silenced`). `keras.StatelessScope` drops what layers and metrics would
assign to Keras variables. A graph that would still change something is not run.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime

_RUNS = 3  # after one to warm up
# Operations that change something outside the graph, or that need other replicas.
_CHANGES = (
    "Assign", "Collective", "EagerPyFunc", "LookupTableInsert", "MutableHashTable", "PyFunc", "ResourceApply",
    "ResourceScatter", "ResourceSparseApply", "RngReadAndSkip", "StatefulUniform", "StatefulStandardNormal",
)  # fmt: skip


class UnmeasurableError(ValueError):
    """The gradient of this model cannot be computed by itself; the message says why."""


def gradient_seconds(model: keras.Model, rows: Sequence[int]) -> float:
    """Median seconds of a gradient, all replicas of this process together. [Note: alone]

    Args:
        model: a model of a ZeroStrategy that has trained with a batch of a dataset.
        rows: the rows of a batch, for each local replica.

    Raises:
        UnmeasurableError: if the model has a `train_step` of its own or trains eagerly, if more than the rows of its
            batches' shapes is unknown, or if its gradient changes more than Keras variables or refuses zeros.
    """
    if not runtime.is_train_step_of_keras(model.train_step):
        raise UnmeasurableError("the model has a `train_step` of its own")
    if model.run_eagerly:
        raise UnmeasurableError("the model trains with run_eagerly=True")
    strategy = model.distribute_strategy
    batch = _zeros(runtime.replica_element_spec(model.train_function), rows)
    function = tf.function(lambda batch: strategy.run(_replica_gradient, args=(model, batch)), autograph=False)
    with strategy.extended.group.silenced(), tf.summary.record_if(False):
        gradient = function.get_concrete_function(batch)
    changes = _changes(gradient.graph)
    if changes:
        raise UnmeasurableError(f"computing it would change something, by the operations {', '.join(changes)}")
    try:
        seconds = [_seconds_of(gradient, batch, strategy) for _ in range(1 + _RUNS)]
    except tf.errors.InvalidArgumentError as error:
        raise UnmeasurableError(f"the model refuses a batch of zeros: {error.message[:300]}") from error
    return statistics.median(seconds[1:])


def _zeros(specs: Any, rows: Sequence[int]) -> Any:
    """Zeros of these shapes for each local replica, as `strategy.run` takes them."""
    for spec in tf.nest.flatten(specs):
        is_known = spec is None or (isinstance(spec, tf.TensorSpec) and spec.shape[1:].is_fully_defined())
        if not is_known:
            raise UnmeasurableError(f"its batches have shapes that are not known before: {spec}")

    def of_replicas(spec: tf.TensorSpec | None) -> tf.distribute.DistributedValues | None:
        if spec is None:
            return None
        return runtime.per_replica([tf.zeros([max(1, count), *spec.shape[1:]], spec.dtype) for count in rows])

    return tf.nest.map_structure(of_replicas, specs)


def _replica_gradient(model: keras.Model, batch: Any) -> list[tf.Tensor]:
    """Returns numbers that need the whole gradient and all metrics. Returning more would keep it in memory."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    with keras.StatelessScope(collect_losses=True):
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = model.optimizer.scale_loss(runtime.training_loss(model, x, y, y_pred, sample_weight))
        gradients = tape.gradient(loss, model.trainable_variables)
        metrics = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None]
    firsts = [tf.cast(tf.reshape(value, [-1])[:1], tf.float32) for value in values]
    return [tf.reduce_sum(tf.concat(firsts, 0)), *tf.nest.flatten(metrics)]


def _changes(graph: tf.Graph) -> list[str]:
    """Kinds of operations that change something, in a graph and in the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return sorted({node.op for node in nodes if node.op.startswith(_CHANGES)})


def _seconds_of(
    gradient: tf.types.experimental.ConcreteFunction, batch: Any, strategy: tf.distribute.Strategy
) -> float:
    start = time.perf_counter()
    for value in strategy.experimental_local_results(gradient(batch)[0]):
        value.numpy()
    return time.perf_counter() - start
