"""Two levels of groups, and buckets by the measured network."""

import dataclasses

import keras
import numpy as np
import oracle
import pool
import pytest
import tensorflow as tf
from test_compression import int8

import tfzero
from tfzero import extended
from tfzero.collectives.nccl import Nccl
from tfzero.collectives.network import DEFAULT_BUCKET_BYTES, Network
from tfzero.collectives.rings import Rings
from tfzero.plan.settings import Settings, choose_levels

TRAINED = [(2, "int8"), (3, "bf16")]
SETTINGS = Settings(2, 2**20, 1024, 60.0, devices_per_worker=4, device_type="CPU")


# Which levels.


@pytest.mark.parametrize(
    ("changes", "workers", "value", "reason"),
    [
        ({}, 2, True, "gradients cross the network once for 4 replicas"),
        ({"hierarchical": True}, 2, True, "hierarchical=True"),
        ({"hierarchical": False}, 2, False, "hierarchical=False"),
        ({}, 1, False, "1 workers of 4 replicas are one level"),
        ({"devices_per_worker": 1}, 3, False, "3 workers of 1 replicas are one level"),
        ({"stage": 0}, 2, False, "stage 0 all-reduces in a ring"),
        ({"stage": 0, "compression": "bf16"}, 2, True, "gradients cross the network once"),
        ({"compression": "int8", "error_feedback": True}, 2, False, "error_feedback keeps"),
        ({"device_type": "GPU"}, 2, False, "NCCL's own"),
        ({"device_type": "GPU", "hierarchical": True}, 2, True, "hierarchical=True"),
    ],
)
def test_choice_of_levels(changes, workers, value, reason):
    settings = dataclasses.replace(SETTINGS, **changes)
    transport = Nccl() if settings.device_type == "GPU" else Rings()
    choice = choose_levels(settings, workers, transport.obstacle_of_levels(settings.device_type))
    assert choice.value is value and reason in choice.reason


def test_parts_of_gpus_have_one_level():
    settings = dataclasses.replace(SETTINGS, device_type="GPU")
    choice = choose_levels(settings, 2, Rings().obstacle_of_levels("GPU"))
    assert choice.value is False and choice.reason == "two levels are chosen between CPUs only"


@pytest.mark.parametrize(
    ("changes", "workers"),
    [({}, 1), ({"devices_per_worker": 1}, 2), ({"stage": 0}, 2), ({"compression": "int8", "error_feedback": True}, 2)],
)
def test_two_levels_without_effect_are_refused(changes, workers):
    with pytest.raises(ValueError, match="hierarchical=True has no effect: .*Leave `hierarchical` away"):
        choose_levels(dataclasses.replace(SETTINGS, hierarchical=True, **changes), workers)


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_levels_of_another_kind_are_refused(value):
    with pytest.raises(ValueError, match=f"must be 'auto', True or False. Received: hierarchical={value!r}"):
        tfzero.ZeroStrategy(hierarchical=value)


# Two workers of two replicas each.


def _sums(group) -> dict:
    """What the first replica here gets of numbers that differ on all replicas, by dtype."""
    found = {}
    for name in ("float32", "float64", "int32", "bfloat16"):
        rows = [tf.cast(tf.reshape(tf.range(20), [4, 5]) * (group.rank(k) + 1), name) for k in range(2)]
        found[name] = [np.array(tf.cast(r, tf.float64)) for r in group.launch(group.reduce_scatter, rows)]
    rows = [tf.fill([4, 1], tf.cast(256.0 if group.rank(k) == 0 else 1.0, tf.bfloat16)) for k in range(2)]
    found["256 + 1 + 1 + 1"] = [
        np.array(r) for r in group.launch(lambda r, k: group.reduce_scatter(r, k, tf.float32), rows)
    ]
    rows = [tf.fill([4, 1], 10 * group.rank(k)) + tf.range(4)[:, tf.newaxis] for k in range(2)]
    found["all to all"] = [np.array(r).ravel() for r in group.launch(group.all_to_all, rows)]
    return found


def _step_in_int8(strategy) -> dict:
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 24)).astype("float32"), random.normal(size=(8, 40)).astype("float32")
    with strategy.scope():
        model = keras.Sequential([keras.Input((24,)), keras.layers.Dense(40, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.get_weights()[0]
    model.train_on_batch(x, y)
    lag = model.optimizer.wire.lags[0].value
    return {"x": x, "y": y, "before": before, "after": model.get_weights()[0], "lag": lag.numpy().reshape(24, 40)}


def _two_by_two() -> dict:
    found: dict = {}
    for hierarchical in ("auto", False):
        strategy = tfzero.ZeroStrategy(hierarchical=hierarchical)
        assert strategy.levels.value is (hierarchical == "auto")
        found[hierarchical] = _sums(strategy.extended.group)
    # Without compression they are trained in `test_workers.py`.
    for stage, compression in TRAINED:
        strategy = tfzero.ZeroStrategy(stage, compression=compression, min_shard_elements=8)
        assert strategy.levels.value
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = oracle.dense_model()
        initial = model.get_weights()
        arguments = {"optimizer": keras.optimizers.Adam(0.01), "loss": "categorical_crossentropy"}
        outcome = oracle.train(model, *oracle.Data().arrays(), arguments, only_fit=True, epochs=1)
        found[stage, compression] = {"initial": initial, **dataclasses.asdict(outcome)}
        if (stage, compression) == (2, "int8"):
            found["step"] = _step_in_int8(strategy)
    return found


@pytest.fixture(scope="module")
def two_by_two():
    return pool.run(_two_by_two, workers=2, cpu_devices=2)


@pytest.mark.parametrize("hierarchical", ["auto", False])
def test_sums_of_two_by_two_replicas(two_by_two, hierarchical):
    for worker, found in enumerate(two_by_two):
        sums = found[hierarchical]
        for replica in range(2):
            rank = 2 * worker + replica
            for name in ("float32", "float64", "int32", "bfloat16"):
                # 1 + 2 + 3 + 4 times the row.
                np.testing.assert_array_equal(sums[name][replica], 10 * np.arange(20).reshape(4, 5)[rank])
            assert sums["256 + 1 + 1 + 1"][replica] == 259
            assert sums["all to all"][replica].tolist() == [rank, 10 + rank, 20 + rank, 30 + rank]


@pytest.mark.parametrize(("stage", "compression"), TRAINED)
def test_two_by_two_replicas_train_as_one_device(two_by_two, stage, compression):
    """Nearly, as encoded; and alike on both workers."""
    first, second = (found[stage, compression] for found in two_by_two)
    for mine, theirs in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    model = oracle.dense_model()
    model.set_weights(first.pop("initial"))
    arguments = {"optimizer": keras.optimizers.Adam(0.01), "loss": "categorical_crossentropy"}
    expected = oracle.train(model, *oracle.Data().arrays(), arguments, only_fit=True, epochs=1)
    ours = oracle.Outcome(**first)
    np.testing.assert_allclose(ours.batch_losses, expected.batch_losses, rtol=0.02)
    assert any((mine != theirs).any() for mine, theirs in zip(ours.weights, expected.weights, strict=True))


def test_a_workers_sum_is_encoded_and_not_its_parts(two_by_two):
    step = two_by_two[0]["step"]
    errors = step["x"] @ step["before"] - step["y"]
    rows_of_workers = [0, 1, 4, 5], [2, 3, 6, 7]  # `Mesh.part` deals them so
    of_workers = [step["x"][rows].T @ errors[rows] * 2 / errors.size for rows in rows_of_workers]
    total = sum(int8(gradient.reshape(4, 240).astype("float32")) for gradient in of_workers).reshape(24, 40)
    after = step["after"] + step["lag"]  # the master values
    np.testing.assert_allclose(after, step["before"] - 0.1 * total, atol=2e-7)
    in_parts = [step["x"][k : k + 2].T @ errors[k : k + 2] * 2 / errors.size for k in (0, 2, 4, 6)]
    flat = sum(int8(gradient.reshape(4, 240).astype("float32")) for gradient in in_parts).reshape(24, 40)
    assert np.abs(after - (step["before"] - 0.1 * flat)).max() > 1e-5


# The size of buckets.


@pytest.mark.parametrize(
    ("network", "model_bytes", "mib"),
    [
        (Network(1e-3, 2**30), 2**28, 16),  # sqrt(2^28 * 2^20 * 1.024) is a little more than 16 MiB
        (Network(1e-3, 2**25), 2**28, 4),  # 2.9 MiB
        (Network(1e-5, 2**25), 2**20, 1),  # not less
        (Network(1.0, 2**40), 2**40, 64),  # not more
    ],
)
def test_bucket_by_network(network, model_bytes, mib):
    choice = network.bucket_bytes(model_bytes)
    assert choice.value == mib * 2**20
    assert f"{model_bytes / 2**20:.1f} MiB of gradients" in choice.reason and "as measured" in choice.reason


def _compiled(**settings):
    strategy = tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"], min_shard_elements=8, **settings)
    with strategy.scope():
        model = oracle.dense_model()
    model.compile("adam", "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


def test_auto_measures_and_a_resumed_run_repeats_it(tmp_path, monkeypatch):
    measured = _compiled(bucket_bytes="auto").optimizer.bucket_bytes
    assert measured.value in {2**k for k in range(20, 27)} and "as measured" in measured.reason

    # 100 bytes of gradients a bucket here; the resumed run finds a faster network.
    choose = {"value": 100}
    monkeypatch.setattr(
        extended.Network, "bucket_bytes", lambda self, model_bytes: extended.Choice(choose["value"], "as measured")
    )
    model = _compiled(bucket_bytes="auto")
    x, y = oracle.Data().arrays()
    model.fit(x, y, batch_size=15, shuffle=False, verbose=0)
    saved = tfzero.save_checkpoint(model, tmp_path)

    choose["value"] = 2**20
    resumed = _compiled(bucket_bytes="auto")
    plan = resumed.optimizer.plan
    assert len(plan.buckets) < len(model.optimizer.plan.buckets)
    tfzero.load_checkpoint(resumed, saved)
    assert resumed.optimizer.bucket_bytes.value == 100
    assert resumed.optimizer.bucket_bytes.reason == "the checkpoint's run chose so"
    assert resumed.optimizer.plan.buckets == model.optimizer.plan.buckets
    model.fit(x, y, batch_size=15, shuffle=False, verbose=0)
    resumed.fit(x, y, batch_size=15, shuffle=False, verbose=0)
    for mine, theirs in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)

    fixed = _compiled(bucket_bytes=2**20)
    tfzero.load_checkpoint(fixed, saved)
    assert fixed.optimizer.bucket_bytes.value == 2**20


def test_auto_has_nothing_to_measure_with_one_replica():
    strategy = tfzero.ZeroStrategy(devices=["CPU:0"], bucket_bytes="auto")
    assert strategy.extended.choose_bucket_bytes(1000).value == DEFAULT_BUCKET_BYTES
