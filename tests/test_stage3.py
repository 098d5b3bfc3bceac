"""Stage 3: parameters lie in shards, and are whole only while a layer needs them."""

import contextlib
import warnings
from collections import Counter

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers, ops
from keras import optimizers as ko
from marks import sweep

import tfzero
from tfzero.variables import gathering
from tfzero.variables.classes import ReplicatedVariable, ShardedParameter

TOKENS = np.random.default_rng(0).integers(0, 11, (46, 6))
TARGETS = np.random.default_rng(1).integers(0, 3, 46)


def make_strategy(devices=2, **settings):
    names = [f"CPU:{k}" for k in range(devices)]
    return tfzero.ZeroStrategy(**{"stage": 3, "devices": names, "min_shard_elements": 8} | settings)


def compile_it(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    no_xla = {} if isinstance(model.distribute_strategy, tfzero.ZeroStrategy) else {"jit_compile": False}
    model.compile(ko.SGD(0.3), loss, metrics=["accuracy"], **no_xla)
    return model


def make_pair(strategy, make_model):
    keras.utils.set_random_seed(2)
    with strategy.scope():
        ours = make_model()
        ours(TOKENS[:4])
    reference = make_model()
    reference(TOKENS[:4])
    reference.set_weights(ours.get_weights())
    return compile_it(ours), compile_it(reference)


def assert_same(ours, reference, x=TOKENS, y=TARGETS, only_fit=False):
    """The same training, evaluation and prediction unless told `only_fit`, in batches of 15, 15, 15 and 1."""
    arguments = {"batch_size": 15, "verbose": 0}
    before = ours.get_weights()
    histories = [model.fit(x, y, epochs=2, shuffle=False, **arguments).history for model in (ours, reference)]
    for name, values in histories[0].items():
        np.testing.assert_allclose(values, histories[1][name], rtol=2e-5, atol=2e-5)
    moved = []
    for mine, theirs, old in zip(ours.get_weights(), reference.get_weights(), before, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)
        moved.append(np.abs(mine - old).max(initial=0))
    assert max(moved) > 1e-2, "a training that does not move proves nothing"
    if only_fit:
        return
    np.testing.assert_allclose(*(m.evaluate(x, y, **arguments) for m in (ours, reference)), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(*(m.predict(x, **arguments) for m in (ours, reference)), rtol=2e-5, atol=2e-5)


def step_operations(model, strategy, rows=16):
    """All operations of one training step's graph that run on the first replica."""
    dataset = tf.data.Dataset.from_tensor_slices((TOKENS[:rows], TARGETS[:rows])).batch(rows, drop_remainder=True)
    batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    operations = step.get_concrete_function(batch).graph.get_operations()
    return [operation for operation in operations if operation.device.endswith("CPU:0")]


def collectives(model, strategy):
    return Counter(op.type for op in step_operations(model, strategy) if op.type.startswith("Collective"))


# Models.


def embedded(*more):
    return keras.Sequential([keras.Input((6,)), layers.Embedding(11, 8), *more, layers.Dense(3)])


class Tied(keras.Model):
    """An embedding that is the output projection too, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(11, 8)
        self.twice = layers.Dense(8, activation="tanh")
        self.last = layers.Dense(3)

    def call(self, x):
        hidden = self.twice(self.twice(self.embedding(x)))
        logits = ops.matmul(hidden, ops.transpose(self.embedding.embeddings))
        return self.last(ops.mean(logits, 1))


class WithKernel(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")


class Looped(WithKernel):
    def call(self, x):
        return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ self.kernel)), [0, x])[1]


class Branched(WithKernel):
    def call(self, x):
        return tf.cond(tf.shape(x)[-1] > 3, lambda: x @ self.kernel, lambda: -x @ self.kernel)


class Traced(WithKernel):
    @tf.function
    def call(self, x):
        return tf.tanh(x @ self.kernel)


def attention():
    tokens = keras.Input((6,))
    x = layers.Embedding(11, 8)(tokens)
    x = x + layers.MultiHeadAttention(2, 4)(x, x)
    x = x + layers.Dense(8)(layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x)))
    return keras.Model(tokens, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def convolutions():
    return embedded(
        layers.Reshape((6, 8, 1)),
        layers.Conv2D(4, 3, padding="same"),
        layers.BatchNormalization(synchronized=True),
        layers.DepthwiseConv2D(3, padding="same"),
        layers.MaxPooling2D(2),
        layers.SeparableConv2D(6, 2),
        layers.Conv2DTranspose(5, 3),
        layers.AveragePooling2D(2),
        layers.GroupNormalization(5),
        layers.GlobalMaxPooling2D(),
    )


def adapted():
    """Frozen layers with LoRA beside them."""
    model = embedded(layers.Flatten(), layers.Dense(16, activation="relu"), layers.Dense(16))
    for layer in model.layers[2:4]:
        layer.enable_lora(2)
    return model


MODELS = {
    "attention": attention,
    "convolutions": convolutions,
    "recurrent": lambda: embedded(layers.LSTM(7, return_sequences=True), layers.GRU(6)),
    "unrolled": lambda: embedded(layers.LSTM(7, unroll=True)),
    "bidirectional": lambda: embedded(layers.Bidirectional(layers.LSTM(5))),
    "tied": Tied,
    "control_flow": lambda: embedded(layers.Flatten(), layers.Dense(8), Looped(), Branched(), Traced()),
    "nested": lambda: embedded(layers.Flatten(), keras.Sequential([layers.Dense(9), layers.Dense(8)])),
}
ONLY_FIT = ("unrolled", "tied")  # The others show that evaluation and prediction gather, too.


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.sweep] * (name in ("recurrent", "bidirectional", "nested")))
        for name in MODELS
    ],
)
@pytest.mark.parametrize("reshard", [True, sweep(False)])
def test_a_model_does_as_on_one_device(name, reshard):
    strategy = make_strategy(reshard_after_forward=reshard)
    ours, reference = make_pair(strategy, MODELS[name])
    assert any(isinstance(v.value, ShardedParameter) for v in ours.trainable_variables)
    assert_same(ours, reference, only_fit=name in ONLY_FIT)


def rematerialized(around_the_model):
    scope = keras.RematScope(mode="full")
    with scope:
        dense = [layers.Dense(16, activation="gelu") for _ in range(3)]
    with scope if around_the_model else contextlib.nullcontext():
        return embedded(layers.Flatten(), *dense)


@pytest.mark.parametrize("around_the_model", [sweep(False), True])
def test_remat_composes_with_stage_3(around_the_model):
    """Keras's own remat fails in a graph on TensorFlow if a layer takes keyword arguments: one device goes without.

    A model and its layers recompute one within the other.
    """
    strategy = make_strategy()
    with strategy.scope():
        ours = rematerialized(around_the_model)
    reference = embedded(layers.Flatten(), *[layers.Dense(16, activation="gelu") for _ in range(3)])
    reference.set_weights(ours.get_weights())
    assert_same(compile_it(ours), compile_it(reference), only_fit=True)


def test_lora_trains_with_frozen_variables_in_shards():
    strategy = make_strategy()
    ours, reference = make_pair(strategy, adapted)
    frozen = [v for v in ours.non_trainable_variables if v.shape.rank == 2]
    assert len(frozen) == 2 and all(isinstance(v.value, ShardedParameter) for v in frozen)
    before = [v.numpy() for v in frozen]
    for model in (ours, reference):
        model.fit(TOKENS, TARGETS, batch_size=15, epochs=2, verbose=0, shuffle=False)
    for mine, theirs in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)
    for variable, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


# What travels.


@pytest.mark.parametrize(("reshard", "gathers"), [(True, 2), (False, 1)])
def test_a_layer_is_gathered_twice_and_reduced_once(reshard, gathers):
    """In elements, for a stack of layers: one gather forward, one backward if it is let go, one reduce-scatter."""

    def stack():
        dense = [layers.Dense(32, use_bias=False, activation="relu") for _ in range(6)]
        return keras.Sequential([keras.Input((32,)), *dense])

    strategy = make_strategy(reshard_after_forward=reshard)
    with strategy.scope():
        model = stack()
    model.compile("adam", "mse")
    x = np.ones((16, 32), "float32")
    batch = next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((x, x)))))
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    model.optimizer.build(model.trainable_variables)
    operations = step.get_concrete_function(batch).graph.get_operations()
    elements: Counter = Counter()
    for operation in operations:
        if operation.type.startswith("Collective") and operation.device.endswith("CPU:0"):
            elements[operation.type] += operation.inputs[0].shape.num_elements() / model.count_params()
    # The first layer's backward pass needs no gradient of the input, so it is not gathered again.
    assert elements["CollectiveGatherV2"] == pytest.approx((6 + 5 * (gathers - 1)) / 6 / 2)
    assert elements["CollectiveAllToAllV2"] == pytest.approx(1)
    assert elements["CollectiveReduceV2"] < 1e-2


def test_a_tied_layer_is_gathered_once_forward_and_reduced_once():
    strategy = make_strategy()
    model, _ = make_pair(strategy, Tied)
    sharded = sum(isinstance(v.value, ShardedParameter) for v in model.trainable_variables)
    assert collectives(model, strategy)["CollectiveAllToAllV2"] == sharded


@pytest.mark.parametrize(("prefetched", "awaited"), [(1, {0, 1}), (2, {0})])
def test_forward_gathers_wait_for_earlier_layers(prefetched, awaited, monkeypatch):
    """Else all parameters would be whole together."""
    monkeypatch.setattr(gathering, "PREFETCH_BYTES", prefetched * 6 * 6 * 4)
    strategy = make_strategy()
    with strategy.scope():
        dense = [layers.Dense(6, use_bias=False) for _ in range(4)]
        model = compile_it(keras.Sequential([keras.Input((6,)), *dense]))
    operations = step_operations(model, strategy)
    gathers = [op for op in operations if op.type == "CollectiveGatherV2"]
    ancestors = set()
    stack = [gathers[3]]
    while stack:
        current = stack.pop()
        if current not in ancestors:
            ancestors.add(current)
            stack += [tensor.op for tensor in current.inputs] + list(current.control_inputs)
    assert {k for k in range(3) if gathers[k] in ancestors} == awaited


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_moves_half_the_bytes(policy):
    strategy = make_strategy()

    def make_model():
        return keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(16, activation="relu", dtype=policy),
                layers.Dense(16, dtype=policy),
                layers.Dense(3, dtype=policy),
            ]
        )

    with strategy.scope():
        ours = make_model()
    reference = make_model()
    reference.set_weights(ours.get_weights())
    x, y = oracle.Data(samples=16).arrays()
    changes = []
    for model in (ours, reference):
        before = model.get_weights()
        model.compile(ko.SGD(0.5), "mse", jit_compile=False)
        model.train_on_batch(x, y)
        changes.append([after - old for after, old in zip(model.get_weights(), before, strict=True)])
    for mine, theirs in zip(*changes, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-2)
        assert mine.dtype == np.float32 and np.abs(mine).max() > 0
    batch = next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((x, y)))))
    step = tf.function(lambda batch: strategy.run(ours.train_step, args=(batch,)))
    operations = step.get_concrete_function(batch).graph.get_operations()
    for kind in ("CollectiveGatherV2", "CollectiveAllToAllV2"):
        sizes = {op.inputs[0].dtype.size for op in operations if op.type == kind}
        assert sizes == {2}, kind


# What people do with variables.


def test_outside_a_replica_a_parameter_is_whole(capsys):
    strategy = make_strategy(3)
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), layers.Dense(17), layers.Dense(3)])
    kernel = model.layers[0].kernel
    assert [component.shape.as_list() for component in kernel.value.values] == [[46], [46], [46]]
    assert isinstance(model.layers[1].bias.value, ReplicatedVariable)
    assert tuple(kernel.shape) == (8, 17) and model.count_params() == 8 * 17 + 17 + 17 * 3 + 3
    new = np.arange(136, dtype="float32").reshape(8, 17)
    kernel.assign(new)
    for read in (kernel.numpy(), np.array(kernel), ops.convert_to_numpy(kernel), tf.identity(kernel).numpy()):
        np.testing.assert_array_equal(read, new)
    kernel.assign_add(np.ones_like(new))
    np.testing.assert_array_equal(model.get_weights()[0], new + 1)
    model.summary()
    assert "207" in capsys.readouterr().out
    np.testing.assert_allclose(model(np.ones((2, 8), "float32")).shape, (2, 3))


def test_weights_are_saved_as_plain_keras(tmp_path):
    strategy = make_strategy()
    ours, reference = make_pair(strategy, attention)
    ours.fit(TOKENS, TARGETS, batch_size=16, verbose=0)
    ours.save_weights(tmp_path / "model.weights.h5")
    reference.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(ours.predict(TOKENS, verbose=0), reference.predict(TOKENS, verbose=0), atol=1e-6)
    reference.set_weights([w * 0.5 for w in reference.get_weights()])
    reference.save_weights(tmp_path / "model.weights.h5")
    ours.load_weights(tmp_path / "model.weights.h5")
    for mine, theirs in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_gathered_holds_values_and_writes_them_back():
    strategy = make_strategy(3)
    with strategy.scope():
        layer = layers.Dense(5)
        layer.build((None, 7))
    before = layer.kernel.numpy()
    with strategy.gathered([layer.kernel, layer.bias]):
        np.testing.assert_array_equal(layer.kernel.numpy(), before)
        layer.kernel.assign(before)
        layer.kernel.assign_add(before)
        doubled = layer.kernel.numpy()
        np.testing.assert_array_equal(doubled, 2 * before)
        shards = np.concatenate([component.numpy() for component in layer.kernel.value.values])
        np.testing.assert_array_equal(shards[:35], before.ravel(), "written back too early")
    np.testing.assert_array_equal(layer.kernel.numpy(), doubled)
    with pytest.raises(ZeroDivisionError), strategy.gathered(layer.kernel):
        layer.kernel.assign(before)
        raise ZeroDivisionError
    np.testing.assert_array_equal(layer.kernel.numpy(), doubled)
    with pytest.raises(ValueError, match="made under this strategy's scope"), strategy.gathered(keras.Variable(1.0)):
        pass


def test_a_replica_assigns_its_part_and_reads_the_new_value():
    strategy = make_strategy(3)
    with strategy.scope():
        variable = keras.Variable(np.arange(10, dtype="float32"))

    @tf.function
    def step():
        def replica():
            before = tf.identity(variable)
            variable.assign(before * 2)
            return before, tf.identity(variable)

        return strategy.run(replica)

    before, after = (strategy.experimental_local_results(value) for value in step())
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, np.arange(10))
        np.testing.assert_array_equal(new, 2 * np.arange(10))
    np.testing.assert_array_equal(variable.numpy(), 2 * np.arange(10))


def test_a_value_from_before_the_tape_is_not_taken_for_it():
    """A GAN reads its generator outside the tape first."""
    strategy = make_strategy()
    with strategy.scope():
        variable = keras.Variable(np.ones(10, "float32"))

    @tf.function
    def step():
        def replica():
            outside = tf.reduce_sum(variable.value)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(variable.value)) + outside
            return tape.gradient(loss, variable)

        return strategy.run(replica)

    for gradient in strategy.experimental_local_results(step()):
        np.testing.assert_array_equal(gradient, 4 * np.ones(5))  # the sum of two replicas, this replica's shard


def test_second_derivatives():
    strategy = make_strategy()
    with strategy.scope():
        variable = keras.Variable(np.arange(10, dtype="float32"))

    @tf.function
    def step():
        def replica():
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    cube = tf.reduce_sum(variable.value**3)
                first = inner.gradient(cube, variable)  # [5]: 2 * 3 v^2
                total = tf.reduce_sum(first)
            return outer.gradient(total, variable)

        return strategy.run(replica)

    gradients = np.concatenate([g.numpy() for g in strategy.experimental_local_results(step())])
    np.testing.assert_allclose(gradients, 2 * 2 * 6 * np.arange(10) / 2)


# Refusals and warnings.


def test_a_traced_function_within_a_loop_is_refused_by_name():
    class Hidden(WithKernel):
        def build(self, shape):
            super().build(shape)
            self.inner = tf.function(lambda h: tf.tanh(h @ self.kernel))

        def call(self, x):
            return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, self.inner(h)), [0, x])[1]

    strategy = make_strategy()
    with strategy.scope():
        model = compile_it(embedded(layers.Flatten(), layers.Dense(8), Hidden()))
    with pytest.raises(RuntimeError, match="kernel.*tf.function that is called in a loop"):
        model.fit(TOKENS, TARGETS, batch_size=16, verbose=0)


def test_a_parameter_of_another_strategy_is_refused_by_name():
    strategy, other = make_strategy(), make_strategy()
    with other.scope():
        variable = keras.Variable(np.ones(10, "float32"), name="stranger")
    with pytest.raises(RuntimeError, match="stranger.*another strategy"):
        tf.function(lambda: strategy.run(lambda: tf.identity(variable)))()


def test_eager_steps_warn_of_their_memory():
    strategy = make_strategy()
    ours, reference = make_pair(strategy, lambda: embedded(layers.Flatten(), layers.Dense(9)))
    for model in (ours, reference):
        model.compile(ko.SGD(0.3), model.loss, run_eagerly=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.fit(TOKENS, TARGETS, batch_size=15, verbose=0, shuffle=False)
    assert any("memory of stage 2" in str(each.message) for each in caught)
    reference.fit(TOKENS, TARGETS, batch_size=15, verbose=0, shuffle=False)
    for mine, theirs in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value", [True, False, 1, "yes"])
def test_reshard_after_forward_without_effect_is_refused(value):
    with pytest.raises(ValueError, match=r"reshard_after_forward.*has an effect at stage 3 only"):
        make_strategy(stage=2, reshard_after_forward=value)
