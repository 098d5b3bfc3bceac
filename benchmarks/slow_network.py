"""Step time of the benchmark's GPT between two network namespaces with a slow cable: stock beside stage 2 with int8.

    sudo python benchmarks/slow_network.py --mbit 1000 250 --rounds 3
    sudo python benchmarks/slow_network.py --contestants "stage 2" "stage 2 overlap" --steps-per-execution 6 --steps 2

Needs root, `ip` and `tc` (Linux). Each worker runs in a namespace of its own; a token bucket bounds the bandwidth.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import uuid
from typing import Any

from gpt_worker import Work, measure

PORT = 23457
CONTESTANTS: dict[str, dict] = {
    "stock": {"stage": None},
    "stage 2": {"stage": 2},
    "stage 2 overlap": {"stage": 2, "overlap_param_gather": True},
    "stage 2 int8": {"stage": 2, "compression": "int8"},
    "stage 2 int8 overlap": {"stage": 2, "compression": "int8", "overlap_param_gather": True},
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


@contextlib.contextmanager
def two_networks(mbit: int):
    """The names and addresses of two namespaces that are joined by a cable of this bandwidth."""
    tag = uuid.uuid4().hex[:6]
    names, ends = [f"slow{k}{tag}" for k in range(2)], [f"sl{k}{tag}" for k in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for k, (name, end) in enumerate(zip(names, ends, strict=True)):
            run("ip", "link", "set", end, "netns", name)
            run("ip", "-n", name, "addr", "add", f"10.213.8.{k + 1}/24", "dev", end)
            for each in (end, "lo"):
                run("ip", "-n", name, "link", "set", each, "up")
            bucket = ["rate", f"{mbit}mbit", "burst", "1mb", "latency", "100ms"]
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", "tbf", *bucket)
        yield names, [f"10.213.8.{k + 1}:{PORT}" for k in range(2)]


def told_by_first(mbit: int, script: list[str], timeout_seconds: float) -> Any:
    """What the first of two workers prints last, as JSON. Each runs a script with arguments at one end of a cable."""
    with two_networks(mbit) as (names, addresses):
        workers = []
        for k, name in enumerate(names):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": k}}
            environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = ["ip", "netns", "exec", name, sys.executable, *script]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        try:
            outputs = [worker.communicate(timeout=timeout_seconds)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    return json.loads(outputs[0].splitlines()[-1])


def seconds_of_steps(contestant: str, mbit: int, steps: int, at_once: int) -> list[float]:
    """Of the first worker."""
    options = ["--steps", str(steps), "--steps-per-execution", str(at_once)]
    return told_by_first(mbit, [__file__, "--worker", contestant, *options], timeout_seconds=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, nargs="+", default=[1000, 250])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--steps-per-execution", type=int, default=1)
    usual = ["stock", "stage 2", "stage 2 int8"]
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=usual, help="ratios are to the first")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = Work(steps=options.steps, steps_per_execution=options.steps_per_execution)
        print(json.dumps(measure(work, **CONTESTANTS[options.worker])["seconds"]))
        return
    for mbit in options.mbit:
        seconds: dict = {name: [] for name in options.contestants}
        for _ in range(options.rounds):
            for name, found in seconds.items():
                found += seconds_of_steps(name, mbit, options.steps, options.steps_per_execution)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        first = options.contestants[0]
        for name, median in medians.items():
            ratio = medians[first] / median
            print(f"{mbit} Mbit/s, {name}: {median * 1e3:.0f} ms, {ratio:.2f} times as fast as {first}", flush=True)


if __name__ == "__main__":
    main()
