"""Where the rows of a batch are after an operation that keeps, moves or cuts axes. [Note: kinds]

A rule gives kind "rows" only if every row of the result comes from one row of the batch, and rows keep their order. An
operation that takes some of the rows (such as `x[1:]`), reorders them or puts them beside other rows gives "other".
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfzero.rows.kinds import COUNT, MEAN, OTHER, ROWS, SAME, SUM, Kind, rows_along

# Operations that treat each row of their first input separately, if their other inputs are the same everywhere, and the
# least rank of that input: below it they work along the rows.
_EACH_ROW = {
    **dict.fromkeys(("BiasAdd", "Softmax", "LogSoftmax", "TopKV2", "FFT", "IFFT", "MatrixDiagV3"), 2),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2dNative", "MaxPool", "AvgPool", "LRN", "ExtractImagePatches"), 4),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic", "SpaceToDepth", "DepthToSpace"), 4),
    **dict.fromkeys(("Conv3D", "MaxPool3D", "AvgPool3D"), 5),
    **dict.fromkeys(("Cholesky", "MatrixInverse", "MatrixDeterminant", "MatrixBandPart", "MatrixDiagPartV3"), 3),
    **dict.fromkeys(("ResourceGather", "LookupTableFindV2", "StringToHashBucketFast", "Bucketize"), 1),
}
_CROSS_ENTROPIES = ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
# Random operations. Their first input is the shape of the result.
_DRAWN = (
    "RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal", "StatelessRandomUniformV2",
    "StatelessRandomNormalV2", "StatelessTruncatedNormalV2", "StatelessRandomUniformIntV2",
)  # fmt: skip


def _static(tensor: tf.Tensor) -> np.ndarray | None:
    value = tf.get_static_value(tensor)
    return None if value is None else np.asarray(value).reshape(-1)


def _of_each_row(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    value = next(each for each in operation.inputs if each.dtype != tf.resource)
    is_enough = value.shape.rank is not None and value.shape.rank >= _EACH_ROW[operation.type]
    return ROWS if is_enough and kinds[0] == ROWS and all(kind == SAME for kind in kinds[1:]) else OTHER


def _of_cross_entropy(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    return ROWS if set(kinds) == {ROWS} else OTHER


def _of_batch_norm(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    is_each = not operation.get_attr("is_training") and tensor.value_index == 0
    return ROWS if is_each and kinds[0] == ROWS and all(kind == SAME for kind in kinds[1:]) else OTHER


def _of_conv_transpose(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    return ROWS if kinds[1:] == [SAME, ROWS] else OTHER


def _of_drawn(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Random numbers for each row. One device draws different ones, but as many."""
    return rows_along(kinds[0].axis) if kinds[0].name == "shape" else OTHER


def _of_fill(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    return rows_along(kinds[0].axis) if kinds[0].name == "shape" and kinds[1] == SAME else OTHER


def _of_pack(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Stacks parts of a shape, such as `[rows, 3]`; or statistics; or tensors with rows."""
    rank = tensor.shape.rank
    if rank == 1 and tensor.dtype.is_integer and kinds.count(COUNT) == 1 and kinds.count(SAME) == len(kinds) - 1:
        return Kind("shape", kinds.index(COUNT))
    if rank is None or len(set(kinds)) != 1 or kinds[0].name != "rows":
        return _of_statistics(kinds)
    return rows_along(kinds[0].axis + (operation.get_attr("axis") % rank <= kinds[0].axis))


def _of_statistics(kinds: list[Kind]) -> Kind:
    if set(kinds) <= {SUM, COUNT}:
        return SUM
    return MEAN if set(kinds) == {MEAN} else OTHER


def _of_concat(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    axis, rank = _static(operation.inputs[-1]), tensor.shape.rank
    kinds = kinds[:-1]
    if axis is None or rank is None:
        return OTHER
    if any(kind.name == "shape" for kind in kinds):
        return _of_joined_shapes(operation, kinds)
    if len(set(kinds)) != 1 or kinds[0].name != "rows":
        return _of_statistics(kinds)
    return OTHER if axis[0] % rank == kinds[0].axis else kinds[0]


def _of_joined_shapes(operation: tf.Operation, kinds: list[Kind]) -> Kind:
    place = next(k for k, kind in enumerate(kinds) if kind.name == "shape")
    before = [each.shape.num_elements() for each in operation.inputs[:place]]
    if None in before or any(kind != SAME for k, kind in enumerate(kinds) if k != place):
        return OTHER
    return Kind("shape", sum(before) + kinds[place].axis)


def _of_gather(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    values, indexes = operation.inputs[0].shape.rank, operation.inputs[1].shape.rank
    axis, batch_dims = _static(operation.inputs[2]), operation.get_attr("batch_dims")
    if axis is None or values is None or indexes is None:
        return OTHER
    axis = int(axis[0]) % values
    if kinds[0].name == "shape":
        return _of_shape_elements(_static(operation.inputs[1]), kinds[0], operation.inputs[0])
    if batch_dims:
        return ROWS if kinds[:2] == [ROWS, ROWS] else OTHER
    if kinds[0] == SAME and kinds[1].name == "rows":
        return rows_along(axis + kinds[1].axis)
    if kinds[0].name != "rows" or kinds[1] != SAME or kinds[0].axis == axis:
        return OTHER
    return rows_along(kinds[0].axis + (indexes - 1 if kinds[0].axis > axis else 0))


def _of_shape_elements(places: np.ndarray | None, kind: Kind, shape: tf.Tensor) -> Kind:
    """The kind of a vector of some elements of a shape."""
    rank = shape.shape[0]
    if places is None or rank is None:
        return OTHER
    found = [k for k, place in enumerate(places) if place % rank == kind.axis]
    return SAME if not found else Kind("shape", found[0]) if len(found) == 1 else OTHER


def _of_gather_nd(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    rank = operation.inputs[1].shape.rank
    is_each = kinds[0] == SAME and kinds[1].name == "rows" and rank is not None and kinds[1].axis < rank - 1
    return kinds[1] if is_each else OTHER


def _of_one_hot(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    if kinds[0].name != "rows" or any(kind != SAME for kind in kinds[1:]) or tensor.shape.rank is None:
        return OTHER
    return rows_along(kinds[0].axis + (operation.get_attr("axis") % tensor.shape.rank <= kinds[0].axis))


# The following rules are about one tensor among the inputs. A constant input or an attribute gives the axes concerned.


def _of_unpack(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    rank = operation.inputs[0].shape.rank
    if kinds[0].name != "rows" or rank is None:
        return OTHER
    axis = operation.get_attr("axis") % rank
    return OTHER if axis == kinds[0].axis else rows_along(kinds[0].axis - (axis < kinds[0].axis))


def _along(value_place: int, axes_place: int) -> Callable[..., Kind]:
    """A rule for operations that work along the axes given by one of their inputs."""

    def rule(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
        value, axes = operation.inputs[value_place], _static(operation.inputs[axes_place])
        others = [kind for k, kind in enumerate(kinds) if k != value_place]
        kind, rank = kinds[value_place], value.shape.rank
        if kind.name != "rows" or axes is None or rank is None or any(other != SAME for other in others):
            return OTHER
        return OTHER if any(axis % rank == kind.axis for axis in axes) else kind

    return rule


def _of_arg(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    kind, rank = _along(0, 1)(tensor, operation, kinds), operation.inputs[0].shape.rank
    if kind == OTHER:
        return OTHER
    return rows_along(kind.axis - (int(_static(operation.inputs[1])[0]) % rank < kind.axis))


def _of_pad(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    padding = tf.get_static_value(operation.inputs[1])
    if kinds[0].name != "rows" or padding is None or any(kind != SAME for kind in kinds[1:]):
        return OTHER
    return OTHER if np.any(padding[kinds[0].axis]) else kinds[0]


def _of_slice(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    begin, size = (_static(each) for each in operation.inputs[1:])
    if kinds[0].name != "rows" or begin is None or size is None:
        return OTHER
    return kinds[0] if (begin[kinds[0].axis], size[kinds[0].axis]) == (0, -1) else OTHER


def of_strided_slice(operation: tf.Operation, kind: Kind) -> Kind:
    """The kind of `x[:, 3]` and the like, where x has rows; OTHER unless all rows are taken."""
    rank, strides = operation.inputs[0].shape.rank, _static(operation.inputs[3])
    if rank is None or strides is None:
        return OTHER
    masks = {name: operation.get_attr(f"{name}_mask") for name in _MASKS}
    parts = [{name for name, mask in masks.items() if mask >> k & 1} for k in range(len(strides))]
    own = sum(not part & {"ellipsis", "new_axis"} for part in parts)
    read, written = 0, 0  # axes so far
    for part, stride in zip(parts, strides, strict=True):
        if "ellipsis" in part:
            if kind.axis < read + rank - own:
                break
            read, written = read + rank - own, written + rank - own
        elif "new_axis" in part:
            written += 1
        elif read == kind.axis:
            if part != {"begin", "end"} or stride != 1:
                return OTHER
            break
        else:
            read, written = read + 1, written + ("shrink_axis" not in part)
    return rows_along(written + kind.axis - read)


_MASKS = ("begin", "end", "ellipsis", "new_axis", "shrink_axis")


def of_sliced_shape(operation: tf.Operation, kind: Kind) -> Kind:
    """The kind of `shape[0]`, `shape[1:]` and the like, for the shape of a tensor with rows."""
    begin, end, strides = (_static(each) for each in operation.inputs[1:])
    rank = operation.inputs[0].shape[0]
    if begin is None or rank is None or len(begin) != 1:
        return OTHER
    if operation.get_attr("shrink_axis_mask"):
        return COUNT if int(begin[0]) % rank == kind.axis else SAME
    if end is None or strides is None:
        return OTHER
    from_, to = (
        None if operation.get_attr(f"{name}_mask") else int(v[0]) for name, v in (("begin", begin), ("end", end))
    )
    return _of_shape_elements(np.arange(rank)[from_ : to : int(strides[0])], kind, operation.inputs[0])


def of_reshape(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Reshape of a tensor with rows along axis 0: each row of the result must come from one row of the batch."""
    before, after = operation.inputs[0].shape, tensor.shape
    if kinds[0] != ROWS or None in (before.rank, after.rank) or not after.rank or after[0] is not None:
        return OTHER
    known = int(np.prod([size for size in before[1:] if size is not None], dtype=np.int64))
    if None not in after[1:].as_list():
        return ROWS if known % max(1, after[1:].num_elements()) == 0 else OTHER
    return ROWS if _begins_with_rows(operation.inputs[1], kinds[1]) else OTHER


def _begins_with_rows(shape: tf.Tensor, kind: Kind) -> bool:
    """Whether a shape is `[rows, ...]` or `[-1, ...]` with its other elements the same everywhere."""
    if kind == Kind("shape", 0):
        return True
    first = shape.op.inputs[0] if kind == SAME and hasattr(shape, "op") and shape.op.type == "Pack" else None
    return first is not None and tf.get_static_value(first) == -1


def of_axes_moved(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """Operations that add, remove or permute axes of a tensor with rows."""
    kind, rank = kinds[0], operation.inputs[0].shape.rank
    static = [_static(each) for each in operation.inputs[1:]]
    if rank is None or tensor.shape.rank is None:
        return OTHER
    if operation.type == "Squeeze":
        places = [place % rank for place in operation.get_attr("squeeze_dims")]
        return rows_along(kind.axis - sum(place < kind.axis for place in places)) if places else OTHER
    if operation.type == "BroadcastTo":
        place = kind.axis + tensor.shape.rank - rank
        return rows_along(place) if kinds[1] == Kind("shape", place) else OTHER
    if static[0] is None:
        return OTHER
    if operation.type == "Transpose":
        return rows_along(static[0].tolist().index(kind.axis))
    if operation.type == "ExpandDims":
        return rows_along(kind.axis + (static[0][0] % tensor.shape.rank <= kind.axis))
    return kind if static[0][kind.axis] == 1 else OTHER  # Tile


def _of_list(tensor: tf.Tensor, operation: tf.Operation, kinds: list[Kind]) -> Kind:
    """The tensor lists of loops: a list has the kind of its elements stacked."""
    kind = kinds[0]
    if operation.type == "TensorListFromTensor":
        return kind if kind.name == "rows" and kind.axis else OTHER
    if operation.type == "TensorListStack":
        return kind
    if kinds[1] != SAME:
        return OTHER
    if operation.type == "TensorListGetItem":
        return rows_along(kind.axis - 1) if kind.name == "rows" else OTHER
    item = rows_along(kinds[2].axis + 1) if kinds[2].name == "rows" else kinds[2]
    return item if item.name == "rows" and kind in (SAME, item) else OTHER


MOVES: dict[str, Callable[..., Kind]] = {
    **dict.fromkeys(_EACH_ROW, _of_each_row),
    **dict.fromkeys(_CROSS_ENTROPIES, _of_cross_entropy),
    **dict.fromkeys(_DRAWN, _of_drawn),
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), _of_conv_transpose),
    **dict.fromkeys(("ArgMax", "ArgMin"), _of_arg),
    **dict.fromkeys(("Cumsum", "Cumprod", "ReverseV2"), _along(0, 1)),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _of_pad),
    **dict.fromkeys(("TensorListFromTensor", "TensorListStack", "TensorListGetItem", "TensorListSetItem"), _of_list),
    "ConcatV2": _of_concat,
    "Fill": _of_fill,
    "FusedBatchNormV3": _of_batch_norm,
    "GatherNd": _of_gather_nd,
    "GatherV2": _of_gather,
    "OneHot": _of_one_hot,
    "Pack": _of_pack,
    "Roll": _along(0, 2),
    "Slice": _of_slice,
    "Split": _along(1, 0),
    "SplitV": _along(0, 2),
    "Unpack": _of_unpack,
}
