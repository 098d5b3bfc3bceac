"""What the report says is what happens: bytes, messages, placements and options."""

import inspect

import keras
import numpy as np
import pool
import pytest
import tensorflow as tf
from keras import layers
from marks import sweep

import tfzero

WIDTH = 40


def make_strategy(stage=2, replicas=2, **settings):
    devices = [f"CPU:{k}" for k in range(replicas)]
    return tfzero.ZeroStrategy(stage, devices=devices, **{"min_shard_elements": 50} | settings)


def make_model(strategy, optimizer="adam"):
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((WIDTH,)), *[layers.Dense(WIDTH, activation="relu", name=f"dense_{k}") for k in range(3)]]
        )
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def traced_traffic(strategy, model):
    """Bytes and messages of the first replica in a traced step, those of metrics and losses aside."""
    x = tf.ones([4, WIDTH])
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((x, x)))
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    total, messages = 0, 0
    for operation in step.get_concrete_function(next(iter(dataset))).graph.get_operations():
        if not operation.type.startswith("Collective") or not operation.device.endswith("CPU:0"):
            continue
        size = operation.inputs[0].shape.num_elements()
        if size < 10:
            continue
        members, bytes_in = strategy.num_replicas_in_sync, size * operation.inputs[0].dtype.size
        if operation.type == "CollectiveGatherV2":
            sent = (bytes_in * (members - 1), members - 1)
        elif operation.type == "CollectiveAllToAllV2":
            sent = (bytes_in * (members - 1) / members, members - 1)
        else:
            assert operation.type == "CollectiveReduceV2"
            sent = (2 * -(-bytes_in // members) * (members - 1), 2 * (members - 1))
        total, messages = total + sent[0], messages + sent[1]
    return total, messages


@pytest.mark.parametrize(
    ("stage", "replicas", "optimizer", "settings"),
    [
        (0, 3, "adam", {}),
        (1, 2, "muon", {}),
        (2, 3, "adam", {"bucket_bytes": 6400}),
        (2, 2, "adam", {"compression": "int8"}),
        (0, 2, "adam", {"compression": "bf16"}),
        sweep(3, 2, "adam", {"reshard_after_forward": False}),
        (3, 3, "muon", {"reshard_after_forward": False}),
        (3, 2, "adam", {"compression": "int8", "reshard_after_forward": False}),
    ],
)
def test_bytes_and_messages_are_those_of_a_step(stage, replicas, optimizer, settings):
    strategy = make_strategy(stage, replicas, **settings)
    model = make_model(strategy, optimizer)
    report = strategy.report()
    assert (report.sent_bytes, report.messages) == traced_traffic(strategy, model)


def test_at_stage_3_the_first_layer_alone_is_not_gathered_again():
    strategy = make_strategy(3)
    model = make_model(strategy)
    report = strategy.report()
    shard_bytes = WIDTH * WIDTH / 2 * 4
    sent, messages = traced_traffic(strategy, model)
    assert (report.sent_bytes, report.messages) == (sent + shard_bytes, messages + 1)


def test_sixteen_bit_layers_send_half_at_stage_3():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        strategy = make_strategy(3, reshard_after_forward=False)
        model = make_model(strategy)
        report = strategy.report()
        assert (report.sent_bytes, report.messages) == traced_traffic(strategy, model)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("stage", "held"), [(0, [12, 12, 12]), (1, [8, 8, 8]), (2, [8, 8, 8]), (3, [6, 6, 6])], ids=lambda value: str(value)
)
def test_bytes_of_variables(stage, held):
    strategy = make_strategy(stage)
    make_model(strategy)
    kernels = [v for v in strategy.report().variables if v.name.endswith("kernel")]
    assert [(v.parameter_bytes + v.slot_bytes) / WIDTH**2 for v in kernels] == held
    assert [v.whole_bytes for v in kernels] == [12 * WIDTH**2] * 3
    assert [v.saved_bytes / WIDTH**2 for v in kernels] == [12 - h for h in held]
    biases = [v for v in strategy.report().variables if v.name.endswith("bias")]
    assert all(v.placement == "whole" and v.saved_bytes == 0 for v in biases)


def test_what_compression_keeps_is_counted():
    strategy = make_strategy(2, compression="int8", error_feedback=True)
    make_model(strategy)
    kernel = strategy.report().variables[0]
    assert (kernel.parameter_bytes + kernel.slot_bytes) / WIDTH**2 == 4 + 12 / 2 + 4
    assert kernel.wire == "int8" and strategy.report().variables[1].wire == "float32"


def test_owners_are_named():
    strategy = make_strategy(2)
    make_model(strategy, "muon")
    report = strategy.report()
    owners = {v.placement for v in report.variables if v.name.endswith("kernel")}
    assert owners <= {"owned by rank 0", "owned by rank 1"} and len(owners) == 2
    assert "needs the whole tensor" in str(report)


def option_effects(**settings):
    accumulate = settings.pop("accumulate", None)
    strategy = make_strategy(**settings)
    make_model(strategy, keras.optimizers.Adam(gradient_accumulation_steps=accumulate))
    return strategy.report().options


def test_every_option_of_the_strategy_is_in_the_report():
    names = set(inspect.signature(tfzero.ZeroStrategy).parameters)
    assert names <= set(option_effects())
    assert names <= set(make_strategy().report().options), "before an optimizer is built"


@pytest.mark.parametrize(
    ("settings", "name", "effect"),
    [
        ({"stage": 0}, "stage", "stage 0, everything is whole"),
        ({"stage": 3}, "stage", "slots, gradients and parameters lie in shards"),
        ({"replicas": 3}, "devices", "3 replicas, 3 CPU devices in each of 1"),
        ({}, "cluster_resolver", "this is worker 0 of 1"),
        ({"bucket_bytes": 6400}, "bucket_bytes", "4 buckets of up to 0.006104 MiB (bucket_bytes=6400)"),
        ({"bucket_bytes": "auto"}, "bucket_bytes", "MiB of gradients x"),
        ({"min_shard_elements": 50}, "min_shard_elements", "50; 3 smaller variables stay whole"),
        ({"min_shard_elements": 0}, "min_shard_elements", "0; 0 smaller variables stay whole"),
        ({}, "timeout_seconds", "no effect in a single process"),
        ({}, "compare_batches", "no effect in a single process"),
        ({"stage": 2}, "reshard_after_forward", "no effect below stage 3"),
        ({"stage": 3}, "reshard_after_forward", "gathered again in the backward pass"),
        ({"stage": 3, "reshard_after_forward": False}, "reshard_after_forward", "kept from the forward"),
        ({}, "compression", "none"),
        ({"compression": "bf16"}, "compression", "travel as bf16, the rest as it is; parameters travel as differences"),
        ({"compression": "int8", "stage": 3}, "compression", "int8, the rest as it is; replicas compute with encoded"),
        ({}, "error_feedback", "off"),
        ({"compression": "int8", "error_feedback": True}, "error_feedback", "4 bytes a parameter"),
        ({}, "hierarchical", "one level: 1 workers of 2 replicas are one level"),
        ({}, "overlap_param_gather", "off"),
        ({"overlap_param_gather": True}, "overlap_param_gather", "gathered while the next step's forward pass goes on"),
        ({"stage": 1, "accumulate": 4}, "accumulation", "sent once in 4 steps"),
        ({"stage": 2, "accumulate": 4}, "accumulation", "sent in each of 4 steps, to be accumulated in shards"),
    ],
)
def test_the_effect_of_an_option(settings, name, effect):
    assert effect in option_effects(**settings)[name]


def test_fit_prints_it_once_at_verbose_1(capsys):
    strategy = make_strategy()
    model = make_model(strategy)
    x = np.ones((4, WIDTH), "float32")
    model.fit(x, x, verbose=0)
    model.fit(x, x, verbose=2)
    assert "tfzero" not in capsys.readouterr().out
    model.fit(x, x, verbose=1, callbacks=[keras.callbacks.TerminateOnNaN()])
    model.fit(x, x, verbose=1)
    printed = capsys.readouterr().out
    assert printed.count("tfzero: stage 2, slots and gradients lie in shards; 2 replicas") == 1
    assert strategy.report().summary() in printed
    assert len(strategy.report().summary().splitlines()) <= 12
    another = make_model(strategy, "sgd")
    another.fit(x, x)
    assert capsys.readouterr().out.count("tfzero: stage 2") == 1


def test_a_model_that_is_built_by_its_first_batch_is_reported(capsys):
    strategy = make_strategy()
    with strategy.scope():
        model = keras.Sequential([layers.Dense(WIDTH)])
    model.compile("adam", "mse")
    x = np.ones((4, WIDTH), "float32")
    model.fit(x, x, verbose=1)
    assert (
        "1 sharded (its optimizer is element-wise), 1 whole (fewer than min_shard_elements=50)"
        in capsys.readouterr().out
    )


def _summaries() -> tuple:
    import contextlib
    import io

    strategy = tfzero.ZeroStrategy(2, min_shard_elements=50)
    model = make_model(strategy)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        x = np.ones((8, WIDTH), "float32")
        model.fit(x, x, verbose=1)
        model.evaluate(x, x, verbose=2, batch_size=4)
        model.predict(x)
    report = strategy.report()
    return printed.getvalue(), dict(report.options), report.messages


def test_one_of_several_workers_prints_it_and_shows_progress():
    first, second = pool.run(_summaries, workers=2, cpu_devices=2)
    assert "4 replicas, 2 CPU devices in each of 2" in first[0]
    assert first[0].count("loss:") >= 2 and second[0] == "", "one progress bar for all workers"
    assert second[1]["cluster_resolver"] == "this is worker 1 of 2"
    assert "workers wait 60 s for each other" in first[1]["timeout_seconds"]
    assert "two levels: gradients cross the network once for 2 replicas" in first[1]["hierarchical"]
    assert "sums of up to 64 KiB are gathered" in first[1]["algorithm"]
    # Kernels: 1 within and 1 across, then 3; biases: gathered by 3.
    assert first[2] == 1 + 1 + 3 + 3
