"""Milliseconds of three ways to sum a tensor over all replicas, by its size and the number of workers and devices.

    python benchmarks/collectives.py --fleets 2x1 2x2 1x4      # workers x logical CPU devices in each

`ring` is TensorFlow's all-reduce; `gather` all-gathers and adds; `scatter` reduce-scatters and all-gathers. The rule in
`tfzero/collectives/group.py` follows from it.
"""

import argparse
import statistics
import time

import tfzero

KIBIBYTES = (1 / 256, 4, 64, 512, 4096, 16384)


def times(kibibytes, rounds: int) -> dict:
    """Median seconds by size and way, the ways by turns. Of one worker of a fleet."""
    import tensorflow as tf

    strategy = tfzero.ZeroStrategy()
    group = strategy.extended.group
    size = group.world_size

    def gather(value, replica):
        return tf.reduce_sum(group.all_gather(value, replica), 0)

    def scatter(value, replica):
        rows = tf.reshape(tf.pad(value, [[0, -value.shape[0] % size]]), [size, -1])
        whole = tf.reshape(group.all_gather(group.reduce_scatter(rows, replica), replica), [-1])
        return whole[: value.shape[0]]

    def ring(value, replica):
        return group._emit("all_reduce", value, replica)

    found = {}
    for kib in kibibytes:
        values = [tf.fill([max(1, int(kib * 256))], float(k)) for k in range(len(group.devices))]
        seconds: dict = {way: [] for way in (ring, gather, scatter)}
        for _ in range(rounds + 2):
            for way, taken in seconds.items():
                start = time.perf_counter()
                [result[0].numpy() for result in group.launch(way, values)]
                taken.append(time.perf_counter() - start)
        found[kib] = {way.__name__: statistics.median(taken[2:]) for way, taken in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", nargs="+", default=["2x1", "4x1", "2x2", "1x4"])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    for fleet in options.fleets:
        workers, devices = map(int, fleet.split("x"))
        found = tfzero.run_local(
            times, workers=workers, cpu_devices=devices, args=(KIBIBYTES, options.rounds), timeout_seconds=300
        )[0]
        for kib, ways in found.items():
            figures = ", ".join(f"{way} {seconds * 1e3:.2f}" for way, seconds in ways.items())
            print(f"{fleet}, {kib:g} KiB: {figures} ms", flush=True)


if __name__ == "__main__":
    main()
