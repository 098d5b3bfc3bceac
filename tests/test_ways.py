"""Which way each collective takes: over NCCL nothing that TensorFlow's NCCL cannot do, and the right values.

Without a GPU the ways over NCCL are traced, with NCCL's hint, and run, with that of rings: TensorFlow's own
reduce-scatter alone, which rings do not have, is replaced by a sum of everything, of which each keeps its row.
"""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.collectives import nccl, transport_choice, ways
from tfzero.collectives.group import Group
from tfzero.collectives.nccl import Nccl, has_whole_gpus
from tfzero.collectives.rings import Rings
from tfzero.collectives.transport import Surroundings
from tfzero.collectives.transport_choice import choose
from tfzero.collectives.ways import ONE, RINGS, SEVERAL, Place
from tfzero.host import distributed
from tfzero.plan.settings import Settings

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
OF_NCCL = {"float16", "float32", "float64", "int32", "int64"}
SUMMED_BY_NCCL = {"float32", "float64", "int64"}
# Devices of this process and replicas in all.
GROUPS = {"one process": (2, 2), "two workers of one": (1, 2), "two workers of two": (2, 4)}


def run(group, primitive, value, replica):
    return getattr(group, primitive)(value, replica)


def takes_rows(primitive):
    return primitive in (ways.REDUCE_SCATTER, ways.ALL_TO_ALL)


def traced(group, primitive, shape, dtype) -> list[tf.Operation]:
    """The collectives that the first replica puts into a graph."""
    step = tf.function(lambda value: run(group, primitive, value, 0), autograph=False)
    graph = step.get_concrete_function(tf.TensorSpec(shape, dtype)).graph
    return [op for op in graph.get_operations() if op.type.startswith("Collective")]


@pytest.mark.parametrize("primitive", [*ways.PRIMITIVES, "all_gather_ragged"])
@pytest.mark.parametrize(
    ("topology", "levels"),
    [
        ("one process", False),
        sweep("two workers of one", False),
        ("two workers of two", False),
        ("two workers of two", True),
    ],
)
def test_nccl_is_asked_for_what_it_can_do(topology, primitive, levels):
    here, size = GROUPS[topology]
    group = Group([f"/CPU:{k}" for k in range(here)], size, 0, Nccl(), levels)
    shapes = [[size, 5]] + [[None, 3]] * (primitive in (ways.ALL_REDUCE, "all_gather_ragged"))
    for dtype in DTYPES:
        for shape in shapes:
            operations = traced(group, primitive, shape, dtype)
            assert operations, "nothing is exchanged"
            for operation in operations:
                carried = operation.get_attr("T").name
                assert operation.get_attr("communication_hint") == b"nccl"
                assert carried in OF_NCCL, f"{operation.type} of {carried}"
                if operation.type in ("CollectiveReduceV2", "CollectiveReduceScatterV2"):
                    assert carried in SUMMED_BY_NCCL, f"{operation.type} of {carried}"
                members = tf.get_static_value(operation.inputs[1])
                assert operation.type != "CollectiveAllToAllV2" or members == here, "between processes it is wrong"


def test_float32_is_reduced_and_scattered_by_nccl_itself():
    for here, size in GROUPS.values():
        group = Group([f"/CPU:{k}" for k in range(here)], size, 0, Nccl())
        kinds = [op.type for op in traced(group, ways.REDUCE_SCATTER, [size, 5], "float32")]
        assert kinds == ["CollectiveReduceScatterV2"]


@pytest.mark.parametrize("processes", ways.PROCESSES)
@pytest.mark.parametrize("transport", ways.TRANSPORTS)
def test_the_table_has_a_way_for_all(transport, processes):
    for primitive in ways.PRIMITIVES:
        for dtype in DTYPES:
            way = ways.choose(primitive, dtype, Place(transport, processes))
            assert way.operation in ways.PRIMITIVES
        with pytest.raises(TypeError, match=f"{primitive} of string is no collective"):
            ways.choose(primitive, "string", Place(transport, processes))


def test_the_table_is_that_of_the_documents():
    assert ways.as_markdown() in (Path(__file__).parents[1] / "docs" / "gpus.md").read_text()


def test_the_hint_is_lower_case():
    for kind in (Rings, Nccl):
        assert kind.hint == kind.hint.lower() == kind.name, "TensorFlow compares it so, and takes all else for a ring"
    assert choose(Surroundings("CPU")).name == "ring" and not has_whole_gpus()


def test_two_replicas_on_one_gpu_take_rings(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["a", "b"])
    for parts, name in ((None, "nccl"), ([1], "nccl"), ([1, 2], "ring")):
        monkeypatch.setattr(tf.config, "get_logical_device_configuration", lambda device, parts=parts: parts)
        assert choose(Surroundings("GPU")).name == name
        assert choose(Surroundings("CPU")).name == "ring"


def test_error_feedback_without_effect_is_refused():
    settings = Settings(2, 2**20, 8, 60.0, 1, "GPU", compression="int8", error_feedback=True)
    with pytest.raises(ValueError, match="error_feedback=True has no effect between GPUs of several processes"):
        Nccl().check(settings, 2)
    for changes, workers, transport in (({}, 1, Nccl()), ({}, 2, Rings()), ({"error_feedback": False}, 2, Nccl())):
        transport.check(dataclasses.replace(settings, **changes), workers)


# Run on CPUs, with the ways of GPUs of several processes.

TRAINED = {
    # name: (stage, compression, optimizer, dtype policy, tolerance)
    "adam": (1, None, lambda: keras.optimizers.Adam(0.01), "float32", 2e-5),
    "bfloat16": (2, None, lambda: keras.optimizers.SGD(0.1), "mixed_bfloat16", 2e-2),
    "shards": (3, None, lambda: keras.optimizers.Adam(0.01), "float32", 2e-5),
    "muon": (3, None, lambda: keras.optimizers.Muon(0.01), "float32", 2e-4),
    "whole in int8": (0, "int8", lambda: keras.optimizers.SGD(0.1), "float32", 2e-2),
    "differences in int8": (2, "int8", lambda: keras.optimizers.SGD(0.1), "float32", 2e-2),
    "shards in bfloat16": (3, "bf16", lambda: keras.optimizers.SGD(0.1), "float32", 2e-2),
}
emitted: list[tuple] = []  # in a worker: operation, dtype, members


class LikeGpus(Nccl):
    """NCCL's ways, by rings, which have no reduce-scatter; it notes what travels."""

    hint = Rings.hint
    device_types = ("CPU",)

    def reduce_scatter(self, rows, call):
        emitted.append(("reduce-scatter", rows.dtype.name, call.members))
        return tf.reshape(self.all_reduce(rows, call), [call.members, -1])[call.rank]

    def _run(self, operation, value, call, **attributes):
        emitted.append((operation.__name__, value.dtype.name, call.members))
        return super()._run(operation, value, call, **attributes)


def _values(group) -> dict:
    """What the replicas here get of each primitive and dtype, as float64."""
    found = {}
    for primitive in ways.PRIMITIVES:
        for dtype in DTYPES:
            values = [_value_of(group.rank(k), group.world_size, dtype) for k in range(len(group.devices))]
            results = group.launch(getattr(group, primitive), values)
            found[primitive, dtype] = [np.array(tf.cast(result, tf.float64)) for result in results]
    return found


def _value_of(rank, size, dtype) -> tf.Tensor:
    numbers = np.random.default_rng(rank).integers(0, 2 if dtype == "bool" else 9, [size, 5])
    return tf.cast(tf.constant(numbers), dtype)


def _expected(primitive, dtype, rank, size) -> np.ndarray:
    values = np.array([tf.cast(_value_of(r, size, dtype), tf.float64) for r in range(size)])
    total = np.minimum(values.sum(0), 1) if dtype == "bool" else values.sum(0)
    return {
        ways.ALL_REDUCE: total, ways.REDUCE_SCATTER: total[rank], ways.ALL_TO_ALL: values[:, rank],
        ways.ALL_GATHER: values, ways.BROADCAST: values[0],
    }[primitive]  # fmt: skip


def _train_over(name) -> dict:
    stage, compression, make_optimizer, policy, _ = TRAINED[name]
    over = tfzero.ZeroStrategy(stage, compression=compression, min_shard_elements=8)
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    try:
        with over.scope():
            model = oracle.dense_model()
        initial = model.get_weights()
        arguments = {"optimizer": make_optimizer(), "loss": "categorical_crossentropy"}
        outcome = oracle.train(model, *oracle.Data().arrays(), arguments, only_fit=True, epochs=2)
    finally:
        keras.config.set_dtype_policy("float32")
    report = over.report()
    told = {"compression": report.options["compression"], "wires": {v.wire for v in report.variables}}
    return {"initial": initial, **dataclasses.asdict(outcome), "told": told, "sent": report.sent_bytes}


def _as_gpus_do() -> dict:
    nccl.has_whole_gpus = lambda: True
    transport_choice.TRANSPORTS[0] = LikeGpus
    try:
        tfzero.ZeroStrategy(compression="int8", error_feedback=True)
    except ValueError as error:
        found: dict = {"refused": str(error)}
    first = tfzero.ZeroStrategy()
    found["config"] = distributed.context.context().config.experimental.collective_nccl
    devices = first.extended.worker_devices
    for levels in {False, len(devices) > 1}:
        size, rank = first.num_replicas_in_sync, first.extended.group.rank(0)
        group = Group(devices, size, rank, LikeGpus(), levels)
        found["values", levels] = _values(group)
    found |= {name: _train_over(name) for name in TRAINED}
    return found | {"emitted": sorted(set(emitted))}


@pytest.fixture(scope="module", params=[sweep(1), 2], ids=["2x1", "2x2"])
def workers(request):
    return tfzero.run_local(_as_gpus_do, cpu_devices=request.param, timeout_seconds=FLEET_SECONDS)


def test_values_are_right_on_the_ways_of_gpus(workers):
    here = len(workers[0]["values", False][ways.ALL_REDUCE, "float32"])
    for levels in {False, here > 1}:
        for worker, found in enumerate(workers):
            for (primitive, dtype), results in found["values", levels].items():
                for replica, result in enumerate(results):
                    rank = worker * here + replica
                    expected = _expected(primitive, dtype, rank, 2 * here)
                    np.testing.assert_array_equal(result, expected, f"{primitive} of {dtype} on rank {rank}")


def test_nothing_is_exchanged_between_processes_by_all_to_all(workers):
    here = len(workers[0]["values", False][ways.ALL_REDUCE, "float32"])
    for found in workers:
        kinds = set(found["emitted"])
        assert {dtype for _, dtype, _ in kinds} <= OF_NCCL
        between = {name for name, _, members in kinds if members == 2 * here}
        assert between == {"collective_gather_v2", "collective_reduce_v2", "reduce-scatter"}
        assert ("collective_reduce_v2", "int32", 2 * here) not in kinds
        assert {dtype for name, dtype, _ in kinds if name == "reduce-scatter"} <= SUMMED_BY_NCCL


def test_tensorflow_is_configured_for_nccl_before_its_server_starts(workers):
    assert all(found["config"] for found in workers)
    assert not distributed.context.context().config.experimental.collective_nccl, "a process without others needs none"


def test_what_has_no_effect_is_refused_by_the_constructor(workers):
    assert all("error_feedback=True has no effect between GPUs" in found["refused"] for found in workers)


@pytest.mark.parametrize("name", TRAINED)
def test_training_on_the_ways_of_gpus_is_that_of_one_device(workers, name):
    _, compression, make_optimizer, policy, tolerance = TRAINED[name]
    first, second = (found[name] for found in workers)
    for mine, theirs in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    keras.config.set_dtype_policy(policy)
    try:
        model = oracle.dense_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights(first["initial"])
    arguments = {"optimizer": make_optimizer(), "loss": "categorical_crossentropy"}
    expected = oracle.train(model, *oracle.Data().arrays(), arguments, only_fit=True, epochs=2)
    for mine, theirs in zip(first["weights"], expected.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
    if compression:
        assert "gradients as they are" in first["told"]["compression"]
        assert first["told"]["wires"] == {"float32"}


def test_rings_have_the_ways_that_they_had():
    for dtype in ("float32", "bfloat16"):
        assert ways.choose(ways.REDUCE_SCATTER, dtype, Place(RINGS, SEVERAL)).operation == ways.ALL_TO_ALL
        assert ways.choose(ways.ALL_TO_ALL, dtype, Place(RINGS, ONE)) == ways.Way(ways.ALL_TO_ALL)
