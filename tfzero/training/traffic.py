"""Bytes and messages that a replica sends in a step, by formula."""

from collections.abc import Iterator

import keras
import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.group import Group
from tfzero.collectives.packing import owned_columns
from tfzero.plan.placement import Bucket, Placement, shard_elements
from tfzero.plan.settings import Settings
from tfzero.training.walk import Trained


def sent(settings: Settings, group: Group, trained: Trained) -> Iterator[tuple[int, int]]:
    """Bytes and messages that a replica sends in a step, exchange by exchange, for one optimizer's variables."""
    if group.world_size == 1:
        return
    for bucket in trained.plan.buckets:
        if bucket.sharded_parameters:
            yield from _sent_of_shards(settings, group, trained, bucket)
        elif bucket.placement is Placement.WHOLE and not bucket.compressed:
            yield _all_reduce(group, bucket.row_elements * tf.as_dtype(bucket.dtype).size)
        else:
            width = bucket.row_elements
            if bucket.placement is Placement.WHOLE:
                width = shard_elements(width, trained.plan.shards)
            dtype = tf.as_dtype(bucket.dtype)
            sent = trained.wire.codec.format.size_bytes(width) if bucket.compressed else width * dtype.size
            yield _reduce_scatter(group, width, dtype, sent)
            yield _to_all(group, sent)


def _sent_of_shards(settings: Settings, group: Group, trained: Trained, bucket: Bucket) -> Iterator[tuple[int, int]]:
    """Stage 3: layers gather forward and backward and reduce their gradients; owners collect and send back."""
    computed_in = tf.as_dtype(keras.config.dtype_policy().compute_dtype)
    for segment in bucket.segments:
        value = trained.variables[segment.index].value
        dtype = computed_in if computed_in.size < tf.as_dtype(value.dtype).size else tf.as_dtype(value.dtype)
        width = shard_elements(segment.elements, trained.plan.shards)
        codec = trained.wire.codec
        is_encoded = codec is not None and codec.serves(value.shape, dtype)
        sent = codec.format.size_bytes(width) if is_encoded else width * dtype.size
        for _ in range(2 if settings.scheme.gathers_again else 1):
            yield _to_all(group, sent)
        yield _reduce_scatter(group, width, tf.float32 if is_encoded else dtype, sent)
    if bucket.placement is Placement.OWNED:
        columns = owned_columns(bucket, trained.plan.shards)
        for _ in range(3):  # gradients and parameters to their owners, parameters back
            yield _exchange(group, columns, tf.as_dtype(bucket.dtype))


def _to_all(group: Group, row_bytes: int) -> tuple[int, int]:
    others = group.world_size - 1
    return others * row_bytes, others


def _exchange(group: Group, row_elements: int, dtype: tf.DType) -> tuple[int, int]:
    """An all-to-all of rows of so many elements; it may have to gather all rows. [Note: ways]"""
    is_gathered = group.way(ways.ALL_TO_ALL, dtype).operation == ways.ALL_GATHER
    return _to_all(group, row_elements * dtype.size * (group.world_size if is_gathered else 1))


def _reduce_scatter(group: Group, row_elements: int, dtype: tf.DType, sent_bytes: int) -> tuple[int, int]:
    """A reduce-scatter of rows of so many elements; `sent_bytes` is the size of a row on the wire, encoded or not."""
    carried = group.across.way(ways.REDUCE_SCATTER, dtype)
    plain_bytes = row_elements * (tf.as_dtype(carried.dtype).size if carried.dtype else dtype.size)
    sent_bytes = sent_bytes if group.exchanges_encoded else plain_bytes
    if group.within is None:
        return _to_all(group, sent_bytes)
    here, workers = group.within.world_size, group.across.world_size
    return (here - 1) * workers * plain_bytes + (workers - 1) * sent_bytes, here - 1 + workers - 1


def _all_reduce(group: Group, size_bytes: int) -> tuple[int, int]:
    if group.sums_by_gathering(size_bytes):
        return _to_all(group, size_bytes)
    others = group.world_size - 1
    return 2 * others * -(-size_bytes // group.world_size), 2 * others
