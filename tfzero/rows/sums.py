"""The kinds of sums, means, products and quotients of tensors. [Note: kinds]"""

from collections.abc import Callable

import tensorflow as tf

from tfzero.rows.kinds import COUNT, MEAN, MIXED, OTHER, OWN, ROWS, SAME, SUM, Kind, rows_along
from tfzero.rows.moves import MOVES, of_axes_moved, of_reshape, of_sliced_shape, of_strided_slice

# Linear in their first input, if the others are the same everywhere.
_LINEAR = {"Neg", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Sum", "Mean", "StridedSlice", "Tile", "BroadcastTo"}
ADDED = {"AddV2", "Add", "AddN", "Sub"}
_DIVIDED = {"RealDiv", "Div", "DivNoNan"}
SCATTERED = {"TensorScatterAdd", "TensorScatterSub"}
_MATMULS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
_PRODUCTS = {*_MATMULS, "Einsum"}
# Jointly linear in the inputs at these places (a product: in one of them), if the others are the same everywhere.
LINEAR_IN = {
    **dict.fromkeys(("ReluGrad", "Relu6Grad", "LeakyReluGrad", "EluGrad", "SeluGrad"), slice(0, 1)),
    **dict.fromkeys(("SoftplusGrad", "SoftsignGrad", "GatherV2", "Slice", "Pad", "UnsortedSegmentSum"), slice(0, 1)),
    **dict.fromkeys(("TanhGrad", "SigmoidGrad", "SqrtGrad", "RsqrtGrad", "ReciprocalGrad", "InvGrad"), slice(1, 2)),
    **dict.fromkeys(("Pack", "Unpack", *_PRODUCTS), slice(0, None)),
    "ConcatV2": slice(0, -1),
    "SelectV2": slice(1, 3),
    "Split": slice(1, 2),
    "StridedSliceGrad": slice(4, 5),
}
_REDUCED = {"Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm"}
# Each element of the result depends on one element of each input, after broadcasting.
_ELEMENTWISE = {
    *ADDED, *_DIVIDED, "Mul", "MulNoNan", "Maximum", "Minimum", "Pow", "SquaredDifference", "FloorDiv", "FloorMod",
    "TruncateDiv", "TruncateMod", "Mod", "Atan2", "Xlogy", "Xlog1py", "Xdivy", "NextAfter", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor", "LeftShift", "RightShift", "LogicalAnd", "LogicalOr", "LogicalNot", "SelectV2", "ClipByValue",
    "Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual", "Neg", "Abs", "Sign", "Square", "Sqrt",
    "Rsqrt", "Exp", "Expm1", "Log", "Log1p", "Reciprocal", "Inv", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh",
    "Cosh", "Tanh", "Asinh", "Acosh", "Atanh", "Sigmoid", "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Softplus",
    "Softsign", "Erf", "Erfc", "Erfinv", "Lgamma", "Digamma", "Cast", "Round", "Rint", "Floor", "Ceil", "IsNan",
    "IsInf", "IsFinite", "ZerosLike", "OnesLike", "Real", "Imag", "Conj", "Complex", "ComplexAbs", "Angle",
    "ReluGrad", "Relu6Grad", "LeakyReluGrad", "EluGrad", "SeluGrad", "SoftplusGrad", "SoftsignGrad", "TanhGrad",
    "SigmoidGrad", "SqrtGrad", "RsqrtGrad", "ReciprocalGrad", "InvGrad",
}  # fmt: skip


def kind_of_result(tensor: tf.Tensor, kinds: list[Kind]) -> Kind:
    """The kind of an operation's result, from the kinds of its inputs; "other" for unknown operations."""
    operation = tensor.op
    kind = OTHER
    if operation.type in _RULES:
        kind = _RULES[operation.type](tensor, operation, kinds)
    elif operation.type in _ELEMENTWISE:
        kind = _of_elements(tensor, operation, kinds)
    if kind == OTHER and operation.type in LINEAR_IN:
        kind = _of_parts(operation, kinds)
    # A part that is the same for each of an unknown number of rows stops being the same when it is summed over them.
    return OTHER if kind == MIXED and not tensor.shape.is_fully_defined() else kind


def linear_places(operation: tf.Operation, kinds: list[Kind]) -> list[int]:
    """The inputs in which an operation of `LINEAR_IN` is jointly linear; none if another input depends on rows."""
    depending = [place for place, kind in enumerate(kinds) if kind != SAME]
    places = list(range(len(kinds)))[LINEAR_IN[operation.type]]
    if operation.type in _PRODUCTS:
        places = depending if len(depending) == 1 else []
    return places if set(depending) <= set(places) else []


def _of_parts(operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """The kind of an operation that adds up its parts: that of its linear inputs. Zeros are of any kind."""
    places = [
        place
        for place in linear_places(operation, kinds)
        if kinds[place] != SAME or not _is_zero(operation.inputs[place])
    ]
    found = {SUM if kinds[place] == COUNT else kinds[place] for place in places}
    if not found or not found <= {SAME, SUM, MEAN, MIXED}:
        return OTHER
    return found.pop() if len(found) == 1 else MIXED


def _is_zero(tensor: tf.Tensor) -> bool:
    value = tf.get_static_value(tensor)
    return value is not None and not value.any()


def _of_elements(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    axes = set()
    for each, kind in zip(operation.inputs, kinds, strict=True):
        if kind.name == "rows" and None not in (each.shape.rank, tensor.shape.rank):
            axes.add(kind.axis + tensor.shape.rank - each.shape.rank)
        elif kind != SAME:
            return OTHER
    return Kind("rows", axes.pop()) if len(axes) == 1 else OTHER


def _of_sum(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    if any(kind.name in ("rows", "shape") for kind in kinds):
        return _of_elements(tensor, operation, kinds)
    if set(kinds) <= {SUM, COUNT}:
        return SUM
    return kinds[0] if set(kinds) in ({MEAN}, {OWN}, {OTHER}) else MIXED


def _of_product(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    left, right = kinds
    if SAME in kinds and left.name != "rows" and right.name != "rows":
        return right if left == SAME else left
    return _of_elements(tensor, operation, kinds)


def _of_quotient(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    numerator, denominator = kinds
    if denominator == SAME and numerator.name != "rows":
        return OTHER if tensor.dtype.is_integer else numerator  # integer division truncates
    if numerator in (SUM, COUNT) and denominator == COUNT:
        return MEAN
    return _of_elements(tensor, operation, kinds)


def _of_cast(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    source = operation.inputs[0].dtype
    rounds = tensor.dtype.is_bool or (tensor.dtype.is_integer and source.is_floating)
    return OTHER if rounds and kinds[0].name not in ("rows", "shape") else kinds[0]


def _of_linear(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """The kind of shapes, slices, and sums over axes other than that of rows."""
    kind = kinds[0]
    if operation.type == "StridedSlice" and kind.name in ("rows", "shape"):
        if any(other != SAME for other in kinds[1:]):
            return OTHER
        return of_strided_slice(operation, kind) if kind.name == "rows" else of_sliced_shape(operation, kind)
    if kind.name == "rows":
        moved = of_reshape if operation.type == "Reshape" else of_axes_moved
        return kind if operation.type == "Neg" else moved(tensor, operation, kinds)
    if kind == SAME and operation.type in ("BroadcastTo", "Tile") and kinds[1].name == "shape":
        return rows_along(kinds[1].axis)
    # A value repeated for each of a replica's rows would be no sum over them.
    return kind if kind.name != "shape" and all(other == SAME for other in kinds[1:]) else OTHER


def _of_reduction(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    kind, value = kinds[0], operation.inputs[0]
    axes = tf.get_static_value(operation.inputs[1])
    if kind.name == "shape":
        return COUNT if operation.type == "Prod" else OTHER
    if kind.name != "rows":
        is_linear = operation.type == "Sum" or (operation.type == "Mean" and not tensor.dtype.is_integer)
        return _of_linear(tensor, operation, kinds) if is_linear else OTHER
    if axes is None or value.shape.rank is None:
        return OTHER
    axes = {int(axis) % value.shape.rank for axis in axes.ravel()}
    if kind.axis in axes:
        is_cut_off = operation.type == "Mean" and tensor.dtype.is_integer
        return OTHER if is_cut_off else {"Sum": SUM, "Mean": MEAN}.get(operation.type, OTHER)
    before = 0 if operation.get_attr("keep_dims") else sum(axis < kind.axis for axis in axes)
    return Kind("rows", kind.axis - before)


def _of_matmul(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """`[..., a, b]` times `[..., b, c]`: a sum over rows if both operands are summed along their axis of rows."""
    batched, rank = operation.type.startswith("Batch"), tensor.shape.rank
    turned = [operation.get_attr(f"adj_{side}" if batched else f"transpose_{'ab'[k]}") for k, side in enumerate("xy")]
    ranks = [each.shape.rank for each in operation.inputs]
    if None in (rank, *ranks) or not all(kind.name in ("rows", "same") for kind in kinds):
        return OTHER
    axes = [kind.axis + rank - own if kind.name == "rows" else None for kind, own in zip(kinds, ranks, strict=True)]
    summed = [rank - 2 if turned[0] else rank - 1, rank - 1 if turned[1] else rank - 2]
    if axes == summed:
        return SUM
    if None not in axes:  # of the same rows, not of each row with each other row
        return rows_along(axes[0]) if axes[0] == axes[1] and axes[0] < rank - 2 else OTHER
    side = 1 if axes[0] is None else 0
    if axes[side] == summed[side]:  # summed over rows, but the other operand does not have as many
        return OTHER
    return rows_along(axes[side] if axes[side] < rank - 2 else rank - 1 if side else rank - 2)


def _of_einsum(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
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


def _of_added_by_number(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Sums of rows by segment number."""
    return SUM if kinds == [ROWS, ROWS, SAME] else OTHER


def _of_counted(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """How often numbers occur in a vector, or the sums of their weights."""
    is_each = operation.inputs[0].shape.rank != 1 or (
        operation.type == "DenseBincount" and operation.get_attr("binary_output")
    )
    return OTHER if is_each or kinds[:2] != [ROWS, SAME] or kinds[2] not in (ROWS, SAME) else SUM


def _of_scattered(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Sums of rows by index, added to a tensor."""
    is_apart = kinds[0] in (SAME, SUM, COUNT, MEAN, MIXED)
    return MIXED if is_apart and kinds[1:] == [ROWS, ROWS] else OTHER


def _of_shape(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    kind = kinds[0]
    if kind.name == "rows":
        return Kind("shape", kind.axis)
    return OTHER if kind in (OTHER, MIXED) and not operation.inputs[0].shape.is_fully_defined() else SAME


def _of_size(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    kind = _of_shape(tensor, operation, kinds)
    return COUNT if kind.name == "shape" else kind


_RULES: dict[str, Callable[..., Kind]] = {
    **MOVES,
    **dict.fromkeys(_LINEAR, _of_linear),
    **dict.fromkeys(_REDUCED, _of_reduction),
    **dict.fromkeys(ADDED, _of_sum),
    **dict.fromkeys(_DIVIDED, _of_quotient),
    **dict.fromkeys(_MATMULS, _of_matmul),
    **dict.fromkeys(("DenseBincount", "Bincount"), _of_counted),
    **dict.fromkeys(("UnsortedSegmentSum", "ScatterNd"), _of_added_by_number),
    **dict.fromkeys(SCATTERED, _of_scattered),
    "Mul": _of_product,
    "Cast": _of_cast,
    "Einsum": _of_einsum,
    "Shape": _of_shape,
    "Size": _of_size,
    "Rank": lambda *_: SAME,
}
