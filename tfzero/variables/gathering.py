"""Whole values of sharded parameters, kept only as long as a layer needs them (stage 3).

[Note: gather] A replica that reads a sharded parameter gathers it from all replicas. Gather and reduce-scatter are each
other's gradient, so a gradient arrives as the shard that the replica owns, already summed. In a graph four measures
bound the memory:

1. Without a delay, all gathers would start at once. A gather waits until the layer of an earlier gather is computed.
2. The backward pass would keep every gathered value alive. Its operations are redirected to a second gather, which
   starts shortly before the backward pass needs it. Activations are not recomputed.
3. Reduce-scatters fall behind the backward pass. Second gathers wait for the reduce-scatter of an earlier layer.
4. A value is gathered once in a step, and its gradient is reduced once, however often it is read (tied layers).

[Note: control flow] All replicas must gather in the same order, so never in a branch or a loop: the gather is put into
the graph around it. In a `tf.function` called within a loop or a branch, that graph is out of reach; this is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfzero.collectives.codec import Codec
from tfzero.collectives.group import Group
from tfzero.collectives.packing import as_rows
from tfzero.host import graphs, runtime
from tfzero.host.edges import Edges

# Bytes of gathered values that may wait for their layer, beside those of the layer being computed. A larger value waits
# alone. So large layers are prefetched one by one, and small ones do not wait for the network each time.
PREFETCH_BYTES = 4 * 2**20
# Operations that give the same elements in another form: operations after them use the gathered value too.
_VIEWS = {"Identity", "IdentityN", "Reshape", "Transpose", "Cast", "ExpandDims", "Squeeze"}
# Operations that need only the shape, and run at once.
_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
# Attribute of a shard: the components of its residual and of the loss scale, or None. [Note: error feedback]
RESIDUAL = "_tfzero_residual"


@dataclass(frozen=True)
class Use:
    """An operation that takes a gathered value, or a view of it, as its input `place`."""

    operation: tf.Operation
    place: int
    views: tuple[tf.Operation, ...]  # from the gathered value to the input

    @property
    def order(self) -> int:
        return runtime.creation_order(self.operation)

    def replace(self, value: tf.Tensor) -> None:
        """Makes the operation take another value, through copies of the views, unless that value waits for it."""
        for view in self.views:
            value = graphs.copy_operation(view, {0: value})
        Edges.of(self.operation.graph).replace_input(self.operation, self.place, value)


class Gatherer:
    """The gathered values of one replica in one graph.

    Args:
        group: the replicas.
        collective: runs one of the group's methods within a replica (`ZeroExtended.replica_collective`).
        counted: returns the part of a replica's gradient that counts. [Note: padding row]
        reshard_after_forward: whether the backward pass gathers again instead of keeping values.
        codec: the wire format of matrices; None to leave them unencoded.
    """

    def __init__(
        self,
        group: Group,
        collective: Callable,
        counted: Callable,
        reshard_after_forward: bool,
        codec: Codec | None = None,
    ) -> None:
        self._group = group
        self._codec = codec if group.world_size > 1 else None
        self._collective = collective
        self._counted = counted
        self._reshard = reshard_after_forward
        self._values: dict = {}
        self._gathered: list[tf.Tensor] = []
        self._scattered: list[tf.Tensor] = []
        self._awaited: list[tf.Tensor] = []  # tensors that the latest second gather's layer waits for

    def whole(self, shard: tf.Variable, shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
        """The whole value of a parameter in `dtype`, from this replica's flat shard `[shard_elements]`."""
        key = (id(shard), dtype)
        if key in self._values and runtime.is_recorded(self._values[key]):
            runtime.note_read(shard)
        else:
            self._values[key] = self._gather(shard, shape, dtype)
        return self._values[key]

    def forget(self) -> None:
        """Makes the next reads gather anew, because parameters have changed."""
        self._values.clear()

    def _gather(self, shard: tf.Variable, shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
        @tf.custom_gradient
        def gather(held: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:  # [shard_elements]
            with self._group.lanes.purpose(runtime.replica_index(), f"the parameter {shard.name}"):
                whole = self._all_gather(held, shape, dtype, self._previous_users())
            self._gathered.append(whole)

            def gradient(upstream: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
                upstream = tf.convert_to_tensor(upstream)
                waits: Sequence[tf.Tensor] = ()
                if not tf.executing_eagerly() and upstream.graph is whole.graph:
                    waits = _before_the_last(self._scattered, PREFETCH_BYTES // self._group.world_size)
                    if self._reshard:
                        with self._group.lanes.purpose(
                            runtime.replica_index(), f"the parameter {shard.name} once more"
                        ):
                            self._gather_again(whole, held, dtype, waits)
                purpose = self._group.lanes.purpose(runtime.replica_index(), f"the gradient of {shard.name}")
                with purpose, tf.control_dependencies(waits):
                    scattered = self._scatter_gradient(self._counted(tf.reshape(upstream, shape)), shard)
                self._scattered.append(scattered)
                return scattered

            return whole, gradient

        return gather(tf.convert_to_tensor(shard))

    def _all_gather(
        self,
        shard: tf.Tensor,
        shape: tf.TensorShape,
        dtype: tf.DType,
        waits: Sequence[tf.Tensor | tf.Operation],
        backward: bool = False,
    ) -> tf.Tensor:
        codec = self._codec_for(shape, dtype)
        with tf.control_dependencies(waits):
            shard = tf.identity(shard if codec else tf.cast(shard, dtype))
        sent = codec.encode(shard[tf.newaxis])[0] if codec else shard
        rows = self._collective(self._group.all_gather, sent, backward)
        flat = tf.reshape(codec.decode(rows, shard.shape[0], dtype) if codec else rows, [-1])
        return tf.reshape(flat[: shape.num_elements()] if flat.shape[0] > shape.num_elements() else flat, shape)

    def _codec_for(self, shape: tf.TensorShape, dtype: tf.DType) -> Codec | None:
        return self._codec if self._codec is not None and self._codec.serves(shape, dtype) else None

    def _scatter_gradient(self, upstream: tf.Tensor, shard: tf.Variable) -> tf.Tensor:
        """Sum over replicas of this replica's shard of a gradient."""
        codec = self._codec_for(upstream.shape, upstream.dtype)

        @tf.custom_gradient
        def scatter(whole: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            rows = as_rows(whole, self._group.world_size)
            if codec is None or not self._group.exchanges_encoded:
                summed = self._collective(self._group.reduce_scatter, rows, shard.dtype)
            else:
                rows = self._collective(self._group.sum_within, rows)
                payload = self._encode_gradient(codec, rows, getattr(shard, RESIDUAL, None))
                received = self._collective(self._group.across.all_to_all, payload)
                summed = tf.cast(codec.decode_sum(received, rows.shape[1]), shard.dtype)
            return summed, lambda upstream: self._all_gather(upstream, whole.shape, whole.dtype, ())

        return scatter(tf.reshape(upstream, [upstream.shape.num_elements()]))

    def _encode_gradient(self, codec: Codec, rows: tf.Tensor, kept: tuple | None) -> tf.Tensor:
        """Encodes rows; a residual keeps the encoding error, divided by the loss scale. [Note: error feedback]"""
        if kept is None:
            return codec.encode(rows)
        residual, loss_scale = kept
        elements = residual.shape.num_elements()

        def encode(rows: tf.Tensor) -> tf.Tensor:
            scale = tf.constant(1.0) if loss_scale is None else tf.convert_to_tensor(loss_scale)
            payload, lost = codec.encoded_with(rows, as_rows(tf.reshape(residual, [-1]) * scale, rows.shape[0]))
            residual.assign(tf.reshape(tf.reshape(lost, [-1])[:elements] / scale, residual.shape))
            return payload

        return tf.function(encode, jit_compile=True, autograph=False)(rows)

    def _previous_users(self) -> list[tf.Operation]:
        """The operations that use the gathered value for which the next gather waits; see 1 in [Note: gather]."""
        if tf.executing_eagerly():
            return []
        before = _before_the_last(self._gathered, PREFETCH_BYTES)
        return [use.operation for value in before for use in _uses(value)]

    def _gather_again(self, whole: tf.Tensor, shard: tf.Tensor, dtype: tf.DType, waits: Sequence[tf.Tensor]) -> None:
        """Redirects the backward pass to a second gather; see 2 in [Note: gather].

        A use that the second gather itself depends on keeps the first value: the two would wait for each other.
        """
        if runtime.is_backward(whole.op):
            return
        edges = Edges.of(whole.graph)
        previous = self._group.lanes.latest(runtime.replica_index(), whole.graph)
        uses = [
            use
            for use in sorted(_uses(whole), key=lambda use: use.order)
            if runtime.is_backward(use.operation)
            and use.operation.type not in _SHAPES
            and not (previous is not None and edges.comes_after(previous, use.operation))
        ]
        if not uses:
            return
        incoming = next((taken for use in uses if (taken := _incoming(use.operation))), [])
        awaited = [
            tensor
            for tensor in (*(self._awaited or incoming), *waits)
            if not any(edges.comes_after(tensor.op, use.operation) for use in uses)
        ]
        again = self._all_gather(shard, whole.shape, dtype, awaited, backward=True)
        self._awaited = incoming
        for use in uses:
            use.replace(again)


def _before_the_last(values: Sequence[tf.Tensor], size_bytes: int) -> Sequence[tf.Tensor]:
    """The value before the shortest suffix of `values` with at least `size_bytes`, alone in a sequence; or nothing."""
    remaining = max(1, size_bytes)
    for place in reversed(range(len(values))):
        if remaining <= 0:
            return values[place : place + 1]
        remaining -= values[place].shape.num_elements() * values[place].dtype.size
    return ()


def _uses(value: tf.Tensor, views: tuple[tf.Operation, ...] = ()) -> Iterator[Use]:
    """The operations that take a value, or a view of it that the forward pass made."""
    for operation in value.consumers():
        for place, taken in enumerate(operation.inputs):
            if taken is not value:
                continue
            if operation.type in _VIEWS and not runtime.is_backward(operation):
                output = operation.outputs[place if operation.type == "IdentityN" else 0]
                known = views if operation.type in ("Identity", "IdentityN") else (*views, operation)
                yield from _uses(output, known)
            else:
                yield Use(operation, place, views)


def _incoming(operation: tf.Operation) -> list[tf.Tensor]:
    """The gradients among a backward operation's inputs."""
    return [t for t in operation.inputs if runtime.is_backward(t.op) and t.op.type not in _SHAPES]
