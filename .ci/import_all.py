"""Imports every module of the installed tfzero in one process, so that a wheel that lacks one fails.

With `--host` it then runs `python -m tfzero.host`, which imports as much.
"""

import importlib
import pkgutil
import runpy
import sys

import tfzero


def fail(name: str) -> None:
    raise ImportError(f"{name} cannot be imported")


names = [found.name for found in pkgutil.walk_packages(tfzero.__path__, "tfzero.", onerror=fail)]
for name in names:
    if not name.endswith(".__main__"):  # a command line, which would run
        importlib.import_module(name)
print(f"{len(names)} modules of {tfzero.__path__[0]} imported")
if "--host" in sys.argv:
    runpy.run_module("tfzero.host", run_name="__main__")
