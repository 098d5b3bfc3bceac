"""Which rank owns which elements: pure arithmetic, no TensorFlow.

Every variable of a model has one of three placements:

* `SHARDED`: flattened, padded to a multiple of the number of ranks, and cut into equal shards, one per rank. For
  element-wise optimizers (Adam, SGD, Lion, ...).
* `OWNED`: kept whole; one owner updates it for all ranks. For optimizers that need the whole tensor (Muon, Lamb, ...).
* `WHOLE`: whole on every rank, and every rank makes the same update. For small variables, and for all at stage 0.

Variables travel together in buckets. A large variable travels alone, which saves copying it into a bucket and out
again. A bucket of sharded or owned variables is a matrix `[shards, row_elements]`, and rank `r` owns row `r`. A
reduce-scatter of the matrix gives each rank the sum of its row. An all-gather of the rows gives the matrix back. A
bucket of whole variables is one flat run of elements that is all-reduced.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tfzero.plan.scheme import scheme_of

# A variable that takes at least 1 / _ALONE of a bucket travels alone.
_ALONE = 8


class Placement(enum.Enum):
    """How a variable's optimizer state is spread over the ranks."""

    SHARDED = "sharded"
    OWNED = "owned"
    WHOLE = "whole"


@dataclass(frozen=True)
class VariableSpec:
    """What the plan needs to know about a variable.

    Args:
        name: path of the variable, for messages.
        elements: number of elements of the whole variable.
        dtype: name of its dtype; a bucket holds one dtype.
        item_bytes: bytes of one element.
        elementwise: whether its optimizer updates every element by itself.
        optimizer: index of the optimizer that updates it; a bucket belongs to one optimizer.
        sharded_parameter: whether the variable itself is sharded (stage 3), and its gradient with it.
        compressed: whether it may travel encoded in fewer bits; an owned variable never does.
    """

    name: str
    elements: int
    dtype: str = "float32"
    item_bytes: int = 4
    elementwise: bool = True
    optimizer: int = 0
    sharded_parameter: bool = False
    compressed: bool = False


@dataclass(frozen=True)
class Segment:
    """Where one variable lies in a bucket.

    Args:
        index: index of the variable in the plan.
        elements: elements of the whole variable.
        row: the row that holds it; None if it spans all rows (sharded) or there are no rows (whole).
        offset: first column in its row (or in the flat run of a whole bucket).
        width: columns that it takes: one shard if sharded, else all its elements.
    """

    index: int
    elements: int
    row: int | None
    offset: int
    width: int


@dataclass(frozen=True)
class Bucket:
    """Variables that travel together. They share dtype, placement, optimizer and flags."""

    placement: Placement
    dtype: str
    optimizer: int
    segments: tuple[Segment, ...]
    row_elements: int
    sharded_parameters: bool = False
    compressed: bool = False

    def segments_of(self, rank: int) -> tuple[Segment, ...]:
        """The segments that `rank` updates, at least in part."""
        return tuple(segment for segment in self.segments if segment.row in (None, rank))


@dataclass(frozen=True)
class Plan:
    """Placements, owners and buckets of a list of variables.

    `placements`, `owners` and `reasons` have one entry per variable; `owners` is None for variables without one.
    """

    shards: int
    specs: tuple[VariableSpec, ...]
    placements: tuple[Placement, ...]
    owners: tuple[int | None, ...]
    reasons: tuple[str, ...]
    buckets: tuple[Bucket, ...]

    def bucket_bytes(self, bucket: Bucket) -> int:
        """Bytes of a bucket's variables."""
        return sum(segment.elements * self.specs[segment.index].item_bytes for segment in bucket.segments)

    def coalesced(self, buckets: Iterable[Bucket], least_bytes: int) -> list[list[Bucket]]:
        """Groups consecutive buckets into runs that are updated at once.

        Each run has at least `least_bytes`, except the last.
        """
        runs: list[list[Bucket]] = []
        size_bytes = 0
        for bucket in buckets:
            if not runs or size_bytes >= least_bytes:
                runs.append([])
                size_bytes = 0
            runs[-1].append(bucket)
            size_bytes += self.bucket_bytes(bucket)
        return runs


def shard_elements(elements: int, shards: int) -> int:
    """Elements of one rank's shard, padding included."""
    return -(-elements // shards)


def split_rows(rows: int, parts: int, part: int) -> tuple[int, int]:
    """The rows `[begin, end)` of `part`, if `rows` are dealt to `parts` as evenly as possible."""
    size, rest = divmod(rows, parts)
    begin = part * size + min(part, rest)
    return begin, begin + size + (part < rest)


def make_plan(
    specs: Sequence[VariableSpec], shards: int, stage: int, bucket_bytes: int, min_shard_elements: int
) -> Plan:
    """Places the variables, and packs them into buckets in the order in which their gradients are complete.

    The backward pass runs from the last variable to the first, so a bucket is complete with its first variable.
    """
    placed = [_place(spec, stage, min_shard_elements) for spec in specs]
    placements = tuple(placement for placement, _ in placed)
    owners = _balance_owners(specs, placements, shards)
    buckets: list[Bucket] = []
    keys = [
        (placement, s.dtype, s.optimizer, s.sharded_parameter, _travels_encoded(s, placement, min_shard_elements))
        for s, placement in zip(specs, placements, strict=True)
    ]
    for key in dict.fromkeys(reversed(keys)):
        members = [i for i in range(len(specs)) if keys[i] == key][::-1]
        bucket_elements = max(1, bucket_bytes // specs[members[0]].item_bytes)
        if key[0] is Placement.OWNED:
            contents = _owned_buckets(members, specs, owners, shards, bucket_elements)
        else:
            contents = _cut(members, specs, bucket_elements)
        buckets += [_make_bucket(key, content, specs, owners, shards) for content in contents]
    buckets.sort(key=lambda bucket: -min(segment.index for segment in bucket.segments))
    return Plan(shards, tuple(specs), placements, owners, tuple(reason for _, reason in placed), tuple(buckets))


def _place(spec: VariableSpec, stage: int, min_shard_elements: int) -> tuple[Placement, str]:
    if not scheme_of(stage).shards_slots:
        return Placement.WHOLE, f"stage {stage} keeps everything whole"
    if spec.elements == 0:
        return Placement.WHOLE, "it has no elements"
    if spec.elements < min_shard_elements:
        return Placement.WHOLE, f"{spec.elements} elements are fewer than min_shard_elements={min_shard_elements}"
    if not spec.elementwise:
        return Placement.OWNED, "its optimizer needs the whole tensor"
    return Placement.SHARDED, "its optimizer is element-wise"


def _travels_encoded(spec: VariableSpec, placement: Placement, min_shard_elements: int) -> bool:
    return spec.compressed and placement is not Placement.OWNED and spec.elements >= max(1, min_shard_elements)


def _balance_owners(
    specs: Sequence[VariableSpec], placements: Sequence[Placement], shards: int
) -> tuple[int | None, ...]:
    """Assigns owners: the largest variable first, each to the rank that owns the least so far."""
    owners: list[int | None] = [None] * len(specs)
    load = [0] * shards
    owned = [i for i, placement in enumerate(placements) if placement is Placement.OWNED]
    for i in sorted(owned, key=lambda i: (-specs[i].elements, i)):
        owner = load.index(min(load))
        owners[i] = owner
        load[owner] += specs[i].elements
    return tuple(owners)


def _cut(members: Sequence[int], specs: Sequence[VariableSpec], limit: int) -> list[list[int]]:
    """Packs variables into groups of at most `limit` elements. A large one makes a group of its own (`_ALONE`)."""
    contents: list[list[int]] = []
    room = 0
    open_bucket: list[int] = []
    for i in members:
        if specs[i].elements * _ALONE >= limit:
            contents.append([i])
            continue
        if specs[i].elements > room or not open_bucket:
            open_bucket = []
            contents.append(open_bucket)
            room = limit
        open_bucket.append(i)
        room -= specs[i].elements
    return contents


def _owned_buckets(
    members: Sequence[int],
    specs: Sequence[VariableSpec],
    owners: Sequence[int | None],
    shards: int,
    bucket_elements: int,
) -> list[list[int]]:
    """Takes about one row's worth of variables from every owner for each bucket, so its rows have similar lengths."""
    row_limit = max(1, bucket_elements // shards)
    rows = [_cut([i for i in members if owners[i] == rank], specs, row_limit) for rank in range(shards)]
    longest = max(len(row) for row in rows)
    return [[i for row in rows if k < len(row) for i in row[k]] for k in range(longest)]


def _make_bucket(
    key: tuple[Placement, str, int, bool, bool],
    members: Sequence[int],
    specs: Sequence[VariableSpec],
    owners: Sequence[int | None],
    shards: int,
) -> Bucket:
    placement, dtype, optimizer, *flags = key
    filled: dict[int | None, int] = {}
    segments = []
    for i in members:
        elements, row = specs[i].elements, owners[i]
        width = shard_elements(elements, shards) if placement is Placement.SHARDED else elements
        segments.append(Segment(i, elements, row, filled.get(row, 0), width))
        filled[row] = filled.get(row, 0) + width
    return Bucket(placement, dtype, optimizer, tuple(segments), max(filled.values()), *flags)
