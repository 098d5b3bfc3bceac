"""Derives how one device's tensors follow from the replicas', by walking through the operations that made them.

See [Note: kinds] in `rows/kinds.py`. `rows/sums.py` knows what adds up, `rows/moves.py` knows where rows are, and this
module handles functions, branches and loops.
"""

from collections.abc import Callable, Iterable

import tensorflow as tf

from tfzero.host import batch_rows, graphs, runtime
from tfzero.rows.kinds import COUNT, MEAN, MIXED, OTHER, OWN, ROWS, SAME, SUM, Kind, is_global, mark, mark_global
from tfzero.rows.sums import ADDED, LINEAR_IN, SCATTERED, kind_of_result, linear_places

__all__ = [
    "COUNT", "MEAN", "MIXED", "OTHER", "OWN", "ROWS", "SAME", "SUM", "Dependence", "is_global", "mark", "mark_global",
]  # fmt: skip

# Operations that stop gradients.
_STOPPED = {"StopGradient", "PreventGradient"}
_PASSED = {"Identity", "IdentityN", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape", "Snapshot"}
_COLLECTIVES = {
    "CollectiveReduce", "CollectiveReduceV2", "CollectiveGather", "CollectiveGatherV2", "CollectiveBcastRecvV2",
    "CollectiveBcastSendV2",
}  # fmt: skip
# Stateful operations whose equal inputs give equal results.
_DETERMINED = {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "Empty"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_LOOPS = {"While", "StatelessWhile"}


class Dependence:
    """The kinds of the tensors of one replica's graph and of the graphs within it.

    Args:
        given: the arguments of the replica's function, as tensors and their kinds.
        graph: the graph in which the replicas are traced. Its other placeholders, and those of graphs around it, are
            the same on all replicas.
    """

    def __init__(self, given: Iterable[tuple[tf.Tensor, Kind]], graph: tf.Graph | None = None) -> None:
        self._given = list(given)  # keeps them alive, as `_known` identifies them by id
        self._known = {_key(tensor): kind for tensor, kind in self._given}
        self._around = graphs.graphs_around(graph)
        self._captures: dict[int, tuple] = {}
        self._within: dict[tuple, list[Kind]] = {}
        self._updates: list[tuple[str, object]] = []

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
                self._known[_key(each)] = self._kind_from(each, kinds)
                waiting.pop()
        return self._known[_key(tensor)]

    def _kind_from(self, tensor: tf.Tensor, kinds: list[Kind]) -> Kind:
        """The kind of a tensor, given the kinds of its sources."""
        if self._is_own(tensor):
            return OWN
        is_made = not isinstance(tensor, batch_rows.EagerTensor) and not hasattr(tensor, "_tfzero_kind")
        if is_made and tensor.op.type in graphs.CALLS:
            return self._kinds_of_call(tensor.op)[tensor.value_index]
        if is_made and tensor.op.type == "Placeholder" and any(tensor.graph is each for each in self._around):
            return SAME
        return _kind(tensor, kinds)

    def _kinds_of_call(self, operation: tf.Operation) -> list[Kind]:
        """The kinds of the outputs of an operation that calls functions: a `tf.function`, a branch or a loop."""
        key = id(operation.graph), operation.name, len(operation.outputs)  # a gradient adds outputs to a loop
        if key not in self._within:
            functions = graphs.functions_of(operation)
            kinds = [SAME if each.dtype == tf.resource else self._known[_key(each)] for each in operation.inputs]
            if not functions:
                found = [OTHER] * len(operation.outputs)
            elif operation.type in _LOOPS:
                found = _of_loop(functions[0], functions[1], kinds)
            elif operation.type in _BRANCHES:
                found = _of_branches(functions, kinds)
            else:
                found = _of_function(functions[0], kinds)
            # The result of a function cannot be taken apart from outside.
            self._within[key] = [OTHER if kind == MIXED else kind for kind in found]
        return self._within[key]

    def note_update(self, name: str) -> None:
        """Notes that a variable is updated here, for `check_updates`."""
        self._updates.append((name, tf.compat.v1.get_default_graph()))

    def check_updates(self) -> None:
        """Refuses updates that only some replicas make: their states would diverge, or they would wait for the others.

        Call it after tracing: the condition of a branch is not known while the branch is traced.
        """
        for name, graph in self._updates:
            for operation in graphs.calls_around(graph):
                if not self._is_taken_everywhere(operation):
                    raise ValueError(
                        f"The variable {name!r} is updated in a branch or a loop whose condition is not seen to be the "
                        "same on all replicas, as it depends on the replica's rows of the batch. Update it always, "
                        "for example by `tf.where(condition, new, old)`, or take a condition of the whole batch, "
                        "for example by `tf.distribute.get_replica_context().all_reduce`."
                    )

    def _is_taken_everywhere(self, operation: tf.Operation) -> bool:
        if operation.type not in _LOOPS:
            return self.kind(operation.inputs[0]) == SAME
        functions = graphs.functions_of(operation)
        if not functions:
            return False
        condition, body = functions
        kinds = [SAME if each.dtype == tf.resource else self.kind(each) for each in operation.inputs]
        return _is_round_for_all(condition, _before_a_round(body, kinds))

    def _is_own(self, tensor: tf.Tensor) -> bool:
        """Whether a tensor is read from a variable in which each replica accumulates by itself."""
        if isinstance(tensor, batch_rows.EagerTensor) or tensor.op.type != "ReadVariableOp":
            return False
        handle = tensor.op.inputs[0]
        while handle is not None and not isinstance(handle, batch_rows.EagerTensor):
            handle = self._outer(handle)
        return isinstance(batch_rows.container_of(handle), runtime.SyncOnReadVariable)

    def split(self, tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        """Splits a tensor into parts that add up to it, by the names of their kinds. Only "mixed" has several parts."""
        kind = self.kind(tensor)
        if kind != MIXED:
            return {{COUNT.name: SUM.name, "shape": OTHER.name}.get(kind.name, kind.name): tensor}
        operation = tensor.op
        if operation.type in ("Placeholder", *_PASSED):
            parts = self.split(self._sources(tensor)[0])
            return parts if operation.type not in _STOPPED else {k: tf.stop_gradient(v) for k, v in parts.items()}
        inputs = list(operation.inputs)
        if operation.type in ADDED:
            return self._split_sum(operation.type, inputs, tensor)
        if operation.type in SCATTERED:
            return self._split_scattered(operation.type, inputs)
        if operation.type in LINEAR_IN:
            return self._split_linear(operation, tensor.value_index)
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

    def _split_scattered(self, operation_type: str, inputs: list) -> dict[str, tf.Tensor]:
        added = tf.scatter_nd(inputs[1], inputs[2], tf.shape(inputs[0], inputs[1].dtype))
        parts = self.split(inputs[0])
        added = -added if operation_type == "TensorScatterSub" else added
        return parts | {SUM.name: parts[SUM.name] + added if SUM.name in parts else added}

    def _split_linear(self, operation: tf.Operation, output: int) -> dict[str, tf.Tensor]:
        inputs = list(operation.inputs)
        parts = {place: self.split(inputs[place]) for place in linear_places(operation, [self.kind(t) for t in inputs])}
        found = {}
        for name in dict.fromkeys(name for each in parts.values() for name in each):
            taken = {k: each[name] if name in each else tf.zeros_like(inputs[k]) for k, each in parts.items()}
            found[name] = graphs.repeat_operation(operation, taken, output)
        return found

    def _sources(self, tensor: tf.Tensor) -> list:
        """The tensors that a tensor depends on, except variables."""
        if hasattr(tensor, "_tfzero_kind") or isinstance(tensor, batch_rows.EagerTensor):
            return []
        operation = tensor.op
        if operation.type == "Placeholder":
            outer = self._outer(tensor)
            return [] if outer is None or outer.dtype in (tf.resource, tf.variant) else [outer]
        if operation.type in _PASSED:
            return [operation.inputs[tensor.value_index]]
        return [each for each in operation.inputs if each.dtype != tf.resource]

    def _outer(self, placeholder: tf.Tensor) -> tf.Tensor | None:
        """The tensor of the enclosing graph that was captured as this placeholder, or None."""
        graph = placeholder.graph
        count, captures = self._captures.get(id(graph), (-1, {}))
        pairs = getattr(graph, "captures", [])
        if len(pairs) != count:
            captures = {_key(inner): outer for outer, inner in pairs}
            self._captures[id(graph)] = len(pairs), captures
        return captures.get(_key(placeholder))


def _of_function(graph: tf.Graph, kinds: list[Kind]) -> list[Kind]:
    """The kinds of a function's results, for inputs of these kinds."""
    within = Dependence(zip(graph.inputs, kinds, strict=True))
    return [within.kind(each) for each in graph.outputs]


def _of_branches(functions: list, kinds: list[Kind]) -> list[Kind]:
    """The kinds of a conditional's results; OTHER unless all replicas take the same branch."""
    found = [_of_function(function, kinds[1:]) for function in functions]
    # A number of rows counts as a sum here.
    alike = [{SUM if kind == COUNT else kind for kind in each} for each in zip(*found, strict=True)]
    return [each.pop() if kinds[0] == SAME and len(each) == 1 else OTHER for each in alike]


def _of_loop(condition: tf.Graph, body: tf.Graph, kinds: list[Kind]) -> list[Kind]:
    """The kinds of a loop's results; OTHER unless all replicas run the same number of rounds."""
    kinds = _before_a_round(body, kinds)
    return kinds if _is_round_for_all(condition, kinds) else [OTHER] * len(kinds)


def _before_a_round(body: tf.Graph, kinds: list[Kind]) -> list[Kind]:
    """The kinds of the loop variables that hold before and after each round."""
    for _ in range(len(kinds) + 1):
        after = _of_function(body, kinds)
        together = [_of_both(before, kind, each) for before, kind, each in zip(kinds, after, body.inputs, strict=True)]
        if together == kinds:
            break
        kinds = together
    return kinds


def _is_round_for_all(condition: tf.Graph, kinds: list[Kind]) -> bool:
    return _of_function(condition, kinds)[0] == SAME


def _of_both(before: Kind, after: Kind, value: tf.Tensor) -> Kind:
    """The kind of a loop variable, before and after a round. A tensor list is empty before the first round."""
    if before == after:
        return before
    return after if before == SAME and after.name == "rows" and value.dtype == tf.variant else OTHER


def _key(tensor: tf.Tensor) -> int | tuple[int, str]:
    return id(tensor) if isinstance(tensor, batch_rows.EagerTensor) else (id(tensor.graph), tensor.name)


def _kind(tensor: tf.Tensor, kinds: list[Kind]) -> Kind:
    """The kind of a tensor that no called function gives, from the kinds of its sources."""
    if hasattr(tensor, "_tfzero_kind"):
        return tensor._tfzero_kind
    if isinstance(tensor, batch_rows.EagerTensor):
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
    return kind_of_result(tensor, kinds)


def _rebuilder(operation: tf.Operation, place: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function that applies an operation, linear in its input at `place`, to a part of that input."""
    inputs = list(operation.inputs)
    if operation.type == "Mul":
        return lambda part: part * inputs[1 - place]
    return lambda part: graphs.repeat_operation(operation, {0: part})
