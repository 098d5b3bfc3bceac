"""What an all-reduce of 44 MB between two workers takes of each one's processor: links, TensorFlow's, and gloo.

    python benchmarks/transport.py --rounds 3      # needs PyTorch

44 MB are the gradients of the benchmark's smaller GPT. Processor time is user and system.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

from gpt_torch import join_gloo

import tfzero
from tfzero.collectives.rings import Rings

ELEMENTS, CALLS, WARM_UP_CALLS = 11_000_000, 15, 3


def costs(all_reduce: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call: the median by the clock, and the mean of the processor's."""
    seconds = []
    for call in range(WARM_UP_CALLS + CALLS):
        if call == WARM_UP_CALLS:
            before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        all_reduce()
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1e3 * statistics.median(seconds[WARM_UP_CALLS:]), 1e3 * processor / CALLS


def with_links() -> tuple[float, float]:
    """In a worker."""
    return _with_group(uses_links=True)


def with_tensorflow() -> tuple[float, float]:
    """In a worker."""
    return _with_group(uses_links=False)


def _with_group(uses_links: bool) -> tuple[float, float]:
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    group = tfzero.ZeroStrategy(stage=0).extended.group
    if not uses_links:
        group.transport = Rings()
    gradients = tf.ones([ELEMENTS])
    return costs(lambda: group.launch(group.all_reduce, [gradients])[0][0].numpy())


def with_gloo() -> tuple[float, float]:
    """In a worker."""
    import torch

    join_gloo(threads=1)
    gradients = torch.ones(ELEMENTS)
    found = costs(lambda: torch.distributed.all_reduce(gradients))
    torch.distributed.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict = {with_links: [], with_tensorflow: [], with_gloo: []}
    for _ in range(options.rounds):
        for function, costs_of_rounds in found.items():
            costs_of_rounds.append(tfzero.run_local(function, workers=2, timeout_seconds=120)[0])
    for function, costs_of_rounds in found.items():
        wall, processor = (statistics.median(each) for each in zip(*costs_of_rounds, strict=True))
        print(f"{function.__name__}: {wall:.0f} ms, {processor:.0f} ms of the processor")


if __name__ == "__main__":
    main()
