"""State that layers update from the batch is what one device has: counters, sums, averages. [Note: layer state]"""

import functools

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import ops
from marks import sweep

import tfzero
from tfzero.views.drift import check_drift

SAMPLES, BATCH, CODES = 46, 9, 5  # the last batch is one sample: a replica without rows


class States(keras.layers.Layer):
    """Passes its input on, and keeps all kinds of state."""

    def build(self, shape):
        width = shape[-1]
        for name, dims, dtype, aggregation in (
            ("seen", (), "float32", "none"),
            ("seen_whole", (), "int32", "none"),
            ("seen_long", (), "int64", "sum"),
            ("steps", (), "float32", "none"),
            ("steps_whole", (), "int32", "none"),
            ("steps_declared", (), "float32", "sum"),
            ("average", (width,), "float32", "none"),
            ("average_added", (width,), "float32", "none"),
            ("total_of_means", (), "float32", "none"),
            ("from_quotient", (width,), "float32", "mean"),
            ("codes", (CODES,), "float32", "none"),
            ("codes_declared", (CODES,), "float32", "sum"),
            ("code_sums", (CODES, width), "float32", "none"),
            ("code_einsum", (CODES, width), "float32", "none"),
            ("code_segments", (CODES, width), "float32", "none"),
            ("most", (), "int32", "sum"),
            ("flag", (), "bool", "none"),
            ("trained", (), "float32", "none"),
        ):
            weight = self.add_weight(
                shape=dims,
                dtype=dtype,
                initializer="zeros",
                trainable=name == "trained",
                name=name,
                aggregation=aggregation,
            )
            setattr(self, name, weight)
        self.raw = tf.Variable(tf.zeros([width]), trainable=False)

    def call(self, x, training=False):
        if not training:
            return x
        rows = ops.shape(x)[0]
        self.seen.assign_add(ops.cast(rows, "float32"))
        self.seen_whole.assign_add(rows)
        self.seen_long.assign_add(tf.size(x, tf.int64))
        for steps in (self.steps, self.steps_whole, self.steps_declared):
            steps.assign_add(1)
        self.average.assign(0.9 * self.average + 0.1 * ops.mean(x, 0))
        self.average_added.assign_add((ops.mean(x, 0) - self.average_added) * 0.1)
        self.total_of_means.assign_add(ops.mean(ops.square(x)))
        self.from_quotient.assign(self.from_quotient * 0.5 + ops.sum(x, 0) / ops.cast(rows, "float32"))
        codes = tf.argmax(x, 1) % CODES
        hot = tf.one_hot(codes, CODES)
        for variable in (self.codes, self.codes_declared):
            variable.assign(variable * 0.9 + (1 - 0.9) * ops.sum(hot, 0))
        self.code_sums.assign(0.9 * self.code_sums + 0.1 * ops.matmul(ops.transpose(hot), x))
        self.code_einsum.assign_add(tf.einsum("bc,bw->cw", hot, x))
        self.code_segments.assign_sub(tf.math.unsorted_segment_sum(x, codes, CODES))
        self.most.assign_add(ops.cast(ops.sum(ops.cast(x > 0, "float32")), "int32"))
        self.flag.assign(ops.logical_not(self.flag))
        self.trained.assign_add(ops.cast(rows, "float32"))
        self.raw.assign_add(tf.reduce_sum(x, 0))
        x = x + 0 * self.trained
        return x


def data():
    random = np.random.default_rng(0)
    return random.normal(size=(SAMPLES, 8)).astype("f4"), random.normal(size=(SAMPLES, 1)).astype("f4")


def make_model(layer) -> keras.Model:
    dense = keras.layers.Dense(1, kernel_initializer="ones")
    return keras.Sequential([keras.Input((8,)), layer, dense])


def states_after(model, layer, how="fit", **arguments) -> dict:
    """All states after an epoch, with each local replica's component."""
    x, y = data()
    model.compile(keras.optimizers.SGD(0.0), "mse", **arguments)
    if how == "fit":
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    else:
        for begin in range(0, SAMPLES, BATCH):
            model.train_on_batch(x[begin : begin + BATCH], y[begin : begin + BATCH])
    names = [*(v.name for v in layer.weights), "raw"]
    values = {name: getattr(layer, name) for name in names}
    values = {name: v.value if isinstance(v, keras.Variable) else v for name, v in values.items()}
    return {name: [part.numpy() for part in getattr(v, "values", [v])] for name, v in values.items()}


def assert_states(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        for part in parts:
            np.testing.assert_allclose(part, expected[name][0], rtol=2e-5, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(part, parts[0], err_msg=name)  # bit for bit on all replicas


@functools.cache
def one_device() -> dict:
    layer = States()
    return states_after(make_model(layer), layer, jit_compile=False)


def sharded(stage: int, how="fit", **arguments) -> dict:
    strategy = tfzero.ZeroStrategy(stage)
    with strategy.scope():
        layer = States()
        model = make_model(layer)
    return states_after(model, layer, how, **arguments)


@pytest.mark.parametrize("stage", [0, sweep(3)])
def test_states_are_those_of_one_device(stage):
    assert_states(sharded(stage), one_device())


def test_states_are_those_of_one_device_in_train_on_batch():
    assert_states(sharded(2, "batches"), one_device())


def test_several_steps_per_execution():
    assert_states(sharded(2, steps_per_execution=3), one_device())


def worker(stages):
    return [sharded(stage) for stage in stages]


@pytest.mark.parametrize("devices", [2, sweep(1)])
def test_states_on_two_workers(devices):
    expected = one_device()
    results = pool.run(worker, workers=2, args=([1, 3],), cpu_devices=devices)
    for first, second in zip(*results, strict=True):
        assert_states(first, expected)
        assert_states(second, first)


def on_two_devices():
    """The last batch leaves one of the replicas without rows."""
    return tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"])


class Assigns(keras.layers.Layer):
    """Assigns to one state what `update(state, x)` gives."""

    def __init__(self, update, dtype_of_state="float32", shape=(), aggregation="none"):
        super().__init__()
        self.update, self.of_state = update, (shape, dtype_of_state, aggregation)

    def build(self, shape):
        dims, dtype, aggregation = self.of_state
        self.state = self.add_weight(
            shape=dims, dtype=dtype, initializer="zeros", trainable=False, aggregation=aggregation, name="some_state"
        )

    def call(self, x, training=False):
        if training:
            self.state.assign(self.update(self.state, x))
        return x


def state_after(layer, strategy=None, **arguments):
    with strategy.scope() if strategy else tf.device("CPU:0"):
        model = make_model(layer)
    x, y = data()
    model.compile(keras.optimizers.SGD(0.0), "mse", **arguments)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return layer.state.numpy()


def test_a_float_that_is_neither_sum_nor_mean_is_averaged_aloud():
    def largest(state, x):
        return ops.maximum(state, ops.max(x))

    with pytest.warns(UserWarning, match=r"some_state.*neither a sum nor a mean.*aggregation=\"mean\""):
        state_after(Assigns(largest), on_two_devices())
    state_after(Assigns(largest, aggregation="mean"), on_two_devices())  # declared: not a word


@pytest.mark.parametrize("aggregation", ["none", "sum"])
def test_an_integer_that_is_no_sum_needs_a_declaration(aggregation):
    def largest(state, x):
        return state + ops.cast(ops.max(x), "int32")

    layer = Assigns(largest, "int32", aggregation=aggregation)
    if aggregation == "sum":
        state_after(layer, on_two_devices())
        return
    with pytest.raises(ValueError, match=r"some_state.*int32.*aggregation=\"sum\""):
        state_after(layer, on_two_devices())


def test_a_bool_of_the_rows_is_refused():
    with pytest.raises(ValueError, match=r"some_state.*bool"):
        state_after(Assigns(lambda state, x: ops.any(x > 0), "bool"), on_two_devices())


def test_state_for_each_sample_is_refused():
    with pytest.raises(ValueError, match=r"some_state.*a row for each sample"):
        state_after(Assigns(lambda state, x: x[:, 0], shape=(9,)), on_two_devices())


def test_random_draws_are_no_equal_values():
    seeds = keras.random.SeedGenerator(3)
    layer = Assigns(lambda state, x: state + keras.random.uniform((), seed=seeds))
    with pytest.warns(UserWarning, match=r"some_state.*neither"):
        state_after(layer, on_two_devices())
    parts = [part.numpy() for part in layer.state.value.values]
    assert parts[0] == parts[1]


def test_what_is_reduced_by_hand_is_as_it_is():
    def total(state, x):
        summed = tf.reduce_sum(x)
        replica = tf.distribute.get_replica_context()
        return state + (replica.all_reduce("SUM", summed) if replica.num_replicas_in_sync > 1 else summed)

    found = state_after(Assigns(total), on_two_devices())
    np.testing.assert_allclose(found, state_after(Assigns(total), jit_compile=False), rtol=1e-5)


def test_in_a_branch():
    def counted(state, x):
        return tf.cond(tf.constant(True), lambda: state + tf.cast(tf.shape(x)[0], tf.float32), lambda: state + 0.0)

    class InBranch(Assigns):
        def call(self, x, training=False):
            def count():
                self.state.assign_add(ops.cast(ops.shape(x)[0], "float32"))
                return 0

            if training:
                tf.cond(self.state < 20.0, count, lambda: 0)
            return x

    assert state_after(InBranch(None), on_two_devices()) == 27.0
    with pytest.warns(UserWarning, match="neither"):  # what a branch gives is not looked through
        state_after(Assigns(counted), on_two_devices())


def test_eagerly_floats_are_averaged_aloud_unless_declared():
    def count(state, x):
        return state + float(x.shape[0])

    with pytest.warns(UserWarning, match=r"Eagerly.*some_state"):
        assert state_after(Assigns(count), on_two_devices(), run_eagerly=True) < SAMPLES
    layer = Assigns(count, aggregation="sum")
    assert state_after(layer, on_two_devices(), run_eagerly=True) == SAMPLES
    layer = Assigns(lambda state, x: state + x.shape[0], "int32", aggregation="sum")
    assert state_after(layer, on_two_devices(), run_eagerly=True) == SAMPLES
    layer = Assigns(lambda state, x: state + x.shape[0], "int32")
    with pytest.raises(ValueError, match=r"some_state.*different values.*aggregation=\"sum\""):
        state_after(layer, on_two_devices(), run_eagerly=True)


def test_in_a_custom_loop_with_cut_batches():
    strategy = on_two_devices()
    with strategy.scope():
        seen = tf.Variable(0, trainable=False)

    @tf.function
    def step(x):
        seen.assign_add(tf.shape(x)[0])
        return x.shape[0]

    x, _ = data()
    for begin in range(0, SAMPLES, BATCH):
        strategy.run(step, args=(strategy.cut_batch(x[begin : begin + BATCH]),))
    assert [part.numpy() for part in seen.values] == 2 * [SAMPLES]


def test_updates_of_rows_only_are_refused():
    strategy = on_two_devices()
    with strategy.scope():
        table = tf.Variable(tf.zeros([4]), trainable=False)

    @tf.function
    def step():
        table.scatter_add(tf.IndexedSlices(tf.ones([1]), [0]))

    with pytest.raises(TypeError, match="in some rows only"):
        strategy.run(step)


class OwnVariable(keras.layers.Layer):
    def build(self, shape):
        self.raw = tf.Variable(tf.zeros([shape[-1]]), trainable=False)

    def call(self, x, training=False):
        if training:
            self.raw.assign_add(tf.reduce_sum(x, 0))
        return x


def test_drift_is_noticed_of_variables_that_keras_does_not_know():
    with on_two_devices().scope():
        layer = OwnVariable()
        model = make_model(layer)
    model.compile("sgd", "mse")
    model.fit(*data(), batch_size=BATCH, verbose=0)
    check_drift(model)
    layer.raw.values[1].assign(layer.raw.values[1] + 1)
    with pytest.raises(RuntimeError, match="have drifted apart in 1 of .*replica 1"):
        check_drift(model)
