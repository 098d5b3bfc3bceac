"""Clips gradients that lie in shards as Keras clips whole ones: by the true norm."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfzero.plan.placement import Bucket, Placement


class Clipper:
    """Clips the gradients of one optimizer in one step of one replica.

    Args:
        trained: what is trained (`training/walk.py`).
        replica: the local replica.
        optimizer: the inner optimizer.
        gradients: those of this step, by variable index.
    """

    def __init__(self, trained: Any, replica: int, optimizer: keras.optimizers.Optimizer,
                 gradients: Mapping[int, tf.Tensor]) -> None:  # fmt: skip
        self._trained, self._replica, self._optimizer, self._gradients = trained, replica, optimizer, gradients
        self._rank = trained.group.rank(replica)

    def of(self, rows: Mapping[Bucket, tf.Tensor]) -> Callable[[tf.Tensor, int], tf.Tensor]:
        """A function of a gradient's shard and its variable's index that clips as Keras does.

        Args:
            rows: what this replica updates of each bucket. Servers clip values by themselves.
        """
        optimizer = self._optimizer
        by_norm = any(limit and limit > 0 for limit in (optimizer.clipnorm, optimizer.global_clipnorm))
        if by_norm or self._trained.squared_norms:
            squares = self._squared_norms(rows)
            self._note_norm(squares)
        if optimizer.clipnorm and optimizer.clipnorm > 0:
            norms = tf.sqrt(squares)
            places = {index: place for place, index in enumerate(self._indices(rows))}
            scales = optimizer.clipnorm / tf.maximum(norms, optimizer.clipnorm)
            return lambda shard, index: shard * tf.cast(scales[places[index]], shard.dtype)
        if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
            limit = optimizer.global_clipnorm
            norm = tf.sqrt(tf.reduce_sum(squares))
            # As in keras/src/optimizers/base_optimizer.py: a norm that is not finite makes everything NaN.
            scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
            return lambda shard, index: shard * tf.cast(scale, shard.dtype)
        if optimizer.clipvalue and optimizer.clipvalue > 0 and self._trained.remote is None:
            return lambda shard, index: tf.clip_by_value(shard, -optimizer.clipvalue, optimizer.clipvalue)
        return lambda shard, index: shard

    def _note_norm(self, squares: tf.Tensor) -> None:
        if self._trained.squared_norms:
            noted = self._trained.squared_norms[self._trained.optimizers.index(self._optimizer)]
            noted.value.values[self._replica].assign(tf.reduce_sum(squares))

    def _squared_norms(self, rows: Mapping[Bucket, tf.Tensor]) -> tf.Tensor:
        """`[variables]`: the sum of squares of each variable over all ranks; whole variables count on rank 0 only."""
        indices = self._indices(rows)
        squares = {index: tf.zeros([], tf.float32) for index in indices}
        for bucket, row in rows.items():
            if bucket.placement is Placement.WHOLE and self._rank != 0:
                continue
            for segment in bucket.segments_of(self._rank):
                shard = tf.cast(row[segment.offset : segment.offset + segment.width], tf.float32)
                squares[segment.index] = tf.reduce_sum(tf.square(shard))
        return self._trained.group.all_reduce(tf.stack([squares[index] for index in indices]), self._replica)

    def _indices(self, buckets: Iterable[Bucket]) -> list[int]:
        return [s.index for bucket in buckets for s in bucket.segments if s.index in self._gradients]
