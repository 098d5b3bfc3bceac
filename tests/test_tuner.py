"""KerasTuner over a strategy: the same trials, scores and best model as on one device."""

import contextlib
from pathlib import Path

import keras
import numpy as np
import oracle
import pool
import pytest

import tfzero

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]  # KerasTuner itself calls what is deprecated


def build(hp) -> keras.Model:
    units = hp.Int("units", 8, 40, step=8)
    make = keras.initializers.GlorotUniform
    hidden = keras.layers.Dense(units, activation="relu", kernel_initializer=make(seed=1))
    model = keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(3, kernel_initializer=make(seed=2))])
    model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-3, 1e-1, sampling="log")), "mse", jit_compile=False)
    return model


def search(strategy, directory: str, kind: str, seed: int = 7) -> dict:
    """Searches, and loads the best model."""
    import keras_tuner

    kinds = {
        "random": lambda **settings: keras_tuner.RandomSearch(build, max_trials=3, **settings),
        "hyperband": lambda **settings: keras_tuner.Hyperband(build, max_epochs=4, factor=2, **settings),
        "bayesian": lambda **settings: keras_tuner.BayesianOptimization(
            build, max_trials=4, num_initial_points=2, **settings
        ),
    }
    settings = {"objective": "val_loss", "seed": seed, "directory": directory, "project_name": kind}
    tuner = kinds[kind](distribution_strategy=strategy, max_consecutive_failed_trials=1, **settings)
    x, y = oracle.Data().arrays()
    tuner.search(x[:30], y[:30], validation_data=(x[30:], y[30:]), batch_size=8, epochs=2, shuffle=False, verbose=0)
    trials = tuner.oracle.trials
    (best,) = tuner.get_best_models()
    with strategy.scope() if strategy else contextlib.nullcontext():
        predictions = best.predict(x, verbose=0)
    return {
        "scores": {name: trial.score for name, trial in trials.items()},
        "values": {name: trial.hyperparameters.values for name, trial in trials.items()},
        "best": tuner.get_best_hyperparameters()[0].values,
        "weights": best.get_weights(),
        "predictions": predictions,
        "is ours": best.distribute_strategy is strategy if strategy else None,
    }


def assert_same(ours: dict, reference: dict) -> None:
    assert ours["is ours"]
    assert sorted(ours["values"]) == sorted(reference["values"])  # a search that goes on reads them in any order
    for name, score in reference["scores"].items():
        assert ours["scores"][name] == pytest.approx(score, rel=2e-4)
        for key, value in reference["values"][name].items():
            assert ours["values"][name][key] == (pytest.approx(value, rel=1e-3) if key == "rate" else value)
    assert ours["best"]["units"] == reference["best"]["units"]
    for mine, theirs in zip(ours["weights"], reference["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours["predictions"], reference["predictions"], rtol=1e-3, atol=1e-4)


KINDS = ["random", "hyperband", "bayesian"]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {kind: search(None, str(folder), kind) for kind in KINDS}


def test_on_two_devices(one_device, tmp_path):
    strategy = tfzero.ZeroStrategy(3, devices=["CPU:0", "CPU:1"], min_shard_elements=8)
    assert_same(search(strategy, str(tmp_path), "random"), one_device["random"])


def search_in_worker(folder: str) -> dict:
    strategy = tfzero.ZeroStrategy(3, min_shard_elements=8)
    results = {kind: search(strategy, folder, kind) for kind in KINDS}
    results["again"] = search(strategy, folder, "random")  # goes on from what is there, and searches no more
    try:
        search(strategy, str(Path(folder, "other_seeds")), "random", seed=1 + strategy.extended.mesh.worker)
    except RuntimeError as error:
        results["other seeds"] = str(error)
    return results


def test_on_two_workers(one_device, tmp_path):
    for result in pool.run(search_in_worker, args=(str(tmp_path),)):
        for kind in KINDS:
            assert_same(result[kind], one_device[kind])
        assert_same(result["again"], one_device["random"])
        assert "differ" in result["other seeds"] or "on worker 1" in result["other seeds"]
    assert not list(tmp_path.rglob("workertemp*"))
