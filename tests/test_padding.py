"""Replicas without rows of a batch compute a row of padding, of which nothing counts: the result is one device's."""

import keras
import numpy as np
import oracle
import pool
import pytest
import tensorflow as tf
from keras import layers, ops
from marks import sweep

import tfzero

# Nine samples in batches of four for three replicas (2, 1, 1); in the last batch, of one sample, two have none.
DATA = oracle.Data(samples=9, features=12)
BATCH = 4
EXACT = {"rtol": 2e-5, "atol": 2e-6}


def make_strategy(stage=2, replicas=3, **arguments):
    return tfzero.ZeroStrategy(stage, devices=[f"CPU:{k}" for k in range(replicas)], min_shard_elements=8, **arguments)


class Unit(layers.Layer):
    """Rows of length one: a row of zeros would give NaN."""

    def call(self, inputs):
        return inputs / ops.sqrt(ops.sum(ops.square(inputs), 1, keepdims=True))


class Watching(layers.Layer):
    """State of each kind that replicas combine; and losses that do and do not depend on rows."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        arguments = {"trainable": False, "initializer": "zeros"}
        self.seen = self.add_weight(shape=(), name="seen", **arguments)
        self.mean = self.add_weight(shape=(shape[-1],), name="mean", **arguments)
        self.most = self.add_weight(shape=(), name="most", aggregation="sum", **arguments)
        self.calls = self.add_weight(shape=(), dtype="int32", name="calls", **arguments)

    def call(self, inputs, training=False):
        if training:
            self.seen.assign_add(tf.cast(tf.shape(inputs)[0], tf.float32))
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(inputs, 0))
            self.most.assign_add(tf.reduce_sum(tf.cast(inputs > 0.1, tf.float32)))
            self.calls.assign_add(1)
        self.add_loss(0.1 * ops.mean(ops.square(inputs)) + 0.01 * ops.sum(ops.square(self.scale)))
        return inputs * self.scale


def kernels():
    images = [layers.Reshape((4, 3, 1)), layers.Conv2D(5, 3, padding="same"), layers.DepthwiseConv2D(2, padding="same")]
    images += [layers.SeparableConv2D(4, 2, padding="same"), layers.Conv2DTranspose(3, 2, padding="same")]
    images += [layers.MaxPooling2D((2, 1)), layers.AveragePooling2D((2, 1)), layers.Flatten()]
    return [*images, layers.Dense(3, activation="softmax")]


def recurrent():
    return [layers.Reshape((4, 3)), layers.LSTM(5, return_sequences=True), layers.GRU(4), layers.Dense(3, "softmax")]


def normalized():
    batch = layers.BatchNormalization(momentum=0.7, synchronized=True)
    return [Unit(), layers.Dense(7), batch, Watching(), layers.Dense(3, "softmax", activity_regularizer="l2")]


def sequential(make_layers):
    return lambda: keras.Sequential([keras.Input((12,)), *make_layers()])


def arguments():
    metrics = ["accuracy", keras.metrics.AUC(name="auc"), keras.metrics.F1Score(average="macro")]
    return {"optimizer": keras.optimizers.SGD(0.1), "loss": "categorical_crossentropy", "metrics": metrics}


@pytest.mark.parametrize(
    ("make_layers", "stage"),
    [
        (recurrent, 2),
        sweep(recurrent, 3),
        sweep(kernels, 2),
        sweep(kernels, 3),
        sweep(normalized, 2),
        sweep(normalized, 3),
    ],
)
def test_fit_evaluate_and_predict(make_layers, stage):
    outcomes = oracle.train_both(make_strategy(stage), sequential(make_layers), arguments, DATA, batch_size=BATCH)
    oracle.assert_same(*outcomes, **EXACT)


def test_the_first_step_on_a_single_sample():
    """`train_on_batch` knows the number of rows before anything is traced."""
    x, y = DATA.arrays()
    with make_strategy().scope():
        ours = sequential(lambda: [*kernels()[:-1], layers.BatchNormalization(), layers.Dense(3)])()
    reference = keras.models.clone_model(ours)
    reference.set_weights(ours.get_weights())
    for model in (ours, reference):
        model.compile("sgd", "mse", jit_compile=False) if model is reference else model.compile("sgd", "mse")
    losses = [[model.train_on_batch(x[:1], y[:1]) for _ in range(2)] for model in (ours, reference)]
    np.testing.assert_allclose(*losses, **EXACT)
    for mine, theirs in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, **EXACT)
    np.testing.assert_allclose(*[model.predict_on_batch(x[:1]) for model in (ours, reference)], **EXACT)
    np.testing.assert_allclose(*[model.test_on_batch(x[:1], y[:1]) for model in (ours, reference)], **EXACT)


def test_a_loss_for_each_sample():
    """On one device the gradient is that of the sum, to which replicas add up without a scale."""

    def make_arguments():
        return {"optimizer": keras.optimizers.SGD(0.1), "loss": keras.losses.MeanSquaredError(reduction="none")}

    make_model = sequential(lambda: [layers.Dense(7, "tanh"), layers.Dense(3)])
    outcomes = oracle.train_both(make_strategy(), make_model, make_arguments, DATA, batch_size=BATCH)
    oracle.assert_same(*outcomes, **EXACT)


def test_eagerly():
    options = {"run_eagerly": True}
    outcomes = oracle.train_both(
        make_strategy(), sequential(kernels), lambda: arguments() | options, DATA, batch_size=BATCH, epochs=1
    )
    oracle.assert_same(*outcomes, **EXACT)


class OwnStep(keras.Model):
    """A `train_step` that counts rows by itself, and adds a penalty of which each replica takes its part."""

    def __init__(self):
        super().__init__()
        self.layer = layers.Dense(3, name="layer")
        self.loss_metric = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.layer(inputs)

    @property
    def metrics(self):
        return [self.loss_metric]

    def train_step(self, data):
        x, y = data
        replica = tf.distribute.get_replica_context()
        rows = tf.cast(tf.shape(x)[0], tf.float32)
        count = replica.all_reduce("SUM", rows)
        with tf.GradientTape() as tape:
            errors = tf.reduce_sum((self(x, training=True) - y) ** 2, 1)
            penalty = tf.reduce_sum(self.layer.kernel**2) / replica.num_replicas_in_sync
            loss = tf.reduce_sum(errors) / count + 0.1 * penalty
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.loss_metric.update_state(errors)
        return {"loss": self.loss_metric.result()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_train_step_of_the_users_own(stage):
    x, y = DATA.arrays()
    weights = []
    for strategy in (make_strategy(stage), tf.distribute.get_strategy()):
        with strategy.scope():
            model = OwnStep()
            model.layer.build((None, 12))
        model.layer.kernel.assign(np.linspace(-1, 1, 36).reshape(12, 3))
        model.compile(keras.optimizers.SGD(0.05), loss="mse")
        history = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
        weights.append([*model.get_weights(), np.array(history["loss"])])
    for mine, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(mine, theirs, **EXACT)


def loop_results(x):
    """What a function of a replica can return."""
    replica = tf.distribute.get_replica_context()
    gathered = replica.all_gather(x, axis=0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        weighted = tf.reduce_sum(replica.all_gather(x**2, axis=0) * tf.range(1.0, 3.0))
    return {
        "rows": x * 2,
        "columns": tf.transpose(x),
        "sum": tf.reduce_sum(x),
        "count": tf.shape(x)[0],
        "largest": tf.reduce_max(x),
        "same": tf.constant(7.0) + replica.all_reduce("SUM", tf.reduce_sum(x)),
        "ragged": tf.RaggedTensor.from_tensor(x),
        "sparse": tf.sparse.from_dense(x),
        "gathered": gathered,
        "slope": tape.gradient(weighted, x),
        "word": "as it is",
    }


@pytest.mark.parametrize("is_function", [True, False])
def test_results_of_a_replica(is_function):
    """Two of four replicas have rows, whether TensorFlow traces around the run or within it."""
    strategy = make_strategy(replicas=4)
    x = np.arange(1, 5, dtype="float32").reshape(2, 2)
    batch = strategy.cut_batch(x)
    if is_function:
        results = strategy.run(tf.function(loop_results), args=(batch,))
    else:
        results = tf.function(lambda batch: strategy.run(loop_results, args=(batch,)))(batch)
    local = {name: strategy.experimental_local_results(result) for name, result in results.items()}
    assert [tuple(part.shape) for part in local["rows"]] == [(1, 2)] * 2 + [(0, 2)] * 2
    np.testing.assert_array_equal(tf.concat(local["rows"], 0), 2 * x)
    np.testing.assert_array_equal(tf.concat(local["columns"], 1), x.T)
    assert [part.numpy() for part in local["sum"]] == [3, 7, 0, 0]
    assert [part.numpy() for part in local["count"]] == [1, 1, 0, 0]
    assert [part.numpy() for part in local["largest"]] == [2, 4, 0, 0]
    assert [part.numpy() for part in local["same"]] == [17] * 4
    assert tf.concat(local["ragged"], 0).to_list() == x.tolist()
    np.testing.assert_array_equal(tf.sparse.to_dense(tf.sparse.concat(0, list(local["sparse"]))), x)
    for part in local["gathered"]:
        np.testing.assert_array_equal(part, x)
    np.testing.assert_array_equal(tf.concat(local["slope"], 0), 4 * 2 * x * [1, 2])
    assert results["word"] == "as it is"


def test_a_batch_of_several_kinds_of_tensors():
    strategy = make_strategy()
    batch = {
        "ragged": tf.ragged.constant([[1, 2], [3]]),
        "sparse": tf.sparse.from_dense([[0, 4], [5, 0]]),
        "words": tf.constant(["a", "b"]),
    }

    @tf.function
    def step(batch):
        parts = {"ragged": batch["ragged"].flat_values, "sparse": batch["sparse"].values, "words": batch["words"]}
        lengths = tf.stack([batch["ragged"].nrows(), batch["sparse"].dense_shape[0], tf.size(parts["words"], tf.int64)])
        return parts["words"], tf.ensure_shape(lengths, [3]), tf.reduce_sum(parts["ragged"])

    results = strategy.run(step, args=(strategy.cut_batch(batch),))
    words, lengths, sums = map(strategy.experimental_local_results, results)
    assert [part.numpy().tolist() for part in words] == [[b"a"], [b"b"], []]
    assert [part.numpy().tolist() for part in lengths] == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert [part.numpy() for part in sums] == [3, 3, 0]


def on_each(strategy, function, *arguments, **keywords):
    """Results of a replica's function by replica: where TensorFlow traces around the run, and within it."""
    around = tf.function(lambda *arguments: strategy.run(function, args=arguments, kwargs=keywords))
    for results in (around(*arguments), strategy.run(tf.function(function), args=arguments, kwargs=keywords)):
        yield tf.nest.map_structure(
            lambda each: [part.numpy() for part in strategy.experimental_local_results(each)], results
        )


def test_what_is_gathered():
    """Numbers of rows, means, and what does not depend on rows, where every replica has as many elements."""
    strategy = make_strategy()
    x = np.arange(1, 3, dtype="float32").reshape(1, 2)

    def gather(x):
        parts = tf.shape(x)[:1], tf.reduce_mean(x, 0, keepdims=True), tf.ones([1])
        return [tf.distribute.get_replica_context().all_gather(part, 0) for part in parts]

    for counts, means, same in on_each(strategy, gather, strategy.cut_batch(x)):
        np.testing.assert_array_equal(counts, [[1, 0, 0]] * 3)
        np.testing.assert_array_equal(means, [[[1, 2], [0, 0], [0, 0]]] * 3)
        np.testing.assert_array_equal(same, [[1, 1, 1]] * 3)


def compare_rows(kernel, x, gather, reduce):
    """A loss in which each row is compared with all rows, and its gradient, both of the whole batch."""
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        mine = tf.tanh(x @ kernel)
        loss = tf.reduce_sum(tf.reduce_logsumexp(mine @ tf.transpose(gather(mine)), 1))
    return reduce(loss), reduce(tape.gradient(loss, kernel))


@pytest.mark.parametrize("rows", [1, sweep(2), 4])
def test_a_loss_that_compares_rows(rows):
    strategy, x = make_strategy(), DATA.arrays()[0][:rows]
    kernel = tf.constant(np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3))

    def compare(x):
        replica = tf.distribute.get_replica_context()
        return compare_rows(kernel, x, lambda each: replica.all_gather(each, 0), lambda e: replica.all_reduce("SUM", e))

    expected = compare_rows(kernel, tf.constant(x), tf.identity, tf.identity)
    for results in on_each(strategy, compare, strategy.cut_batch(x)):
        for mine, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(mine, [theirs] * 3, **EXACT)
    if rows == 1:  # eagerly, where the first replica has rows for certain
        for mine, theirs in zip(strategy.run(compare, args=(strategy.cut_batch(x),)), expected, strict=True):
            np.testing.assert_allclose(strategy.experimental_local_results(mine)[0], theirs, **EXACT)


def test_parts_of_the_users_own_that_are_gathered():
    """Some replicas have rows for certain; what they do must still be what the others do."""
    strategy, rows = make_strategy(), [2, 1, 0]
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: tf.ones([rows[context.replica_id_in_sync_group], 2])
    )

    def gather(part):
        return tf.distribute.get_replica_context().all_gather(part, 0)

    for results in on_each(strategy, gather, parts):
        np.testing.assert_array_equal(results, np.ones([3, 3, 2]))


def test_parts_beside_what_is_no_part():
    """What an earlier run gave: rows, and a vector that every replica has."""
    strategy = make_strategy()

    def first(x):
        return x, x[0]

    def second(x, vector):
        return tf.reduce_mean(x) + 0 * tf.reduce_sum(vector)

    step = tf.function(lambda batch: strategy.run(second, args=strategy.run(first, args=(batch,))))
    results = strategy.experimental_local_results(step(strategy.cut_batch(np.ones([1, 2], "float32"))))
    np.testing.assert_array_equal([part.numpy() for part in results], [1, 0, 0])


def test_a_batch_that_a_function_captures():
    strategy = make_strategy()
    batch = strategy.cut_batch(np.ones([1, 2], "float32"))

    def count(x):
        replica = tf.distribute.get_replica_context()
        return tf.shape(x)[0], replica.all_reduce("SUM", tf.shape(x)[0]), replica.all_gather(x, 0)

    counts, total, gathered = tf.function(lambda: strategy.run(count, args=(batch,)))()
    assert [int(part) for part in strategy.experimental_local_results(counts)] == [1, 0, 0]
    assert [int(part) for part in strategy.experimental_local_results(total)] == [1, 1, 1]
    assert [part.shape for part in strategy.experimental_local_results(gathered)] == [(1, 2)] * 3


def test_numbers_of_ragged_and_sparse_rows():
    strategy = make_strategy()
    batch = {"ragged": tf.ragged.constant([[1, 2]]), "sparse": tf.sparse.from_dense([[0, 4]])}

    def count(batch):
        ragged, sparse = batch["ragged"], batch["sparse"]
        return ragged.nrows(), tf.shape(ragged.to_tensor())[0], tf.shape(tf.sparse.to_dense(sparse))[0]

    for results in on_each(strategy, count, strategy.cut_batch(batch)):
        assert results == (([1, 0, 0],) * 3)


def test_numbers_of_elements_that_are_picked():
    """Sums of what rows are picked from have as many elements as a replica has picked."""
    strategy, x = make_strategy(), np.arange(1, 3, dtype="float32").reshape(1, 2)

    def count(x):
        picked = tf.boolean_mask(x, x > 0)
        return tf.size(picked + picked), tf.shape(tf.concat([picked + picked, picked - picked], 0))[0]

    for results in on_each(strategy, count, strategy.cut_batch(x)):
        assert results == ([2, 0, 0], [4, 0, 0])


def test_a_coefficient_that_is_given():
    """What all replicas are given, as an argument or from the function around, is no part of the batch."""
    strategy, x = make_strategy(), DATA.arrays()[0][:1]

    def slope(x, weight):
        with tf.GradientTape() as tape:
            kernel = tf.ones([12])
            tape.watch(kernel)
            loss = tf.reduce_sum(x * kernel) + weight * tf.reduce_sum(kernel**2) / 3
        return tf.distribute.get_replica_context().all_reduce("SUM", tape.gradient(loss, kernel))

    batch, weight = strategy.cut_batch(x), tf.constant(0.5)
    around = tf.function(lambda batch, weight: strategy.run(lambda x: slope(x, weight), args=(batch,)))
    results = [*on_each(strategy, slope, batch, weight), *on_each(strategy, slope, batch, weight=weight)]
    results.append([part.numpy() for part in strategy.experimental_local_results(around(batch, weight))])
    for each in results:
        np.testing.assert_allclose(each, [x[0] + 1] * 3, **EXACT)


MATRIX = tf.reshape(tf.linspace(-0.5, 0.9, 144), [12, 12])
FORMS = {
    "tanh": tf.tanh,
    "relu": tf.nn.relu,
    "sigmoid": tf.sigmoid,
    "product": lambda kernel: tf.reshape(tf.matmul(MATRIX, kernel[:, None]), [12]),
    "einsum": lambda kernel: tf.einsum("ij,j->i", MATRIX, kernel),
    "norm": lambda kernel: kernel / tf.norm(kernel),
    "clipped": lambda kernel: tf.clip_by_value(kernel, -0.5, 0.5),
    "picked": lambda kernel: tf.gather(kernel, [1, *range(1, 12)]),
    "joined": lambda kernel: tf.concat([kernel[:6], 2 * kernel[6:]], 0),
    "stacked": lambda kernel: tf.reshape(tf.stack(tf.unstack(kernel)), [12]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_penalty_on_what_is_made_of_a_variable(form):
    """The gradients of losses and of the penalty come together before they reach the variable."""
    strategy, x = make_strategy(), DATA.arrays()[0][:1]
    variable = tf.linspace(-1.0, 1.0, 12)

    def slope(x, replicas=3):
        with tf.GradientTape() as tape:
            tape.watch(variable)
            kernel = FORMS[form](variable)
            loss = tf.reduce_sum(tf.linalg.matvec(x, kernel) ** 2) + tf.reduce_sum(kernel**2) / replicas
        return tf.convert_to_tensor(tape.gradient(loss, variable))

    def summed(x):
        return tf.distribute.get_replica_context().all_reduce("SUM", slope(x))

    results = strategy.run(tf.function(summed), args=(strategy.cut_batch(x),))
    expected = slope(tf.constant(x), replicas=1)
    np.testing.assert_allclose(strategy.experimental_local_results(results)[0], expected, **EXACT)


def test_a_loop_over_rows_counts_them():
    strategy = make_strategy()
    on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
    with strategy.scope():
        count, twice, mean = tf.Variable(0, **on_read), tf.Variable(0.0, **on_read), keras.metrics.Mean()

    def step(x):
        for row in x:
            count.assign_add(1)
            twice.assign(twice + 2)
            mean.update_state(row)

    x = np.arange(10, dtype="float32").reshape(5, 2)
    for batch in (x[:1], x[1:]):
        strategy.run(tf.function(step), args=(strategy.cut_batch(batch),))
    assert (count.numpy(), twice.numpy(), mean.result().numpy()) == (5, 10, 4.5)


class Pair(tf.experimental.ExtensionType):
    rows: tf.Tensor
    total: tf.Tensor


def test_results_of_other_kinds():
    strategy = make_strategy()
    with strategy.scope():
        table = tf.Variable(tf.ones([5, 2]))

    def results(x):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(tf.gather(table, tf.zeros([tf.shape(x)[0]], tf.int32)))
        slices = tape.gradient(total, table)
        unknown = tf.numpy_function(lambda x: 2 * x, [x], tf.float32)
        return {"slices": slices.values, "of slices": slices, "unknown": unknown, "pair": Pair(x, total)}

    batch = strategy.cut_batch(np.ones([1, 2], "float32"))
    found = tf.function(lambda batch: strategy.run(results, args=(batch,)))(batch)
    local = {name: strategy.experimental_local_results(each) for name, each in found.items()}
    assert [part.shape[0] for part in local["slices"]] == [1, 0, 0]
    assert [part.values.shape[0] for part in local["of slices"]] == [1, 0, 0]
    assert [part.shape[0] for part in local["unknown"]] == [1, 0, 0]
    assert [part.rows.shape[0] for part in local["pair"]] == [1, 0, 0]
    assert [float(part.total) for part in local["pair"]] == [2, 0, 0]


def test_autograph_converts_what_the_function_asks_for():
    strategy = make_strategy()

    @tf.function
    def branch(x):
        if tf.reduce_sum(x) > 100:
            x = -x
        return x

    around = tf.function(lambda batch: strategy.run(branch, args=(batch,)), autograph=False)
    results = strategy.experimental_local_results(around(strategy.cut_batch(np.ones([1, 2], "float32"))))
    assert [part.shape for part in results] == [(1, 2), (0, 2), (0, 2)]


def test_no_layer_meets_a_batch_without_rows():
    seen = []

    class Note(layers.Layer):
        def call(self, inputs):
            rows = tf.numpy_function(lambda rows: (seen.append(int(rows)), rows)[1], [tf.shape(inputs)[0]], tf.int32)
            return inputs + 0 * tf.cast(tf.ensure_shape(rows, []), inputs.dtype)

    oracle.train(
        make_model_of(make_strategy(), lambda: [Note(), layers.Dense(3)]),
        *DATA.arrays(),
        {"loss": "mse"},
        batch_size=BATCH,
    )
    assert set(seen) == {1, 2}


def test_a_data_set_of_parts_of_the_users_own():
    """Parts of two samples for each of three replicas; the last ones are of two, one and none."""
    strategy, (x, y) = make_strategy(), DATA.arrays()

    def parts(context):
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(2)

    model = make_model_of(strategy, kernels)
    reference = sequential(kernels)()
    reference.set_weights(model.get_weights())
    model.compile(**arguments())
    data = strategy.distribute_datasets_from_function(parts)
    model.fit(data, epochs=1, steps_per_epoch=2, shuffle=False, verbose=0)
    reference.compile(**arguments(), jit_compile=False)
    reference.fit(x, y, batch_size=6, epochs=1, shuffle=False, verbose=0)
    for mine, theirs in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, **EXACT)


def make_model_of(strategy, make_layers):
    with strategy.scope():
        return sequential(make_layers)()


def train_on_workers(devices):
    """On workers: nine samples in batches of four, of which the last one leaves most replicas without rows."""
    outcomes = []
    for make_layers, stage in [(kernels, 2), (normalized, 3)]:
        names = [f"CPU:{k}" for k in range(devices)]
        strategy = tfzero.ZeroStrategy(stage, devices=names, min_shard_elements=8)
        keras.utils.set_random_seed(5)
        model = make_model_of(strategy, make_layers)
        outcomes.append(oracle.train(model, *DATA.arrays(), arguments(), batch_size=BATCH))
    return outcomes


@pytest.mark.parametrize("devices", [2, sweep(1)])
def test_workers(devices):
    fleet = pool.run(train_on_workers, workers=2, args=(devices,), cpu_devices=devices)
    for case, make_layers in enumerate((kernels, normalized)):
        keras.utils.set_random_seed(5)
        one_device = oracle.train(sequential(make_layers)(), *DATA.arrays(), arguments(), batch_size=BATCH)
        for outcomes in fleet:
            oracle.assert_same(outcomes[case], one_device, **EXACT)
