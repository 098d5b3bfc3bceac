"""What becomes of a replica that gets no rows of a batch.

[Note: padding row] Kernels of cuDNN and oneDNN take no batch without rows, and the mean of no rows is NaN. So a replica
without rows is given one row of padding, a copy of the batch's first, which is as good as a real one. It computes, and
meets the others in their collectives, but nothing of that row counts: what leaves a replica (results, gradients, what
it adds to variables, sums over replicas) is zero, or has no rows, as far as it depends on rows ([Note: kinds]).
Eagerly there is no graph that could tell: there all of it is dropped that is not known to be the same on all replicas.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfzero.host import batch_rows, graphs, runtime
from tfzero.host.batch_rows import own_rows
from tfzero.rows.dependence import COUNT, MIXED, OWN, ROWS, SAME, is_global, mark, mark_global
from tfzero.rows.inputs import rows_of, take_rows
from tfzero.rows.replica_run import current_run

# To choose between two values copies one of them; a branch, which is slower to trace, does not.
_LARGE_BYTES = 2**20


@tf.autograph.experimental.do_not_convert
def counted(value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Within a replica: a value, or what does not depend on rows of it if the replica has none. [Note: padding row]

    Args:
        value: any tensor.
        extended: the strategy's.
    """
    has_rows = extended.has_rows()
    if has_rows is None:
        return value
    if tf.executing_eagerly():
        return value if bool(has_rows) or is_global(value) else _if_any(has_rows, value)
    dependence = extended.dependence()
    kind = dependence.kind(value)
    if kind in (SAME, OWN):
        return value
    if kind != MIXED:
        return mark(_if_any(has_rows, value), kind)
    parts = dependence.split(value).values()
    return tf.add_n([p if (k := dependence.kind(p)) in (SAME, OWN) else mark(_if_any(has_rows, p), k) for p in parts])


@tf.autograph.experimental.do_not_convert
def kept(variable: tf.Variable, value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Within a replica: what of a value counts that it assigns to a variable of its own. [Note: padding row]

    Where the value does not tell, the variable stays as it is.
    """
    has_rows = extended.has_rows()
    if has_rows is None:
        return value
    is_apart = not tf.executing_eagerly() and extended.dependence().kind(value) in (SAME, OWN, MIXED)
    if is_apart and not _is_in_a_loop():
        return counted(value, extended)
    return tf.where(has_rows, value, tf.cast(variable, value.dtype))


@tf.autograph.experimental.do_not_convert
def added(value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Within a replica: what of a value counts that it adds to a variable of its own. [Note: padding row]

    In a loop that may be one over rows, of which there are as many rounds: then also what is the same in each.
    """
    has_rows = extended.has_rows()
    is_of_rows = has_rows is not None and not tf.executing_eagerly() and _is_in_a_loop()
    return _if_any(has_rows, value) if is_of_rows else counted(value, extended)


def _is_in_a_loop() -> bool:
    return graphs.is_in_a_loop(current_run().graph)


def with_own_results(function: Callable) -> Callable:
    """A replica's function, of whose results only that remains which counts. [Note: padding row]"""
    if isinstance(function, tf.types.experimental.PolymorphicFunction):
        # It must stay one: TensorFlow traces all replicas within it, and converts its Python function there.
        return graphs.cloned(function, _of_own_rows)
    if tf.executing_eagerly():
        return _of_own_rows(function)
    return tf.autograph.experimental.do_not_convert(_of_own_rows(graphs.converted(function)))


def _of_own_rows(function: Callable) -> Callable:
    def of_own_rows(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _padded((args, kwargs))
        _exchange_own_rows()
        return _own_results(function(*args, **kwargs))

    return of_own_rows


@tf.autograph.experimental.do_not_convert
def _padded(arguments: Any) -> Any:
    """A replica's arguments, with a row of zeros in each tensor if none that may be of a batch has rows.

    What was cut has its padding already; a user's own data set gives the last replicas empty tensors.
    """
    arguments = tf.nest.map_structure(_of_unknown_rows, arguments)
    tensors = [each for each in tf.nest.flatten(arguments) if isinstance(each, tf.Tensor) and each.shape.rank]
    unpadded = [each for each in tensors if own_rows(each) is None]
    # Beside tensors of an unknown number of rows, those of a known one are no rows.
    unpadded = [each for each in unpadded if each.shape[0] is None] or unpadded
    if not unpadded or any(each.shape[0] for each in unpadded):
        return arguments
    tensors = [each for each in tensors if own_rows(each) is not None or any(each is other for other in unpadded)]
    numbers = [rows_of(each) if (rows := own_rows(each)) is None else rows for each in tensors]
    has_rows = tf.reduce_any(tf.stack(numbers) > 0)
    current_run().found_rows = has_rows

    def padded(leaf: Any) -> Any:
        if not any(leaf is each for each in unpadded):
            return leaf
        shape = tf.concat([[1], tf.shape(leaf)[1:]], 0)
        result = tf.cond(has_rows, lambda: tf.identity(leaf), lambda: tf.zeros(shape, leaf.dtype))
        return mark(tf.ensure_shape(result, [None, *leaf.shape[1:]]), ROWS)

    return tf.nest.map_structure(padded, arguments)


def _of_unknown_rows(leaf: Any) -> Any:
    """A part of a batch as its number of rows is known to depend on the replica. [Note: kinds]"""
    if tf.executing_eagerly() or (rows := own_rows(leaf)) is None:
        return leaf
    result = leaf
    if isinstance(leaf, batch_rows.EagerTensor):  # captured: it would be a constant of the graph
        result = mark(tf.compat.v1.placeholder_with_default(leaf, [None, *leaf.shape[1:]]), ROWS)
    elif isinstance(leaf, tf.RaggedTensor) and leaf.uniform_row_length is None:  # else it counts splits, less one
        count = mark(tf.maximum(rows, 1), COUNT)
        result = tf.RaggedTensor.from_value_rowids(leaf.values, leaf.value_rowids(), count, validate=False)
    result._tfzero_rows = rows
    return result


@tf.autograph.experimental.do_not_convert
def _exchange_own_rows() -> None:
    """Lets the replica's context reduce and gather what counts. Each run of a function has a context of its own.

    Also of a replica that has rows for certain: others may not have, and all must do the same.
    """
    replica = tf.distribute.get_replica_context()
    extended = replica.strategy.extended
    all_reduce = replica.all_reduce

    @tf.autograph.experimental.do_not_convert
    def all_reduce_counted(
        reduce_op: tf.distribute.ReduceOp | str,
        value: Any,
        options: tf.distribute.experimental.CommunicationOptions | None = None,
    ) -> Any:
        value = tf.nest.map_structure(lambda each: counted(tf.convert_to_tensor(each), extended), value)
        return tf.nest.map_structure(mark_global, all_reduce(reduce_op, value, options))

    @tf.autograph.experimental.do_not_convert
    def all_gather(
        value: Any, axis: int, options: tf.distribute.experimental.CommunicationOptions | None = None
    ) -> Any:
        del options
        own = tf.nest.map_structure(lambda each: _own_along(each, axis, extended), value)
        return tf.nest.map_structure(lambda each: mark_global(_gather(each, axis, extended)), own)

    replica.all_reduce, replica.all_gather = all_reduce_counted, all_gather


def _own_along(
    value: tf.types.experimental.TensorLike, axis: int, extended: tf.distribute.StrategyExtended
) -> tf.Tensor:
    """What counts of a replica's value: its own rows, if they lie along an axis along which replicas may differ."""
    value, has_rows = tf.convert_to_tensor(value), extended.has_rows()
    if has_rows is None:
        return value
    may_differ = value.shape[axis] == 1 if tf.executing_eagerly() else value.shape[axis] is None
    return _without_padding(value, axis % value.shape.rank, has_rows) if may_differ else counted(value, extended)


def _gather(value: tf.Tensor, axis: int, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """As `tf.distribute.ReplicaContext.all_gather`, also where replicas cannot be merged."""
    rank = extended.group.rank(runtime.replica_index())

    @tf.custom_gradient
    def gather(own: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        gathered = extended.replica_collective(extended.group.all_gather_ragged, own)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            total = extended.replica_collective(extended.group.all_reduce, counted(upstream, extended))
            sizes = [tf.shape(each)[axis] for each in gathered]
            return tf.ensure_shape(tf.split(total, sizes, axis, num=len(sizes))[rank], own.shape)

        return tf.concat(gathered, axis), gradient

    return gather(value)


@tf.autograph.experimental.do_not_convert
def _own_results(results: Any) -> Any:
    extended = tf.distribute.get_replica_context().strategy.extended
    has_rows = extended.has_rows()
    return results if has_rows is None else tf.nest.map_structure(lambda each: _own(each, has_rows, extended), results)


def _own(result: Any, has_rows: tf.Tensor, extended: tf.distribute.StrategyExtended) -> Any:
    if isinstance(result, tf.Variable | tf.distribute.DistributedValues):
        return result
    if isinstance(result, batch_rows.CompositeTensor) and not isinstance(result, tf.SparseTensor | tf.RaggedTensor):
        return tf.nest.map_structure(lambda each: _own(each, has_rows, extended), result, expand_composites=True)
    if not tf.is_tensor(result) or result.dtype in (tf.resource, tf.variant):
        return result
    if isinstance(result, tf.Tensor) and result.shape.rank is None:
        return _own_of_unknown_rank(result, has_rows, extended)
    axis = _axis_of_rows(result, has_rows, extended)
    if axis is None:
        return counted(result, extended)
    if isinstance(result, tf.SparseTensor | tf.RaggedTensor):
        return take_rows(result, tf.constant(0, tf.int64), tf.where(has_rows, rows_of(result), 0))
    return _without_padding(result, axis, has_rows)


def _own_of_unknown_rank(result: tf.Tensor, has_rows: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """A result that has rows along its first axis, if it has any axis, as far as can be told."""
    if extended.dependence().kind(result) in (SAME, OWN):
        return result
    shape = tf.shape(result)
    empty = tf.concat([tf.zeros_like(shape[:1]), shape[1:]], 0)
    return tf.cond(has_rows, lambda: tf.identity(result), lambda: tf.zeros(empty, result.dtype))


def _without_padding(value: tf.Tensor, axis: int, has_rows: tf.Tensor) -> tf.Tensor:
    """A tensor with rows along an axis, or with none there if the replica has none."""
    size = tf.shape(value, tf.int64)
    others = tf.constant([int(k != axis) for k in range(value.shape.rank)], tf.int64)
    return tf.slice(value, tf.zeros_like(size), tf.where(has_rows, size, size * others))


def _axis_of_rows(
    result: tf.Tensor | tf.SparseTensor | tf.RaggedTensor, has_rows: tf.Tensor, extended: tf.distribute.StrategyExtended
) -> int | None:
    """The axis along which a result has rows, as far as that can be told."""
    if isinstance(result, tf.SparseTensor | tf.RaggedTensor):
        return 0
    if tf.executing_eagerly():
        is_padding = not bool(has_rows) and not is_global(result) and result.shape.rank and result.shape[0] == 1
        return 0 if is_padding else None
    kind = extended.dependence().kind(result)
    if kind in (SAME, OWN) or not result.shape.rank:
        return None
    if kind.name == "rows":
        return kind.axis
    return 0 if result.shape[0] is None else None


def _if_any(has_rows: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """A value, or zeros without rows, to which no gradient leads."""

    def chosen() -> tf.Tensor:
        # Of a tensor of zeros TensorFlow would make a constant, and hold it for ever.
        return tf.where(has_rows, value, tf.zeros([], value.dtype))

    elements = value.shape.num_elements()
    if elements is not None and elements * value.dtype.size >= _LARGE_BYTES:
        return tf.cond(has_rows, lambda: tf.identity(value), chosen)
    return chosen()
