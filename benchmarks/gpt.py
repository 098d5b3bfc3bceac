"""Step time, memory and traffic of a GPT on local workers: stock all-reduce, tfzero, and PyTorch, by turns.

    python -m tfzero.benchmark                                          # 57 million parameters, batch 1 a worker
    python -m tfzero.benchmark --dim 384 --layers 6 --batch 8           # 11 million, mostly computing
    python -m tfzero.benchmark --stages 2 --compression int8 bf16 --peers torch --json out.json --picture out.png

Every contestant gets a fresh fleet of workers in each round, one contestant after the other, so that a machine that
becomes slower or faster does so for all. Ratios are those of medians over the steps of all rounds.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt_torch import PEERS, measure_peer
from gpt_worker import Work, measure

from tfzero.costs import Setup
from tfzero.launch import run_local
from tfzero.plan.formats import FORMATS
from tfzero.plan.scheme import STAGES
from tfzero.workers.progress import progress


@dataclass(frozen=True)
class Contestant:
    """What takes part: stock all-reduce (no stage, no peer), a stage of tfzero, or one of PyTorch's.

    Args:
        stage: of tfzero.
        compression: of tfzero.
        error_feedback: of tfzero.
        peer: one of `PEERS`.
    """

    stage: int | None = None
    compression: str | None = None
    error_feedback: bool = False
    peer: str | None = None

    @property
    def name(self) -> str:
        if self.peer is not None:
            return f"torch {self.peer}"
        if self.stage is None:
            return "stock"
        feedback = " with feedback" if self.error_feedback else ""
        return f"stage {self.stage}" + (f" {self.compression}{feedback}" if self.compression else "")

    def run(self, work: Work, workers: int, timeout_seconds: float) -> dict:
        """The first worker's figures of one fleet, but all workers' bytes on the wire."""
        if self.peer is not None:
            function = functools.partial(measure_peer, work, self.peer)
        else:
            settings = {"compression": self.compression, "error_feedback": self.error_feedback}
            function = functools.partial(measure, work, self.stage, **settings)
        runs = run_local(function, workers=workers, timeout_seconds=timeout_seconds)
        return runs[0] | {"wire": sum(run["wire"] for run in runs)}


def summarize(contestant: Contestant, runs: Sequence[dict], work: Work, workers: int) -> dict:
    """One row of the table, from the runs of all rounds. Bytes are per parameter; the wire is that of all workers."""
    seconds = [second for run in runs for second in run["seconds"]]
    parameters = runs[0]["parameters"]
    step = statistics.median(seconds)
    rounds = [statistics.median(run["seconds"]) for run in runs]
    row = {
        "name": contestant.name,
        "parameters": parameters,
        "step_ms": step * 1e3,
        "spread_ms": [min(rounds) * 1e3, max(rounds) * 1e3],
        "samples_per_second": work.batch * workers / step,
        "wire_bytes": statistics.median(run["wire"] for run in runs) / parameters,
        "wire_formula": None,
        "held_bytes": None,
        "held_formula": None,
        "peak_bytes": None,
    }
    if contestant.peer is None:
        setup = Setup(workers, contestant.stage or 0, contestant.compression, contestant.error_feedback)
        compute = statistics.median(run["compute"] for run in runs)
        update = statistics.median(run["update"] for run in runs)
        row |= {
            "held_bytes": max(run["held"] for run in runs) / parameters,
            "peak_bytes": max(run["peak"] for run in runs) / parameters,
            "held_formula": setup.held_bytes(),
            "wire_formula": workers * setup.sent_bytes(),
            "compute_ms": compute * 1e3,
            "update_ms": update * 1e3,
            "exposed_ms": max(0.0, step - compute - update) * 1e3,
        }
    return row


_COLUMNS = (
    ("step_ms", "step ms", 0), ("ratio", "ratio", 2), ("samples_per_second", "samples/s", 2),
    ("compute_ms", "compute", 0), ("update_ms", "update", 0), ("exposed_ms", "exposed", 0),
    ("held_bytes", "held B", 2), ("held_formula", "formula", 2), ("peak_bytes", "peak B", 2),
    ("wire_bytes", "wire B", 2), ("wire_formula", "formula", 2),
)  # fmt: skip


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table. Bytes are per parameter; `ratio` is to the first row's step."""
    lines = ["| | " + " | ".join(title for _, title, _ in _COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for row in rows:
        row = {"ratio": row["step_ms"] / rows[0]["step_ms"], **row}
        cells = ["" if row.get(key) is None else f"{row[key]:.{digits}f}" for key, _, digits in _COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict], path: Path) -> None:
    """A picture of where the time goes: compute, update and exposed communication of each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(rows)))
    names = [row["name"] for row in rows][::-1]
    begin = [0.0] * len(rows)
    for key, label in (("compute_ms", "compute"), ("update_ms", "update"), ("exposed_ms", "exposed communication")):
        widths = [row.get(key) or 0.0 for row in rows][::-1]
        axes.barh(names, widths, left=begin, label=label)
        begin = [left + width for left, width in zip(begin, widths, strict=True)]
    whole = [0.0 if row.get("compute_ms") else row["step_ms"] for row in rows][::-1]
    axes.barh(names, whole, label="whole step")
    axes.set_xlabel("ms a step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def contestants(options: argparse.Namespace) -> list[Contestant]:
    """Stock first, to which ratios refer."""
    chosen = [Contestant(), *(Contestant(stage) for stage in options.stages)]
    for name in options.compression:
        chosen += [Contestant(stage, name) for stage in options.stages]
    if options.error_feedback:
        chosen += [Contestant(stage, "int8", error_feedback=True) for stage in options.stages]
    if options.peers == "torch":
        chosen += [Contestant(peer=peer) for peer in PEERS]
    return chosen


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tfzero.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in asdict(Work()).items():
        parser.add_argument(f"--{name}", type=_positive, default=default)
    parser.add_argument("--workers", type=_positive, default=2)
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--stages", type=int, nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--compression", nargs="*", choices=FORMATS, default=[])
    parser.add_argument("--error-feedback", action="store_true", help="also int8 with error feedback")
    parser.add_argument("--peers", choices=["torch"], help="also PyTorch, which must be installed")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--picture", type=Path, help="where to draw them; needs matplotlib")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="of each run")
    options = parser.parse_args(arguments)
    for needed, module in ((options.peers, "torch"), (options.picture, "matplotlib")):
        if needed and importlib.util.find_spec(module) is None:
            parser.error(f"{module} is not installed: `pip install {module}`.")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    work = Work(*(getattr(options, name) for name in asdict(Work())))
    runs: dict[Contestant, list[dict]] = {contestant: [] for contestant in contestants(options)}
    with progress("", options.rounds * len(runs), unit="runs") as bar:
        for done, (turn, contestant) in enumerate(itertools.product(range(options.rounds), runs)):
            title = f"round {turn + 1} of {options.rounds}: {contestant.name}"
            if not bar.is_shown:
                print(title, file=sys.stderr, flush=True)
            bar.reach(done, title)
            runs[contestant].append(contestant.run(work, options.workers, options.timeout_seconds))
    rows = [summarize(contestant, found, work, options.workers) for contestant, found in runs.items()]
    print(table(rows))
    if options.json:
        about = {"machine": platform.platform(), "processors": os.cpu_count(), "workers": options.workers}
        options.json.write_text(json.dumps({**about, "work": asdict(work), "rows": rows}, indent=2))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
