"""What workers that train apart do between two merges. [Note: local steps] in `plan/merging.py`

[Note: apart] In a training step of Keras, the replicas that take a batch together are then those of one worker: only
they exchange gradients, divisors of losses and the state of layers. All else, such as validation, is done by the
replicas of all workers. Each worker has its rows of the same global batch as always. In a last small batch it may have
none: then it changes nothing, and only counts the step.

The first steps may be synchronous, to warm up: then all replicas take them together, and the sums of gradients of each
worker's replicas are added up over workers. State lies in the same shards in both kinds of steps.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

# How the state of layers is merged: by the sum of all changes, the sum of all values, the mean, or the first worker's
# value; or it must be equal.
ADDED, TOTAL, AVERAGED, FIRST, EQUAL = "added", "total", "mean", "first", "equal"


def name_of(variable: tf.Variable) -> str:
    """The name of a layer's variable, the same on all workers."""
    return f"{type(variable).__name__} {variable.number}"


class Apart:
    """Whether replicas train apart now, what rows they take, and which state of layers they change.

    Args:
        devices: of this worker; [] if workers never train apart.
        keeps_all: whether the value before a window is kept also of what is averaged.

    Attributes:
        is_on: whether this is a step that workers take apart.
        is_together: whether it is a synchronous step of workers that will train apart.
    """

    def __init__(self, devices: Sequence[str], keeps_all: bool = False) -> None:
        self.is_on = self.is_together = False
        self._kept = (ADDED, TOTAL, AVERAGED) if keeps_all else (ADDED, TOTAL)
        self._rows = []
        for device in devices:
            with tf.init_scope(), tf.device(device):
                self._rows.append(tf.Variable(0, trainable=False, dtype=tf.int64))
        self._changed: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self._assigned: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # outside of steps, by id
        self.note_optimizer: Callable[[Any], None] = lambda optimizer: None  # that the current step applies

    @property
    def is_possible(self) -> bool:
        """Whether workers train apart at all."""
        return bool(self._rows)

    @contextlib.contextmanager
    def training(self, together: bool, note_optimizer: Callable[[Any], None]) -> Iterator[None]:
        """While a training step is traced or runs, which workers take together or apart."""
        self.is_on, self.is_together, self.note_optimizer = not together, together, note_optimizer
        try:
            yield
        finally:
            self.is_on, self.is_together, self.note_optimizer = False, False, lambda optimizer: None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While replicas run something that is only a part of a step."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on

    def count(self, rows: tf.Tensor | None, replica: int) -> None:
        """In a replica: counts its rows of a training step; of an unknown number, one."""
        self._rows[replica].assign_add(tf.ones([], tf.int64) if rows is None else tf.cast(rows, tf.int64))

    def take_rows(self) -> int:
        """Rows that this worker has trained with since it was last asked."""
        rows = sum(int(each.numpy()) for each in self._rows)
        for each in self._rows:
            each.assign(0)
        return rows

    def note(self, variable: tf.Variable, way: str) -> None:
        """In a replica: notes that a step that workers take apart changes a layer's state, and how that is merged."""
        if not self.is_on:
            return
        self._changed[name_of(variable)] = variable
        if getattr(variable, "merged", None) != way:
            variable.merged = way
            with tf.init_scope():
                self._keep(variable)

    def note_assigned(self, variable: tf.Variable) -> None:
        """Outside of steps: notes that a program gives a variable another value, the same on all workers."""
        if self.is_possible:
            self._assigned[id(variable)] = variable

    def take_assigned(self) -> set[int]:
        """Ids of the variables that were assigned outside of steps since this was last asked."""
        assigned = set(self._assigned)
        self._assigned.clear()
        return assigned

    def begin(self) -> None:
        """Begins a window of local steps."""
        for variable in self._changed.values():
            self._keep(variable)

    def _keep(self, variable: tf.Variable) -> None:
        """Keeps the value by which a change is seen."""
        variable.common = [tf.identity(part) for part in variable.values] if variable.merged in self._kept else []

    def changed(self, way: str) -> dict[str, tf.Variable]:
        """What is merged in a way, by keys that are equal on all workers, in order."""
        return {key: each for key, each in sorted(self._changed.items()) if each.merged == way}
