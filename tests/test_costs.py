"""What the cost formulas and wire formats promise, against the collectives of real steps.

`test_memory.py` and `test_compression.py` measure bytes on the wire.
"""

import pytest
from arithmetic import wire_elements
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero import costs
from tfzero.costs import Setup, item_bytes
from tfzero.plan.formats import FORMATS
from tfzero.plan.placement import VariableSpec, make_plan

# Of a model whose sizes most numbers of replicas do not divide.
WIDTH, LAYERS = 330, 3


@pytest.mark.parametrize(
    ("name", "elements", "size_bytes"),
    [
        ("bf16", 1, 4), ("bf16", 2, 4), ("bf16", 3, 8), ("fp16", 1, 516), ("fp16", 512, 1032),
        ("int8", 1, 260), ("int8", 256, 260), ("int8", 257, 520),
    ],
)  # fmt: skip
def test_bytes_of_a_run(name, elements, size_bytes):
    assert FORMATS[name].size_bytes(elements) == size_bytes == 4 * FORMATS[name].words(elements)


@pytest.mark.parametrize(("name", "size_bytes"), [(None, 4), ("bf16", 2), ("fp16", 2 + 4 / 256), ("int8", 1 + 4 / 256)])
def test_bytes_of_an_element(name, size_bytes):
    assert item_bytes(name) == size_bytes


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1024])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sent_bytes_are_those_of_the_plan(world_size, stage):
    elements = 1024 * 720  # which all world sizes divide
    plan = make_plan([VariableSpec("a", elements)], world_size, stage, bucket_bytes=2**20, min_shard_elements=1)
    assert Setup(world_size, stage).sent_bytes() == pytest.approx(4 * wire_elements(plan) / elements)


def test_stage_3_sends_half_as_much_again_unless_it_keeps():
    assert Setup(4, 3).sent_bytes() == 1.5 * Setup(4, 2).sent_bytes() == 9
    assert Setup(4, 3, reshard_after_forward=False).sent_bytes() == Setup(4, 2).sent_bytes()
    assert Setup(4, 2).messages(10) == 60 and Setup(4, 3).messages(10) == 90


def test_the_network_sees_what_leaves_a_worker():
    assert Setup(8, 2, replicas_per_worker=8).network_bytes() == 0
    assert Setup(8, 2, replicas_per_worker=1).network_bytes() == Setup(8, 2).sent_bytes() == 7
    # All-to-all from four replicas to the other four; the ring's all-gather crosses once.
    assert Setup(8, 2, replicas_per_worker=4).network_bytes() == 4 * 4 * 4 / 8 + 4 * 7 / 8
    assert Setup(8, 0, replicas_per_worker=4).network_bytes() == 2 * 4 * 7 / 8
    # With two levels one sum for the whole worker: 1/4 of that; inside it three more quarters.
    assert Setup(8, 2, replicas_per_worker=4, two_level=True).network_bytes() == 4 * 4 / 8 + 4 * 7 / 8
    assert Setup(8, 2, replicas_per_worker=4, two_level=True).sent_bytes() == 4 * 3 / 4 + 4 / 2 / 4 + 4 * 7 / 8
    assert Setup(8, 2, replicas_per_worker=4, two_level=True).messages(10) == 10 * (3 + 1 + 7)


@pytest.mark.parametrize(
    ("setup", "size_bytes"),
    [
        (Setup(4, 0), 12), (Setup(4, 1), 6), (Setup(4, 2), 6), (Setup(4, 3), 3), (Setup(4, 2, "int8"), 7),
        (Setup(4, 3, "int8"), 3), (Setup(4, 2, "int8", True), 11), (Setup(1, 2, "int8", True), 12),
    ],
)  # fmt: skip
def test_held_bytes(setup, size_bytes):
    assert setup.held_bytes() == size_bytes


def test_a_projection_is_printed(capsys):
    costs.main(["--parameters", "7e9", "--gbit", "100", "--microseconds", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * 4 * 2
    assert lines[1].split() == ["8", "0", "f32", "84.00", "49.00", "448", "3.929"]
    assert lines[-1].split()[:4] == ["16384", "3", "int8", "0.01"]


# Against the collectives of traced steps.


def _count(world_sizes, cases, hierarchical="auto") -> dict:
    """Bytes and messages that the first replica sends in a traced step, by replicas here, stage and compression."""
    import keras
    import tensorflow as tf

    def sent(operation):
        members = int(tf.get_static_value(operation.inputs[1]))
        size = operation.inputs[0].shape.num_elements() * operation.inputs[0].dtype.size
        if operation.type == "CollectiveGatherV2":
            return size * (members - 1), members - 1
        rounds = 2 if operation.type == "CollectiveReduceV2" else 1
        return rounds * size * (members - 1) / members, rounds * (members - 1)

    counted: dict = {}
    for here in world_sizes:
        for stage, name in cases:
            devices = [f"CPU:{k}" for k in range(here)]
            strategy = tfzero.ZeroStrategy(stage, devices=devices, compression=name, hierarchical=hierarchical)
            members = strategy.num_replicas_in_sync
            with strategy.scope():
                dense = [keras.layers.Dense(WIDTH, use_bias=False, activation="relu") for _ in range(LAYERS)]
                model = keras.Sequential([keras.Input((WIDTH,)), *dense])
            model.compile("adam", "mse")
            model.optimizer.build(model.trainable_variables)
            x = tf.ones([members * 2, WIDTH])
            dataset = tf.data.Dataset.from_tensors((x, x))
            batch = next(iter(strategy.experimental_distribute_dataset(dataset)))
            step = tf.function(lambda batch, s=strategy, m=model: s.run(m.train_step, args=(batch,)))
            graph = step.get_concrete_function(batch).graph
            found = [
                sent(operation)
                for operation in graph.get_operations()
                if operation.type.startswith("Collective")
                and operation.device.endswith("CPU:0")
                and operation.inputs[0].shape.num_elements() > 100  # not counts and losses
            ]
            counted[here, stage, name] = [sum(column) for column in zip(*found, strict=True)]
            del model, dense
            keras.backend.clear_session()
    return counted


def check(counted, workers, two_levels=False):
    elements = WIDTH * WIDTH * LAYERS
    for (here, stage, name), (size_bytes, messages) in counted.items():
        is_two_level = two_levels and (stage > 0 or name is not None)
        setup = Setup(here * workers, stage, name, replicas_per_worker=here, two_level=is_two_level)
        others = setup.world_size - 1
        formula, expected = setup.sent_bytes(), setup.messages(LAYERS if stage == 3 else 1)  # of layers, or of buckets
        if stage == 3:
            # The first layer's gradient needs no input's, so it is not gathered again.
            formula -= item_bytes(name) * others / setup.world_size / LAYERS
            expected -= others
        assert formula <= size_bytes / elements <= formula * 1.08, (here, stage, name)  # padding: of shards and blocks
        assert messages == pytest.approx(expected)


CASES = ((0, None), (2, None), (2, "int8"), (3, None), (3, "bf16"))


@pytest.mark.parametrize(("world_sizes", "cases"), [((11,), CASES[3:4]), sweep(tuple(range(2, 12)), CASES)])
def test_counted_traffic_of_replicas_in_one_process(world_sizes, cases):
    (counted,) = tfzero.run_local(
        _count,
        workers=1,
        args=(world_sizes, cases),
        cpu_devices=11,
        timeout_seconds=FLEET_SECONDS,
        env={"TF_CONFIG": ""},
    )
    assert len(counted) == len(world_sizes) * len(cases)
    check(counted, 1)


@pytest.mark.parametrize(
    ("workers", "devices", "cases", "hierarchical"),
    [
        (2, 3, CASES[2:3], "auto"),
        sweep(3, 11, CASES, "auto"),
        sweep(3, 11, CASES, False),
    ],
)
def test_counted_traffic_of_replicas_in_several_processes(workers, devices, cases, hierarchical):
    counted = tfzero.run_local(
        _count, workers, args=((devices,), cases, hierarchical), cpu_devices=devices, timeout_seconds=FLEET_SECONDS
    )
    assert counted[1:] == counted[:1] * (workers - 1)
    check(counted[0], workers, two_levels=hierarchical == "auto")
