"""A strategy that nobody holds any more is let go, with its groups, variables and functions."""

import gc
import weakref

import keras
import numpy as np
import pytest
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.collectives.group import Group
from tfzero.collectives.pulse import _Watched
from tfzero.collectives.rings import Rings
from tfzero.extended import ZeroExtended


def test_a_dropped_group_keeps_its_place_among_the_counts():
    group = Group(["CPU:0"], 2, 0, Rings())
    watched = _Watched(group)
    for counter in group.lanes._counters[0][:2]:
        counter.assign(3)  # in flight
    counts = watched.counts()
    assert counts[:2] == [3, 3] and len(watched.places()) == 2
    del group, counter
    gc.collect()
    assert watched.counts() == [4, 4, *counts[2:]] and watched.places() == []


def _alive_after_each(strategies: int) -> list[int]:
    """How many strategies there are after each was made, trained with, and dropped."""
    x, y = np.ones((32, 8), "f4"), np.ones((32, 4), "f4")
    alive = []
    for _ in range(strategies):
        strategy = tfzero.ZeroStrategy(2, min_shard_elements=8)
        with strategy.scope():
            model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        model.compile("adam", "mse")
        model.fit(x, y, batch_size=8, verbose=0)
        del strategy, model
        keras.backend.clear_session()
        gc.collect()
        alive.append(sum(isinstance(each, ZeroExtended) for each in gc.get_objects()))
    return alive


def _alive_of_a_dropped_model(strategy) -> list[str]:
    """What is left of a model that was trained and dropped, while its strategy lives."""
    with strategy.scope():
        normalized = [keras.layers.Dense(17), keras.layers.BatchNormalization(synchronized=True)]
        model = keras.Sequential([keras.Input((8,)), *normalized, keras.layers.Dense(4)])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((32, 8), "f4"), np.ones((32, 4), "f4"), batch_size=8, verbose=0)
    variables = [variable.value for variable in (*model.variables, *model.optimizer.variables)]
    left = [(each.name, weakref.ref(each)) for each in (model, model.optimizer, *variables)]
    del model, normalized, variables
    keras.backend.clear_session()
    gc.collect()
    return [name for name, each in left if each() is not None]


def _alive_in_worker() -> tuple[list[list[str]], list[int]]:
    alive = _alive_after_each(3)
    return [_alive_of_a_dropped_model(tfzero.ZeroStrategy(stage, min_shard_elements=8)) for stage in (0, 3)], alive


@pytest.mark.parametrize("stage", [sweep(0), 2, sweep(3)])
def test_a_strategy_lets_go_of_dropped_models(stage):
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    assert _alive_of_a_dropped_model(strategy) == []


@pytest.fixture(scope="module")
def fleet():
    return tfzero.run_local(_alive_in_worker, workers=2, cpu_devices=2, timeout_seconds=FLEET_SECONDS)


def test_workers_let_go_of_dropped_models(fleet):
    assert [names for names, _ in fleet] == [[[], []]] * 2


def test_workers_let_go_of_dropped_strategies(fleet):
    for _, alive in fleet:
        assert max(alive) <= 1, alive
