"""Keeps gradients from piling up at stage 2.

[Note: pacing] The backward pass is often faster than the network. Then all gradients wait whole in memory for their
turn on the wire, as at stage 1. So the operation that computes a large gradient waits until enough of the earlier
gradients have been reduced. The chain of activations' gradients continues meanwhile: only work that the wire could not
take yet is delayed.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfzero.host.edges import Edges

# Full buckets whose gradients may wait whole, beside those of the bucket being reduced.
WINDOW_BUCKETS = 2
# Operations that pass a gradient on in the same memory, or rescale it. The operation that computes it is before them.
_PASSING_ON = {"Reshape", "Identity", "IdentityN", "Squeeze", "ExpandDims", "Cast", "RealDiv", "Mul", "StopGradient"}


class Pacer:
    """Bounds the bytes of gradients that are whole at once.

    Args:
        window_bytes: bytes of gradients that may wait beside those of the bucket being reduced.
    """

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._reduced: list[tuple[tf.Operation, int]] = []  # each with the bytes reduced so far, including its own
        self._bytes = 0
        self._leader = 0  # the first of `_reduced` that no gradient waits for yet

    def add(self, reduced: tf.Tensor, gradients: Sequence[tf.Tensor], size_bytes: int) -> None:
        """Notes a bucket's reduced tensor, and makes the computation of its gradients wait for earlier buckets."""
        while self._leader < len(self._reduced) and (
            self._bytes - self._reduced[self._leader][1] >= self._window_bytes
        ):
            self._leader += 1
        if self._leader:
            awaited = self._reduced[self._leader - 1][0]
            for gradient in gradients:
                origin = _origin(gradient)
                if origin.graph is awaited.graph:
                    Edges.of(origin.graph).run_after(origin, awaited)
        self._bytes += size_bytes
        self._reduced.append((reduced.op, self._bytes))


def _origin(gradient: tf.Tensor) -> tf.Operation:
    """The operation that computes a gradient, before operations that only pass it on."""
    while gradient.op.type in _PASSING_ON and len(gradient.op.inputs):
        gradient = gradient.op.inputs[gradient.value_index if gradient.op.type == "IdentityN" else 0]
    return gradient.op
