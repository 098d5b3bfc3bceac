"""Descriptions by which workers compare what they were given: alike for equal things, other for things that differ."""

import functools
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfzero.host import datasets
from tfzero.workers import agreement, digests
from tfzero.workers.agreement import by_path, describe
from tfzero.workers.channel import Channel
from tfzero.workers.differences import MOST_SHOWN, differences_of
from tfzero.workers.digests import DOUBTED, REFUSED, TAKEN, Source, digest, judge

FACTOR = 0.5
FLIP = keras.layers.RandomFlip()


class Warm(keras.optimizers.schedules.LearningRateSchedule):
    """Without `get_config`."""

    def __init__(self, peak):
        self.peak = peak

    def __call__(self, step):
        return self.peak


class Margin(keras.losses.Loss):
    """Whose `get_config` leaves its setting out."""

    def __init__(self, margin, folder="/tmp/here"):
        super().__init__()
        self.margin, self.folder = margin, folder

    def call(self, y_true, y_pred):
        return y_true - y_pred


class Broken:
    def get_config(self):
        raise KeyError("no config")


def enclosing(margin):
    return lambda y_true, y_pred: tf.abs(y_true - y_pred) * margin


def scaled(y_true, y_pred):
    return FACTOR * (y_true - y_pred)


def squared(y_true, y_pred):
    return (y_true - y_pred) ** 2


def dense(**settings):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, **settings)])


def of_model(model, optimizer="adam"):
    model.compile(optimizer, "mse")
    return agreement.of_model(model)


DIFFERENT = [
    ("mse", "mae", ""),
    (1, 2, ""),
    (0.1, 0.2, ""),
    (True, False, ""),
    (None, "mse", ""),
    (["accuracy"], ["accuracy", "mae"], "[1]"),
    ({"a": ["mse"]}, {"a": ["mae"]}, "a[0]"),
    ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 3.0}, "1"),
    (np.arange(3), np.arange(3) + 1, ""),
    (np.arange(99), np.arange(99)[::-1], ""),
    (tf.constant([1.0]), tf.constant([2.0]), ""),
    (np.float32(1), np.float32(2), ""),
    (keras.losses.Huber(0.1), keras.losses.Huber(0.2), "delta"),
    (keras.losses.MeanSquaredError(), keras.losses.MeanAbsoluteError(), "class"),
    (keras.metrics.TopKCategoricalAccuracy(1), keras.metrics.TopKCategoricalAccuracy(2), "k"),
    (keras.metrics.AUC(from_logits=True, name="area"), keras.metrics.AUC(name="area"), "from_logits"),
    (keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.2), "learning_rate"),
    (keras.optimizers.SGD(Warm(0.1)), keras.optimizers.SGD(Warm(0.2)), "learning_rate.peak"),
    (
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)),
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 20)),
        "learning_rate.config.decay_steps",
    ),
    (Margin(0.1), Margin(0.2), "margin"),
    (enclosing(0.1), enclosing(0.2), "margin"),
    (squared, scaled, "code"),
    (tf.function(squared), tf.function(scaled), "code"),
    (functools.partial(squared, 1), functools.partial(squared, 2), "[1][0]"),
    (keras.losses.mean_squared_error, keras.losses.mean_absolute_error, ""),
    (keras.DTypePolicy("mixed_float16"), keras.DTypePolicy("float32"), "name"),
    (tf.float32, tf.float16, ""),
]


@pytest.mark.parametrize(("one", "other", "path"), DIFFERENT, ids=[str(k) for k in range(len(DIFFERENT))])
def test_what_differs_is_described_differently(one, other, path):
    mine, theirs = by_path(describe(one)), by_path(describe(other))
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    assert path in differing
    json.dumps([mine, theirs])


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.metrics.AUC(),  # whose name is counted up
        lambda: keras.optimizers.Adam(0.1),
        lambda: keras.losses.Huber(),
        lambda: enclosing(0.1),
        lambda: object(),
        lambda: Broken(),
        lambda: {"b": object(), "a": {"y", "x", "z"}},
        lambda: [object().__repr__, print, np.sum],
        lambda: tf.Variable([np.random.default_rng().uniform()]),  # of which the first worker's value counts
        lambda: keras.Variable([np.random.default_rng().uniform()]),
        lambda: keras.layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(seed=os.getpid())),
        lambda: of_model(dense()),
        lambda: of_model(dense(kernel_initializer=keras.initializers.Constant(np.random.default_rng().uniform()))),
        lambda: of_model(
            keras.Sequential([keras.layers.Dropout(0.5, seed=int(np.random.default_rng().integers(999)))])
        ),
        lambda: of_model(keras.Sequential([keras.layers.Lambda(lambda x: 2 * x)])),
        lambda: Margin(0.1, f"/tmp/{np.random.default_rng().integers(999)}"),
        lambda: float("nan"),
    ],
)
def test_equal_things_are_described_alike(make):
    assert json.dumps(describe(make())) == json.dumps(describe(make()))


def test_descriptions_are_the_same_in_every_process():
    """Other hashes, addresses and paths."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        "import test_agreement as t\n"
        "pairs = [t.describe(v) for one, other, _ in t.DIFFERENT for v in (one, other)]\n"
        "print(json.dumps([pairs, t.of_model(t.dense(activation='relu'), t.keras.optimizers.Adam(t.Warm(0.1)))]))\n"
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-c", code, json.dumps(sys.path)]
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0x" not in done.stdout
        outputs.add(done.stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"activation": "relu"}, "layers[1].activation"),
        ({"dtype": "mixed_bfloat16"}, "layers[1].dtype_policy"),
        ({"trainable": False}, "layers[1].trainable"),
        ({"kernel_regularizer": "l2"}, "layers[1].kernel_regularizer"),
    ],
)
def test_models_that_differ(settings, path):
    mine, theirs = by_path(of_model(dense())), by_path(of_model(dense(**settings)))
    assert any(key.startswith(path) and theirs[key] != mine.get(key) for key in theirs)
    assert all(key.startswith(path) for key in {**mine, **theirs} if theirs.get(key) != mine.get(key))


def test_versions():
    assert set(agreement.versions()) == {"Keras", "NumPy", "Python", "TensorFlow", "tfzero"}


# Sentences.


def name(indexes):
    return f"workers {indexes}"


def test_sentence_of_differences():
    assert differences_of([{"a": 1, "b": 2}, {"b": 2, "a": 1}], name) == ""
    assert differences_of([{"a": 1}, {"a": 2}, {"a": 1}], name) == "a is 1 on workers [0, 2] and 2 on workers [1]"
    assert differences_of([{}, {"a": 2}], name) == "a is missing on workers [0] and 2 on workers [1]"
    many = [{str(k): w for k in range(20)} for w in range(2)]
    assert differences_of(many, name).endswith(f"; and {20 - MOST_SHOWN} more")


def test_long_values_are_shown_where_they_differ():
    sentence = differences_of(["x" * 1000 + "mine" + "z" * 500, "x" * 1000 + "yours" + "z" * 500], name)
    assert "mine" in sentence and "yours" in sentence and len(sentence) < 500


# Digests of batches.


def noted(x, y, names=("x", "y")):
    return json.loads(digest(names, 0, np.asarray(x), np.asarray(y)))


ROWS = np.arange(12.0).reshape(6, 2)
LABELS = np.array([0, 1, 1, 0, 2, 1])
ONES = np.ones(6)
PIPELINE, DRAWING = Source("data", is_python=False), Source("data", draws=True, is_python=False)
PYTHON, PREDICTED = Source("data"), Source("data", is_python=False, may_warn=True)


@pytest.mark.parametrize(
    ("mine", "theirs", "verdicts"),  # of a plain pipeline, of one that draws, of Python code, and when predicting
    [
        ((ROWS, LABELS), (ROWS, LABELS), (TAKEN, TAKEN, TAKEN, TAKEN)),
        ((ROWS, LABELS), (ROWS[::-1], LABELS[::-1]), (REFUSED, DOUBTED, REFUSED, DOUBTED)),
        ((ROWS, LABELS), (ROWS + 1, LABELS), (REFUSED, TAKEN, DOUBTED, DOUBTED)),
        ((ROWS, ONES), (ROWS[::-1], ONES), (REFUSED, DOUBTED, REFUSED, DOUBTED)),  # labels tell of no order
        ((ROWS, LABELS), (ROWS[:5], LABELS[:5]), (REFUSED, REFUSED, REFUSED, REFUSED)),
        ((ROWS, LABELS), (ROWS.astype("f4"), LABELS), (REFUSED, REFUSED, REFUSED, REFUSED)),
        ((ROWS, LABELS), (ROWS.reshape(6, 2, 1), LABELS), (REFUSED, REFUSED, REFUSED, REFUSED)),
    ],
)
def test_verdict(mine, theirs, verdicts):
    values = [noted(*mine), noted(*mine), noted(*theirs)]
    assert tuple(judge(values, source) for source in (PIPELINE, DRAWING, PYTHON, PREDICTED)) == verdicts


def test_parts_that_one_worker_lacks_are_refused():
    assert judge([noted(ROWS, LABELS), noted(ROWS, LABELS, ("x", "z"))], DRAWING) == REFUSED


@pytest.mark.parametrize(
    ("operation", "draws", "is_python"),
    [
        (lambda v: tf.image.random_flip_left_right(tf.reshape(tf.cast(v, tf.float32), [1, 1, 1])), True, False),
        (lambda v: tf.random.stateless_uniform([2], [1, 2]), True, False),
        (lambda v: FLIP(tf.ones([1, 2, 2, 1])), True, False),
        (lambda v: tf.random.shuffle(tf.range(9)), False, False),  # an order, which must be the same
        (lambda v: tf.numpy_function(lambda w: w, [v], tf.int64), False, True),
        (lambda v: v + 1, False, False),
    ],
)
def test_pipelines_that_draw(operation, draws, is_python):
    dataset = tf.data.Dataset.range(9).map(operation)
    source = Source.of_operations("data", datasets.operations_of(dataset), False)
    assert (source.draws, source.is_python) == (draws, is_python)


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.0),
        np.zeros((0, 3)),
        np.array([b"a", b"bc"], object),
        np.array(["a", None], object),
        np.array([True, False]),
        np.array([1 + 2j]),
        tf.constant([1.0, 2.0], tf.bfloat16).numpy(),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.array([np.nan, np.inf]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_digest_of_any_array(array):
    first, second = (digest(["x"], 0, each) for each in (array, array.copy()))
    assert first == second
    assert re.search(r"digest [0-9a-f]{16}", json.loads(first)["x (values)"])


def test_strings_are_told_apart_by_where_they_end():
    one, other = (digest(["x"], 0, np.array(words, object)) for words in ([b"ab", b"c"], [b"a", b"bc"]))
    assert json.loads(one)["x (values)"][-24:] != json.loads(other)["x (values)"][-24:]


def test_large_tensors_are_sampled(monkeypatch):
    """Every row counts, and the last bytes."""
    monkeypatch.setattr(digests, "MOST_BYTES", 2**14)
    array = np.zeros((64, 1000), "float32")
    first = digest(["x"], 0, array)
    for row in range(64):
        changed = array.copy()
        changed[row] = 1
        assert digest(["x"], 0, changed) != first
    array[-1, -1] = 1
    assert digest(["x"], 0, array) != first


# What workers do with descriptions.


class Side(Channel):
    """A worker's end of a channel between two threads."""

    def __init__(self, index, said, barrier):
        self.index, self.said, self.barrier = index, said, barrier
        self._cluster = types.SimpleNamespace(names_of=lambda indexes: f"worker {indexes[0]}")

    def all_gather(self, topic, value, timeout_seconds=None):
        self.said[self.index] = (topic, json.loads(json.dumps(value)))
        self.barrier.wait(20)
        said = list(self.said)
        self.barrier.wait(20)
        assert len({topic for topic, _ in said}) == 1
        return [value for _, value in said]


def both(act, *arguments) -> list[str]:
    """What two workers are told that do something with their strategy and each its argument; "" for nothing."""
    said, barrier, told = [None, None], threading.Barrier(2), ["", ""]
    extended = types.SimpleNamespace(mesh=types.SimpleNamespace(workers=2))

    def run(index):
        try:
            act(types.SimpleNamespace(channel=Side(index, said, barrier), extended=extended), arguments[index])
        except ValueError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return told


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ({"a": 1, "b": [1, {"c": 2}]}, {"b": [1, {"c": 2}], "a": 1}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b is 2 on worker 0 and 3 on worker 1"),
        ({"a": 2, "b": 2}, {"a": 1, "b": 2}, "a is 2 on worker 0 and 1 on worker 1"),
        ({"a": [1, {"c": 2}]}, {"a": [1, {"c": 3}]}, "a[1].c is 2 on worker 0 and 3 on worker 1"),
        ({"a": 1}, {"a": 1, "b": None}, "b is missing on worker 0 and None on worker 1"),
        ({"a": True}, {"a": 1}, "a is True on worker 0 and 1 on worker 1"),
    ],
)
def test_workers_agree_on_each_part(mine, theirs, told):
    found = both(lambda strategy, what: agreement.agree_on(strategy.channel, "topic", what, "things"), mine, theirs)
    assert found == ["", ""] if told is None else all(f"The workers' things differ: {told}." in each for each in found)


def fitted(model=None, rate=0.1, **arguments):
    model = model or dense()
    model.compile(keras.optimizers.SGD(rate), "mse")
    return inspect.signature(keras.Model.fit).bind(model, ROWS, **arguments)


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        (fitted, lambda: fitted(verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]), None),
        (fitted, lambda: fitted(epochs=2), "epochs is 1 on worker 0 and 2 on worker 1"),
        (fitted, lambda: fitted(class_weight={0: 2.0}), "class_weight is None on worker 0"),
        (fitted, lambda: fitted(validation_data=(ROWS, ROWS)), "validation_data is 'missing' on worker 0"),
        (fitted, lambda: fitted(rate=0.2), "optimizer.learning_rate is 0.1"),
        (fitted, lambda: fitted(dense(activation="relu")), "layers[1].activation is 'linear' on worker 0"),
        (fitted, lambda: fitted(dense(trainable=False)), "layers[1].trainable is True on worker 0"),
    ],
)
def test_workers_agree_on_a_call_and_its_model(mine, theirs, told):
    found = both(lambda strategy, call: agreement.agree_on_call(strategy, "fit", call), mine(), theirs())
    assert found == ["", ""] if told is None else all(told in each for each in found), found


def test_keras_itself_must_be_set_alike():
    calls = [fitted(), fitted()]
    described = agreement.of_model(calls[0].args[0])["keras.config"]
    assert described == {"floatx": "float32", "epsilon": 1e-7, "image_data_format": "channels_last"}


def test_workers_agree_on_what_is_compiled():
    def call(**arguments):
        return inspect.signature(keras.Model.compile).bind(dense(), **{"optimizer": "sgd", "loss": "mse"} | arguments)

    assert both(agreement.agree_on_compile, call(), call()) == ["", ""]
    for name, value in {"loss": "mae", "optimizer": "adam", "metrics": ["mae"], "steps_per_execution": 2}.items():
        for told in both(agreement.agree_on_compile, call(), call(**{name: value})):
            assert f"The workers' arguments of `compile` differ: {name}" in told
