"""The edges of a graph that is being traced: all that makes an operation wait for another.

[Note: edges] A new operation waits for older ones only. Stage 3 and pacing make an operation wait for a newer one. The
newer one must not wait for it in turn, or the graph could never run. An operation waits for its inputs, for its control
inputs, and for what TensorFlow adds when the graph has been traced. `Edges` knows all three. It adds the edges that
stage 3 and pacing want, but none that would close a cycle.

It keeps a topological order of the operations: the order of creation, in which a new edge moves operations forward
where needed. To see whether one operation waits for another, it only searches those between the two.
"""

from collections import defaultdict

import tensorflow as tf

from tfzero.host import graphs


class Edges:
    """The edges of one graph. [Note: edges]

    Args:
        graph: the graph.
    """

    def __init__(self, graph: tf.Graph) -> None:
        self._graph = graph
        self._order: list[tf.Operation] = []
        self._places: dict[tf.Operation, int] = {}
        # What TensorFlow will make an operation wait for. [Note: automatic order]
        self._automatic: dict[tf.Operation, set[tf.Operation]] = {}
        self._last_writes: dict[int | None, tf.Operation] = {}
        self._reads_since: defaultdict[int | None, list[tf.Operation]] = defaultdict(list)

    @classmethod
    def of(cls, graph: tf.Graph) -> "Edges":
        """The edges of a graph: one object, shared by all code that changes the graph."""
        if not hasattr(graph, "_tfzero_edges"):
            graph._tfzero_edges = cls(graph)
        return graph._tfzero_edges

    def comes_after(self, operation: tf.Operation, other: tf.Operation) -> bool:
        """Whether an operation waits for another, directly or through others, or is that one."""
        return self._until(operation, other) is None

    def run_after(self, operation: tf.Operation, awaited: tf.Operation) -> bool:
        """Makes an operation wait for another, unless that one waits for it. Returns whether it waits now."""
        if not self._put_before(awaited, operation):
            return False
        graphs.run_after(operation, awaited)
        return True

    def replace_input(self, operation: tf.Operation, place: int, value: tf.Tensor) -> bool:
        """Makes an operation take another tensor, unless that one waits for it. Returns whether it takes it now."""
        if not self._put_before(value.op, operation):
            return False
        graphs.replace_input(operation, place, value)
        return True

    def _put_before(self, operation: tf.Operation, other: tf.Operation) -> bool:
        """Moves an operation and what it waits for before `other`. Returns False if it waits for `other`."""
        moved = self._until(operation, other)
        if moved:
            begin, end = self._places[other], self._places[operation] + 1
            between = self._order[begin:end]
            self._order[begin:end] = [o for o in between if o in moved] + [o for o in between if o not in moved]
            for place in range(begin, end):
                self._places[self._order[place]] = place
        return moved is not None

    def _until(self, operation: tf.Operation, other: tf.Operation) -> set[tf.Operation] | None:
        """An operation and all that it waits for, if behind `other` in the order; None if `other` is among them."""
        self._look()
        found: set[tf.Operation] = set()
        stack = [operation]
        while stack:
            current = stack.pop()
            if current is other:
                return None
            if current not in found and self._places[current] > self._places[other]:
                found.add(current)
                stack += self._waited_for(current)
        return found

    def _waited_for(self, operation: tf.Operation) -> list[tf.Operation]:
        inputs = [tensor.op for tensor in operation.inputs]
        return [*inputs, *operation.control_inputs, *self._automatic.get(operation, ())]

    def _look(self) -> None:
        """Adds new operations to the order."""
        if self._graph.num_operations() == len(self._order):
            return
        known = len(self._order)
        new = self._graph.get_operations()[known:]
        self._order += new
        self._places.update((operation, known + place) for place, operation in enumerate(new))
        for operation in new:
            self._foresee(operation)
        for operation in new:
            # The gradient of a loop gives the loop itself new inputs.
            for user in (user for output in operation.outputs for user in output.consumers()):
                if self._places[user] < self._places[operation]:
                    self._put_before(operation, user)

    def _foresee(self, operation: tf.Operation) -> None:
        """Records what TensorFlow will make a new operation wait for. [Note: automatic order]"""
        awaited = set()
        for resource, is_written in graphs.ordered_by(operation):
            if resource in self._last_writes:
                awaited.add(self._last_writes[resource])
            if is_written:
                awaited.update(self._reads_since.pop(resource, ()))
                self._last_writes[resource] = operation
            else:
                self._reads_since[resource].append(operation)
        if awaited:
            self._automatic[operation] = awaited
