"""One row for every private name of TensorFlow and Keras that tfzero uses, and how a row is compared with a release.

`python -m tfzero.host` lists the rows, those of `host/patches.py` too, and says which of them the installed release has
lost or changed. The tests fail for a name without a row and for a row without a use (`tests/test_house.py`).
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = object()
# Stands for a name that is there, but is only seen in source text, such as `self.name = ...` in a class.
_SET_BY_A_METHOD = object()


@dataclass(frozen=True)
class Name:
    """A private name, or a public one of a private class or module.

    Args:
        path: where it is: "keras.src.trainers.trainer.Trainer._compute_loss". After a colon stands an attribute that
            this function sets on other objects, or reads from them.
        takes: names of a function's parameters, or of a class's bases, in order; None where neither is known: for a
            module, for an attribute of objects, and for C++ code.
        why: what it is for, and why no public name serves.
        since: the first release in which it was as it is, as far as that was looked up.
        test: a test that notices when it does something else, as "file::function".
    """

    path: str
    takes: str | None
    why: str
    since: str
    test: str

    @property
    def problem(self) -> str:
        """What the installed release has changed, or ""."""
        found = find(self.path)
        return f"{self.path} is no more" if found is _MISSING else difference(found, self.path, self.takes)

    def __str__(self) -> str:
        takes = "" if self.takes is None else f"({self.takes})"
        return f"{self.path}{takes}\n    {self.why}\n    since {self.since}; {self.test}"


def rows(owner: str, since: str, test: str, names: Mapping[str, str]) -> tuple[Name, ...]:
    """Rows for several names of one class or module; the name "" is the class or module itself.

    Args:
        owner: its path; "" if the names are whole paths.
        since: as in `Name`, for all of them.
        test: as in `Name`, for all of them; "file::" may be omitted for `test_compat.py`.
        names: why each is needed, by "name(what it takes)", or by "name" where that is not known.
    """
    found = []
    for key, why in names.items():
        name, bracket, takes = key.removesuffix(")").partition("(")
        path = ".".join(part for part in (owner, name) if part)
        place = test if "::" in test else f"test_compat.py::{test}"
        found.append(Name(path, takes if bracket else None, why, since, place))
    return tuple(found)


def difference(found: object, path: str, takes: str | None) -> str:
    """How a function's parameters or a class's bases differ from those that tfzero knows, or ""."""
    if takes is None or (present := taken_by(found)) == takes:
        return ""
    verb = "derives from" if inspect.isclass(found) else "takes"
    return f"{path} {verb} ({'nothing that is known' if present is None else present}), not ({takes})"


def taken_by(found: Any) -> str | None:
    """Names of a class's bases or of a function's parameters; None for anything else."""
    if inspect.isclass(found):
        return " ".join(base.__name__ for base in found.__bases__)
    found = found.fget if isinstance(found, property) else found
    try:
        return " ".join(inspect.signature(inspect.unwrap(found)).parameters) if callable(found) else None
    except ValueError:  # written in C++
        return None


def find(path: str) -> Any:
    """The object at a path; a marker if it is missing, or if only the objects of a class have it."""
    path, _, given = path.partition(":")
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], 1):
        # `getattr` would not find a property of a class whose metaclass has one of the same name.
        look = inspect.getattr_static if inspect.isclass(found) else getattr
        inner = look(found, part, _MISSING)
        if inner is _MISSING and inspect.ismodule(found):  # a module that nobody has imported yet
            is_there = any(module.name == part for module in pkgutil.iter_modules(getattr(found, "__path__", ())))
            inner = importlib.import_module(".".join(parts[: k + 1])) if is_there else _MISSING
        if inner is _MISSING and inspect.isclass(found) and part in attributes_of_objects(found):
            inner = _SET_BY_A_METHOD
        if inner is _MISSING:
            return _MISSING
        found = inner
    return found if not given else _SET_BY_A_METHOD if given in words_of(found) else _MISSING


def attributes_of_objects(owner: type) -> frozenset[str]:
    """Attributes that the methods of a class and of its bases set on their object."""
    return frozenset().union(*map(set_by_methods, owner.__mro__))


@functools.cache
def set_by_methods(owner: type) -> frozenset[str]:
    """Attributes that the methods of a class, without its bases, set on their object: `self.name = ...`."""
    return frozenset(
        node.attr
        for node in ast.walk(_tree(owner))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def words_of(function: Any) -> frozenset[str]:
    """Attributes, strings and keywords in a function's source."""
    nodes = list(ast.walk(_tree(inspect.unwrap(function))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(attributes | keywords | texts)


def _tree(found: Any) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(found)))
    except (OSError, TypeError):  # written in C++, or in `builtins`
        return ast.Module([], [])
