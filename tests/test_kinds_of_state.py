"""Of many kinds of state: each is what one device has, or is warned of or refused by name. [Note: kinds]"""

import contextlib
import re
import warnings

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import ops
from marks import sweep

import tfzero
from tfzero.rows.dependence import MIXED, OTHER, ROWS, SUM, Dependence

SAMPLES, BATCH, WIDTH, CODES = 38, 11, 8, 5  # of no batch replicas have as many rows


def count(x):
    return tf.cast(tf.shape(x)[0], tf.float32)


def codes(x):
    return tf.argmax(x, 1, tf.int32) % CODES


def hot(x):
    return tf.one_hot(codes(x), CODES)


def squared_sum(x):
    return tf.reduce_sum(x**2)


def bincount(x, is_binary=False):
    return tf.raw_ops.DenseBincount(input=x, size=CODES, weights=tf.zeros([0]), binary_output=is_binary)


# `tf.function`s are made where they are called: they cannot be sent to workers.


def doubled(x):
    return tf.function(lambda x: 2 * x)(x)


def steps_between(x):
    return tf.function(lambda x: x[1:] - x[:-1])(x)


def drawn():
    return tf.function(lambda: tf.random.normal([]))()


def mean_of(x):
    return tf.function(lambda x: tf.reduce_mean(x, 0))(x)


def looped(x):
    shapes = [tf.TensorShape([]), tf.TensorShape([None, WIDTH])]
    return tf.while_loop(lambda k, v: k < 3, lambda k, v: (k + 1, v * 0.5 + x), [0, x], shape_invariants=shapes)[1]


def through_time(x):
    """As recurrent layers are."""
    zeros = tf.zeros([tf.shape(x)[0], 2])
    steps = tf.transpose(tf.reshape(x, [-1, 4, 2]), [1, 0, 2])
    return tf.scan(lambda state, step: tf.tanh(state + step), steps, zeros)[-1]


def dropped(x):
    return x * tf.cast(tf.random.stateless_uniform(tf.shape(x), [1, 2]) >= 0.0, tf.float32)


def convolved(x):
    return tf.nn.conv1d(x[:, :, None], tf.ones([3, 1, 2]), 1, "SAME")


def turned(x):
    """`[columns, rows]`, where no shape tells it."""
    return tf.reshape(x, tf.stack([tf.size(x) // tf.shape(x)[0], -1]))


def sorted_by_python(x):
    return tf.ensure_shape(tf.numpy_function(lambda v: np.sort(v, 0)[:2], [x], tf.float32), [None, WIDTH])


W, C = (WIDTH,), (CODES,)
# What is added to a state: its shape, and how it is made from the rows `x` and the state `s`.
EQUAL = {
    "rows": ((), lambda s, x: count(x)),
    "rows and one": ((), lambda s, x: count(x) + 1),
    "as many rows as Keras counts": ((), lambda s, x: ops.cast(ops.shape(x)[0], "float32")),
    "ones": (W, lambda s, x: tf.reduce_sum(tf.ones_like(x), 0)),
    "filled": ((), lambda s, x: tf.reduce_sum(tf.fill(tf.shape(x), 2.0))),
    "zeros of Keras": ((), lambda s, x: tf.reduce_sum(ops.zeros((ops.shape(x)[0], 3)) + 1)),
    "a constant broadcast to rows": ((), lambda s, x: tf.reduce_sum(tf.broadcast_to(2.0, tf.shape(x)))),
    "the state broadcast to rows": (W, lambda s, x: tf.reduce_mean(tf.broadcast_to(s, tf.shape(x)) + x, 0)),
    "a sum over a constant": (W, lambda s, x: tf.reduce_sum(x, 0) / BATCH),
    "a sum over its rows": (W, lambda s, x: tf.reduce_sum(x, 0) / count(x)),
    "a sum over twice its rows": ((), lambda s, x: tf.reduce_sum(x) / (2 * count(x))),
    "moving average": (W, lambda s, x: 0.1 * (tf.reduce_mean(x, 0) - s)),
    "a sum less a mean": ((), lambda s, x: tf.reduce_sum(x) - 3 * tf.reduce_mean(x)),
    "what the state and rows have": ((), lambda s, x: (count(x) + s) * 2),
    "mean of lengths": ((), lambda s, x: tf.reduce_mean(tf.sqrt(tf.reduce_mean(x**2, 1)))),
    "what a mask leaves": (W, lambda s, x: tf.reduce_sum(tf.where(x > 0, x, s), 0)),
    "columns": ((3,), lambda s, x: tf.reduce_sum(x[:, 2:5], 0)),
    "columns by slice": ((3,), lambda s, x: tf.reduce_sum(tf.slice(x, [0, 2], [-1, 3]), 0)),
    "half of the columns": ((4,), lambda s, x: tf.reduce_sum(tf.split(x, 2, 1)[0], 0)),
    "one column more": ((9,), lambda s, x: tf.reduce_mean(tf.pad(x, [[0, 0], [1, 0]]), 0)),
    "cumulated along columns": (W, lambda s, x: tf.reduce_sum(tf.cumsum(x, 1), 0)),
    "softmax": (W, lambda s, x: tf.reduce_sum(tf.nn.softmax(x) ** 2, 0)),
    "largest columns": ((2,), lambda s, x: tf.reduce_sum(tf.math.top_k(x, 2)[0], 0)),
    "covariance": ((8, 8), lambda s, x: tf.matmul(x, x, transpose_a=True) / count(x)),
    "covariance by einsum": ((8, 8), lambda s, x: tf.einsum("bi,bj->ij", x, x)),
    "products with several matrices": ((3,), lambda s, x: tf.reduce_mean(tf.matmul(x, tf.ones([2, 8, 3])), [0, 1])),
    "counts of codes": (C, lambda s, x: tf.reduce_sum(hot(x), 0)),
    "counts of codes in columns": (C, lambda s, x: tf.reduce_sum(tf.one_hot(codes(x), CODES, axis=0), 1)),
    "sums by code": ((5, 8), lambda s, x: tf.math.unsorted_segment_sum(x, codes(x), CODES)),
    "scattered": ((5, 8), lambda s, x: tf.scatter_nd(codes(x)[:, None], x, [CODES, WIDTH])),
    "scattered into the state": ((5, 8), lambda s, x: tf.tensor_scatter_nd_add(0.5 * s, codes(x)[:, None], x)),
    "taken out of the state": ((5, 8), lambda s, x: tf.tensor_scatter_nd_sub(s, codes(x)[:, None], x)),
    "bins": (C, lambda s, x: bincount(codes(x))),
    "means of looked-up rows": (W, lambda s, x: tf.reduce_mean(tf.gather(tf.eye(CODES, WIDTH), codes(x)), 0)),
    "an element of each row": ((), lambda s, x: tf.reduce_sum(tf.gather(x, codes(x), batch_dims=1))),
    "mean of all elements": ((), lambda s, x: tf.reduce_mean(tf.reshape(x, [-1]))),
    "means of tokens": ((2,), lambda s, x: tf.reduce_mean(tf.reshape(x, [-1, 2]), 0)),
    "sums of tokens by Keras": ((2,), lambda s, x: ops.sum(ops.reshape(x, (ops.shape(x)[0] * 4, 2)) ** 2, 0)),
    "largest tokens": ((2,), lambda s, x: tf.reduce_sum(tf.reduce_max(tf.reshape(x, [-1, 4, 2]), 1), 0)),
    "sums of columns turned to rows": (W, lambda s, x: tf.reduce_sum(tf.transpose(x), 1)),
    "beside each other": ((16,), lambda s, x: tf.reduce_mean(tf.concat([x, x * x], 1), 0)),
    "several sums": ((3,), lambda s, x: tf.stack([count(x), tf.reduce_sum(x), squared_sum(x)])),
    "several means": ((16,), lambda s, x: tf.concat([tf.reduce_mean(x, 0), tf.reduce_mean(x * x, 0)], 0)),
    "a branch that all take": (W, lambda s, x: tf.reduce_sum(tf.cond(s[0] < 2, lambda: 2 * x, lambda: x), 0)),
    "sums of a branch": ((), lambda s, x: tf.cond(s < 20, lambda: count(x), lambda: tf.reduce_sum(x))),
    "rows from a function": (W, lambda s, x: tf.reduce_mean(doubled(x), 0)),
    "a mean from a function": (W, lambda s, x: 0.1 * mean_of(x)),
    "rows from a loop": (W, lambda s, x: tf.reduce_mean(looped(x), 0)),
    "rows through time": ((2,), lambda s, x: tf.reduce_sum(through_time(x), 0)),
    "rows with random numbers": (W, lambda s, x: tf.reduce_mean(dropped(x), 0)),
    "convolved": ((2,), lambda s, x: tf.reduce_mean(convolved(x), [0, 1])),
    "losses": ((), lambda s, x: tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(codes(x), x))),
    "no rows at all": (W, lambda s, x: tf.math.l2_normalize(tf.linalg.matvec(2 * tf.eye(WIDTH), s + 1))),
    "steps": ((), lambda s, x: 1.0),
}  # fmt: skip
TOLD = {
    "root of a mean": ((), lambda s, x: tf.sqrt(tf.reduce_mean(x**2))),
    "product of means": ((), lambda s, x: tf.reduce_mean(x) * tf.reduce_mean(x**2)),
    "variance": (W, lambda s, x: tf.math.reduce_variance(x, 0)),
    "a mean as often as rows": ((), lambda s, x: tf.reduce_sum(tf.broadcast_to(tf.reduce_mean(x, 0), tf.shape(x)))),
    "a sum as often as rows": (W, lambda s, x: tf.reduce_mean(tf.broadcast_to(tf.reduce_sum(x, 0), tf.shape(x)), 0)),
    "as much of a table as rows": ((), lambda s, x: tf.reduce_sum(tf.range(100.0)[: tf.shape(x)[0]])),
    "a sum over rows less one": ((), lambda s, x: tf.reduce_sum(x) / (count(x) - 1)),
    "a masked mean": ((), lambda s, x: tf.reduce_sum(x * hot(x)[:, :1]) / tf.reduce_sum(hot(x)[:, 0])),
    "mean of some rows": (W, lambda s, x: tf.reduce_mean(tf.boolean_mask(x, x[:, 0] > 0), 0)),
    "sum and number of some rows": ((), lambda s, x: tf.reduce_sum(v := x[x[:, 0] > 0]) / (8 * count(v))),
    "first rows": (W, lambda s, x: tf.reduce_sum(x[:1], 0)),
    "last row": (W, lambda s, x: x[-1]),
    "every other row": (W, lambda s, x: tf.reduce_mean(x[::2], 0)),
    "all rows but one": (W, lambda s, x: tf.reduce_sum(tf.slice(x, [1, 0], [-1, WIDTH]), 0)),
    "from row to row": (W, lambda s, x: tf.reduce_sum((x[1:] - x[:-1]) ** 2, 0)),
    "from row to row in a function": (W, lambda s, x: tf.reduce_sum(steps_between(x) ** 2, 0)),
    "cumulated along rows": (W, lambda s, x: tf.reduce_sum(tf.cumsum(x, 0), 0)),
    "rows with others": (W, lambda s, x: tf.reduce_sum(x * tf.reverse(x, [0]), 0)),
    "rows with the next ones": (W, lambda s, x: tf.reduce_sum(x * tf.roll(x, 1, 0), 0)),
    "rows with sorted ones": ((), lambda s, x: tf.reduce_sum(tf.sort(x[:, 0]) * x[:, 1])),
    "rows with looked-up ones": (W, lambda s, x: tf.reduce_sum(x * tf.gather(x, tf.argsort(x[:, 0])), 0)),
    "softmax along rows": ((), lambda s, x: tf.reduce_sum(tf.nn.softmax(x[:, 0]) ** 2)),
    "different codes": ((), lambda s, x: tf.cast(tf.reduce_sum(tf.unique(codes(x))[0]), "float32")),
    "each row with each": ((), lambda s, x: tf.reduce_mean(tf.matmul(x, x, transpose_b=True))),
    "each column with each": ((), lambda s, x: tf.reduce_sum(tf.matmul(y := tf.transpose(x), y, transpose_a=True))),
    "each with each by einsum": ((), lambda s, x: tf.reduce_sum(tf.einsum("id,jd->ij", x, x))),
    "distances of pairs": ((), lambda s, x: tf.reduce_mean((x[:, None] - x[None]) ** 2)),
    "maximum": ((), lambda s, x: tf.reduce_max(x)),
    "norm": ((), lambda s, x: tf.norm(x)),
    "logsumexp": ((), lambda s, x: tf.reduce_logsumexp(x)),
    "means by code": ((5, 8), lambda s, x: tf.math.unsorted_segment_mean(x, codes(x), CODES)),
    "overwritten by code": ((5, 8), lambda s, x: tf.tensor_scatter_nd_update(s, codes(x)[:, None], x)),
    "codes that came": (C, lambda s, x: bincount(codes(x), is_binary=True)),
    "perplexity": ((), lambda s, x: tf.exp(-tf.reduce_sum(tf.math.xlogy(p := tf.reduce_mean(hot(x), 0), p)))),
    "groups of rows": ((), lambda s, x: squared_sum(tf.reduce_sum(tf.reshape(x, [WIDTH, -1]), 0))),
    "groups of rows by a tensor": ((), lambda s, x: squared_sum(tf.reduce_sum(turned(x), 0))),
    "rows and others in a list": (W, lambda s, x: tf.reduce_mean(tf.concat([x, tf.ones([3, WIDTH])], 0), 0)),
    "with a row of zeros": (W, lambda s, x: tf.reduce_mean(tf.pad(x, [[1, 0], [0, 0]]), 0)),
    "a branch by the rows": ((), lambda s, x: tf.cond(tf.reduce_max(x) > 2, lambda: 1.0, lambda: 0.0)),
    "random": ((), lambda s, x: drawn()),
    "state along rows": (W, lambda s, x: tf.scan(lambda total, row: total + row, x, s)[-1]),
    "by Python": (W, lambda s, x: tf.reduce_sum(sorted_by_python(x), 0)),
    "mean of integers": ((), lambda s, x: tf.cast(tf.reduce_mean(tf.cast(x * 10, tf.int32)), "float32")),
    "half the rows": ((), lambda s, x: tf.cast(tf.shape(x)[0] // 2, "float32")),
    "a rounded sum": ((), lambda s, x: tf.round(tf.reduce_sum(x))),
    "decay by rows": ((), lambda s, x: (s + 1) * tf.pow(0.99, count(x))),
    "quantile": ((), lambda s, x: ops.quantile(x, 0.5)),
    "the shape of rows": ((2,), lambda s, x: tf.cast(tf.shape(x), "float32")),
}  # fmt: skip
# Of integers and bools, these are what one device has; the others are refused.
WHOLE = {
    "number of rows": ("int32", lambda s, x: s + tf.shape(x)[0]),
    "number of elements": ("int64", lambda s, x: s + tf.size(x, tf.int64)),
    "number of steps": ("int64", lambda s, x: s + 1),
    "number of positives": ("int32", lambda s, x: s + tf.math.count_nonzero(x > 0, dtype=tf.int32)),
    "number in each code": ("int32", lambda s, x: s + tf.reduce_sum(tf.cast(codes(x) == 1, "int32"))),
    "in turn": ("bool", lambda s, x: tf.logical_not(s)),
}
REFUSED = {
    "number of some rows": ("int32", lambda s, x: s + tf.shape(x[x[:, 0] > 0])[0]),
    "number of places": ("int32", lambda s, x: s + tf.shape(tf.where(x > 0))[0]),
    "number of codes": ("int32", lambda s, x: s + tf.size(tf.unique(codes(x))[0])),
    "number of pairs": ("int32", lambda s, x: s + tf.shape(x)[0] // 2),
    "divided": ("int32", lambda s, x: s + tf.raw_ops.Div(x=tf.reduce_sum(codes(x)), y=7)),
    "largest code": ("int32", lambda s, x: tf.maximum(s, tf.reduce_max(codes(x)))),
    "ever above": ("bool", lambda s, x: s | tf.reduce_any(x > 2)),
}


def all_kinds() -> dict:
    """Of each kind of state: shape, dtype, and what is assigned, from the state and the rows."""
    floats = {name: (shape, "float32", lambda s, x, f=f: s + f(s, x)) for name, (shape, f) in (EQUAL | TOLD).items()}
    return floats | {name: ((), dtype, f) for name, (dtype, f) in (WHOLE | REFUSED).items()}


class States(keras.layers.Layer):
    """Passes its input on, keeps all kinds of state, and notes what is said to each."""

    def build(self, shape):
        self.states, self.told = {}, {}
        for place, (name, (dims, dtype, _)) in enumerate(all_kinds().items()):
            self.states[name] = self.add_weight(dims, "zeros", dtype, trainable=False, name=f"state{place}")

    def call(self, x, training=False):
        if training:
            for name, (_, _, update) in all_kinds().items():
                self.told[name] = self.said_to(self.states[name], update, x)
        return x

    def said_to(self, state, update, x) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state.assign(update(tf.convert_to_tensor(state), x))
            except ValueError as error:
                return f"refused: {error}"
        return "; ".join(f"warned: {each.message}" for each in caught if state.name in str(each.message))


def run(strategy=None) -> dict:
    """By name of a kind what was said, and the state of each local replica."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        layer = States()
        model = keras.Sequential([keras.Input((WIDTH,)), layer, keras.layers.Dense(1, kernel_initializer="ones")])
    random = np.random.default_rng(0)
    x, y = random.normal(size=(SAMPLES, WIDTH)).astype("f4"), random.normal(size=(SAMPLES, 1)).astype("f4")
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile="auto" if strategy else False)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    values = {name: state.value for name, state in layer.states.items()}
    parts = {name: [part.numpy() for part in getattr(v, "values", [v])] for name, v in values.items()}
    return {name: (layer.told[name], parts[name]) for name in parts}


@pytest.fixture(scope="module")
def expected():
    return {name: parts[0] for name, (_, parts) in run().items()}


@pytest.fixture(scope="module", params=[sweep(2), 3])
def found(request):
    return run(tfzero.ZeroStrategy(2, devices=[f"CPU:{k}" for k in range(request.param)]))


def check(name, told, parts, expected):
    for part in parts:
        np.testing.assert_array_equal(part, parts[0], err_msg=name)
    if name in TOLD:
        assert told.startswith("warned") and "neither a sum nor a mean" in told, told
    elif name in REFUSED:
        assert re.match(r"refused: The variable '[^']*state\d+:0' .* would differ", told), told
    else:
        assert told == ""
        np.testing.assert_allclose(parts[0], expected, rtol=2e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", all_kinds())
def test_a_state_is_that_of_one_device_or_is_told(name, found, expected):
    check(name, *found[name], expected[name])


def in_a_worker():
    return run(tfzero.ZeroStrategy(1))


@pytest.mark.parametrize("devices", [2, sweep(1)])
def test_on_two_workers(expected, devices):
    results = pool.run(in_a_worker, workers=2, cpu_devices=devices)
    for name in expected:
        first, second = (result[name] for result in results)
        check(name, first[0], [*first[1], *second[1]], expected[name])


# Updates that only some replicas make.


class Sometimes(keras.layers.Layer):
    """Counts in a branch or in a loop, as `how` does it."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def build(self, shape):
        self.times = self.add_weight((), "zeros", trainable=False, name="times")

    def call(self, x, training=False):
        if training:
            self.how(x, self.times)
        return x


def by_rows(x, times):
    tf.cond(tf.reduce_max(x) > 2, lambda: counted(times, 1.0), lambda: 0)


def sums_by_rows(x, times):
    tf.cond(tf.reduce_max(x) > 2, lambda: counted(times, count(x)), lambda: 0)


def in_two_branches(x, times):
    tf.cond(times < 99, lambda: tf.cond(tf.reduce_max(x) > 2, lambda: counted(times, 1.0), lambda: 0), lambda: 0)


def as_often_as_rows(x, times):
    tf.while_loop(lambda k: k < tf.shape(x)[0], lambda k: k + 1 + counted(times, 1.0), [0])


def by_case(x, times):
    tf.switch_case(codes(x)[0] % 2, [lambda: counted(times, 1.0), lambda: 0])


def by_steps(x, times):
    tf.cond(times < 30, lambda: counted(times, count(x)), lambda: 0)


def twice(x, times):
    tf.while_loop(lambda k: k < 2, lambda k: k + 1 + counted(times, 1.0), [0])


def rows_twice(x, times):
    tf.while_loop(lambda k: k < 2, lambda k: k + 1 + counted(times, count(x)), [0])


def counted(times, value):
    times.assign_add(value)
    return 0


def train(how, strategy=None):
    with strategy.scope() if strategy else contextlib.nullcontext():
        layer = Sometimes(how)
        model = keras.Sequential([keras.Input((WIDTH,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile="auto" if strategy else False)
    x = np.random.default_rng(0).normal(size=(SAMPLES, WIDTH)).astype("f4")
    model.fit(x, x[:, :1], batch_size=BATCH, shuffle=False, verbose=0)
    return float(layer.times.numpy())


def replicas(number):
    return tfzero.ZeroStrategy(2, devices=[f"CPU:{k}" for k in range(number)])


@pytest.mark.parametrize("how", [by_rows, sums_by_rows, in_two_branches, as_often_as_rows, by_case])
def test_an_update_that_only_some_replicas_make_is_refused(how):
    """Each would have a state of its own, or wait for the others for ever."""
    with pytest.raises(
        ValueError, match=r"times:0' is updated in a branch or a loop.*tf\.where\(condition, new, old\)"
    ):
        train(how, replicas(2))


def test_rows_are_not_counted_in_a_loop():
    """Replicas would wait for each other for ever."""
    with pytest.raises(ValueError, match=r"times:0' is updated in a loop .*update it once, after the loop"):
        train(rows_twice, replicas(2))


@pytest.mark.parametrize("how", [by_steps, twice])
def test_an_update_in_a_branch_that_all_take(how):
    assert train(how, replicas(3)) == train(how)


def refused_in_a_worker():
    try:
        train(by_rows, tfzero.ZeroStrategy(1))
    except ValueError as error:
        return str(error)


def test_an_update_that_only_some_workers_make_is_refused():
    for told in pool.run(refused_in_a_worker, workers=2, cpu_devices=2):
        assert "times:0' is updated in a branch or a loop" in told


def test_what_depends_on_rows_as_a_whole_is_not_taken_apart():
    """Each part would be computed by operations of its own; zeros are of any kind."""
    with tf.Graph().as_default() as graph:
        rows = tf.compat.v1.placeholder(tf.float32, [None, 3])
        known = Dependence([(rows, ROWS)], graph)
        most, total, flag = tf.reduce_max(rows, 0), tf.reduce_sum(rows, 0), tf.constant([True, False, True])
        assert known.kind(most + tf.reduce_min(rows, 0)) == OTHER
        assert known.kind(tf.where(flag, most, tf.zeros([3]))) == OTHER
        assert known.kind(tf.where(flag, total, tf.zeros([3]))) == SUM
        assert known.kind(tf.where(flag, total, tf.ones([3]))) == known.kind(most + total) == MIXED
