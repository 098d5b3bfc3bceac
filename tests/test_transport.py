"""The seam for transports: a fourth one is one class and one row, and nothing else knows which one carries."""

import ast
import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import keras
import oracle
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep

import tfzero
from tfzero.collectives import group as group_module
from tfzero.collectives import transport_choice, ways
from tfzero.collectives.group import Group
from tfzero.collectives.over_links import OverLinks
from tfzero.collectives.rings import Rings
from tfzero.collectives.transport import BY_COUNTS, Surroundings, Transport
from tfzero.collectives.transport_choice import choose

ROOT = Path(__file__).parents[1]

# A fourth one.

noted: list[dict] = []  # what replicas of this process had carried, in the order of the program


class Noting(Transport):
    """Rings that note and check each call."""

    name = "noting"
    title = "a transport of a test"
    rows = ways.RINGS

    @classmethod
    def merit(cls, where):
        return f"a test wants it on {where.devices} devices of {where.workers} workers"

    def describe(self, is_between):
        return f"noted {'between processes' if is_between else 'within one'}"

    def all_reduce(self, value, call):
        return self._noted(ways.ALL_REDUCE, value, call)

    def all_to_all(self, rows, call):
        assert rows.shape[0] == call.members
        return self._noted(ways.ALL_TO_ALL, rows, call)

    def all_gather(self, row, call):
        return self._noted(ways.ALL_GATHER, row, call)

    def broadcast(self, value, call):
        assert value.shape.is_fully_defined()
        return self._noted(ways.BROADCAST, value, call)

    def _noted(self, primitive, value, call):
        assert ways.choose(primitive, value.dtype.name, ways.Place()).dtype == "", "travels in a dtype of its row"
        assert 0 <= call.rank < call.members and call.key > 0
        assert (call.size is None) or not value.shape.is_fully_defined() or value.shape.rank == 1
        assert call.token is not None
        noted.append({"primitive": primitive, "replica": (call.group_key, call.rank), "key": call.key,
                      "bound": (primitive, value.dtype.name, str(value.shape), call.lane)})  # fmt: skip
        return getattr(Rings(), primitive)(value, call)


def check_noted(ranks_here: int) -> None:
    """Each replica of this process had the same carried, in the same order, under keys that mean one thing."""
    meanings: dict = {}
    sequences: dict = {}
    for call in noted:
        assert meanings.setdefault(call["key"], call["bound"]) == call["bound"]
        sequences.setdefault(call["replica"], []).append(call["key"])
    counts = Counter(map(tuple, sequences.values()))
    assert counts and all(count % ranks_here == 0 for count in counts.values())


def train_over_noting(stages) -> list[dict]:
    """In a process: what came of training at each stage, and of what it sent."""
    transport_choice.TRANSPORTS.insert(0, Noting)
    found = []
    for stage in stages:
        noted.clear()
        keras.utils.set_random_seed(1)
        strategy = tfzero.ZeroStrategy(stage, min_shard_elements=8)
        with strategy.scope():
            model = oracle.dense_model()
        initial = model.get_weights()
        arguments = {"optimizer": keras.optimizers.Adam(0.01), "loss": "categorical_crossentropy"}
        outcome = oracle.train(model, *oracle.Data().arrays(), arguments, only_fit=True, epochs=2)
        check_noted(len(strategy.extended.worker_devices))
        transport = strategy.extended.group.transport
        found.append({
            "initial": initial, "outcome": dataclasses.asdict(outcome), "name": transport.name,
            "reason": transport.reason, "algorithm": strategy.report().options["algorithm"],
            "primitives": {call["primitive"] for call in noted},
        })  # fmt: skip
    return found


def train_and_differ(stages) -> tuple[list[dict], str]:
    """The same, and the error where the last worker has made one more group before a strategy."""
    found = train_over_noting(stages)
    if os.environ.get("TF_CONFIG") and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
        next(group_module._group_keys)
    try:
        tfzero.ZeroStrategy()
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.fixture(scope="module", params=[sweep((1, 2)), sweep((2, 1)), (2, 2)], ids=["1x2", "2x1", "2x2"])
def over_noting(request):
    workers, devices = request.param
    stages = (0, 1, 2, 3)
    found = tfzero.run_local(
        train_and_differ, workers=workers, cpu_devices=devices, args=(stages,), timeout_seconds=FLEET_SECONDS
    )
    return workers, devices, found


def test_a_fourth_transport_is_one_class_and_one_row(over_noting):
    workers, devices, found = over_noting
    reference = oracle.dense_model()
    initial = found[0][0][0]["initial"]
    reference.set_weights(initial)
    arguments = {"optimizer": keras.optimizers.Adam(0.01), "loss": "categorical_crossentropy"}
    expected = oracle.train(reference, *oracle.Data().arrays(), arguments, only_fit=True, epochs=2)
    for of_worker, _ in found:
        for told in of_worker:
            assert told["name"] == "noting"
            assert told["reason"] == f"a test wants it on {devices} devices of {workers} workers"
            assert told["algorithm"] == ("noted between processes" if workers > 1 else "noted within one")
            assert told["primitives"] == {*ways.PRIMITIVES} - {ways.REDUCE_SCATTER}, "its rows have none"
            assert all((mine == first).all() for mine, first in zip(told["initial"], initial, strict=True))
            oracle.assert_same(oracle.Outcome(**told["outcome"]), expected)


def test_workers_whose_groups_have_other_keys_are_told(over_noting):
    workers, _, found = over_noting
    for _, error in found:
        if workers == 1:
            assert error == ""
        else:
            assert re.match(r"The workers' earlier strategies differ: key of the new group is 10\d+ on ", error), error


def test_a_transport_without_a_primitive_says_so():
    class Half(Rings):
        name = "half"
        all_gather = Transport.all_gather

    group = Group(["/CPU:0", "/CPU:1"], 2, 0, Half())
    with pytest.raises(NotImplementedError, match="'half' has no all_gather: its rows of `ways.TABLE` must give"):
        group.launch(group.all_gather, [tf.ones([3])] * 2)


# The choice.


def test_the_choice_and_its_reason():
    links = {"links": (SimpleNamespace(workers=2),) * 2}
    for where, name, reason in (
        (Surroundings("CPU", 2), "ring", "all replicas are CPU devices of one process"),
        (Surroundings("CPU", 2, 2, links), "ring", "workers have several CPU devices each"),
        (Surroundings("CPU", 1, 2), "ring", "a worker has too few threads to wait"),
        (Surroundings("CPU", 1, 2, links), "links", "each worker has one CPU device, and threads enough"),
        (Surroundings("GPU", 1, 2, links), "ring", "replicas share GPUs, which NCCL refuses"),
    ):
        transport = choose(where)
        assert transport.name == name and transport.reason.startswith(reason)


def test_no_transport_is_an_error(monkeypatch):
    monkeypatch.setattr(transport_choice, "TRANSPORTS", [OverLinks])
    with pytest.raises(ValueError, match="No transport carries collectives among .*CPU.*: all replicas are CPU"):
        choose(Surroundings("CPU", 2))


# What orders.


def of_two_workers():
    """Over links, which nothing uses: the first of two workers."""
    return OverLinks([SimpleNamespace(workers=2)] * 2)


def test_what_would_have_no_order_is_refused():
    class Counted(Rings):
        ordering = BY_COUNTS

    with pytest.raises(ValueError, match="are ordered by their counts, which are kept between processes only"):
        Group(["/CPU:0", "/CPU:1"], 2, 0, Counted())
    with pytest.raises(ValueError, match="Connections of 2 workers carry .* Received: 2 devices .*, 4 replicas in all"):
        Group(["/CPU:0", "/CPU:1"], 4, 0, of_two_workers())
    with pytest.raises(ValueError, match="Received: 1 devices in this process, 3 replicas in all"):
        Group(["/CPU:0"], 3, 0, of_two_workers())
    with pytest.raises(ValueError, match="shorter|longer"):
        OverLinks([SimpleNamespace(workers=2)])


def test_counts_order_what_links_carry():
    """In the graph each collective of a lane waits for the last one's end; the two lanes do not wait for each other."""
    group = Group(["/CPU:0"], 2, 0, of_two_workers())

    def step(value):
        results = []
        for number in range(3):
            results += [group.all_gather(value + number, 0), group.all_gather(value - number, 0, backward=True)]
            results.append(group.all_to_all(tf.stack([value + number] * 2), 0))
        return results

    graph = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([5])).graph
    carried = [op for op in graph.get_operations() if op.type in ("PyFunc", "EagerPyFunc", "PyFuncStateless")]
    assert len(carried) == 9
    backward = carried[1::3]
    usual = [op for op in carried if op not in backward]
    for lane in (usual, backward):
        for earlier, later in itertools.pairwise(lane):
            assert earlier in ancestors(later), "nothing orders them"
    assert not any(one in ancestors(other) or other in ancestors(one) for one in usual for other in backward)


def ancestors(operation) -> set:
    found: set = set()
    left = [operation]
    while left:
        each = left.pop()
        for maker in [*(tensor.op for tensor in each.inputs), *each.control_inputs]:
            if maker not in found:
                found.add(maker)
                left.append(maker)
    return found


def test_silence_keeps_what_a_transport_can_do():
    group = Group(["/CPU:0"], 2, 0, of_two_workers())
    place = group.place
    with group.silenced():
        assert group.transport.name == "links" and group.place == place and group.exchanges_encoded
        [rows] = group.launch(group.all_gather, [tf.constant([1.0, 2.0])])
        assert rows.numpy().tolist() == [[1.0, 2.0]] * 2
    assert group.transport.name == "links" and not group.keys.traced


# Nothing else asks.

WORDS = {"nccl", "links", "hint", "hints"}
# They are the transports, what those are made of, and TensorFlow's own names.
TRANSPORTS = {
    "collectives/ways", "collectives/transport", "collectives/rings", "collectives/over_links", "collectives/nccl",
    "collectives/nccl_failures", "collectives/transport_choice", "workers/links", "workers/device_agreement",
}  # fmt: skip
MODULES = sorted(str(path.relative_to(ROOT / "tfzero").with_suffix("")) for path in (ROOT / "tfzero").rglob("*.py"))


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def words_of_transports(source: str) -> set[str]:
    """Words in identifiers and keys; of texts for people, where "links" and "hint" are English, NCCL alone."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0].value for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    found: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            found |= words_of(value) & WORDS if isinstance(value, str) else set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in bodies:
            found |= words_of(node.value) & ({"nccl"} if " " in node.value else WORDS)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_else_knows_a_transport(module):
    if module not in TRANSPORTS and not module.startswith("host/"):
        assert words_of_transports((ROOT / "tfzero" / f"{module}.py").read_text()) == set()


def test_the_rule_notices_what_breaks_it():
    assert set(MODULES) >= TRANSPORTS
    for source in ("links = ()", "f(hint=1)", "x.nccl", "from tfzero.collectives.nccl import a", "a == 'NCCL'",
                   "def nccl_version(): pass", "class OverLinks: pass", "raise E('NCCL has failed')"):  # fmt: skip
        assert words_of_transports(source), source
    assert not words_of_transports('"""Links over NCCL."""\nlinked = f("faster links within")  # nccl')
