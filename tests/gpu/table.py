"""Two workers on one GPU beside plain Keras on the CPU, as one table; ends with exit code 0 if all is right, or 1.

    python tests/gpu/table.py                              # within 6 minutes, on the first visible GPU
    python tests/gpu/table.py --device cpu                 # the same on two CPU workers, where there is no GPU
    python tests/gpu/table.py --only Muon --json out.json  # some rows

One fleet of two processes trains all cases (`cases.py`) on the one GPU; each has an `NCCL_HOSTID` of its own, so that
NCCL takes them for two machines and they meet over sockets. Values and memory are those of two GPUs, times are not.
Meanwhile this process trains the same on one CPU device. At last it reads the checkpoints of the workers.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from tfzero.launch import WorkerError, run_local  # noqa: E402

FLEET_SECONDS = {"gpu": 340, "cpu": 1200}
HELD_LIMIT, PEAK_LIMIT = 0.02, 0.15  # of the estimate, as the README promises
ONE_GPU = {
    "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_DEBUG": "WARN", "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; `figure` is a difference, or a ratio less one."""

    name: str
    stage: int
    figure: float
    limit: float
    seconds: float = 0.0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return not self.problem and self.figure <= self.limit  # not NaN


def in_a_worker(device: str, gpu: str, folder: str, pattern: str):
    """Sets the environment before anything of TensorFlow is imported."""
    if device == "gpu":
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        os.environ.update(ONE_GPU, CUDA_VISIBLE_DEVICES=gpu, NCCL_HOSTID=f"tfzero-worker-{index}")
    import worker

    return worker.run(device, folder, pattern)


class TheFleet(threading.Thread):
    """The two workers, while this process computes what is expected of them."""

    def __init__(self, *arguments) -> None:
        super().__init__(name="fleet")
        self._arguments = arguments
        self.told: list[dict] = []
        self.failure = ""

    def run(self) -> None:
        try:
            # The workers choose their GPU by themselves: the launcher would give none to two workers.
            options = {
                "args": self._arguments,
                "timeout_seconds": FLEET_SECONDS[self._arguments[0]],
                "gpus_per_worker": 0,
                "echo": True,
            }
            self.told = run_local(in_a_worker, workers=2, env={"TF_ENABLE_ONEDNN_OPTS": "1"}, **options)
        except (WorkerError, TimeoutError) as error:
            self.failure = str(error)


def compare(fleet: TheFleet, folder: Path, pattern: str) -> list[Row]:
    """Trains the cases here, waits for the workers, and compares."""
    import cases

    expected = {case.name: cases.trained(case, contextlib.nullcontext())[1] for case in cases.named(pattern)}
    fleet.join()
    rows = [
        _of_run(case, stage, fleet, folder, expected[case.name]) for case, stage in cases.runs(cases.named(pattern))
    ]
    rows += [_of_checkpoint(path) for path in sorted(folder.glob("checkpoint of *"))]
    return rows + _of_memory(fleet)


def _of_run(case, stage: int, fleet: TheFleet, folder: Path, expected) -> Row:
    told = [each["problems"].get((case.name, stage), "") for each in fleet.told]
    seconds = max((each["seconds"].get((case.name, stage), 0.0) for each in fleet.told), default=0.0)
    paths = [folder / f"{case.name} {stage} of {worker}.npz" for worker in range(2)]
    absent = "" if all(path.exists() for path in paths) else "not run: the workers ended before"
    problem = "; ".join(filter(None, dict.fromkeys(told))) or absent
    if problem:
        return Row(case.name, stage, float("nan"), case.limit, seconds, problem)
    return Row(case.name, stage, max(_difference(_read(path), expected) for path in paths), case.limit, seconds)


def _read(path: Path) -> list:
    import numpy as np

    with np.load(path) as file:
        return [file[name] for name in sorted(file.files, key=lambda name: int(name.removeprefix("arr_")))]


def _difference(mine, theirs) -> float:
    """The largest of an element; NaN if there is one."""
    import numpy as np

    gaps = [
        np.max(np.abs(a.astype("float64") - b), initial=0.0)
        for a, b in zip(mine, theirs, strict=True)
        if a.dtype.kind == "f"
    ]
    return float(np.max(gaps))


def _of_checkpoint(path: Path) -> Row:
    """What workers have written, read by plain Keras on one device: it must be theirs to the bit."""
    import cases

    import tfzero

    name, _, stage = path.name.removeprefix("checkpoint of ").rpartition(" ")
    (case,) = (case for case in cases.CASES if case.name == name)
    model = case.make_model()
    model.compile(case.make_optimizer(), "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    try:
        tfzero.load_checkpoint(model, str(path))
    except Exception as error:
        return Row(
            f"checkpoint read on CPU: {name}", int(stage), float("nan"), 0.0, 0.0, f"{type(error).__name__}: {error}"
        )
    written = _read(path.parent / f"{name} {stage} of 0.npz")
    return Row(f"checkpoint read on CPU: {name}", int(stage), _difference(model.get_weights(), written), 0.0)


def _of_memory(fleet: TheFleet) -> list[Row]:
    """What the allocator of the worker with most counts, as a part of the estimate, less one."""
    import cases

    import tfzero

    rows = []
    for stage in sorted({stage for each in fleet.told for stage in each["memory"]}):
        model = cases.wide()
        model.compile("adam", "mse")
        estimate = tfzero.estimate_memory(model, "adam", world_size=2, stage=stage, batch_size=2 * cases.MEMORY_ROWS)
        for what, foretold, limit in (
            ("held", estimate.held_bytes, HELD_LIMIT),
            ("peak", estimate.peak_bytes, PEAK_LIMIT),
        ):
            counted = max(each["memory"][stage][what] for each in fleet.told)
            name = f"memory {what}: {counted:,} B counted, {foretold:,} foretold"
            rows.append(Row(name, stage, abs(counted / foretold - 1), limit))
    return rows


def show(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  stage  difference    limit  seconds  result"]
    for row in rows:
        result = "right" if row.is_right else f"WRONG {row.problem.splitlines()[0][:200] if row.problem else ''}"
        figures = f"{row.stage:5}  {row.figure:10.1e}  {row.limit:7.2g}  {row.seconds:7.1f}"
        lines.append(f"{row.name:{width}}  {figures}  {result}".rstrip())
    return "\n".join(lines)


def where(fleet: TheFleet) -> str:
    """What it ran on."""
    import keras
    import tensorflow as tf

    cards = " and ".join(each["card"] for each in fleet.told) or "unknown devices"
    return f"{cards}; TensorFlow {tf.__version__}, Keras {keras.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases with this in their name, or "memory"')
    parser.add_argument("--json", type=Path, help="where to write all rows")
    options = parser.parse_args()
    start = time.monotonic()
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # of this process, which is the oracle
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
    with tempfile.TemporaryDirectory(prefix="tfzero_gpu_") as folder:
        fleet = TheFleet(options.device, gpu, folder, options.only)
        fleet.start()
        rows = compare(fleet, Path(folder), options.only)
    print(show(rows) if rows else f"No case has {options.only!r} in its name.")
    if fleet.failure:
        print(f"The workers did not come to the end: {fleet.failure}")
    wrong = [row for row in rows if not row.is_right]
    is_right = bool(rows) and not wrong and not fleet.failure
    print(f"{where(fleet)}; {time.monotonic() - start:.0f} s")
    print("ALL RIGHT" if is_right else f"WRONG: {len(wrong)} of {len(rows)} rows")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"is_right": row.is_right} for row in rows], indent=1))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
