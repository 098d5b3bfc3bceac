"""Versions of TensorFlow and Keras that tfzero is not made for are refused in one sentence, and so is Keras 2."""

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfzero
from tfzero.host import notes, registry, versions
from tfzero.training.stock_optimizers import check_wrappable

ROOT = Path(__file__).parents[1]


def pretend(monkeypatch, **found):
    for library, version in found.items():
        monkeypatch.setattr(importlib.import_module(library), "__version__", version)


@pytest.mark.parametrize(
    "found",
    [
        {"tensorflow": "2.18.1", "keras": "3.10.0"},
        {"tensorflow": "2.21.0", "keras": "3.15.1"},
        {"tensorflow": "2.21.0-rc1", "keras": "3.15.0.dev2026010203"},
    ],
)
def test_these_are_taken(monkeypatch, found):
    pretend(monkeypatch, **found)
    versions.require()


@pytest.mark.parametrize(
    ("library", "version", "told"),
    [
        (
            "keras",
            "3.9.2",
            "tfzero works with Keras 3.10 to 3.15, but Keras 3.9.2 is installed: "
            "`python -m pip install 'keras>=3.10,<3.16'`.",
        ),
        ("keras", "2.15.0", "but Keras 2.15.0 is installed"),
        ("keras", "3.16.0", "<3.16'`, or set TFZERO_ANY_LATER_VERSION=1 to try this one."),
        (
            "tensorflow",
            "2.17.1",
            "tfzero works with TensorFlow 2.18 to 2.21, but TensorFlow 2.17.1 is installed: "
            "`python -m pip install 'tensorflow>=2.18,<2.22'`.",
        ),
        ("tensorflow", "2.22.0", "to try this one."),
        ("tensorflow", "of my own", "but TensorFlow of my own is installed"),
    ],
)
def test_others_are_refused(monkeypatch, library, version, told):
    pretend(monkeypatch, **{library: version})
    with pytest.raises(ImportError, match=re.escape(told)) as caught:
        versions.require()
    assert "\n" not in str(caught.value)


def test_a_later_one_may_be_tried_and_an_earlier_one_may_not(monkeypatch):
    monkeypatch.setenv("TFZERO_ANY_LATER_VERSION", "1")
    pretend(monkeypatch, tensorflow="2.22.0", keras="4.0.0")
    versions.require()
    pretend(monkeypatch, keras="3.9.0")
    with pytest.raises(ImportError, match="Keras 3.9.0"):
        versions.require()


def test_the_package_names_the_same_versions():
    text = (ROOT / "pyproject.toml").read_text()
    for library, (first, last) in versions.RANGES.items():
        assert f'"{library}>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"' in text


def imported(environment: dict, before: str = "") -> str:
    code = f"import sys\n{before}\ntry: from tfzero import ZeroStrategy\nexcept ImportError as error: print(error)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_tfzero_asks_before_keras_is_imported(tmp_path):
    metadata = "import importlib.metadata as m; real = m.version\n"
    metadata += "m.version = lambda name: '3.9.0' if name == 'keras' else real(name)\n"
    metadata += "import atexit; atexit.register(lambda: print('keras' in sys.modules))"
    assert imported({}, metadata).splitlines() == [
        "tfzero works with Keras 3.10 to 3.15, but Keras 3.9.0 is installed: "
        "`python -m pip install 'keras>=3.10,<3.16'`.",
        "False",
    ]


@pytest.mark.parametrize("value", ["1", "True"])
def test_keras_2_as_tf_keras(monkeypatch, value):
    """It changes `tf.keras` alone. Ray sets it for all of its workers."""
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", value)
    versions.require()


@pytest.fixture
def tf_keras(monkeypatch):
    """A stand-in for the package: it makes a variable, and has a model."""
    module = types.ModuleType("tf_keras")
    source = (
        "import tensorflow as tf\n"
        "class Model: pass\n"
        "def dense(): return tf.Variable([1.0], name='kernel')\n"
        "def call(function): return function()\n"
    )
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "tf_keras", module)
    return module


def test_models_of_keras_2(tf_keras):
    strategy = tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"])
    told = "trains models of Keras 3, but Keras 2 creates the variable 'kernel' under it"
    with strategy.scope():
        with pytest.raises(TypeError, match=told):
            tf_keras.dense()
        kept = keras.Variable(np.ones(3, "float32"))  # Keras 3 beside it
        with pytest.raises(TypeError, match=told):
            tf_keras.call(lambda: tf.Variable([1.0], name="kernel"))
    assert len(kept.value.values) == 2
    for take in (
        check_wrappable,
        lambda model: tfzero.audit(model, None),
        lambda model: tfzero.estimate_memory(model, "adam", 2),
        lambda model: tfzero.save_checkpoint(model, "somewhere"),
        lambda model: tfzero.load_checkpoint(model, "somewhere"),
    ):
        with pytest.raises(
            TypeError, match="received Model of Keras 2 \\(the package tf_keras, .*: .*`import keras`\\)"
        ):
            take(tf_keras.Model())


# Names that only some versions have.


def row(path, since, until=""):
    return registry.Name(path, None, "why", since, "test", until)


def test_a_name_is_looked_for_in_the_versions_that_use_it(monkeypatch):
    pretend(monkeypatch, keras="3.13.2", tensorflow="2.18.1")
    gone = "keras.src.no_such_module"
    assert row(gone, "at least Keras 3.10").problem == row(gone, "Keras 3.13", "3.13").problem == f"{gone} is no more"
    assert row(gone, "Keras 3.14").problem == row(gone, "at least Keras 3.10", "3.12").problem == ""
    assert row(gone, "TensorFlow 2.19").problem == "" != row(gone, "TensorFlow 2.18").problem
    assert "since Keras 3.11 until 3.12;" in str(row(gone, "Keras 3.11", "3.12"))


def test_notes_on_errors(monkeypatch, capsys):
    error = ValueError("what happened")
    notes.add_note(error, "first")
    assert error.__notes__ == ["first"]
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    notes.add_note(error, "second")
    assert error.__notes__ == ["first", "second"] and capsys.readouterr().err.splitlines()[-1] == "second"
