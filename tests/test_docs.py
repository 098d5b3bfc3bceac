"""What is public has a docstring that tells of its arguments, and every listing in docstrings and the README runs."""

import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfzero

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INTERNAL = {"agreed_randomness"}  # of ZeroStrategy: for tfzero's own hooks in Keras


def public_objects():
    yield from ((name, getattr(tfzero, name)) for name in tfzero.__all__)
    for name, method in vars(tfzero.ZeroStrategy).items():
        if inspect.isfunction(method) and not name.startswith("_") and name not in INTERNAL:
            yield f"ZeroStrategy.{name}", method


OBJECTS = dict(public_objects())


def blocks(text):
    return BLOCK.findall(text)


def parameters(thing):
    """The names of what a caller gives."""
    own = inspect.isfunction(thing) or "__init__" in vars(thing)
    return [name for name in inspect.signature(thing).parameters if name != "self"] if own else []


def make_model():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(512, activation="relu"), keras.layers.Dense(3)])


def make_namespace():
    """What a listing may use: it need not make data, a strategy and a model that was trained a little."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(48, 8)).astype("float32"), random.normal(size=(48, 3)).astype("float32")
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"])
    with strategy.scope():
        model = make_model()
    model.compile("adam", "mse")
    model.train_on_batch(x, y)
    modules = {"keras": keras, "np": np, "tf": tf, "tfzero": tfzero}
    return {"strategy": strategy, "model": model, "make_model": make_model, "x": x, "y": y} | modules


def run(source, name, namespace):
    exec(compile(source, f"<{name}>", "exec"), namespace)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_name_tells_of_its_arguments(name):
    text = inspect.getdoc(OBJECTS[name])
    undocumented = [each for each in parameters(OBJECTS[name]) if not re.search(rf"^ +{each}: ", text, re.MULTILINE)]
    assert not undocumented
    assert blocks(text), "there is no example"


@pytest.mark.parametrize("name", OBJECTS)
def test_the_examples_of_a_public_name_run(name):
    for source in blocks(inspect.getdoc(OBJECTS[name])):
        run(source, name, {"__name__": "__main__", **make_namespace()})


def test_the_listings_of_the_readme_run_as_one_program():
    namespace = {"__name__": "__main__"}
    listings = blocks((ROOT / "README.md").read_text())
    assert len(listings) >= 4
    for number, source in enumerate(listings):
        run(source, f"README.md, listing {number}", namespace)
    assert len(namespace["losses"]) == 2  # of workers


def test_listings_are_found_and_fail_by_name():
    assert blocks("a\n```python\nb\nc\n```\nd\n```bash\ne\n```\n```python\nf\n```") == ["b\nc\n", "f\n"]
    with pytest.raises(NameError, match="absent"):
        run("absent", "test", {})
    assert parameters(tfzero.CheckpointCallback) == [
        "directory", "save_every_steps", "save_every_epochs", "keep", "asynchronous",
    ]  # fmt: skip
