"""Parameter servers: what they hold, whom they wait for, and that real workers train as one device does."""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS

import tfzero
from tfzero import costs, launch
from tfzero.plan.mesh import Mesh
from tfzero.plan.serving import Piece, check_serving, deal
from tfzero.servers.client import Peers
from tfzero.servers.clocks import Clocks
from tfzero.servers.layer_state import Change, LayerState
from tfzero.servers.models import Assignments, Push
from tfzero.servers.serve import serve
from tfzero.servers.server import Server
from tfzero.servers.store import Definition, Held, Store
from tfzero.workers.cluster import Cluster, cluster_from_spec

DATA = oracle.Data(samples=46)  # of 15 rows a batch, the last has one: a worker has none
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SERVED = [sys.executable, "-m", "tfzero.servers"]


# What is held where.


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_every_element_lies_on_one_server(servers):
    elements = [5000, 3, 1, 1024, 0, 7, 2049]
    dealt = deal(elements, servers, min_shard_elements=1024)
    seen = [np.zeros(count, int) for count in elements]
    for pieces in dealt:
        for piece in pieces:
            seen[piece.variable][piece.begin : piece.end] += 1
    assert all((each == 1).all() for each in seen)
    load = [sum(piece.elements for piece in pieces) for pieces in dealt]
    assert max(load) - min(load) <= 12


def test_small_variables_go_to_the_server_with_the_least():
    dealt = deal([10, 4, 4], 2, min_shard_elements=1024)
    assert dealt == [[Piece(0, 0, 10)], [Piece(1, 0, 4), Piece(2, 0, 4)]]


@pytest.mark.parametrize(
    ("servers", "staleness", "others", "problem"),
    [
        (1, -1, {}, "at least 0"),
        (1, True, {}, "at least 0"),
        (1, 1.5, {}, "at least 0"),
        (1, 0, {"staleness_aware": True}, "not 0 only"),
        (0, 0, {"staleness_aware": True}, "0 servers"),
        (1, 2, {"staleness_aware": 1}, "staleness_aware=1"),
        (0, 2, {}, "the cluster has none"),
        (0, None, {}, "the cluster has none"),
        (1, 0, {"compression": "int8"}, "compression='int8'"),
        (1, 0, {"rows": "measured"}, "rows='measured'"),
        (1, 0, {"sync_every": 4}, "sync_every=4"),
    ],
)
def test_settings_that_servers_cannot_serve_are_refused(servers, staleness, others, problem):
    with pytest.raises(ValueError, match="Received|cannot use") as raised:
        check_serving(servers, 2, staleness, **{"staleness_aware": False, **others})
    assert problem in str(raised.value)


def test_without_servers_a_strategy_refuses_a_bound():
    with pytest.raises(ValueError, match="the cluster has none"):
        tfzero.ZeroStrategy(max_staleness=3, devices=["CPU:0"])


def test_servers_of_a_cluster():
    spec = {"worker": ["a:1", "b:1"], "ps": ["c:1", "d:1"]}
    worker, server = (cluster_from_spec(spec, kind, 1) for kind in ("worker", "ps"))
    assert (worker.name, worker.address, worker.is_server) == ("worker 1", "b:1", False)
    assert (server.name, server.address, server.is_server) == ("ps 1", "d:1", True)
    assert worker.servers == server.servers == ("c:1", "d:1")


# Whom others wait for.


def test_a_worker_is_waited_for_until_it_is_lost_or_idle():
    clocks = Clocks(3, 1, timeout_seconds=0.3)
    for worker in range(3):
        clocks.come(worker)
    for step in range(2):
        clocks.end(0, step)
    assert clocks.lead(0) == 2
    clocks.end(1, 0)
    clocks.lose(2)
    assert clocks.lead(0) == 1 and clocks.floor(2) == 1
    clocks.come(2)
    assert clocks.lead(0) == 2
    time.sleep(0.4)
    for worker in (0, 1):
        clocks.trains(worker)
    assert clocks.awaited() == [0, 1]
    clocks.trains(2)
    assert clocks.awaited() == [0, 1, 2]


def test_at_the_end_of_fit_nobody_waits_for_one_that_has_ended_earlier():
    server = Server(2, None, timeout_seconds=60)
    for worker in (0, 1):
        server.come(worker)
    for step in range(3):
        server.end(0, step, 1, {})
    server.end(1, 0, 1, {})
    server.wait_for_others(1, 0, True, lambda: False)
    server.wait_for_others(0, 0, True, lambda: False)
    assert server.clocks.lead(0) == 0
    server.end(1, 1, 1, {})  # it trains again
    assert server.clocks.lead(0) == 1


# What a server updates.


def definition_of(optimizer, decays=True):
    held = [[Held(0, 0, 5, 0, decays), Held(1, 2, 4, 0, False)], [Held(1, 0, 2, 0, decays)]]
    config = keras.saving.serialize_keras_object(optimizer)
    return Definition([config], held, ["float32", "float32"], ["a", "b"])


def values_of(definition):
    return [np.linspace(-1, 1, sum(definition.widths(n))).astype("float32") for n in range(2)]


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.1, amsgrad=True, clipvalue=0.5),
    "adamw": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "nadam": lambda: keras.optimizers.Nadam(0.1),
    "lion": lambda: keras.optimizers.Lion(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_are_updated_as_keras_updates_the_whole(name):
    definition = definition_of(OPTIMIZERS[name]())
    store = Store(definition, values_of(definition))
    first, second = values_of(definition)
    whole = [
        keras.Variable(np.concatenate([first[:5], second]), name="decays"),
        keras.Variable(first[5:], name="stays"),
    ]
    plain = OPTIMIZERS[name]()
    plain.exclude_from_weight_decay(var_names=["stays"])
    plain.build(whole)
    random = np.random.default_rng(1)
    for _ in range(4):
        gradients = [random.normal(size=7).astype("float32"), random.normal(size=2).astype("float32")]
        store.update(0, (0, 1), gradients[0], {})
        store.update(1, (0,), gradients[1], {})
        store.count()
        plain.apply([tf.concat([gradients[0][:5], gradients[1]], 0), tf.constant(gradients[0][5:])], whole)
    found = np.concatenate([store.values(0)[:5], store.values(1)]), store.values(0)[5:]
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-7)
    assert store.scalars[0][0] == 4


def test_a_part_without_a_gradient_stays():
    definition = definition_of(OPTIMIZERS["lion"]())  # which steps by its rate
    store = Store(definition, values_of(definition))
    before = store.values(0)
    store.update(0, (1,), np.ones(2, "float32"), {0: 0.5})
    np.testing.assert_array_equal(store.values(0)[:5], before[:5])
    np.testing.assert_allclose(store.values(0)[5:], before[5:] - 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda config: config | {"module": "os", "class_name": "system"}, r"classes of \['os'\]"),
        (lambda config: config | {"registered_name": "my>Adam"}, "my>Adam"),
        (lambda _: keras.saving.serialize_keras_object(keras.optimizers.Adafactor()), "Adafactor"),
        (lambda _: keras.saving.serialize_keras_object(keras.optimizers.schedules.CosineDecay(1.0, 2)), "CosineDecay"),
    ],
)
def test_only_element_wise_optimizers_of_keras_are_made(change, problem):
    definition = definition_of(keras.optimizers.SGD())
    changed = Definition([change(definition.optimizers[0])], definition.messages, definition.dtypes, definition.names)
    with pytest.raises(ValueError, match=problem):
        Store(changed, values_of(definition))


def served(workers, max_staleness, **settings):
    """A server that holds a model of SGD with a rate of 1, of two parts with the value 0."""
    server = Server(workers, max_staleness, timeout_seconds=60, **settings)
    for worker in range(workers):
        server.come(worker)
    config = keras.saving.serialize_keras_object(keras.optimizers.SGD(1.0))
    made = {
        "optimizers": [config],
        "messages": [[[0, 0, 2, 0, 0], [1, 0, 1, 0, 0]]],
        "dtypes": ["float32"],
        "names": [],
    }
    server.define(0, made, [np.zeros(3, "float32")], lambda: False)
    return server


def push(server, worker, step, value, rows=1, active=(0, 1)):
    gradient = np.full(sum((2, 1)[place] for place in active), value, "float32")
    server.push(worker, 0, 0, step, Push(active, gradient, rows, {}))


def value(server):
    return server.models[0].store.values(0).tolist()


def test_a_push_counts_once():
    server = served(2, None)
    push(server, 1, 0, 1.0)
    push(server, 1, 0, 1.0)
    server.end(1, 0, 1, {})
    push(server, 1, 0, 1.0)
    server.end(1, 0, 1, {})
    assert value(server) == [-1.0, -1.0, -1.0]
    assert server.dropped == 2 and server.models[0].store.scalars[0][0] == 1


def test_a_synchronous_step_is_the_mean_by_rows_whoever_comes_first():
    server = served(3, 0)
    push(server, 2, 0, 4.0, rows=1)
    push(server, 0, 0, 1.0, rows=3, active=(0,))
    server.end(2, 0, 1, {})
    server.end(0, 0, 3, {})
    assert value(server) == [0.0, 0.0, 0.0]
    server.end(1, 0, 0, {})  # without rows
    assert value(server) == [-7 / 4, -7 / 4, -1.0]
    assert server.models[0].store.scalars[0][0] == 1


def test_a_synchronous_step_ends_without_a_worker_that_is_lost():
    server = served(2, 0)
    push(server, 0, 0, 2.0)
    server.end(0, 0, 1, {})
    server.lose(1)
    server.wait_for_others(0, 0, False, lambda: False)
    assert value(server) == [-2.0, -2.0, -2.0]
    server.come(1)
    push(server, 1, 0, 5.0)  # too late
    server.end(1, 0, 1, {})
    assert value(server) == [-2.0, -2.0, -2.0] and server.dropped == 1


def test_what_comes_after_a_synchronous_step_changes_nothing():
    server = served(2, 0)
    change = {"m": Change("mean", np.array(1.0), np.array(8.0))}
    push(server, 0, 0, 2.0)
    server.end(0, 0, 1, {"m": Change("mean", np.array(1.0), np.array(2.0))})
    server.lose(1)
    server.wait_for_others(0, 0, False, lambda: False)
    server.come(1)
    server.end(1, 0, 1, change)
    push(server, 0, 1, 2.0)
    push(server, 1, 2, 100.0)  # of the next step already
    server.end(0, 1, 1, {})
    server.end(1, 1, 0, {})
    assert server.layers.values["m"] == 3.0
    assert value(server) == [-4.0, -4.0, -4.0]


def test_values_that_a_program_assigns_count_once():
    server = served(1, 0)
    for number, given in (((0, 3, 1), 5.0), ((0, 3, 1), 7.0), ((0, 2, 9), 8.0), ((1, 0, 1), 9.0)):
        server.assign(number, 0, (0, 0, 0), np.full(2, given, "float32"))
        server.end_assignments(number, Assignments({}, {}, None))
        if given in (7.0, 8.0):
            assert value(server) == [5.0, 5.0, 0.0]
    assert value(server) == [9.0, 9.0, 0.0]


def test_staleness_is_counted():
    server = served(2, 1)
    for worker in (0, 1):
        server.values(worker, [0])
    for step, worker in ((0, 0), (0, 1), (1, 1)):
        push(server, worker, step, 1.0)
        server.end(worker, step, 1, {})
        if worker == 1:
            server.values(worker, [0])
    assert server.tell()["staleness"] == {"0": 2, "1": 1}
    assert server.tell()["most_ahead"] == 1


def test_an_update_that_knows_its_staleness_is_smaller():
    server = served(2, None, staleness_aware=True)
    server.values(1, [0])
    for step in range(3):
        server.values(0, [0])
        push(server, 0, step, 1.0)
        server.end(0, step, 1, {})
    push(server, 1, 0, 1.0)
    np.testing.assert_allclose(value(server), [-3 - 1 / 3] * 3, rtol=1e-6)


def test_state_of_layers_is_merged():
    layers = LayerState()
    changes = [{"m": Change("mean", np.array(1.0), np.array(c)), "n": Change("added", np.array(5.0), np.array(2.0))}
               for c in (1.0, 4.0)]  # fmt: skip
    layers.note(0, 3, changes[0])
    layers.note(1, 1, changes[1])
    layers.merge()
    assert (layers.values["m"], layers.values["n"]) == (1 + 7 / 4, 9)
    layers.note(1, 1, changes[1])
    layers.merge(workers=2)
    assert (layers.values["m"], layers.values["n"]) == (1 + 7 / 4 + 2, 11)


# Lines between workers and servers, in one process.


@contextlib.contextmanager
def server_here(workers=1, servers=1):
    """Servers in threads; gives the addresses of workers and servers."""
    with launch.held_ports(workers + servers) as ports:
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        names = tuple(f"worker {index}" for index in range(workers))
        clusters = [Cluster(addresses[:workers], names, k, addresses[workers:], True) for k in range(servers)]
        threads = [threading.Thread(target=serve, args=(cluster,), daemon=True) for cluster in clusters]
        for thread in threads:
            thread.start()
        yield Cluster(addresses[:workers], names, 0, addresses[workers:])
        for thread in threads:
            thread.join(timeout=FLEET_SECONDS)
            assert not thread.is_alive()


def wanted(**changes):
    return {"max_staleness": 0, "timeout_seconds": 5, "settings": {"stage": 2}, **changes}


def test_workers_must_want_the_same():
    with server_here(workers=2) as cluster:
        first = Peers(cluster, wanted(), 5)
        second = Cluster(cluster.addresses, cluster.names, 1, cluster.servers)
        with pytest.raises(ValueError, match=r"worker 1 wants .*'stage': 2.*'stage': 3.*same settings"):
            Peers(second, wanted(settings={"stage": 3}), 5)
        same = Peers(second, wanted(), 5)
        assert [peers.ask_all({"do": "post", "name": "seed", "value": value})[0]["value"]
                for peers, value in ((first, 7), (same, 8))] == [7, 7]  # fmt: skip
        assert [peers.ask_all({"do": "claim", "name": "file"})[0]["value"] for peers in (same, first)] == [True, False]
        first.leave()
        same.leave()


def test_a_stranger_is_turned_away(monkeypatch):
    with server_here() as cluster:
        monkeypatch.setenv("TFZERO_SECRET", "b" * 32)
        with pytest.raises(ConnectionError, match="ps 0 at .* within 1 s: .*TFZERO_SECRET"):
            Peers(cluster, wanted(), 1)
        monkeypatch.delenv("TFZERO_SECRET")
        with socket.create_connection(cluster.servers[0].split(":")) as noise:
            noise.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        peers = Peers(cluster, wanted(), 5)
        peers.leave()


@pytest.mark.parametrize(
    "message", [{"do": "push"}, {"do": "pull", "keys": [9], "ahead": 0, "ends": False}, {"do": 5}, {}]
)
def test_nonsense_is_an_error_on_the_worker(message):
    with server_here() as cluster:
        peers = Peers(cluster, wanted(), 5)
        with pytest.raises((ConnectionError, RuntimeError, ValueError)):
            peers.ask_all(message)
        Peers(cluster, wanted(), 5).leave()


def test_a_server_that_nobody_has_started_is_named():
    with launch.held_ports(1) as ports:
        cluster = Cluster(("127.0.0.1:1",), ("worker 0",), 0, (f"127.0.0.1:{ports[0]}",))
        with pytest.raises(ConnectionError, match=rf"worker 0 cannot reach the parameter server ps 0 at .*:{ports[0]}"):
            Peers(cluster, wanted(), 1)


# One worker with real servers trains as plain Keras does.


def wide_model():
    keras.utils.set_random_seed(5)
    hidden = [keras.layers.Dense(170, "tanh"), keras.layers.BatchNormalization(synchronized=True)]
    layers = [*hidden, keras.layers.Dense(33, "tanh"), keras.layers.Dense(3, "softmax")]
    return keras.Sequential([keras.Input((8,)), *layers])


def arguments(name):
    optimizers = {
        "adam": lambda: keras.optimizers.Adam(0.01),
        "adamw": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.02, 12)),
        "nadam": lambda: keras.optimizers.Nadam(0.01),
        "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    }
    return {"optimizer": optimizers[name](), "loss": "categorical_crossentropy", "metrics": ["accuracy"]}


@contextlib.contextmanager
def strategy_here(monkeypatch, servers=1, **settings):
    with server_here(servers=servers) as cluster:
        spec = {"worker": list(cluster.addresses), "ps": list(cluster.servers)}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": spec, "task": {"type": "worker", "index": 0}}))
        strategy = tfzero.ZeroStrategy(timeout_seconds=20, **settings)
        yield strategy
        strategy.served.peers.leave()


@pytest.mark.parametrize(
    ("stage", "devices", "servers", "name"),
    [(0, 1, 1, "nadam"), (1, 2, 1, "adam"), (2, 3, 2, "adamw"), (3, 2, 2, "sgd")],
)
def test_one_worker_trains_as_one_device(monkeypatch, stage, devices, servers, name):
    local = [f"CPU:{index}" for index in range(devices)]
    with strategy_here(monkeypatch, servers, stage=stage, devices=local, min_shard_elements=64) as strategy:
        ours, plain = oracle.train_both(strategy, wide_model, lambda: arguments(name), DATA)
        oracle.assert_same(ours, plain)
        assert strategy.served.peers.ask_all({"do": "tell"})[0]["done"] == [12]


def test_a_worker_holds_no_slots(monkeypatch):
    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = wide_model()
        model.compile(OPTIMIZERS["adam"](), "categorical_crossentropy")
        x, y = DATA.arrays()
        model.fit(x, y, batch_size=15, verbose=0)
        slots = [variable.value for variable in model.optimizer.variables if variable.shape.rank]
        assert len(slots) == 3 * len(model.trainable_variables)
        assert all(part.shape.num_elements() == 0 for slot in slots for part in slot.values)
        told = strategy.served.peers.ask_all({"do": "tell"})[0]
        trained = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
        assert 4 * 4 * trained <= told["held_bytes"] <= 4 * 4 * trained + 64  # the parameter and Adam's three slots


def test_tensorboard_shows_staleness_as_a_histogram(monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = oracle.dense_model()
        model.compile("sgd", "categorical_crossentropy")
        fit = {"batch_size": 15, "epochs": 3, "verbose": 0}
        model.fit(*DATA.arrays(), callbacks=[tfzero.TensorBoardCallback(tmp_path, every_steps=4)], **fit)
        counts = {"0": 3000, "1": 40, "7": 1}  # of a longer run
        monkeypatch.setattr(strategy.served.peers[0], "ask", lambda message: {"staleness": counts})
        ages = strategy.served.staleness()
        assert np.unique(ages).tolist() == [0, 1, 7] and (ages == 0).sum() == 987 and (ages == 7).sum() == 1
        monkeypatch.undo()
    events = EventAccumulator(str(tmp_path / "tfzero"), size_guidance={"tensors": 0}).Reload()
    buckets = [tf.make_ndarray(event.tensor_proto) for event in events.Tensors("servers/staleness")]
    assert [int(each[:, 2].sum()) for each in buckets] == [4, 8, 12]  # updates, all of staleness 0
    updates = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("servers/updates")]
    assert updates == [4, 8, 12]


@pytest.mark.parametrize(("stage", "devices", "servers"), [(0, 2, 2), (2, 2, 1), (3, 2, 2)])
def test_costs_are_those_of_real_workers(monkeypatch, stage, devices, servers):
    local = [f"CPU:{index}" for index in range(devices)]
    with strategy_here(monkeypatch, servers, stage=stage, devices=local, min_shard_elements=1) as strategy:
        with strategy.scope():
            layers = [keras.layers.Dense(64, use_bias=False), keras.layers.Dense(4, use_bias=False)]
            model = keras.Sequential([keras.Input((8,)), *layers])
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        report, parameters = strategy.report(), model.count_params()
        setup = costs.Setup(devices, stage, replicas_per_worker=devices, servers=servers)
        assert report.sent_bytes == setup.sent_bytes() * parameters
        held = sum(variable.parameter_bytes + variable.slot_bytes for variable in report.variables)
        assert held == setup.held_bytes() * parameters


def test_costs_of_servers_are_told(capsys):
    costs.main(["--parameters", "1e9", "--gbit", "10", "--microseconds", "50", "--servers", "4"])
    lines = capsys.readouterr().out.splitlines()
    # 8 workers push 4 GB each; each of 4 servers gets 8 GB, and 32 buckets of each worker.
    assert lines[1].split() == ["8", "0", "f32", "4.00", "4.00", "128", "6.406"] and len(lines) == 17
    with pytest.raises(SystemExit):
        costs.main(["--parameters", "1e9", "--gbit", "10", "--microseconds", "50", "--servers", "0"])


def test_what_a_program_assigns_reaches_the_servers(monkeypatch):
    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = oracle.dense_model()
        model.compile(keras.optimizers.SGD(0.0), "categorical_crossentropy")
        x, y = DATA.arrays()
        model.train_on_batch(x[:8], y[:8])
        weights = [weight + 1 for weight in model.get_weights()]
        model.set_weights(weights)
        model.train_on_batch(x[:8], y[:8])
        for ours, given in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(ours, given, **CLOSE)
        model.optimizer.learning_rate = 0.5
        model.train_on_batch(x[:8], y[:8])
        assert any((ours != given).any() for ours, given in zip(model.get_weights(), weights, strict=True))
        model.set_weights([7 * np.ones_like(weight) for weight in weights])
        model.evaluate(x, y, verbose=0)
        assert all((weight == 7).all() for weight in model.get_weights())


def test_steps_are_counted_where_servers_hold_nothing(monkeypatch):
    with strategy_here(monkeypatch, servers=3, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.fit(np.ones((12, 8)), np.ones((12, 1)), batch_size=4, verbose=0)
        assert int(model.optimizer.iterations) == 3


def test_weights_that_a_callback_restores_stay(monkeypatch):
    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = wide_model()
        model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
        x, y = DATA.arrays()
        stop = keras.callbacks.EarlyStopping("val_loss", mode="max", restore_best_weights=True)
        history = model.fit(x, y, batch_size=15, epochs=5, validation_data=(x, y), verbose=0, callbacks=[stop]).history
        assert history["val_loss"][0] > history["val_loss"][-1]
        assert model.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][0], rel=1e-5)


def test_another_optimizer_goes_on_and_the_former_is_refused(monkeypatch):
    x, y = DATA.arrays()
    with strategy_here(monkeypatch, devices=["CPU:0", "CPU:1"], stage=3, min_shard_elements=16) as strategy:
        with strategy.scope():
            model, frozen = oracle.dense_model(), oracle.dense_model()
        plain = oracle.dense_model()
        plain.set_weights(model.get_weights())
        former = keras.optimizers.SGD(0.1)
        rates = {former: 0.1, keras.optimizers.SGD(0.2): 0.2}
        for optimizer, rate in rates.items():
            for each, own in ((model, optimizer), (plain, keras.optimizers.SGD(rate))):
                each.compile(own, "categorical_crossentropy", jit_compile=False) if each is plain else each.compile(
                    own, "categorical_crossentropy")  # fmt: skip
                each.fit(x, y, batch_size=15, epochs=2, shuffle=False, verbose=0)
        for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, **CLOSE)
        model.compile(former, "categorical_crossentropy")
        with pytest.raises(RuntimeError, match="Another optimizer has trained"):
            model.train_on_batch(x[:8], y[:8])
        before = frozen.get_weights()
        frozen.layers[0].trainable = False
        frozen.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
        frozen.fit(x, y, batch_size=15, verbose=0)
        np.testing.assert_array_equal(frozen.get_weights()[0], before[0])


def test_clipping_by_norm_where_a_variable_has_no_gradient(monkeypatch):
    with strategy_here(monkeypatch, devices=["CPU:0"], max_staleness=None) as strategy:
        with strategy.scope():
            used, unused = keras.layers.Dense(3), keras.layers.Dense(3)
            inputs = keras.Input((8,))
            model = keras.Model(inputs, used(inputs) + 0 * keras.ops.stop_gradient(unused(inputs)))
        model.compile(keras.optimizers.SGD(1.0, clipnorm=0.01), "mse")
        weights = [used.kernel, used.bias, unused.kernel, unused.bias]
        before = [weight.numpy() for weight in weights]
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            model.train_on_batch(*(array[:8] for array in DATA.arrays()))
        norms = [np.linalg.norm(now.numpy() - former) for now, former in zip(weights, before, strict=True)]
        np.testing.assert_allclose(norms, [0.01, 0.01, 0, 0], rtol=1e-3)


def test_data_distributed_before_are_refused(monkeypatch):
    with server_here(workers=1) as cluster:
        spec = {"worker": list(cluster.addresses), "ps": list(cluster.servers)}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": spec, "task": {"type": "worker", "index": 0}}))
        strategy = tfzero.ZeroStrategy(devices=["CPU:0"], timeout_seconds=20)
        other = Mesh(2, 1, 0)
        data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(DATA.arrays()).batch(8))
        strategy.extended.dealing.mesh = other
        with pytest.raises(ValueError, match="distributed before `fit`"):
            strategy.extended.dealing.distribute(data)
        strategy.served.peers.leave()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: keras.optimizers.Adam(clipnorm=1.0), "clipnorm"),
        (lambda: keras.optimizers.Adam(use_ema=True), "use_ema"),
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=2), "gradient_accumulation_steps"),
        (lambda: keras.optimizers.Adafactor(), "Adafactor"),
        (lambda: keras.optimizers.Adam(lambda: 0.1), "function for a learning rate"),
    ],
)
def test_optimizers_that_cannot_be_served_are_refused(monkeypatch, make, problem):
    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = oracle.dense_model()
        model.compile(make(), "categorical_crossentropy")
        with pytest.raises(ValueError, match=problem):
            model.train_on_batch(*(array[:8] for array in DATA.arrays()))


def test_what_workers_of_servers_cannot_do_is_refused(monkeypatch, tmp_path):
    x, y = DATA.arrays()
    with strategy_here(monkeypatch, devices=["CPU:0"]) as strategy:
        with strategy.scope():
            model = oracle.dense_model()
        model.compile("sgd", "categorical_crossentropy", steps_per_execution=2)
        with pytest.raises(ValueError, match="steps_per_execution=2"):
            model.fit(x, y, verbose=0)
        model.compile("sgd", "categorical_crossentropy")
        with pytest.raises(ValueError, match="BackupAndRestore.*Use `tfzero.CheckpointCallback`"):
            model.fit(x, y, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])


# Workers in processes of their own.

WORKER = """
import json, os, pickle, sys, time
import keras, numpy as np, tfzero
import test_servers
settings, folder, own = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
strategy = tfzero.ZeroStrategy(**settings)
with strategy.scope():
    model = test_servers.of_worker(index)
model.compile(**test_servers.arguments(own["optimizer"]))
steps = []
def note(batch, logs):
    steps.append(float(logs.get("loss", 0)))
    with open(f"{folder}/step{index}", "a") as file:
        file.write(".")
    time.sleep(own["slow"] if index == 1 else 0)
note = keras.callbacks.LambdaCallback(on_train_batch_end=note)
x, y = test_servers.DATA.arrays()
saves = keras.callbacks.ModelCheckpoint(f"{folder}/best.weights.h5", save_weights_only=True)
fit = {"batch_size": 15, "epochs": own["epochs"], "shuffle": own["shuffle"], "verbose": 2}
model.fit(x, y, callbacks=[note, saves], **fit)
loss = model.evaluate(x, y, verbose=0)
model.save(f"{folder}/model.keras")
told = strategy.served.peers.ask_all({"do": "tell"})
text = str(strategy.report())
content = {"weights": model.get_weights(), "steps": len(steps), "told": told, "loss": loss, "text": text}
with open(f"{folder}/result{index}", "wb") as file:
    pickle.dump(content, file)
"""


def of_worker(index):
    """The model of a worker: of other first values than the others, without statistics of a batch."""
    keras.utils.set_random_seed(5 + index)
    layers = [keras.layers.Dense(170, "tanh"), keras.layers.Dense(33, "tanh"), keras.layers.Dense(3, "softmax")]
    return keras.Sequential([keras.Input((8,)), *layers])


class Processes:
    """Workers and servers, each with its log."""

    def __init__(self, folder, workers, servers, devices, settings, **own):
        self.folder = folder
        own = {"optimizer": "adam", "slow": 0, "epochs": 3, "shuffle": False, **own}
        self._ports = launch.held_ports(workers + servers)
        ports = self._ports.__enter__()
        addresses = [f"127.0.0.1:{port}" for port in ports]
        cluster = {"worker": addresses[:workers], "ps": addresses[workers:]}
        (folder / "worker.py").write_text(WORKER)
        script = [sys.executable, str(folder / "worker.py"), json.dumps(settings), str(folder), json.dumps(own)]
        self._commands = {("worker", k): script for k in range(workers)} | {("ps", k): SERVED for k in range(servers)}
        tests = str(Path(__file__).parent)
        self._environment = {
            **os.environ,
            "TFZERO_CPU_DEVICES": str(devices),
            "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], tests]),
        }
        self._configs = {task: {"cluster": cluster, "task": dict(zip(("type", "index"), task, strict=True))}
                         for task in self._commands}  # fmt: skip
        self.running = {}
        for task in self._commands:
            self.start(task)

    def start(self, task):
        environment = {**self._environment, "TF_CONFIG": json.dumps(self._configs[task])}
        with open(self.folder / f"log of {task[0]} {task[1]}", "a") as log:
            self.running[task] = subprocess.Popen(self._commands[task], env=environment, stdout=log, stderr=log)

    def log(self, task):
        return (self.folder / f"log of {task[0]} {task[1]}").read_text()

    def logs(self):
        return "\n".join(f"===== {task}\n{self.log(task)[-4000:]}" for task in self.running)

    def wait(self, *tasks):
        """Exit codes of tasks, or of all."""
        deadline = time.monotonic() + FLEET_SECONDS
        try:
            return [self.running[task].wait(max(1, deadline - time.monotonic())) for task in tasks or self.running]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running:\n{self.logs()}")

    def wait_for_steps(self, index, count):
        """Waits until a worker has taken so many steps."""
        path, deadline = self.folder / f"step{index}", time.monotonic() + FLEET_SECONDS
        while not path.exists() or path.stat().st_size < count:
            assert time.monotonic() < deadline and self.running["worker", index].poll() is None, self.logs()
            time.sleep(0.01)

    def results(self, workers):
        return [pickle.loads((self.folder / f"result{k}").read_bytes()) for k in range(workers)]

    def close(self):
        for process in self.running.values():
            process.kill()
            process.wait()
        self._ports.__exit__(None, None, None)


@contextlib.contextmanager
def processes(*arguments, **own):
    made = Processes(*arguments, **own)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("workers", "devices", "servers", "stage", "name"), [(2, 2, 2, 3, "adamw"), (3, 1, 1, 1, "adam")]
)
def test_synchronous_workers_train_as_one_device(tmp_path, workers, devices, servers, stage, name):
    settings = {"stage": stage, "min_shard_elements": 64, "timeout_seconds": 30}
    with processes(tmp_path, workers, servers, devices, settings, optimizer=name) as fleet:
        assert fleet.wait() == [0] * (workers + servers), fleet.logs()
        results = fleet.results(workers)
    plain = of_worker(0)
    plain.compile(**arguments(name), jit_compile=False)
    x, y = DATA.arrays()
    plain.fit(x, y, batch_size=15, epochs=3, shuffle=False, verbose=0)
    for result in results:
        for ours, theirs in zip(result["weights"], plain.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, **CLOSE)
        assert [each["staleness"] for each in result["told"]] == [{"0": 12}] * servers
        assert f"{servers} servers" in result["text"] and "synchronous" in result["text"]
    saved = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(saved.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    for ours, theirs in zip(saved.optimizer.variables, plain.optimizer.variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=1e-6, err_msg=ours.path)


def test_a_bound_holds(tmp_path):
    with processes(tmp_path, 3, 1, 1, {"max_staleness": 2, "timeout_seconds": 30}, epochs=5, slow=0.1) as fleet:
        assert fleet.wait() == [0] * 4, fleet.logs()
        results = fleet.results(3)
    for result in results:
        (told,) = result["told"]
        assert told["done"] == [20, 20, 20] and 1 <= told["most_ahead"] <= 2
        # Of each of 5 epochs the last batch has one row, so that two workers have no gradient.
        assert sum(told["staleness"].values()) == 60 - 2 * 5 and told["dropped"] == 0
        for ours, theirs in zip(result["weights"], results[0]["weights"], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_worker_that_dies_is_replaced_and_no_update_counts_twice(tmp_path):
    settings = {"max_staleness": None, "timeout_seconds": 30}
    with processes(tmp_path, 2, 2, 2, settings, epochs=10, slow=0.1, shuffle=True) as fleet:
        fleet.wait_for_steps(1, 6)
        fleet.running["worker", 1].send_signal(signal.SIGKILL)
        assert fleet.wait(("worker", 1)) == [-signal.SIGKILL]
        fleet.start(("worker", 1))
        assert fleet.wait() == [0] * 4, fleet.logs()
        first, second = fleet.results(2)
        assert "has lost worker 1" in fleet.log(("ps", 0)), fleet.logs()
    assert first["steps"] == second["steps"] == 40
    for told in second["told"]:
        # Of each of 10 epochs the last batch has one row, so that one worker has no gradient.
        assert told["done"] == [40, 40] and sum(told["staleness"].values()) == 80 - 10


def test_a_server_that_dies_ends_the_run_by_name(tmp_path):
    with processes(tmp_path, 2, 2, 1, {"max_staleness": None, "timeout_seconds": 30}, epochs=4000) as fleet:
        fleet.wait_for_steps(0, 3)
        fleet.running["ps", 1].kill()
        assert all(fleet.wait(("worker", 0), ("worker", 1))), fleet.logs()
        for index in (0, 1):
            assert "The parameter server ps 1 at 127.0.0.1" in fleet.log(("worker", index)), fleet.logs()
