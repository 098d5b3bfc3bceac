"""What stands in files and in the wheel under the package's names."""

from pathlib import Path

import keras
import pytest

import tfzero

ROOT = Path(__file__).parents[1]


def test_an_optimizer_is_found_by_its_registered_name():
    """Wherever the class comes to stand."""
    config = keras.saving.serialize_keras_object(tfzero.ZeroOptimizer(keras.optimizers.Adam(0.25)))
    assert config["registered_name"] == "tfzero>ZeroOptimizer"
    moved = config | {"module": "tfzero.a_module_of_the_future"}
    again = keras.saving.deserialize_keras_object(moved)
    assert type(again) is tfzero.ZeroOptimizer and float(again.learning_rate) == 0.25


def test_an_optimizer_of_a_file_without_that_name_is_found():
    """Once a strategy was made."""
    tfzero.ZeroStrategy()
    config = keras.saving.serialize_keras_object(tfzero.ZeroOptimizer(keras.optimizers.Adam(0.25)))
    old = config | {"module": "tfzero.optimizer", "registered_name": "ZeroOptimizer"}
    assert type(keras.saving.deserialize_keras_object(old)) is tfzero.ZeroOptimizer


def test_the_wheel_has_subpackages_and_says_that_it_is_typed(tmp_path):
    setuptools, tomllib = pytest.importorskip("setuptools"), pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (ROOT / "tfzero" / "py.typed").read_bytes() == b""
    assert "py.typed" in settings["package-data"]["tfzero"]
    for package in ("tfzero", "tfzero/plan", "tfzero/plan/deep", "tests", "tfzeroes"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    found = setuptools.find_packages(str(tmp_path), **settings["packages"]["find"])
    assert sorted(found) == ["tfzero", "tfzero.plan", "tfzero.plan.deep"]
