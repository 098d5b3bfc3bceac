"""Collectives over connections between every two workers, which are threads here. Real ones train elsewhere."""

import re
import socket
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from marks import FLEET_SECONDS, sweep
from test_cluster import join_all, make_clusters, run_all

import tfzero
from tfzero.workers import links as links_module
from tfzero.workers.links import Links, link

TIMEOUT_SECONDS = 5


def link_all(clusters, count=1):
    """Every worker's `Links`, so many each."""
    channels = join_all(clusters)
    calls = zip(clusters, channels, strict=True)
    made = run_all([lambda c=c, k=k: link(c, k, count, TIMEOUT_SECONDS) for c, k in calls])
    for channel in channels:
        channel.close()
    return made


@pytest.fixture(scope="module", params=[2, 3])
def all_links(request):
    """Every worker's `Links`, of as many workers as the parameter says."""
    made = [mine for (mine,) in link_all(make_clusters(request.param))]
    yield made
    for mine in made:
        mine.close("the test has ended")


def run(all_links, method, values, shape):
    """What a collective makes of each worker's value."""
    outs = [np.empty(shape, value.dtype) for value in values]
    outcomes = run_all([
        lambda i=i: method(all_links[i], values[i], outs[i]) for i in range(len(all_links))
    ])  # fmt: skip
    assert outcomes == [None] * len(all_links)
    return outs


def values_of(count, shape, dtype):
    """Different ones for each worker."""
    return [
        (100 * np.random.default_rng(rank).normal(size=shape)).astype(tf.as_dtype(dtype).as_numpy_dtype)
        for rank in range(count)
    ]


DTYPES = ["float32", "float64", "float16", "bfloat16", "int32", "int64"]


@pytest.mark.parametrize(
    ("elements", "dtype"),
    [
        sweep(elements, dtype) if elements > 1000 and dtype not in ("float32", "bfloat16") else (elements, dtype)
        for elements in (1, 2, 1000, 3_000_001)
        for dtype in DTYPES
    ],
)
def test_sum_is_that_of_rank_order(all_links, dtype, elements):
    values = values_of(len(all_links), elements, dtype)
    expected = values[0] + values[1]
    for value in values[2:]:
        expected = expected + value
    for out in run(all_links, Links.all_reduce, values, elements):
        np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("shape", [(), (1,), (7, 11), (600_001,)])
def test_sum_keeps_the_shape(all_links, shape):
    values = [np.full(shape, 1.0 + rank, "float32") for rank in range(len(all_links))]
    for out in run(all_links, Links.all_reduce, values, shape):
        np.testing.assert_array_equal(out, sum(values))


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8", "bool"])
@pytest.mark.parametrize("elements", [0, 1, 700_001])
def test_gathered_values_are_in_rank_order(all_links, dtype, elements):
    values = values_of(len(all_links), elements, dtype)
    for out in run(all_links, Links.all_gather, values, (len(all_links), elements)):
        np.testing.assert_array_equal(out.view(np.uint8), np.stack(values).view(np.uint8))


@pytest.mark.parametrize("elements", [0, 1, 700_001])
def test_each_worker_gets_its_rows(all_links, elements):
    size = len(all_links)
    values = values_of(size, (size, elements), "float32")
    for rank, out in enumerate(run(all_links, Links.all_to_all, values, (size, elements))):
        np.testing.assert_array_equal(out, np.stack([value[rank] for value in values]))


def test_a_sum_needs_little_memory_of_its_own(all_links):
    run(all_links, Links.all_reduce, values_of(len(all_links), 3_000_001, "float32"), 3_000_001)
    assert all_links[0]._scratch.nbytes <= 2 * links_module._CHUNK_BYTES


@pytest.fixture
def pair():
    """Two workers' `Links` that a test may break."""
    made = [mine for (mine,) in link_all(make_clusters(2))]
    yield made
    for mine in made:
        mine.close("the test has ended")


def test_workers_at_different_collectives_are_told(pair):
    first, second = pair
    small, large = np.ones(10), np.ones(20)
    outcomes = run_all([
        lambda: first.all_reduce(small, np.empty(10)), lambda: second.all_reduce(large, np.empty(20)),
    ])  # fmt: skip
    for outcome in outcomes:
        assert type(outcome) is RuntimeError
        assert "number, bytes and key are" in str(outcome)
        assert re.search(r"\(1, \d+, 0\) on worker [01], \(1, \d+, 0\) on worker [01]", str(outcome))
        assert "Run the same program" in str(outcome)


def test_workers_at_different_collectives_of_one_size_are_told(pair):
    first, second = pair
    outcomes = run_all([
        lambda: first.all_gather(np.ones(10), np.empty((2, 10)), key=5),
        lambda: second.all_gather(np.ones(10), np.empty((2, 10)), key=6),
    ])  # fmt: skip
    for outcome in outcomes:
        assert type(outcome) is RuntimeError
        assert re.search(r"\(1, 80, [56]\) on worker [01], \(1, 80, [56]\) on worker [01]", str(outcome))


def test_two_collectives_at_once_are_refused(pair):
    first, second = pair
    out = np.empty(10)
    waiting = threading.Thread(target=lambda: first.all_reduce(np.ones(10), out, key=7))
    waiting.start()
    while not first._is_carrying.locked():
        time.sleep(0.01)
    for method, received in ((first.all_reduce, np.empty(10)), (first.all_gather, np.empty((2, 10)))):
        with pytest.raises(RuntimeError, match="worker 0 began the collective 8 before the last one .* had ended"):
            method(np.ones(10), received, key=8)
    second.all_reduce(np.ones(10), np.empty(10), key=7)
    waiting.join()
    np.testing.assert_array_equal(out, 2 * np.ones(10))


def test_a_lost_worker_is_named_by_who_closes(pair):
    first, second = pair

    def close_later():
        time.sleep(0.3)
        second.close("it ends")
        time.sleep(0.3)
        assert first.is_lost
        first.close("worker 1 was lost.")

    closing = threading.Thread(target=close_later)
    closing.start()
    with pytest.raises(ConnectionError, match="worker 1 was lost"):
        first.all_reduce(np.ones(10), np.empty(10))
    closing.join()
    with pytest.raises(ConnectionError, match="worker 1 was lost"):
        first.all_reduce(np.ones(10), np.empty(10))


def test_who_waits_for_a_silent_worker_can_be_ended(pair):
    first, _ = pair
    closing = threading.Timer(0.3, lambda: first.close("worker 1 did not arrive."))
    closing.start()
    with pytest.raises(ConnectionError, match="worker 1 did not arrive"):
        first.all_reduce(np.ones(3_000_000), np.empty(3_000_000))
    closing.join()


def test_strangers_are_turned_away(monkeypatch):
    clusters = make_clusters(2)
    port = int(clusters[1].addresses[1].rpartition(":")[2])
    dial = links_module._dial

    def dial_after_strangers(*args):
        silent, wrong = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        wrong.sendall(b"x" * 1000)
        with silent, wrong:
            return dial(*args)

    monkeypatch.setattr(links_module, "_dial", dial_after_strangers)
    made = link_all(clusters, count=2)
    for number in range(2):
        pair = [mine[number] for mine in made]
        for out in run(pair, Links.all_reduce, [np.ones(3), 2 * np.ones(3)], 3):
            np.testing.assert_array_equal(out, 3 * np.ones(3))
        for mine in pair:
            mine.close("the test has ended")


def test_a_worker_that_does_not_call_is_named(monkeypatch):
    clusters = make_clusters(2)
    channels = join_all(clusters)
    monkeypatch.setattr(links_module, "_dial", lambda *args: socket.socket())
    outcomes = run_all([lambda c=c, k=k: link(c, k, 1, 1.0) for c, k in zip(clusters, channels, strict=True)])
    assert re.fullmatch(r"worker 1 was not called within 1 s by worker 0 at 127.0.0.1:\d+\.", str(outcomes[1]))
    for channel in channels:
        channel.close()


def test_a_worker_that_cannot_be_reached_is_named(monkeypatch):
    clusters = make_clusters(2)
    monkeypatch.setattr(links_module.socket, "create_connection", _refuse)
    with pytest.raises(ConnectionError, match="worker 0 at .* cannot reach worker 1 at .* refused"):
        links_module._dial(clusters[0], 1, b"", 0, TIMEOUT_SECONDS)


def _refuse(*_):
    raise ConnectionRefusedError("refused")


def _with_threads(threads):
    """In a worker: whether links carry its collectives, and the sum of every worker's rank + 1."""
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    group = tfzero.ZeroStrategy(stage=2).extended.group
    value = tf.constant([1.0 + group.rank(0)])
    return group.transport.name == "links", float(group.launch(group.all_reduce, [value])[0][0])


@pytest.mark.parametrize("threads", [1, 2])
def test_links_need_a_thread_each(threads):
    found = tfzero.run_local(_with_threads, workers=2, args=(threads,), timeout_seconds=FLEET_SECONDS)
    assert found == [(threads == 2, 3.0)] * 2
