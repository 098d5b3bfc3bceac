"""Keys of collectives do not depend on what a worker alone has traced: two workers of two replicas each."""

import tempfile
import types
from pathlib import Path

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.collectives.keys import SIZES, Keys

OWNED = {  # every matrix of another size has one owner
    "muon": lambda: keras.optimizers.Muon(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
}
UNITS = (5, 7, 9)


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


def traced_by(strategy) -> int:
    return strategy.extended.group.keys.traced.total() if isinstance(strategy, tfzero.ZeroStrategy) else 0


def batches_on_their_own(strategy):
    """16 rows and then 15: one replica of the second worker gets fewer, the first worker's get as many as before."""
    found = {}
    for eager in (False, True):
        model = compiled(strategy, "adam", run_eagerly=eager)
        losses = [model.train_on_batch(*samples(16))]
        traced = None if eager else traced_by(strategy)
        losses += [model.train_on_batch(*samples(rows)) for rows in (15, 3, 16)]
        assert eager or traced_by(strategy) == traced, "other numbers of rows are no other shapes"
        tests = [model.test_on_batch(*samples(rows)) for rows in (16, 15)]
        predictions = [model.predict(samples(rows)[0], batch_size=8, verbose=0) for rows in (15, 3)]
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


def gradients_of_functions(strategy):
    """TensorFlow numbers the functions of gradients, and one worker has come further with its numbers."""
    is_ours = isinstance(strategy, tfzero.ZeroStrategy)
    if is_ours and strategy.cluster_resolver.task_id == 1:
        tf.function(lambda: tf.add_n([tf.constant(float(k)) for k in range(20)]))()
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = deep_model()
        optimizer = keras.optimizers.SGD(0.1)
        optimizer = tfzero.ZeroOptimizer(optimizer) if is_ours else optimizer
    call = tf.function(lambda x: model(x, training=True))

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(call(x) - y)) / 16
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    step = tf.function(lambda batch: strategy.run(replica_step, args=batch))
    for rows in (16, 15):
        step(strategy.cut_batch(samples(rows)) if is_ours else samples(rows))
    return {"weights": model.get_weights()}


CASES = {
    read_owned_slots: (3,),
    save_and_audit: (1,),
    batches_on_their_own: (3,),
    gather_ragged_parts: (2,),
    functions_traced_by_one_worker_alone: (2,),
    gradients_of_functions: (3,),
}


def run_cases():
    """Each case at each of its stages, one after the other."""
    return {
        (case.__name__, stage): case(tfzero.ZeroStrategy(stage, min_shard_elements=8))
        for case, stages in CASES.items()
        for stage in stages
    }


@pytest.fixture(scope="module")
def two_by_two():
    return pool.run(run_cases, workers=2, cpu_devices=2)


@pytest.mark.parametrize(("case", "stage"), [(case, stage) for case, stages in CASES.items() for stage in stages])
def test_what_one_worker_traces_alone_changes_nothing(two_by_two, case, stage):
    expected = case(tf.distribute.get_strategy())
    for worker, found in enumerate(two_by_two):
        found = found[case.__name__, stage]
        for name, values in expected.items():
            for place, (mine, wanted) in enumerate(zip(found[name], values, strict=True)):
                np.testing.assert_allclose(
                    mine, wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} {place} on worker {worker}"
                )


# Functions that are not the same for all shapes.


def _exchange_more_for_long_parts():
    strategy = tfzero.ZeroStrategy(timeout_seconds=4)

    @tf.function
    def replica_step(part):
        context = tf.distribute.get_replica_context()
        total = context.all_reduce("SUM", tf.reduce_sum(part))
        if part.shape[0] > 4:
            total += context.all_reduce("SUM", tf.reduce_max(part))
        return total + context.all_reduce("SUM", tf.reduce_min(part))

    for rows in (3, 5):
        mine = rows if strategy.cluster_resolver.task_id == 1 else 3
        values = strategy.experimental_distribute_values_from_function(lambda _, mine=mine: tf.ones([mine]))
        strategy.experimental_local_results(strategy.run(replica_step, args=(values,)))[0].numpy()


@pytest.mark.parametrize("cpu_devices", [sweep(1), 2])
def test_a_worker_that_has_traced_another_program_alone_is_named(cpu_devices):
    with pytest.raises(tfzero.WorkerError) as caught:
        tfzero.run_local(_exchange_more_for_long_parts, cpu_devices=cpu_devices, timeout_seconds=FLEET_SECONDS)
    text = str(caught.value)
    assert "The function 'replica_step' was traced so often: 1 on worker 0, 2 on worker 1." in text


# Keys by themselves.


def test_a_key_tells_which_collective_of_which_function_it_is():
    keys = Keys(replicas=2, lanes=5)

    def taken(replica, contents, name="step", within=lambda take: take()):
        def step():
            within(lambda: found.extend(keys.take(replica, content, lane, sized) for content, lane, sized in contents))

        found: list = []
        step.__name__ = name
        tf.function(step, autograph=False).get_concrete_function()
        return found

    def in_a_branch(take):
        tf.cond(tf.constant(True), lambda: take() or 1, lambda: 0)

    contents = [(("sum", k), None, False) for k in range(6)] + [(("gather",), -1, False), (("sum", None), None, True)]
    first = taken(0, contents)
    assert [lane for _, lane in first] == [0, 1, 2, 3, 0, 1, 4, 3], "the last lane is for who asks for it"
    assert len({key for key, _ in first}) == len(first)
    assert all(0 < key < 2**30 for key, _ in first[:-1])
    assert 2**30 <= first[-1][0] < 2**31 - len(SIZES) and first[-1][0] % len(SIZES) == 0
    taken(0, contents[:3], "another")
    assert taken(1, contents) == taken(0, contents) == first, "whoever traces it, and however often"
    assert taken(0, contents, within=in_a_branch) == first, "the names of branches have numbers of this process"
    assert not {key for key, _ in taken(0, contents, "another")} & {key for key, _ in first}
    assert not {key for key, _ in taken(0, contents[1:])} & {key for key, _ in first}, "another place"
    assert keys.traced == {"step": 5, "another": 2}


def test_two_contents_never_share_a_key(monkeypatch):
    """Keys are drawn from thousands of millions; should two be alike, the later one is moved."""
    monkeypatch.setattr("hashlib.blake2b", lambda *_, **__: types.SimpleNamespace(digest=lambda: b"\0" * 8))
    keys = Keys(replicas=1, lanes=1)
    found: list = []

    @tf.function(autograph=False)
    def step():
        found.append([keys.take(0, ("sum", k), is_sized=k > 1)[0] for k in range(4)])

    step.get_concrete_function()
    assert found == [[1, 2, 2**30, 2**30 + 64]]
