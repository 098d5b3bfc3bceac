"""The examination that `python -m tfzero.doctor` runs in each worker.

All workers do the same, share what they found, and come to the same verdict. The first worker prints it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tfzero.collectives import self_test
from tfzero.collectives.group import Group
from tfzero.plan.scheme import STAGES
from tfzero.report import text_of
from tfzero.strategy import ZeroStrategy
from tfzero.views.facts import describe_devices, library_versions, unseen_gpus
from tfzero.views.speeds import measure_speeds
from tfzero.views.trials import LIMIT, MODELS, run_trials
from tfzero.workers.progress import progress
from tfzero.workers.resolvers import find_cluster

_STEP_SECONDS = 600.0  # how long the others may take to finish a part


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, each as wide as its longest cell."""
    widths = [max(len(row[k]) for row in [titles, *rows]) for k in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [titles, *rows]]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


class Examination:
    """One run of all checks.

    Args:
        devices: as in `ZeroStrategy`.
        timeout_seconds: as in `ZeroStrategy`.
        quick: whether to skip timings, and all models but the dense one.
    """

    def __init__(self, devices: Sequence[str] | None, timeout_seconds: float, quick: bool) -> None:
        self._devices = devices
        self._timeout_seconds = timeout_seconds
        self._quick = quick
        self._problems: list[str] = []  # the same on all workers
        cluster = find_cluster(None)
        self._prints = cluster is None or cluster.index == 0

    def run(self) -> list[str]:
        """Runs all checks, and prints on the first worker. Returns the problems, the same on all workers.

        Raises:
            Exception: if the workers do not meet, or a check fails with an error.
        """
        self._say("Versions")
        self._say(table(["library", "version"], list(library_versions().items())))
        unseen = unseen_gpus()
        if unseen:  # printed at once, as it may keep the workers from meeting
            print(f"  WRONG: {unseen}", flush=True)
        self._strategy = ZeroStrategy(0, devices=self._devices, timeout_seconds=self._timeout_seconds)
        self._group: Group = self._strategy.extended.group
        self._problems += [f"on worker {k} {told}" for k, told in enumerate(self._from_all("GPUs", unseen)) if told]
        self._show_devices()
        self._test_transport()
        if not self._quick:
            self._show_speeds()
        largest = self._try_models()
        self._say(self._verdict(largest))
        self._from_all("the verdict", None)  # no worker leaves before it is printed
        return self._problems

    def _say(self, text: str) -> None:
        if self._prints:
            print(text, flush=True)

    def _from_all(self, topic: str, value: Any) -> list:
        """Every worker's value, in rank order."""
        return self._strategy.channel.all_gather(f"examining {topic}", value, _STEP_SECONDS)

    def _show_devices(self) -> None:
        devices = self._from_all("devices", describe_devices(self._group.devices))
        rows = [[str(worker), line] for worker, lines in enumerate(devices) for line in lines]
        self._say("\nDevices")
        self._say(table(["worker", "device"], rows))
        algorithm = self._strategy.report().options["algorithm"]
        self._say(f"\nTransport: {algorithm}")
        self._say(f"  because {self._why_this_transport()}.")
        if self._group.transport.note:
            self._say(f"  {self._group.transport.note}")

    def _why_this_transport(self) -> str:
        if self._group.world_size == 1:
            return "there is one replica: --cpu-devices 2, or two workers, would have something to send"
        return self._group.transport.reason

    def _test_transport(self) -> None:
        found = [asdict(row) for row in self_test.run(self._group, self._timeout_seconds, every_dtype=True)]
        by_worker = self._from_all("the transport", found)
        rows = [row for told in by_worker for row in told]
        if not rows:
            return
        self._say("\nSelf-test of the transport")
        cells = []
        for key in dict.fromkeys((row["primitive"], row["dtype"]) for row in rows):
            same = [row for row in rows if (row["primitive"], row["dtype"]) == key]
            wrong = [row for row in same if not row["ok"]]
            told = [f"rank {r['rank']} received {r['received']} instead of {r['expected']}" for r in wrong]
            cells.append([*key, same[0]["way"], "; ".join(told) or "right"])
            self._problems += [f"{key[0]} of {key[1]}: {each}" for each in told]
        self._say(table(["primitive", "dtype", "way", "result"], cells))

    def _show_speeds(self) -> None:
        speeds = measure_speeds(self._group)
        if not speeds:
            return
        self._say("\nTime of each primitive, and of TensorFlow's own operation (1 MB is 10^6 bytes)")
        rows = [
            [
                speed.primitive,
                text_of(speed.size_bytes),
                f"{speed.seconds * 1e3:.2f}",
                f"{speed.bytes_per_second / 1e6:.1f}",
                "-" if speed.stock_seconds is None else f"{speed.stock_seconds * 1e3:.2f}",
            ]
            for speed in speeds
        ]
        self._say(table(["primitive", "size", "ms", "MB/s", "TensorFlow's ms"], rows))

    def _try_models(self) -> float:
        """Trains the small models. Returns the largest difference from one device."""
        names = ["dense"] if self._quick else list(MODELS)
        with progress("", len(names) * len(STAGES), unit="runs") as bar:
            done = iter(range(len(names) * len(STAGES)))
            trials = run_trials(
                names,
                [device.rpartition("/device:")[2] for device in self._group.devices],
                self._strategy.extended.mesh.replicas,
                lambda name, stage: bar.reach(next(done), f"{name} model, stage {stage}"),
            )
        by_worker = self._from_all(
            "models", [[t.model, t.stage, repr(t.largest), t.variable, t.is_right] for t in trials]
        )
        wrong: dict[str, list[tuple[int, str]]]
        rows, wrong, largest = [], {}, 0.0
        for of_workers in zip(*by_worker, strict=True):
            model, stage, difference, variable, is_right = max(
                of_workers, key=lambda told: (not told[-1], float(told[2]))
            )
            largest = max(largest, float(difference))
            rows.append([model, str(stage), f"{float(difference):.1e}", variable, "right" if is_right else "WRONG"])
            if not is_right:
                workers = [str(k) for k, told in enumerate(of_workers) if not told[-1]]
                told = (
                    f"differs from one device by {float(difference):.2g} in {variable} on worker {', '.join(workers)}"
                )
                wrong.setdefault(model, []).append((stage, told))
        for model, stages in wrong.items():
            numbers = ", ".join(str(stage) for stage, _ in stages)
            self._problems.append(f"the {model} model at stage {numbers} {stages[0][1]}")
        self._say(f"\nModels beside one device: the largest difference of a weight (right up to {LIMIT:g})")
        self._say(table(["model", "stage", "difference", "variable", "result"], rows))
        return largest

    def _verdict(self, largest: float) -> str:
        mesh, kind = self._strategy.extended.mesh, self._strategy.settings.device_type
        where = f"{mesh.replicas} replicas, {mesh.devices_per_worker} {kind} devices in each of {mesh.workers}"
        if self._problems:
            return f"\nNOT SOUND ({where}): {'; '.join(self._problems)}."
        return f"\nSOUND ({where}): models end within {largest:.1e} of one device at every stage."
