"""Workers that were given different things, or read different data, are told before anything is trained.

And what may differ between workers is no obstacle. Each fleet does all of it, one after the other.
"""

import contextlib
import time
import traceback
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero

ROWS, BATCH = 48, 16
pytestmark = pytest.mark.timeout(2 * FLEET_SECONDS)


def arrays():
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 8)).astype("float32")
    return x, x.sum(1, keepdims=True)


def make(strategy, **settings):
    with strategy.scope():
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(17, **settings), keras.layers.Dense(1)])


def compiled(strategy, **arguments):
    model = make(strategy)
    model.compile(**{"optimizer": keras.optimizers.SGD(0.01), "loss": "mse"} | arguments)
    return model


def fit(model, x=None, y=None, **arguments):
    if x is None:
        x, y = arrays()
    data = {} if isinstance(x, tf.data.Dataset | keras.utils.PyDataset) else {"batch_size": BATCH}
    return model.fit(x, y, **data | {"verbose": 0, "shuffle": False} | arguments).history["loss"]


def reversed_on(index, *values):
    return [value[:: -1 if index else 1] for value in values]


# Each is refused; the next is told apart from it. They are given the strategy and the worker's index.


def other_loss(strategy, index):
    compiled(strategy, loss=["mse", "mae"][index])


def other_delta(strategy, index):
    compiled(strategy, loss=keras.losses.Huber(delta=1.0 + index))


def other_closure(strategy, index):
    factor = 1.0 + index
    compiled(strategy, loss=lambda y_true, y_pred: factor * tf.abs(y_true - y_pred))


def other_metrics(strategy, index):
    compiled(strategy, metrics=[["mae"], ["mae", "mse"]][index])


def other_schedule(strategy, index):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100 + index)
    compiled(strategy, optimizer=keras.optimizers.Adam(schedule))


def other_rate_set_later(strategy, index):
    model = compiled(strategy)
    if index:
        rate = model.optimizer.inner_optimizer.learning_rate.value
        getattr(rate, "values", [rate])[0].assign(0.5)  # this worker's alone
    fit(model)


def other_policy(strategy, index):
    model = make(strategy, dtype=["float32", "mixed_bfloat16"][index])
    model.compile("sgd", "mse")
    fit(model)


def other_activation(strategy, index):
    model = make(strategy, activation=["tanh", "relu"][index])
    model.compile("sgd", "mse")
    fit(model)


def other_class_weight(strategy, index):
    fit(compiled(strategy), class_weight={0: 1.0, 1: 1.0 + index})


def other_epochs(strategy, index):
    fit(compiled(strategy), epochs=2 + index)


def other_order(strategy, index):
    fit(compiled(strategy), *reversed_on(index, *arrays()))


def other_content(strategy, index):
    x, y = arrays()
    fit(compiled(strategy), x + index, y)


def other_second_batch(strategy, index):
    x, y = arrays()
    x[BATCH] += index
    fit(compiled(strategy), x, y)


def other_width(strategy, index):
    """The model takes both."""
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((None,)), keras.layers.Lambda(lambda x: x[:, :1], (1,)), keras.layers.Dense(1)]
        )
    model.compile("sgd", "mse")
    x, y = arrays()
    fit(model, x[:, : 8 - index], y)


def other_validation_data(strategy, index):
    x, y = arrays()
    fit(compiled(strategy), validation_data=(x + index, y))


def other_data_to_evaluate(strategy, index):
    compiled(strategy).evaluate(*reversed_on(index, *arrays()), batch_size=BATCH, verbose=0)


def unseeded_shuffle(strategy, index):
    tf.random.set_seed(None)
    fit(compiled(strategy), tf.data.Dataset.from_tensor_slices(arrays()).shuffle(ROWS).batch(BATCH))


class Shuffling(keras.utils.PyDataset):
    """As people write it: the indexes are shuffled by nobody's seed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.random, self.indexes = np.random.default_rng(), np.arange(ROWS)

    def __len__(self):
        return ROWS // BATCH

    def __getitem__(self, index):
        return [value[self.indexes[index * BATCH :][:BATCH]] for value in arrays()]

    def on_epoch_end(self):
        self.random.shuffle(self.indexes)


def shuffling_py_dataset(strategy, index):
    fit(compiled(strategy), Shuffling())


def shuffling_py_dataset_with_threads(strategy, index):
    fit(compiled(strategy), Shuffling(workers=2, max_queue_size=2))


class ShufflingLater(Shuffling):
    """Whose first epoch is the same."""

    def on_epoch_end(self):
        self.ended = getattr(self, "ended", 0) + 1
        if self.ended > 1:
            super().on_epoch_end()


def shuffling_from_the_second_epoch(strategy, index):
    fit(compiled(strategy), ShufflingLater(), epochs=2)


def other_generator(strategy, index):
    x, y = reversed_on(index, *arrays())
    batches = ((x[k : k + BATCH], y[k : k + BATCH]) for k in range(0, ROWS, BATCH))
    compiled(strategy).fit(batches, steps_per_epoch=3, verbose=0)


def other_batch(strategy, index):
    compiled(strategy).train_on_batch(*reversed_on(index, *arrays()))


def other_batch_to_test(strategy, index):
    compiled(strategy).test_on_batch(*reversed_on(index, *arrays()))


def several_steps_per_execution(strategy, index):
    fit(compiled(strategy, steps_per_execution=3), *reversed_on(index, *arrays()))


def eagerly(strategy, index):
    fit(compiled(strategy, run_eagerly=True), *reversed_on(index, *arrays()))


def custom_loop(strategy, index):
    dataset = tf.data.Dataset.from_tensor_slices(tuple(reversed_on(index, *arrays()))).batch(BATCH)
    for _ in strategy.experimental_distribute_dataset(dataset):
        raise AssertionError("a batch was given out")


def loop_in_a_function(strategy, index):
    dataset = tf.data.Dataset.from_tensor_slices(tuple(reversed_on(index, *arrays()))).batch(BATCH)

    @tf.function
    def run(iterator):
        for _ in range(3):
            strategy.run(lambda batch: tf.reduce_sum(batch[0]), args=(next(iterator),))

    run(iter(strategy.experimental_distribute_dataset(dataset)))


def cut_by_hand(strategy, index):
    strategy.cut_batch(reversed_on(index, *arrays()))


def strings_and_ragged(strategy, index):
    words = tf.ragged.constant([["a", "b"], ["c"], ["d", "e", "f" * (1 + index)], []])
    next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors({"words": words}))))


def shape_in_predict(strategy, index):
    with strategy.scope():
        model = keras.Sequential([keras.Input((None,)), keras.layers.Lambda(lambda x: x[:, :1])])
    model.predict(arrays()[0][:, : 8 - index], verbose=0)


MODEL, COMPILE, BATCHES = "models or arguments of `fit` differ: ", "arguments of `compile` differ: ", "batches differ"
REFUSED = {
    other_loss: COMPILE + "loss is 'mse' on worker 0 and 'mae' on worker 1",
    other_delta: COMPILE + "loss.delta is 1.0 on worker 0 and 2.0 on worker 1",
    other_closure: COMPILE + "loss.factor is 1.0 on worker 0 and 2.0 on worker 1",
    other_metrics: COMPILE + "metrics[1] is missing on worker 0 and 'mse' on worker 1",
    other_schedule: COMPILE + "optimizer.learning_rate.config.decay_steps is 100 on worker 0 and 101 on worker 1",
    other_rate_set_later: MODEL + "optimizer.learning_rate is 0.00",
    other_policy: MODEL + "layers[1].dtype_policy is 'float32' on worker 0 and 'mixed_bfloat16' on worker 1",
    other_activation: MODEL + "layers[1].activation is 'tanh' on worker 0 and 'relu' on worker 1",
    other_class_weight: MODEL + "class_weight.1 is 1.0 on worker 0 and 2.0 on worker 1",
    other_epochs: MODEL + "epochs is 2 on worker 0 and 3 on worker 1",
    other_order: "batches differ (batch 0 of data set",
    other_content: "of `fit`): x (values) is '0.12573, -0.132105, 0.640423, ... (digest ",
    other_second_batch: "batches differ (batch 1 of data set",
    other_width: "data sets differ: part 0 of a batch is 'TensorSpec(shape=(16, 8)",
    other_validation_data: BATCHES,
    other_data_to_evaluate: "of `evaluate`): x (values)",
    unseeded_shuffle: BATCHES,
    shuffling_py_dataset: BATCHES,
    shuffling_py_dataset_with_threads: BATCHES,
    shuffling_from_the_second_epoch: BATCHES,
    other_generator: BATCHES,
    other_batch: "batches differ (batch 0 of those given to `train_step`): x (values)",
    other_batch_to_test: "of those given to `test_step`",
    several_steps_per_execution: BATCHES,
    eagerly: BATCHES,
    custom_loop: BATCHES,
    loop_in_a_function: BATCHES,
    cut_by_hand: "of those given to `cut_batch`",
    strings_and_ragged: "['words'].values (values)",
    shape_in_predict: "differ",
}

# What may differ, and what is made the same. Each returns what must be equal on all workers.


def own_callbacks_and_verbose(strategy, index):
    notes = [keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)] * index
    return fit(compiled(strategy), callbacks=notes, verbose=2 * index)


class Counting(keras.metrics.Metric):
    """With a start of its own on every worker, which the first worker's takes the place of, and a file."""

    def __init__(self, start, path):
        super().__init__(name="counting")
        self.path = path
        self.count = self.add_variable((), keras.initializers.Constant(start), name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(1.0)

    def result(self):
        return self.count + 0.0


def own_initial_values_and_paths(strategy, index):
    return fit(compiled(strategy, metrics=[Counting(index, f"/tmp/worker{index}")]))


def own_seeds_and_names(strategy, index):
    if index:  # names are counted up in each process
        keras.losses.MeanSquaredError(), keras.metrics.AUC(), keras.layers.Dense(1), keras.optimizers.SGD()
    model = make(strategy, kernel_initializer=keras.initializers.RandomNormal(seed=index))
    model.compile(
        keras.optimizers.SGD(0.01), keras.losses.MeanSquaredError(), metrics=[keras.metrics.MeanSquaredError()]
    )
    return fit(model)


def random_augmentation(strategy, index):
    """Other numbers on every worker, and the same order."""
    tf.random.set_seed(index)
    dataset = tf.data.Dataset.from_tensor_slices(arrays())
    dataset = dataset.map(lambda x, y: (x + tf.random.normal([8]), y), num_parallel_calls=2).batch(BATCH)
    losses = fit(compiled(strategy), dataset)
    return len(losses)


def slow(value):
    def wait(value):
        time.sleep(np.random.default_rng().uniform(0, 0.01))
        return value

    return tf.ensure_shape(tf.numpy_function(wait, [value], tf.float32), [8])


def no_order(strategy, index):
    """`options.deterministic = False`: the order is made the same."""
    options = tf.data.Options()
    options.deterministic = False
    dataset = tf.data.Dataset.from_tensor_slices(arrays()[0]).map(slow, num_parallel_calls=4).with_options(options)
    seen = [strategy.gather(each, 0) for each in strategy.experimental_distribute_dataset(dataset.batch(BATCH))]
    return [np.sort(np.concatenate(seen)[:, 0]).tolist() == np.sort(arrays()[0][:, 0]).tolist(), len(seen)]


def generator_is_not_drawn_ahead(strategy, index):
    """Of a shared generator each pass takes what the last one left, to the batch."""
    drawn = []

    def batches():
        for k in range(100):
            drawn.append(k)
            yield np.full((4, 8), k, "float32"), np.full((4, 1), k, "float32")

    data, model = batches(), compiled(strategy, optimizer=keras.optimizers.SGD(0.0))
    return [fit(model, data, steps_per_epoch=2, epochs=2, batch_size=None)]


def batches_may_differ_later(strategy, index):
    """Only the first ones are compared; this one is told by nobody."""
    x, y = arrays()
    x[-1] += index
    return len(fit(compiled(strategy), x, y))


ALLOWED = (
    own_callbacks_and_verbose, own_initial_values_and_paths, own_seeds_and_names, random_augmentation, no_order,
    generator_is_not_drawn_ahead, batches_may_differ_later,
)  # fmt: skip


def doubts(strategy, index):
    """Told by a warning: numbers drawn by Python, and other rows in `predict`."""
    told = []
    for act in (augmented_in_python, other_rows_to_predict, other_rows_to_predict_on_batch):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act(strategy, index)
        told.append([str(each.message) for each in caught if "batches differ" in str(each.message)])
    return told


def augmented_in_python(strategy, index):
    class Augmented(Shuffling):
        def __getitem__(self, k):
            x, y = super().__getitem__(k)
            return x + np.random.default_rng().normal(size=x.shape).astype("float32"), y

        def on_epoch_end(self):
            pass

    fit(compiled(strategy), Augmented(), epochs=2)


def other_rows_to_predict(strategy, index):
    compiled(strategy).predict(arrays()[0][:: -1 if index else 1], batch_size=BATCH, verbose=0)


def other_rows_to_predict_on_batch(strategy, index):
    """Whatever has been cut by hand before."""
    for _ in range(3):
        strategy.cut_batch(arrays())
    compiled(strategy).predict_on_batch(arrays()[0][:: -1 if index else 1])


def trust(strategy, index):
    """A strategy that was told not to compare trains with what differs; settings are still agreed on."""
    trusting = tfzero.ZeroStrategy(strategy.settings.stage, min_shard_elements=8, compare_batches=0)
    x, y = arrays()
    return fit(compiled(trusting), x + index, y)


def in_a_worker(stage):
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, timeout_seconds=60)
    index = int(strategy.extended.mesh.worker == 1)  # of three workers, two have the same
    results = {}
    for act in (*REFUSED, *ALLOWED, doubts, trust):
        keras.utils.set_random_seed(index)
        began = time.monotonic()
        with contextlib.redirect_stdout(None) if index else contextlib.nullcontext():
            try:
                results[act.__name__] = act(strategy, index)
            except (ValueError, tf.errors.InvalidArgumentError) as error:
                results[act.__name__] = f"{type(error).__name__}: {error}"
            except Exception:
                results[act.__name__] = traceback.format_exc()
        strategy.channel.all_gather(f"after {act.__name__}", round(time.monotonic() - began, 2))
    return results


# Workers, devices of each, stage.
FLEETS = [(2, 2, 2), sweep((2, 1, 2)), sweep((2, 1, 3)), sweep((2, 2, 3)), sweep((3, 1, 3))]


@pytest.fixture(scope="module", params=FLEETS, ids=lambda fleet: "{}x{} stage {}".format(*fleet))
def fleet(request):
    workers, devices, stage = request.param
    return tfzero.run_local(in_a_worker, workers, args=(stage,), cpu_devices=devices, timeout_seconds=FLEET_SECONDS)


@pytest.mark.parametrize("act", REFUSED, ids=lambda act: act.__name__)
def test_workers_that_differ_are_refused(fleet, act):
    """By the same sentence on all, which names who has what."""
    for result in fleet:
        told = str(result[act.__name__]).replace("workers 0, 2", "worker 0")
        assert told.startswith(("ValueError", "InvalidArgumentError")), told
        assert REFUSED[act] in told
        assert "on worker 0" in told and "on worker 1" in told


@pytest.mark.parametrize("act", ALLOWED, ids=lambda act: act.__name__)
def test_what_may_differ_is_no_obstacle(fleet, act):
    assert isinstance(fleet[0][act.__name__], list | int), fleet[0][act.__name__]
    assert all(result[act.__name__] == fleet[0][act.__name__] for result in fleet)


def test_rows_in_no_order_are_seen_once(fleet):
    assert fleet[0]["no_order"] == [True, ROWS // BATCH]


def test_doubts_are_told_once(fleet):
    for result in fleet:
        (augmented,), (predicted,), (given,) = result["doubts"]
        assert "Random operations may rightly draw other numbers" in augmented
        for told in (predicted, given):
            assert "predictions are of the rows that each worker kept" in told


def test_comparison_can_be_left_away(fleet):
    assert len({str(result["trust"]) for result in fleet}) == 1
    assert len(fleet[0]["trust"]) == 1
