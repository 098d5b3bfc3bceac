"""How pipelines and settings are described to other workers, by private names of TensorFlow and Keras.

See `host/registry.py`.
"""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


def pipeline(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """A dataset and all that it is made from; what a function of `interleave` makes is not among them."""
    yield dataset
    # There is no public way from a dataset to its inputs.
    for source in dataset._inputs():
        yield from pipeline(source)


def operations_of(dataset: tf.data.Dataset) -> set[str]:
    """The kinds of operations in the functions of a pipeline (of `map`, `interleave`, ...), called ones included."""
    kinds: set[str] = set()
    for source in pipeline(dataset):
        for wrapper in source._functions():  # with the traced function behind each
            definition = wrapper.function.graph.as_graph_def()
            functions = [function.node_def for function in definition.library.function]
            kinds |= {node.op for nodes in (definition.node, *functions) for node in nodes}
    return kinds


def unordered_stages(dataset: tf.data.Dataset) -> list[str]:
    """The stages of a pipeline that were told `deterministic=False` by themselves, which no option overrules.

    Of `map`, `batch` and readers: `interleave` keeps what it was told only in the graph.
    """
    stages = [s for s in pipeline(dataset) if getattr(s, "_deterministic", None) == "false"]
    return [type(stage).__name__.strip("_") for stage in stages]


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers of a model, those within layers included, in the order in which they were made part of it."""
    return list(model._flatten_layers(include_self=False))


def keywords_of(loss_or_metric: object) -> dict:
    """What a loss or metric of Keras hands to its function, such as the `delta` of Huber: no part of its config."""
    return getattr(loss_or_metric, "_fn_kwargs", {})


def rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule or the variable behind `learning_rate`, which itself is the number of the current step."""
    return getattr(optimizer, "_learning_rate", None)
