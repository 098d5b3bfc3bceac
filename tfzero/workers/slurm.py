"""The tasks of a Slurm step and their nodes, from the variables that `srun` sets in each. It runs no program of Slurm.

[Note: Slurm's variables] `srun` sets `SLURM_STEP_*` for the step itself; `sbatch` and `salloc` set `SLURM_JOB_*` and
`SLURM_NTASKS` for the whole allocation, also where one process runs alone. So only `SLURM_STEP_NUM_TASKS` says that a
process is one of several. Lists of nodes are in the order of the tasks, `n9` before `n10`, and must not be sorted.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

_PIECE = re.compile(r"([^\[\],]+)|\[([^\[\]]*)\]")  # text, or what is in brackets
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_MOST_NODES = 100_000  # a typing error must not fill the memory
# Ports below those that systems give to dialling sockets. Each step has a stretch of its own, most likely.
_FIRST_PORT = 15000
_STRETCH = 64
_STRETCHES = 277


def expand_nodes(text: str) -> list[str]:
    """Names of the nodes in Slurm's short form, in its order: "n[9-10],m[01,03]" is n9, n10, m01, m03.

    Raises:
        ValueError: if it is not of that form.
    """
    nodes: list[str] = []
    for item in _split(text):
        choices: list[list[str]] = []
        end = 0
        for piece in _PIECE.finditer(item):
            _require(piece.start() == end, text)
            end = piece.end()
            choices.append([piece[1]] if piece[2] is None else _expand_numbers(piece[2], text))
        _require(choices and end == len(item), text)
        _require(math.prod(map(len, choices)) <= _MOST_NODES, text)
        nodes += map("".join, itertools.product(*choices))
        _require(len(nodes) <= _MOST_NODES, text)
    _require(nodes, text)
    return nodes


def _split(text: str) -> list[str]:
    """The items between commas outside of brackets."""
    items, depth = [""], 0
    for character in text.strip():
        depth += {"[": 1, "]": -1}.get(character, 0)
        _require(depth in (0, 1), text)
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    _require(depth == 0, text)
    return items


def _expand_numbers(text: str, whole: str) -> list[str]:
    """ "08-10,12" is 08, 09, 10, 12: as many digits as the first number of a range has."""
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _malformed(whole)
        first, last = match[1], match[2] or match[1]
        _require(int(first) <= int(last) < int(first) + _MOST_NODES, whole)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _require(condition: object, text: str) -> None:
    if not condition:
        raise _malformed(text)


def _malformed(text: str) -> ValueError:
    return ValueError(f"Slurm's list of nodes has a form like n[1-3,7],m02. Received: {text!r}.")


def expand_counts(text: str) -> list[int]:
    """Numbers of tasks in Slurm's short form: "2(x3),1" is 2, 2, 2, 1.

    Raises:
        ValueError: if it is not of that form.
    """
    counts: list[int] = []
    for part in text.strip().split(","):
        match = _COUNT.fullmatch(part)
        if not match or len(counts) + int(match[2] or 1) > _MOST_NODES:
            raise ValueError(f"Slurm's tasks of nodes have a form like 2(x3),1. Received: {text!r}.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def place_tasks(counts: list[int], distribution: str = "block", plane: int = 1) -> list[int]:
    """The node of each task: places in the list of nodes, in the order of the tasks.

    Args:
        counts: number of tasks on each node.
        distribution: "block" fills node after node; "cyclic" gives each one task in turn; "plane" gives each `plane`.
        plane: tasks in a row on one node.
    """
    size = {"block": max(counts), "cyclic": 1, "plane": plane}[distribution]
    places: list[int] = []
    left = list(counts)
    while any(left):
        for node, tasks in enumerate(left):
            places += [node] * min(size, tasks)
            left[node] -= min(size, tasks)
    return places


def task_addresses(environ: Mapping[str, str], port: int | None = None) -> list[str]:
    """The address "host:port" of each task of this step, in the order of `SLURM_PROCID`.

    Args:
        environ: with the variables that `srun` sets.
        port: of the first task on each node, where others take the next ones. By default it follows from the number
            of the step, so all tasks know it.

    Raises:
        ValueError: if the variables do not fit together, or do not tell where each task is.
    """
    size = number(environ, "SLURM_STEP_NUM_TASKS")
    nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", ""))
    _check(len(counts) == len(nodes) and sum(counts) == size, environ, "they do not fit together")
    places = place_tasks(counts, *_distribution(environ, len(nodes)))
    numbers: dict[int, Iterator[int]] = defaultdict(itertools.count)
    locals_ = [next(numbers[node]) for node in places]
    _check_own(environ, nodes, places, locals_)
    first = _first_port(environ) if port is None else port
    if first + max(counts) - 1 > 65535:
        raise ValueError(f"{max(counts)} tasks on one node need as many ports. Received: the first one, {first}.")
    return [f"{nodes[node]}:{first + local}" for node, local in zip(places, locals_, strict=True)]


def _distribution(environ: Mapping[str, str], nodes: int) -> tuple[str, int]:
    """How tasks are given to nodes: the first word of `SLURM_DISTRIBUTION`, and the size of a plane."""
    text = environ.get("SLURM_DISTRIBUTION", "").lower()
    kind, _, plane = re.split("[:,]", text)[0].partition("=")
    if nodes == 1 or kind in ("", "*", "unknown"):
        return "block", 1
    _check(kind in ("block", "cyclic", "plane"), environ, f"tasks are placed by {text!r}")
    size = int(plane) if plane.isdecimal() else number(environ, "SLURM_DIST_PLANESIZE") if kind == "plane" else 1
    _check(size > 0, environ, f"tasks are placed by {text!r}")
    return kind, size


def _check_own(environ: Mapping[str, str], nodes: list[str], places: list[int], locals_: list[int]) -> None:
    """Raises ValueError unless this task is where it would be by our reckoning."""
    rank = number(environ, "SLURM_PROCID")
    _check(rank < len(places), environ, "the task's number is too large")
    _check(environ.get("SLURM_HET_SIZE", "1") in ("", "0", "1"), environ, "the job is heterogeneous")
    place = places[rank]
    known = {"SLURM_NODEID": str(place), "SLURM_LOCALID": str(locals_[rank]), "SLURMD_NODENAME": nodes[place]}
    for name, value in known.items():
        here = environ.get(name, value)
        _check(here == value, environ, f"{name} of task {rank} is {here!r}, where {value!r} was expected")


def _first_port(environ: Mapping[str, str]) -> int:
    job = number(environ, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environ else 0
    step = number(environ, "SLURM_STEP_ID") if "SLURM_STEP_ID" in environ else 0
    return _FIRST_PORT + _STRETCH * ((31 * job + step) % _STRETCHES)


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable's value, which must be a number that is not negative.

    Raises:
        ValueError: if it is none, or missing.
    """
    text = environ.get(name, "").strip()
    if not text.isdecimal() or len(text) > 12:
        raise ValueError(f"{name} must be a number. Received: {environ.get(name)!r}.")
    return int(text)


def _check(condition: object, environ: Mapping[str, str], what: str) -> None:
    if not condition:
        kept = {name: value for name, value in sorted(environ.items()) if name in _TOLD}
        raise ValueError(
            f"Slurm's variables do not tell where each task of the step is: {what}. Start the step with "
            f"`srun --distribution=block`, or set TF_CONFIG in each task. Received: {kept}."
        )


_TOLD = {
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_JOB_NODELIST",
    "SLURM_TASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_NODEID",
    "SLURM_LOCALID",
    "SLURMD_NODENAME",
    "SLURM_DISTRIBUTION",
    "SLURM_HET_SIZE",
}
