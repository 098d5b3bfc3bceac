"""What follows from a plan by arithmetic."""

from tfzero.plan.placement import Placement, shard_elements


def local_elements(plan, index, rank):
    """Elements of one slot of variable `index` that `rank` holds."""
    elements = plan.specs[index].elements
    if plan.placements[index] is Placement.SHARDED:
        return shard_elements(elements, plan.shards)
    return elements if plan.owners[index] in (None, rank) else 0


def wire_elements(plan):
    """Elements that each rank sends in a step: each bucket is reduce-scattered and gathered, or all-reduced."""
    rows = (b.row_elements if b.placement is not Placement.WHOLE else shard_elements(b.row_elements, plan.shards)
            for b in plan.buckets)  # fmt: skip
    return 2 * (plan.shards - 1) * sum(rows)
