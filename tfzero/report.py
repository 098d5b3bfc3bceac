"""Describes what a strategy does with a model, in words and numbers: `ZeroStrategy.report`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfzero.collectives.group import Group
from tfzero.plan.merging import Merging
from tfzero.plan.mesh import Mesh
from tfzero.plan.placement import Placement
from tfzero.plan.serving import Serving
from tfzero.plan.settings import Choice, Settings
from tfzero.training import traffic
from tfzero.training.walk import Trained
from tfzero.variables.classes import ShardedParameter

_LATE = "updated parameters are gathered while the next step's forward pass goes on, in executions of several steps"
MOST_LINES = 12  # of a summary


@dataclass(frozen=True)
class VariableReport:
    """One trained variable.

    Args:
        name: path of the variable.
        shape: shape of the whole variable.
        placement: "sharded", "whole", or "owned by rank 2".
        reason: reason for the placement.
        wire: format in which its gradient travels: "float32", "int8", ...
        parameter_bytes: bytes of the variable itself on this process's first replica.
        slot_bytes: bytes there of the optimizer's slots, and of what compression keeps.
        whole_bytes: bytes of parameter and slots without sharding.
    """

    name: str
    shape: tuple[int, ...]
    placement: str
    reason: str
    wire: str
    parameter_bytes: int
    slot_bytes: int
    whole_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Bytes that sharding saves here."""
        return self.whole_bytes - self.parameter_bytes - self.slot_bytes


@dataclass(frozen=True)
class Report:
    """What a strategy does. `str(report)` shows everything, `report.summary()` the most important in at most 12 lines.

    Args:
        options: the effect of each setting of the strategy, and the reason if it was left to "auto".
        variables: the trained variables; empty before an optimizer is built.
        sent_bytes: bytes that each replica sends in a step, by formula. For large parameters at stage 3 this assumes
            that a layer with the global dtype policy reads them, and that the backward pass reaches them.
        messages: number of messages that each replica sends in a step.
        batches: number of batches that this worker has taken from data sets so far.
        input_seconds: how long steps have waited for these batches.
        read_bytes: bytes that this process has read since the strategy was made, by `read` and the like (`rchar` of
            /proc/self/io): from disks or their cache, and not only input. None where the system does not tell.
        merge_bytes: bytes that the first replica sends when workers that train apart are merged; `sent_bytes` and
            `messages` count them in parts for each step.
    """

    options: Mapping[str, str]
    variables: tuple[VariableReport, ...]
    sent_bytes: int
    messages: int
    batches: int = 0
    input_seconds: float = 0.0
    read_bytes: int | None = None
    merge_bytes: int = 0

    def summary(self) -> str:
        lines = [f"tfzero: {self.options['stage']}; {self.options['devices']}"]
        if self.variables:
            held = sum(v.parameter_bytes + v.slot_bytes for v in self.variables)
            whole = sum(v.whole_bytes for v in self.variables)
            lines += [
                f"  each replica holds {text_of(held)} of parameters and slots, which are {text_of(whole)} whole",
                f"  {_count(self.variables)}",
                f"  each sends {text_of(self.sent_bytes)} a step, in {self.messages} messages",
            ]
        shown = ("algorithm", "bucket_bytes", "hierarchical", "compression", "error_feedback", "overlap_param_gather",
                 "accumulation", "sync_every", "max_staleness")  # fmt: skip
        effects = {name: self.options[name] for name in shown if self.options.get(name, "off") not in ("off", "none")}
        lines += [f"  {name}: {effect}" for name, effect in effects.items()]
        return "\n".join(lines[:MOST_LINES])

    def __str__(self) -> str:
        lines = [self.summary(), "", "Settings"]
        lines += [f"  {name}: {effect}" for name, effect in self.options.items()]
        if self.batches:
            read = "" if self.read_bytes is None else f"; this process has read {text_of(self.read_bytes)}"
            waited = f"{self.batches} batches, waited for {1000 * self.input_seconds / self.batches:.3g} ms each"
            lines += ["", f"Input: {waited}{read}"]
        if self.variables:
            lines += ["", "Variables: shape, placement, wire, bytes here, bytes saved, reason"]
            width = max(len(v.name) for v in self.variables)
            lines += [
                f"  {v.name:{width}}  {'x'.join(map(str, v.shape)) or 'scalar'}  {v.placement}  {v.wire}  "
                f"{text_of(v.parameter_bytes + v.slot_bytes)}  {text_of(v.saved_bytes)}  {v.reason}"
                for v in self.variables
            ]
        return "\n".join(lines)


def text_of(size_bytes: float) -> str:
    """Formats bytes: 12,345,678 as "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def make_report(settings: Settings, group: Group, levels: Choice, mesh: Mesh, trained: Sequence[Trained]) -> Report:
    """The report on a strategy and on the variables trained by optimizers built under it.

    Args:
        settings: the strategy's settings.
        group: its replicas.
        levels: whether sums are taken in two levels, and why.
        mesh: the positions of its replicas.
        trained: what each optimizer trains.
    """
    sent = [exchange for each in trained for exchange in traffic.sent(settings, group, each)]
    merged = [each.merger.sent() for each in trained if each.merger is not None]
    sent += [each.remote.sent() for each in trained if each.remote is not None]
    every = 1 if settings.merging is None else settings.merging.every
    merge_bytes = sum(size for size, _ in merged)
    return Report(
        options=_effects(settings, group, levels, mesh, trained),
        variables=tuple(_variables(settings, group, trained)),
        sent_bytes=sum(size for size, _ in sent) + round(merge_bytes / every),
        messages=sum(count for _, count in sent) + round(sum(count for _, count in merged) / every),
        merge_bytes=merge_bytes,
    )


# Settings.


def _effects(settings: Settings, group: Group, levels: Choice, mesh: Mesh, trained: Sequence[Trained]) -> dict:
    here, workers = f"{mesh.devices_per_worker} {settings.device_type} devices", mesh.workers
    whole = [name for each in trained for name in _whole_names(each, settings)]
    feedback = "what encoding loses of gradients is kept and added to the next: 4 bytes a parameter"
    effects = {
        "stage": f"stage {settings.stage}, {settings.scheme.held}",
        "devices": f"{mesh.replicas} replicas, {here} in each of {workers}",
        "cluster_resolver": f"this is worker {mesh.worker} of {workers}",
        "algorithm": _algorithm(group),
        "bucket_bytes": _buckets(settings, trained),
        "min_shard_elements": f"{settings.min_shard_elements}; {len(whole)} smaller variables stay whole",
        "timeout_seconds": f"workers wait {settings.timeout_seconds:g} s for each other",
        "reshard_after_forward": _resharding(settings),
        "compression": _compression(settings, group),
        "error_feedback": feedback if settings.error_feedback else "off",
        "hierarchical": f"{'two levels' if levels.value else 'one level'}: {levels.reason}",
        "overlap_param_gather": _LATE if settings.overlap_param_gather else "off",
        **_merging(settings.merging, trained),
        **_serving(settings.serving),
        "compare_batches": f"the first {settings.compare_batches} batches of every pass are compared between workers",
    }
    if settings.compare_batches == 0:
        effects["compare_batches"] = "off: that workers read the same batches is taken on trust"
    if workers == 1:
        effects |= dict.fromkeys(("timeout_seconds", "compare_batches"), "no effect in a single process")
    if settings.serving is not None:
        effects["timeout_seconds"] = f"a worker or server is lost after {settings.timeout_seconds:g} s of silence"
        effects["compare_batches"] = "no effect: workers of servers do not compare batches"
    steps = {s for each in trained for o in each.optimizers if (s := o.gradient_accumulation_steps)}
    if steps and settings.scheme.exchanges_when_accumulated:
        effects["accumulation"] = f"gradients are sent once in {max(steps)} steps; each replica keeps them whole"
    elif steps:
        effects["accumulation"] = f"gradients are sent in each of {max(steps)} steps, to be accumulated in shards"
    return effects


def _merging(merging: Merging | None, trained: Sequence[Trained]) -> dict:
    if merging is None:
        return dict.fromkeys(("sync_every", "outer_optimizer", "sync_warmup"), "off")
    titles = dict.fromkeys(each.merger.title for each in trained if each.merger is not None)
    size_bytes = sum(each.merger.sent()[0] for each in trained if each.merger is not None)
    merged = f" of {text_of(size_bytes)}" if trained else ""
    feedback = "what encoding loses of differences is kept and added to the next: 4 bytes a parameter"
    effects = {
        "sync_every": f"each worker takes {merging.every} steps alone, then a merge{merged}",
        "outer_optimizer": ", ".join(titles) or merging.outer,
        "sync_warmup": f"the first {merging.warmup} steps are synchronous" if merging.warmup else "off",
        "hierarchical": "no effect: gradients do not leave a worker",
    }
    if merging.compression is not None:
        effects["compression"] = (
            f"in merges float32 matrices travel as differences in {merging.compression}; each worker keeps the values "
            "of the latest merge, 4 bytes a parameter"
        )
    return {**effects, "error_feedback": feedback} if merging.error_feedback else effects


def _serving(serving: Serving | None) -> dict[str, str]:
    if serving is None:
        return dict.fromkeys(("max_staleness", "staleness_aware"), "off")
    bounds = {None: "any number of steps", 0: "no step: synchronous", 1: "one step"}
    ahead = bounds.get(serving.max_staleness, f"{serving.max_staleness} steps")
    return {
        "max_staleness": (
            f"{serving.servers} servers hold masters and slots, and update; each of {serving.workers} workers trains "
            f"alone, and may be ahead of the slowest by {ahead}"
        ),
        "staleness_aware": "stale updates have a smaller learning rate" if serving.staleness_aware else "off",
    }


def _resharding(settings: Settings) -> str:
    if not settings.scheme.shards_parameters:
        return "no effect below stage 3"
    if settings.scheme.gathers_again:
        return "parameters are gathered again in the backward pass"
    return "parameters are kept from the forward to the backward pass"


def _algorithm(group: Group) -> str:
    if group.world_size == 1:
        return "one replica exchanges nothing"
    return group.transport.describe(group.is_between)


def _buckets(settings: Settings, trained: Sequence[Trained]) -> str:
    if not trained:
        return f"{settings.bucket_bytes}"
    return "; ".join(
        f"{len(each.plan.buckets)} buckets of up to {choice.value / 2**20:.4g} MiB ({choice.reason})"
        for each in trained
        for choice in [each.bucket_bytes]
    )


def _whole_names(trained: Trained, settings: Settings) -> list[str]:
    pairs = zip(trained.plan.specs, trained.plan.placements, strict=True)
    return [
        s.name for s, placement in pairs if placement is Placement.WHOLE and s.elements < settings.min_shard_elements
    ]


def _compression(settings: Settings, group: Group) -> str:
    if settings.compression is None:
        return "none"
    if not group.exchanges_encoded:
        what = "sums of gradients" if settings.scheme.reduces_to_all else "parameters"
        return (
            f"{what} travel as {settings.compression} where they are float32 matrices; gradients as they are, which "
            f"{group.transport.title} adds on the way"
        )
    parameters = ""
    if settings.scheme.shards_parameters:
        parameters = "; replicas compute with encoded weights"
    elif settings.scheme.gathers_updates:
        parameters = "; parameters travel as differences, and owners keep 4/N bytes a parameter more"
    return f"float32 matrices travel as {settings.compression}, the rest as it is{parameters}"


# Variables.


def _bytes(value: tf.Variable, replica: int | None = 0) -> int:
    """Bytes of a variable on this process's first replica; with None, of the whole variable."""
    component = value if replica is None or not hasattr(value, "values") else value.values[replica]
    return math.prod(component.shape) * tf.as_dtype(value.dtype).size


def _variables(settings: Settings, group: Group, trained: Sequence[Trained]) -> Iterator[VariableReport]:
    exchanges = group.exchanges_encoded
    for each in trained:
        encoded = {s.index for bucket in each.plan.buckets if bucket.compressed for s in bucket.segments}
        for index, variable in enumerate(each.variables):
            owner, placement = each.plan.owners[index], each.plan.placements[index]
            kept = [k.value for part in (each.wire.lags, each.wire.residuals) for i, k in part.items() if i == index]
            slots = [*each.slots[index], *kept]
            is_encoded = index in encoded or (
                isinstance(variable.value, ShardedParameter) and _is_served(each, variable.value)
            )
            yield VariableReport(
                name=variable.path,
                shape=tuple(variable.shape),
                placement=placement.value if owner is None else f"owned by rank {owner}",
                reason=each.plan.reasons[index],
                wire=settings.compression if is_encoded and group.world_size > 1 and exchanges else variable.dtype,
                parameter_bytes=_bytes(variable.value),
                slot_bytes=sum(map(_bytes, slots)) + (0 if each.merger is None else each.merger.held_bytes(index)),
                whole_bytes=_bytes(variable.value, None) + sum(_bytes(slot, None) for slot in each.slots[index]),
            )


def _is_served(trained: Trained, value: tf.Variable) -> bool:
    return trained.wire.codec is not None and trained.wire.codec.serves(value.shape, tf.as_dtype(value.dtype))


def _count(variables: Sequence[VariableReport]) -> str:
    """Counts placements and their reasons: "4 sharded (its optimizer is element-wise), 3 whole (...)"."""
    counts: dict[tuple[str, str], int] = {}
    for variable in variables:
        kind = variable.placement.split(" ")[0]
        reason = (
            variable.reason if kind != "whole" else variable.reason.partition(" elements are ")[2] or variable.reason
        )
        counts[kind, reason] = counts.get((kind, reason), 0) + 1
    return ", ".join(f"{count} {kind} ({reason})" for (kind, reason), count in counts.items())
