"""The kinds of tensors: how a tensor depends on a replica's rows.

[Note: kinds] A replica computes from its rows of the batch what one device computes from all rows. The operations that
made a tensor of the traced step tell how one device's tensor follows from the replicas':

    same   does not depend on rows: every replica has what one device has
    rows   has an axis of rows, in the order of the batch: one device has those of all replicas
    sum    one device has the sum over replicas (a sum over rows; `count` is a number of rows)
    mean   one device has the mean over replicas, weighted by their rows (a mean over rows)
    mixed  a sum of tensors of several kinds; `Dependence.split` takes it apart
    own    what a replica has accumulated by itself, in a variable of its own
    other  none of these, such as a maximum

A tensor not known to be of another kind is `other`. A value of `other` is never silently used as one device's.
"""

from typing import NamedTuple

import tensorflow as tf


class Kind(NamedTuple):
    """How one device's tensor follows from the replicas'. [Note: kinds]

    Args:
        name: a word of the note, or "shape": the shape of a tensor of kind "rows".
        axis: for "rows", the axis of rows; for "shape", the element that counts rows.
    """

    name: str
    axis: int = -1


SAME, SUM, COUNT, MEAN = Kind("same"), Kind("sum"), Kind("count"), Kind("mean")
OWN, MIXED, OTHER = Kind("own"), Kind("mixed"), Kind("other")
ROWS = Kind("rows", 0)


def rows_along(axis: int) -> Kind:
    """The kind of a tensor with rows along this axis."""
    return Kind("rows", axis)


def mark(tensor: tf.Tensor, kind: Kind) -> tf.Tensor:
    """Sets the kind of a tensor whose operations do not tell it."""
    tensor._tfzero_kind = kind
    return tensor


def mark_global(tensor: tf.Tensor) -> tf.Tensor:
    """Notes that a tensor has the same value on all replicas, so that no one needs to reduce it."""
    return mark(tensor, SAME)


def is_global(tensor: object) -> bool:
    """Whether `mark_global` was called on a tensor."""
    return getattr(tensor, "_tfzero_kind", None) == SAME
