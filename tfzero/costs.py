"""What a step costs by formula: bytes that travel and bytes that are held; pure arithmetic, no TensorFlow.

A reduce-scatter and an all-gather send each of N rows to all replicas but its own: (N-1)/N of all elements from each
replica. A ring's all-reduce is one of each (https://arxiv.org/abs/1910.02054, section 7).
"""

from tfzero.wire import BLOCK_ELEMENTS, FORMATS


def item_bytes(compression: str | None) -> float:
    """Bytes on the wire of one float32 element, its part of a scale included."""
    return 4.0 if compression is None else FORMATS[compression].size_bytes(BLOCK_ELEMENTS) / BLOCK_ELEMENTS


def sent_bytes(
    world_size: int, stage: int, compression: str | None = None, reshard_after_forward: bool = True
) -> float:
    """Bytes that a replica sends in a step for each parameter: gradients once, parameters once, at stage 3 twice."""
    passes = 3 if stage == 3 and reshard_after_forward else 2
    return passes * (world_size - 1) / world_size * item_bytes(compression)


def held_bytes(
    world_size: int, stage: int, compression: str | None = None, error_feedback: bool = False, slots: int = 2
) -> float:
    """Bytes that a replica holds between steps for each float32 parameter: parameter, slots, and what is kept."""
    parameter = 4 / world_size if stage == 3 else 4
    slot = 4 if stage == 0 else 4 / world_size
    lag = 4 / world_size if compression and stage in (1, 2) and world_size > 1 else 0
    return parameter + slots * slot + lag + (4 if error_feedback and world_size > 1 else 0)
