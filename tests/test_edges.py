"""Edges that are added to a graph never close a cycle, with what TensorFlow adds when the graph is finished."""

import numpy as np
import pytest
import tensorflow as tf

from tfzero.host import graphs
from tfzero.host.edges import Edges
from tfzero.training.pacing import Pacer


def traced(build):
    """A function's concrete function; it takes a scalar."""
    return tf.function(build, autograph=False).get_concrete_function(tf.TensorSpec([], tf.float32))


def identity(x, name):
    """A stateful operation without a resource."""
    return tf.numpy_function(lambda x: x, [x], tf.float32, name=name)


def origin(value) -> tf.Operation:
    """What gives a value, or the operation that is given."""
    operation = getattr(value, "op", value)
    return origin(operation.inputs[0]) if operation.type == "Identity" else operation


def waits(function, operation, other):
    """Whether an operation waits for another in a finished graph, by their names."""
    by_name = {each.name: each for each in function.graph.get_operations()}
    seen, stack = set(), [by_name[operation]]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += [*(tensor.op for tensor in current.inputs), *current.control_inputs]
    return by_name[other] in seen


def test_what_waits_by_inputs_and_control_inputs():
    def build(x):
        first = tf.exp(x)
        with tf.control_dependencies([first]):
            second = tf.sin(x)
        third, apart = second + 1, tf.cos(x)
        edges = Edges.of(x.graph)
        assert edges is Edges.of(x.graph)
        assert edges.comes_after(third.op, first.op) and edges.comes_after(first.op, first.op)
        assert not edges.comes_after(first.op, third.op) and not edges.comes_after(third.op, apart.op)
        return third

    traced(build)


@pytest.mark.parametrize("ordering", ["chain", "written", "read then written", "in functions"])
def test_an_edge_against_automatic_order_is_refused(ordering):
    """`second` will wait for `first`, which nothing says while the function is traced."""
    variable = tf.Variable(1.0)

    def operations(x):
        if ordering == "chain":
            return identity(x, "first"), identity(x, "second")
        if ordering == "written":
            return variable.assign(x, read_value=False), variable.assign(2 * x, read_value=False)
        if ordering == "read then written":
            return variable.read_value(), variable.assign(x, read_value=False)
        assign = tf.function(lambda x: variable.assign_add(x), autograph=False)
        return assign(x), assign(x)

    def build(x):
        first, second = map(origin, operations(x))
        newer = tf.exp(x)
        edges = Edges.of(x.graph)
        assert edges.comes_after(second, first) and not edges.comes_after(first, second)
        assert not edges.run_after(first, second)
        assert edges.run_after(first, newer.op)
        with tf.control_dependencies([second]):
            newest = tf.sin(x)
        assert not edges.replace_input(first, 0, newest)
        names.extend([first.name, second.name, newer.op.name])
        return x

    names: list[str] = []
    function = traced(build)
    first, second, newer = names
    assert waits(function, second, first) and waits(function, first, newer)
    function(tf.constant(1.0))


def test_reads_do_not_wait_for_each_other():
    variable = tf.Variable(1.0)

    def build(x):
        first, second = (variable.read_value().op.inputs[0].op for _ in range(2))
        assert Edges.of(x.graph).run_after(first, second)
        return variable.read_value()

    assert float(traced(build)(tf.constant(1.0))) == 1


def test_an_older_operation_leads_to_a_newer_one():
    """By an edge that was added before: what is older than both must be looked through."""

    def build(x):
        old = tf.exp(x)
        after_old = old + 1
        middle = tf.sin(x)
        after_middle = middle + 1
        edges = Edges.of(x.graph)
        assert edges.run_after(old.op, after_middle.op)
        assert edges.comes_after(after_old.op, middle.op)
        new = after_old + 2
        assert not edges.run_after(middle.op, new.op)
        assert edges.replace_input(after_old.op, 1, tf.cos(x))
        return new

    assert np.isfinite(traced(build)(tf.constant(1.0)))


def test_random_edges_never_close_a_cycle():
    """A graph that TensorFlow accepts has none. Of those that are refused, each would have closed one."""
    random = np.random.default_rng(0)
    variable = tf.Variable(1.0)
    counts = {True: 0, False: 0}

    def build(x):
        tensors = [x]
        edges = Edges.of(x.graph)
        for _ in range(300):
            one, other = (tensors[k] for k in random.integers(len(tensors), size=2))
            kind = random.integers(8)
            if kind == 0:
                tensors.append(identity(one + other, "own"))
                tensors[-1].set_shape([])
            elif kind == 1:
                with tf.control_dependencies([variable.assign(one, read_value=False)]):
                    tensors.append(tf.identity(other))
            elif kind == 2:
                with tf.control_dependencies([one]):
                    tensors.append(variable.read_value())
            elif kind < 5 or one.op.type == "Placeholder":
                tensors.append(one * other)
            else:
                found = edges.comes_after(other.op, one.op)
                assert edges.run_after(one.op, other.op) is not found
                assert edges.comes_after(one.op, other.op) is (not found or one is other)
                counts[found] += 1
        return tf.add_n(tensors)

    function = traced(build)
    function(tf.constant(1.0))
    assert min(counts.values()) > 20
    # Of the finished graph a full search finds what `Edges` has foreseen.
    edges = Edges.of(function.graph)
    operations = [op for op in function.graph.get_operations() if op in edges._automatic]
    for operation in operations[::5]:
        for awaited in edges._automatic[operation]:
            assert waits(function, operation.name, awaited.name)


def test_the_gradient_of_a_loop():
    """It gives the loop inputs that are newer."""

    def build(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            edges = Edges.of(x.graph)
            y = tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h * x)), [0, x])[1]
            assert edges.comes_after(y.op, x.op)
        gradient = tape.gradient(y, x)
        loop = next(op for op in x.graph.get_operations() if op.type == "StatelessWhile")
        newer = [t.op for t in loop.inputs if edges.comes_after(loop, t.op) and t.op._id > loop._id]
        assert newer
        assert not edges.run_after(newer[0], gradient.op)
        return gradient

    assert np.isfinite(traced(build)(tf.constant(0.5)))


def test_pacing_sees_what_is_ordered_automatically():
    """A reduced gradient that will wait for the next gradient's origin: that does not wait for it."""

    def build(x):
        one = identity(x, "one")
        other = identity(x, "other")
        one.set_shape([]), other.set_shape([])
        pacer = Pacer(window_bytes=0)
        reduced = identity(other, "reduced")
        reduced.set_shape([])
        pacer.add(reduced, [other], 4)
        pacer.add(tf.identity(one), [one], 4)
        pacer.add(tf.exp(x), [tf.sin(x)], 4)
        (sine,) = (op for op in x.graph.get_operations() if op.type == "Sin")
        assert [op.name for op in sine.control_inputs]
        return one + reduced

    assert float(traced(build)(tf.constant(1.0))) == 2


def test_each_device_has_a_chain_of_its_own():
    def build(x):
        graphs.chain_by_device(x.graph, ["CPU:0", "CPU:1"])
        made = []
        for device in ("CPU:0", "CPU:1", "CPU:0"):
            with tf.device(device):
                made.append(identity(x, "own").op)
        edges = Edges.of(x.graph)
        assert not edges.comes_after(made[1], made[0]) and edges.comes_after(made[2], made[0])
        names.extend(op.name for op in made)
        return x

    names: list[str] = []
    function = traced(build)
    assert not waits(function, names[1], names[0]) and not waits(function, names[2], names[1])
    assert waits(function, names[2], names[0])


def test_what_fills_runs_freely_and_surely():
    """Nothing is chained, and what nobody takes runs too."""
    ran = []

    def note(value, out):
        ran.append(float(value[0]))
        out[...] = value

    def build(x):
        own = identity(x, "own")
        filled = [graphs.fill(note, tf.reshape(x + k, [1]), [1], "note") for k in range(3)]
        edges = Edges.of(x.graph)
        calls = [op for op in x.graph.get_operations() if op.type == "PyFunc"]
        assert len(calls) == 4
        for one in calls:
            assert [edges.comes_after(one, other) for other in calls if other is not one] == [False] * 3
        names.extend(op.name for op in calls)
        return own + tf.reshape(filled[0], [])

    names: list[str] = []
    function = traced(build)
    for one in names:
        assert not any(waits(function, one, other) for other in names if other != one)
    function(tf.constant(1.0))
    assert sorted(ran) == [1, 2, 3]
