"""Counts what input costs this process: bytes that it reads, and the time that steps wait for their batch."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from tfzero.host import runtime
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


class InputAccount:
    """Bytes that this process has read since the account was opened, and how long steps have waited for batches."""

    def __init__(self) -> None:
        self._begin = read_bytes()
        self._totals: tf.Variable | None = None  # [2]: seconds, batches

    @property
    def bytes(self) -> int | None:
        """Bytes read, as `read_bytes` counts them."""
        now = read_bytes()
        return None if now is None or self._begin is None else now - self._begin

    @property
    def seconds(self) -> float:
        """Time from when batches were asked for until they were there."""
        return 0.0 if self._totals is None else float(self._totals.numpy()[0])

    @property
    def batches(self) -> int:
        """Number of batches handed out."""
        return 0 if self._totals is None else int(self._totals.numpy()[1])

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same dataset, whose batches count."""
        if self._totals is None:
            with tf.device("CPU:0"):
                self._totals = runtime.plain_variable(tf.zeros([2], tf.float64))
        totals = self._totals

        @tf.autograph.experimental.do_not_convert
        def noted(asked: tf.Tensor, batch: Any) -> Any:
            with tf.control_dependencies([totals.assign_add(tf.stack([tf.timestamp() - asked, 1.0]))]):
                return tf.nest.map_structure(tf.identity, batch, expand_composites=True)

        # A zipped dataset draws its parts one after the other: the time first, then the batch.
        clock = tf.data.Dataset.range(tf.int64.max).map(lambda _: tf.timestamp())
        return not_ahead(tf.data.Dataset.zip((clock, dataset)).map(noted))
