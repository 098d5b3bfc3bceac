"""Tasks of a job find out which task they are, and exchange addresses at the first one: real sockets over loopback."""

import contextlib
import socket
import time

import pytest
from test_cluster import find_ports, run_all

from tfzero.workers import handshake, job_worker, messages, rendezvous
from tfzero.workers.rendezvous import Place, exchange
from tfzero.workers.tasks import Task, find_task, meeting_address

pytestmark = pytest.mark.timeout(60)
SECRET = b"x" * 32
TORCH = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "4000"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[9-10]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


def exchange_all(meeting, ranks, size, secrets=None, seconds=3.0):
    secrets = secrets or [SECRET] * len(ranks)
    tasks = zip(ranks, secrets, strict=True)
    return run_all([lambda r=r, s=s: exchange(Place(r, size, meeting), 5000 + r, s, seconds) for r, s in tasks], 30)


# Which task a process is.


@pytest.mark.parametrize(
    "environ, task",
    [
        ({}, None),
        (TORCH, Task("PyTorch's launcher", 2, 4, "WORLD_SIZE=4, RANK=2")),
        (OPEN_MPI, Task("Open MPI", 3, 4, "OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3", 1, 2)),
        (SLURM, Task("Slurm", 1, 2, "SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1", 0)),
        # `mpirun` starts a daemon on each node by `srun`, whose variables processes inherit.
        ({**SLURM, **OPEN_MPI}, Task("Open MPI", 3, 4, "OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3", 1, 2)),
        # `srun --mpi=pmi2` sets PMI_*, too.
        ({**SLURM, "PMI_SIZE": "2", "PMI_RANK": "1"}, Task("Slurm", 1, 2, "SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1", 0)),
        ({**SLURM, **TORCH}, Task("PyTorch's launcher", 2, 4, "WORLD_SIZE=4, RANK=2")),
        # A batch script exports these for all tasks, without a rank.
        ({**SLURM, "WORLD_SIZE": "2", "MASTER_ADDR": "n9"},
         Task("Slurm", 1, 2, "SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1", 0)),
    ],
)  # fmt: skip
def test_the_innermost_launcher_counts(environ, task):
    assert find_task(environ) == task


@pytest.mark.parametrize(
    "environ, problem",
    [
        ({**TORCH, "RANK": "4"}, "must be below their number, and they may be 100,000. Received: WORLD_SIZE=4, RANK=4"),
        ({**TORCH, "WORLD_SIZE": "99999999999"}, "they may be 100,000"),
        ({**TORCH, "WORLD_SIZE": "four"}, "WORLD_SIZE must be a number. Received: 'four'"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "on its machine must be below the number there"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(environ, problem):
    with pytest.raises(ValueError) as raised:
        find_task(environ)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    "environ, more, address",
    [
        (TORCH, {}, "node1:4000"),
        (TORCH, {"MASTER_ADDR": "fd00::1"}, "[fd00::1]:4000"),
        (TORCH, {"MASTER_PORT": ""}, "node1:29500"),
        (TORCH, {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "node1:4001"),  # torchrun listens at MASTER_PORT itself
        (TORCH, {"TORCHELASTIC_USE_AGENT_STORE": "True", "TFZERO_PORT": "77"}, "node1:77"),
        (OPEN_MPI, {"MASTER_ADDR": "node1"}, "node1:29500"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "127.0.0.1:29500"),
    ],
)
def test_where_tasks_meet(environ, more, address):
    environ = {**environ, **more}
    assert meeting_address(find_task(environ), environ) == address


@pytest.mark.parametrize(
    "environ, problem",
    [
        (OPEN_MPI, "Open MPI does not tell where task 0 is, and not all 4 tasks are on this machine. .*MASTER_ADDR"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535. Received: 70000"),
        ({**TORCH, "TFZERO_PORT": "x"}, "TFZERO_PORT must be a number"),
    ],
)
def test_a_meeting_place_that_is_not_known_is_an_error(environ, problem):
    with pytest.raises(ValueError, match=problem):
        meeting_address(find_task(environ), environ)


# The exchange.


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("secret", [b"", SECRET])
def test_all_tasks_get_all_addresses(size, secret):
    meeting = f"localhost:{find_ports(1)[0]}"
    outcomes = exchange_all(meeting, range(size), size, [secret] * size)
    assert outcomes == [[meeting, *(f"localhost:{5000 + rank}" for rank in range(1, size))]] * size


def test_a_host_is_where_the_call_comes_from(monkeypatch):
    monkeypatch.setattr(rendezvous, "is_loopback", lambda host: False)
    meeting = f"127.0.0.1:{find_ports(1)[0]}"
    assert exchange_all(meeting, (0, 1), 2) == [[meeting, "127.0.0.1:5001"]] * 2


def test_a_missing_task_is_named_on_all():
    meeting = f"127.0.0.1:{find_ports(1)[0]}"
    start = time.monotonic()
    outcomes = exchange_all(meeting, (0, 2), 4, seconds=1.0)
    assert time.monotonic() - start < 6
    for outcome in outcomes:
        assert type(outcome) is TimeoutError, outcomes
        text = f"2 of 4 tasks did not call task 0 at {meeting} within 1 s: 1, 3."
        assert text in str(outcome) and "MASTER_ADDR" in str(outcome)


def test_a_missing_task_0_is_told():
    (outcome,) = exchange_all(f"127.0.0.1:{find_ports(1)[0]}", (1,), 2, seconds=0.6)
    assert type(outcome) is TimeoutError and "Task 1 of 2 did not hear from task 0" in str(outcome)
    assert "refused" in str(outcome) and "MASTER_ADDR" in str(outcome)


@pytest.mark.parametrize(
    "places, problem",
    [
        ([(0, 3), (1, 3), (1, 3)], "Two tasks say that they are task 1 of 3"),
        ([(0, 3), (1, 2)], "Task 0 knows of 3 tasks, and task 1 of 2"),
    ],
)
def test_tasks_that_do_not_fit_are_told(places, problem):
    meeting = f"127.0.0.1:{find_ports(1)[0]}"
    calls = [lambda k=k, p=p: exchange(Place(*p, meeting), 5000 + k, SECRET, 3.0) for k, p in enumerate(places)]
    outcomes = run_all(calls, 30)
    assert all(type(outcome) is ValueError and problem in str(outcome) for outcome in outcomes), outcomes


def test_a_stranger_learns_and_changes_nothing():
    """Not without the secret, nor by silence, noise, or a message that is none."""
    port = find_ports(1)[0]
    meeting = f"127.0.0.1:{port}"
    opened = []

    def lead():
        return exchange(Place(0, 2, meeting), 0, SECRET, 8.0)

    def disturb():
        for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(500)):
            opened.append(dial(port))
            opened[-1].sendall(sent)
        opened.append(dial(port))
        with pytest.raises(ConnectionError, match="another TFZERO_SECRET"):
            handshake.call(opened[-1], b"y" * 32, (1, 2), time.monotonic() + 3)
        for message in ({"port": 0}, {"port": "5001"}, {"port": True}, {}, {"port": 70000}):
            opened.append(dial(port))
            handshake.call(opened[-1], SECRET, (1, 2), time.monotonic() + 3)
            messages.send(opened[-1], message, time.monotonic() + 3)
        for claim in ((0, 2), (9, 2)):
            opened.append(dial(port))
            handshake.call(opened[-1], SECRET, claim, time.monotonic() + 3)
            messages.send(opened[-1], {"port": 5001}, time.monotonic() + 3)
        return exchange(Place(1, 2, meeting), 5001, SECRET, 8.0)

    assert run_all([lead, disturb], 30) == [[meeting, "127.0.0.1:5001"]] * 2
    for connection in opened:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(1)
            left = connection.recv(10_000)
            assert b"5001" not in left and b"addresses" not in left


def dial(port):
    """A connection to a port that soon listens."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), 5)
        time.sleep(0.01)


@pytest.mark.parametrize(
    "answer",
    [{}, {"addresses": "x"}, {"addresses": ["a:1"]}, {"addresses": ["a:1", "b:2"]}, {"addresses": ["a:1", 5001]},
     {"addresses": ["a:1", "b c:5001"]}, {"addresses": ["a:1", "b:5001", "c:3"]}],
)  # fmt: skip
def test_an_answer_that_is_no_list_of_addresses_is_refused(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = f"127.0.0.1:{server.getsockname()[1]}"

        def lead():
            connection, _ = server.accept()
            with connection:
                handshake.hear(connection, SECRET, time.monotonic() + 3)
                messages.receive(connection, time.monotonic() + 3, 3)
                messages.send(connection, answer, time.monotonic() + 3)

        _, outcome = run_all([lead, lambda: exchange(Place(1, 2, meeting), 5001, SECRET, 3.0)], 30)
    assert type(outcome) is ValueError and "did not send an address of each task" in str(outcome), outcome


def test_a_secret_that_only_one_has_is_told():
    port = find_ports(1)[0]
    outcomes = exchange_all(f"127.0.0.1:{port}", (0, 1), 2, [SECRET, b""], seconds=1.0)
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 2
    assert all("another TFZERO_SECRET, or only one of the two has one" in str(outcome) for outcome in outcomes)


# GPUs.


@pytest.mark.parametrize(
    "more, seen, asked, expected",
    [
        ({}, "01234567", None, "4,5,6,7"),
        ({}, "0", None, None),  # each task sees its own
        ({}, "", None, None),
        ({}, "0123", 1, "1"),
        ({}, "0123", 0, "-1"),
        ({"SLURM_GPUS_PER_TASK": "2"}, "01", None, None),
        ({"SLURM_GPU_BIND": "map_gpu:0,1"}, "01", None, None),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, "0123", None,
         None),
    ],
)  # fmt: skip
def test_tasks_of_one_node_divide_the_gpus_that_they_all_see(more, seen, asked, expected, monkeypatch):
    monkeypatch.setattr(job_worker, "visible_gpus", lambda environ: tuple(seen))
    monkeypatch.setattr("tfzero.workers.gpus.visible_gpus", lambda environ: tuple(seen))
    environ = {**SLURM, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", **more}
    variables, held = job_worker.worker_environment(find_task(environ), asked, environ)
    assert variables.get("CUDA_VISIBLE_DEVICES") == expected and held is None


def test_gpus_that_cannot_be_divided_are_refused(monkeypatch):
    monkeypatch.setattr(job_worker, "visible_gpus", lambda environ: ("0", "1", "2"))
    monkeypatch.setattr("tfzero.workers.gpus.visible_gpus", lambda environ: ("0", "1", "2"))
    environ = {**SLURM, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}
    with pytest.raises(ValueError, match="2 workers cannot divide evenly"):
        job_worker.worker_environment(find_task(environ), None, environ)
