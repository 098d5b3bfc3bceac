"""Every function of Keras and TensorFlow that tfzero replaces, each with its reason.

`python -m tfzero.host` lists them. Keras and TensorFlow offer a strategy no hook at these places. Each wrapper stands
beside the code it is about, in the modules of `_HOMES`. It first asks whether a `ZeroStrategy` is concerned: models of
other strategies run the original code. The constructor of `ZeroStrategy` installs all patches, however it was imported.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfzero.host.keras_names import KERAS
from tfzero.host.registry import Name, difference
from tfzero.host.tensorflow_names import TENSORFLOW

# They come after the strategy in the order of imports, so they are named and not imported.
_HOMES = (
    "tfzero.keras.training",
    "tfzero.keras.data",
    "tfzero.keras.losses",
    "tfzero.keras.layers",
    "tfzero.keras.files",
    "tfzero.keras.saved_models",
)


@dataclass(frozen=True)
class Patch:
    """A function of Keras or TensorFlow and its replacement, or an attribute of objects and what is read instead.

    Args:
        owner: the class or module that has it.
        name: its name there.
        arguments: the names of its parameters, in order, in the releases that tfzero is made for. None for an
            attribute.
        reason: why the original does not serve.
        test: a test that fails without the patch, as "file::function".
        wrapper: takes the original function, and then its arguments; for an attribute its value, and then the object.
        until: the last version of Keras that needs it, such as "3.13"; "" if that is the newest.
    """

    owner: Any
    name: str
    arguments: str | None
    reason: str
    test: str
    wrapper: Callable
    until: str = ""

    @property
    def target(self) -> str:
        """Where it is: "keras.src.losses.loss.reduce_weighted_values"."""
        owner = self.owner
        path = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
        return f"{path}.{self.name}"

    @property
    def problem(self) -> str:
        """What the installed release has changed, or ""."""
        if self.arguments is None:
            return self.row.problem
        function = getattr(self.owner, self.name, None)
        return f"{self.target} is no more" if function is None else difference(function, self.target, self.arguments)

    @property
    def row(self) -> Name:
        """Its row of the registry."""
        since = TENSORFLOW if self.target.startswith("tensorflow.") else KERAS
        return Name(self.target, self.arguments, f"Replaced: {self.reason}", since, self.test, self.until)

    def install(self) -> None:
        """Puts the wrapper in its place. A second call does nothing."""
        if self.arguments is None:
            setattr(self.owner, self.name, _Attribute(self.name, self.wrapper))
            return
        original = getattr(self.owner, self.name)
        if getattr(original, "_tfzero_patch", False):
            return

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(original, *args, **kwargs)

        patched._tfzero_patch = True  # type: ignore[attr-defined]
        setattr(self.owner, self.name, patched)


class _Attribute:
    """An attribute that objects keep as before, and of which a wrapper says what is read."""

    _tfzero_patch = True

    def __init__(self, name: str, wrapper: Callable) -> None:
        self._name, self._wrapper = name, wrapper

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        if holder is None:
            return self
        if self._name not in vars(holder):
            raise AttributeError(f"{type(holder).__name__!r} object has no attribute {self._name!r}")
        return self._wrapper(vars(holder)[self._name], holder)

    def __set__(self, holder: Any, value: Any) -> None:
        vars(holder)[self._name] = value


_registry: dict[str, Patch] = {}


def patch(owner: Any, name: str, arguments: str | None, reason: str, test: str, until: str = "") -> Callable:
    """Decorates `wrapper(original, *args, **kwargs)`, the replacement of `owner.name`. See `Patch`."""

    def register(wrapper: Callable) -> Callable:
        row = Patch(owner, name, arguments, reason, test, wrapper, until)
        _registry[row.target] = row
        return wrapper

    return register


def registry() -> tuple[Patch, ...]:
    """All patches that the installed versions need."""
    for home in _HOMES:
        importlib.import_module(home)
    return tuple(each for each in _registry.values() if each.row.is_used)


@functools.cache
def install() -> None:
    """Installs all patches, once.

    Raises:
        RuntimeError: if a function to be replaced is not as tfzero knows it; then none is replaced.
    """
    patches = registry()
    problems = [problem for each in patches if (problem := each.problem)]
    if problems:
        keras = importlib.import_module("keras")
        raise RuntimeError(
            f"This tfzero does not fit Keras {keras.__version__}: {'; '.join(problems)}. Install the versions of "
            "TensorFlow and Keras that tfzero's package metadata names."
        )
    for each in patches:
        each.install()
