"""The workers of TF_CONFIG, and the control channel among them: real sockets over loopback."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tfzero.workers import channel as channel_module
from tfzero.workers import handshake, meeting, messages
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster, cluster_from_spec, read_tf_config
from tfzero.workers.stopping import blamed_by

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """No test leaves a thread."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


PORTS = itertools.count(20000 + os.getpid() * 97 % 9000)  # below those of dialling sockets


def find_ports(count):
    """Free ports, others at each call."""
    ports = []
    while len(ports) < count:
        port = next(PORTS)
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        ports.append(port)
    return ports


def make_clusters(count):
    addresses = tuple(f"127.0.0.1:{port}" for port in find_ports(count))
    names = tuple(f"worker {index}" for index in range(count))
    return [Cluster(addresses, names, index) for index in range(count)]


def run_all(functions, timeout_seconds=15):
    """Run each function in its own thread. Returns what each returned or raised."""
    outcomes = [None] * len(functions)

    def run(index):
        try:
            outcomes[index] = functions[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline - time.monotonic())
        assert not thread.is_alive(), f"a worker hangs; the others: {outcomes}"
    return outcomes


def join_all(clusters, timeout_seconds=5):
    return run_all([lambda c=c: Channel.join(c, timeout_seconds) for c in clusters])


@pytest.fixture
def channels(request):
    """Joined channels, as many as the test's parameter says."""
    channels = join_all(make_clusters(request.param))
    yield channels
    for channel in channels:
        channel.close()


def on_each(channels, function):
    return run_all([lambda i=i, c=c: function(i, c) for i, c in enumerate(channels)])


def assert_all_raise(outcomes, kind, *texts):
    for outcome in outcomes:
        assert type(outcome) is kind, outcomes
        for text in texts:
            assert text in str(outcome)


# ------------------------------------------------------------------------------------ TF_CONFIG


def environ(cluster=None, task=None):
    config = {"cluster": cluster, "task": task}
    return {"TF_CONFIG": json.dumps({key: value for key, value in config.items() if value is not None})}


@pytest.mark.parametrize("text", [None, "", " ", "{}", '{"cluster": {}}', '{"task": {"type": "worker"}}'])
def test_no_cluster(text):
    assert read_tf_config({} if text is None else {"TF_CONFIG": text}) is None


def test_chief_is_first():
    spec = {"worker": ["b:2", "c:3"], "chief": ["a:1"], "evaluator": ["e:5"]}
    cluster = read_tf_config(environ(spec, {"type": "worker", "index": "1"}))
    assert cluster == Cluster(("a:1", "b:2", "c:3"), ("chief 0", "worker 0", "worker 1"), 2)
    assert (cluster.size, cluster.name) == (3, "worker 1")
    assert read_tf_config(environ(spec, {"type": "chief", "index": 0})).index == 0


def test_sparse_jobs_and_ipv6():
    cluster = cluster_from_spec({"worker": {3: "[::1]:2222", 1: "a:1"}}, "worker", 3)
    assert cluster == Cluster(("a:1", "[::1]:2222"), ("worker 1", "worker 3"), 1)
    assert cluster_from_spec({}, None, None) is None


def test_names_in_short():
    cluster = Cluster(("a:1",) * 4, ("chief 0", "worker 0", "worker 1", "worker 2"), 0)
    assert cluster.names_of([0, 1, 3]) == "chief 0 and workers 0, 2"
    assert cluster.names_of([2]) == "worker 1"


@pytest.mark.parametrize(
    "text, problem",
    [("{cluster", "JSON"), ("[1]", "object"), ('{"cluster": {"worker": ["a:1"]}}', '"task"')]
    + [(json.dumps({"cluster": {"worker": ["a:1"]}, "task": task}), '"type" and "index"')
       for task in ({"type": "worker"}, {"index": 0}, "worker")],
)  # fmt: skip
def test_bad_tf_config(text, problem):
    with pytest.raises(ValueError) as raised:
        read_tf_config({"TF_CONFIG": text})
    for expected in (problem, text, "host1:2222"):
        assert expected in str(raised.value)


WORKERS = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    "spec, task_type, task_id, problem",
    [
        (WORKERS, "boss", 0, "task type is unknown"),
        (WORKERS, None, 0, "task type is unknown"),
        (WORKERS, "worker", "one", "not an integer"),
        (WORKERS, "worker", 1.0, "not an integer"),
        (WORKERS, "worker", True, "not an integer"),
        (WORKERS, "worker", None, "not an integer"),
        (WORKERS, "worker", 2, "out of range: this process is worker 2"),
        (WORKERS, "worker", -1, "out of range"),
        (WORKERS, "chief", 0, "out of range"),
        ({"worker": ["a:1", "b"]}, "worker", 0, "'b'"),
        ({"worker": ["a:0"]}, "worker", 0, "1 to 65535"),
        ({"worker": ["a:65536"]}, "worker", 0, "1 to 65535"),
        ({"worker": ["grpc://a:1"]}, "worker", 0, "without grpc://"),
        ({"worker": [1]}, "worker", 0, "host:port"),
        ({"worker": ["::1:2222"]}, "worker", 0, "[::1]:2222"),
        ({"worker": ["a:1", "a:1"]}, "worker", 0, "same address"),
        ({"worker": ["a:1"], "chief": ["a:1"]}, "worker", 0, "same address"),
        ({"worker": []}, "worker", 0, "at least one"),
        ({"worker": "a:1"}, "worker", 0, "must be a list"),
        ({"chief": ["a:1", "b:2"]}, "chief", 0, "more than one chief"),
        ({"ps": ["b:2"]}, "ps", 0, "no worker"),
        ({"worker": ["a:1"], "ps": ["a:1"]}, "ps", 0, "Two tasks have the same address"),
        ({"worker": ["a:1"], "ps": ["b:2"]}, "ps", 1, "this process is ps 1. The cluster has only worker 0, ps 0"),
        ({"worker": ["a:1"], "evaluator": ["b:2"]}, "evaluator", 0, "model.evaluate"),
        ({"worker": ["a:1"]}, "evaluator", 0, "model.evaluate"),
        ({"wrker": ["a:1"]}, "worker", 0, '"worker"'),
        (["a:1"], "worker", 0, '"worker"'),
    ],
)
def test_bad_cluster(spec, task_type, task_id, problem):
    with pytest.raises(ValueError) as raised:
        cluster_from_spec(spec, task_type, task_id)
    for expected in (problem, "Received:", str(spec), repr(task_type)):
        assert expected in str(raised.value)


# ------------------------------------------------------------------------------------ the meeting


def test_one_worker_needs_no_socket(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "create_server", None)
    channel = Channel.join(make_cluster_of_one(), 1)
    assert channel.all_gather("x", (1, None)) == [[1, None]]
    assert channel.broadcast("x", "a") == "a"
    channel.agree("x", {"a": 1}, "settings")
    channel.close()
    with pytest.raises(RuntimeError, match="closed"):
        channel.all_gather("x", 1)


def make_cluster_of_one():
    return Cluster(("nowhere:1",), ("worker 0",), 0)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_workers_come_in_any_order(late):
    def join(cluster):
        time.sleep(0.5 if cluster.index == late else 0)
        return Channel.join(cluster, 5)

    channels = run_all([lambda c=c: join(c) for c in make_clusters(3)])
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1, 2]] * 3
    for channel in channels:
        channel.close()


def test_ports_are_free_while_the_channel_is_open():
    clusters = make_clusters(3)
    channels = join_all(clusters)
    for address in clusters[0].addresses:
        port = int(address.split(":")[1])
        socket.create_server(("", port)).close()
        socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    assert on_each(channels, lambda i, c: c.broadcast("x", i)) == [0, 0, 0]
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_host_names_and_ipv6(host):
    addresses = tuple(f"{host}:{port}" for port in find_ports(2))
    channels = join_all([Cluster(addresses, ("chief 0", "worker 0"), index) for index in range(2)])
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1]] * 2
    for channel in channels:
        channel.close()


def test_missing_worker_is_named_on_all():
    clusters = make_clusters(4)
    start = time.monotonic()
    outcomes = join_all([clusters[0], clusters[1], clusters[3]], timeout_seconds=1)
    assert time.monotonic() - start < 3
    assert_all_raise(outcomes, TimeoutError, f"worker 2 at {clusters[0].addresses[2]}", "1 of 4", "1 s")
    assert len({str(outcome) for outcome in outcomes}) == 1


def test_missing_leader_is_named():
    clusters = make_clusters(3)
    outcomes = join_all(clusters[1:], timeout_seconds=0.5)
    address = clusters[0].addresses[0]
    assert_all_raise(outcomes, TimeoutError, f"worker 0 at {address} never called within 0.5 s")


def test_reached_worker_waits_for_the_verdict_of_a_late_leader():
    clusters = make_clusters(3)

    def lead():
        time.sleep(0.8)
        return Channel.join(clusters[0], 3)

    start = time.monotonic()
    outcomes = run_all([lead, lambda: Channel.join(clusters[1], 2.5)])
    assert 3.5 < time.monotonic() - start < 6
    assert_all_raise(outcomes, TimeoutError, "worker 2 at", "missing after 3 s")


def test_port_in_use():
    clusters = make_clusters(2)
    for cluster in clusters:
        port = int(cluster.addresses[cluster.index].split(":")[1])
        with socket.create_server(("", port)), pytest.raises(OSError) as raised:
            Channel.join(cluster, 5)
        assert f"{cluster.name} at 127.0.0.1:{port} cannot listen" in str(raised.value)


def test_strangers_do_not_disturb(monkeypatch):
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "CALL_SECONDS", 0.7)
    clusters = make_clusters(3)
    ports = [int(address.split(":")[1]) for address in clusters[0].addresses]
    impostor = socket.create_server(("", ports[2]))  # an old process on worker 2's port

    def be_strange():
        silent, _ = impostor.accept()
        with silent:
            time.sleep(1)
        stranger, _ = impostor.accept()
        impostor.close()
        with stranger, contextlib.suppress(ConnectionResetError):
            stranger.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3)
            stranger.recv(100)
        time.sleep(0.2)
        return Channel.join(clusters[2], 5)

    def scan():
        worker = threading.Thread(target=lambda: joined.append(Channel.join(clusters[1], 5)))
        worker.start()
        for sent in (b"", b"\n", b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n"):
            dial(ports[1], sent, strangers)
        worker.join()
        return joined[0]

    def lead():
        time.sleep(0.1)
        return Channel.join(clusters[0], 5)

    joined, strangers = [], []
    channels = run_all([lead, scan, be_strange])
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1, 2]] * 3
    for connection in (*strangers, *channels):
        connection.close()


def dial(port, sent, opened):
    """Connect to a port that soon listens, send, and stay."""
    while True:
        try:
            opened.append(socket.create_connection(("127.0.0.1", port), 1))
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return opened[-1].sendall(sent)


def test_different_clusters():
    first, *others = make_clusters(3)
    odd = Cluster((*first.addresses[:2], "elsewhere:7"), first.names, 1)

    def come_late():
        time.sleep(0.5)
        return Channel.join(others[1], 5)

    outcomes = run_all([lambda: Channel.join(first, 5), lambda: Channel.join(odd, 5), come_late])
    assert_all_raise(outcomes, ValueError, "disagree", "worker 2 at elsewhere:7", first.addresses[2])


def test_all_reasons_why_a_worker_could_not_be_called_are_told(monkeypatch):
    """The last one, when its time is over, often tells nothing."""
    reasons = iter(["refused", "no tfzero worker", "refused", "closed"])
    monkeypatch.setattr(meeting, "dial", lambda *_: (_ for _ in ()).throw(ConnectionError(next(reasons, "closed"))))
    with pytest.raises(TimeoutError, match=r"worker 1 at \S+ \(refused, then: no tfzero worker, then: closed\)"):
        Channel.join(make_clusters(2)[0], 0.5)


def test_two_processes_claim_one_index():
    ports = find_ports(2)
    addresses = (f"127.0.0.1:{ports[0]}", f"255.255.255.255:{ports[1]}", f"127.0.0.1:{ports[1]}")
    clusters = [Cluster(addresses, ("chief 0", "worker 0", "worker 1"), index) for index in range(2)]
    outcomes = join_all(clusters)  # the second is started as worker 0 where worker 1 should be
    assert_all_raise(outcomes, ValueError, f"at {addresses[2]} is worker 1 of", "To itself it is worker 0 of")


def test_leader_that_gave_up_a_call_calls_again():
    clusters = make_clusters(2)
    port = int(clusters[0].addresses[1].split(":")[1])

    def call_and_die():
        opened = []
        dial(port, b"", opened)
        with opened[0] as connection:
            deadline = time.monotonic() + 1
            handshake.call(connection, b"", (0, 0), deadline)
            messages.send(connection, asdict(clusters[0]), deadline)
            assert messages.receive(connection, deadline, 1)["index"] == 1
        return Channel.join(clusters[0], 5)

    channels = run_all([call_and_die, lambda: Channel.join(clusters[1], 5)])
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1]] * 2
    for channel in channels:
        channel.close()


# ------------------------------------------------------------------------------------ the channel


@pytest.mark.parametrize("channels", [1, 2, 5], indirect=True)
def test_values_in_rank_order(channels):
    values = [{"rank": rank, "text": "ü" * rank, "list": [rank, None, 0.5]} for rank in range(len(channels))]
    for _ in range(3):
        assert on_each(channels, lambda i, c: c.all_gather("values", values[i])) == [values] * len(channels)
        assert on_each(channels, lambda i, c: c.broadcast("first", i)) == [0] * len(channels)


@pytest.mark.parametrize("channels", [3], indirect=True)
def test_threads_share_a_channel(channels):
    def talk(channel):
        return [channel.all_gather("x", number) for number in range(100)]

    for told in run_all([lambda c=c: talk(c) for c in channels for _ in range(2)]):
        assert [len(values) for values in told] == [len(channels)] * 100


@pytest.mark.parametrize("channels", [2], indirect=True)
def test_round_trip_is_short(channels):
    def measure(index, channel):
        seconds = []
        for _ in range(300):
            start = time.perf_counter()
            channel.all_gather("x", index)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]

    assert max(on_each(channels, measure)) < 0.002  # two threads under one GIL; processes take a tenth


@pytest.mark.parametrize("channels", [3], indirect=True)
def test_large_values(channels):
    text = "z" * 10_000_000
    for values in on_each(channels, lambda i, c: c.all_gather("big", f"{i}{text}", 10)):
        assert [(value[0], len(value)) for value in values] == [(f"{i}", len(text) + 1) for i in range(3)]


@pytest.mark.parametrize("channels", [3], indirect=True)
def test_different_places(channels):
    topics = ["variable dense/kernel", "fit", "fit"]
    outcomes = on_each(channels, lambda i, c: c.all_gather(topics[i], None))
    places = 'worker 0: "variable dense/kernel", worker 1: "fit", worker 2: "fit"'
    assert_all_raise(outcomes, RuntimeError, "different places", places)
    again = on_each(channels, lambda i, c: c.all_gather("fit", None))  # the first error, at once
    assert [str(outcome) for outcome in again] == [str(outcome) for outcome in outcomes]


@pytest.mark.parametrize("channels", [3], indirect=True)
@pytest.mark.parametrize("absent", [0, 2])
def test_absent_worker(channels, absent, monkeypatch):
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.5)
    present = [channel for index, channel in enumerate(channels) if index != absent]
    outcomes = on_each(present, lambda i, c: c.all_gather("fit", None, 0.7))
    assert_all_raise(outcomes, TimeoutError, f"worker {absent} at", "'fit'", "0.7 s")
    assert [blamed_by(error) for error in outcomes] == [(absent,)] * 2
    outcomes = on_each(channels, lambda i, c: c.all_gather("fit", None, 0.5))  # also to the one that was late
    assert_all_raise(outcomes, TimeoutError, f"worker {absent} at")


@pytest.mark.parametrize("channels", [3], indirect=True)
def test_late_leader_waits_for_others_in_full(channels, monkeypatch):
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(channel_module, "NOTICE_SECONDS", 0.1)
    delays = [0.9, 0, 1.8]

    def gather(index, channel):
        time.sleep(delays[index])
        return channel.all_gather("fit", index, 1)

    assert on_each(channels, gather) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("channels", [3], indirect=True)
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_worker(channels, lost):
    def gather(index, channel):
        if index == lost:
            return channel.close()
        return channel.all_gather("fit", "z" * 3_000_000)

    outcomes = on_each(channels, gather)
    del outcomes[lost]
    assert_all_raise(outcomes, ConnectionError, f"worker {lost} at", "'fit'")
    assert [blamed_by(error) for error in outcomes] == [(lost,)] * 2


@pytest.mark.parametrize("channels", [3], indirect=True)
@pytest.mark.parametrize("bad", [0, 1])
def test_value_that_is_no_json(channels, bad):
    outcomes = on_each(channels, lambda i, c: c.all_gather("x", object() if i == bad else 1))
    assert_all_raise(outcomes, TypeError, "JSON")


@pytest.mark.parametrize("channels", [4], indirect=True)
def test_agreement(channels):
    same = [{"a": 1, "b": (2, 3)}, {"b": [2, 3], "a": 1}] * 2
    assert on_each(channels, lambda i, c: c.agree("settings", same[i], "settings")) == [None] * 4
    settings = [{"stage": stage, "seed": 7} for stage in (2, 1, 2, 1)]
    outcomes = on_each(channels, lambda i, c: c.agree("settings", settings[i], "settings"))
    assert_all_raise(
        outcomes,
        ValueError,
        "The workers' settings differ: stage is 2 on workers 0, 2 and 1 on workers 1, 3. "
        "Give every worker the same settings.",
    )
    assert on_each(channels, lambda i, c: c.broadcast("x", 1)) == [1] * 4, "all have heard it, and can go on"


@pytest.mark.parametrize("channels", [3], indirect=True)
def test_disagreement_without_keys(channels):
    seeds = [1, None, "x" * 1000]
    outcomes = on_each(channels, lambda i, c: c.agree("seed", seeds[i], "seeds"))
    assert_all_raise(outcomes, ValueError, "1 on worker 0, None on worker 1 and 'xx", "on worker 2. Give")
    assert len(str(outcomes[0])) < 400


@pytest.mark.parametrize("channels", [2], indirect=True)
def test_disagreement_about_a_missing_key(channels):
    settings = [{"stage": None}, {"seed": 1}]
    outcomes = on_each(channels, lambda i, c: c.agree("settings", settings[i], "settings"))
    text = "stage is None on worker 0 and missing on worker 1; seed is missing on worker 0 and 1 on worker 1"
    assert_all_raise(outcomes, ValueError, text)


@pytest.mark.parametrize("channels", [2], indirect=True)
def test_close_twice(channels):
    for channel in channels * 2:
        channel.close()
    with pytest.raises(RuntimeError, match="closed"):
        channels[0].broadcast("x", 1)


# ------------------------------------------------------------------------------------ processes

SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import read_tf_config
channel = Channel.join(read_tf_config(), 10)
index = channel.broadcast("hello", 0) + read_tf_config().index
start = time.perf_counter()
for step in range(200):
    channel.all_gather("step", index)
milliseconds = (time.perf_counter() - start) * 1000 / 200
if sys.argv[2] == str(index):
    os.kill(os.getpid(), 9)
try:
    values = channel.all_gather("end", index)
except ConnectionError as error:
    values = str(error)
channel.close()
print([values, "tensorflow" in sys.modules, milliseconds])
"""


@pytest.mark.parametrize("killed", [None, 0, 1])
def test_real_processes(killed):
    addresses = make_clusters(3)[0].addresses
    spec = {"chief": [addresses[0]], "worker": list(addresses[1:])}
    tasks = [{"type": "chief", "index": 0}, {"type": "worker", "index": 0}, {"type": "worker", "index": 1}]
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(Path(__file__).parents[1]), str(killed)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environ(spec, task), **pipes) for task in tasks]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (output, errors) in enumerate(outputs):
        assert not errors
        if index == killed:
            assert processes[index].returncode == -9
            continue
        values, loaded_tensorflow, milliseconds = eval(output)
        assert not loaded_tensorflow
        assert milliseconds < 5  # about 0.2 on an idle machine
        if killed is None:
            assert values == [0, 1, 2]
        else:
            assert f"{['chief 0', 'worker 0'][killed]} at {addresses[killed]} was lost" in values
