"""Who calls a waiting worker and is none: told apart before anything is read of it, and in nobody's way."""

import contextlib
import functools
import itertools
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from test_cluster import assert_all_raise, dial, join_all, make_clusters, on_each, run_all

import tfzero
from tfzero.workers import handshake, meeting, messages
from tfzero.workers import links as links_module
from tfzero.workers.channel import Channel

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    """No test leaves a thread or a file."""
    before = threading.active_count(), len(os.listdir("/dev/fd"))
    yield
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before


def port_of(cluster, index):
    return int(cluster.addresses[index].rpartition(":")[2])


def close_all(channels):
    for channel in channels:
        channel.close()


def header(length, checksum=0):
    return struct.pack(f"!{len(messages.MAGIC)}sQI", messages.MAGIC, length, checksum)


def call_worker_1(cluster, told, secret=b""):
    """Calls worker 1 as somebody who knows the protocol, tells it something, and gives what is answered."""
    opened = []
    dial(port_of(cluster, 1), b"", opened)
    with opened[0] as connection:
        deadline = time.monotonic() + 5
        handshake.call(connection, secret, (0, 0), deadline)
        connection.sendall(told)
        return connection.recv(1000)


def join_beside(clusters, disturb, delay_seconds=0.5):
    """All workers meet; the leader comes a little later than who calls worker 1 meanwhile."""

    def lead():
        time.sleep(delay_seconds)
        return Channel.join(clusters[0], 10)

    *channels, told = run_all([lead, lambda: Channel.join(clusters[1], 10), lambda: disturb(clusters[0])])
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1]] * 2
    close_all(channels)
    return told


def text_of(message):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return header(len(text), messages.zlib.crc32(text)) + text


@pytest.mark.parametrize(
    "told",
    [
        header(2**40),
        header(messages.STRANGER_BYTES + 1),
        text_of(b"[" * 60_000),
        text_of(b'{"addresses": ' + b"[" * 60_000),
        text_of(b'{"index": ' + b"9" * 60_000 + b"}"),
        text_of([]),
        text_of({}),
        text_of({"addresses": "ab", "names": "cd", "index": 0}),
        text_of({"addresses": [1, 2], "names": ["a", "b"], "index": 0}),
        text_of({"addresses": ["a", "b"], "names": ["a", "b"], "index": True}),
        text_of({"addresses": ["a", "b"], "names": ["a", "b"], "index": 2**70}),
        text_of({"addresses": [], "names": [], "index": 0}),
        header(10, 1) + b"0123456789",
    ],
)
def test_what_is_no_hello_of_a_leader_is_turned_away(told):
    assert join_beside(make_clusters(2), lambda cluster: call_worker_1(cluster, told)) == b""


def test_a_message_that_was_changed_on_the_way_is_not_read():
    here, there = socket.socketpair()
    with here, there:
        messages.send(there, {"value": 12}, time.monotonic() + 5)
        sent = messages.read_bytes(here, len(here.recv(1000, socket.MSG_PEEK)), time.monotonic() + 5)
        there.sendall(sent.replace(b"12", b"13"))
        with pytest.raises(ConnectionError, match="damaged"):
            messages.receive(here, time.monotonic() + 5, 5)


def test_what_is_too_long_to_tell_is_not_sent(monkeypatch):
    monkeypatch.setattr(messages, "MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="can tell each other 100 bytes at once. Received: 104 bytes"):
        messages.encode({"x": "y" * 95})
    assert len(messages.encode({"x": "y" * 91})) == 100


TOO_LONG = header(messages.STRANGER_BYTES + 1)


def test_nothing_is_read_of_a_caller_that_announces_too_much():
    clusters = make_clusters(2)
    outcome, _ = run_all([lambda: Channel.join(clusters[1], 1), lambda: call_worker_1(clusters[0], TOO_LONG)])
    assert type(outcome) is TimeoutError and "announces 65,537 bytes, and may send 65,536" in str(outcome)


def test_nothing_is_read_of_who_answers_a_leader_with_too_much():
    clusters = make_clusters(2)

    def answer():
        with meeting.listen(clusters[1]) as listener, contextlib.suppress(TimeoutError):
            listener.settimeout(0.5)
            while True:
                with listener.accept()[0] as connection, contextlib.suppress(ConnectionError):
                    handshake.hear(connection, b"", time.monotonic() + 5)
                    connection.sendall(TOO_LONG)
                    connection.recv(1000)
                    connection.recv(1000)

    outcome, _ = run_all([lambda: Channel.join(clusters[0], 1), answer])
    assert type(outcome) is TimeoutError and "announces 65,537 bytes, and may send 65,536" in str(outcome)


@pytest.mark.parametrize("told", [struct.pack("!Q", 2**40) * 4, b"[" * 100_000, bytes(1000), b""])
def test_who_does_not_shake_hands_is_turned_away(told):
    def disturb(cluster):
        opened = []
        with contextlib.suppress(ConnectionError):
            dial(port_of(cluster, 1), told, opened)
        return opened[0]

    join_beside(make_clusters(2), disturb).close()


def test_a_leader_of_another_cluster_does_not_become_the_leader():
    def disturb(cluster):
        other = replace(cluster, addresses=("127.0.0.1:1", cluster.addresses[1]))
        welcome = text_of(asdict(other)) + text_of({"seconds_left": 100})
        return call_worker_1(cluster, welcome)

    assert messages.MAGIC in join_beside(make_clusters(2), disturb)  # it is told of which cluster the worker is


def test_200_silent_callers_do_not_stop_a_meeting():
    clusters = make_clusters(2)
    opened = []

    def disturb(cluster):
        for _ in range(200):
            dial(port_of(cluster, 1), b"", opened)

    began = time.monotonic()
    join_beside(clusters, disturb)
    assert time.monotonic() - began < 4
    for connection in opened:
        connection.close()


def test_a_caller_that_speaks_in_drops_has_its_time_and_no_more():
    here, there = socket.socketpair()

    def drip():
        with contextlib.suppress(OSError):
            while True:
                there.sendall(b"x")  # so that there is always one to read

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        messages.read_bytes(here, 10**9, began + 0.5)
    assert time.monotonic() - began < 1
    here.close()
    dripping.join()
    there.close()


def test_one_that_always_has_a_drop_more_has_no_more_time_either():
    class Dripping:
        def settimeout(self, seconds):
            assert seconds > 0

        def recv(self, count):
            assert time.monotonic() < began + 2, "it is still read"
            assert count <= 2**20, "memory is taken for what has not come"
            return b"x"

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        messages.read_bytes(Dripping(), 10**9, began + 0.1)


def test_a_worker_that_is_slow_to_answer_is_called_again(monkeypatch):
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.3)
    clusters = make_clusters(2)
    late = [1.0]
    answer = handshake.call

    def answer_late(*args):
        time.sleep(late.pop() if late else 0)
        return answer(*args)

    monkeypatch.setattr(meeting.handshake, "call", answer_late)
    channels = join_all(clusters)
    assert not late
    assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1]] * 2
    late.append(1.0)
    monkeypatch.setattr(links_module, "HELLO_SECONDS", 0.3)
    made = run_all([lambda c=c, k=k: links_module.link(c, k, 2, 5) for c, k in zip(clusters, channels, strict=True)])
    assert not late
    for links in (*made[0], *made[1]):
        links.close("the test has ended")
    close_all(channels)


# Secrets.


def test_workers_with_one_secret_meet(monkeypatch):
    monkeypatch.setenv("TFZERO_SECRET", SECRET)
    clusters = make_clusters(2)
    channels = join_all(clusters)
    made = run_all([lambda c=c, k=k: links_module.link(c, k, 1, 5) for c, k in zip(clusters, channels, strict=True)])
    for (links,) in made:
        links.close("the test has ended")
    close_all(channels)


@pytest.mark.parametrize("theirs", [b"", b"another secret, and long enough"])
def test_who_does_not_know_the_secret_is_neither_leader_nor_worker(monkeypatch, theirs):
    monkeypatch.setenv("TFZERO_SECRET", SECRET)
    clusters = make_clusters(2)
    told = text_of(asdict(clusters[0])) + text_of({"seconds_left": 100})

    def disturb(cluster):
        try:
            return call_worker_1(cluster, told, secret=theirs)
        except ConnectionError as error:
            return str(error)

    assert "has another TFZERO_SECRET" in join_beside(clusters, disturb)

    def answer():
        guess = b"tfzero worker 2\n" + secrets.token_bytes(64)
        with meeting.listen(clusters[1]) as listener, contextlib.suppress(TimeoutError):
            listener.settimeout(1)
            for number in itertools.count():
                with listener.accept()[0] as connection, contextlib.suppress(ConnectionError):
                    if number % 2:
                        connection.sendall(guess)
                        connection.recv(1000)
                    handshake.hear(connection, theirs, time.monotonic() + 5)

    outcome, _ = run_all([lambda: Channel.join(clusters[0], 1), answer])
    assert type(outcome) is TimeoutError and "worker 1 at" in str(outcome) and "TFZERO_SECRET" in str(outcome)


def test_workers_with_different_secrets_say_so(monkeypatch):
    given = iter([SECRET.encode(), b"another secret, and long enough"])
    monkeypatch.setattr("tfzero.workers.channel.read_secret", lambda: next(given))
    assert_all_raise(join_all(make_clusters(2), 1), TimeoutError, "has another TFZERO_SECRET")


def test_a_proof_that_is_sent_back_proves_nothing():
    here, there = socket.socketpair()

    def send_back():
        there.sendall(b"tfzero worker 2\n" + bytes(32))
        there.sendall(messages.read_bytes(there, 72, time.monotonic() + 5)[-32:])

    with here, there:
        call = functools.partial(handshake.call, here, SECRET.encode(), (1, 0), time.monotonic() + 5)
        (outcome, _) = run_all([call, send_back])
    assert type(outcome) is ConnectionError and "has another TFZERO_SECRET" in str(outcome)


def test_what_a_caller_calls_for_cannot_be_changed_on_the_way():
    (here, caller), (there, listener) = socket.socketpair(), socket.socketpair()
    deadline = time.monotonic() + 5

    def pass_on_as_worker_2():
        here.sendall(messages.read_bytes(there, 48, deadline))
        answer = messages.read_bytes(here, 72, deadline)
        there.sendall(answer[:32] + struct.pack("!II", 2, 0) + answer[40:])
        here.sendall(messages.read_bytes(there, 32, deadline))

    with here, caller, there, listener:
        call = functools.partial(handshake.call, caller, SECRET.encode(), (1, 0), deadline)
        hear = functools.partial(handshake.hear, listener, SECRET.encode(), deadline)
        assert_all_raise(run_all([call, hear, pass_on_as_worker_2])[:2], ConnectionError, "another TFZERO_SECRET")


@pytest.mark.parametrize("short", ["", "x", "fifteen letters"])
def test_a_short_secret_is_refused(short):
    with pytest.raises(ValueError, match=f"TFZERO_SECRET must have 16 characters.*Received: {len(short)} characters"):
        handshake.read_secret({"TFZERO_SECRET": short})
    assert handshake.read_secret({}) == b""


def secret_of_worker():
    return os.environ["TFZERO_SECRET"]


def test_local_fleets_have_a_secret_each(monkeypatch, tmp_path):
    monkeypatch.delenv("TFZERO_SECRET", raising=False)
    first, second = (tfzero.run_local(secret_of_worker, workers=2) for _ in range(2))
    assert first[0] == first[1] != second[0] == second[1]
    assert min(map(len, first + second)) == 64
    monkeypatch.setenv("TFZERO_SECRET", SECRET)
    assert tfzero.run_local(secret_of_worker, workers=1) == [SECRET]
    script = tmp_path / "show.py"
    script.write_text("import os; print(len(os.environ['TFZERO_SECRET']))")
    environment = {key: value for key, value in os.environ.items() if key != "TFZERO_SECRET"}
    command = [sys.executable, "-m", "tfzero.launch", "--workers", "2", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert sorted(output.splitlines()) == ["[worker 0] 64", "[worker 1] 64"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_local_workers_listen_on_loopback_alone(host):
    (cluster,) = make_clusters(1)
    port = port_of(cluster, 0)
    with meeting.listen(replace(cluster, addresses=(f"{host}:{port}",))) as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    with meeting.listen(replace(cluster, addresses=(f"somewhere.example:{port}",))) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
