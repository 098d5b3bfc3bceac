"""Counts what input costs this process: bytes that it reads, and the time that steps wait for their batch."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.rows.inputs import not_ahead

_IO = Path("/proc/self/io")


def read_bytes() -> int | None:
    """Bytes that this process has read by `read` and the like (`rchar`); None where the system does not tell.

    They count whether they come from a disk or from the cache, and include what is no input, such as modules that
    Python imports. What is read by mapping files into memory, or received from sockets, is not among them.
    """
    try:
        lines = dict(line.split(": ", 1) for line in _IO.read_text().splitlines())
    except OSError:
        return None
    return int(lines["rchar"])


def _same(leaf: Any) -> Any:
    return None if leaf is None else tf.identity(leaf)


class InputAccount:
    """Bytes that this process has read since the account was opened, and how long steps have waited for batches.

    Attributes:
        seconds: time from when batches were asked for until they were there.
        batches: number of batches handed out.
    """

    def __init__(self) -> None:
        self._begin = read_bytes()
        self.seconds = 0.0
        self.batches = 0

    @property
    def bytes(self) -> int | None:
        """Bytes read, as `read_bytes` counts them."""
        now = read_bytes()
        return None if now is None or self._begin is None else now - self._begin

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same dataset, whose batches count."""

        @tf.autograph.experimental.do_not_convert
        def noted(asked: tf.Tensor, batch: Any) -> Any:
            with tf.control_dependencies([tf.numpy_function(self._note, [asked], [])]):
                return tf.nest.map_structure(_same, batch, expand_composites=True)

        # A zipped dataset draws its parts one after the other: the time first, then the batch. It is Python's time, as
        # TensorFlow's operation is an error where determinism is enabled.
        clock = tf.data.Dataset.range(tf.int64.max)
        clock = clock.map(lambda _: tf.ensure_shape(tf.numpy_function(time.monotonic, [], tf.float64), []))
        return not_ahead(tf.data.Dataset.zip((clock, dataset)).map(noted))

    def _note(self, asked: np.float64) -> None:
        self.seconds += time.monotonic() - float(asked)
        self.batches += 1
