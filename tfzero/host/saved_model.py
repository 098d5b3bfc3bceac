"""Access to the variables of SavedModels by private names of TensorFlow and Keras. See `host/registry.py`."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

# The distributed variable of a component, noted at the component's handle.
from tensorflow.python.distribute.distribute_utils import value_container

# `tf.saved_model.save`, `model.export` and TFLite's converter all end here. It asks no strategy who writes.
from tensorflow.python.saved_model import save as saver

__all__ = ["saver"]


def distributed_variables(root: tf.Module | keras.Model) -> list[tf.Variable]:
    """Distributed variables of an object to be saved, each once, in an order that depends on the object alone."""
    found: dict[int, tf.Variable] = {}
    for each in [*tf.train.TrackableView(root).descendants(), *getattr(root, "_all_variables", ())]:
        variable = container_of(each.value if isinstance(each, keras.Variable) else each)
        if hasattr(variable, "distribute_strategy") and hasattr(variable, "values"):
            found.setdefault(id(variable), variable)
    return list(found.values())


def container_of(variable: Any) -> Any:
    """The distributed variable that a component belongs to; any other variable itself."""
    return value_container(variable)


def replace_listed(root: object, replacements: Mapping[int, tf.Variable]) -> list | None:
    """Replaces variables, by id, that Keras lists for an export because its endpoints have read them.

    Returns:
        What was listed before; None if `root` is not Keras's.
    """
    listed = getattr(root, "_all_variables", None)
    if listed is not None:
        list_anew(root, list({id(v): v for v in (replacements.get(id(v), v) for v in listed)}.values()))
    return listed


def list_anew(root: Any, variables: list) -> None:
    """Makes Keras list these variables for an export."""
    root._all_variables = variables
