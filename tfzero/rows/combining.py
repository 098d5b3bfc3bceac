"""Combines a variable's updates when every replica computes them from its own rows of the batch.

[Note: layer state] A layer's state must be equal on all replicas, and equal to the state that one device computes. The
value that a replica assigns is split into parts ([Note: kinds]). A part that does not depend on the replica's rows
counts once, sums over rows are summed over replicas, and means over rows are averaged, weighted by the replicas' rows.
If the variable declares an aggregation (`aggregation="sum"` or "mean"), it applies to every part that depends on rows.
If it declares none and the graph does not reveal the kind, floats are averaged, with a warning, and other dtypes are
refused.

Eagerly there is no graph to look at: floats are averaged with a warning, unless a sum is declared, and other dtypes
must be equal.
"""

import warnings

import tensorflow as tf

from tfzero.host import graphs, runtime
from tfzero.rows.apart import ADDED, AVERAGED, EQUAL, TOTAL
from tfzero.rows.dependence import MEAN, OTHER, OWN, ROWS, SAME, SUM, Dependence
from tfzero.rows.padding import counted
from tfzero.rows.replica_run import current_run

_DECLARE = 'Declare how replicas combine: `self.add_weight(..., aggregation="sum")` for what adds up over samples'
_OR_MEAN = _DECLARE + ', `aggregation="mean"` for averages.'


def combined(
    variable: tf.Variable, value: tf.Tensor, extended: tf.distribute.StrategyExtended
) -> tuple[tf.Tensor, bool]:
    """Within a replica: what to assign to `variable` on all replicas, given this replica's value. [Note: layer state]

    Args:
        variable: a distributed variable, or its sharded parameter.
        value: what this replica assigns or adds, computed from its rows, in the variable's shape and dtype.
        extended: the strategy's `extended`.

    Returns:
        That value, and whether it depends on rows of the batch.

    Raises:
        ValueError: naming the variable, if replicas cannot agree on a value.
    """
    if extended.group.world_size == 1 and not extended.apart.is_on:
        return value, True
    if tf.executing_eagerly():
        return _combined_eagerly(variable, value, extended), value.dtype.is_floating
    dependence: Dependence = extended.dependence()
    dependence.note_update(variable.name)
    parts = dependence.split(value)
    same = parts.pop(SAME.name, None)
    if OWN.name in parts:
        own = parts.pop(OWN.name)
        parts[OTHER.name] = own + parts[OTHER.name] if OTHER.name in parts else own
    if not parts:
        if value.dtype.is_floating:  # as weights that workers train apart
            extended.apart.note(variable, AVERAGED)
        return value, False
    _check(variable, value.dtype, parts)
    if extended.apart.is_on:
        extended.apart.note(variable, _way_to_merge(variable, same, parts))
    if variable.aggregation == tf.VariableAggregation.SUM:
        parts = {SUM.name: tf.add_n(list(parts.values()))}
    elif variable.aggregation == tf.VariableAggregation.MEAN:
        parts = {MEAN.name: tf.add_n(list(parts.values()))}
    elif OTHER.name in parts:
        warnings.warn(_undecided(variable), stacklevel=2)
        parts = {MEAN.name: tf.add_n(list(parts.values()))}
    totals = [] if same is None else [same]
    if SUM.name in parts:
        totals.append(summed(counted(parts[SUM.name], extended), extended))
    if MEAN.name in parts:
        totals.append(extended.average(parts[MEAN.name]))
    return tf.reshape(tf.add_n(totals), tf.shape(value)), True


def _way_to_merge(variable: tf.Variable, same: tf.Tensor | None, parts: dict[str, tf.Tensor]) -> str:
    """How workers that train apart merge a variable to which `same` and these parts, which depend on rows, add up."""
    if variable.aggregation != tf.VariableAggregation.SUM and set(parts) != {SUM.name}:
        return AVERAGED
    is_sum = same is None or graphs.is_read_of(same, variable.own_component)
    if not is_sum and not variable.dtype.is_floating:
        raise ValueError(
            f"The variable {variable.name!r} of dtype {variable.dtype.name} is assigned a sum over rows beside what is "
            "not its former value. Workers that train apart cannot merge it: make it a float, or leave `sync_every` "
            "away."
        )
    if same is None:
        return ADDED if getattr(variable, "is_adding", False) else TOTAL
    if is_sum:
        return ADDED
    warnings.warn(
        f"The variable {variable.name!r} is assigned a sum over rows beside what is not its former value. Workers that "
        "train apart take the mean of their values, where one device would have a sum over all rows.",
        stacklevel=2,
    )
    return AVERAGED


def summed(value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Sum over replicas; 16-bit floats are added in float32."""
    is_narrow = value.dtype in (tf.float16, tf.bfloat16)
    wide = tf.cast(value, tf.float32) if is_narrow else value
    return tf.cast(extended.replica_collective(extended.group.all_reduce, wide), value.dtype)


def _check(variable: tf.Variable, dtype: tf.DType, parts: dict[str, tf.Tensor]) -> None:
    """Refuses updates that cannot be combined; `parts` depend on the replica's rows."""
    run = current_run()
    if run is not None and graphs.is_in_a_loop(run.graph):
        raise ValueError(
            f"The variable {variable.name!r} is updated in a loop (`tf.while_loop`, `tf.scan`) by what depends on the "
            "replica's rows of the batch, which replicas cannot exchange there. Carry it through the loop, and update "
            "it once, after the loop."
        )
    if ROWS.name in parts:
        raise ValueError(
            f"The variable {variable.name!r} of shape {tuple(variable.shape)} is assigned a value with a row for each "
            "sample, of which a replica has only its own. Keep state per sample outside the model, or train on one "
            "device."
        )
    if dtype.is_floating:
        return
    declared = variable.aggregation == tf.VariableAggregation.SUM
    if not (dtype.is_integer or dtype.is_complex) or not (declared or set(parts) == {SUM.name}):
        raise ValueError(
            f"The variable {variable.name!r} of dtype {dtype.name} is assigned a value that depends on the replica's "
            f"rows of the batch and is not seen to be a sum over them, so replicas would differ. {_DECLARE}, or make "
            "it a float."
        )


def _undecided(variable: tf.Variable) -> str:
    return (
        f"The variable {variable.name!r} is assigned a value that depends on the replica's rows of the batch, and is "
        "seen to be neither a sum nor a mean over them. Replicas take the mean of their values, which need not be what "
        f"one device has. {_OR_MEAN}"
    )


def _combined_eagerly(variable: tf.Variable, value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    if variable.aggregation == tf.VariableAggregation.SUM:
        extended.apart.note(variable, ADDED)  # as only changes come here
        return summed(counted(value, extended), extended)
    extended.apart.note(variable, AVERAGED if value.dtype.is_floating else EQUAL)
    if value.dtype.is_floating:
        if variable.aggregation == tf.VariableAggregation.NONE:
            warnings.warn(
                f"Eagerly it cannot be seen whether what is assigned to {variable.name!r} adds up over the samples: "
                f"replicas take the mean of their values. {_OR_MEAN} Without `run_eagerly=True` the graph tells.",
                stacklevel=2,
            )
        return extended.average(value)
    if value.dtype == tf.string:
        return value
    together = extended.replica_collective(extended.group.all_gather, tf.reshape(value, [-1]))
    if not bool(tf.reduce_all(together == together[:1])):
        raise ValueError(
            f"The variable {variable.name!r} of dtype {value.dtype.name} is assigned different values on the replicas, "
            f"{together.numpy().tolist()[:4]}. {_DECLARE}, or make it a float."
        )
    return value


def is_eager_sum(variable: tf.Variable) -> bool:
    """Whether replicas sum their additions to a variable without a graph that could be taken apart."""
    return (
        variable.aggregation == tf.VariableAggregation.SUM
        and tf.executing_eagerly()
        and runtime.replica_index() is not None
    )
