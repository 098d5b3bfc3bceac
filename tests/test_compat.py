"""A release that changes what a private name of TensorFlow or Keras stands for is noticed here: `host/registry.py`."""

import functools
import inspect
import random

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from keras.src.trainers.data_adapters import array_data_adapter
from marks import since_keras
from tensorflow.python.framework import auto_control_deps

import tfzero
from tfzero.extended import ZeroExtended
from tfzero.host import batch_rows, datasets, distributed, graphs, keras_objects, keras_optimizers, runtime, saved_model
from tfzero.keras.data import _Epochs
from tfzero.variables.classes import LayerVariable, OnReadVariable, ReplicatedVariable, ShardedVariable


@pytest.fixture(scope="module")
def strategy():
    return tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"], min_shard_elements=1)


@pytest.fixture
def variable():
    return keras.Variable(np.arange(4.0, dtype="float32"), name="weight")


def built(optimizer, variable):
    optimizer.build([variable])
    return optimizer


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [
        (runtime.saving_lib, "_save_state", "saveable weights_store assets_store inner_path visited_saveables"),
        (keras.callbacks.TensorBoard, "_close_writers", "self"),
        (keras.callbacks.ModelCheckpoint, "_get_file_path", "self epoch batch logs"),
        (runtime.keras_tensorflow_trainer.TFEpochIterator, "_enumerate_iterator", "self"),
        (runtime.keras_tensorflow_trainer.TFEpochIterator, "catch_stop_iteration", "self"),
        (runtime.keras_loss, "standardize_reduction", "reduction"),
        (runtime.keras_loss, "squeeze_or_expand_to_same_rank", "x1 x2 expand_rank_1"),
        (runtime.BaseOptimizer, "update_step", "self gradient variable learning_rate"),
    ],
)
def test_what_is_called_has_these_arguments(owner, name, arguments):
    function = getattr(owner, name)
    assert list(inspect.signature(function).parameters) == arguments.split()


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (ZeroExtended, distributed.CollectiveAllReduceExtended),
        (ReplicatedVariable, distributed.MirroredVariable),
        (LayerVariable, distributed.MirroredVariable),
        (ShardedVariable, distributed.MirroredVariable),
        (OnReadVariable, distributed.SyncOnReadVariable),
        (_Epochs, runtime.keras_tensorflow_trainer.TFEpochIterator),
    ],
)
def test_private_methods_override_something(ours, base):
    """A hook that is renamed would never be called."""
    added = {
        "_spread",
        "_gatherer",
        "_shard_of",
    }
    mine = {
        name
        for each in ours.__mro__[: ours.__mro__.index(base)]
        for name, value in vars(each).items()
        if inspect.isfunction(value) and name.startswith("_") and not name.startswith("__")
    }
    assert {name for name in mine - added if not hasattr(base, name)} == set()


def test_attributes_of_the_extended(strategy):
    names = ("_id_in_cluster", "_num_workers", "_num_replicas_in_sync", "_std_server_started")
    assert all(hasattr(strategy.extended, name) for name in names)
    assert distributed.CollectiveAllReduceExtended._enable_check_health is True
    assert strategy.extended._enable_check_health is False


def test_places_of_replicas(strategy):
    assert runtime.replica_index() is None and runtime.replica_thread() is None
    seen = []

    def note(value):
        seen.append((runtime.replica_index(), runtime.replica_thread().main_args))

    strategy.run(note, args=(5,))
    assert seen == [(0, (5,)), (1, (5,))]


def test_values_of_replicas(strategy):
    values = runtime.per_replica([tf.constant(1), tf.constant(2)])
    assert [int(v) for v in strategy.experimental_local_results(values)] == [1, 2]
    assert isinstance(values, tf.distribute.DistributedValues)
    mirrored = runtime.mirrored([tf.constant(1), tf.constant(1)])
    assert isinstance(mirrored, tf.types.experimental.distributed.Mirrored)


def test_state_of_the_runtime(strategy):
    assert runtime.runtime_is_initialized() is True
    assert runtime.collectives_are_configured() is False
    assert callable(runtime.context.context().abort_collective_ops)


def test_random_state():
    keras.utils.set_random_seed(5)
    state = runtime.random_state()
    assert state["seed"] == 5
    drawn = random.random()
    keras.utils.set_random_seed(6)
    runtime.set_random_state(state)
    assert random.random() == drawn
    assert runtime.context.global_seed() == 5


def test_shuffle_seeds():
    tf.random.set_seed(None)
    dataset = tf.data.Dataset.range(4)
    assert runtime.shuffle_seeds(dataset.batch(2)) == []
    assert runtime.shuffle_seeds(dataset.shuffle(4).batch(2)) == [[0, 0]]
    zipped = tf.data.Dataset.zip((dataset.shuffle(4, seed=3), dataset.shuffle(4)))
    (_, seed), unseeded = runtime.shuffle_seeds(zipped.prefetch(1))
    assert seed == 3 and unseeded == [0, 0]


def test_files_are_dealt_by_the_policy(tmp_path):
    for number in range(3):
        (tmp_path / str(number)).write_text(f"{number}a\n{number}b\n")
    lines = tf.data.TextLineDataset(tf.data.Dataset.list_files(str(tmp_path / "*"), shuffle=False)).batch(4)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.FILE
    dataset = lines.with_options(options)
    assert datasets.whole_batch_size(dataset) == 4
    assert datasets.whole_batch_size(dataset.map(lambda line: line[:2])) is None
    parts = [datasets.files_of_worker(dataset, 2, worker, 3) for worker in range(2)]
    read = [[batch.numpy().tolist() for batch in part] for part in parts]
    assert read == [[[b"0a", b"0b", b"2a"], [b"2b"]], [[b"1a", b"1b"]]]


@pytest.mark.parametrize("shuffle", [False, True, "batch"])
def test_rows_of_arrays_by_their_indices(shuffle):
    x, rare = np.arange(14.0).reshape(7, 2), scipy.sparse.csr_matrix(np.eye(7))
    adapter = array_data_adapter.ArrayDataAdapter((x, rare), {"a": x[:, 0]}, batch_size=3, shuffle=shuffle)
    dataset = adapter.get_tf_dataset()
    elements, gather = datasets.rows_by_index(dataset)
    assert elements.options() == dataset.options()
    seen = []
    for indices, arrays in elements:
        (dense, sparse), target = gather(indices[1:], arrays)
        assert dense.numpy().tolist() == x[indices[1:].numpy()].tolist()
        assert tf.sparse.to_dense(sparse).numpy().tolist() == np.eye(7)[indices[1:].numpy()].tolist()
        assert target["a"].numpy().tolist() == dense[:, 0].numpy().tolist()
        seen += indices.numpy().tolist()
    assert sorted(seen) == list(range(7)) and (seen == list(range(7)) or shuffle)
    assert datasets.rows_by_index(tf.data.Dataset.from_tensor_slices(x).batch(3).prefetch(1)) is None
    assert datasets.rows_by_index(dataset.map(lambda *batch: batch, num_parallel_calls=2)) is None
    assert datasets.rows_by_index(dataset.take(1)) is None
    numbers = tf.data.Dataset.range(3).map(
        functools.partial(tf.add, np.int64(1)), num_parallel_calls=2
    )  # it has no name
    assert datasets.rows_by_index(numbers) is None


def test_specs_of_elements(strategy):
    dataset = tf.data.Dataset.from_tensor_slices((np.ones((4, 3), "float32"), {"a": np.ones(4)})).batch(2)
    x, y = runtime.replica_element_spec(strategy.experimental_distribute_dataset(dataset))
    assert x.shape.as_list() == [None, 3] and x.dtype == tf.float32
    assert y["a"].shape.as_list() == [None] and y["a"].dtype == tf.float64
    of_each = strategy.distribute_datasets_from_function(lambda context: dataset)
    assert runtime.replica_element_spec(of_each)[0].shape.as_list() == [None, 3]


def test_the_loop_over_epochs(strategy):
    dataset = tf.data.Dataset.range(6).filter(lambda k: k < 4).batch(2)
    loop = runtime.keras_tensorflow_trainer.TFEpochIterator(x=dataset, distribute_strategy=strategy)
    assert runtime.dataset_of(loop).element_spec is not None
    assert runtime.length_of(loop) == {"number of batches": None, "size of the last batch": None}
    steps = iter(loop)
    next(steps)
    assert runtime.is_at_first_batch(loop) is True
    next(steps)
    assert runtime.is_at_first_batch(loop) is False


def test_batches_that_are_passed_over(strategy):
    """As Keras goes over an epoch; after one that it may not finish, the next draws another order."""

    def epochs(iterator, count):
        for _ in range(count):
            steps = iterator._enumerate_iterator()
            yield [next(batches).values[0].numpy().tolist() for *_, batches in steps]

    def make():
        data = tf.data.Dataset.range(6).shuffle(6, seed=1).batch(2)
        return runtime.keras_tensorflow_trainer.TFEpochIterator(strategy, x=data)

    expected = list(epochs(make(), 3))
    iterator = make()
    steps = iterator._enumerate_iterator()
    runtime.draw_batches(iterator, steps, 1)
    steps.close()
    runtime.end_epoch(iterator)
    assert next(epochs(iterator, 1)) == expected[1] != expected[0]
    steps = iterator._enumerate_iterator()
    rest = [
        [*numbers, next(batches).values[0].numpy().tolist()]
        for *numbers, batches in runtime.rest_of_epoch(iterator, steps, 2, 2)
    ]
    assert [each[-1] for each in rest] == expected[2][2:] and rest[0][0] == 2
    iterator.steps_per_execution = 2
    for begin, drawn, executions in ((1, 1, 1), (1, 0, 1), (2, 2, 1), (3, 0, 0), (0, 0, 2)):
        rest = list(runtime.rest_of_epoch(iterator, iterator._enumerate_iterator(), begin, drawn))
        assert [each[0] for each in rest] == [begin + 2 * k for k in range(executions)]
    steps = iterator._enumerate_iterator()
    runtime.draw_batches(iterator, steps, None)
    assert list(steps) == []


def test_where_fit_begins():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    runtime.set_initial_epoch(model, 2)
    x = np.ones((4, 2))
    assert model.fit(x, x[:, :1], epochs=3, verbose=0).epoch == [2]
    runtime.set_initial_epoch(model, None)
    assert model.fit(x, x[:, :1], epochs=2, verbose=0).epoch == [0, 1]


def test_run_after():
    @tf.function(autograph=False)
    def function(x):
        first, second = tf.exp(x), tf.sin(x)
        graphs.run_after(first.op, second.op)
        return first, second

    graph = function.get_concrete_function(tf.constant(1.0)).graph
    (waiting,) = (op for op in graph.get_operations() if op.type == "Exp")
    assert [op.type for op in waiting.control_inputs] == ["Sin"]


def test_what_a_second_gather_is_made_of():
    @tf.function(autograph=False)
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.matmul(tf.reshape(x, [2, 2]), tf.constant([[1.0, 2.0], [3.0, 4.0]]))
        gradient = tape.gradient(y, x)
        assert runtime.is_backward(gradient.op) and not runtime.is_backward(y.op)
        assert runtime.creation_order(gradient.op) > runtime.creation_order(y.op)
        copy = graphs.copy_operation(y.op.inputs[0].op, {0: 2 * x})
        graphs.replace_input(y.op, 0, copy)
        assert y.op.inputs[0] is copy
        return y

    doubled = function(tf.constant([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(doubled, [[2, 4], [6, 8]])


def test_uses_of_a_variable():
    """Of the current graph only, in calls of functions too."""
    variable, other, types = tf.Variable(1.0), tf.Variable(1.0), []

    @tf.function(autograph=False)
    def function():
        tf.cond(other > 0, lambda: variable.assign(2.0), lambda: variable.assign(3.0))
        value = variable.read_value()
        types.extend(use.type for use in runtime.uses_of_variable(variable))
        return value

    function.get_concrete_function()
    assert sorted(types) == ["If", "ReadVariableOp"]


def test_is_recorded():
    x = tf.constant(1.0)
    assert runtime.is_recorded(x)  # no tape asks
    with tf.GradientTape() as tape:
        assert not runtime.is_recorded(x)
        tape.watch(x)
        assert runtime.is_recorded(x + 1)


def test_a_tape_takes_a_value_for_what_was_read():
    variable = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        with runtime.unrecorded():
            value = tf.concat([variable, [3.0]], 0)
        assert tape.watched_variables() == ()
        runtime.record_read(variable, value)
        total = tf.reduce_sum(value**2)
    np.testing.assert_array_equal(tape.gradient(total, variable), [2, 4, 6])
    with tf.GradientTape() as tape:
        runtime.record_read(tf.Variable(1.0, trainable=False), value)
    assert tape.watched_variables() == ()


def test_what_orders_an_operation():
    """As TensorFlow finds it, and as it makes operations wait when the function has been traced."""
    variable = tf.Variable(1.0)

    @tf.function(autograph=False)
    def function(x):
        read, written = variable.read_value(), variable.assign(x, read_value=False)
        own, free = (tf.numpy_function(lambda x: x, [x], tf.float32) for _ in range(2))
        graphs.run_freely(free.op)
        handle = auto_control_deps.ops.tensor_id(written.inputs[0])
        assert graphs.ordered_by(read.op.inputs[0].op) == [(handle, False)]
        assert graphs.ordered_by(written) == [(handle, True)]
        assert graphs.ordered_by(own.op) == [(None, True)]
        assert graphs.ordered_by(free.op) == graphs.ordered_by((x + 1).op) == []
        return read

    function(tf.constant(2.0))


def test_graphs_around_control_flow():
    seen = []

    def look():
        seen.append(runtime.graph_around_control_flow(outermost))
        return tf.constant(1.0)

    @tf.function(autograph=False)
    def inner():
        return look()

    @tf.function(autograph=False)
    def outer(x):
        nonlocal outermost
        outermost = tf.compat.v1.get_default_graph()
        look()
        tf.cond(x > 0, look, lambda: 0.0)
        tf.while_loop(lambda i: i < 2, lambda i: i + look(), [0.0])
        inner()
        tf.cond(x > 1, inner.__wrapped__ if hasattr(inner, "__wrapped__") else inner, lambda: 0.0)
        tf.while_loop(lambda i: i < 2, lambda i: i + tf.function(look, autograph=False)(), [0.0])
        return x

    outermost = None
    outer.get_concrete_function(tf.constant(1.0))
    assert [graph is outermost for graph, _ in seen[:3]] == [True, True, True]
    assert seen[3][0] is not outermost
    assert [is_in_a_loop for _, is_in_a_loop in (*seen[:4], seen[-1])] == [False, False, False, False, True]


def test_a_plain_variable_in_a_scope(strategy):
    with strategy.scope():
        variable = runtime.plain_variable(tf.constant([1.0]))
    assert not isinstance(variable, runtime.DistributedVariable)
    variable.assign([2.0])
    assert variable.numpy() == [2.0]


def test_remake(strategy, variable):
    before = variable.value
    with strategy.scope():
        runtime.remake(variable)
    assert variable.value is not before
    np.testing.assert_array_equal(variable.numpy(), [0, 1, 2, 3])
    assert variable.value.distribute_strategy is strategy


def test_parts_of_an_optimizer(variable):
    adam = keras.optimizers.Adam(0.5)
    assert [v.name for v in runtime.own_scalars(adam)] == ["iteration", "learning_rate"]
    assert runtime.iteration_counter(adam) is runtime.own_scalars(adam)[0]
    adam = built(keras.optimizers.AdamW(0.5, weight_decay=0.1, use_ema=True, gradient_accumulation_steps=2), variable)
    assert runtime.accumulator(adam, variable).name.endswith("gradient_accumulator")
    assert runtime.is_accumulator_name(runtime.accumulator(adam, variable).name)
    assert not runtime.is_accumulator_name("momentum")
    assert runtime.moving_average(adam, variable).shape == variable.shape
    runtime.decay_weight(adam, variable)
    np.testing.assert_allclose(variable.numpy(), np.arange(4) * (1 - 0.5 * 0.1))


def test_begin_update(variable):
    """Nadam multiplies its product once a step there."""
    nadam = built(keras.optimizers.Nadam(0.5), variable)
    before = float(nadam._u_product)
    runtime.begin_update(nadam, tf.constant(0.5))
    assert float(nadam._u_product) < before


def test_adopt(variable):
    sgd = built(keras.optimizers.SGD(0.5), variable)
    home = object()
    kept = list(sgd.variables)
    runtime.adopt(sgd, home, ["stand-in"])
    assert runtime.home_of(sgd) is home
    assert sgd._trainable_variables == ["stand-in"]
    assert sgd.variables == kept


@since_keras("3.15")
def test_multi_optimizer(variable):
    sgd, adam = keras.optimizers.SGD(), keras.optimizers.Adam()
    multi = runtime.MultiOptimizer(keras.optimizers.OptimizerMap(adam, {"weight": sgd}))
    assert runtime.optimizer_for(multi, variable) is sgd


def test_overrides_of_what_is_replaced():
    base, scaling = keras_optimizers.BaseOptimizer, keras_optimizers.LossScaleOptimizer
    assert all(callable(getattr(base, name)) for name in keras_optimizers.REPLACED)
    assert all(callable(getattr(scaling, name)) for name in keras_optimizers.REPLACED_OF_LOSS_SCALE)

    class Own(keras.optimizers.SGD):
        def _clip_gradients(self, grads):
            return grads

    class Further(Own):
        pass

    assert keras_optimizers.overrides(Further()) == ["_clip_gradients"]
    for optimizer in (keras.optimizers.SGD(), keras.optimizers.Nadam(), scaling(keras.optimizers.Muon())):
        assert keras_optimizers.overrides(optimizer) == []


def test_loss_and_rows_of_a_training_step(strategy):
    """Keras's own step has the loss's mean count samples, and calls an older `compute_loss` as it is."""

    class Older(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return tf.reduce_mean(tf.square(y - y_pred)) * 3

    with strategy.scope():
        model = Older([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd")
    x, y = np.ones((7, 2), "float32"), np.ones((7, 1), "float32")
    assert runtime.rows_counted(model) == [0, 0]
    model.fit(x, y, batch_size=7, verbose=0)
    assert runtime.rows_counted(model) == [4, 3]
    assert float(runtime.training_loss(model, x, y, y + 2.0, None)) == 12
    assert runtime.is_train_step_of_keras(model.train_step) and not runtime.is_train_step_of_keras(model.test_step)


def test_inputs_of_a_model():
    tokens, mask = keras.Input((3,), name="tokens"), keras.Input((2,), name="mask")
    functional = keras.Model({"tokens": tokens, "mask": mask}, keras.layers.Concatenate()([tokens, mask]))
    assert set(runtime.input_structure(functional)) == {"tokens", "mask"}
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert tuple(runtime.input_structure(sequential).shape) == (None, 4)
    assert runtime.input_structure(keras.Sequential([keras.layers.Dense(2)])) is None


def test_a_frozen_variable_was_made_to_be_trained():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model.layers[0].trainable = False
    found = runtime.made_trainable(model)
    made = {variable.path.split("/")[-1]: id(variable) in found for variable in model.variables}
    assert made == {
        "kernel": True, "bias": True, "gamma": True, "beta": True, "moving_mean": False, "moving_variance": False,
    }  # fmt: skip


def test_an_array_shares_the_memory_of_its_tensor():
    def double(value, out):
        out[...] = 2 * value

    @tf.function
    def doubled(value):
        return graphs.fill(double, value, tf.shape(value), "double")

    for value in (np.arange(1.0, 4.0), np.ones([1], "float32"), np.ones([300, 300], "int64")):
        np.testing.assert_array_equal(doubled(tf.constant(value)), 2 * value)


def test_the_function_around_branches_and_loops_and_its_name():
    found = []

    def look(x):
        found.append(graphs.current_function())
        return x

    @tf.function(autograph=False)
    def step(x):
        look(x)
        tf.cond(x > 1, lambda: look(x), lambda: tf.while_loop(lambda i: i < 2, lambda i: look(i) + 1, [x])[0])
        return tf.function(look)(x)

    step.get_concrete_function(tf.constant(1.0))
    names = [graphs.name_of_function(graph) for graph in found]
    assert names == ["step", "step", "step", "look"], "the name of the Python function"
    assert found[0] is found[1] is found[2] is not found[3]


def test_functions_of_gradients_are_named_alike_in_all_processes():
    """They hold the collectives of stage 3's gradients, where a replica calls a `tf.function`."""
    found = []

    @tf.custom_gradient
    def look(x):
        def gradient(upstream):
            found.append(graphs.current_function())
            return upstream

        return x, gradient

    for _ in range(2):

        @tf.function(autograph=False)
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.function(look, autograph=False)(x)
            return tape.gradient(y, x)

        step.get_concrete_function(tf.constant(1.0))
    assert len({graph.name for graph in found}) == len(found) > 1, "TensorFlow numbers them"
    assert {graphs.name_of_function(graph) for graph in found} == {found[0].name.split("_")[-2] + "'"}


@pytest.mark.parametrize("kind", list(graphs.CALLS))
def test_functions_of_operations(kind):
    """Of an operation that calls functions their graphs are found, with inputs and outputs in its order."""
    is_stateful = not kind.startswith("Stateless") and kind != "PartitionedCall"
    counter, outer = tf.Variable(0.0), []

    def branch(x):
        if is_stateful:
            counter.assign_add(1.0)
        outer.append(tf.compat.v1.get_default_graph())
        return 2 * x

    makes = {
        "Call": lambda x: tf.function(branch)(x),
        "If": lambda x: tf.cond(x > 0, lambda: branch(x), lambda: branch(x)),
        "Case": lambda x: tf.switch_case(tf.cast(x, tf.int32), [lambda: branch(x), lambda: branch(x)]),
        "While": lambda x: tf.while_loop(lambda y: y < 9, branch, [x])[0],
    }

    @tf.function
    def run(x):
        makes[next(name for name in makes if kind.endswith(name))](x)
        calls = [each for each in x.graph.get_operations() if each.type in graphs.CALLS]
        assert [each.type for each in calls] == [kind]
        functions = graphs.functions_of(calls[0])
        assert len(functions) == (1 if kind.endswith("Call") else 2)
        own = len(calls[0].inputs) - kind.endswith(("If", "Case"))
        assert all(len(graph.inputs) == own for graph in functions)
        assert all(len(graph.outputs) == len(calls[0].outputs) for graph in functions if graph in outer)
        assert any(graph in outer for graph in functions)
        is_control_flow = not kind.endswith("Call")
        assert graphs.calls_around(outer[0]) == [calls[0]] * is_control_flow
        return x

    run(tf.constant(1.0))


def test_a_loop_is_known_where_it_is_traced():
    found = []

    @tf.function
    def run(x):
        def note(y):
            found.append(graphs.is_in_a_loop(x.graph))
            return y + 1

        note(x)
        tf.cond(x > 0, lambda: note(x), lambda: x)
        tf.while_loop(lambda y: y < 9, note, [x])
        tf.while_loop(lambda y: y < 9, lambda y: tf.cond(y > 0, lambda: note(y), lambda: y + 1), [x])

    run(tf.constant(1.0))
    assert found == [False, False, True, True]


def test_the_stock_strategy_leaves_a_coordination_service_that_is_configured():
    assert callable(distributed.context.context().configure_coordination_service)
    source = inspect.getsource(distributed.CollectiveAllReduceExtended._initialize_multi_worker)
    assert "if context.context().coordination_service is None:" in source


def test_nccl_is_configured_by_way_of_the_stock_strategy():
    target = distributed.context.context()
    source = inspect.getsource(distributed.CollectiveAllReduceExtended._initialize_multi_worker)
    configured, started = (
        source.index(f"context.context().{name}(") for name in ("configure_collective_ops", "enable_collective_ops")
    )
    assert configured < started, "before the server starts"
    assert "use_nccl_communication" in inspect.signature(target.configure_collective_ops).parameters
    assert "config.experimental.collective_nccl = True" in inspect.getsource(type(target).config.fget)
    original = target.configure_collective_ops
    with distributed.with_nccl(False):
        assert target.configure_collective_ops == original
    with distributed.with_nccl(True):
        assert target.configure_collective_ops.keywords == {"use_nccl_communication": True}
    assert target.configure_collective_ops == original
    assert not distributed.context.context().config.experimental.collective_nccl


# `host/keras_objects.py`.


def test_parts_of_models_and_callbacks(strategy, variable, tmp_path):
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert keras_objects.strategy_of(model) is strategy and keras_objects.strategy_of(object()) is None
    assert not keras_objects.has_compiled_loss(model)
    model.compile("sgd", "mse")
    assert keras_objects.has_compiled_loss(model)
    assert keras_objects.loss_tracker(model).name == "loss"
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    assert keras_objects.checkpoint_path(checkpoint, 2, None, {}) == str(tmp_path / "3.weights.h5")
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    assert keras_objects.backup_path(backup) == str(tmp_path / "latest.weights.h5")

    class Stand(keras_objects.SlotKey):
        def identity(self):
            return variable.value

    adam = built(keras.optimizers.Adam(0.5), variable)
    assert adam._get_variable_index(Stand()) == adam._get_variable_index(variable) == 0
    rate = keras_objects.own_rate(adam)
    with keras_objects.without_rate(adam):
        assert keras_objects.own_rate(adam) is None
    assert keras_objects.own_rate(adam) is rate is not None


def test_evaluation_within_fit(monkeypatch):
    given = []

    class Model(keras.Sequential):
        def evaluate(self, *args, **kwargs):
            given.append(keras_objects.is_within_fit(kwargs))
            return super().evaluate(*args, **kwargs)

    model = Model([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    assert given == [True, False]


def test_a_function_of_another_one_has_its_options():
    @tf.function(autograph=False, reduce_retracing=True)
    def double(x):
        return 2 * x

    def change(function):
        return lambda x: function(x) + 1

    changed = graphs.cloned(double, change)
    assert changed is graphs.cloned(double, change)
    assert type(changed) is type(double) and float(changed(tf.constant(3.0))) == 7
    assert (changed._autograph, changed._reduce_retracing) == (False, True)

    def absolute(x):
        if x < 0:  # of a tensor, which AutoGraph alone takes for a condition
            x = -x
        return x

    @tf.function
    def run(x):
        converted = graphs.converted(absolute)
        return tf.autograph.experimental.do_not_convert(lambda x: converted(x))(x)

    assert float(run(tf.constant(-2.0))) == 2


def test_a_tensor_is_computed_outside_its_graph():
    found = {}

    @tf.function
    def traced(given):
        with tf.name_scope("inner"):
            found["own"] = graphs.lifted(tf.ones([2]) * 3)
        found["given"] = graphs.lifted(given + 1)
        return given

    traced(tf.constant(1.0))
    assert tf.executing_eagerly() and found["own"].numpy().tolist() == [3, 3]
    assert found["given"] is None


def test_values_are_told_from_symbols():
    symbols = []
    value = tf.constant(1.0)
    tf.function(symbols.append, autograph=False).get_concrete_function(value)
    assert isinstance(value, batch_rows.EagerTensor) and not isinstance(symbols[0], batch_rows.EagerTensor)
    assert isinstance(tf.ragged.constant([[1], []]), batch_rows.CompositeTensor)
    assert not isinstance(value, batch_rows.CompositeTensor)


# `host/datasets.py`.


def test_pipelines_tell_what_they_are_made_of():
    augmented = tf.data.Dataset.range(9).map(lambda v: tf.random.uniform([]) + tf.cast(v, tf.float32)).batch(3)
    dataset = tf.data.Dataset.zip(augmented, tf.data.Dataset.range(3)).prefetch(1)
    assert [type(each).__name__ for each in datasets.pipeline(dataset)] == [
        "_PrefetchDataset", "_ZipDataset", "_BatchDataset", "_MapDataset", "_RangeDataset", "_RangeDataset",
    ]  # fmt: skip
    assert "RandomUniform" in datasets.operations_of(dataset)
    nested = tf.data.Dataset.range(3).map(tf.function(lambda v: tf.numpy_function(lambda w: w, [v], tf.int64)))
    assert "PyFunc" in datasets.operations_of(nested)
    assert datasets.operations_of(tf.data.Dataset.range(3).batch(2)) == set()


@pytest.mark.parametrize("stage", ["map", "batch"])
def test_stages_that_keep_no_order(stage):
    numbers = tf.data.Dataset.range(9)

    def make(deterministic):
        keep = {"num_parallel_calls": 2, "deterministic": deterministic}
        return {
            "map": lambda: numbers.map(lambda v: v + 1, **keep),
            "batch": lambda: numbers.batch(2, **keep),
        }[stage]().prefetch(1)

    assert datasets.unordered_stages(make(None)) == datasets.unordered_stages(make(True)) == []
    (name,) = datasets.unordered_stages(make(False))
    assert stage in name.lower()


def test_hidden_settings():
    model = keras.Sequential([keras.Input((2,)), keras.Sequential([keras.layers.Dense(3)])])
    layers = sorted(type(layer).__name__ for layer in datasets.layers_of(model))
    assert layers == ["Dense", "InputLayer", "InputLayer", "Sequential"]
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert datasets.rate_of(keras.optimizers.SGD(schedule)) is schedule
    assert datasets.keywords_of(keras.losses.Huber(delta=0.25)) == {"delta": 0.25}
    assert datasets.keywords_of(keras.metrics.TopKCategoricalAccuracy(3)) == {"k": 3}


def test_parts_of_a_batch_stay_so_through_functions_and_data_sets(strategy):
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(tf.range(6)).batch(5))
    seen = []

    @tf.function
    def look(parts):
        seen.append((type(parts), parts.values[0].shape[0], batch_rows.own_rows(parts.values[0]).dtype))

    for parts in [*dataset, strategy.cut_batch(np.arange(6))]:
        look(parts)
    assert set(seen) == {(batch_rows.BatchParts, None, tf.int64)}
    assert batch_rows.own_rows(tf.zeros([2])) is None


def test_gradient_tapes_know_of_operations_that_are_repeated():
    @tf.function(autograph=False)
    def slopes(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.transpose(x), 1)
            again = graphs.repeat_operation(y.op, {0: 3 * x if y.op.inputs[0] is x else 3 * y.op.inputs[0]})
        return tape.gradient(again, x)

    np.testing.assert_array_equal(slopes(tf.ones([2, 3])), np.full([2, 3], 3.0))


def test_states_of_stateful_layers(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input(batch_shape=(4, 3, 2)), keras.layers.LSTM(5, stateful=True)])
    states = batch_rows.recurrent_states(model)
    assert [state.shape for state in states] == [(4, 5), (4, 5)]
    assert batch_rows.is_recurrent_state({"name": states[0].name, "trainable": states[0].trainable})
    assert all(type(state.value).__name__ == "RowsVariable" for state in states)


def test_the_variable_of_a_handle(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert batch_rows.container_of(variable.values[1].handle) is variable
    assert batch_rows.container_of(tf.Variable(1.0).handle) is None


# SavedModels.


def test_distributed_variables_of_what_is_saved(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    root = tf.Module()
    root.model, root._all_variables = model, [model.variables[0].value.values[0]]
    found = saved_model.distributed_variables(root)
    assert {id(v) for v in found} == {id(v.value) for v in model.variables}
    assert {id(v) for v in saved_model.distributed_variables(model)} == {id(v) for v in found}
    assert saved_model.distributed_variables(tf.Module()) == []
    plain = tf.Variable(1.0)
    assert saved_model.container_of(plain) is plain
    assert saved_model.container_of(found[0].values[1]) is found[0]
    listed = saved_model.replace_listed(root, {id(v): plain for v in root._all_variables})
    assert len(listed) == 1 and [id(v) for v in root._all_variables] == [id(plain)]
    assert saved_model.replace_listed(tf.Module(), {}) is None


def test_a_callback_says_where_it_writes(tmp_path):
    assert vars(keras.callbacks.TensorBoard(tmp_path))["log_dir"] == str(tmp_path)
    assert vars(keras.callbacks.CSVLogger(tmp_path / "log"))["filename"] == str(tmp_path / "log")


def test_where_keras_finds_what_recomputes(monkeypatch):
    """A release may keep a module at its old place that nothing uses any more."""
    monkeypatch.setattr(runtime.keras_core, "remat", lambda function: f"recomputes {function}")
    assert keras.remat("f") == "recomputes f"
