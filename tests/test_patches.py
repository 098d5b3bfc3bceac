"""What tfzero replaces in Keras is listed, is installed by the strategy, and is noticed when a release changes it."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.host import __main__ as listing
from tfzero.host import patches
from tfzero.host.registry import Name

TESTS = Path(__file__).parent
ROWS = {row.target: row for row in patches.registry()}


def train(strategy_class, stage: int) -> list[float]:
    """Trains a clipped model on ragged batches, on a strategy and on one device; gives the weights.

    Stock Keras, unpatched, ends with other weights.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    def weights(strategy):
        keras.utils.set_random_seed(1)
        random = np.random.default_rng(0)
        x, y = random.normal(size=(7, 8)).astype("float32"), random.normal(size=(7, 1)).astype("float32")
        with strategy.scope():
            model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(5), keras.layers.Dense(1)])
        no_xla = {} if isinstance(strategy, strategy_class) else {"jit_compile": False}
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1, epsilon=1e-3), "mse", **no_xla)
        model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    here = weights(strategy_class(stage=stage, min_shard_elements=1))
    np.testing.assert_allclose(here, weights(tf.distribute.get_strategy()), rtol=2e-4, atol=2e-5)
    return here.tolist()


SCRIPT = """
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
{imports}

{function}
train(ZeroStrategy, 2)
"""


@pytest.mark.parametrize(
    "imports",
    [
        sweep("from tfzero import ZeroStrategy"),
        "from tfzero.strategy import ZeroStrategy",
        sweep("import tfzero.strategy; ZeroStrategy = tfzero.strategy.ZeroStrategy"),
    ],
)
def test_whatever_the_import_path_the_result_is_that_of_one_device(imports, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(imports=imports, function=inspect.getsource(train)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=FLEET_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workers_that_get_the_class_itself_train_as_one_device():
    """Cloudpickle names it "tfzero.strategy.ZeroStrategy", and a worker imports nothing else."""
    from tfzero.strategy import ZeroStrategy

    first, second = tfzero.run_local(train, workers=2, args=(ZeroStrategy, 1), timeout_seconds=FLEET_SECONDS)
    assert first == second


def test_importing_tfzero_patches_nothing():
    names = ", ".join(name for name in sorted(tfzero.__all__))
    code = (
        f"from tfzero import {names}\n"
        "from tfzero.host import patches\n"
        "assert not any(hasattr(getattr(r.owner, r.name), '_tfzero_patch') for r in patches.registry())\n"
        "patches.install()\n"
        "assert all(hasattr(getattr(r.owner, r.name), '_tfzero_patch') for r in patches.registry())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=FLEET_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ROWS)
def test_what_is_patched_is_as_it_was(target):
    assert ROWS[target].problem == ""


@pytest.mark.parametrize("target", ROWS)
def test_each_patch_names_a_test_that_is_there(target):
    file, _, name = ROWS[target].test.partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_patched_function_that_changed_is_named_and_nothing_is_installed(monkeypatch):
    class Owner:
        def kept(self, x):
            return x

        def changed(self, x, more):
            return x + more

    kept = Owner.kept
    rows = [
        patches.Patch(Owner, name, "self x", "", "", lambda original, *args: original(*args))
        for name in ("kept", "changed", "gone")
    ]
    monkeypatch.setattr(patches, "registry", lambda: rows)
    with pytest.raises(RuntimeError, match=r"(?s)changed takes \(self x more\), not \(self x\).*gone is no more"):
        patches.install.__wrapped__()
    assert Owner.kept is kept


def test_the_registry_is_listed():
    done = subprocess.run([sys.executable, "-m", "tfzero.host"], capture_output=True, text=True, timeout=FLEET_SECONDS)
    assert done.returncode == 0, done.stderr
    assert all(target in done.stdout and ROWS[target].reason in done.stdout for target in ROWS)
    names = listing.names()
    assert all(str(row) in done.stdout for row in names)
    assert f"{len(names)} private names and {len(ROWS)} replaced functions, compared with tensorflow" in done.stdout
    assert "none is missing or changed." in done.stdout


def test_what_a_release_has_changed_is_listed_and_ends_with_1(monkeypatch, capsys):
    base = "keras.src.trainers.trainer.Trainer"
    rows = [
        Name(f"{base}.fit_anew", None, "why", "since", "test"),
        Name("keras.src.no_such_module.f", None, "why", "since", "test"),
        Name(f"{base}._loss_tracker", None, "why", "since", "test"),
        Name(f"{base}._compute_loss", "self x", "why", "since", "test"),
        Name("keras.src.models.sequential.Sequential", "Layer", "why", "since", "test"),
        Name(f"{base}.compile:_no_such_attribute", None, "why", "since", "test"),
        Name(f"{base}.compile:_loss_tracker", None, "why", "since", "test"),
    ]
    monkeypatch.setattr(listing, "names", lambda: tuple(rows))
    assert listing.main() == 1
    told = capsys.readouterr().out.partition("compared with")[2].splitlines()[1:]
    assert told == [
        f"{base}.fit_anew is no more",
        "keras.src.no_such_module.f is no more",
        f"{base}._compute_loss takes (self x y y_pred sample_weight training), not (self x)",
        "keras.src.models.sequential.Sequential derives from (Model), not (Layer)",
        f"{base}.compile:_no_such_attribute is no more",
    ]


def test_functions_that_cannot_be_listed_are_told(monkeypatch, capsys):
    def registry():
        raise ImportError("cannot import name 'gone'")

    monkeypatch.setattr(patches, "registry", registry)
    assert listing.main() == 1
    assert "What is replaced cannot be listed: cannot import name 'gone'" in capsys.readouterr().out


def test_how_many_there_are():
    """A number to go down."""
    assert len(ROWS) <= 22


@pytest.mark.sweep
@pytest.mark.parametrize("target", ROWS)
def test_the_named_test_fails_without_the_patch(target):
    named = ROWS[target].test
    settings = ["-q", "-x", "-n", "0", "--timeout=120", "--timeout-method=thread", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *settings, f"{TESTS / named}"]
    environment = os.environ | {"TFZERO_TEST_WITHOUT": target}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=TESTS.parent, env=environment, timeout=FLEET_SECONDS
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
