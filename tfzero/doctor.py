"""Tells whether a cluster is sound: what it consists of, whether what is sent arrives, and whether models train.

    python -m tfzero.doctor                                            # this process, all its GPUs
    python -m tfzero.doctor --cpu-devices 2 --quick                    # two logical CPU devices
    python -m tfzero.launch --workers 2 -m tfzero.doctor --quick       # two local workers
    TF_CONFIG=... python -m tfzero.doctor                              # on each machine of a cluster

It reports versions, devices, the transport and why it was chosen. It tests each primitive on known values, and times
each from 1 KiB to 64 MiB beside TensorFlow's own. Then it trains small models at every stage beside one device. The
last line is the verdict, and the exit code is 0 if all is sound on all workers, or 1. The first worker prints.
`--quick` skips timings and all models but the dense one.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tfzero.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="no times, and the dense model only")
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="such as GPU:0 GPU:1; by default all GPUs, or CPUs"
    )
    parser.add_argument("--cpu-devices", type=int, metavar="K", help="logical CPU devices of this process")
    parser.add_argument("--timeout-seconds", type=float, default=60.0, metavar="S", help="as of ZeroStrategy")
    options = parser.parse_args(arguments)
    if options.cpu_devices is not None and options.cpu_devices < 1:
        parser.error(f"--cpu-devices must be at least 1. Received: {options.cpu_devices}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.cpu_devices is not None:
        os.environ["TFZERO_CPU_DEVICES"] = str(options.cpu_devices)
    try:
        from tfzero.views.examination import Examination

        problems = Examination(options.devices, options.timeout_seconds, options.quick).run()
    except Exception as error:  # whatever is wrong with the cluster: this is the place to say so
        traceback.print_exc()
        print(f"NOT SOUND: {type(error).__name__}: {error}", flush=True)
        return 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
