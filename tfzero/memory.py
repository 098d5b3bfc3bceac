"""Estimates what a model will take on each replica, before anything of it is allocated.

    python -m tfzero.memory --model train:make_model --world-size 8 --batch-size 64 --budget-gb 16

[Note: the peak] Between steps a replica holds parameters and slots. A step adds activations, gradients and buffers of
the collectives. The trace of a step (`views/liveness.py`) tells how activations come and go while gradients appear one
after the other. The stage decides what becomes of the gradients. With one replica, and up to stage 1, they stay whole
until the backward pass is over. At stage 2 as many stay whole as `training/pacing.py` lets wait; of the rest, shards.
At stage 3 the latest two stay whole, with buffers; of the rest, shards. Meanwhile values of the current layer and the
next ones are gathered (`variables/gathering.py`). Up to stage 2 as many exchanges as there are lanes
(`collectives/counts.py`) have a buffer each. The estimate is the greatest sum.
"""

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfzero.collectives.counts import LANES
from tfzero.collectives.network import DEFAULT_BUCKET_BYTES
from tfzero.host import runtime, versions
from tfzero.optimizer import ZeroOptimizer
from tfzero.plan.placement import Placement, Plan, VariableSpec, make_plan, shard_elements
from tfzero.plan.scheme import STAGES, Scheme, check_stage, scheme_of
from tfzero.plan.settings import DEFAULT_MIN_SHARD_ELEMENTS, check_number
from tfzero.report import text_of
from tfzero.training.pacing import WINDOW_BUCKETS
from tfzero.training.stock_optimizers import chain, chooser, config_of, is_elementwise
from tfzero.variables.gathering import PREFETCH_BYTES
from tfzero.views.liveness import Moment, trace_step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one replica at one stage: of the replica that holds most.

    Args:
        stage: the ZeRO stage.
        world_size: number of replicas.
        parameter_bytes: of the model's variables.
        slot_bytes: of the optimizer's slots, accumulators and averages.
        gradient_bytes: of gradients, at the peak of a step.
        buffer_bytes: of what is sent, received or gathered at the peak, and of values that the update computes.
        activation_bytes: of activations at the peak; None if no batch size was given.
    """

    stage: int
    world_size: int
    parameter_bytes: int
    slot_bytes: int
    gradient_bytes: int
    buffer_bytes: int
    activation_bytes: int | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes held between steps."""
        return self.parameter_bytes + self.slot_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of a step; without activations if no batch size was given."""
        return self.held_bytes + self.gradient_bytes + self.buffer_bytes + (self.activation_bytes or 0)

    def record(self) -> dict:
        """All figures by name."""
        return {**asdict(self), "held_bytes": self.held_bytes, "peak_bytes": self.peak_bytes}


class MemoryEstimates(tuple):
    """One `MemoryEstimate` for each stage. `print` shows a table."""

    def smallest_stage(self, budget_bytes: float) -> MemoryEstimate | None:
        """The estimate of the first stage whose peak fits into a budget for each replica, or None."""
        return next((each for each in self if each.peak_bytes <= budget_bytes), None)

    def __str__(self) -> str:
        titles = ("parameters", "slots", "held", "gradients", "buffers", "activations", "peak")
        lines = ["stage  " + "  ".join(f"{title:>11}" for title in titles)]
        for each in self:
            found = [each.record()[f"{title.removesuffix('s')}_bytes"] for title in titles]
            cells = ("?" if size is None else text_of(size) for size in found)
            lines.append(f"{each.stage:5}  " + "  ".join(f"{cell:>11}" for cell in cells))
        return "\n".join(lines)

    def draw(self, path: str | os.PathLike) -> None:
        """Draws a picture of stacked bars, one for each stage, into a file. Needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(self)))
        names = [f"stage {each.stage}" for each in self]
        begin = [0.0] * len(self)
        for part in ("parameter", "slot", "gradient", "buffer", "activation"):
            widths = [(each.record()[f"{part}_bytes"] or 0) / 1e9 for each in self]
            axes.barh(names, widths, left=begin, label=f"{part}s")
            begin = [left + width for left, width in zip(begin, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(f"GB on each of {self[0].world_size} replicas")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=5, frameon=False)
        figure.savefig(path, bbox_inches="tight")
        pyplot.close(figure)


def estimate_memory(
    model: keras.Model | Callable[[], keras.Model],
    optimizer: str | dict | keras.optimizers.Optimizer = "adam",
    world_size: int = 8,
    stage: int | None = None,
    batch_size: int | None = None,
) -> MemoryEstimate | MemoryEstimates:
    """Estimates the bytes that each replica of a `ZeroStrategy` holds, and takes at the peak of a step.

    Settings other than `stage` are the strategy's defaults. Nothing is trained, and a model that a function makes is
    not allocated. Activations are those of TensorFlow's CPU kernels. What loops keep for the backward pass (LSTM, GRU)
    and the workspace of convolutions are not counted.

    Args:
        model: a Keras model, or a function without arguments that makes one. A compiled one is traced with its loss.
        optimizer: a name, config or Keras optimizer.
        world_size: number of replicas.
        stage: the ZeRO stage; None for all.
        batch_size: the global batch size, as in `fit`; None for an estimate without activations.

    Returns:
        A `MemoryEstimate`, or `MemoryEstimates` with one for each stage.

    Raises:
        ValueError: for invalid settings or a model without variables; with a batch size, also for a model whose inputs
            are not known or that was made under a strategy.

    Example:

    ```python
    estimates = tfzero.estimate_memory(make_model, "adam", world_size=4, batch_size=32)
    print(estimates)
    fitting = estimates.smallest_stage(budget_bytes=16e9)
    ```
    """
    check_number("world_size", world_size, int, 1)
    if stage is not None:
        check_stage(stage)
    if batch_size is not None:
        check_number("batch_size", batch_size, int, 1)
    optimizer = keras.optimizers.get(optimizer)
    optimizer = optimizer.inner_optimizer if isinstance(optimizer, ZeroOptimizer) else optimizer
    # Fresh optimizers, with no variables but steps and learning rate, whatever the given one has been built for.
    makers = {id(each): functools.partial(type(each).from_config, config_of(each)) for each in chain(optimizer)}
    with tf.Graph().as_default():  # variables made in a graph take no memory
        versions.refuse_keras_2(model)
        made = model if isinstance(model, keras.Model) else model()
        _check_model(made, batch_size)
        estimate = _Estimate(made, optimizer, makers, world_size, batch_size)
        estimates = MemoryEstimates(estimate.at(each) for each in (STAGES if stage is None else [stage]))
    return estimates if stage is None else estimates[0]


def _check_model(model: object, batch_size: int | None) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model or a function that makes one. Received: {model!r}")
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no variables yet. Make it of `keras.Input`s, or call its `build` first."
        )
    if batch_size is not None and any(getattr(v.value, "distribute_strategy", None) for v in model.variables):
        raise ValueError(
            f"The model {model.name!r} was made under a strategy. With a batch size pass the function that makes it. "
            "What a ZeroStrategy holds of this one, `strategy.report()` tells."
        )


class _Estimate:
    """Bytes of a model and its optimizer, by stage."""

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        makers: Mapping[int, Callable[[], keras.optimizers.Optimizer]],
        world_size: int,
        batch_size: int | None,
    ) -> None:
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # a loss scale's own variables are small
        self._model = model
        self._world_size = world_size
        self._variables = model.trainable_variables
        self._made_trainable = runtime.made_trainable(model)
        choose = chooser(optimizer)
        self._optimizers = [choose(variable) for variable in self._variables]
        pairs = zip(self._optimizers, self._variables, strict=True)
        self._slots = [_slots_of(makers[id(mine)](), variable) for mine, variable in pairs]
        self._rows = None if batch_size is None else -(-batch_size // world_size)
        self._traces: dict[bool, tuple[Moment, ...]] = {}

    def at(self, stage: int) -> MemoryEstimate:
        scheme = scheme_of(stage)
        specs = [self._spec(v, o, scheme) for v, o in zip(self._variables, self._optimizers, strict=True)]
        plan = make_plan(specs, self._world_size, stage, DEFAULT_BUCKET_BYTES, DEFAULT_MIN_SHARD_ELEMENTS)
        slot_bytes = max(self._slot_bytes(plan, rank, scheme) for rank in range(self._world_size))
        peak = max(_peaks(self._moments(scheme), plan, scheme), key=sum)
        return MemoryEstimate(
            stage,
            self._world_size,
            sum(self._parameter_bytes(variable, scheme) for variable in self._model.variables),
            slot_bytes,
            *peak[1:],
            None if self._rows is None else peak[0],
        )

    def _moments(self, scheme: Scheme) -> tuple[Moment, ...]:
        if self._rows is None:  # one gradient after the other, and nothing else
            order = reversed(range(len(self._variables)))
            return tuple(Moment(0, (), index, is_backward=True) for index in order)
        gathers = scheme.shards_parameters and self._world_size > 1
        if gathers not in self._traces:
            self._traces[gathers] = trace_step(self._model, self._rows, gathers)
        return self._traces[gathers]

    def _spec(self, variable: keras.Variable, optimizer: keras.optimizers.Optimizer, scheme: Scheme) -> VariableSpec:
        return VariableSpec(
            name=variable.path,
            elements=variable.shape.num_elements(),
            dtype=variable.dtype,
            item_bytes=tf.as_dtype(variable.dtype).size,
            elementwise=is_elementwise(optimizer),
            optimizer=self._optimizers.index(optimizer),
            sharded_parameter=self._is_sharded(variable, scheme),
        )

    def _is_sharded(self, variable: keras.Variable, scheme: Scheme) -> bool:
        """Whether stage 3 shards a variable, as `ZeroExtended` decides when the variable is created."""
        is_large = variable.shape.num_elements() >= max(1, DEFAULT_MIN_SHARD_ELEMENTS)
        is_floating = tf.as_dtype(variable.dtype).is_floating
        return scheme.shards_parameters and is_large and is_floating and id(variable) in self._made_trainable

    def _parameter_bytes(self, variable: keras.Variable, scheme: Scheme) -> int:
        elements = variable.shape.num_elements()
        if self._is_sharded(variable, scheme):
            elements = shard_elements(elements, self._world_size)
        return elements * tf.as_dtype(variable.dtype).size

    def _slot_bytes(self, plan: Plan, rank: int, scheme: Scheme) -> int:
        total = 0
        for index, slots in enumerate(self._slots):
            placement, owner = plan.placements[index], plan.owners[index]
            for slot in slots:
                elements = slot.shape.num_elements()
                is_whole = scheme.exchanges_when_accumulated and runtime.is_accumulator_name(slot.name)
                if placement is Placement.SHARDED and not is_whole:
                    elements = shard_elements(elements, self._world_size)
                elif placement is Placement.OWNED and owner != rank:
                    elements = 0
                total += elements * tf.as_dtype(slot.dtype).size
        return total


def _slots_of(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> list:
    """The slots that an optimizer makes for one variable. The optimizer must not have been built."""
    scalars = len(optimizer.variables)  # steps and learning rate
    optimizer.build([keras.Variable("zeros", shape=variable.shape, dtype=variable.dtype, name=variable.name)])
    # All variables share a scalar that stands beside a matrix.
    return [slot for slot in optimizer.variables[scalars:] if slot.shape.rank or not variable.shape.rank]


def _peaks(moments: Sequence[Moment], plan: Plan, scheme: Scheme) -> Iterator[tuple[int, int, int]]:
    """Bytes of activations, gradients and buffers at each moment of a step. [Note: the peak]"""
    size = plan.shards
    sizes = [spec.elements * spec.item_bytes for spec in plan.specs]
    gathered = _gathered(moments, plan) if scheme.shards_parameters and size > 1 else [0] * len(moments)
    in_flight = sum(sorted(map(plan.bucket_bytes, plan.buckets), reverse=True)[:LANES])
    produced, latest = 0, [0]
    for place, moment in enumerate(moments):
        if moment.gradient is not None:
            produced += sizes[moment.gradient]
            latest.append(sizes[moment.gradient])
        yield moment.activation_bytes, *_of_gradients(size, scheme, produced, latest, in_flight, gathered[place])
    gradients, buffers = _of_gradients(size, scheme, produced, latest, in_flight, 0)
    # After the backward pass, updated values wait to be sent and assigned.
    waits = scheme.gathers_updates and (scheme.shards_gradients or size == 1)
    yield 0, gradients, max(buffers, min(produced, _updated_bytes(plan)) // size if waits else 0)


def _of_gradients(
    size: int, scheme: Scheme, produced: int, latest: Sequence[int], in_flight: int, gathered: int
) -> tuple[int, int]:
    """Bytes of gradients and of buffers on one of `size` replicas, when `produced` bytes of gradients are computed."""
    if size == 1:
        return produced, 0
    if scheme.shards_parameters:
        whole = min(produced, sum(latest[-2:]))
        return whole + (produced - whole) // size, gathered + whole + latest[-1]
    whole = produced
    if scheme.shards_gradients:
        whole = min(produced, WINDOW_BUCKETS * DEFAULT_BUCKET_BYTES + max(latest))
    return whole + (produced - whole) // size, min(produced, in_flight)


def _updated_bytes(plan: Plan) -> int:
    """Bytes of the two largest runs of buckets that are updated at once."""
    runs = plan.coalesced(plan.buckets, DEFAULT_BUCKET_BYTES)
    return sum(sorted((sum(map(plan.bucket_bytes, run)) for run in runs), reverse=True)[:2])


def _gathered(moments: Sequence[Moment], plan: Plan) -> list[int]:
    """Bytes of gathered values at each moment: of the layer that is computed, and of prefetched ones."""
    gathered = [0] * len(moments)
    for is_backward in (False, True):
        places = [k for k, moment in enumerate(moments) if moment.is_backward is is_backward]
        reads: dict[int, list[int]] = {}
        sizes: dict[int, int] = {}
        for place in places:
            for index, size in moments[place].reads:
                if plan.specs[index].sharded_parameter:
                    reads.setdefault(index, []).append(place)
                    sizes[index] = max(size, sizes.get(index, 0))
        # The backward pass also holds a value until its variable's gradient is complete.
        completed = {moment.gradient: place for place, moment in enumerate(moments)} if is_backward else {}
        spans = sorted((f[0], max(f[-1], completed.get(index, 0)), sizes[index]) for index, f in reads.items())
        for place in places:
            gathered[place] = sum(size for begin, end, size in spans if begin <= place <= end)
            ahead = 0
            for begin, _, size in spans:
                if begin > place and ahead < PREFETCH_BYTES:
                    ahead += size
            gathered[place] += ahead
    return gathered


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tfzero.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="MODULE:FUNCTION that makes the model")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--stage", type=int, choices=STAGES)
    parser.add_argument("--batch-size", type=int, help="the global one; without it no activations are counted")
    parser.add_argument("--budget-gb", type=float, help="of each replica; tells the smallest stage that fits")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them; needs matplotlib")
    options = parser.parse_args(arguments)
    module, _, function = options.model.partition(":")
    if not function:
        parser.error(f"--model must be MODULE:FUNCTION. Received: {options.model}")
    sys.path.insert(0, os.getcwd())
    make_model = getattr(importlib.import_module(module), function)
    found: Any = estimate_memory(make_model, options.optimizer, options.world_size, options.stage, options.batch_size)
    estimates = MemoryEstimates([found]) if options.stage is not None else found
    print(estimates)
    if options.budget_gb is not None:
        fitting = estimates.smallest_stage(options.budget_gb * 1e9)
        verdict = "no stage fits" if fitting is None else f"stage {fitting.stage} is the smallest that fits"
        print(f"{verdict} into {options.budget_gb:g} GB on each of {options.world_size} replicas")
    if options.json:
        options.json.write_text(json.dumps([each.record() for each in estimates], indent=2))
    if options.picture:
        estimates.draw(options.picture)


if __name__ == "__main__":
    main()
