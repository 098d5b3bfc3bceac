"""An audit finds a wrong reduction, and says so when there is none."""

from unittest import mock

import keras
import numpy as np
import oracle
import pool
import pytest
from keras import layers
from marks import sweep

import tfzero
from tfzero.collectives.group import Group

X, Y = oracle.Data(samples=15).arrays()


def make(stage=2, make_model=oracle.dense_model, optimizer="adam", **settings):
    strategy = tfzero.ZeroStrategy(stage, devices=["CPU:0", "CPU:1"], min_shard_elements=8, **settings)
    with strategy.scope():
        model = make_model()
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize(("stage", "optimizer"), [sweep(2, "muon"), (3, "adam")])
def test_a_right_step_agrees_and_leaves_the_model_as_it_was(stage, optimizer):
    model = make(stage, optimizer=optimizer)
    model.train_on_batch(X, Y)
    before = [np.array(v) for v in (*model.variables, *model.optimizer.variables)]
    audit = tfzero.audit(model, (X, Y))
    assert audit and "After 3 steps all" in str(audit) and "agree with one device" in str(audit)
    assert len(audit.differences) >= len(model.variables) + 4  # slots too
    for old, new in zip(before, [*model.variables, *model.optimizer.variables], strict=True):
        np.testing.assert_array_equal(old, np.array(new))
    weights = np.linspace(0, 2, 15).astype("float32")
    assert tfzero.audit(model, (X, Y, weights), steps=1)


def test_a_wrong_reduction_is_found_by_name(monkeypatch):
    model = make(optimizer="sgd")  # which would refuse it
    monkeypatch.setattr(
        Group, "reduce_scatter", lambda self, rows, replica, *dtype: rows[self.rank(replica)] * self.world_size
    )
    audit = tfzero.audit(model, (X, Y))
    assert not audit
    assert "variables differ from one device" in str(audit) and "kernel: " in str(audit)
    assert audit.differences[0].largest > 1e-3 and not audit.differences[0].is_rounding


def test_what_is_not_a_number_is_no_rounding():
    x = X.copy()
    x[0, 0] = np.nan
    audit = tfzero.audit(make(), (x, Y), steps=1)
    assert not audit


def test_random_layers_are_told_of():
    def with_dropout():
        return keras.Sequential([keras.Input((8,)), layers.Dense(17), layers.Dropout(0.5), layers.Dense(3, "softmax")])

    audit = tfzero.audit(make(make_model=with_dropout), (X, Y))
    assert not audit and "Random layers" in str(audit)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, "`steps` must be an integer of at least 1. Received: steps=0"), (1.5, "Received: steps=1.5")],
)
def test_steps_without_sense(steps, message):
    with pytest.raises(ValueError, match=message):
        tfzero.audit(make(), (X, Y), steps=steps)


def test_models_that_cannot_be_audited():
    plain = oracle.dense_model()
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="takes a model of a ZeroStrategy. Received one of"):
        tfzero.audit(plain, (X, Y))
    strategy = tfzero.ZeroStrategy(devices=["CPU:0"])
    with strategy.scope():
        model = oracle.dense_model()
    with pytest.raises(ValueError, match="compiled and built"):
        tfzero.audit(model, (X, Y))


def _audit_in_workers() -> tuple:
    strategy = tfzero.ZeroStrategy(3, min_shard_elements=8)
    keras.utils.set_random_seed(strategy.extended.mesh.worker)
    with strategy.scope():
        model = oracle.dense_model()
    model.compile(keras.optimizers.Adam(global_clipnorm=0.1), "categorical_crossentropy")
    right = tfzero.audit(model, (X, Y))
    model.compile("sgd", "categorical_crossentropy")
    with mock.patch.object(  # undone: the process serves other tests
        Group, "reduce_scatter", lambda self, rows, replica, *dtype: rows[self.rank(replica)] * self.world_size
    ):
        return right, tfzero.audit(model, (X, Y))


def test_workers_find_the_same():
    first, second = pool.run(_audit_in_workers, workers=2)
    assert first == second
    assert first[0] and not first[1]
