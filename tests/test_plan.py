"""The plan as arithmetic: who owns which elements, for up to 128 ranks. No TensorFlow."""

from collections import Counter

import pytest
from arithmetic import local_elements, wire_elements

from tfzero.plan.placement import Placement, VariableSpec, make_plan, shard_elements, split_rows
from tfzero.plan.scheme import STAGES, check_stage, scheme_of

# Primes, scalars, powers of two and their neighbours, fewer elements than ranks, and one that dwarfs the others.
MENAGERIE = (1, 1, 2, 3, 7, 64, 65, 127, 128, 129, 997, 1023, 1024, 1025, 7919, 65_536, 104_729, 1, 13)
WORLD_SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 31, 32, 64, 97, 127, 128)
BUCKET_BYTES = 64 * 1024


def specs_of(sizes, **fields):
    return [VariableSpec(f"variable_{i}", elements, **fields) for i, elements in enumerate(sizes)]


def plan_of(sizes, world_size, stage=2, bucket_bytes=BUCKET_BYTES, min_shard_elements=0, **fields):
    return make_plan(specs_of(sizes, **fields), world_size, stage, bucket_bytes, min_shard_elements)


def owned_runs(plan, segment, rank):
    """The run `[begin, end)` of a flattened variable that `rank` updates of a segment, without padding."""
    placement = plan.placements[segment.index]
    if placement is Placement.SHARDED:
        begin = min(rank * segment.width, segment.elements)
        return begin, min(begin + segment.width, segment.elements)
    return (0, segment.elements) if segment.row == rank else (0, 0)


@pytest.mark.parametrize("elementwise", [True, False])
def test_every_element_has_exactly_one_owner(elementwise):
    for world_size in WORLD_SIZES:
        plan = plan_of(MENAGERIE, world_size, elementwise=elementwise)
        runs = {index: [] for index in range(len(MENAGERIE))}
        for bucket in plan.buckets:
            for segment in bucket.segments:
                runs[segment.index] += [owned_runs(plan, segment, rank) for rank in range(world_size)]
        for index, elements in enumerate(MENAGERIE):
            covered = 0
            for begin, end in sorted(run for run in runs[index] if run[0] < run[1]):
                assert begin == covered, f"{elements} elements over {world_size} ranks: a gap or an overlap at {begin}"
                covered = end
            assert covered == elements


@pytest.mark.parametrize(("stage", "elementwise"), [(0, True), (2, True), (2, False)])
def test_each_variable_lies_once_in_a_bucket(stage, elementwise):
    for world_size in WORLD_SIZES:
        plan = plan_of(MENAGERIE, world_size, stage, elementwise=elementwise)
        seen = Counter(segment.index for bucket in plan.buckets for segment in bucket.segments)
        assert seen == Counter(range(len(MENAGERIE)))


@pytest.mark.parametrize(("stage", "elementwise"), [(0, True), (2, True), (2, False)])
def test_segments_lie_side_by_side_within_their_row(stage, elementwise):
    for world_size in WORLD_SIZES:
        for bucket in plan_of(MENAGERIE, world_size, stage, elementwise=elementwise).buckets:
            lengths = []
            for rank in range(world_size):
                filled = 0
                for segment in bucket.segments_of(rank):
                    assert segment.offset == filled
                    filled += segment.width
                lengths.append(filled)
            assert max(lengths) == bucket.row_elements


def test_fewer_elements_than_ranks_leave_empty_shards():
    plan = plan_of((1, 3), world_size=128)
    assert plan.placements == (Placement.SHARDED, Placement.SHARDED)
    for bucket in plan.buckets:
        for segment in bucket.segments:
            lengths = [end - begin for begin, end in (owned_runs(plan, segment, rank) for rank in range(128))]
            assert sorted(lengths, reverse=True) == [1] * segment.elements + [0] * (128 - segment.elements)


def test_a_shard_is_a_part_rounded_up():
    for world_size in range(1, 129):
        for elements in MENAGERIE:
            width = shard_elements(elements, world_size)
            assert elements <= width * world_size < elements + world_size


def test_owners_are_balanced():
    sizes = [elements for elements in MENAGERIE if elements < 10_000] * 30
    for world_size in WORLD_SIZES:
        plan = plan_of(sizes, world_size, elementwise=False)
        load = [0] * world_size
        for index, owner in enumerate(plan.owners):
            load[owner] += sizes[index]
        assert max(load) - min(load) <= max(sizes)
        assert max(load) <= sum(sizes) / world_size + max(sizes)
        assert [sum(local_elements(plan, i, r) for i in range(len(sizes))) for r in range(world_size)] == load


def test_the_largest_variables_go_to_different_owners():
    plan = plan_of((100, 5, 90, 5, 80), world_size=3, elementwise=False)
    assert plan.owners == (0, 2, 1, 2, 2)


@pytest.mark.parametrize("stage", [0, 2])
def test_buckets_respect_their_bytes_or_hold_one_variable(stage):
    for world_size in WORLD_SIZES:
        for bucket in plan_of(MENAGERIE, world_size, stage).buckets:
            elements = sum(segment.elements for segment in bucket.segments)
            assert elements * 4 <= BUCKET_BYTES or len(bucket.segments) == 1


def test_rows_of_owned_buckets_respect_their_bytes_or_hold_one_variable():
    for world_size in WORLD_SIZES:
        for bucket in plan_of(MENAGERIE, world_size, elementwise=False).buckets:
            for rank in range(world_size):
                row = bucket.segments_of(rank)
                assert sum(segment.width for segment in row) * 4 * world_size <= BUCKET_BYTES or len(row) <= 1


def test_large_variables_travel_alone_and_small_ones_together():
    limit = BUCKET_BYTES // 4
    plan = plan_of((10, limit // 8, 20, limit * 3, 30), world_size=2)
    groups = [[segment.index for segment in bucket.segments] for bucket in plan.buckets]
    assert sorted(groups) == [[1], [3], [4, 2, 0]]


def test_a_bucket_has_one_dtype_and_one_optimizer():
    kinds = [("float32", 4, 0), ("float16", 2, 0), ("float32", 4, 1), ("float64", 8, 1)]
    specs = [
        VariableSpec(f"v{i}", elements, dtype, item_bytes, optimizer=optimizer)
        for i, elements in enumerate(MENAGERIE)
        for dtype, item_bytes, optimizer in kinds
    ]
    for world_size in WORLD_SIZES:
        for bucket in make_plan(specs, world_size, 2, BUCKET_BYTES, min_shard_elements=100).buckets:
            members = [specs[segment.index] for segment in bucket.segments]
            assert {(spec.dtype, spec.optimizer) for spec in members} == {(bucket.dtype, bucket.optimizer)}
            assert {spec.elements < 100 for spec in members} == {bucket.placement is Placement.WHOLE}


def test_buckets_go_from_the_last_variable_to_the_first():
    plan = plan_of((100,) * 50, world_size=4, bucket_bytes=4000)
    order = [segment.index for bucket in plan.buckets for segment in bucket.segments]
    assert order == list(range(50))[::-1]


def test_buckets_come_in_the_order_in_which_they_are_complete():
    for world_size in WORLD_SIZES:
        for elementwise in (True, False):
            plan = plan_of(MENAGERIE, world_size, min_shard_elements=100, elementwise=elementwise)
            completed_by = [min(segment.index for segment in bucket.segments) for bucket in plan.buckets]
            assert completed_by == sorted(completed_by, reverse=True)


def test_traffic_is_twice_a_part_less_than_all():
    sizes = (128 * 1024, 128 * 300, 128 * 7)
    for stage in (0, 1, 2):
        for world_size in (1, 2, 4, 8, 16, 32, 64, 128):
            plan = plan_of(sizes, world_size, stage)
            assert wire_elements(plan) * world_size == 2 * (world_size - 1) * sum(sizes)


def test_padding_adds_less_than_a_row_for_each_variable():
    for stage in (0, 1, 2):
        for world_size in WORLD_SIZES:
            plan = plan_of(MENAGERIE, world_size, stage)
            least = 2 * (world_size - 1) * sum(MENAGERIE) / world_size
            assert least <= wire_elements(plan) < least + 2 * world_size * len(MENAGERIE)


def test_slots_are_a_part_of_the_whole():
    for world_size in WORLD_SIZES:
        plan = plan_of(MENAGERIE, world_size, min_shard_elements=1024)
        for index, elements in enumerate(MENAGERIE):
            held = [local_elements(plan, index, rank) for rank in range(world_size)]
            assert held == [elements if elements < 1024 else shard_elements(elements, world_size)] * world_size


def test_placements_have_reasons():
    plan = make_plan(
        [VariableSpec("a", 5), VariableSpec("b", 2000), VariableSpec("c", 2000, elementwise=False)], 2, 1, 1000, 1024
    )
    assert plan.placements == (Placement.WHOLE, Placement.SHARDED, Placement.OWNED)
    assert plan.owners == (None, None, 0)
    assert "min_shard_elements=1024" in plan.reasons[0]
    assert "element-wise" in plan.reasons[1]
    assert "whole tensor" in plan.reasons[2]
    assert set(plan_of(MENAGERIE, 4, stage=0).placements) == {Placement.WHOLE}


def test_a_model_without_variables_has_no_buckets():
    plan = plan_of((), world_size=4)
    assert plan.buckets == ()
    assert wire_elements(plan) == 0


def test_rows_are_dealt_as_evenly_as_possible():
    for rows in (0, 1, 2, 7, 15, 64, 127, 1000):
        for parts in WORLD_SIZES:
            dealt = [split_rows(rows, parts, part) for part in range(parts)]
            assert [begin for begin, _ in dealt] == [0, *(end for _, end in dealt[:-1])]
            assert dealt[-1][1] == rows
            lengths = [end - begin for begin, end in dealt]
            assert max(lengths) - min(lengths) <= 1
            assert lengths == sorted(lengths, reverse=True)


def test_a_scheme_says_what_each_stage_does():
    nothing, slots, gradients, parameters = map(scheme_of, STAGES)
    assert [s.shards_slots for s in map(scheme_of, STAGES)] == [False, True, True, True]
    assert [s.shards_gradients for s in map(scheme_of, STAGES)] == [False, False, True, True]
    assert [s.shards_parameters for s in map(scheme_of, STAGES)] == [False, False, False, True]
    assert nothing.reduces_to_all and not slots.reduces_to_all
    assert nothing.exchanges_when_accumulated and slots.exchanges_when_accumulated
    assert not gradients.exchanges_when_accumulated and not parameters.exchanges_when_accumulated
    assert [s.gathers_updates for s in map(scheme_of, STAGES)] == [False, True, True, False]
    assert [s.passes for s in map(scheme_of, STAGES)] == [2, 2, 2, 3]
    assert scheme_of(3, reshard_after_forward=False).passes == 2
    assert len({s.held for s in map(scheme_of, STAGES)}) == 4


@pytest.mark.parametrize("stage", [4, -1, True, None, "2", 1.5])
def test_what_is_no_stage_is_refused(stage):
    with pytest.raises(ValueError, match="`stage` must be one of"):
        check_stage(stage)
