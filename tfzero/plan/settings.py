"""The settings of a ZeroStrategy, which are the same on all workers, and their checks. No TensorFlow."""

import math
from dataclasses import dataclass
from typing import Any

from tfzero.plan.formats import FORMATS
from tfzero.plan.merging import Merging
from tfzero.plan.scheme import Scheme, check_stage, scheme_of
from tfzero.plan.serving import Serving
from tfzero.plan.shares import EVEN

DEFAULT_MIN_SHARD_ELEMENTS = 1024
DEFAULT_COMPARE_BATCHES = 2


@dataclass(frozen=True)
class Settings:
    """The settings that all workers must agree on. See `ZeroStrategy`."""

    stage: int
    bucket_bytes: int | str
    min_shard_elements: int
    timeout_seconds: float
    devices_per_worker: int
    device_type: str
    reshard_after_forward: bool = True
    compression: str | None = None
    error_feedback: bool = False
    hierarchical: bool | str = "auto"
    overlap_param_gather: bool = False
    compare_batches: int = DEFAULT_COMPARE_BATCHES
    rows: str | tuple[float, ...] = EVEN
    merging: Merging | None = None
    serving: Serving | None = None

    @property
    def scheme(self) -> Scheme:
        """What `stage` means with these settings."""
        return scheme_of(self.stage, self.reshard_after_forward)


@dataclass(frozen=True)
class Choice:
    """The value chosen for a setting that the user may leave to tfzero, and why."""

    value: int | bool
    reason: str


def check_given(stage: Any, bucket_bytes: Any, min_shard_elements: Any, timeout_seconds: Any,
                reshard_after_forward: Any, compression: Any, error_feedback: Any, overlap_param_gather: Any,
                compare_batches: Any) -> None:  # fmt: skip
    """Raises ValueError for a setting of `ZeroStrategy` that is invalid or has no effect."""
    check_stage(stage)
    check_bucket_bytes(bucket_bytes)
    check_number("min_shard_elements", min_shard_elements, int, 0)
    check_number("timeout_seconds", timeout_seconds, (int, float), 1)
    check_reshard(reshard_after_forward, stage)
    check_compression(compression, error_feedback)
    check_overlap(overlap_param_gather, stage)
    check_number("compare_batches", compare_batches, int, 0)


def check_number(name: str, value: Any, kinds: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        kind = "an integer" if kinds is int else "a number"
        raise ValueError(f"`{name}` must be {kind} of at least {least}. Received: {name}={value!r}")


def check_bucket_bytes(bucket_bytes: Any) -> None:
    if isinstance(bucket_bytes, str) and bucket_bytes == "auto":
        return
    if isinstance(bucket_bytes, str):
        raise ValueError(
            f"`bucket_bytes` must be 'auto' or an integer of at least 1. Received: bucket_bytes={bucket_bytes!r}"
        )
    check_number("bucket_bytes", bucket_bytes, int, 1)


def choose_levels(settings: Settings, workers: int, why_one: str = "") -> Choice:
    """Chooses whether gradients are summed within each worker first. [Note: two levels] in `collectives/group.py`

    Args:
        settings: of the strategy.
        workers: number of workers.
        why_one: why the transport prefers one level, if the choice is left to it; "" if it has no preference.

    Raises:
        ValueError: if `hierarchical` is invalid, or asks for two levels that are impossible or have no effect.
    """
    asked, devices = settings.hierarchical, settings.devices_per_worker
    if not isinstance(asked, bool) and asked != "auto":
        raise ValueError(f"`hierarchical` must be 'auto', True or False. Received: hierarchical={asked!r}")
    obstacle = None
    if workers == 1 or devices == 1:
        obstacle = f"{workers} workers of {devices} replicas are one level"
    elif settings.scheme.reduces_to_all and settings.compression is None:
        obstacle = f"stage {settings.stage} all-reduces in a ring, which crosses the network once"
    elif settings.error_feedback:
        obstacle = "error_feedback keeps what each replica's own encoding lost, before any sum"
    if asked is True and obstacle is not None:
        raise ValueError(f"hierarchical=True has no effect: {obstacle}. Leave `hierarchical` away.")
    if isinstance(asked, bool):
        return Choice(asked, f"hierarchical={asked}")
    obstacle = obstacle or why_one
    if obstacle:
        return Choice(False, obstacle)
    return Choice(True, f"gradients cross the network once for {devices} replicas")


def check_reshard(reshard_after_forward: Any, stage: int) -> None:
    has_effect = scheme_of(stage).shards_parameters
    if reshard_after_forward not in (None, True, False) or (reshard_after_forward is not None and not has_effect):
        raise ValueError(
            "`reshard_after_forward` must be True or False, and has an effect at stage 3 only. "
            f"Received: reshard_after_forward={reshard_after_forward!r}, stage={stage}"
        )


def check_overlap(overlap_param_gather: Any, stage: int) -> None:
    has_effect = scheme_of(stage).gathers_updates
    if overlap_param_gather not in (True, False) or (overlap_param_gather and not has_effect):
        raise ValueError(
            "`overlap_param_gather` must be True or False, and has an effect at stages 1 and 2 only. "
            f"Received: overlap_param_gather={overlap_param_gather!r}, stage={stage}"
        )


def check_compression(compression: Any, error_feedback: Any) -> None:
    if compression is not None and compression not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"`compression` must be None or one of {known}. Received: compression={compression!r}")
    if error_feedback not in (True, False) or (error_feedback and compression != "int8"):
        raise ValueError(
            "`error_feedback` must be True or False, and has an effect with compression='int8' only. "
            f"Received: error_feedback={error_feedback!r}, compression={compression!r}"
        )
