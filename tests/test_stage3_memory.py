"""Stage 3 in four real workers: what it holds, what it needs at the peak, and a limit under which replication fails."""

import pytest

import tfzero

WORLD_SIZE = 4
WIDTH = 512
DEPTHS = (8, 16, 32)
ROWS = 4  # of each worker's batch
# What the limited training may use beyond what TensorFlow takes to start, in bytes a parameter. Of private memory,
# which the allocator reserves generously, stage 3 takes 14.5 and replication 40.
LIMIT = 20


def make_model(depth, width):
    import keras

    layers = [keras.layers.Dense(width, use_bias=False, activation="relu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *layers])
    model.compile(keras.optimizers.Adam(1e-4), "mse")
    return model


def train(strategy, depth, width, steps):
    import numpy as np

    with strategy.scope():
        model = make_model(depth, width)
    rows = ROWS * strategy.num_replicas_in_sync
    x = np.random.default_rng(0).normal(size=(rows * steps, width)).astype("float32")
    model.fit(x, x, batch_size=rows, verbose=0, shuffle=False)
    return model


def _measure() -> dict:
    """Bytes held between steps and at the peak of a step, by depth."""
    import gc

    import keras
    import tensorflow as tf

    def info():
        return tf.config.experimental.get_memory_info("CPU:0")

    # Layers of 1 MiB, each in a bucket of its own, as larger ones are by default.
    strategy = tfzero.ZeroStrategy(3, bucket_bytes=2**20)
    figures = {}
    for depth in DEPTHS:
        gc.collect()
        before = info()["current"]
        model = train(strategy, depth, WIDTH, steps=1)
        tf.config.experimental.reset_memory_stats("CPU:0")
        rows = ROWS * WORLD_SIZE
        x = tf.ones([rows, WIDTH])
        for _ in range(3):
            model.train_on_batch(x, x)
        gc.collect()
        figures[depth] = {"peak": info()["peak"] - before, "held": info()["current"] - before}
        del model
        keras.backend.clear_session()
    return figures


@pytest.fixture(scope="module")
def figures():
    return tfzero.run_local(_measure, workers=WORLD_SIZE, timeout_seconds=250)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_replica_holds_its_shards(figures, depth):
    """Float32 parameters and Adam's two slots: 12/N bytes a parameter."""
    for worker in figures:
        held = worker[depth]["held"] / (depth * WIDTH**2)
        assert 12 / WORLD_SIZE <= held <= 12 / WORLD_SIZE * 1.04


@pytest.mark.parametrize("depth", DEPTHS[1:])
def test_the_peak_grows_by_shards_and_activations_only(figures, depth):
    """Shards of parameters, slots and gradients are 16/N bytes a parameter."""
    more = depth - DEPTHS[0]
    activations = 3 * ROWS * WIDTH * 4  # outputs, and what their activation function keeps
    for worker in figures:
        growth = worker[depth]["peak"] - worker[DEPTHS[0]]["peak"]
        assert growth <= more * (16 / WORLD_SIZE * WIDTH**2 + activations) * 1.05


def _train_within(stage, depth, width) -> str:
    """Trains with a limit on this process's private memory."""
    import resource

    import tensorflow as tf

    strategy = tfzero.ZeroStrategy(stage, timeout_seconds=30)
    train(strategy, 2, 8, steps=1)  # threads and compilers have started
    with open("/proc/self/status", encoding="ascii") as lines:
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    limit = used + LIMIT * depth * width**2
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        model = train(strategy, depth, width, steps=3)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return "out of memory"
    return f"trained {model.count_params()} parameters"


@pytest.mark.sweep
@pytest.mark.parametrize(("stage", "outcome"), [(3, "trained 67108864 parameters"), (0, "out of memory")])
def test_a_limit_under_which_replication_runs_out_of_memory(stage, outcome):
    try:
        outcomes = tfzero.run_local(_train_within, workers=WORLD_SIZE, args=(stage, 16, 2048), timeout_seconds=250)
    except tfzero.WorkerError as error:  # a failed allocation may end a process of TensorFlow at once
        assert stage == 0, error
        assert any(sign in str(error) for sign in ("ResourceExhausted", "OOM", "signal 6", "signal 11")), error
        return
    assert set(outcomes) == {outcome}
