"""State with a row for each sample of the batch, which stateful recurrent layers carry from batch to batch."""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfzero.host import graphs, runtime
from tfzero.plan import shares
from tfzero.plan.placement import split_rows
from tfzero.rows.dependence import ROWS, mark
from tfzero.rows.replica_run import current_run
from tfzero.variables.classes import ReplicatedVariable


class RowsVariable(ReplicatedVariable):
    """State `[samples of the global batch, ...]`. A replica reads and writes its own rows.

    Every replica holds all rows, and they are equal on all replicas: written rows are gathered. So outside replicas, in
    files and for any number of replicas the state is that of one device.
    """

    def value_here(self) -> tf.Tensor | tf.Variable:
        return super().value_here() if self._replica() is None else self._own_rows()

    def value(self) -> tf.Tensor | tf.Variable:
        return self.value_here()

    def read_value(self) -> tf.Tensor | tf.Variable:
        return self.value_here()

    def as_tensor(self, dtype: tf.DType | None = None, name: str | None = None, as_ref: bool = False) -> tf.Tensor:
        if self._replica() is None:
            return super().as_tensor(dtype, name, as_ref)
        return tf.convert_to_tensor(self._own_rows(), dtype, name=name)

    def _replica(self) -> int | None:
        """The local replica that is running, if there is more than one; else None."""
        return runtime.replica_index() if self.distribute_strategy.extended.mesh.replicas > 1 else None

    def _span(self, part: int) -> tuple[int, int]:
        """The first row of a part of the batch, and the row after its last."""
        extended = self.distribute_strategy.extended
        if extended.shares.is_measured:
            raise ValueError(
                f"{self.name!r} carries a row of state for each sample from batch to batch, so a row cannot move to "
                "another replica, as with `rows='measured'`. Give a share for each replica, or leave `rows` at 'even'."
            )
        if extended.shares.shares is not None:
            return shares.span(self.shape[0], part, extended.shares.shares)
        return split_rows(self.shape[0], extended.mesh.replicas, part)

    def _own_rows(self) -> tf.Tensor:
        replica = self._replica()
        begin, end = self._span(self.distribute_strategy.extended.mesh.part(replica))
        with self._checked(current_run().own_rows(), end - begin):
            begin = min(begin, self.shape[0] - 1)  # [Note: padding row]
            rows = tf.identity(self.values[replica][begin : max(begin + 1, end)])
        if tf.executing_eagerly():
            return rows
        return mark(tf.compat.v1.placeholder_with_default(rows, [None, *rows.shape[1:]]), ROWS)

    def update_in_replica(
        self, update: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        replica = self._replica()
        if replica is None:
            return super().update_in_replica(update, value, **kwargs)
        extended, value = self.distribute_strategy.extended, tf.convert_to_tensor(value, self.dtype)
        spans = [self._span(part) for part in range(extended.mesh.replicas)]
        begin, end = spans[extended.mesh.part(replica)]
        most = max(1, *(end - begin for begin, end in spans))
        rows = max(1, end - begin)  # [Note: padding row]
        with self._checked(tf.shape(value, tf.int64)[0], rows):
            padded = tf.pad(value, [[0, most - rows], *([0, 0] for _ in self.shape[1:])])
        padded = tf.ensure_shape(padded, [most, *self.shape[1:]])
        gathered = extended.replica_collective(extended.group.all_gather, padded)  # [replicas, most, ...]
        by_part = sorted((extended.mesh.part_of_rank(rank), rank) for rank in range(len(spans)))
        rows = [gathered[rank, : spans[part][1] - spans[part][0]] for part, rank in by_part]
        return update(self.values[replica], tf.concat(rows, 0), **kwargs)

    def _checked(self, rows: tf.Tensor | None, expected: int) -> contextlib.AbstractContextManager[object]:
        """A context whose operations wait for a check of the number of rows that a replica has.

        `tf.debugging.assert_equal` would be ordered with the assertions of other replicas, which wait for each other
        elsewhere. A stateless check would not do: Grappler drops an operation that is only waited for.
        """
        if rows is None:
            return tf.control_dependencies([])
        text = (
            f"Every batch must have {self.shape[0]} samples, as a stateful layer has states for so many. "
            f"This replica takes {expected} of them. Rows received:"
        )
        check = tf.raw_ops.Assert(condition=tf.equal(rows, expected), data=[text, rows])
        if check is None:  # eager, and right
            return tf.control_dependencies([])
        graphs.run_freely(check)
        return tf.control_dependencies([check])
