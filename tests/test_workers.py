"""Workers are real processes over TF_CONFIG, and the same program gives the result of one device.

A case is a program: it runs in every worker under a ZeroStrategy, and once in this process without one. All cases of a
fleet run one after the other in the same processes, because starting TensorFlow twice takes most of the time.
Before each case every worker sets a seed of its own; only the first worker's is the seed of the one device.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from marks import muon_or_lamb, sweep
from oracle import Data, dense_model, train

import tfzero

CASE_SEED = 100
ADAM = {"rtol": 2e-4, "atol": 2e-5}
SGD = {"rtol": 1e-5, "atol": 1e-5}
CASES_SECONDS = 800  # for all cases of a fleet; five times what two idle slow cores need
DATA = Data()
SMALL = 10  # elements of a variable that stays whole: the bias of 3 does, that of 17 does not
CASES: dict[str, "Case"] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program `run(strategy)`; its strategy is None on one device. It returns a dict of three dicts of arrays.

    `same` equals one device; `alike` is the same on all workers, and so is `same`; `own` is each worker's.
    """

    run: Callable
    rtol: float
    atol: float
    level: int  # in fleets of this level and above


def case(rtol=ADAM["rtol"], atol=ADAM["atol"], level=3):
    def register(function):
        CASES[function.__name__] = Case(function, rtol, atol, level)
        return function

    return register


# What cases are made of.


def scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def wrap(optimizer, strategy):
    return optimizer if strategy is None else tfzero.ZeroOptimizer(optimizer)


def build(strategy, make_model=dense_model) -> keras.Model:
    with scope(strategy):
        return make_model()


def compile_it(model, **arguments) -> None:
    """Without XLA on one device, as `oracle.train` does it."""
    no_xla = {} if isinstance(model.distribute_strategy, tfzero.ZeroStrategy) else {"jit_compile": False}
    model.compile(**no_xla, **arguments)


def fit_all(strategy, compile_arguments, make_model=dense_model, data=DATA, **arguments) -> dict:
    """Trains, evaluates and predicts unless told `only_fit`; all of it must be what one device does."""
    model = build(strategy, make_model)
    initial = model.get_weights()
    x, y = data.arrays()
    outcome = train(model, x, y, compile_arguments, **arguments)
    return {"same": {"initial": initial, **dataclasses.asdict(outcome)}}


def crossentropy(optimizer, **arguments) -> dict:
    return {"optimizer": optimizer, "loss": "categorical_crossentropy", "metrics": ["accuracy"]} | arguments


class SeenIds(keras.metrics.Metric):
    """How often each sample came, by the ids in the second column of the targets."""

    def __init__(self, samples=46, name="seen"):
        super().__init__(name=name)
        self.counts = self.add_variable((samples,), "zeros", name="counts")

    def update_state(self, y_true, y_pred, sample_weight=None):
        del y_pred, sample_weight
        ids = tf.cast(y_true[:, 1], tf.int32)
        self.counts.assign_add(tf.reduce_sum(tf.one_hot(ids, self.counts.shape[0]), 0))

    def result(self):
        return {"least": tf.reduce_min(self.counts), "most": tf.reduce_max(self.counts)}


def squared_error_of_first(y_true, y_pred):
    return tf.square(y_true[:, :1] - y_pred)


def regression_model() -> keras.Model:
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(17, activation="tanh"), keras.layers.Dense(1)])


def samples_with_ids(samples=46):
    x, _ = Data(samples).arrays()
    ids = np.arange(samples, dtype="float32")
    return x, np.stack([x.sum(1), ids], 1)


def fit_with_ids(strategy, *data, **fit_arguments) -> dict:
    model = build(strategy, regression_model)
    compile_it(model, optimizer="sgd", loss=squared_error_of_first, metrics=[SeenIds()])
    arguments = {"epochs": 3, "verbose": 0, "shuffle": False} | fit_arguments
    history = model.fit(*data, **arguments).history
    return {"history": history, "weights": model.get_weights()}


# Parity: in every fleet.


@case(**ADAM, level=1)
def adam(strategy):
    x, y = Data(20, seed=5).arrays()
    return fit_all(strategy, crossentropy("adam"), validation_data=(x, y))


@case(**SGD, level=1)
def sgd(strategy):
    return fit_all(strategy, crossentropy(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)), only_fit=True)


@case(**ADAM, level=1)
def global_clipnorm(strategy):
    return fit_all(strategy, crossentropy(keras.optimizers.Adam(0.01, global_clipnorm=0.05)), epochs=2, only_fit=True)


@case(**ADAM, level=1)
def accumulation(strategy):
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    return fit_all(strategy, crossentropy(optimizer), only_fit=True)


@case(**ADAM, level=1)
def moving_average(strategy):
    optimizer = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3)
    return fit_all(strategy, crossentropy(optimizer), only_fit=True)


@case(**ADAM, level=1)
def overflow_on_last_replica(strategy):
    """Rows 14 and 44 end a batch of 15, so they are the last replica's."""
    model = build(strategy)
    x, y = Data().arrays()
    x[[14, 44], 0] = 3e38
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=1024.0)
    compile_it(model, **crossentropy(optimizer))
    losses = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    model.fit(x, y, batch_size=15, epochs=3, verbose=0, shuffle=False, callbacks=[note])
    scale = float(model.optimizer.dynamic_scale.numpy())
    return {"same": {"weights": model.get_weights(), "losses": losses, "scale": scale}}


@case(**ADAM)
def one_sample(strategy):
    return fit_all(strategy, crossentropy("adam"), data=Data(1), batch_size=1, epochs=2)


# The input.


@case(level=2)
def shuffled_arrays(strategy):
    return {"same": fit_with_ids(strategy, *samples_with_ids(), batch_size=15, shuffle=True)}


class ShuffledDataset(keras.utils.PyDataset):
    """Batches of 15 of the 46 samples; the trainer takes them in any order."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x, y = samples_with_ids()
        return x[15 * index : 15 * index + 15], y[15 * index : 15 * index + 15]


@case(level=4)
def shuffled_py_dataset(strategy):
    return {"alike": fit_with_ids(strategy, ShuffledDataset(), shuffle=True)}


@case()
def shuffled_py_dataset_with_threads(strategy):
    return {"alike": fit_with_ids(strategy, ShuffledDataset(workers=2, max_queue_size=4), shuffle=True)}


@case(**SGD)
def seeded_dataset(strategy):
    """With the same global seed on all workers, as the warning says to do it."""
    tf.random.set_seed(CASE_SEED)
    dataset = tf.data.Dataset.from_tensor_slices(samples_with_ids()).shuffle(46, seed=3).batch(15)
    keras.utils.set_random_seed(CASE_SEED)
    return {"same": fit_with_ids(strategy, dataset)}


@case()
def seeded_dataset_under_other_global_seeds(strategy):
    """TensorFlow combines the seed of `shuffle` with the global one, so the workers' orders differ."""
    dataset = tf.data.Dataset.from_tensor_slices(samples_with_ids()).shuffle(46, seed=3).batch(15)
    error = ""
    try:
        fit_with_ids(strategy, dataset)
    except ValueError as refusal:
        error = str(refusal)
    return {"alike": {"error": error}}


@case()
def unseeded_dataset(strategy):
    """Without a seed of `shuffle` and without a global one."""
    tf.random.set_seed(None)
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = tf.data.Dataset.from_tensor_slices(samples_with_ids()).shuffle(46).batch(15)
        try:
            fit_with_ids(strategy, dataset)
        except ValueError as refusal:
            error = str(refusal)
    return {"own": {"warnings": [str(each.message) for each in caught]}, "alike": {"error": error}}


@case()
def file_sharding(strategy):
    dataset = tf.data.Dataset.from_tensor_slices(samples_with_ids()).batch(15)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.FILE
    error = ""
    try:
        fit_with_ids(strategy, dataset.with_options(options))
    except ValueError as refusal:
        error = str(refusal)
    return {"alike": {"error": error}}


@case(**SGD, level=2)
def dataset_of_each_worker(strategy):
    """Each worker reads its own samples; together batch k is batch k of one device."""
    model = build(strategy, regression_model)
    compile_it(model, optimizer="sgd", loss=squared_error_of_first, metrics=[SeenIds(48)])
    whole = tf.data.Dataset.from_tensor_slices(samples_with_ids(48))

    def read(context):
        own = whole.shard(context.num_input_pipelines, context.input_pipeline_id)
        return own.batch(context.get_per_replica_batch_size(12)).repeat()

    dataset = whole.batch(12).repeat() if strategy is None else strategy.distribute_datasets_from_function(read)
    history = model.fit(dataset, epochs=3, steps_per_epoch=4, shuffle=False, verbose=0).history
    return {"same": {"history": history, "weights": model.get_weights()}}


@case(**SGD)
def after_data_that_fail(strategy):
    """Data fail on all workers, each time after one batch, and no step meets what another one has begun.

    With SGD, as on one device a step that has no batch counts for the optimizer.
    """
    model = build(strategy)
    compile_it(model, **crossentropy(keras.optimizers.SGD(0.1)))
    x, y = DATA.arrays()
    bad = x.copy()
    bad[20] = np.nan
    failing = tf.data.Dataset.from_tensor_slices((bad, y)).batch(16)
    failing = failing.map(lambda x, y: (tf.debugging.check_numerics(x, "not a number"), y))
    for _ in range(12):
        with contextlib.suppress(tf.errors.InvalidArgumentError):
            model.fit(failing, epochs=2, verbose=0, shuffle=False)
    losses = model.fit(x, y, batch_size=16, epochs=2, verbose=0, shuffle=False).history["loss"]
    return {"same": {"losses": losses, "weights": model.get_weights()}}


# Callbacks and metrics.


@case(**ADAM)
def metric_made_outside_the_scope(strategy):
    auc = keras.metrics.AUC(num_thresholds=50)
    accuracy = keras.metrics.CategoricalAccuracy()
    x, y = Data(20, seed=5).arrays()
    arguments = crossentropy(keras.optimizers.Adam(0.01), metrics=[auc, accuracy])
    return fit_all(strategy, arguments, validation_data=(x, y), only_fit=True)


@case(**ADAM)
def callbacks(strategy):
    x, y = Data(20, seed=5).arrays()
    chosen = [
        keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, factor=0.3),
    ]
    arguments = crossentropy(keras.optimizers.Adam(0.3))
    return fit_all(strategy, arguments, epochs=10, callbacks=chosen, validation_data=(x, y), only_fit=True)


def penalized_model() -> keras.Model:
    """Activity regularizers add up what a batch has; Keras divides that by the batch's size since 3.14."""
    layers, l2 = keras.layers, keras.regularizers.L2(0.02)
    hidden = layers.Dense(17, activation="relu", activity_regularizer=l2)
    output = layers.Dense(
        3, activation="softmax", activity_regularizer=lambda y: 0.01 * keras.ops.sum(keras.ops.abs(y))
    )
    return keras.Sequential([keras.Input((8,)), hidden, layers.ActivityRegularization(l1=0.01), output])


@case(**ADAM, level=1)
def activity_regularizers(strategy):
    return fit_all(strategy, crossentropy(keras.optimizers.Adam(0.01)), penalized_model)


# How steps are run.


@case(**ADAM, level=4)
def three_steps_per_execution(strategy):
    return fit_all(strategy, crossentropy("adam", steps_per_execution=3))


@case(**ADAM)
def late_gathers(strategy):
    """With and without, each as one device; at stage 2 where the fleet's stage has no late gathers."""
    stage = strategy.settings.stage if strategy is not None and strategy.settings.stage in (1, 2) else 2
    results: dict = {"same": {}, "own": {"counts": []}}
    for late in (True, False):
        counts: list[int] = []
        if strategy is not None:
            strategy = tfzero.ZeroStrategy(
                stage, min_shard_elements=SMALL, timeout_seconds=60, bucket_bytes=64, overlap_param_gather=late
            )

        def count(logs=None, strategy=strategy, counts=counts):
            counts.append(0 if strategy is None else sum(strategy.extended.group.lanes.counts()))

        keras.utils.set_random_seed(CASE_SEED)
        arguments = crossentropy(keras.optimizers.Adam(0.01, global_clipnorm=0.1), steps_per_execution=3)
        counting = keras.callbacks.LambdaCallback(on_train_begin=count, on_train_end=count)
        outcome = fit_all(strategy, arguments, only_fit=True, callbacks=[counting])
        results["same"][f"late={late}"] = outcome["same"]
        results["own"]["counts"].append(counts[1] - counts[0])
    return results


@case(**ADAM)
def eager(strategy):
    return fit_all(strategy, crossentropy(keras.optimizers.Adam(0.01, global_clipnorm=0.1), run_eagerly=True), epochs=1)


@case(**ADAM)
def on_batch(strategy):
    model = build(strategy)
    x, y = Data(23).arrays()
    compile_it(model, **crossentropy(keras.optimizers.Adam(0.01)))
    logs = [model.train_on_batch(x[k:], y[k:], return_dict=True) for k in (0, 10, 20)]
    return {
        "same": {
            "logs": logs,
            "test": model.test_on_batch(x, y, return_dict=True),
            "predictions": model.predict_on_batch(x),
            "weights": model.get_weights(),
            "iterations": int(model.optimizer.iterations),
        }
    }


@case(**ADAM, level=2)
def custom_loop(strategy):
    model = build(strategy)
    optimizer = wrap(keras.optimizers.Adam(0.01), strategy)
    place = tf.distribute.get_strategy() if strategy is None else strategy
    dataset = tf.data.Dataset.from_tensor_slices(Data().arrays()).batch(15)

    def step(x, y):
        with tf.GradientTape() as tape:
            predicted = model(x, training=True)
            losses = keras.losses.categorical_crossentropy(y, predicted)
            loss = tf.reduce_sum(losses) / 15
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss, losses

    @tf.function
    def run(x, y):
        return place.run(step, args=(x, y))

    totals, gathered = [], []
    for x, y in place.experimental_distribute_dataset(dataset):
        loss, losses = run(x, y)
        totals.append(float(place.reduce("SUM", loss, axis=None)))
        totals.append(float(place.reduce("SUM", losses, axis=0)))
        gathered.append(np.sort(place.gather(losses, axis=0).numpy()))
    return {
        "same": {
            "totals": totals,
            "gathered": gathered,
            "weights": model.get_weights(),
            "iterations": int(optimizer.iterations),
        }
    }


# Layers.


def normalized_model(synchronized):
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(17),
            keras.layers.BatchNormalization(synchronized=synchronized),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


@case(**ADAM)
def synchronized_normalization(strategy):
    make = functools.partial(normalized_model, True)
    return fit_all(strategy, crossentropy(keras.optimizers.SGD(0.1)), make, only_fit=True)


@case()
def normalization(strategy):
    make = functools.partial(normalized_model, False)
    outcome = fit_all(strategy, crossentropy(keras.optimizers.Adam(0.01)), make, only_fit=True)["same"]
    return {"alike": outcome, "same": {"initial": outcome["initial"]}}


@case(level=2)
def dropout(strategy):
    """Ones through dropout, twice from the same seed, then a training with it."""

    def masks():
        with scope(strategy):
            layer = keras.layers.Dropout(0.5, seed=7)
        place = tf.distribute.get_strategy() if strategy is None else strategy

        @tf.function
        def run():
            return place.run(lambda: layer(tf.ones([1, 64]), training=True))

        return [place.gather(run(), axis=0).numpy() for _ in range(2)]

    def model():
        return keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(3)])

    outcomes = []
    for _ in range(2):
        keras.utils.set_random_seed(CASE_SEED)
        arguments = {"optimizer": "sgd", "loss": "mse"}
        outcomes.append(fit_all(strategy, arguments, model, only_fit=True)["same"])
    return {"alike": {"masks": [masks(), masks()], "outcomes": outcomes}}


class DenseEmbedding(keras.layers.Embedding):
    """An embedding with a dense gradient, the oracle of the sparse one."""

    def call(self, inputs):
        return tf.matmul(tf.one_hot(tf.cast(inputs, tf.int32), self.input_dim), self.embeddings)


@case(**ADAM)
def embedding(strategy):
    layer = DenseEmbedding if strategy is None else keras.layers.Embedding

    def make():
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layer(11, 4),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )

    model = build(strategy, make)
    initial = model.get_weights()
    ids = np.random.default_rng(1).integers(0, 11, (46, 5)).astype("int32")
    optimizer = keras.optimizers.Adam(0.01, clipnorm=0.05)
    outcome = train(model, ids, Data().arrays()[1], crossentropy(optimizer), only_fit=True)
    return {"same": {"initial": initial, **dataclasses.asdict(outcome)}}


@case(**ADAM)
def muon(strategy):
    return fit_all(strategy, crossentropy(muon_or_lamb(0.01)), epochs=2, only_fit=True)


@case(rtol=2**-7, atol=2**-9)
def bfloat16_variables(strategy):
    """One step in 16 bit, which is equal to a rounding."""

    def make():
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(33, dtype="bfloat16"), keras.layers.Dense(3)])

    model = build(strategy, make)
    x, y = Data(15).arrays()
    compile_it(model, optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.train_on_batch(x, y)
    return {"same": {"weights": [np.asarray(w, "float32") for w in model.get_weights()]}}


# Files.


@case(**ADAM, level=2)
def saved(strategy):
    """Every worker saves under a name of its own; this process loads each file with plain Keras."""
    model = build(strategy)
    x, y = Data().arrays()
    compile_it(model, **crossentropy(keras.optimizers.Adam(0.01)))
    model.fit(x, y, batch_size=15, epochs=2, verbose=0, shuffle=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        content = np.frombuffer(path.read_bytes(), "uint8")
    slots = [v.numpy() for v in model.optimizer.variables]
    converted = [np.array(v) for v in model.optimizer.variables]
    return {
        "same": {"weights": model.get_weights(), "slots": slots, "predictions": model.predict(x, verbose=0)},
        "alike": {"converted": converted},
        "own": {"file": content},
    }


# A reduction that is broken on purpose.


@case(**ADAM, level=1)
def broken_reduction(strategy):
    """Each replica takes its own gradient for the sum of all."""
    if strategy is None:
        return fit_all(strategy, crossentropy(keras.optimizers.SGD(0.1)), only_fit=True)
    group = type(strategy.extended.group)
    originals = group.reduce_scatter, group._reduce

    def reduce(self, value, replica, size=None):
        return value * self.world_size if value.dtype.is_floating else originals[1](self, value, replica, size)

    group.reduce_scatter = lambda self, rows, replica, *dtype: rows[self.rank(replica)] * self.world_size
    group._reduce = reduce
    try:
        model = build(strategy)
        x, y = Data().arrays()
        model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
        model.fit(x, y, batch_size=15, epochs=3, verbose=0, shuffle=False)
    finally:
        group.reduce_scatter, group._reduce = originals
    return {"own": {"weights": model.get_weights()}}


# After these nothing may come while it can leave the workers waiting for each other.


@case(**SGD)
def generator(strategy):
    x, y = samples_with_ids()

    def batches():
        for _ in range(3):
            for begin in range(0, 46, 15):
                yield x[begin : begin + 15], y[begin : begin + 15]

    return {"same": fit_with_ids(strategy, batches(), steps_per_epoch=4)}


# Running cases in fleets.


def run_cases(cases: dict[str, Callable], stage: int) -> dict:
    """In a worker: what each case returned, or the text of its failure. Stops when the workers have parted."""
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=SMALL, timeout_seconds=60)
    worker = strategy.extended.mesh.worker
    results: dict = {"seconds": {}}
    started = time.monotonic()
    for name, run in cases.items():
        began = time.monotonic()
        keras.utils.set_random_seed(CASE_SEED + worker)
        try:
            results[name] = run(strategy)
        except Exception:
            results[name] = f"worker {worker} failed:\n{traceback.format_exc()}"
        results["seconds"][name] = round(time.monotonic() - began, 1)
        try:
            state = [isinstance(results[name], str), time.monotonic() - started]
            failures, seconds = zip(*strategy.channel.all_gather(f"after {name}", state), strict=True)
        except Exception:
            results[name] = f"{results[name]}\nThe workers have parted:\n{traceback.format_exc()}"
            break
        if len(set(failures)) > 1 or "Restart your program" in str(results[name]) or max(seconds) > CASES_SECONDS:
            break
    return results


@functools.cache
def run_fleet(workers: int, devices: int, stage: int, level: int) -> list[dict] | str:
    """What each worker returned, or why there is nothing."""
    cases = {name: each.run for name, each in CASES.items() if each.level <= level}
    try:
        return tfzero.run_local(
            run_cases, workers, args=(cases, stage), cpu_devices=devices, timeout_seconds=CASES_SECONDS + 60
        )
    except (tfzero.WorkerError, TimeoutError) as error:
        return str(error)


@functools.cache
def run_on_one_device(name: str) -> dict:
    keras.utils.set_random_seed(CASE_SEED)
    return CASES[name].run(None).get("same", {})


def assert_close(mine, theirs, rtol=0.0, atol=0.0, where=""):
    """The same structure, with close numbers."""
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs), where
        for key in theirs:
            assert_close(mine[key], theirs[key], rtol, atol, f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), where
        for index, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_close(own, other, rtol, atol, f"{where}[{index}]")
    elif isinstance(theirs, str):
        assert mine == theirs, where
    else:
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol, err_msg=where)


@dataclasses.dataclass(frozen=True)
class Fleet:
    workers: int
    devices: int
    stage: int
    level: int = 1

    def __str__(self):
        return f"{self.workers}x{self.devices}-stage{self.stage}"

    def results(self, name: str) -> list[dict]:
        """What each worker returned for a case; fails if one did not get so far."""
        all_results = run_fleet(self.workers, self.devices, self.stage, self.level)
        if isinstance(all_results, str):
            pytest.fail(f"the fleet failed: {all_results}")
        reached = [
            results.get(name, f"was not reached: the workers parted before, or {CASES_SECONDS} s had passed")
            for results in all_results
        ]
        for result in reached:
            if isinstance(result, str):
                pytest.fail(f"{name}: {result}")
        return reached

    def result(self, name: str) -> dict:
        return self.results(name)[0]


LEVEL = int(os.environ.get("TFZERO_LEVEL_OF_CASES", "3"))  # `.ci/cells` runs fewer cases
FLEETS = [Fleet(2, 2, 3, LEVEL), Fleet(3, 1, 0)]
SWEPT = [
    Fleet(2, 1, 2, level=4),
    *(Fleet(workers, 1, stage) for workers, stage in ((1, 2), (2, 0), (2, 1), (2, 3), (3, 3))),
    *(
        Fleet(workers, devices, stage, level=3)
        for workers, devices, stage in ((4, 1, 2), (2, 2, 1), (2, 2, 2), (4, 1, 3))
    ),
]


def fleets(level: int):
    """The argument `fleet` of a test: all that run the cases of a level."""
    chosen = [fleet if fleet in FLEETS else sweep(fleet) for fleet in [*FLEETS, *SWEPT] if fleet.level >= level]
    return pytest.mark.parametrize("fleet", chosen, ids=str)


def fleet_cases(names=CASES):
    for fleet in [*FLEETS, *SWEPT]:
        marks = [pytest.mark.sweep] if fleet in SWEPT else []
        for name in names:
            if fleet.level >= CASES[name].level and name != "broken_reduction":
                yield pytest.param(fleet, name, id=f"{fleet}-{name}", marks=marks)


@pytest.mark.parametrize(("fleet", "name"), list(fleet_cases()))
def test_case(fleet, name):
    """All workers have the same results, and they are those of one device."""
    results = fleet.results(name)
    for other in results[1:]:
        for kind in ("same", "alike"):
            assert_close(other.get(kind, {}), results[0].get(kind, {}), where=f"{kind} on all workers")
    each = CASES[name]
    assert_close(results[0].get("same", {}), run_on_one_device(name), each.rtol, each.atol, "as one device")


# What cases are about beyond equality with one device.


@pytest.mark.parametrize("fleet", [*FLEETS, sweep(SWEPT[0])], ids=str)
def test_comparison_notices_a_broken_reduction(fleet):
    weights = fleet.result("broken_reduction")["own"]["weights"]
    with pytest.raises(AssertionError):
        assert_close(weights, run_on_one_device("broken_reduction")["weights"], **ADAM)


SEEN_ONCE = (
    "shuffled_arrays", "shuffled_py_dataset", "shuffled_py_dataset_with_threads", "generator", "seeded_dataset",
)  # fmt: skip


@pytest.mark.parametrize(("fleet", "name"), list(fleet_cases(SEEN_ONCE)))
def test_every_sample_is_seen_once_in_an_epoch(fleet, name):
    result = fleet.result(name)
    history = (result.get("same") or result["alike"])["history"]
    assert history["least"] == history["most"] == [1, 1, 1]


@fleets(3)
def test_other_shuffle_seeds_are_refused(fleet):
    error = fleet.result("seeded_dataset_under_other_global_seeds")["alike"]["error"]
    assert "data sets differ: shuffle seeds is [[100, 3]] on worker 0" in error
    assert "[[101, 3]] on worker 1" in error


@fleets(3)
def test_unseeded_shuffle_warns_and_is_refused(fleet):
    for result in fleet.results("unseeded_dataset"):
        assert any("shuffles without a seed" in text for text in result["own"]["warnings"])
        assert "batches differ" in result["alike"]["error"]


@fleets(3)
def test_file_sharding_is_refused_without_files(fleet):
    error = fleet.result("file_sharding")["alike"]["error"]
    assert "AutoShardPolicy.FILE" in error and "does not read files" in error
    assert "tfzero.sharded_dataset" in error and "Received: <_OptionsDataset" in error


@fleets(1)
def test_overflow_halves_the_scale(fleet):
    """Of 12 batches 6 overflow."""
    result = fleet.result("overflow_on_last_replica")["same"]
    assert result["scale"] == 1024 / 2**6
    assert all(np.isfinite(weights).all() for weights in result["weights"])


@fleets(3)
def test_gathers_are_no_more_when_they_are_late(fleet):
    """And the result is the same to the bit."""
    for result in fleet.results("late_gathers"):
        late, at_once = result["own"]["counts"]
        assert late == at_once > 0
        assert_close(*result["same"].values())


@fleets(3)
def test_callbacks_act(fleet):
    """The test is of worth only if training was stopped and its learning rate reduced."""
    history = fleet.result("callbacks")["same"]["history"]
    assert len(history["loss"]) < 10
    assert history["learning_rate"][-1] < 0.3


@fleets(2)
def test_dropout_differs_between_replicas_and_is_reproducible(fleet):
    alike = fleet.result("dropout")["alike"]
    first, second = alike["masks"]
    rows = [row for step in first for row in step]
    assert len(rows) == 2 * fleet.workers * fleet.devices
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert_close(second, first)
    assert_close(alike["outcomes"][1], alike["outcomes"][0])


@fleets(3)
def test_normalization_has_moved(fleet):
    alike = fleet.result("normalization")["alike"]
    moved = [not np.allclose(a, b) for a, b in zip(alike["weights"], alike["initial"], strict=True)]
    assert all(moved)


@fleets(2)
def test_sharded_slots_read_as_whole_whichever_way(fleet):
    result = fleet.result("saved")
    assert_close(result["alike"]["converted"], result["same"]["slots"])


@fleets(2)
def test_plain_keras_loads_what_every_worker_saved(fleet, tmp_path):
    x, _ = Data().arrays()
    for worker, result in enumerate(fleet.results("saved")):
        path = tmp_path / f"worker_{worker}.keras"
        path.write_bytes(result["own"]["file"].tobytes())
        model = keras.models.load_model(path)
        assert type(model.optimizer) is keras.optimizers.Adam
        assert_close(model.get_weights(), result["same"]["weights"])
        assert_close([np.array(v) for v in model.optimizer.variables], result["same"]["slots"])
        assert_close(model.predict(x, verbose=0), result["same"]["predictions"], **SGD)
