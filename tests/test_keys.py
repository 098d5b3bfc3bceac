"""Keys of collectives do not depend on what a worker alone has traced: two workers of two replicas each."""

import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS

import tfzero

OWNED = {  # every matrix of another size has one owner
    "muon": lambda: keras.optimizers.Muon(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
}
UNITS = (5, 7, 9, 11, 13, 15, 17, 19, 21)


def deep_model() -> keras.Model:
    hidden = [keras.layers.Dense(units, activation="tanh") for units in UNITS]
    return keras.Sequential([keras.Input((8,)), *hidden, keras.layers.Dense(3)])


def samples(rows: int):
    random = np.random.default_rng(rows)
    return random.normal(size=(rows, 8)).astype("float32"), random.normal(size=(rows, 3)).astype("float32")


def compiled(strategy, optimizer="sgd", make_model=deep_model, **arguments) -> keras.Model:
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = make_model()
    model.compile(optimizer, "mse", **arguments)
    return model


# What two workers do, and one device; each gives arrays that must be equal.


def read_owned_slots(strategy):
    """Each slot is all of one replica and nothing of the others."""
    found = {}
    for name, optimizer in OWNED.items():
        model = compiled(strategy, optimizer())
        model.train_on_batch(*samples(16))
        slots = [np.array(v) for v in model.optimizer.variables]
        found[name] = [*model.get_weights(), *sorted(slots, key=lambda s: (s.shape, float(np.sum(np.abs(s)))))]
    return found


def save_and_audit(strategy):
    """Whole variables are read by all, for a file or to be compared."""
    model = compiled(strategy, OWNED["muon"]())
    x, y = samples(16)
    model.train_on_batch(x, y)
    if isinstance(strategy, tfzero.ZeroStrategy):
        with tempfile.TemporaryDirectory() as directory:
            model.save(Path(directory) / "model.keras")
            strategy.channel.all_gather("all have saved", None)
        assert tfzero.audit(model, (x, y))
    return {"weights": model.get_weights()}


def batches_on_their_own(strategy):
    """16 rows and then 15: one replica of the second worker gets fewer, the first worker's get as many as before."""
    found = {}
    for eager in (False, True):
        model = compiled(strategy, "adam", run_eagerly=eager)
        losses = [model.train_on_batch(*samples(rows)) for rows in (16, 15, 16, 13, 3, 16)]
        tests = [model.test_on_batch(*samples(rows)) for rows in (16, 15, 2)]
        predictions = [model.predict(samples(rows)[0], batch_size=8, verbose=0) for rows in (16, 15, 3)]
        found[f"eager: {eager}"] = [*model.get_weights(), np.array(losses), np.array(tests), *predictions]
    return found


def gather_ragged_parts(strategy):
    """Sizes that differ by replica, and change on one worker more often than on the other."""
    found = []
    for call, sizes in enumerate([(1, 1, 2, 3), (1, 1, 4, 5), (1, 1, 6, 7), (8, 0, 6, 7), (1, 1, 1, 1)]):
        parts = [tf.fill([size, 2], 10.0 * call + rank) for rank, size in enumerate(sizes)]
        if isinstance(strategy, tfzero.ZeroStrategy):
            values = strategy.experimental_distribute_values_from_function(
                lambda context, parts=parts: parts[context.replica_id_in_sync_group]
            )
            found.append(strategy.gather(values, axis=0).numpy())
        else:
            found.append(tf.concat(parts, 0).numpy())
    return {"gathered": found}


def functions_traced_by_one_worker_alone(strategy):
    """Custom loops whose tensors have a shape of their own on each replica, so that only some shapes are new."""

    @tf.function
    def total(part):
        context = tf.distribute.get_replica_context()
        return context.all_reduce("SUM", tf.reduce_sum(part)), context.all_reduce("SUM", tf.reduce_sum(part, 0))

    @tf.function
    def total_in_graph(values):
        first, second = strategy.run(total.python_function, args=(values,))
        return strategy.reduce("SUM", first, axis=None), strategy.experimental_local_results(second)[0]

    found = []
    for sizes in [(1, 1, 2, 3), (1, 1, 4, 5), (1, 1, 6, 7), (8, 1, 6, 7), (1, 1, 1, 1)]:
        parts = [tf.fill([size, 2], 10.0 + rank) for rank, size in enumerate(sizes)]
        if isinstance(strategy, tfzero.ZeroStrategy):
            values = strategy.experimental_distribute_values_from_function(
                lambda context, parts=parts: parts[context.replica_id_in_sync_group]
            )
            first, second = strategy.run(total, args=(values,))
            found += [strategy.experimental_local_results(v)[0].numpy() for v in (first, second)]
            found += [value.numpy() for value in total_in_graph(values)]
        else:
            rows = tf.concat(parts, 0)
            found += 2 * [tf.reduce_sum(rows).numpy(), tf.reduce_sum(rows, 0).numpy()]
            found[-2] *= 4
    return {"sums": found}


CASES = (
    read_owned_slots, save_and_audit, batches_on_their_own, gather_ragged_parts, functions_traced_by_one_worker_alone,
)  # fmt: skip


def run_cases(names):
    """Each case at two stages, one after the other."""
    return {
        (case.__name__, stage): case(tfzero.ZeroStrategy(stage, min_shard_elements=8, timeout_seconds=60))
        for case in CASES
        for stage in (1, 3)
        if case.__name__ in names
    }


@pytest.fixture(scope="module")
def two_by_two():
    names = [case.__name__ for case in CASES]
    return tfzero.run_local(run_cases, workers=2, cpu_devices=2, args=(names,), timeout_seconds=FLEET_SECONDS)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_one_worker_traces_alone_changes_nothing(two_by_two, case, stage):
    expected = case(tf.distribute.get_strategy())
    for worker, found in enumerate(two_by_two):
        found = found[case.__name__, stage]
        for name, values in expected.items():
            for place, (mine, wanted) in enumerate(zip(found[name], values, strict=True)):
                np.testing.assert_allclose(
                    mine, wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} {place} on worker {worker}"
                )
