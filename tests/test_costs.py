"""What the cost formulas and wire formats promise; `test_memory.py` measures the same in real workers."""

import pytest

from tfzero.costs import held_bytes, item_bytes, sent_bytes
from tfzero.plan import VariableSpec, make_plan
from tfzero.wire import FORMATS


@pytest.mark.parametrize(
    ("name", "elements", "size_bytes"),
    [("bf16", 1, 4), ("bf16", 2, 4), ("bf16", 3, 8), ("fp16", 1, 516), ("int8", 1, 260), ("int8", 256, 260)]
    + [("int8", 257, 520), ("fp16", 512, 1032)],
)
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
    assert sent_bytes(world_size, stage) == pytest.approx(4 * plan.wire_elements() / elements)


def test_stage_3_sends_half_as_much_again_unless_it_keeps():
    assert sent_bytes(4, 3) == 1.5 * sent_bytes(4, 2) == 9
    assert sent_bytes(4, 3, reshard_after_forward=False) == sent_bytes(4, 2)


@pytest.mark.parametrize(
    ("arguments", "size_bytes"),
    [((4, 0), 12), ((4, 1), 6), ((4, 2), 6), ((4, 3), 3), ((4, 2, "int8"), 7), ((4, 3, "int8"), 3)]
    + [((4, 2, "int8", True), 11), ((1, 2, "int8", True), 12)],
)
def test_held_bytes(arguments, size_bytes):
    assert held_bytes(*arguments) == size_bytes
