"""TensorFlow's rings: between CPUs, and between GPUs that are logical parts of one card.

The raw operations are TensorFlow's (`tensorflow/core/ops/collective_ops.cc`). A hint selects the implementation.
TensorFlow compares it in lower case and takes everything but "nccl" for a ring.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.transport import Call, Transport
from tfzero.collectives.ways import Place

# Attributes of operations that sum.
_ADDED = {"merge_op": "Add", "final_op": "Id"}


class TensorFlows(Transport):
    """TensorFlow's own collectives, implemented as `hint` says."""

    hint = ""

    def all_reduce(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Sum of all members' values."""
        return self._run(tf.raw_ops.CollectiveReduceV2, value, call, **_ADDED)

    def all_to_all(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Sends row `r` to rank `r`: `[members, n]` to the same shape."""
        return self._run(tf.raw_ops.CollectiveAllToAllV2, rows, call)

    def all_gather(self, row: tf.Tensor, call: Call) -> tf.Tensor:
        """The members' values, concatenated along the first axis."""
        return self._run(tf.raw_ops.CollectiveGatherV2, row, call)

    def broadcast(self, value: tf.Tensor, call: Call) -> tf.Tensor:
        """Rank 0's value. Takes no token: its key tells it from others, and between processes counts order it."""
        attributes = {
            "group_size": call.members,
            "group_key": call.group_key,
            "instance_key": call.instance_key,
            "communication_hint": self.hint,
        }
        if call.rank == 0:
            return tf.raw_ops.CollectiveBcastSendV2(input=value, **attributes)
        return tf.raw_ops.CollectiveBcastRecvV2(T=value.dtype, shape=value.shape, **attributes)

    def _summed_row(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """TensorFlow's reduce-scatter."""
        return self._run(tf.raw_ops.CollectiveReduceScatterV2, rows, call, **_ADDED)

    def _run(self, operation: Callable, value: tf.Tensor, call: Call, **attributes: Any) -> tf.Tensor:
        return operation(
            input=value,
            group_size=call.members,
            group_key=call.group_key,
            instance_key=call.instance_key,
            ordering_token=[call.token.handle],
            communication_hint=self.hint,
            **attributes,
        )


class Rings(TensorFlows):
    """Rings. An all-to-all and a sum replace the reduce-scatter that they lack. [Note: ways]"""

    name = hint = "ring"
    title = "a ring"

    def obstacle_of_levels(self, device_type: str) -> str:
        """Parts of a GPU have one level."""
        return "two levels are chosen between CPUs only" if device_type == "GPU" else ""

    def describe(self, is_between: bool) -> str:
        """How rings reduce-scatter, and how they take small sums."""
        between = "; sums of up to 64 KiB are gathered and added" if is_between else ""
        return f"rings; reduce-scatter is an all-to-all and a sum, as TensorFlow has none on CPU{between}"

    def of_tensorflow(self, primitive: str, place: Place) -> Transport | None:
        """Itself, except for primitives that rings lack, and for those avoided among the crowded. [Note: ways]"""
        known = [ways.ALL_REDUCE, ways.ALL_GATHER, *([] if place.transport == ways.CROWDED else [ways.ALL_TO_ALL])]
        return self if primitive in known else None
