"""What a stage of ZeRO means: what is sharded, and when gradients and parameters are exchanged.

Only this module compares stage numbers. All others ask a `Scheme`, which has a name for each property.
"""

from dataclasses import dataclass
from typing import Any

STAGES = (0, 1, 2, 3)
_HELD = (
    "everything is whole on every replica",
    "slots lie in shards",
    "slots and gradients lie in shards",
    "slots, gradients and parameters lie in shards",
)


@dataclass(frozen=True)
class Scheme:
    """What a stage shards and exchanges.

    Args:
        shards_slots: whether each rank holds and updates only its shard of the optimizer's slots.
        shards_gradients: whether a rank keeps only its shard of a gradient after the exchange.
        shards_parameters: whether parameters are sharded, and unsharded only for the layers that read them.
        gathers_again: whether the forward pass reshards parameters, so the backward pass gathers them again.
        held: what is sharded, in words.
    """

    shards_slots: bool
    shards_gradients: bool
    shards_parameters: bool
    gathers_again: bool
    held: str

    @property
    def reduces_to_all(self) -> bool:
        """Whether every rank gets all sums of gradients and updates everything; else each sum goes to its owner."""
        return not self.shards_slots

    @property
    def exchanges_when_accumulated(self) -> bool:
        """Whether each replica accumulates whole gradients, and exchanges them once when an update is due."""
        return not self.shards_gradients

    @property
    def gathers_updates(self) -> bool:
        """Whether owners send updated parameters to all ranks, which hold parameters whole."""
        return self.shards_slots and not self.shards_parameters

    @property
    def passes(self) -> int:
        """How often all elements travel in a step.

        Gradients travel once, and parameters once, or twice if they are gathered again. At stage 0 the all-reduce of
        gradients counts as two.
        """
        return 2 + self.gathers_again


def scheme_of(stage: int, reshard_after_forward: bool = True) -> Scheme:
    """The scheme of a stage. `reshard_after_forward` has an effect only if parameters are sharded."""
    return Scheme(
        shards_slots=stage >= 1,
        shards_gradients=stage >= 2,
        shards_parameters=stage >= 3,
        gathers_again=stage >= 3 and reshard_after_forward,
        held=_HELD[int(stage)],
    )


def check_stage(stage: Any) -> None:
    """Raises ValueError unless `stage` is a stage of ZeRO."""
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"`stage` must be one of {STAGES}. Received: stage={stage!r}")
