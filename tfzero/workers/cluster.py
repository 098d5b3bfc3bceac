"""The workers of a run, and its parameter servers if it has some, from TF_CONFIG or CLUSTER_SPEC."""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tfzero.workers.addresses import is_address

_EXAMPLE = """Set it to, for example, {"cluster": {"worker": ["host1:2222", "host2:2222"]}, \
"task": {"type": "worker", "index": 0}}, or unset it to train in one process."""
_SPARSE = (
    'The "sparseCluster" of TF_CONFIG names this worker alone, and workers must know each other. A TFJob writes it for '
    "`enableDynamicWorker: true`: leave that away."
)
# Vertex AI numbers its pools; the third may hold servers that sum gradients for NCCL, and run no program of the user's.
_POOLS = {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"}
_SERVER = "ps"  # TensorFlow's word for a parameter server
_CHIEFS = ("chief", "master")  # two words for the first worker; TensorFlow 2 knows the former only


@dataclass(frozen=True)
class Cluster:
    """The workers in rank order: the chief first if there is one, then the workers of TF_CONFIG."""

    addresses: tuple[str, ...]  # "host:port"
    names: tuple[str, ...]  # as in TF_CONFIG: "chief 0", "worker 0", "worker 1"; a "master" is called chief, too
    index: int  # this process's place in that order; of a server, among the servers
    servers: tuple[str, ...] = ()  # "host:port" of each parameter server
    is_server: bool = False  # whether this process is one of these

    @property
    def size(self) -> int:
        return len(self.addresses)

    @property
    def name(self) -> str:
        return f"ps {self.index}" if self.is_server else self.names[self.index]

    @property
    def address(self) -> str:
        """Of this process."""
        return (self.servers if self.is_server else self.addresses)[self.index]

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """Each worker's job and index for TensorFlow, which numbers every job's tasks 0, 1, 2, ..."""
        jobs = [name.rsplit(" ", 1)[0] for name in self.names]
        indexes: dict[str, Iterator[int]] = defaultdict(itertools.count)
        return [(job, next(indexes[job])) for job in jobs]

    def describe(self, *indexes: int) -> str:
        """Names and addresses of these workers, or of all, for messages."""
        return ", ".join(f"{self.names[i]} at {self.addresses[i]}" for i in indexes or range(self.size))

    def names_of(self, indexes: list[int]) -> str:
        """Short names, such as "chief 0 and workers 1, 3"."""
        numbers: dict[str, list[str]] = {}
        for index in indexes:
            kind, number = self.names[index].rsplit(" ", 1)
            numbers.setdefault(kind, []).append(number)
        return " and ".join(f"{kind}{'s' * (len(ns) > 1)} {', '.join(ns)}" for kind, ns in numbers.items())


def read_tf_config(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """The `Cluster` of TF_CONFIG, or None if TF_CONFIG is absent, empty, or holds no cluster.

    Raises:
        ValueError: if it cannot be read, or if this task takes no part in training.
    """
    text = environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text or "{}")
        _require(isinstance(config, dict), "It must be a JSON object.")
        task, has_cluster = config.get("task"), bool(config.get("cluster"))
        known = isinstance(task, dict) and {"type", "index"} <= set(task)
        advice = 'It needs a "task" with "type" and "index", to tell which worker this process is.'
        _require(known or not has_cluster, advice)
    except ValueError as error:  # invalid JSON, too
        raise ValueError(f"TF_CONFIG is not JSON as needed: {error} {_EXAMPLE} Received: {text!r}.") from None
    if has_cluster:
        return cluster_from_spec(config["cluster"], task["type"], task["index"])
    try:  # a task without a cluster
        _require(not config.get("sparseCluster"), _SPARSE)
        role = task.get("type") if isinstance(task, dict) else None
        _check_role(role)
        _require(role != _SERVER, "This process is a parameter server (ps), but nothing names the workers.")
    except ValueError as error:
        raise ValueError(f"{error} Received: TF_CONFIG {text!r}.") from None
    return None


def cluster_from_spec(spec: dict[str, Any], task_type: str, task_id: int | str) -> Cluster | None:
    """The `Cluster` of a cluster resolver's specification (jobs are lists or dicts); None if it is empty."""
    if not spec:
        return None
    try:
        _check_jobs(spec, task_type)
        jobs = [job for job in (*_CHIEFS, "worker") if job in spec]
        tasks: dict[tuple[str, int], str] = {
            (_job_in_tensorflow(job), number): address
            for job in jobs
            for number, address in _list_tasks(job, spec[job])
        }
        names, addresses = tuple(f"{job} {number}" for job, number in tasks), tuple(tasks.values())
        _require(tasks, 'There is no worker. List at least one under "worker".')
        numbered = _list_tasks(_SERVER, spec[_SERVER]) if spec.get(_SERVER) else []
        servers = {(_SERVER, number): address for number, address in numbered}
        all_addresses = (*addresses, *servers.values())
        what = "Two tasks have the same address" if servers else "Two workers have the same address"
        _require(len(set(all_addresses)) == len(all_addresses), f"{what}. Give each its own host or port.")
        task = (_job_in_tensorflow(task_type), _read_index(task_id))
        known = ", ".join([*names, *(f"{job} {number}" for job, number in servers)])
        advice = f"The cluster has only {known}. Correct the task, or add its address."
        is_known = task in tasks or task in servers
        _require(is_known, f"The index is out of range: this process is {task[0]} {task[1]}. {advice}")
    except ValueError as error:
        raise ValueError(f"{error} Received: cluster {spec}, task {task_type!r} {task_id!r}.") from None
    is_server = task in servers
    index = list(servers if is_server else tasks).index(task)
    return Cluster(addresses, names, index, tuple(servers.values()), is_server)


def read_cluster_spec(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """The `Cluster` of CLUSTER_SPEC, which some platforms set where they set no TF_CONFIG; None if it is none.

    Vertex AI writes `{"cluster": {"workerpool0": [...], ...}, "task": {...}}`. TonY writes the cluster alone, and the
    task into `JOB_NAME` and `TASK_INDEX`.

    Raises:
        ValueError: if this task takes no part in training, or if it is not known among several.
    """
    text = environ.get("CLUSTER_SPEC", "").strip()
    try:
        config = json.loads(text or "{}")
    except ValueError:
        return None  # somebody else's variable
    spec = config.get("cluster", config) if isinstance(config, dict) else None
    if not isinstance(spec, dict) or not spec or not set(spec) <= {*_POOLS, *_CHIEFS, "worker", "ps", "evaluator"}:
        return None
    task = config.get("task") or {"type": environ.get("JOB_NAME"), "index": environ.get("TASK_INDEX")}
    try:
        _require(isinstance(task, dict), 'Its "task" must be an object with "type" and "index".')
        is_pool = set(spec) <= set(_POOLS)
        jobs = {_POOLS[job]: tasks for job, tasks in spec.items()} if is_pool else spec
        kept = {job: tasks for job, tasks in jobs.items() if not (is_pool and job == "ps")}
        kind = str(task.get("type")).lower()
        is_reducer = is_pool and _POOLS.get(kind) == _SERVER
        _require(not is_reducer, "This process is a parameter server (ps) of Vertex AI, which runs no program of ours.")
        return cluster_from_spec(kept, _POOLS.get(kind, kind), task.get("index"))  # type: ignore[arg-type]
    except ValueError as error:
        advice = "Set TF_CONFIG to say who the workers are, or to '{}' to train in one process."
        raise ValueError(f"CLUSTER_SPEC does not name the workers: {error} {advice}") from None


def others_of(cluster: Cluster | None) -> Cluster | None:
    """The cluster if it has other workers, else None: a single process needs no server and no name resolution."""
    return None if cluster is None or cluster.size == 1 else cluster


def sizes_of(cluster: Cluster | None) -> tuple[int, int]:
    """Numbers of servers and of workers."""
    return (0, 1) if cluster is None else (len(cluster.servers), cluster.size)


def _require(condition: object, advice: str) -> None:
    if not condition:
        raise ValueError(advice)


def _job_in_tensorflow(job: str) -> str:
    return "chief" if job in _CHIEFS else job


def _check_role(task_type: Any) -> None:
    """Raises ValueError for a task that takes no part in training."""
    advice = "Run `model.evaluate` on checkpoints, in a process without TF_CONFIG or with a plain strategy."
    _require(task_type != "evaluator", f"An evaluator task takes no part in training. {advice}")


def _check_jobs(spec: Any, task_type: str) -> None:
    _check_role(task_type)
    advice = 'The cluster must be an object with lists of addresses, "worker" and perhaps "chief" and "ps".'
    _require(isinstance(spec, dict) and set(spec) <= {*_CHIEFS, "worker", "evaluator", _SERVER}, advice)
    both = 'There is a "chief" beside a "master", and both mean the first worker. Leave one, and list the other under'
    _require(not all(job in spec for job in _CHIEFS), f'{both} "worker".')
    advice = 'The task type is unknown. Make it "worker", "chief" for the first worker, or "ps" for a server.'
    _require(task_type in (*_CHIEFS, "worker", _SERVER), advice)


def _list_tasks(job: str, tasks: Any) -> list[tuple[int, str]]:
    """Sorted pairs of task index and address."""
    advice = f'"{job}" must be a list of at least one "host:port". Fill it, or leave it out.'
    _require(isinstance(tasks, (list, tuple, dict)) and tasks, advice)
    advice = 'There is more than one chief. Leave one, and list the others under "worker".'
    _require(job not in _CHIEFS or len(tasks) == 1, advice)
    numbered: Iterable[tuple[Any, Any]] = tasks.items() if isinstance(tasks, dict) else enumerate(tasks)
    pairs = sorted((_read_index(number), address) for number, address in numbered)
    for _, address in pairs:
        advice = '"host:port" with a port of 1 to 65535. Write host1:2222 or [::1]:2222, without grpc://.'
        _require(is_address(address), f'{address!r} under "{job}" is not {advice}')
    return pairs


def _read_index(value: Any) -> int:
    integer = value.strip().isdecimal() if isinstance(value, str) else type(value) is int
    _require(integer, f"The task index {value!r} is not an integer. Number each type's tasks 0, 1, 2, ...")
    return int(value)
