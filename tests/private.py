"""Finds the private names of TensorFlow and Keras in the syntax trees of tfzero's modules."""

import ast
import inspect
import re

from tfzero.host import registry

PACKAGES = ("tensorflow.python", "tf.python", "keras.src")
PRIVATE = re.compile(r"_[a-z]\w*")
HOSTS = ("tensorflow", "keras")
OURS = "_tfzero_"  # tfzero's notes on objects of others
OF_PYTHON = {"_exit"}  # of `os`
OF_CLASSES = {"_abc_impl", "_is_protocol"}  # what Python gives a class
HIDDEN = "tf.__internal__."


def is_private(name):
    return bool(PRIVATE.fullmatch(name)) and not name.startswith(OURS) and name not in OF_PYTHON


def defined_names(tree):
    """What a module defines: functions, classes, variables, fields, and what methods give their own object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def imported(tree):
    """What a module imports of private packages, by the names that it has there."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(tuple(f"{p}." for p in PACKAGES))
        for alias in node.names
    }


def chains(tree):
    """All "a.b.c" of a tree that are no part of a longer one."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            yield ast.unparse(node)


def reached(tree):
    """The paths that a module reaches by what it imports of private packages, and those of `tf.__internal__`."""
    names = imported(tree)
    found = set(names.values())
    for chain in chains(tree):
        first, _, rest = chain.partition(".")
        if first in names and rest:
            found.add(f"{names[first]}.{rest}")
        if chain.startswith(HIDDEN):
            found.add(chain.replace("tf.", "tensorflow.", 1))
    return {path for path in found if "(" not in path}


def of_patches(tree):
    """The nodes within the arguments of `patch(...)`: each is a row of the registry."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "patch"]
    return {id(node) for call in calls for argument in call.args for node in ast.walk(argument)}


def used(tree):
    """Private names that are attributes of something, or text by which an attribute is asked for."""
    joined = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr))
    skipped = of_patches(tree) | {id(part) for each in joined for part in each.values}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value


def foreign_names(tree, ours):
    """Private names that are used and that tfzero, whose names are `ours`, does not define."""
    return {name for name in used(tree) if name not in ours}


def asked_of_others(tree):
    """Private names that are attributes of anything but `self` and `cls`."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr))
    return {node.attr for node in nodes if not is_self(node.value)}


def imported_modules(tree):
    """The names of the private modules that a module imports, and does not only take something from."""
    return {name for name, path in imported(tree).items() if inspect.ismodule(registry.find(path))}


def beyond(tree, modules):
    """What is reached by way of private modules that `tfzero.host` has imported, but for what is patched."""
    skipped = of_patches(tree)
    taken = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    names = {a.asname or a.name for n in taken for a in n.names if f"{n.module}.".startswith("tfzero.host.")}
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and id(node) not in skipped
        and (
            (isinstance(node.value, ast.Attribute) and node.value.attr in modules)
            or (isinstance(node.value, ast.Name) and node.value.id in modules & names)
        )
    }


def overrides(owner):
    """The private names that a class of tfzero defines though it has them from a class of another package.

    Also those that the methods of both give the object.
    """
    others = [each for each in owner.__mro__[1:] if each.__module__.partition(".")[0] in HOSTS]
    mine = {*vars(owner), *registry.set_by_methods(owner)} - OF_CLASSES
    return {
        name
        for name in mine
        if is_private(name)
        and any(name in vars(each) or name in registry.attributes_of_objects(each) for each in others)
    }
