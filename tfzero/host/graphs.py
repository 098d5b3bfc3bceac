"""Private parts of TensorFlow that change a graph while it is being traced.

[Note: automatic order] When a `tf.function` has been traced, TensorFlow adds control dependencies to keep the order of
the program (`AutomaticControlDependencies`): between operations that use one resource, if one of them writes to it; and
along a chain of all stateful operations without a resource. An operation can be declared to run whenever its inputs are
there. The chain leads from one replica to the next. At stage 3 replicas wait for each other in the middle of it: the
second replica's first layer would wait for the first replica's last layer, and that one for the second replica. So each
device gets a chain of its own.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Records an operation on gradient tapes that was made without its Python function.
from tensorflow.python.eager import execute

# Tells which operations will wait for which, once a function has been traced.
from tensorflow.python.framework import auto_control_deps

# Raised for a tensor that depends on its graph's inputs.
from tensorflow.python.ops import op_selector

# Branches and loops are traced in graphs of their own, which have no public class.
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph, WhileBodyFuncGraph

# TensorFlow's attribute of an operation that runs as soon as its inputs are there.
_RUNS_FREELY = "_independent_side_effects"
# TensorFlow's name of a function that it makes for the gradient of another, with a number of this process
# (`_backward_name` in tensorflow/python/eager/polymorphic_function/concrete_function.py).
_NUMBERED = re.compile(r"__(?:forward|backward|inference)_(.+)_\d+")
# Attribute of a graph: for each device, a tensor that stands for its chain of operations.
_CHAINS = "_tfzero_chains"
# Attributes of operations that name the functions they call; a list for "Case".
CALLS = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), ("f",)),
    **dict.fromkeys(("If", "StatelessIf"), ("then_branch", "else_branch")),
    **dict.fromkeys(("Case", "StatelessCase"), ("branches",)),
    **dict.fromkeys(("While", "StatelessWhile"), ("cond", "body")),
}
# Attribute of a `tf.function`: its clone with a changed Python function.
_CHANGED = "_tfzero_changed"


def current_function() -> tf.Graph:
    """The graph of the function that is being traced, outside all branches and loops."""
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, ControlFlowFuncGraph):
        graph = graph.outer_graph
    return graph


def lifted(tensor: tf.Tensor) -> tf.Tensor | None:
    """Computes a graph's tensor outside the graph; None if it depends on the graph's inputs."""

    @tf.function(autograph=False)
    def compute() -> tf.Tensor:
        return tf.__internal__.lift_to_graph([tensor], tf.compat.v1.get_default_graph())[tensor]

    with tf.init_scope():
        try:
            return compute()
        except op_selector.UnliftableError:
            return None


def graphs_around(graph: tf.Graph | None) -> list:
    """A graph and those within which it is traced; empty for None."""
    found = []
    while graph is not None:
        found.append(graph)
        graph = getattr(graph, "outer_graph", None)
    return found


def name_of_function(graph: tf.Graph) -> str:
    """Name of the Python function behind a graph of `current_function`; the same in all processes.

    A prime marks the function of its gradient. Branches and loops do not qualify: TensorFlow numbers their names.
    """
    name, primes = getattr(graph, "name", ""), ""
    while match := _NUMBERED.fullmatch(name):
        name, primes = match[1], primes + "'"
    return name + primes


def cloned(
    function: tf.types.experimental.PolymorphicFunction, change: Callable
) -> tf.types.experimental.PolymorphicFunction:
    """A `tf.function` of the changed Python function, with all other options the same; made once per function."""
    if _CHANGED not in vars(function):
        setattr(function, _CHANGED, function._clone(python_function=change(function.python_function)))
    return getattr(function, _CHANGED)


def converted(function: Callable) -> Callable:
    """A function that AutoGraph converts when it is called, if it converts the code being traced.

    `mirrored_run.py` does the same, but not for what a function of ours calls.
    """
    return tf.__internal__.autograph.tf_convert(function, tf.__internal__.autograph.control_status_ctx())


def run_after(operation: tf.Operation, awaited: tf.Operation) -> None:
    """Makes one operation of a graph wait for another; `tf.control_dependencies` only serves new operations."""
    operation._add_control_input(awaited)


def replace_input(operation: tf.Operation, place: int, value: tf.Tensor) -> None:
    """Makes an operation take another tensor, of the same dtype and shape, as one of its inputs."""
    operation._update_input(place, value)


def copy_operation(operation: tf.Operation, values: dict[int, tf.Tensor], output: int = 0) -> tf.Tensor:
    """Copies an operation, with `values` as its inputs at these places. Returns one output."""
    with tf.device(operation.device):
        copy = operation.graph.create_op(
            operation.type,
            [values.get(place, each) for place, each in enumerate(operation.inputs)],
            [each.dtype for each in operation.outputs],
            attrs=dict(operation.node_def.attr),
            op_def=operation.op_def,
        )
    return copy.outputs[output]


def repeat_operation(operation: tf.Operation, values: dict[int, tf.Tensor], output: int = 0) -> tf.Tensor:
    """Like `copy_operation`, but recorded on gradient tapes, as `gen_math_ops.py` does for its operations."""
    copy = copy_operation(operation, values, output).op
    if execute.must_record_gradient():
        attributes = [each for attr in copy.op_def.attr for each in (attr.name, copy.get_attr(attr.name))]
        execute.record_gradient(copy.type, tuple(copy.inputs), tuple(attributes), copy.outputs)
    return copy.outputs[output]


def run_freely(operation: tf.Operation) -> None:
    """Makes a stateful operation run in any case, as soon as its inputs are there. [Note: automatic order]"""
    manager = operation.graph.experimental_acd_manager
    if manager is not None:
        manager.run_independently(operation)


def chain_by_device(graph: tf.Graph, devices: Sequence[str]) -> None:
    """Gives stateful operations without a resource one chain per device. [Note: automatic order]"""
    if hasattr(graph, _CHAINS):
        return
    chains = {}
    for device in devices:
        with tf.device(device):
            chain = tf.zeros([], name="chain")
        chains[_place(chain.op)] = chain
    setattr(graph, _CHAINS, chains)


@auto_control_deps.register_acd_resource_resolver
def _chain_of_device(operation: tf.Operation, reads: set[tf.Tensor], writes: set[tf.Tensor]) -> bool:
    """Makes a device's chain the resource of a stateful operation that has none."""
    chain = getattr(operation.graph, _CHAINS, {}).get(_place(operation))
    if chain is None or reads or writes or not auto_control_deps.op_is_stateful(operation):
        return False
    writes.add(chain)
    return True


def _place(operation: tf.Operation) -> str:
    """Type and number of an operation's device. Only some device names include the host."""
    return operation.device.rpartition("/")[2]


def ordered_by(operation: tf.Operation) -> list[tuple[int | None, bool]]:
    """What orders an operation: a number for each resource (None for the one chain), and whether it writes to it.

    [Note: automatic order]
    """
    is_stateful = auto_control_deps.op_is_stateful(operation)
    if not is_stateful and all(tensor.dtype != tf.resource for tensor in operation.inputs):
        return []
    with contextlib.suppress(ValueError):  # has no such attribute
        if operation.get_attr(_RUNS_FREELY):
            return []
    resources = [
        (auto_control_deps.ops.tensor_id(tensor), kind is auto_control_deps.ResourceType.READ_WRITE)
        for tensor, kind in auto_control_deps._get_resource_inputs(operation)
    ]
    return resources or [(None, True)] * is_stateful


def fill(function: Callable, value: tf.Tensor, shape: tf.Tensor, name: str) -> tf.Tensor:
    """Makes a tensor of `shape` and has `function(value, tensor)` write into it, both as NumPy arrays with an axis.

    Calls run as soon as their inputs are there, several at once. Callers order those that need it.
    [Note: automatic order]

    TensorFlow does not promise that a CPU tensor and its NumPy array share memory (`TensorToNdarray` in
    tensorflow/python/lib/core/py_func.cc). A result of `tf.numpy_function` would not lie in the allocator's memory.
    """
    out = tf.raw_ops.Empty(shape=shape, dtype=value.dtype)
    run_freely(out.op)
    filled = tf.numpy_function(function, [value, out], [], name=name)
    run_freely(filled)
    with tf.control_dependencies([filled]):
        return tf.identity(out)


def functions_of(operation: tf.Operation) -> list:
    """Graphs of the functions that an operation of `CALLS` calls; empty if they are not known.

    TensorFlow keeps a function by its name in the graph that calls it, or in one around that. The functions have the
    operation's inputs and outputs, except for the input that chooses a branch and the output of a loop's condition.
    """
    functions = [_function(operation.graph, name) for name in _names_of_functions(operation)]
    graphs = [function.graph for function in functions if function is not None]
    inputs = len(operation.inputs) - operation.type.endswith(("If", "Case"))
    outputs = [len(operation.outputs)] * len(functions)
    if operation.type.endswith("While"):
        outputs[0] = 1
    found = [(len(graph.inputs), len(graph.outputs)) for graph in graphs]
    return graphs if found == [(inputs, each) for each in outputs] else []


def calls_around(graph: tf.Graph) -> list[tf.Operation]:
    """The branches and loops around a graph, innermost first; only those that have been traced to their end."""
    calls = []
    while isinstance(graph, ControlFlowFuncGraph):
        around = graph.outer_graph.get_operations()
        calls += [each for each in around if each.type in CALLS and graph.name in _names_of_functions(each)]
        graph = graph.outer_graph
    return calls


def is_in_a_loop(outermost: tf.Graph) -> bool:
    """Whether a loop is being traced within the graph `outermost`."""
    around = graphs_around(tf.compat.v1.get_default_graph())
    within = itertools.takewhile(lambda graph: graph is not outermost, around)
    return any(isinstance(graph, WhileBodyFuncGraph) for graph in within)


def _names_of_functions(operation: tf.Operation) -> list[str]:
    attributes = [operation.get_attr(name) for name in CALLS[operation.type]]
    return [each.name for each in (attributes[0] if isinstance(attributes[0], list) else attributes)]


def _function(graph: tf.Graph, name: str) -> Any:
    found = (each._get_function(name) for each in graphs_around(graph))
    return next((function for function in found if function is not None), None)


def together(results: list) -> list:
    """The same results of a collective, each of which is there when all replicas of this worker have theirs.

    Else what follows from the first result could end the step while another replica still takes part in the
    collective, for which other workers then wait for ever. TensorFlow ends an epoch so: its iterator over data of each
    worker's own adds up how many replicas have a batch, and raises OutOfRangeError if none has.
    """
    if tf.executing_eagerly():
        return results
    with tf.control_dependencies(tf.nest.flatten(results)):
        return tf.nest.map_structure(tf.identity, results)


def is_read_of(tensor: tf.Tensor, variable: tf.Variable) -> bool:
    """In a graph: whether a tensor is what a variable holds, passed on as it is or in another dtype."""
    while tensor.op.type in ("Identity", "EnsureShape", "Cast"):
        tensor = tensor.op.inputs[0]
    return tensor.op.type == "ReadVariableOp" and tensor.op.inputs[0] is tensor.graph.capture(variable.handle)
