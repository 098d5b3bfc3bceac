"""What a stage of ZeRO means: what lies in shards, and when gradients and parameters are exchanged.

Only this module compares a stage's number. All others ask a `Scheme`, which names what they want to know.
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
    """What a stage does to the state of training.

    Args:
        shards_slots: whether each rank holds and updates its shard of the optimizer's slots.
        shards_gradients: whether a rank keeps only its shard of a gradient once it is exchanged.
        shards_parameters: whether parameters lie in shards between the layers that read them.
        gathers_again: whether the backward pass gathers parameters again that the forward pass has let go.
        held: what lies in shards, in words.
    """

    shards_slots: bool
    shards_gradients: bool
    shards_parameters: bool
    gathers_again: bool
    held: str

    @property
    def reduces_to_all(self) -> bool:
        """Whether sums of gradients go to every rank, which updates all by itself, and not each to its owner."""
        return not self.shards_slots

    @property
    def exchanges_when_accumulated(self) -> bool:
        """Whether gradients are accumulated whole on each replica, and exchanged once when an update is due."""
        return not self.shards_gradients

    @property
    def gathers_updates(self) -> bool:
        """Whether owners send what they have updated to all ranks, which hold parameters whole."""
        return self.shards_slots and not self.shards_parameters

    @property
    def passes(self) -> int:
        """How often all elements travel in a step: gradients once, parameters once, or twice if gathered again."""
        return 2 + self.gathers_again


def scheme_of(stage: int, reshard_after_forward: bool = True) -> Scheme:
    """The scheme of a stage; `reshard_after_forward` has an effect where parameters lie in shards only."""
    return Scheme(
        shards_slots=stage >= 1,
        shards_gradients=stage >= 2,
        shards_parameters=stage >= 3,
        gathers_again=stage >= 3 and reshard_after_forward,
        held=_HELD[int(stage)],
    )


def check_stage(stage: Any) -> None:
    """Raises a ValueError for what is no stage."""
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"`stage` must be one of {STAGES}. Received: stage={stage!r}")
