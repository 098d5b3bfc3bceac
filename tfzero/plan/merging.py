"""The settings of workers that train apart and are merged from time to time. No TensorFlow.

[Note: local steps] Each worker takes `every` steps alone: its own devices stay synchronous. Then the mean of what the
workers have changed goes through an outer optimizer, as if it were a gradient (DiLoCo,
https://arxiv.org/abs/2311.08105), or is taken as it is (local SGD, https://arxiv.org/abs/1808.07217).
"""

from dataclasses import dataclass
from typing import Any

from tfzero.plan.shares import EVEN, MEASURED

AVERAGE = "average"


@dataclass(frozen=True)
class Merging:
    """How workers that train apart are merged. [Note: local steps]

    Args:
        every: number of steps that each takes alone.
        outer: "average", "DiLoCo" or "given".
        compression: the format in which differences travel; None if they are not encoded.
        error_feedback: whether each worker keeps what this encoding loses, and adds it to its next differences.
        warmup: number of first steps that all take together.
    """

    every: int
    outer: str
    compression: str | None
    error_feedback: bool
    warmup: int = 0


def check_merging(
    sync_every: Any,
    outer_optimizer: Any,
    sync_warmup: Any,
    *,
    compression: str | None = None,
    error_feedback: bool = False,
    rows: Any = EVEN,
    hierarchical: Any = "auto",
) -> Merging | None:
    """The settings of `sync_every`, or None if all workers take every step together.

    Raises:
        ValueError: for invalid settings, and for those that have no effect together.
    """
    if isinstance(sync_warmup, bool) or not isinstance(sync_warmup, int) or sync_warmup < 0:
        raise ValueError(f"`sync_warmup` must be an integer of at least 0. Received: sync_warmup={sync_warmup!r}")
    if sync_every is None:
        if sync_warmup:
            raise ValueError(
                "`sync_warmup` is the number of synchronous steps before workers train apart. Give `sync_every`, or "
                f"leave it away. Received: sync_warmup={sync_warmup}, sync_every=None"
            )
        if outer_optimizer is not None:
            raise ValueError(
                "`outer_optimizer` merges workers that train apart for `sync_every` steps. Give `sync_every`, or leave "
                f"it away. Received: outer_optimizer={outer_optimizer!r}, sync_every=None"
            )
        return None
    if isinstance(sync_every, bool) or not isinstance(sync_every, int) or sync_every < 1:
        raise ValueError(f"`sync_every` must be None or an integer of at least 1. Received: sync_every={sync_every!r}")
    if not (outer_optimizer is None or isinstance(outer_optimizer, str | dict) or callable(outer_optimizer)):
        raise ValueError(
            "`outer_optimizer` must be None, 'average', the name or the config of a Keras optimizer, or a function "
            "that makes one, such as `lambda: keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)`: an optimizer "
            "itself would use TensorFlow before the workers have met. "
            f"Received: outer_optimizer={outer_optimizer!r}"
        )
    if sync_every == 1 and outer_optimizer not in (None, AVERAGE):
        raise ValueError(
            "With `sync_every=1` workers are averaged after each step, so an outer optimizer would be one more beside "
            f"that of the model. Leave it away. Received: outer_optimizer={outer_optimizer!r}, sync_every=1"
        )
    if isinstance(rows, str) and rows == MEASURED:
        raise ValueError(
            "`rows='measured'` lets replicas that share each step end it together, but with `sync_every` workers do "
            "not wait for each other in a step. Leave `rows` away, or give a share for each replica."
        )
    if hierarchical is True:
        raise ValueError(
            "hierarchical=True has no effect with `sync_every`: gradients do not leave a worker. Leave it away."
        )
    if outer_optimizer is None:
        outer = AVERAGE if sync_every == 1 else "DiLoCo"
    else:
        outer = AVERAGE if outer_optimizer == AVERAGE else "given"
    return Merging(sync_every, outer, compression, error_feedback, sync_warmup)
