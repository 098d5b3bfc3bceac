"""Imports every module of the installed tfzero in one process, so that a wheel that lacks one fails."""

import importlib
import pkgutil

import tfzero


def fail(name: str) -> None:
    raise ImportError(f"{name} cannot be imported")


names = [found.name for found in pkgutil.walk_packages(tfzero.__path__, "tfzero.", onerror=fail)]
for name in names:
    if not name.endswith(".__main__"):  # a command line, which would run
        importlib.import_module(name)
print(f"{len(names)} modules of {tfzero.__path__[0]} imported")
