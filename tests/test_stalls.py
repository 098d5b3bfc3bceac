"""Workers that stand still for a while and go on: one watch, and one limit, that of `timeout_seconds`."""

import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from marks import FLEET_SECONDS, sweep
from oracle import Data, dense_model

import tfzero
from tfzero.collectives import joining
from tfzero.host import distributed

STALL_SECONDS = 15  # more than the ten of TensorFlow's own watch
SHORT_SECONDS = 3


def stand_still(seconds):
    """Stops this process for so long, from without."""
    stop = f"import os, sys, time; os.kill({os.getpid()}, 19); time.sleep({seconds}); os.kill({os.getpid()}, 18)"
    subprocess.Popen([sys.executable, "-S", "-c", stop])
    time.sleep(1)


class StandStill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            stand_still(STALL_SECONDS)


def train(model, callbacks=()):
    x, y = Data().arrays()
    model.compile("adam", "categorical_crossentropy")
    model.fit(x, y, batch_size=15, epochs=2, verbose=0, shuffle=False, callbacks=list(callbacks))
    return [np.array(value) for value in model.get_weights()]


def _train_with_a_stall():
    """In a worker: weights of a model trained meanwhile, of one made and trained later, and the kind of watch."""
    keras.utils.set_random_seed(7)
    strategy = tfzero.ZeroStrategy(2, min_shard_elements=1, timeout_seconds=60)
    with strategy.scope():
        model = dense_model()
    before = model.get_weights()
    began = time.monotonic()
    weights = train(model, [StandStill()] if strategy.cluster_resolver.task_id == 1 else [])
    seconds = time.monotonic() - began
    with strategy.scope():
        later = dense_model()
    trained = seconds, before, weights, later.get_weights(), train(later), distributed.watch()
    return trained, _wait_in_a_second_strategy()


@pytest.fixture(scope="module", params=[1, sweep(2)])
def found(request):
    """What came of it on each worker: of the stall, and then of the wait in a second strategy."""
    return tfzero.run_local(_train_with_a_stall, cpu_devices=request.param, timeout_seconds=FLEET_SECONDS)


def test_a_worker_that_stands_still_goes_on_training(found):
    first, second = (trained for trained, _ in found)
    for mine, theirs in zip(first[1:3] + first[3:5], second[1:3] + second[3:5], strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))
    for seconds, *_, watch in (first, second):
        assert seconds > STALL_SECONDS
        assert watch == ""
    for before, after in (first[1:3], first[3:5]):
        reference = dense_model()
        reference.set_weights(before)
        for mine, theirs in zip(after, train(reference), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


def _wait_in_a_second_strategy():
    """In a worker: what its report says of the limit, how long it waits for the others, and the error."""
    tfzero.ZeroStrategy(2, timeout_seconds=60)
    strategy = tfzero.ZeroStrategy(2, timeout_seconds=SHORT_SECONDS)
    told = strategy.report().options["timeout_seconds"]
    limits = {strategy.channel.timeout_seconds, strategy.saving_channel.timeout_seconds, strategy.stop.timeout_seconds}
    [joined] = joining._joined.values()
    limits |= {each.timeout_seconds for each in joined.connections["links"]}
    began = time.monotonic()
    if strategy.cluster_resolver.task_id == 1:
        time.sleep(SHORT_SECONDS + 3)
    try:
        strategy.channel.all_gather("waiting", None)
    except TimeoutError as error:
        return str(told), limits, time.monotonic() - began, str(error)


def test_the_limit_of_a_second_strategy_takes_effect(found):
    waits = [waited for _, waited in found]
    for told, limits, _, error in waits:
        assert f"{SHORT_SECONDS} s" in told
        assert limits == {SHORT_SECONDS}
        assert f"did not arrive at 'waiting' within {SHORT_SECONDS} s" in error
    assert SHORT_SECONDS - 1 < waits[0][2] < SHORT_SECONDS + 2
