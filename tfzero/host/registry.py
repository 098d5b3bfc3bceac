"""One row for every private name of TensorFlow and Keras that tfzero uses, and how a row is compared with a release.

`python -m tfzero.host` lists the rows, those of `host/patches.py` too, and tells which of them an installed release has
lost or changed. A name without a row is an error of the tests (`tests/test_house.py`), and a row without a use as well.
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
# A name that is there, of which only its place among `self.name = ...` in a class is known.
_SET_BY_A_METHOD = object()


@dataclass(frozen=True)
class Name:
    """A private name, or a public one of a private class or module.

    Args:
        path: where it is: "keras.src.trainers.trainer.Trainer._compute_loss". After a colon stands an attribute that
            this function gives to objects of others, or asks them for.
        takes: of a function the names of its parameters, of a class those of its bases, in order; None where neither
            is known, as of a module, of an attribute of objects and of what is written in C++.
        why: what it is for, and why no public name does.
        since: the first release in which it was as it is, as far as that was looked up.
        test: one that notices when it does something else, as "file::function".
    """

    path: str
    takes: str | None
    why: str
    since: str
    test: str

    @property
    def problem(self) -> str:
        """What the installed release has changed, or nothing."""
        found = find(self.path)
        return f"{self.path} is no more" if found is _MISSING else difference(found, self.path, self.takes)

    def __str__(self) -> str:
        takes = "" if self.takes is None else f"({self.takes})"
        return f"{self.path}{takes}\n    {self.why}\n    since {self.since}; {self.test}"


def rows(owner: str, since: str, test: str, names: Mapping[str, str]) -> tuple[Name, ...]:
    """Rows for several names of one class or module; of itself, for "".

    Args:
        owner: its path; "" if the names are whole paths.
        since: as in `Name`, of all of them.
        test: as in `Name`, of all of them; "file::" may be left away for `test_compat.py`.
        names: by "name(what it takes)", or by "name" where that is not known, why each is needed.
    """
    found = []
    for key, why in names.items():
        name, bracket, takes = key.removesuffix(")").partition("(")
        path = ".".join(part for part in (owner, name) if part)
        place = test if "::" in test else f"test_compat.py::{test}"
        found.append(Name(path, takes if bracket else None, why, since, place))
    return tuple(found)


def difference(found: object, path: str, takes: str | None) -> str:
    """How a function's parameters or a class's bases differ from those that tfzero knows; or nothing."""
    if takes is None or (present := taken_by(found)) == takes:
        return ""
    verb = "derives from" if inspect.isclass(found) else "takes"
    return f"{path} {verb} ({'nothing that is known' if present is None else present}), not ({takes})"


def taken_by(found: Any) -> str | None:
    """Names of the bases of a class, of the parameters of a function; None of anything else."""
    if inspect.isclass(found):
        return " ".join(base.__name__ for base in found.__bases__)
    found = found.fget if isinstance(found, property) else found
    try:
        return " ".join(inspect.signature(inspect.unwrap(found)).parameters) if callable(found) else None
    except ValueError:  # written in C++
        return None


def find(path: str) -> Any:
    """What stands at a path; of an attribute that only the objects of a class have, a sign that it is there."""
    path, _, given = path.partition(":")
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], 1):
        # A property of a class would not be found by `getattr`, if its metaclass has one of that name.
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
    """The attributes that the methods of a class, and of its bases, give their object."""
    return frozenset().union(*map(set_by_methods, owner.__mro__))


@functools.cache
def set_by_methods(owner: type) -> frozenset[str]:
    """The attributes that the methods of a class, without its bases, give their object: `self.name = ...`."""
    return frozenset(
        node.attr
        for node in ast.walk(_tree(owner))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def words_of(function: Any) -> frozenset[str]:
    """The attributes, texts and keywords of a function's source."""
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
