"""Refuses a Keras that does not run on TensorFlow, and versions that tfzero is not made for, before Keras is imported.

On another backend Keras ignores `tf.distribute.Strategy`: every worker would silently train a model of its own.
"""

import json
import os
import sys
from pathlib import Path

from tfzero.host import versions


def chosen_backend() -> tuple[str, str]:
    """The backend that Keras has, or will have once it is imported, and where that is set."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "backend"):
        return keras.backend.backend(), "as it was imported"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "by the environment variable KERAS_BACKEND"
    file = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "keras.json")
    try:
        written = json.loads(file.read_text())
    except (OSError, ValueError):  # Keras uses its default then, too
        written = None
    backend = written.get("backend") if isinstance(written, dict) else None
    return (backend, f"by {file}") if isinstance(backend, str) else ("tensorflow", "by default")


def require_tensorflow() -> None:
    """Checks that Keras runs on TensorFlow.

    Raises:
        ImportError: if Keras has, or would have, another backend.
    """
    backend, source = chosen_backend()
    if backend != "tensorflow":
        raise ImportError(
            f"tfzero works with Keras on TensorFlow, but Keras's backend is {backend!r}, {source}: set "
            "KERAS_BACKEND=tensorflow in the environment before Python starts."
        )


require_tensorflow()
versions.require()
