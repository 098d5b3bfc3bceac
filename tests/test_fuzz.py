"""Random messages, bit flips and truncations against whoever reads from a socket: the right value, or a named error.

Never a hang, never another value. Every case is drawn from its number, which a failure shows.
"""

import atexit
import contextlib
import json
import random
import socket
import sys
import threading
import time
import zlib
from dataclasses import asdict

import numpy as np
import pytest
from marks import sweep
from test_cluster import dial, make_clusters, on_each, run_all

from tfzero.workers import handshake, meeting, messages
from tfzero.workers import links as links_module
from tfzero.workers.channel import Channel
from tfzero.workers.links import Links

NAMED = (ConnectionError, TimeoutError, RuntimeError, ValueError, TypeError)
TIMEOUT_SECONDS = 0.3
SLACK_SECONDS = 3.0  # for a machine with other work
CASES = pytest.mark.parametrize("cases", [range(15), sweep(range(15, 300))], ids=["few", "many"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.2)
    monkeypatch.setattr(links_module, "HELLO_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "CALL_SECONDS", 0.5)


def text_of(message):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return messages._HEADER.pack(messages.MAGIC, len(text), zlib.crc32(text)) + text


def draw_json(chance, depth=3):
    """Any JSON, often with the keys and kinds of ours."""
    kind = chance.randrange(9 if depth else 6)
    if kind == 6:
        return [draw_json(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind > 6:
        keys = (
            "topic",
            "value",
            "values",
            "seconds_left",
            "error",
            "text",
            "addresses",
            "names",
            "index",
            "blamed",
            "",
        )
        return {chance.choice(keys): draw_json(chance, depth - 1) for _ in range(chance.randrange(5))}
    values = (
        None,
        True,
        "x" * chance.randrange(9),
        chance.randrange(-9, 9),
        chance.choice((1e308, -0.5, 2**80)),
        "fit",
    )
    return values[kind]


def draw(chance, right: bytes) -> bytes:
    """What a faulty or strange peer may send in place of these bytes."""
    kind = chance.randrange(8)
    if kind == 0 and right:  # a bit flips
        at = chance.randrange(8 * len(right))
        return bytes(byte ^ ((at // 8 == place) << at % 8) for place, byte in enumerate(right))
    if kind == 1:
        return right[: chance.randrange(len(right) + 1)]
    if kind == 2:
        return chance.randbytes(chance.choice((0, 1, 7, 60, 3000)))
    if kind == 3:
        return text_of(draw_json(chance))
    if kind == 4:
        return text_of(chance.choice((b"[" * 5000, b'{"values": ' + b"[" * 5000, b"9" * 5000, b"\xff", b"", b"NaN")))
    if kind == 5:
        return messages._HEADER.pack(messages.MAGIC, chance.choice((2**40, 2**63, 2**28 + 1, 5)), 0)
    if kind == 6:
        return right + chance.randbytes(3)
    return right


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


def serve(connection, sent, stays):
    """A peer that sends this, listens for a moment, and leaves unless it stays."""
    with contextlib.suppress(OSError):
        connection.sendall(sent)
        if not stays:
            connection.settimeout(0.05)
            connection.recv(100_000)
            connection.shutdown(socket.SHUT_RDWR)


def assert_named_or(outcome, right, case):
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, NAMED) and str(outcome), (case, repr(outcome))
    else:
        assert right(outcome), (case, outcome)


@CASES
@pytest.mark.parametrize("is_leader", [True, False])
def test_a_channel(cases, is_leader):
    cluster = make_clusters(2)[0 if is_leader else 1]
    own, theirs = ("a", "b") if is_leader else ("b", "a")
    answer = {"topic": "fit", "value": theirs} if is_leader else {"values": [theirs, own]}
    for case in cases:
        chance = random.Random(case)
        sent, stays = draw(chance, text_of(answer)), chance.random() < 0.3
        intact = sent[: len(text_of(answer))] == text_of(answer)
        here, there = socket.socketpair()
        channel = Channel(cluster, {1 if is_leader else 0: here}, TIMEOUT_SECONDS)
        began = time.monotonic()
        with here, there:
            _, outcome = run_all([lambda: serve(there, sent, stays), lambda: channel.all_gather("fit", own)])  # noqa: B023
            assert time.monotonic() - began < 2 * TIMEOUT_SECONDS + SLACK_SECONDS, case
            if intact:
                right = ["a", "b"].__eq__
            else:  # JSON of the right form is a value
                right = lambda values: sent.startswith(messages.MAGIC) and type(values) is list and len(values) == 2  # noqa: B023,E731
            assert_named_or(outcome, right, case)
            channel.close()


@CASES
def test_a_worker_that_waits_for_its_leader(cases):
    for case in cases:
        chance = random.Random(case)
        clusters = make_clusters(2)
        port = int(clusters[1].addresses[1].rpartition(":")[2])
        hello, welcome = text_of(asdict(clusters[0])), text_of({"seconds_left": 5.0})
        other = text_of({**asdict(clusters[0]), "addresses": ["127.0.0.1:1", "127.0.0.1:2"]})
        opened = []

        def disturb(chance=chance, opened=opened, port=port, hello=hello, welcome=welcome, other=other):
            dial(port, b"", opened)
            with contextlib.suppress(OSError):
                if chance.random() < 0.7:
                    handshake.call(opened[0], b"", (0, 0), time.monotonic() + 1)
                    changed = draw(chance, hello)
                    opened[0].sendall(other if changed[: len(hello)] == hello else changed)  # it is no leader
                    opened[0].sendall(welcome)
                else:
                    opened[0].sendall(draw(chance, bytes(104)))

        def lead(clusters=clusters):
            time.sleep(0.1)
            return Channel.join(clusters[0], 5)

        *channels, _ = run_all([lead, lambda c=clusters: Channel.join(c[1], 5), disturb])
        assert on_each(channels, lambda i, c: c.all_gather("x", i)) == [[0, 1]] * 2, case
        for connection in (*channels, *opened):
            connection.close()


@CASES
def test_links(cases):
    cluster = make_clusters(2)[0]
    mine, theirs = np.arange(6.0), 10 * np.arange(6.0)
    for case in cases:
        chance = random.Random(case)
        # The first exchange of a sum: their part of this worker's half, and then the sum of their half.
        first = [links_module._HEADER.pack(1, 24, 0), theirs[:3].tobytes()]
        second = [links_module._HEADER.pack(2, 24, 0), (mine + theirs)[3:].tobytes()]
        pieces = [*first, *second]
        place = chance.choice((0, 2))  # of headers: payloads are guarded by TCP alone
        changed = draw(chance, pieces[place])
        sent = b"".join([*pieces[:place], changed, *pieces[place + 1 :]])
        if changed != pieces[place] and len(changed) > len(pieces[place]) and changed.startswith(pieces[place]):
            sent = b"".join(pieces[: place + 1])  # no bytes more within a payload, whose content nothing guards
        here, there = tcp_pair()
        links = Links(cluster, {1: here}, TIMEOUT_SECONDS)
        out = np.empty(6)
        ending = threading.Timer(1.0, links.close, ["a worker was lost."])  # as the pulse does
        ending.start()
        began = time.monotonic()
        with there:
            stays = chance.random() < 0.3

            def reduce(links=links, out=out):
                links.all_reduce(mine, out)
                return out

            _, outcome = run_all([lambda: serve(there, sent, stays), reduce])  # noqa: B023
            assert time.monotonic() - began < 1 + TIMEOUT_SECONDS + SLACK_SECONDS, case
            assert_named_or(outcome, lambda value: (value == mine + theirs).all(), case)
        ending.cancel()
        ending.join()
        links.close("the test has ended")


@CASES
def test_who_waits_for_links(cases):
    caller, cluster = make_clusters(2)
    for case in cases:
        chance = random.Random(case)
        opened = []
        with meeting.listen(cluster) as listener:
            port = listener.getsockname()[1]

            def disturb(chance=chance, opened=opened, port=port):
                dial(port, draw(chance, handshake._ANSWER.pack(bytes(32), 0, 0, bytes(32))), opened)

            def call(port=port):
                time.sleep(0.05)
                return links_module._dial(caller, 1, b"secret", 0, 5)

            def hear(listener=listener):
                return list(links_module._callers(cluster, listener, b"secret", 1, 5))

            _, calling, heard = run_all([disturb, call, hear])
        ((*claim, connection),) = heard
        assert claim == [0, 0], case
        for each in (*opened, calling, connection):
            each.close()


@CASES
@pytest.mark.parametrize("is_leader", [True, False])
def test_a_pulse(cases, is_leader, monkeypatch):
    from tfzero.collectives import pulse as pulse_module

    monkeypatch.setattr(pulse_module, "_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    clusters = make_clusters(2)
    own = 0 if is_leader else 1
    beat = [[], [False, False, 0], "", "", []]
    for case in cases:
        chance = random.Random(case)
        strange = chance.choice(
            (draw_json(chance), [[], [True, 5], "", "", []], [*beat[:1], draw_json(chance), "", "", []], beat)
        )
        value = strange if is_leader else [strange, beat]
        answer = {"topic": "the pulse", "value": value} if is_leader else {"values": value}
        here, there = socket.socketpair()
        channel = Channel(clusters[own], {1 - own: here}, TIMEOUT_SECONDS)
        pulse = pulse_module.Pulse(clusters[own], channel, TIMEOUT_SECONDS, ())
        with there:
            serve(there, draw(chance, text_of(answer)), stays=False)
            assert pulse._has_reason.wait(2 * TIMEOUT_SECONDS + SLACK_SECONDS), case  # all peers leave at last
        assert pulse._reason, case
        assert not failed, (case, failed)
        atexit.unregister(pulse.stop)
        pulse.stop()
