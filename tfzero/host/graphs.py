"""What tfzero uses of TensorFlow's private parts to change a graph that is being traced.

[Note: automatic order] When a `tf.function` has been traced, TensorFlow makes operations wait that are to run in the
order of the program (`AutomaticControlDependencies`): those that use one resource, of which one writes to it; and all
stateful ones without a resource, in one chain. An operation can be declared to run whenever its inputs are there.
That chain leads from one replica to the next. At stage 3 replicas wait for each other in the middle of it, so that the
second one's first layer would wait for the first one's last layer, and that for the second one: each has its own.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Tells gradient tapes of an operation that was made without its function.
from tensorflow.python.eager import execute

# Tells which operations will wait for which, once a function has been traced.
from tensorflow.python.framework import auto_control_deps

# Branches and loops are traced in graphs of their own, which have no public class.
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph, WhileBodyFuncGraph

# TensorFlow's attribute of an operation that runs as soon as its inputs are there.
_RUNS_FREELY = "_independent_side_effects"
# TensorFlow's name of a function that it makes for the gradient of another, which it numbers in each process
# (`_backward_name` in tensorflow/python/eager/polymorphic_function/concrete_function.py).
_NUMBERED = re.compile(r"__(?:forward|backward|inference)_(.+)_\d+")
# Attribute of a graph: by device, what stands for the chain of the operations there.
_CHAINS = "_tfzero_chains"
# Attributes of operations that name the functions they call; of "Case" a list.
CALLS = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), ("f",)),
    **dict.fromkeys(("If", "StatelessIf"), ("then_branch", "else_branch")),
    **dict.fromkeys(("Case", "StatelessCase"), ("branches",)),
    **dict.fromkeys(("While", "StatelessWhile"), ("cond", "body")),
}
# Attribute of a `tf.function`: its clone of another Python function.
_CHANGED = "_tfzero_changed"


def current_function() -> tf.Graph:
    """The graph of the function that is being traced, around all branches and loops."""
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, ControlFlowFuncGraph):
        graph = graph.outer_graph
    return graph


def graphs_around(graph: tf.Graph | None) -> list:
    """A graph, and those within which it is traced; none of None."""
    found = []
    while graph is not None:
        found.append(graph)
        graph = getattr(graph, "outer_graph", None)
    return found


def name_of_function(graph: tf.Graph) -> str:
    """The name of a Python function, from what `current_function` gave; the same in all processes.

    That of its gradient's function is marked by a prime. Of branches and loops TensorFlow's names have numbers.
    """
    name, primes = getattr(graph, "name", ""), ""
    while match := _NUMBERED.fullmatch(name):
        name, primes = match[1], primes + "'"
    return name + primes


def cloned(
    function: tf.types.experimental.PolymorphicFunction, change: Callable
) -> tf.types.experimental.PolymorphicFunction:
    """A `tf.function` of the changed Python function with all other options the same; made once for a function."""
    if _CHANGED not in vars(function):
        setattr(function, _CHANGED, function._clone(python_function=change(function.python_function)))
    return getattr(function, _CHANGED)


def converted(function: Callable) -> Callable:
    """A function that AutoGraph converts when it is called, if it converts what is traced now.

    `mirrored_run.py` asks for the same, but not for what a function of ours calls.
    """
    return tf.__internal__.autograph.tf_convert(function, tf.__internal__.autograph.control_status_ctx())


def run_after(operation: tf.Operation, awaited: tf.Operation) -> None:
    """Makes one operation of a graph wait for another; `tf.control_dependencies` only serves new operations."""
    operation._add_control_input(awaited)


def replace_input(operation: tf.Operation, place: int, value: tf.Tensor) -> None:
    """Makes an operation take another tensor, of the same dtype and shape, as one of its inputs."""
    operation._update_input(place, value)


def copy_operation(operation: tf.Operation, values: dict[int, tf.Tensor], output: int = 0) -> tf.Tensor:
    """An output of a copy that takes `values` as its inputs at these places."""
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
    """As `copy_operation`, of which gradient tapes know as of any operation (as in `gen_math_ops.py`)."""
    copy = copy_operation(operation, values, output).op
    if execute.must_record_gradient():
        attributes = [each for attr in copy.op_def.attr for each in (attr.name, copy.get_attr(attr.name))]
        execute.record_gradient(copy.type, tuple(copy.inputs), tuple(attributes), copy.outputs)
    return copy.outputs[output]


def run_freely(operation: tf.Operation) -> None:
    """Lets a stateful operation run as soon as its inputs are there, and surely. [Note: automatic order]"""
    manager = operation.graph.experimental_acd_manager
    if manager is not None:
        manager.run_independently(operation)


def chain_by_device(graph: tf.Graph, devices: Sequence[str]) -> None:
    """Gives stateful operations without a resource a chain for each of the devices. [Note: automatic order]"""
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
    """Takes a device's chain for the resource of a stateful operation that has none."""
    chain = getattr(operation.graph, _CHAINS, {}).get(_place(operation))
    if chain is None or reads or writes or not auto_control_deps.op_is_stateful(operation):
        return False
    writes.add(chain)
    return True


def _place(operation: tf.Operation) -> str:
    """Type and number of an operation's device: some name the host, others do not."""
    return operation.device.rpartition("/")[2]


def ordered_by(operation: tf.Operation) -> list[tuple[int | None, bool]]:
    """What orders an operation: a number for each resource, None for the one chain; and whether it writes to it.

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
    """A tensor of `shape` after `function(value, tensor)` has written into it, both as NumPy arrays, with an axis.

    Calls run as soon as their inputs are there, several at once: their caller orders those that need it.
    [Note: automatic order]

    That a CPU tensor and the array that stands for it share memory is not promised (`TensorToNdarray` in
    tensorflow/python/lib/core/py_func.cc); a result of `tf.numpy_function` would not lie in the allocator's memory.
    """
    out = tf.raw_ops.Empty(shape=shape, dtype=value.dtype)
    run_freely(out.op)
    filled = tf.numpy_function(function, [value, out], [], name=name)
    run_freely(filled)
    with tf.control_dependencies([filled]):
        return tf.identity(out)


def functions_of(operation: tf.Operation) -> list:
    """The graphs of the functions that an operation calls, of those of `CALLS`; none if they are not known.

    TensorFlow keeps a function by its name in the graph that calls it, or in one around. Their inputs and outputs are
    those of the operation, but for what chooses a branch and what a loop's condition gives.
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
    """The branches and loops within which a graph is, from the inside; those that have been traced to their end."""
    calls = []
    while isinstance(graph, ControlFlowFuncGraph):
        around = graph.outer_graph.get_operations()
        calls += [each for each in around if each.type in CALLS and graph.name in _names_of_functions(each)]
        graph = graph.outer_graph
    return calls


def is_in_a_loop(outermost: tf.Graph) -> bool:
    """Whether a loop is traced, within the graph `outermost`."""
    around = graphs_around(tf.compat.v1.get_default_graph())
    within = itertools.takewhile(lambda graph: graph is not outermost, around)
    return any(isinstance(graph, WhileBodyFuncGraph) for graph in within)


def _names_of_functions(operation: tf.Operation) -> list[str]:
    attributes = [operation.get_attr(name) for name in CALLS[operation.type]]
    return [each.name for each in (attributes[0] if isinstance(attributes[0], list) else attributes)]


def _function(graph: tf.Graph, name: str) -> Any:
    found = (each._get_function(name) for each in graphs_around(graph))
    return next((function for function in found if function is not None), None)
