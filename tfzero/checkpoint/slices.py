"""Shards as rectangles: how a flat range of a variable's elements lies in its shape.

TensorFlow's checkpoints hold rectangular slices of tensors, and the shape of each whole tensor. So a checkpoint that
was written in shards can be read as whole variables or in other shards.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rectangle:
    """A slice of a variable of `shape`: in each dimension `sizes` elements, from `starts` on."""

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Rectangle":
        """All of a variable."""
        return cls(shape, (0,) * len(shape), shape)

    def of(self, copies: int, copy: int) -> "Rectangle":
        """The same slice of one of several copies that are stored one after the other."""
        return Rectangle((copies, *self.shape), (copy, *self.starts), (1, *self.sizes))

    @property
    def spec(self) -> str:
        """The `shape_and_slices` argument of `SaveV2` and `RestoreV2`; "" for the whole variable."""
        if self.sizes == self.shape:
            return ""
        slices = [f"{start},{size}" for start, size in zip(self.starts, self.sizes, strict=True)]
        return f"{' '.join(map(str, self.shape))} {':'.join(slices)}"


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> list[Rectangle]:
    """The rectangles that make up the flat elements from `begin` to `end`, in order.

    There are at most 2 * dimensions - 1, and one for a scalar.
    """
    if begin >= end:
        return []
    if not shape:
        return [Rectangle((), (), ())]
    inner = math.prod(shape[1:])
    (first, offset), (last, rest) = divmod(begin, inner), divmod(end, inner)

    def in_row(row: int, begin: int, end: int) -> list[Rectangle]:
        within = rectangles(shape[1:], begin, end)
        return [Rectangle(shape, (row, *each.starts), (1, *each.sizes)) for each in within]

    if first == last:
        return in_row(first, offset, rest)
    found = in_row(first, offset, inner) if offset else []
    first += bool(offset)
    if first < last:
        found.append(Rectangle(shape, (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return found + in_row(last, 0, rest)
