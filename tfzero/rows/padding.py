"""Handles replicas that get no rows of a batch.

[Note: padding row] Kernels of cuDNN and oneDNN take no batch without rows, and the mean of no rows is NaN. So a replica
without rows gets one row of padding: a copy of the batch's first row, which is as good as a real one (zeros, if tfzero
did not cut the batch). The replica computes and joins the others in their collectives, but nothing of that row counts.
Whatever leaves the replica (results, gradients, additions to variables, sums over replicas) is zero or has no rows, as
far as it depends on rows ([Note: kinds]). Eagerly there is no graph to look at: everything not known to be the same on
all replicas is dropped.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfzero.host import batch_rows, graphs, runtime
from tfzero.host.batch_rows import own_rows
from tfzero.rows.dependence import COUNT, MIXED, OWN, ROWS, SAME, is_global, mark, mark_global
from tfzero.rows.inputs import rows_of, take_rows
from tfzero.rows.replica_run import current_graph, current_run

# Choosing between two values copies one of them. A branch does not, but is slower to trace.
_LARGE_BYTES = 2**20


@tf.autograph.experimental.do_not_convert
def counted(value: tf.Tensor, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Within a replica: the part of a value that counts. [Note: padding row]

    A replica without rows keeps only the part that does not depend on rows; others keep the whole value.

    Args:
        value: any tensor.
        extended: the strategy's `extended`.
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
    """Within a replica: the part that counts of a value that it assigns to a variable of its own. [Note: padding row]

    A replica without rows keeps what does not depend on rows. If that is unknown, the variable stays as it is.
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
    """Within a replica: the part that counts of a value that it adds to a variable of its own. [Note: padding row]

    A loop may have one round for each row. So in a loop even what is the same in each round counts only if there are
    rows.
    """
    has_rows = extended.has_rows()
    is_of_rows = has_rows is not None and not tf.executing_eagerly() and _is_in_a_loop()
    return _if_any(has_rows, value) if is_of_rows else counted(value, extended)


@tf.autograph.experimental.do_not_convert
def updated(
    update: Callable[[], Any], component: tf.Variable, depends: bool, extended: tf.distribute.StrategyExtended
) -> Any:
    """Within a replica: updates a layer's state, unless that depends on rows and a worker apart has none. [Note: apart]

    Args:
        update: does so, and returns what the caller asked for.
        component: what is returned in its place, where the update depends on rows that may be missing.
        depends: whether the update depends on rows.
        extended: of the strategy.
    """
    rows = extended.fed_rows() if depends else None
    if rows is None:
        return update()
    tf.cond(rows > 0, lambda: (update(), None)[1], lambda: None)
    return component


def _is_in_a_loop() -> bool:
    return graphs.is_in_a_loop(current_run().graph)


def with_own_results(function: Callable) -> Callable:
    """A replica's function with its results reduced to what counts. [Note: padding row]"""
    if isinstance(function, tf.types.experimental.PolymorphicFunction):
        # It must stay a tf.function: TensorFlow traces all replicas within it, and converts its Python function there.
        return graphs.cloned(function, _of_own_rows)
    if tf.executing_eagerly():
        return _of_own_rows(function)
    return tf.autograph.experimental.do_not_convert(_of_own_rows(graphs.converted(function)))


def _of_own_rows(function: Callable) -> Callable:
    def of_own_rows(*args: Any, **kwargs: Any) -> Any:
        _wait_for_batch((args, kwargs))
        args, kwargs = _padded((args, kwargs))
        _exchange_own_rows()
        tf.distribute.get_strategy().extended.count_rows()
        with _timed((args, kwargs), tf.distribute.get_strategy().extended):
            return _own_results(function(*args, **kwargs))

    return of_own_rows


@contextlib.contextmanager
def _timed(arguments: Any, extended: tf.distribute.StrategyExtended) -> Iterator[None]:
    """Notes when a replica may begin with its part of a batch, if shares are measured. See `rows/shares.py`.

    Counts of rows have been exchanged by then; else a fast replica would wait for a slow one in its own time.
    """
    leaves = [leaf for leaf in tf.nest.flatten(arguments) if own_rows(leaf) is not None]
    if not extended.shares.is_timing or not leaves:
        yield
        return
    tensors = [each for each in tf.nest.flatten(leaves, expand_composites=True) if tf.is_tensor(each)]
    beginning = extended.shares.begin([*tensors, extended.batch_fraction()])
    current_run().beginning = beginning
    with tf.control_dependencies([beginning]):
        yield


@tf.autograph.experimental.do_not_convert
def _wait_for_batch(arguments: Any) -> None:
    """Makes the replica's collectives wait for its arguments. [Note: batch first] in `collectives/counts.py`"""
    graph = current_graph()
    if graph is None:
        return
    leaves = tf.nest.flatten(arguments, expand_composites=True)
    tensors = [each for each in leaves if isinstance(each, tf.Tensor) and getattr(each, "graph", None) is graph]
    if tensors:
        tf.distribute.get_strategy().extended.group.wait_for(tensors, runtime.replica_index())


@tf.autograph.experimental.do_not_convert
def _padded(arguments: Any) -> Any:
    """A replica's arguments. If no tensor that may be part of a batch has rows, each of these gets a row of zeros.

    Parts that tfzero cut are padded already. A user's own dataset gives the last replicas empty tensors.
    """
    arguments = tf.nest.map_structure(_of_unknown_rows, arguments)
    tensors = [each for each in tf.nest.flatten(arguments) if isinstance(each, tf.Tensor) and each.shape.rank]
    unpadded = [each for each in tensors if own_rows(each) is None]
    # Beside tensors with an unknown number of rows, tensors with a known size are not part of the batch.
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
    """A part of a batch whose number of rows visibly depends on the replica. [Note: kinds]"""
    if tf.executing_eagerly() or (rows := own_rows(leaf)) is None:
        return leaf
    result = leaf
    if isinstance(leaf, batch_rows.EagerTensor):  # captured, it would be a constant of the graph
        result = mark(tf.compat.v1.placeholder_with_default(leaf, [None, *leaf.shape[1:]]), ROWS)
    elif isinstance(leaf, tf.RaggedTensor) and leaf.uniform_row_length is None:  # else rows = number of splits - 1
        count = mark(tf.maximum(rows, 1), COUNT)
        result = tf.RaggedTensor.from_value_rowids(leaf.values, leaf.value_rowids(), count, validate=False)
    result._tfzero_rows = rows
    return result


@tf.autograph.experimental.do_not_convert
def _exchange_own_rows() -> None:
    """Makes the replica's context reduce and gather only what counts. Each run of a function has its own context.

    This includes replicas that certainly have rows: others may not have any, and all must do the same.
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
    """The part that counts of a replica's value: its own rows, if `axis` is an axis along which replicas may differ."""
    value, has_rows = tf.convert_to_tensor(value), extended.has_rows()
    if has_rows is None:
        return value
    may_differ = value.shape[axis] == 1 if tf.executing_eagerly() else value.shape[axis] is None
    return _without_padding(value, axis % value.shape.rank, has_rows) if may_differ else counted(value, extended)


def _gather(value: tf.Tensor, axis: int, extended: tf.distribute.StrategyExtended) -> tf.Tensor:
    """Like `tf.distribute.ReplicaContext.all_gather`, but also works where replicas cannot be merged."""
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
    """A result with rows along its first axis, if it has an axis, as far as can be told."""
    if extended.dependence().kind(result) in (SAME, OWN):
        return result
    shape = tf.shape(result)
    empty = tf.concat([tf.zeros_like(shape[:1]), shape[1:]], 0)
    return tf.cond(has_rows, lambda: tf.identity(result), lambda: tf.zeros(empty, result.dtype))


def _without_padding(value: tf.Tensor, axis: int, has_rows: tf.Tensor) -> tf.Tensor:
    """A tensor with rows along `axis`; a replica without rows gets size 0 there."""
    size = tf.shape(value, tf.int64)
    others = tf.constant([int(k != axis) for k in range(value.shape.rank)], tf.int64)
    return tf.slice(value, tf.zeros_like(size), tf.where(has_rows, size, size * others))


def _axis_of_rows(
    result: tf.Tensor | tf.SparseTensor | tf.RaggedTensor, has_rows: tf.Tensor, extended: tf.distribute.StrategyExtended
) -> int | None:
    """The axis of a result's rows, as far as it can be told."""
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
    """The value, or zeros without gradients if the replica has no rows."""

    def chosen() -> tf.Tensor:
        # TensorFlow would turn a full tensor of zeros into a constant, and keep it for ever.
        return tf.where(has_rows, value, tf.zeros([], value.dtype))

    elements = value.shape.num_elements()
    if elements is not None and elements * value.dtype.size >= _LARGE_BYTES:
        return tf.cond(has_rows, lambda: tf.identity(value), chosen)
    return chosen()
