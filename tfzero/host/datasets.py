"""Describes pipelines and settings to other workers, by private names of TensorFlow and Keras.

See `host/registry.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from tensorflow.python.data.experimental.ops.distribute import _AutoShardDataset, compute_batch_size
from tensorflow.python.data.ops.dataset_ops import _OptionsDataset
from tensorflow.python.data.ops.map_op import _ParallelMapDataset
from tensorflow.python.data.ops.prefetch_op import _PrefetchDataset


def pipeline(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """Yields a dataset and all datasets that it is made from, except those made by a function of `interleave`."""
    yield dataset
    # There is no public way from a dataset to its inputs.
    for source in dataset._inputs():
        yield from pipeline(source)


def rows_by_index(dataset: tf.data.Dataset) -> tuple[tf.data.Dataset, Callable] | None:
    """What Keras makes batches of arrays from; None for any other dataset.

    Returns:
        A dataset of the indices of each batch's rows, int64, and the arrays, and a function that gathers the rows.
    """
    for stage in pipeline(dataset):
        if isinstance(stage, _ParallelMapDataset):
            function = stage._map_func._func
            if not _is_within(function, ArrayDataAdapter.get_tf_dataset, "slice_inputs", "grab_batch"):
                return None
            (elements,) = stage._inputs()
            return elements.with_options(dataset.options()), function
        if not isinstance(stage, _OptionsDataset | _PrefetchDataset):
            return None
    return None


def _is_within(function: Callable, outer: Callable, *names: str) -> bool:
    """Whether a function is the one of this name that is defined in others, by name, and those in `outer`."""
    path = ".<locals>.".join((outer.__qualname__, *names))
    return (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) == (outer.__module__, path)


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
