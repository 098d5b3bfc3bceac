"""What `estimate_memory` foretells is what TensorFlow's allocator counts in real workers.

The allocator does not count tensors below 256 KiB (`MklSmallSizeAllocator` in TensorFlow's mkl_cpu_allocator.h), so the
models here have few of those.
"""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from marks import FLEET_SECONDS, sweep

import tfzero

STAGES = (0, 1, 2, 3)


def dense():
    stack = [layers.Dense(1024, activation="relu", use_bias=False) for _ in range(8)]
    return keras.Sequential([keras.Input((1024,)), *stack])


def transformer():
    width, length = 512, 64
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(1024, width)(tokens)
    for _ in range(2):
        normed = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, width // 8)(normed, normed, use_causal_mask=True)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x)))
    model = keras.Model(tokens, layers.Dense(1024)(layers.LayerNormalization()(x)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def convolutional():
    x = inputs = keras.Input((32, 32, 64))
    for width in (128, 256):
        for _ in range(2):
            x = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(x))
            x = layers.Activation("relu")(x)
        x = layers.MaxPooling2D(2)(x)
    x = layers.Dense(256, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(64)(x))


def recommender():
    user, item = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    x = layers.Concatenate()([layers.Embedding(30000, 64)(user), layers.Embedding(10000, 64)(item)])
    for width in (1024, 1024):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model([user, item], layers.Dense(1)(x))


def autoencoder():
    """Few parameters, many activations, and skip connections."""
    x = inputs = keras.Input((48, 48, 8))
    skips = []
    for width in (128, 256, 512):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.AveragePooling2D(2)(x)
    x = layers.Conv2D(512, 3, padding="same", activation="relu")(x)
    for width, skip in zip((256, 128, 128), skips[::-1], strict=True):
        x = layers.Concatenate()([layers.UpSampling2D(2)(x), skip])
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Conv2D(8, 1)(x))


# Rows of each replica's part of a batch.
MODELS = {dense: 64, transformer: 8, convolutional: 8, recommender: 256, autoencoder: 2}


def random_batch(model, rows: int):
    random = np.random.default_rng(0)

    def like(tensor):
        shape = (rows, *tensor.shape[1:])
        return random.integers(0, 100, shape) if tensor.dtype == "int32" else random.normal(size=shape)

    x = [like(tensor).astype(tensor.dtype) for tensor in model.inputs]
    y = like(model.outputs[0]).astype("float32")
    is_sparse = getattr(model, "loss", None) is not None and "Sparse" in type(model.loss).__name__
    return x[0] if len(x) == 1 else x, y.argmax(-1) if is_sparse else y


def measure(names, stages) -> dict:
    """Bytes held between steps and at the peak of a step, by model and stage, of this process's allocator."""
    import gc

    def info():
        return tf.config.experimental.get_memory_info("CPU:0")

    def one(make, stage):
        strategy = tfzero.ZeroStrategy(stage)
        keras.backend.clear_session()
        gc.collect()
        before = info()["current"]
        with strategy.scope():
            model = make()
        model.compile("adam", getattr(model, "loss", None) or "mse")
        batch = random_batch(model, MODELS[make] * strategy.num_replicas_in_sync)
        peaks = []
        for _ in range(4):
            tf.config.experimental.reset_memory_stats("CPU:0")
            model.train_on_batch(*batch)
            peaks.append(info()["peak"] - before)
        gc.collect()
        return {"held": info()["current"] - before, "peak": sorted(peaks[1:])[1]}

    by_name = {make.__name__: make for make in MODELS}
    return {(name, stage): one(by_name[name], stage) for name in names for stage in stages}


def compare(workers: int, makes, stages=STAGES) -> list[str]:
    """Lines of what differs by more than is promised: held bytes by 2 %, the peak by 15 %."""
    names = [make.__name__ for make in makes]
    measured = tfzero.run_local(measure, workers=workers, args=(names, stages), timeout_seconds=FLEET_SECONDS)
    wrong = []
    for make in makes:
        estimates = tfzero.estimate_memory(make, "adam", workers, batch_size=MODELS[make] * workers)
        for estimate in (estimates[stage] for stage in stages):
            for key, most in (("held", 0.02), ("peak", 0.15)):
                found = max(worker[make.__name__, estimate.stage][key] for worker in measured)
                told = estimate.record()[f"{key}_bytes"]
                line = (
                    f"{make.__name__}, stage {estimate.stage}, {workers} replicas, {key}: foretold "
                    f"{told / 1e6:.1f} MB, measured {found / 1e6:.1f} MB ({told / found - 1:+.1%})"
                )
                print(line)
                if abs(told / found - 1) > most:
                    wrong.append(line)
    return wrong


def test_two_workers_take_what_was_foretold():
    assert compare(2, [transformer], stages=(2, 3)) == []


@pytest.mark.sweep
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_workers_take_what_was_foretold(make, workers):
    assert compare(workers, [make]) == []


def twenty_billion():
    return keras.Sequential([keras.Input((100_000,)), layers.Dense(100_000), layers.Dense(100_000)])


def test_nothing_is_allocated():
    """80 GB of parameters and 240 GB of training state, more than this machine has."""
    estimates = tfzero.estimate_memory(twenty_billion, world_size=64, batch_size=64)
    parameters = 2 * (100_000**2 + 100_000)
    assert [each.held_bytes / parameters for each in estimates] == pytest.approx([12, 4.125, 4.125, 0.1875], rel=1e-4)
    assert estimates[3].peak_bytes < estimates[2].peak_bytes < estimates[1].peak_bytes < estimates[0].peak_bytes


def test_the_smallest_stage_that_fits():
    estimates = tfzero.estimate_memory(dense, world_size=8, batch_size=64)
    assert [each.stage for each in estimates] == [0, 1, 2, 3]
    for each in estimates:
        assert estimates.smallest_stage(each.peak_bytes).peak_bytes <= each.peak_bytes
    assert estimates.smallest_stage(estimates[0].peak_bytes).stage == 0
    assert estimates.smallest_stage(estimates[0].peak_bytes - 1).stage > 0
    assert estimates.smallest_stage(1) is None
    assert tfzero.estimate_memory(dense, world_size=8, batch_size=64, stage=2) == estimates[2]


@pytest.mark.parametrize("stage", [sweep(0), sweep(1), sweep(2), 3])
@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "adam",
        "nadam",
        lambda: keras.optimizers.Adam(gradient_accumulation_steps=2, use_ema=True),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop()),
    ],
    ids=["sgd", "momentum", "adam", "nadam", "accumulation", "loss scale"],
)
def test_held_bytes_are_those_of_a_strategy(optimizer, stage):
    """Exactly, on three devices, with sizes that do not divide."""

    def make():
        return keras.Sequential([keras.Input((61,)), layers.Dense(67), layers.Dense(3)])

    optimizer = optimizer() if callable(optimizer) else keras.optimizers.get(optimizer)
    told = tfzero.estimate_memory(make, optimizer, world_size=3, stage=stage)
    strategy = tfzero.ZeroStrategy(stage, devices=["CPU:0", "CPU:1", "CPU:2"])
    with strategy.scope():
        model = make()
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    assert tfzero.estimate_memory(model, model.optimizer, world_size=3, stage=stage) == told
    held = strategy.report().variables
    assert told.parameter_bytes == sum(variable.parameter_bytes for variable in held)
    assert told.slot_bytes == sum(variable.slot_bytes for variable in held)
    assert told.activation_bytes is None and told.peak_bytes > told.held_bytes


def test_an_owner_holds_whole_slots():
    told = tfzero.estimate_memory(dense, "muon", world_size=8, stage=2)
    momenta = 8 * 4 * 1024**2  # eight matrices, each of one owner
    assert momenta / 8 <= told.slot_bytes <= momenta / 8 * 2


def test_frozen_layers_have_no_slots_and_statistics_stay_whole():
    def make():
        model = convolutional()
        model.layers[1].trainable = False
        return model

    free = tfzero.estimate_memory(convolutional, world_size=4)
    frozen = tfzero.estimate_memory(make, world_size=4)
    kernel = 3 * 3 * 64 * 128
    for all_trained, one_less in zip(free, frozen, strict=True):
        assert all_trained.parameter_bytes == one_less.parameter_bytes
        assert all_trained.slot_bytes - one_less.slot_bytes == 8 * kernel // (4 if one_less.stage else 1)


def test_a_greater_batch_takes_more_activations():
    small, large = (tfzero.estimate_memory(autoencoder, world_size=2, stage=2, batch_size=size) for size in (64, 128))
    assert large.activation_bytes == pytest.approx(2 * small.activation_bytes, rel=0.05)
    assert small.held_bytes == large.held_bytes


def test_sixteen_bit_layers_keep_casts_but_not_at_stage_3():
    """Up to stage 2 a layer's cast of a parameter waits for the backward pass; at stage 3 it is gathered again."""
    wide = tfzero.estimate_memory(dense, world_size=8, batch_size=8)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        narrow = tfzero.estimate_memory(dense, world_size=8, batch_size=8)
    finally:
        keras.config.set_dtype_policy("float32")
    layer = 1024**2
    for stage in (0, 1, 2):
        assert narrow[stage].held_bytes == wide[stage].held_bytes
        assert narrow[stage].peak_bytes > wide[stage].peak_bytes
    assert narrow[3].peak_bytes <= wide[3].peak_bytes
    assert narrow[3].activation_bytes < 3 * layer  # the 16-bit gradient of one layer


def test_a_model_that_exists_gives_the_same():
    model = dense()
    assert tfzero.estimate_memory(model, batch_size=64) == tfzero.estimate_memory(dense, batch_size=64)


def test_bad_input():
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0"])
    with strategy.scope():
        ours = dense()
    with pytest.raises(ValueError, match="was made under a strategy"):
        tfzero.estimate_memory(ours, batch_size=8)
    with pytest.raises(ValueError, match="no variables yet"):
        tfzero.estimate_memory(keras.Sequential([layers.Dense(4)]))
    with pytest.raises(ValueError, match="a function that makes one. Received: 3"):
        tfzero.estimate_memory(lambda: 3)
    with pytest.raises(ValueError, match="inputs of known shape"):
        tfzero.estimate_memory(lambda: keras.Sequential([keras.Input((None, 8)), layers.Dense(4)]), batch_size=8)
    for name, value in (("world_size", 0), ("batch_size", -1), ("stage", 4)):
        with pytest.raises(ValueError, match=f"Received: {name}={value}"):
            tfzero.estimate_memory(dense, **{name: value})


def test_the_command_line(tmp_path):
    (tmp_path / "train.py").write_text(
        "import keras\ndef make():\n"
        "    return keras.Sequential([keras.Input((2000,)), keras.layers.Dense(2000), keras.layers.Dense(2000)])\n"
    )
    command = [sys.executable, "-m", "tfzero.memory", "--model", "train:make", "--world-size", "4"]
    command += ["--batch-size", "64", "--budget-gb", "0.09", "--json", "out.json", "--picture", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=FLEET_SECONDS)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["stage"] for record in records] == [0, 1, 2, 3]
    assert records[0]["held_bytes"] == pytest.approx(12 * 8_004_000, rel=0.001)
    assert "stage 3 is the smallest that fits into 0.09 GB on each of 4 replicas" in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.splitlines()) == 6
