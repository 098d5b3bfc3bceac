"""Who is where: arithmetic of the mesh, and that a strategy's replicas stand where it says."""

import pool
import pytest
import tensorflow as tf

import tfzero
from tfzero.plan.mesh import Mesh

SHAPES = [(1, 1), (1, 4), (3, 1), (2, 2), (3, 4), (8, 8)]


def all_workers(*shape, **axes):
    return [Mesh(*shape, worker, **axes) for worker in range(shape[0])]


@pytest.mark.parametrize(("workers", "devices"), SHAPES)
def test_one_axis_is_as_many_shards_as_replicas(workers, devices):
    meshes = all_workers(workers, devices)
    size = workers * devices
    assert all(mesh.size == mesh.replicas == mesh.shards == size for mesh in meshes)
    assert [rank for mesh in meshes for rank in mesh.ranks] == list(range(size))
    assert [mesh.shard_rank(rank) for mesh in meshes for rank in mesh.ranks] == list(range(size))
    assert {(mesh.stage(rank), mesh.copy(rank)) for mesh in meshes for rank in mesh.ranks} == {(0, 0)}
    assert [mesh.is_chief for mesh in meshes] == [True] + [False] * (workers - 1)


@pytest.mark.parametrize(("workers", "devices"), SHAPES)
def test_parts_of_a_batch_come_back_in_the_order_of_keras(workers, devices):
    meshes = all_workers(workers, devices)
    # Keras joins predictions replica by replica, of all workers each.
    joined = [mesh.part(replica) for replica in range(devices) for mesh in meshes]
    assert joined == list(range(workers * devices))
    assert all(mesh.part(k) == mesh.part_of_rank(mesh.rank(k)) for mesh in meshes for k in range(devices))


def test_copies_are_of_neighbours_and_stages_of_copies():
    mesh = Mesh(4, 2, copies=2, stages=2)
    assert (mesh.size, mesh.replicas, mesh.shards) == (8, 4, 2)
    places = [(mesh.stage(rank), mesh.copy(rank), mesh.shard_rank(rank)) for rank in range(8)]
    assert places == [(stage, copy, shard) for stage in range(2) for copy in range(2) for shard in range(2)]


@pytest.mark.parametrize(("workers", "devices"), SHAPES)
@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_stage_cuts_a_batch_into_all_parts(workers, devices, copies, stages):
    try:
        mesh = Mesh(workers, devices, copies=copies, stages=stages)
    except ValueError:
        return
    assert mesh.shards * copies * stages == mesh.size
    for stage in range(stages):
        ranks = [rank for rank in range(mesh.size) if mesh.stage(rank) == stage]
        assert sorted(map(mesh.part_of_rank, ranks)) == list(range(mesh.replicas))
        assert len({(mesh.copy(rank), mesh.shard_rank(rank)) for rank in ranks}) == mesh.replicas


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"workers": 0}, "at least 1"),
        ({"copies": -1}, "at least 1"),
        ({"workers": 2, "worker": 2}, "numbered from 0 to 1"),
        ({"workers": 3, "copies": 2}, "does not divide 3"),
        ({"workers": 3, "devices_per_worker": 4, "stages": 2}, "takes 6 devices, and a worker has 4"),
    ],
)
def test_what_is_no_mesh_is_refused_with_its_numbers(axes, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**axes)


def found_by_worker(stage):
    return found(tfzero.ZeroStrategy(stage, min_shard_elements=1))


def found(strategy):
    """A strategy's mesh, when its replicas have the shards of a parameter and the rows of a batch that it says."""
    mesh = strategy.extended.mesh
    assert (mesh.replicas, mesh.shards, mesh.copies, mesh.stages) == (strategy.num_replicas_in_sync,) * 2 + (1, 1)
    with strategy.scope():
        value = tf.Variable(tf.range(4.0 * mesh.shards), trainable=True)
    rows = strategy.experimental_local_results(strategy.cut_batch(tf.range(mesh.replicas)[:, tf.newaxis]))
    for replica, rank in enumerate(mesh.ranks):
        shard = mesh.shard_rank(rank)
        assert strategy.extended.group.rank(replica) == rank
        assert value.values[replica].numpy().tolist() == list(range(4 * shard, 4 * shard + 4))
        assert rows[replica].numpy().tolist() == [[mesh.part(replica)]]
    return mesh


def test_replicas_stand_where_the_mesh_says():
    mesh = found(tfzero.ZeroStrategy(3, devices=["CPU:0", "CPU:1", "CPU:2"], min_shard_elements=1))
    assert mesh == Mesh(1, 3)


def test_replicas_of_several_workers_stand_where_the_mesh_says():
    meshes = pool.run(found_by_worker, workers=2, cpu_devices=2, args=(3,))
    assert meshes == [Mesh(2, 2, 0), Mesh(2, 2, 1)]
