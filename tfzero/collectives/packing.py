"""Packs gradients into buckets and unpacks updated parameters from them.

The shape contract of `plan.Bucket`: a sharded or owned bucket is `[world_size, row_elements]`, a whole one is flat.
`unpack(bucket, pack(bucket, tensors))` returns the tensors.
"""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from tfzero.plan.placement import Bucket, Placement, Segment, shard_elements


def pack(bucket: Bucket, tensors: Mapping[int, tf.Tensor], world_size: int) -> tf.Tensor:
    """Packs tensors, keyed by variable index, into a bucket; a missing one leaves zeros."""
    dtype = tf.as_dtype(bucket.dtype)

    def flat(segment: Segment) -> tf.Tensor:
        if segment.index in tensors:
            return tf.reshape(tf.cast(tensors[segment.index], dtype), [segment.elements])
        return tf.zeros([segment.elements], dtype)

    if bucket.placement is Placement.WHOLE:
        return _concat([flat(segment) for segment in bucket.segments], 0)
    if bucket.placement is Placement.SHARDED:
        return _concat([as_rows(flat(segment), world_size) for segment in bucket.segments], 1)
    return tf.stack([pack_row(bucket, rank, {s.index: flat(s) for s in bucket.segments}) for rank in range(world_size)])


def as_rows(flat: tf.Tensor, world_size: int) -> tf.Tensor:
    """Splits a flat tensor, padded with zeros, into one shard for each rank: `[world_size, shard_elements]`."""
    padding = -flat.shape.num_elements() % world_size
    padded = tf.pad(flat, [[0, padding]]) if padding else flat
    return tf.reshape(padded, [world_size, -1])


def pack_row(bucket: Bucket, rank: int, shards: Mapping[int, tf.Tensor]) -> tf.Tensor:
    """One rank's row of a bucket, built from that rank's flat shards."""
    segments = bucket.segments_of(rank)
    row = [shards[segment.index] for segment in segments]
    padding = bucket.row_elements - sum(segment.width for segment in segments)
    if padding:
        row.append(tf.zeros([padding], tf.as_dtype(bucket.dtype)))
    return _concat(row, 0)


def pack_for_owners(bucket: Bucket, shards: Mapping[int, tf.Tensor], world_size: int) -> tf.Tensor:
    """One rank's shards of owned variables: row `r` holds those of variables that rank `r` owns.

    After an all-to-all, row `r` holds rank `r`'s shards of this rank's own variables: see `unpack_owned`.
    """
    columns = owned_columns(bucket, world_size)
    rows = []
    for owner in range(world_size):
        padding = tf.zeros([columns - _shard_columns(bucket, owner, world_size)], tf.as_dtype(bucket.dtype))
        rows.append(tf.concat([*(shards[s.index] for s in bucket.segments_of(owner)), padding], 0))
    return tf.stack(rows)


def unpack_owned(bucket: Bucket, rows: tf.Tensor, rank: int) -> dict[int, tf.Tensor]:
    """The owner's whole variables, flat, put together from every rank's shards."""
    wholes, begin = {}, 0
    for segment in bucket.segments_of(rank):
        width = shard_elements(segment.elements, rows.shape[0])
        wholes[segment.index] = tf.reshape(rows[:, begin : begin + width], [-1])[: segment.elements]
        begin += width
    return wholes


def pack_owned(bucket: Bucket, wholes: Mapping[int, tf.Tensor], rank: int, world_size: int) -> tf.Tensor:
    """Splits the owner's whole variables, given flat, into shards: row `r` holds those of rank `r`."""
    cut = [as_rows(wholes[segment.index], world_size) for segment in bucket.segments_of(rank)]
    columns = owned_columns(bucket, world_size)
    mine = _shard_columns(bucket, rank, world_size)
    return tf.concat([*cut, tf.zeros([world_size, columns - mine], tf.as_dtype(bucket.dtype))], 1)


def unpack_for_owners(bucket: Bucket, rows: tf.Tensor) -> dict[int, tf.Tensor]:
    """One rank's shards of owned variables; row `r` came from their owner `r`."""
    shards, begins = {}, [0] * rows.shape[0]
    for segment in bucket.segments:
        width = shard_elements(segment.elements, rows.shape[0])
        begin = begins[segment.row]
        shards[segment.index] = rows[segment.row, begin : begin + width]
        begins[segment.row] += width
    return shards


def owned_columns(bucket: Bucket, world_size: int) -> int:
    """The most elements that one rank holds in shards of one owner's variables."""
    return max(_shard_columns(bucket, owner, world_size) for owner in range(world_size))


def _shard_columns(bucket: Bucket, owner: int, world_size: int) -> int:
    return sum(shard_elements(segment.elements, world_size) for segment in bucket.segments_of(owner))


def unpack(bucket: Bucket, packed: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> dict[int, tf.Tensor]:
    """The whole tensors of a bucket, keyed by variable index; `shapes` has one shape for each segment."""
    tensors = {}
    for segment, shape in zip(bucket.segments, shapes, strict=True):
        end = segment.offset + segment.width
        if bucket.placement is Placement.WHOLE:
            flat = packed[segment.offset : end]
        elif segment.row is not None:
            flat = packed[segment.row, segment.offset : end]
        else:
            flat = tf.reshape(packed[:, segment.offset : end], [-1])[: segment.elements]
        tensors[segment.index] = tf.reshape(flat, shape)
    return tensors


def _concat(tensors: Sequence[tf.Tensor], axis: int) -> tf.Tensor:
    return tensors[0] if len(tensors) == 1 else tf.concat(tensors, axis)
