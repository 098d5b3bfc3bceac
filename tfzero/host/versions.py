"""Which versions of TensorFlow and Keras tfzero is made for. It refuses all others, before Keras is imported."""

import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from types import FrameType

# The first and the last minor version that are tried, as in `pyproject.toml`.
RANGES = {"tensorflow": ((2, 18), (2, 21)), "keras": ((3, 10), (3, 15))}
# Packages from PyPI that may contain each.
_PACKAGES = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-rocm"), "keras": ("keras",)}
_SPELLINGS = {"tensorflow": "TensorFlow", "keras": "Keras"}
# With "1", later versions than those of `RANGES` are let through.
ANY_LATER = "TFZERO_ANY_LATER_VERSION"
_KERAS_2 = "tf_keras"
_KERAS_3_ONLY = "A ZeroStrategy trains models of Keras 3"
_INSTEAD = "the package tf_keras, which is `tf.keras` with TF_USE_LEGACY_KERAS=1: make the model with `import keras`"


def full(library: str) -> str:
    """The version of "tensorflow" or "keras": of what is imported, otherwise of what is installed."""
    module = sys.modules.get(library)
    if hasattr(module, "__version__"):
        return str(getattr(module, "__version__"))  # noqa: B009 (it may be a stand-in without types)
    for package in _PACKAGES[library]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module(library).__version__)


def minor(version: str) -> tuple[int, int]:
    """Its first two numbers: `minor("2.18.1")` is `(2, 18)`; `(0, 0)` if it does not begin with two numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_between(library: str, first: str, last: str) -> bool:
    """Whether the version of a library is within two minor versions, both included, such as "3.10"; "" is no bound."""
    present = minor(full(library))
    return (not first or minor(first) <= present) and (not last or present <= minor(last))


def require() -> None:
    """Checks the versions of TensorFlow and Keras.

    TF_USE_LEGACY_KERAS does no harm by itself: it changes `tf.keras` alone, and Ray sets it for all of its workers.

    Raises:
        ImportError: if one is not in `RANGES`.
    """
    for library, (first, last) in RANGES.items():
        version = full(library)
        if minor(version) < first or (minor(version) > last and os.environ.get(ANY_LATER) != "1"):
            raise ImportError(_refusal(library, version))


def _refusal(library: str, version: str) -> str:
    first, last = RANGES[library]
    bounds = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    name = _SPELLINGS[library]
    install = f"python -m pip install '{library}>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}'"
    anyway = f", or set {ANY_LATER}=1 to try this one" if minor(version) > last else ""
    return f"tfzero works with {name} {bounds}, but {name} {version} is installed: `{install}`{anyway}."


def refuse_keras_2(thing: object) -> None:
    """Checks that a model, a layer or an optimizer is not of Keras 2.

    Raises:
        TypeError: if it is.
    """
    if any(each.__module__.partition(".")[0] == _KERAS_2 for each in type(thing).__mro__):
        raise TypeError(f"{_KERAS_3_ONLY}, but received {type(thing).__name__} of Keras 2 ({_INSTEAD}).")


def refuse_variables_of_keras_2(name: str | None) -> None:
    """Checks that a variable is not being created by Keras 2, which knows no ZeroStrategy and would train it wrong.

    Raises:
        TypeError: if it is. A model of Keras 2 creates its variables like that under `strategy.scope()`.
    """
    frame: FrameType | None = inspect.currentframe() if _KERAS_2 in sys.modules else None
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == _KERAS_2:
            raise TypeError(f"{_KERAS_3_ONLY}, but Keras 2 creates the variable {name!r} under it ({_INSTEAD}).")
        frame = frame.f_back
