"""Lists all private names of TensorFlow and Keras and all replaced functions, and says which a release has changed.

    python -m tfzero.host

The exit status is 1 if any of them is missing or changed in the installed versions.
"""

import os
import sys

from tfzero.host import versions

if __name__ == "__main__":
    os.environ[versions.ANY_LATER] = "1"  # what a later one has changed is listed here

from tfzero.host import backend  # noqa: F401, isort: skip. It refuses other backends before Keras is imported.

from tfzero.host import data_names, keras_names, patches, tensorflow_names
from tfzero.host.registry import Name


def names() -> tuple[Name, ...]:
    """Returns a row for each private name."""
    return (*tensorflow_names.ROWS, *keras_names.ROWS, *data_names.ROWS)


def replaced() -> tuple[tuple[Name, ...], list[str]]:
    """Returns a row for each replaced function, and why they cannot be listed (say, a whole module is gone)."""
    try:
        return tuple(patch.row for patch in patches.registry()), []
    except (ImportError, AttributeError) as error:
        return (), [f"What is replaced cannot be listed: {error}"]


def main() -> int:
    patched, problems = replaced()
    rows = (*names(), *patched)
    for row in rows:
        print(row)
    problems += [problem for row in rows if (problem := row.problem)]
    compared = " and ".join(f"{name} {versions.full(name)}" for name in versions.RANGES)
    print(f"\n{len(names())} private names and {len(patched)} replaced functions, compared with {compared}:")
    print("\n".join(problems) or "none is missing or changed.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
