"""Fleets of workers that serve the cases of several test files, as starting TensorFlow takes most of a small test.

`pool.run(fn, ...)` is `tfzero.run_local(fn, ...)` in processes that may have served other calls: each makes its own
strategy there, as several strategies of a process share the cluster that it has joined. A fleet whose worker fails, or
is late, is ended, and the next call gets another. What a call leaves behind in its process is undone (`_State`).

Not for tests of what belongs to a process: how it starts and ends, its environment, what it shows once.
"""

import atexit
import contextlib
import gc
import json
import os
import pickle
import random
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import cloudpickle
from marks import FLEET_SECONDS

import tfzero
from tfzero import launch
from tfzero.workers.fleet import Fleet
from tfzero.workers.gpus import divide_gpus

MOST_FLEETS = 2  # that wait at the same time in each process of pytest: a worker holds half a gigabyte
MOST_CALLS = 12  # of a fleet, so that what TensorFlow keeps for each graph does not add up
ENVIRONMENT = dict(os.environ)  # not as a test may change it for itself
_SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import pool; pool.serve(*sys.argv[2:])"


class _Served:
    """One fleet: `workers` processes with `cpu_devices` each, which wait for calls."""

    def __init__(self, workers: int, cpu_devices: int):
        self.calls = 0
        self._ends = contextlib.ExitStack()
        self._folder = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="tfzero_pool_")))
        ports = self._ends.enter_context(launch.held_ports(workers))
        gpus = divide_gpus(workers, 0, ENVIRONMENT)
        self._fleet = self._ends.enter_context(contextlib.closing(Fleet(echo=False)))
        command = [sys.executable, "-c", _SERVE, json.dumps([str(entry) for entry in sys.path]), str(self._folder)]
        with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
            environments = launch._environments(ports, {}, cpu_devices, gpus)
        self._fleet.start([[*command, str(index)] for index in range(workers)], environments, hold=True)

    @property
    def is_alive(self) -> bool:
        return all(worker.process.poll() is None for worker in self._fleet.workers)

    def close(self) -> None:
        self._ends.close()

    def call(self, fn, args: tuple, timeout_seconds: float) -> list:
        """What `fn(*args)` gave in each worker. Raises as `run_local` does; then this fleet has ended."""
        workers = self._fleet.workers
        number, self.calls = self.calls, self.calls + 1
        (self._folder / f"call_{number}").write_bytes(launch._pickle_call(fn, args))
        results = [self._folder / f"result_{number}_{worker.index}" for worker in workers]
        for worker in workers:
            worker.lines.clear()
            worker.process.stdin.write(b"%d\n" % number)
        launch._wait_for_results(self._fleet, results, timeout_seconds, f", in call {number} of its fleet")
        return [pickle.loads(each.read_bytes()) for each in results]


_fleets: dict[tuple, _Served] = {}  # the latest used is the last


def run(fn, workers=2, *, args=(), cpu_devices=None, timeout_seconds=FLEET_SECONDS, is_last=False) -> list:
    """What `fn(*args)` gives in each of so many workers with so many logical devices, in their order.

    `is_last`: whether the call leaves its processes without a connection, so that they can serve no other one.
    """
    kind = (workers, cpu_devices or 1)
    served = _fleets.pop(kind, None)
    if served and not served.is_alive:
        served.close()
        served = None
    while served is None and len(_fleets) >= MOST_FLEETS:
        _fleets.pop(next(iter(_fleets))).close()
    served = served or _Served(*kind)
    try:
        results = served.call(fn, tuple(args), timeout_seconds)
    except BaseException:
        served.close()
        raise
    if is_last or served.calls >= MOST_CALLS:
        served.close()
    else:
        _fleets[kind] = served
    return results


@atexit.register
def close() -> None:
    """Ends all fleets."""
    while _fleets:
        _fleets.popitem()[1].close()


# In a worker.


def serve(folder: str, index: str) -> None:
    """Call after call, whose numbers come as lines. The first that fails ends the process, as in `run_local`."""
    launch._serve(lambda line: _serve_calls(line, folder, index))


def _serve_calls(line: int, folder: str, index: str) -> None:
    state = _State()
    tfzero.ZeroStrategy()  # joins the others, whatever the first call does with TensorFlow
    with os.fdopen(line, "rb", buffering=0) as numbers:
        for number in map(int, numbers):
            fn, args = pickle.loads(Path(folder, f"call_{number}").read_bytes())
            result = cloudpickle.dumps(fn(*args))
            del fn, args
            state.reset()
            launch._deliver(Path(folder, f"result_{number}_{index}"), result)


class _State:
    """What functions may change of their process, as it is now; `reset` makes it so again."""

    def __init__(self):
        import keras
        import tensorflow as tf

        self._environment, self._directory, self._path = dict(os.environ), os.getcwd(), list(sys.path)
        self._filters = list(warnings.filters)
        self._graph_options = tf.config.optimizer.get_experimental_options()
        self._keras = keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format()

    def reset(self) -> None:
        import keras
        import numpy as np
        import tensorflow as tf

        os.chdir(self._directory)
        os.environ.clear()
        os.environ.update(self._environment)
        sys.path[:] = self._path
        warnings.filters[:] = self._filters
        warnings._filters_mutated()
        keras.backend.clear_session(free_memory=False)  # also names, the policy of dtypes and the generator of seeds
        for setter, value in zip(
            (keras.config.set_floatx, keras.config.set_epsilon, keras.config.set_image_data_format),
            self._keras,
            strict=True,
        ):
            setter(value)
        tf.config.run_functions_eagerly(False)
        tf.config.optimizer.set_experimental_options(self._graph_options)
        tf.random.set_seed(None)
        random.seed()
        np.random.seed()
        gc.collect()
