"""Describes pipelines and settings to other workers, by private names of TensorFlow and Keras.

See `host/registry.py`.
"""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.data.experimental.ops.distribute import _AutoShardDataset, compute_batch_size


def pipeline(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """Yields a dataset and all datasets that it is made from, except those made by a function of `interleave`."""
    yield dataset
    # There is no public way from a dataset to its inputs.
    for source in dataset._inputs():
        yield from pipeline(source)


def operations_of(dataset: tf.data.Dataset) -> set[str]:
    """Kinds of operations in a pipeline's functions (of `map`, `interleave`, ...) and in those that these call."""
    kinds: set[str] = set()
    for source in pipeline(dataset):
        for wrapper in source._functions():  # each wraps a traced function
            definition = wrapper.function.graph.as_graph_def()
            functions = [function.node_def for function in definition.library.function]
            kinds |= {node.op for nodes in (definition.node, *functions) for node in nodes}
    return kinds


def unordered_stages(dataset: tf.data.Dataset) -> list[str]:
    """Stages of a pipeline that were given `deterministic=False` themselves, which no option overrides.

    Knows `map`, `batch` and readers. `interleave` keeps this argument in the graph only.
    """
    stages = [s for s in pipeline(dataset) if getattr(s, "_deterministic", None) == "false"]
    return [type(stage).__name__.strip("_") for stage in stages]


def whole_batch_size(dataset: tf.data.Dataset) -> int | None:
    """Elements of a pipeline's batches; None where TensorFlow cannot tell."""
    size = int(compute_batch_size(dataset))
    return None if size < 0 else size


def files_of_worker(dataset: tf.data.Dataset, workers: int, worker: int, rows: int) -> tf.data.Dataset:
    """A pipeline that reads every `workers`-th file only, in batches of so many rows (AutoShardPolicy.FILE)."""
    return _AutoShardDataset(dataset.rebatch(rows), workers, worker)


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers of a model, nested ones included, in the order in which they became part of it."""
    return list(model._flatten_layers(include_self=False))


def keywords_of(loss_or_metric: object) -> dict:
    """Keywords that a Keras loss or metric passes to its function, such as Huber's `delta`; not in its config."""
    return getattr(loss_or_metric, "_fn_kwargs", {})


def rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule or the variable behind `learning_rate`, which itself gives the value at the current step."""
    return getattr(optimizer, "_learning_rate", None)
