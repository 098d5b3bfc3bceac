"""Bytes that a step's activations take while it runs, from its traced graph: nothing is computed or allocated.

[Note: liveness] A tensor lives from the operation that makes it to the last operation that takes it. Operations are
visited in the order in which they were traced. Some pass on the memory of an input, as TensorFlow's do: views of the
same elements always do, and element-wise operations do if nothing else needs that input any more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import runtime
from tfzero.host.keras_objects import has_compiled_loss

# Operations whose result lies in the memory of an input.
_VIEWS = {"Reshape", "Identity", "IdentityN", "ExpandDims", "Squeeze", "StopGradient", "PreventGradient", "Snapshot"}
# Operations whose result takes no memory of the step.
_HELD_ANYWAY = {"ReadVariableOp", "VarHandleOp", "Const", "NoOp"}
# Operations that write into an input of the same size, if nothing else needs it any more
# (`forward_input_or_allocate_output` in tensorflow/core/kernels).
_IN_PLACE = {
    "Abs", "Add", "AddN", "AddV2", "BiasAdd", "Div", "DivNoNan", "Elu", "EluGrad", "Erf", "Exp", "LeakyRelu",
    "LeakyReluGrad", "Log", "Log1p", "LogSoftmax", "Maximum", "Minimum", "Mul", "Neg", "Pow", "RealDiv", "Relu",
    "ReluGrad", "Rsqrt", "RsqrtGrad", "SelectV2", "Selu", "Sigmoid", "SigmoidGrad", "Softmax", "Softplus", "Sqrt",
    "SqrtGrad", "Square", "SquaredDifference", "Sub", "Tanh", "TanhGrad",
}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """Memory while one operation runs.

    Args:
        activation_bytes: of its inputs, its outputs and everything that is needed later, without values and gradients
            of variables.
        reads: the variables whose values it takes: the index of each, and the bytes of the value as taken.
        gradient: the index of the variable whose gradient it completes, or None.
        is_backward: whether it belongs to the backward pass.
    """

    activation_bytes: int
    reads: tuple[tuple[int, int], ...]
    gradient: int | None
    is_backward: bool


def trace_step(model: keras.Model, rows: int, gathers: bool) -> tuple[Moment, ...]:
    """Traces a forward and a backward pass on one replica. Returns their moments.

    Args:
        model: a model whose inputs are known; its loss counts if it is compiled.
        rows: number of rows in the replica's part of a batch.
        gathers: whether values of variables are gathered in the dtype of the layer that takes them. If not, a layer's
            cast of a variable is an activation that is kept for the backward pass.

    Raises:
        ValueError: if the model's inputs are not known.
    """
    variables = [variable.value for variable in model.trainable_variables]
    results: dict = {}

    def step(inputs: Any) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = _loss(model, inputs, model(inputs, training=True))
        gradients = tape.gradient(loss, variables)
        results["loss"] = loss
        results["gradients"] = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        return loss

    graph = tf.function(step, autograph=False).get_concrete_function(_input_specs(model, rows)).graph
    return tuple(_Walk(graph, variables, results["loss"], results["gradients"], gathers).moments())


def _input_specs(model: keras.Model, rows: int) -> Any:
    inputs = runtime.input_structure(model)
    if inputs is None:
        raise ValueError(
            f"Activations are counted for a batch of the model's inputs, but those of {model.name!r} are not known. "
            "Make it of `keras.Input`s, or leave `batch_size` away."
        )

    def spec(tensor: keras.KerasTensor) -> tf.TensorSpec:
        unknown = [size for size in tensor.shape[1:] if size is None]
        if unknown:
            raise ValueError(
                f"Activations are counted for inputs of known shape, but {model.name!r} takes {tuple(tensor.shape)}. "
                "Give `keras.Input` the shape of your data, or leave `batch_size` away."
            )
        return tf.TensorSpec((rows, *tensor.shape[1:]), tensor.dtype)

    return tf.nest.map_structure(spec, inputs)


def _loss(model: keras.Model, inputs: Any, outputs: Any) -> tf.Tensor:
    """The compiled loss, of targets in a shape that it takes; otherwise a sum of squares."""
    if has_compiled_loss(model):
        for targets in (outputs, tf.nest.map_structure(lambda t: tf.zeros(t.shape[:-1], tf.int32), outputs)):
            try:
                return model.compute_loss(inputs, tf.nest.map_structure(tf.stop_gradient, targets), outputs)
            except ValueError:
                continue  # it wants another rank, as for integer labels
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(each, tf.float32))) for each in tf.nest.flatten(outputs)])


class _Buffer:
    """Memory of one tensor, shared by its views.

    Args:
        size: in bytes.
        variable: the index of the variable whose value it holds, or None.
    """

    def __init__(self, size: int, variable: int | None = None) -> None:
        self.size = size
        self.variable = variable
        self.uses = 0  # by later operations


class _Walk:
    """Goes through a graph once. [Note: liveness]"""

    def __init__(
        self,
        graph: tf.Graph,
        variables: Sequence,
        loss: tf.Tensor,
        gradients: Sequence[tf.Tensor | None],
        gathers: bool,
    ) -> None:
        self._sizes = [variable.shape.num_elements() * variable.dtype.size for variable in variables]
        self._views = _VIEWS | {"Cast"} if gathers else _VIEWS
        outer = {id(variable.handle): index for index, variable in enumerate(variables)}
        self._handles = {inner.name: outer[id(taken)] for taken, inner in graph.captures if id(taken) in outer}
        targets = [loss, *(g for g in gradients if g is not None)]
        self._operations = _needed(graph, [target.op for target in targets])
        self._is_needed = set(self._operations)
        self._gradients = {g.name: i for i, g in enumerate(gradients) if g is not None}
        self._buffers: dict[int, _Buffer] = {}
        self._live_bytes = 0

    def moments(self) -> Iterator[Moment]:
        for operation in self._operations:
            inputs = [self._buffers[t.name] for t in operation.inputs]
            for place, tensor in enumerate(operation.outputs):
                self._make(operation, place, tensor, inputs)
            results = [self._buffers[t.name] for t in operation.outputs]
            completed = [i for t in operation.outputs if (i := self._gradients.get(t.name)) is not None]
            if completed:
                self._let_go(results)
            live_bytes = self._live_bytes
            for buffer in inputs:
                buffer.uses -= 1
            self._let_go(buffer for buffer in (*results, *inputs) if not buffer.uses)
            reads = tuple(self._reads(operation, inputs))
            yield Moment(live_bytes, reads, next(iter(completed), None), runtime.is_backward(operation))

    def _reads(self, operation: tf.Operation, inputs: Sequence[_Buffer]) -> Iterator[tuple[int, int]]:
        if operation.type in _HELD_ANYWAY | self._views:
            return
        for taken, buffer in zip(operation.inputs, inputs, strict=True):
            if buffer.variable is not None:
                is_value = taken.dtype != tf.resource
                yield buffer.variable, _bytes(taken) if is_value else self._sizes[buffer.variable]

    def _let_go(self, buffers: Iterable[_Buffer]) -> None:
        for buffer in buffers:
            self._live_bytes -= buffer.size
            buffer.size = 0

    def _make(self, operation: tf.Operation, place: int, tensor: tf.Tensor, inputs: Sequence[_Buffer]) -> None:
        key = tensor.name
        uses = sum(taker in self._is_needed for taker in tensor.consumers())  # an operation counts once per input
        buffer = self._passed_on(operation, place, tensor, inputs)
        if buffer is None:
            is_free = operation.type in _HELD_ANYWAY
            buffer = _Buffer(0 if is_free else _bytes(tensor), self._handles.get(key))
            if operation.type == "ReadVariableOp":
                buffer.variable = inputs[0].variable
            self._live_bytes += buffer.size
        buffer.uses += uses
        self._buffers[key] = buffer

    def _passed_on(
        self, operation: tf.Operation, place: int, tensor: tf.Tensor, inputs: Sequence[_Buffer]
    ) -> _Buffer | None:
        """The buffer of the input that the result shares, or None."""
        if operation.type in _VIEWS or (operation.type in self._views and inputs[0].variable is not None):
            return inputs[place if operation.type == "IdentityN" else 0]
        if operation.type not in _IN_PLACE:
            return None
        size = _bytes(tensor)
        for buffer in inputs:
            mine = sum(each is buffer for each in inputs)
            if buffer.size == size and buffer.uses == mine and buffer.variable is None:
                return buffer
        return None


def _needed(graph: tf.Graph, targets: Sequence[tf.Operation]) -> list[tf.Operation]:
    """The targets and all operations that they wait for, in the order in which they were traced."""
    found: set[tf.Operation] = set()
    stack = list(targets)
    while stack:
        operation = stack.pop()
        if operation not in found:
            found.add(operation)
            stack += [tensor.op for tensor in operation.inputs]
            stack += operation.control_inputs
    return [operation for operation in graph.get_operations() if operation in found]


def _bytes(tensor: tf.Tensor) -> int:
    """Bytes of a tensor; 0 if its shape is not known, or its elements have no size."""
    elements = tensor.shape.num_elements() if tensor.shape.rank is not None else None
    return (elements or 0) * (tensor.dtype.size or 0)
