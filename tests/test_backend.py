"""Keras on another backend than TensorFlow is refused in one sentence, wherever the choice stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def told(code: str, **environment) -> str:
    """What a process says that must load neither Keras nor a backend's library."""
    code = f"import sys\n{code}\n" + (
        "except ImportError as error: print(error)\n"
        "loaded = [name for name in ('jax', 'torch', 'keras.src') if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WAYS = [
    "import tfzero\ntry: tfzero.ZeroStrategy",
    "try: from tfzero import ZeroStrategy",
    "try: from tfzero.strategy import ZeroStrategy",
    "import tfzero\ntry: tfzero.CheckpointCallback",
    "import tfzero\ntry: tfzero.estimate_memory",
    "import tfzero\ntry: tfzero.ZeroOptimizer",
]


@pytest.mark.parametrize("way", WAYS)
def test_the_environment_variable(way):
    text = told(way, KERAS_BACKEND="jax")
    assert text == (
        "tfzero works with Keras on TensorFlow, but Keras's backend is 'jax', by the environment variable "
        "KERAS_BACKEND: set KERAS_BACKEND=tensorflow in the environment before Python starts."
    )


def test_the_configuration_file(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    text = told(WAYS[0], KERAS_HOME=str(tmp_path))
    assert f"Keras's backend is 'torch', by {tmp_path / 'keras.json'}: set KERAS_BACKEND=tensorflow" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"backend": 3}', "\x00"])
def test_a_configuration_file_that_says_nothing(tmp_path, content):
    (tmp_path / "keras.json").write_text(content)
    code = "from tfzero.host.backend import chosen_backend\ntry: print(chosen_backend())"
    assert told(code, KERAS_HOME=str(tmp_path)) == "('tensorflow', 'by default')"


def test_keras_that_has_been_imported():
    """As a notebook has that imported Keras first; the environment may say something else since."""
    fake = (
        "import types; keras = types.ModuleType('keras'); keras.backend = types.ModuleType('backend')\n"
        "keras.backend.backend = lambda: 'jax'; sys.modules['keras'] = keras\n"
    )
    text = told(fake + WAYS[0], KERAS_BACKEND="tensorflow")
    assert "Keras's backend is 'jax', as it was imported" in text


def test_what_needs_no_keras_is_there():
    assert (
        told("import tfzero, tfzero.launch\ntry: print(tfzero.run_local.__name__)", KERAS_BACKEND="jax") == "run_local"
    )
