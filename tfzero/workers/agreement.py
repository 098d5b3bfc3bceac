"""Checks before training that all workers have equal models and arguments.

[Note: descriptions] Workers compare descriptions. A description is JSON: numbers and words as they are, objects by
class and configuration, functions by name, code and enclosed values. It holds no addresses, order of sets, file paths
or counted-up names. Anything else is described by its type only. A difference in it may go unnoticed, but equal workers
are never refused.
"""

import contextlib
import enum
import functools
import hashlib
import inspect
import json
import numbers
import platform
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfzero
from tfzero.host import datasets, keras_objects
from tfzero.workers.channel import Channel

_MOST_LEVELS = 8  # of nesting; deeper values are described by their type
_MOST_ITEMS = 100  # of a list that is described item by item
_OF_LIBRARIES = ("keras.", "tensorflow.", "tfzero.")
# What may differ between workers, or is counted up in each process.
_OWN = ("seed", "module", "registered_name", "shared_object_id", "build_config")
_OWN_OF_CALLS = ("self", "kwargs", "callbacks", "verbose", "return_dict")
_TOLD_OF_LAYERS = ("name", "dtype", "trainable")  # described separately, or not at all
_DATA = ("x", "y", "sample_weight", "validation_data")  # their batches are compared instead: [Note: digests]
_PATH = "(a path)"


def versions() -> dict[str, str]:
    """Versions of what may compute or exchange something else in another version."""
    libraries = {"Keras": keras, "NumPy": np, "TensorFlow": tf}
    named = {name: library.__version__ for name, library in libraries.items()}
    return {"Python": platform.python_version(), "tfzero": tfzero.__version__} | named


def agree_on_compile(strategy: tf.distribute.Strategy, call: inspect.BoundArguments) -> None:
    """Raises ValueError on all workers unless `compile` got the same arguments on all."""
    if strategy.extended.mesh.workers > 1:
        _agree_that_models_are_made(strategy.channel, "compile")
        agree_on(strategy.channel, "compiling", of_call(call), "arguments of `compile`")


def agree_on_call(strategy: tf.distribute.Strategy, name: str, call: inspect.BoundArguments) -> None:
    """Raises ValueError on all workers unless a model's method got the same arguments, and the models are alike."""
    is_of_fit = keras_objects.is_within_fit(call.kwargs)  # `fit` itself has been agreed on
    if strategy.extended.mesh.workers > 1 and not is_of_fit:
        _agree_that_models_are_made(strategy.channel, name)
        what = of_call(call) | of_model(call.args[0])
        agree_on(strategy.channel, f"beginning to {name}", what, f"models or arguments of `{name}`")


def _agree_that_models_are_made(channel: Channel, name: str) -> None:
    """Detects a worker that is still creating a variable, because its model has one layer more.

    Both sides use one topic (`variables/creation.py`), so both get the error.
    """
    channel.agree("creating a variable", {"next is": f"`{name}`"}, f"models (before `{name}`)")


def agree_on(channel: Channel, topic: str, description: Mapping, what: str) -> None:
    """Raises ValueError on all workers unless all descriptions are equal. The error says who has what at which path.

    Workers exchange digests first, and then only what differs. So a large model's description stays local.
    """
    parts = {str(name): by_path(value, str(name)) for name, value in description.items()}
    digests = channel.all_gather(topic, {name: _digest(json.dumps(part)) for name, part in parts.items()})
    names = dict.fromkeys(name for each in digests for name in each)
    differing = [name for name in names if len({each.get(name) for each in digests}) > 1]
    if differing:
        channel.agree(f"{topic}, in detail", _joined(parts.get(name, {}) for name in differing), what)


def of_call(call: inspect.BoundArguments) -> dict:
    """The arguments of a model's method, by name. Data are only "given" or "missing"."""
    call = inspect.BoundArguments(call.signature, call.arguments.copy())
    call.apply_defaults()
    given = {name: value for name, value in call.arguments.items() if name not in _OWN_OF_CALLS}
    return {
        name: ("missing" if value is None else "given") if name in _DATA else describe(value)
        for name, value in given.items()
    }


def of_model(model: keras.Model) -> dict:
    """Describes what a model's layers, its optimizer and Keras itself compute with now."""
    described = {f"layers[{k}]": _of_layer(layer) for k, layer in enumerate(datasets.layers_of(model))}
    if getattr(model, "optimizer", None) is not None:
        described["optimizer"] = describe(getattr(model.optimizer, "inner_optimizer", model.optimizer))
    config = keras.config
    return described | {
        "keras.config": {
            "floatx": config.floatx(),
            "epsilon": config.epsilon(),
            "image_data_format": config.image_data_format(),
        }
    }


def _of_layer(layer: keras.layers.Layer) -> dict:
    """Describes a layer's class, policy and settings. Layers within it are listed separately."""
    described = {"class": _name_of(type(layer)), "dtype_policy": layer.dtype_policy.name, "trainable": layer.trainable}
    if isinstance(layer, keras.Model):
        return described
    config = _configuration(layer, 1)
    settings = {key: value for key, value in config.items() if key not in _TOLD_OF_LAYERS}
    if isinstance(layer, keras.layers.Lambda):
        settings["function"] = describe(layer.function)
    return settings | described


def by_path(description: object, path: str = "") -> dict:
    """Flattens a description into one dict: `{"loss[0].margin": 0.5}`."""
    if isinstance(description, dict) and description:
        begin = f"{path}." if path else ""
        return _joined(by_path(value, f"{begin}{key}") for key, value in description.items())
    if isinstance(description, list) and description:
        return _joined(by_path(value, f"{path}[{k}]") for k, value in enumerate(description))
    return {path: description}


def _joined(parts: Iterable[Mapping]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


# Descriptions. [Note: descriptions]


def describe(value: Any, level: int = 0) -> Any:
    """A JSON value that is the same for equal values, whichever worker describes them."""
    if level > _MOST_LEVELS:
        return _name_of(type(value))
    for kinds, how in _KINDS:
        if isinstance(value, kinds):
            return how(value, level + 1)
    if hasattr(value, "python_function"):  # a `tf.function`
        return describe(value.python_function, level)
    if hasattr(value, "get_config"):
        return {"class": _name_of(type(value))} | _configuration(value, level + 1)
    return {"class": _name_of(type(value))} | _numbers_of(vars(value) if hasattr(value, "__dict__") else {}, level + 1)


def _of_word(value: str, level: int) -> str:
    del level
    return _PATH if "/" in value or "\\" in value else value


def _of_number(value: Any, level: int) -> bool | int | float | str:
    del level
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, bool | int | float) else str(value)


def _of_array(value: np.ndarray | tf.Tensor, level: int) -> str:
    del level
    array = np.asarray(value)
    content = array.tolist() if array.dtype == object else array.tobytes()
    values = array.tolist() if array.size <= 8 else f"digest {_digest(repr(content))}"
    return f"{array.dtype} {list(array.shape)} {values}"


def _of_variable(value: tf.Variable | keras.Variable | keras.KerasTensor, level: int) -> str:
    """Describes dtype and shape only: reading the value might be a collective."""
    del level
    return f"variable {tf.as_dtype(value.dtype).name} {list(value.shape)}"


def _of_list(value: Sequence, level: int) -> list | str:
    described = [describe(item, level) for item in value]
    return described if len(described) <= _MOST_ITEMS else f"{len(described)} items, digest {_digest(described)}"


def _of_set(value: Collection, level: int) -> list:
    return sorted((describe(item, level) for item in value), key=repr)


def _of_mapping(value: Mapping, level: int) -> dict | str:
    if value.get("class_name") == "__lambda__":  # Keras serializes its code with the file's path
        return "a lambda"
    described = {str(describe(key, level)): describe(item, level) for key, item in value.items() if not _is_own(key)}
    if isinstance(described.get("name"), str):
        described["name"] = re.sub(r"_\d+$", "", described["name"])  # counted up in each process
    return {key: described[key] for key in sorted(described)}


def _is_own(key: object) -> bool:
    """Whether workers may differ in a setting: the leader's initial values and seeds apply to all."""
    return isinstance(key, str) and (key in _OWN or key.endswith("initializer"))


def _of_function(value: FunctionType, level: int) -> dict | str:
    if f"{value.__module__}.".startswith(_OF_LIBRARIES):
        return f"{value.__module__}.{value.__qualname__}"
    described = {"function": value.__qualname__, "code": _digest(_of_code(value.__code__))}
    if level > _MOST_LEVELS // 2:  # functions of functions
        return described
    defaults = {"defaults": describe(value.__defaults__, level)} if value.__defaults__ else {}
    return described | defaults | _numbers_of(_what_it_reads(value), level)


def _what_it_reads(function: FunctionType) -> dict:
    """The globals and enclosed values that a function refers to, by name."""
    read = {name: function.__globals__[name] for name in _names_in(function.__code__) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            read[name] = cell.cell_contents
    return {name: value for name, value in read.items() if value is not function}


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)


def _of_code(code: CodeType) -> list:
    """The code that runs, without its file name and line numbers."""
    constants = [_of_code(each) if isinstance(each, CodeType) else describe(each) for each in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _configuration(value: Any, level: int) -> Any:
    """The result of `get_config`, and the numbers that a user's own class keeps beside it."""
    try:
        config = dict(value.get_config())
    except Exception:  # a user's class may raise anything: many have no config, and training needs none
        config = _numbers_of({"learning_rate": datasets.rate_of(value)}, level)
    own = {} if _is_of_library(type(value)) else _numbers_of(getattr(value, "__dict__", {}), level)
    return _of_mapping(own | datasets.keywords_of(value) | config, level)


def _numbers_of(attributes: Mapping, level: int) -> dict:
    """Describes numbers, words, functions and objects with a config. Other attributes may be open files or models."""
    plain = (numbers.Number, np.generic, str, FunctionType)

    def is_told(value: object) -> bool:
        configured = hasattr(value, "get_config") and not isinstance(value, keras.layers.Layer | type)
        return isinstance(value, plain) or configured

    told = {name: value for name, value in attributes.items() if not name.startswith("_") and is_told(value)}
    return {name: describe(told[name], level) for name in sorted(told)}


def _name_of(kind: type) -> str:
    """The class's name without its module, which may differ between workers.

    `keras.src.losses.losses.Huber` and `__main__.Huber` are both Huber.
    """
    return kind.__qualname__


def _is_of_library(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_OF_LIBRARIES)


def _digest(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


_KINDS: tuple[tuple[type | tuple, Callable], ...] = (
    (type(None), lambda value, level: None),
    (enum.Enum, lambda value, level: value.name),
    ((bool, numbers.Number, np.generic), _of_number),
    (str, _of_word),
    (bytes, lambda value, level: f"bytes, digest {_digest(value)}"),
    (PurePath, lambda value, level: _PATH),
    (type, lambda value, level: _name_of(value)),
    (tf.DType, lambda value, level: value.name),
    ((keras.Model, tf.distribute.Strategy), lambda value, level: _name_of(type(value))),
    ((tf.Variable, keras.Variable, keras.KerasTensor), _of_variable),
    (np.ndarray, _of_array),
    (tf.Tensor, lambda value, level: _of_array(value, level) if hasattr(value, "numpy") else _name_of(type(value))),
    (Mapping, _of_mapping),
    ((list, tuple), _of_list),
    ((set, frozenset), _of_set),
    (functools.partial, lambda value, level: describe([value.func, list(value.args), value.keywords], level)),
    (MethodType, lambda value, level: describe([value.__func__, _name_of(type(value.__self__))], level)),
    (FunctionType, _of_function),
    (BuiltinFunctionType, lambda value, level: value.__qualname__),
)
