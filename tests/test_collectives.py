"""The group's collectives: right for every dtype and shape on CPU, and the right operations for NCCL."""

import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS

import tfzero
from tfzero.collectives.group import Group
from tfzero.collectives.nccl import Nccl
from tfzero.collectives.packing import pack, unpack
from tfzero.collectives.rings import Rings
from tfzero.plan.placement import VariableSpec, make_plan

DTYPES = [tf.float32, tf.float64, tf.float16, tf.bfloat16, tf.int32, tf.int64, tf.int8, tf.uint8, tf.bool]


def make_group(world_size: int) -> Group:
    return Group([f"/CPU:{k}" for k in range(world_size)], world_size, 0, Rings())


def different(shape, dtype, replicas: int) -> list[tf.Tensor]:
    """Small whole numbers, so that sums are exact in every dtype; each replica has its own."""
    random = np.random.default_rng(0)
    return [tf.cast(tf.constant(random.integers(0, 9, shape)), dtype) for _ in range(replicas)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_dtype(dtype, world_size):
    group = make_group(world_size)
    values = different([world_size, 5], dtype, world_size)
    arrays = [np.array(tf.cast(value, tf.float64)) for value in values]

    def numbers(results):
        return [np.array(tf.cast(result, tf.float64)) for result in results]

    for gathered in group.launch(group.all_gather, [value[0] for value in values]):
        np.testing.assert_array_equal(numbers([gathered])[0], [array[0] for array in arrays])
    for received in numbers(group.launch(group.broadcast, values)):
        np.testing.assert_array_equal(received, arrays[0])
    if dtype in (tf.bool, tf.int8, tf.uint8):
        total = np.array(tf.cast(tf.cast(tf.constant(sum(arrays)), tf.int64), dtype), "float64")
    else:
        total = sum(arrays)
        for rank, row in enumerate(numbers(group.launch(group.reduce_scatter, values))):
            np.testing.assert_array_equal(row, total[rank])
    for summed in numbers(group.launch(group.all_reduce, values)):
        np.testing.assert_array_equal(summed, total)


def test_shapes_known_only_in_the_graph():
    """One traced function serves batches of many sizes, and parts of different sizes."""
    group = make_group(2)

    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([None, 3])])
    def together(first, second):
        sums, parts = [], []
        for replica, value in enumerate((first, second)):
            sums.append(group.all_reduce(value, replica))
            parts.append(tf.concat(group.all_gather_ragged(value[replica:], replica), 0))
        return sums, parts

    for rows in (5, 2, 9, 5, 1):
        a, b = np.random.rand(rows, 3).astype("float32"), np.random.rand(rows, 3).astype("float32")
        sums, parts = together(a, b)
        for total in sums:
            np.testing.assert_allclose(total, a + b, rtol=1e-6)
        for whole in parts:
            np.testing.assert_array_equal(whole, np.concatenate([a, b[1:]]))


def test_collectives_in_loops_and_branches():
    """As Keras nests them: a loop over steps, the replicas in it, and branches within each replica."""
    strategy = tfzero.ZeroStrategy(devices=["CPU:0", "CPU:1"], timeout_seconds=30)
    extended = strategy.extended

    def replica(i, value):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.cond(
            i % 2 == 0,
            lambda: extended.replica_collective(extended.group.all_reduce, value + tf.cast(rank, tf.float32)),
            lambda: extended.replica_collective(extended.group.all_gather, value)[0] + 1.0,
        )

    @tf.function
    def steps(count):
        def body(i, value):
            return i + 1, strategy.experimental_local_results(strategy.run(replica, args=(i, value)))[0]

        return tf.while_loop(lambda i, _: i < count, body, [0, tf.constant([1.0])])[1]

    # 1 + (1 + 1) = 3, then 3 + 1 = 4, then 4 + (4 + 1) = 9.
    assert steps(tf.constant(3)).numpy().tolist() == [9.0]


def test_sixteen_bit_gradients_add_up_in_float32():
    """256 + 1 + 1 is 256 when added in bfloat16, one after the other."""
    group = make_group(3)
    rows = [tf.fill([3, 1], tf.cast(number, tf.bfloat16)) for number in (256.0, 1.0, 1.0)]
    assert group.launch(group.reduce_scatter, rows)[0].numpy().tolist() == [258.0]


def _twelve_members():
    strategy = tfzero.ZeroStrategy()
    group = strategy.extended.group
    rows = [tf.fill([12, 2], float(rank)) for rank in range(12)]
    return [row.numpy().tolist() for row in group.launch(group.reduce_scatter, rows)]


def test_twelve_members_in_one_process():
    """TensorFlow's CPU all-to-all fails there, so the group takes another way."""
    [rows] = tfzero.run_local(_twelve_members, workers=1, cpu_devices=12, timeout_seconds=FLEET_SECONDS)
    assert rows == [[66.0, 66.0]] * 12


def _waits(operation, awaited):
    """Whether a control dependency makes an operation, or an input that was made for it, wait for another."""
    makers = [operation, *(tensor.op for tensor in operation.inputs)]
    return any(awaited in maker.control_inputs for maker in makers)


def test_nccl_operations():
    """On GPUs: the native reduce-scatter, the NCCL hint, and one ordering token for each device."""
    group = Group(["/GPU:0", "/GPU:1"], 4, 2, Nccl())  # the second of two workers

    @tf.function(autograph=False)
    def step():
        results = []
        for replica in range(2):
            with tf.device(f"/GPU:{replica}"):
                row = group.reduce_scatter(tf.ones([4, 4]), replica)
                results += [group.all_gather(row, replica), group.all_reduce(tf.ones([3]), replica)]
        return results

    graph = step.get_concrete_function().graph
    collectives = [op for op in graph.get_operations() if op.type.startswith("Collective")]
    # On the host, where they can be read while a GPU is busy. [Note: counts]
    counts = [op for op in graph.get_operations() if op.type == "AssignAddVariableOp" and "CPU:0" in op.device]
    expected = ["CollectiveReduceScatterV2", "CollectiveGatherV2", "CollectiveReduceV2"]
    for replica in range(2):
        mine = [op for op in collectives if op.device.endswith(f"GPU:{replica}")]
        assert [op.type for op in mine] == expected
        assert {op.get_attr("communication_hint") for op in mine} == {b"nccl"}, "TensorFlow compares it in lower case"
        for op in mine:
            assert any(_waits(op, count) for count in counts), "what begins is not counted"
            assert any(_waits(count, op) for count in counts), "what ends is not counted"
        tokens = {op.inputs[-1].name for op in mine}
        assert len(tokens) == 1 and "read" not in tokens
        keys = [int(tf.get_static_value(op.inputs[3])) for op in mine]
        assert len(set(keys)) == 3
    first, second = ([op for op in collectives if op.device.endswith(f"GPU:{k}")] for k in range(2))
    assert [tf.get_static_value(op.inputs[3]) for op in first] == [tf.get_static_value(op.inputs[3]) for op in second]
    assert first[0].inputs[-1].name != second[0].inputs[-1].name


@pytest.mark.parametrize(
    ("devices", "world_size", "elements", "kind"),
    [
        (1, 2, 1, "Reduce"), (1, 2, 2, "Gather"), (1, 2, 2**14, "Gather"), (1, 2, 2**14 + 1, "Reduce"),
        (1, 9, 2**13, "Gather"), (1, 9, 2**13 + 1, "Reduce"), (2, 2, 2, "Reduce"),
    ],
)  # fmt: skip
def test_how_a_sum_is_taken(devices, world_size, elements, kind):
    """Small ones between processes by gathering: up to 64 KiB each, and 256 KiB from all others."""
    group = Group([f"/CPU:{k}" for k in range(devices)], world_size, 0, Rings())
    step = tf.function(lambda value: group.all_reduce(value, 0), autograph=False)
    graph = step.get_concrete_function(tf.TensorSpec([elements])).graph
    assert [op.type for op in graph.get_operations() if op.type.startswith("Coll")] == [f"Collective{kind}V2"]


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_unpack_is_the_inverse_of_pack(world_size, elementwise):
    shapes = [tf.TensorShape(shape) for shape in ([], [7], [3, 5], [1], [2, 2, 2])]
    specs = [VariableSpec(str(k), shape.num_elements(), elementwise=elementwise) for k, shape in enumerate(shapes)]
    plan = make_plan(specs, world_size, stage=2, bucket_bytes=400, min_shard_elements=2)
    tensors = {k: tf.random.uniform(shape) for k, shape in enumerate(shapes)}
    seen = set()
    for bucket in plan.buckets:
        packed = pack(bucket, tensors, world_size)
        for index, value in unpack(bucket, packed, [shapes[s.index] for s in bucket.segments]).items():
            np.testing.assert_array_equal(value, tensors[index])
            seen.add(index)
    assert seen == set(tensors)


def test_sums_of_16_bits_on_gpus_are_taken_in_32_bits():
    group = Group(["/GPU:0", "/GPU:1"], 2, 0, Nccl())
    rows = tf.TensorSpec([2, 8], tf.bfloat16)
    step = tf.function(lambda rows: group.reduce_scatter(rows, 0, tf.float32), autograph=False)
    function = step.get_concrete_function(rows)
    kinds = [op.type for op in function.graph.get_operations() if op.type.startswith("Collective")]
    assert kinds == ["CollectiveAllToAllV2"]
    assert function.structured_outputs.dtype == tf.float32
