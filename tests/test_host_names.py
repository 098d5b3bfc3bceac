"""Names of hosts: looked up with a limit, and before TensorFlow's servers start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cluster import find_ports

from tfzero.collectives import joining
from tfzero.workers import host_names, meeting
from tfzero.workers.addresses import host_of
from tfzero.workers.cluster import Cluster, others_of
from tfzero.workers.host_names import Lookup, advice_on, endpoints, problem_of

pytestmark = pytest.mark.timeout(120)

CLUSTER = Cluster(("10.0.0.1:1", "n2:2", "[::1]:3", "n4:4"), ("chief 0", "worker 0", "worker 1", "worker 2"), 1)


@pytest.fixture
def resolver(monkeypatch):
    """A stand-in for the resolver: `known` names are found, those in `dark` never get an answer."""

    class Resolver:
        known, dark, asked, end = {"n2": "127.0.0.1"}, set(), [], threading.Event()

        def __call__(self, host, port, *args, **kwargs):
            self.asked.append(host)
            if host in self.dark:
                self.end.wait(30)
            if host in self.known or host_names.is_number(host):
                return original(self.known.get(host, host), port, *args, **kwargs)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolver, original = Resolver(), socket.getaddrinfo
    resolver.known, resolver.dark, resolver.asked, resolver.end = dict(resolver.known), set(), [], threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    yield resolver
    resolver.end.set()


def test_numbers_need_no_lookup(resolver):
    assert [host_of(address) for address in CLUSTER.addresses] == ["10.0.0.1", "n2", "::1", "n4"]
    lookup = Lookup(["10.0.0.1", "::1", "fe80::1%eth0"], 5)
    assert lookup.names == () and lookup.missing(wait=True) == {} and resolver.asked == []


def test_a_name_that_appears_late_is_found(resolver):
    lookup = Lookup(["n2", "n4", "n2"], 20)
    threading.Timer(0.5, resolver.known.update, [{"n4": "127.0.0.1"}]).start()
    start = time.monotonic()
    assert lookup.missing(wait=True) == {}
    assert 0.3 < time.monotonic() - start < 5


@pytest.mark.parametrize("dark", [False, True])
def test_a_name_that_is_not_found_is_told_in_time(resolver, dark):
    resolver.dark = {"n4"} if dark else set()
    start = time.monotonic()
    lookup = Lookup(map(host_of, CLUSTER.addresses), 0.6)
    missing = lookup.missing(wait=True)
    assert 0.5 < time.monotonic() - start < 3
    assert missing == {"n4": "no answer" if dark else "Name or service not known"}
    text = problem_of([{}, missing, {}, {}], CLUSTER)
    for part in ("worker 0 cannot find worker 2 at n4:4", missing["n4"], "/etc/hosts", "IP addresses"):
        assert part in text and part in advice_on(lookup, CLUSTER)
    assert problem_of([{}] * 4, CLUSTER) == ""


def test_many_names_are_looked_up_beside_each_other(resolver):
    names = [f"host{k}" for k in range(100)]
    resolver.dark = set(names[:20])
    resolver.known |= dict.fromkeys(names, "127.0.0.1")
    assert set(Lookup(names, 2).missing(wait=True)) == resolver.dark


@pytest.mark.parametrize("name", ["a" * 70 + ".b", "a..b"])
def test_an_impossible_name_is_told(name):
    assert list(Lookup([name], 0.3).missing(wait=True)) == [name]
    with pytest.raises((OSError, UnicodeError)):
        endpoints(name, 1, 5)


def test_dialling_does_not_wait_for_the_resolver(resolver):
    resolver.dark = {"n2"}
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="looking up n2 takes longer than 0.3 s"):
        meeting.dial("n2:1", 0.3)
    assert time.monotonic() - start < 3


def test_a_meeting_that_fails_says_which_names_were_not_found(resolver):
    cluster = Cluster((f"127.0.0.1:{find_ports(1)[0]}", f"n4:{find_ports(1)[0]}"), ("worker 0", "worker 1"), 0)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"1 of 2 workers missing.*worker 0 cannot find worker 1 at n4") as raised:
        joining._meet(cluster, 1.0)
    assert time.monotonic() - start < 5 and "/etc/hosts" in str(raised.value)


def test_a_name_that_only_one_worker_does_not_find_is_an_error_on_all(monkeypatch):
    """Found by those who dial, and missing where nobody dials: TensorFlow would wait for it without end."""
    ports = [find_ports(1)[0], find_ports(1)[0]]
    clusters = [
        Cluster((f"localhost:{ports[0]}", f"127.0.0.1:{ports[1]}"), ("worker 0", "worker 1"), k) for k in (0, 1)
    ]
    lacking = threading.local()
    original = Lookup.missing

    def missing(self, *, wait):
        return {"localhost": "no answer"} if getattr(lacking, "here", False) else original(self, wait=wait)

    monkeypatch.setattr(Lookup, "missing", missing)
    errors = [None, None]

    def meet(index):
        lacking.here = index == 1
        try:
            joining._meet(clusters[index], 10)
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=meet, args=(index,)) for index in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for error in errors:
        assert type(error) is OSError and "worker 1 cannot find worker 0 at localhost" in str(error), errors


def test_a_worker_need_not_find_its_own_name(monkeypatch):
    """Others may know this machine by a name that it does not have itself."""
    original, asked = socket.getaddrinfo, []

    def look_up(host, *args, **kwargs):
        return original("127.0.0.1" if host == "only-others-know" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(joining, "Lookup", lambda hosts, seconds: asked.append(hosts) or Lookup(hosts, seconds))
    ports = [find_ports(1)[0], find_ports(1)[0]]
    addresses = (f"127.0.0.1:{ports[0]}", f"only-others-know:{ports[1]}")
    clusters = [Cluster(addresses, ("worker 0", "worker 1"), k) for k in (0, 1)]
    channels = [None, None]

    def meet(index):
        channels[index] = joining._meet(clusters[index], 10)

    threads = [threading.Thread(target=meet, args=(index,)) for index in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert sorted(asked) == [["127.0.0.1"], ["only-others-know"]]
    [channel.close() for several in channels for channel in several]


def test_a_cluster_of_one_has_no_others():
    one = Cluster(("nowhere.invalid:1",), ("chief 0",), 0)
    assert others_of(one) is None and others_of(None) is None and others_of(CLUSTER) is CLUSTER


_ALONE = """
import socket, time, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise socket.gaierror(socket.EAI_AGAIN, "no answer")
import keras, numpy as np, tensorflow as tf
tf.constant(1)  # with others, this would be too early
import tfzero
socket.getaddrinfo = refuse
start = time.monotonic()
strategy = tfzero.ZeroStrategy(stage=3, timeout_seconds=1)
took = time.monotonic() - start
with strategy.scope():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(256), keras.layers.Dense(1)])
model.compile("adam", "mse")
model.fit(np.ones((8, 8), "f4"), np.ones((8, 1), "f4"), verbose=0)
listening = [line for line in open("/proc/net/tcp6").read().splitlines() + open("/proc/net/tcp").read().splitlines()
             if line.split()[1].endswith(":%04X" % int(sys.argv[1])) and line.split()[3] == "0A"]
print("RESULT", strategy.num_replicas_in_sync, asked, listening, took < 60, strategy.extended.worker_devices)
"""


def test_a_cluster_of_one_starts_no_server_and_looks_no_name_up(tmp_path):
    port = find_ports(1)[0]
    config = {"cluster": {"master": [f"nowhere.invalid:{port}"]}, "task": {"type": "master", "index": "0"}}
    environment = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", _ALONE, str(port)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert result.startswith("RESULT 1 [] [] True ") and "worker" not in result, result


_LOST_NAME = """
import signal, socket, sys, time, threading
original = socket.getaddrinfo
def dark(host, *args, **kwargs):
    if host == "dark":
        time.sleep(600)
    return original(host, *args, **kwargs)
socket.getaddrinfo = dark
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import read_tf_config
from tfzero.workers.addresses import host_of
from tfzero.workers.host_names import Lookup
def stop(*_):
    print("STOPPED", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
print("READY", flush=True)
cluster = read_tf_config()
lookup = Lookup(["dark"], 500)
Channel.join(cluster, 500) if cluster.index == 0 else lookup.missing(wait=True)
"""


def test_sigterm_ends_a_worker_that_waits_for_a_name():
    """Whether it dials the name, as worker 0, or only looks it up; nor does the exit wait for the resolver."""
    workers = [f"127.0.0.1:{find_ports(1)[0]}", f"dark:{find_ports(1)[0]}"]
    processes = []
    try:
        for index in (0, 1):
            config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            environment = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, "-c", _LOST_NAME]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        for process in processes:
            assert process.stdout.readline() == "READY\n"
        time.sleep(1)
        start = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            assert process.communicate(timeout=30)[0] == "STOPPED\n"
            assert process.returncode == 7
        assert time.monotonic() - start < 10
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_the_library_dials_and_looks_up_in_one_place_only():
    """`socket.getaddrinfo` without a limit is called in this module, and for a loopback address to listen at."""
    root = Path(host_names.__file__).parents[1]
    callers = {path.name for path in root.rglob("*.py") if "getaddrinfo(" in path.read_text()}
    assert callers == {"host_names.py", "meeting.py"}
