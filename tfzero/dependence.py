"""What of a tensor depends on a replica's rows, and how the whole batch's follows from the replicas' tensors.

[Note: kinds] A replica computes from its rows of the batch what one device computes from all rows. Of each tensor of
the traced step it can be told, from the operations that made it, how the one follows from the other:

    same   does not depend on rows: every replica has what one device has
    rows   has an axis of rows: one device has those of all replicas
    sum    one device has the sum over replicas (a sum over rows; `count` is a number of rows)
    mean   one device has the mean over replicas, weighted by their rows (a mean over rows)
    mixed  a sum of tensors of several kinds, into which `split` takes it apart
    own    what a replica has counted up by itself, in a variable of its own
    other  none of these, such as a maximum

What is not known to be anything else is `other`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import tensorflow as tf

from tfzero import _compat, _compat_batches, _compat_graphs


class Kind(NamedTuple):
    """How one device's tensor follows from the replicas'. [Note: kinds]

    Args:
        name: a word of the note; "shape" is the shape of a tensor of kind "rows".
        axis: of "rows", the axis of rows; of "shape", the element that counts rows.
    """

    name: str
    axis: int = -1


SAME, SUM, COUNT, MEAN = Kind("same"), Kind("sum"), Kind("count"), Kind("mean")
OWN, MIXED, OTHER = Kind("own"), Kind("mixed"), Kind("other")
ROWS = Kind("rows", 0)

_PASSED = {"Identity", "IdentityN", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape", "Snapshot"}
# Of their first input, if the others are the same everywhere.
_LINEAR = {"Neg", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Sum", "Mean", "StridedSlice", "Tile", "BroadcastTo"}
_ADDED = {"AddV2", "Add", "AddN", "Sub"}
_DIVIDED = {"RealDiv", "Div", "DivNoNan"}
_REDUCED = {"Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm"}
_COLLECTIVES = {
    "CollectiveReduce", "CollectiveReduceV2", "CollectiveGather", "CollectiveGatherV2", "CollectiveBcastRecvV2",
    "CollectiveBcastSendV2",
}  # fmt: skip
# Stateful operations of which equal inputs give equal results.
_DETERMINED = {
    "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "Empty", "StatefulPartitionedCall", "If",
    "While",
}  # fmt: skip
# Of an element each, broadcast.
_ELEMENTWISE = {
    *_ADDED, *_DIVIDED, "Mul", "MulNoNan", "Maximum", "Minimum", "Pow", "SquaredDifference", "FloorDiv", "FloorMod",
    "Neg", "Abs", "Sign", "Square", "Sqrt", "Rsqrt", "Exp", "Expm1", "Log", "Log1p", "Tanh", "Sigmoid", "Relu", "Relu6",
    "Elu", "Selu", "Softplus", "Erf", "Cast", "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual",
    "LogicalAnd", "LogicalOr", "LogicalNot", "SelectV2", "Round", "Floor", "Ceil", "IsNan", "IsFinite", "ZerosLike",
    "OnesLike", "Sin", "Cos", "ClipByValue", "Reciprocal",
}  # fmt: skip


def mark(tensor: tf.Tensor, kind: Kind) -> tf.Tensor:
    """Notes of what kind a tensor is, where its operations do not tell."""
    tensor._tfzero_kind = kind
    return tensor


def mark_global(tensor: tf.Tensor) -> tf.Tensor:
    """Notes that a tensor has the same value on all replicas, so that nobody need reduce it."""
    return mark(tensor, SAME)


def is_global(tensor) -> bool:
    """Whether `mark_global` was called on a tensor."""
    return getattr(tensor, "_tfzero_kind", None) == SAME


class Dependence:
    """What is known of the tensors of one replica's graph, and of the graphs within it.

    Args:
        given: the tensors that the replica's function was given, and their kinds.
    """

    def __init__(self, given: Iterable[tuple[tf.Tensor, Kind]]) -> None:
        self._given = list(given)  # held, as they are known by their identity
        self._known = {_key(tensor): kind for tensor, kind in self._given}
        self._captures: dict[int, tuple] = {}

    def kind(self, tensor: tf.Tensor) -> Kind:
        """The kind of a tensor of a graph. [Note: kinds]"""
        waiting = [tensor]
        while waiting:
            each = waiting[-1]
            if _key(each) in self._known:
                waiting.pop()
                continue
            sources = self._sources(each)
            unknown = [source for source in sources if _key(source) not in self._known]
            if unknown:
                waiting += unknown
            else:
                kinds = [self._known[_key(source)] for source in sources]
                self._known[_key(each)] = OWN if self._is_own(each) else _kind(each, kinds)
                waiting.pop()
        return self._known[_key(tensor)]

    def _is_own(self, tensor) -> bool:
        """Whether a tensor is read from a variable that each replica counts up by itself."""
        if isinstance(tensor, _compat_batches.EagerTensor) or tensor.op.type != "ReadVariableOp":
            return False
        handle = tensor.op.inputs[0]
        while handle is not None and not isinstance(handle, _compat_batches.EagerTensor):
            handle = self._outer(handle)
        return isinstance(_compat_batches.container_of(handle), _compat.SyncOnReadVariable)

    def split(self, tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        """Tensors by the names of their kinds, which add up to `tensor`; only one of kind "mixed" has several."""
        kind = self.kind(tensor)
        if kind != MIXED:
            return {SUM.name if kind == COUNT else kind.name: tensor}
        operation = tensor.op
        if operation.type in ("Placeholder", *_PASSED):
            return self.split(self._sources(tensor)[0])
        inputs = list(operation.inputs)
        if operation.type in _ADDED:
            return self._split_sum(operation.type, inputs, tensor)
        place = next(k for k, each in enumerate(inputs) if self.kind(each) == MIXED)
        rebuild = _rebuilder(operation, place)
        return {name: rebuild(part) for name, part in self.split(inputs[place]).items()}

    def _split_sum(self, operation_type: str, inputs: list, tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        found: dict[str, list] = {}
        for place, each in enumerate(inputs):
            for name, part in self.split(each).items():
                signed = -part if operation_type == "Sub" and place else part
                whole = signed.shape.is_fully_defined() and signed.shape == tensor.shape
                found.setdefault(name, []).append(signed if whole else tf.broadcast_to(signed, tf.shape(tensor)))
        return {name: tf.add_n(parts) for name, parts in found.items()}

    def _sources(self, tensor) -> list:
        """The tensors on which a tensor depends, variables aside."""
        if hasattr(tensor, "_tfzero_kind") or isinstance(tensor, _compat_batches.EagerTensor):
            return []
        operation = tensor.op
        if operation.type == "Placeholder":
            outer = self._outer(tensor)
            return [] if outer is None or outer.dtype in (tf.resource, tf.variant) else [outer]
        if operation.type in _PASSED:
            return [operation.inputs[tensor.value_index]]
        return [each for each in operation.inputs if each.dtype != tf.resource]

    def _outer(self, placeholder):
        """The tensor of the graph around that a graph has captured as this placeholder, or None."""
        graph = placeholder.graph
        count, captures = self._captures.get(id(graph), (-1, {}))
        pairs = getattr(graph, "captures", [])
        if len(pairs) != count:
            captures = {_key(inner): outer for outer, inner in pairs}
            self._captures[id(graph)] = len(pairs), captures
        return captures.get(_key(placeholder))


def _key(tensor):
    return id(tensor) if isinstance(tensor, _compat_batches.EagerTensor) else (id(tensor.graph), tensor.name)


def _kind(tensor, kinds: list[Kind]) -> Kind:
    """The kind of a tensor, from those of the tensors that it depends on."""
    if hasattr(tensor, "_tfzero_kind"):
        return tensor._tfzero_kind
    if isinstance(tensor, _compat_batches.EagerTensor):
        return SAME
    operation = tensor.op
    if operation.type in _COLLECTIVES:
        return SAME
    if operation.type == "Placeholder":
        return kinds[0] if kinds else (SAME if tensor.dtype == tf.resource else OTHER)
    if operation.type in _PASSED:
        return kinds[0]
    if all(kind == SAME for kind in kinds):
        return OTHER if operation.op_def.is_stateful and operation.type not in _DETERMINED else SAME
    if operation.type in _RULES:
        return _RULES[operation.type](tensor, operation, kinds)
    if operation.type in _ELEMENTWISE:
        return _of_elements(tensor, operation, kinds)
    return _of_unknown(tensor, kinds)


def _of_unknown(tensor, kinds: list[Kind]) -> Kind:
    """Of an operation that is not known: most layers keep rows where they are."""
    keeps = all(kind in (SAME, ROWS) or kind.name == "shape" for kind in kinds)
    has_rows = tensor.shape.rank is not None and tensor.shape.rank > 0 and tensor.shape[0] is None
    return ROWS if keeps and has_rows else OTHER


def _of_elements(tensor, operation, kinds: list[Kind]) -> Kind:
    axes = set()
    for each, kind in zip(operation.inputs, kinds, strict=True):
        if kind.name == "rows" and None not in (each.shape.rank, tensor.shape.rank):
            axes.add(kind.axis + tensor.shape.rank - each.shape.rank)
        elif kind != SAME:
            return OTHER
    return Kind("rows", axes.pop()) if len(axes) == 1 else OTHER


def _of_sum(tensor, operation, kinds: list[Kind]) -> Kind:
    if any(kind.name in ("rows", "shape") for kind in kinds):
        return _of_elements(tensor, operation, kinds)
    if set(kinds) <= {SUM, COUNT}:
        return SUM
    return kinds[0] if set(kinds) in ({MEAN}, {OWN}) else MIXED


def _of_product(tensor, operation, kinds: list[Kind]) -> Kind:
    left, right = kinds
    if SAME in kinds and left.name != "rows" and right.name != "rows":
        return right if left == SAME else left
    return _of_elements(tensor, operation, kinds)


def _of_quotient(tensor, operation, kinds: list[Kind]) -> Kind:
    numerator, denominator = kinds
    if denominator == SAME and numerator.name != "rows":
        return numerator
    if numerator in (SUM, COUNT) and denominator == COUNT:
        return MEAN
    return _of_elements(tensor, operation, kinds)


def _of_cast(tensor, operation, kinds: list[Kind]) -> Kind:
    source = operation.inputs[0].dtype
    rounds = tensor.dtype.is_bool or (tensor.dtype.is_integer and source.is_floating)
    return OTHER if rounds and kinds[0].name not in ("rows", "shape") else kinds[0]


def _of_linear(tensor, operation, kinds: list[Kind]) -> Kind:
    """Of shapes, slices, and sums over other axes than that of rows."""
    kind = kinds[0]
    if kind.name == "rows":
        return _of_rows_moved(tensor, operation, kind)
    if kind.name == "shape":
        return _of_a_shape(operation, kind)
    return kind if all(other in (SAME, kind) or other.name == "shape" for other in kinds[1:]) else OTHER


def _of_rows_moved(tensor, operation, kind: Kind) -> Kind:
    value, arguments = operation.inputs[0], list(operation.inputs)[1:]
    static = [tf.get_static_value(each) for each in arguments]
    if operation.type == "Transpose" and static[0] is not None:
        return Kind("rows", list(static[0]).index(kind.axis))
    if operation.type == "Neg":
        return kind
    if operation.type == "ExpandDims" and static[0] is not None:
        place = int(static[0]) % (tensor.shape.rank or 1)
        return Kind("rows", kind.axis + (place <= kind.axis))
    return _of_unknown(tensor, [kind]) if value.shape.rank is not None else OTHER


def _of_a_shape(operation, kind: Kind) -> Kind:
    if operation.type != "StridedSlice" or not operation.get_attr("shrink_axis_mask"):
        return OTHER
    begin = tf.get_static_value(operation.inputs[1])
    rank = operation.inputs[0].shape[0]
    if begin is None or rank is None or len(begin) != 1:
        return OTHER
    return COUNT if int(begin[0]) % rank == kind.axis else SAME


def _of_reduction(tensor, operation, kinds: list[Kind]) -> Kind:
    kind, value = kinds[0], operation.inputs[0]
    axes = tf.get_static_value(operation.inputs[1])
    if kind.name == "shape":
        return COUNT if operation.type == "Prod" else OTHER
    if kind.name != "rows":
        is_linear = operation.type in ("Sum", "Mean")
        return _of_linear(tensor, operation, kinds) if is_linear else OTHER
    if axes is None or value.shape.rank is None:
        return OTHER
    axes = {int(axis) % value.shape.rank for axis in axes.ravel()}
    if kind.axis in axes:
        return {"Sum": SUM, "Mean": MEAN}.get(operation.type, OTHER)
    before = 0 if operation.get_attr("keep_dims") else sum(axis < kind.axis for axis in axes)
    return Kind("rows", kind.axis - before)


def _of_arg(tensor, operation, kinds: list[Kind]) -> Kind:
    axis, value = tf.get_static_value(operation.inputs[1]), operation.inputs[0]
    if kinds[0].name != "rows" or axis is None or value.shape.rank is None:
        return OTHER
    place = int(axis) % value.shape.rank
    return OTHER if place == kinds[0].axis else Kind("rows", kinds[0].axis - (place < kinds[0].axis))


def _of_matmul(tensor, operation, kinds: list[Kind]) -> Kind:
    """`[..., a, b]` times `[..., b, c]`: a sum over rows where both are summed along theirs."""
    batched = operation.type.startswith("Batch")
    turned = [operation.get_attr(f"adj_{side}" if batched else f"transpose_{'ab'[k]}") for k, side in enumerate("xy")]
    rank = tensor.shape.rank
    if rank is None or not all(kind.name in ("rows", "same") for kind in kinds):
        return OTHER
    summed = [rank - 2 if turned[0] else rank - 1, rank - 1 if turned[1] else rank - 2]
    along = [kind.name == "rows" and kind.axis == axis for kind, axis in zip(kinds, summed, strict=True)]
    if all(along):
        return SUM
    if any(along):
        return OTHER if SAME not in kinds else SUM
    if kinds[0].name == "rows" and kinds[1].name == "rows" and kinds[0].axis != kinds[1].axis:
        return OTHER
    kind = kinds[0] if kinds[0].name == "rows" else kinds[1]
    if kind.axis < rank - 2:
        return kind
    return Kind("rows", rank - 2 if kind is kinds[0] else rank - 1)


def _of_einsum(tensor, operation, kinds: list[Kind]) -> Kind:
    terms, result = operation.get_attr("equation").decode().replace(" ", "").split("->")
    if "." in terms or not all(kind.name in ("rows", "same") for kind in kinds):
        return OTHER
    labels = {term[kind.axis] for term, kind in zip(terms.split(","), kinds, strict=True) if kind.name == "rows"}
    if len(labels) != 1:
        return OTHER
    label = labels.pop()
    has_it = [label in term for term in terms.split(",")]
    if any(has and kind.name != "rows" for has, kind in zip(has_it, kinds, strict=True)):
        return OTHER
    return Kind("rows", result.index(label)) if label in result else SUM


def _of_buckets(tensor, operation, kinds: list[Kind]) -> Kind:
    """Sums of rows by their numbers."""
    return SUM if all(kind in (ROWS, SAME) or kind.name == "shape" for kind in kinds) else OTHER


def _of_shape(tensor, operation, kinds: list[Kind]) -> Kind:
    kind = kinds[0]
    if kind.name == "rows":
        return Kind("shape", kind.axis)
    return OTHER if kind == OTHER and not operation.inputs[0].shape.is_fully_defined() else SAME


def _of_size(tensor, operation, kinds: list[Kind]) -> Kind:
    kind = _of_shape(tensor, operation, kinds)
    return COUNT if kind.name == "shape" else kind


_RULES: dict[str, Callable[..., Kind]] = {
    **dict.fromkeys(_LINEAR, _of_linear),
    **dict.fromkeys(_REDUCED, _of_reduction),
    **dict.fromkeys(_ADDED, _of_sum),
    **dict.fromkeys(_DIVIDED, _of_quotient),
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _of_matmul),
    **dict.fromkeys(("ArgMax", "ArgMin"), _of_arg),
    **dict.fromkeys(("UnsortedSegmentSum", "DenseBincount", "Bincount"), _of_buckets),
    "Mul": _of_product,
    "Cast": _of_cast,
    "Einsum": _of_einsum,
    "Shape": _of_shape,
    "Size": _of_size,
    "Rank": lambda *_: SAME,
}


def _rebuilder(operation: tf.Operation, place: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function that applies an operation, linear in its input at `place`, to a part of that input."""
    inputs = list(operation.inputs)
    if operation.type == "Mul":
        return lambda part: part * inputs[1 - place]
    return lambda part: _compat_graphs.copy_operation(operation, part)
