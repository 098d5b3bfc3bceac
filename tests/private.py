"""Finds the private names of TensorFlow and Keras in the syntax trees of tfzero's modules."""

import ast
import re

PACKAGES = ("tensorflow.python", "tf.python", "keras.src")
PRIVATE = re.compile(r"_[a-z]\w*")
OURS = "_tfzero_"  # tfzero's notes on objects of others
OF_PYTHON = {"_exit"}  # of `os`
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
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


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
    skipped = of_patches(tree)
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


def beyond(tree, modules):
    """What is reached by way of private modules that `tfzero.host` has imported, but for what is patched."""
    skipped = of_patches(tree)
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and id(node) not in skipped
        and isinstance(node.value, ast.Attribute | ast.Name)
        and ast.unparse(node.value).rpartition(".")[2] in modules
    }


def overrides(owner):
    """The private names that a class of tfzero defines though a class of another package, from which it derives, has them.

    Also those that its methods give the object, as far as the other's methods give it them too.
    """
    from tfzero.host.registry import attributes_of_objects, set_by_methods

    others = [each for each in owner.__mro__[1:] if each.__module__.partition(".")[0] != "tfzero"]
    mine = {*vars(owner), *set_by_methods(owner)}
    return {
        name
        for name in mine
        if is_private(name) and any(name in vars(each) or name in attributes_of_objects(each) for each in others)
    }
