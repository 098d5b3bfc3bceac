"""`strategy.gathered`: the same variable twice, one within the other, and slots; on devices and on workers."""

import gc
import warnings

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers

import tfzero


def hold_in_all_ways(strategy) -> dict:
    """Results that tell what was seen at each place, the same everywhere."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((7,)), layers.Dense(5)])
    kernel = model.layers[0].kernel
    kernel.assign(np.arange(35.0).reshape(7, 5))
    start = np.array(kernel)
    seen = {}

    def of_replicas():
        return np.array(strategy.experimental_local_results(strategy.run(lambda: kernel + 0.0))[0])

    with strategy.gathered([kernel, kernel]):
        kernel.assign(start + 1)
        assert_other_shapes_are_refused(kernel.value)
    assert_other_shapes_are_refused(kernel.value)
    seen["twice"] = np.array(kernel) - start
    with strategy.gathered(model.weights):
        kernel.assign(start + 2)
        with strategy.gathered(kernel):
            kernel.assign_add(start * 0 + 1)
        seen["replicas after the inner one"] = of_replicas() - start
        seen["held after the inner one"] = np.array(kernel) - start
        kernel.assign(start + 4)
        seen["held in the end"] = np.array(kernel) - start
    seen["after the outer one"] = np.array(kernel) - start
    seen["replicas in the end"] = of_replicas() - start
    with pytest.raises(ZeroDivisionError), strategy.gathered(kernel):
        with strategy.gathered([kernel, kernel]):
            kernel.assign(start + 5)
        kernel.assign(start + 6)
        raise ZeroDivisionError
    seen["of the inner one only"] = np.array(kernel) - start
    model.compile(keras.optimizers.SGD(0.0, momentum=0.5), "mse")
    model.fit(np.ones((4, 7)), np.ones((4, 5)), verbose=0)
    (slot,) = (v for v in model.optimizer.variables if v.shape == (7, 5))
    with strategy.gathered(slot):
        slot.assign(start)
    seen["slot"] = np.array(slot) - start + 1
    return {name: np.unique(values).tolist() for name, values in seen.items()}


def assert_other_shapes_are_refused(variable):
    """Given to the `tf.Variable` itself, as Keras would refuse them. A shard may have such a shape."""
    for value in (np.ones(35, "float32"), tf.ones([5, 7]), tf.ones([]), tf.ones(variable.values[0].shape)):
        if value.shape != variable.shape:
            with pytest.raises(ValueError, match="hape"):
                variable.assign(value)


EXPECTED = {
    "twice": [1.0], "replicas after the inner one": [3.0], "held after the inner one": [3.0], "held in the end": [4.0],
    "after the outer one": [4.0], "replicas in the end": [4.0], "of the inner one only": [5.0], "slot": [1.0],
}  # fmt: skip


def hold_differently(strategy) -> dict:
    """What workers see after each has assigned and named something else."""
    worker = strategy.extended.mesh.worker
    with strategy.scope():
        model = keras.Sequential([keras.Input((5,)), layers.Dense(5), layers.Dense(5)])
    first, second = (layer.kernel for layer in model.layers)
    with strategy.gathered([first, second][:: -1 if worker else 1]):
        held = first.value.held
        with strategy.gathered(first):
            assert first.value.held is held  # no second copy
            first.assign(np.full((5, 5), 3.0 + worker))
        seen = [np.array(first)]
        second.assign(np.full((5, 5), 7.0 + worker))
    seen += [np.array(first), np.array(second)]
    with (
        pytest.raises(ValueError, match="variables to gather differ.*Received here: .*kernel") as raised,
        strategy.gathered([first, second][worker]),
    ):
        pass
    return {"seen": [np.unique(each).tolist() for each in seen], "told": str(raised.value)}


def trace_while_held(strategy) -> dict:
    """What functions give and do that were traced while values were held: later, and when none are held."""
    with strategy.scope():
        kernel = keras.Variable(np.zeros(10, "float32"), name="traced")
    read = tf.function(lambda: kernel + 0.0)

    @tf.function
    def double():
        kernel.assign(kernel * 2)

    with strategy.gathered(kernel):
        seen = [read().numpy()]
        double()
    kernel.assign(np.full(10, 3.0))
    with strategy.gathered(kernel):
        seen.append(read().numpy())
        double()
        seen.append(read().numpy())
    told = []
    for function in (read, double):
        with pytest.raises(tf.errors.InvalidArgumentError) as raised:
            function()
        told.append(str(raised.value))
    seen.append(kernel.numpy())
    return {"seen": [np.unique(each).tolist() for each in seen], "told": told}


def assert_right_when_traced(result: dict) -> None:
    assert result["seen"] == [[0.0], [3.0], [6.0], [6.0]]
    for each in result["told"]:
        assert "The variable traced:0 lies in shards" in each and "within `strategy.gathered` only" in each


def hold_in_worker() -> dict:
    warnings.simplefilter("ignore")  # replicas that read eagerly at stage 3
    strategies = {stage: tfzero.ZeroStrategy(stage, min_shard_elements=8) for stage in (2, 3)}
    results = {stage: hold_in_all_ways(strategy) for stage, strategy in strategies.items()}
    return results | {"differing": hold_differently(strategies[3]), "traced": trace_while_held(strategies[3])}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.filterwarnings("ignore:Eagerly")
def test_on_logical_devices(stage):
    strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    seen = hold_in_all_ways(strategy)
    if stage == 2:  # whole anyway: written at once, whatever happens after
        seen["of the inner one only"] = [v - 1 for v in seen["of the inner one only"]]
    assert seen == EXPECTED


def test_functions_traced_while_values_are_held():
    strategy = tfzero.ZeroStrategy(3, min_shard_elements=8, devices=["CPU:0", "CPU:1"])
    assert_right_when_traced(trace_while_held(strategy))


def test_a_value_that_is_no_longer_held_takes_no_memory():
    strategy = tfzero.ZeroStrategy(3, devices=["CPU:0", "CPU:1"])
    with strategy.scope():
        variable = keras.Variable(np.zeros(2**18, "float32"))
    with strategy.gathered(variable):
        pass
    gc.collect()
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    for _ in range(2):
        with strategy.gathered(variable):
            held = tf.config.experimental.get_memory_info("CPU:0")["current"]
        assert held - before >= 2**20
    assert tf.config.experimental.get_memory_info("CPU:0")["current"] - before < 2**16


def test_on_two_workers():
    for result in pool.run(hold_in_worker, workers=2):
        result[2]["of the inner one only"] = [v - 1 for v in result[2]["of the inner one only"]]
        assert_right_when_traced(result.pop("traced"))
        differing = result.pop("differing")
        assert differing["seen"] == [[3.0], [3.0], [7.0]]
        assert "[5, 5]' on worker 0 and missing on worker 1" in differing["told"]
        assert result == {2: EXPECTED, 3: EXPECTED}


# Warnings are told once, however many replicas have met their reason.


@pytest.mark.parametrize("eager", [False, True])
def test_warnings_are_told_once(eager):
    strategy = tfzero.ZeroStrategy(3, min_shard_elements=8, devices=["CPU:0", "CPU:1"])

    class Half(layers.Layer):
        def build(self, shape):
            self.used, self.unused = (self.add_weight(shape=(shape[-1], 3)) for _ in range(2))

        def call(self, x):
            return x @ self.used

    with strategy.scope():
        model = keras.Sequential([keras.Input((7,)), Half()])
    model.compile("sgd", "mse", run_eagerly=eager)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(np.ones((4, 7)), np.ones((4, 3)), verbose=0)
    texts = [str(each.message) for each in caught]
    assert sum("Gradients do not exist" in text for text in texts) == 1
    assert sum("memory of stage 2" in text for text in texts) == eager
