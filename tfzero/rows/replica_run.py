"""One record about a replica's run of a function, kept for as long as the run lasts.

TensorFlow runs each replica's function in a thread of its own, at every call of `strategy.run` and in every trace. The
record belongs to that thread. Its per-graph facts are keyed by graph, because functions may be traced within the run.
"""

import threading
import weakref
from collections.abc import Sequence

import tensorflow as tf

from tfzero.host import runtime
from tfzero.host.batch_rows import own_rows
from tfzero.rows.dependence import COUNT, OTHER, ROWS, SAME, Dependence
from tfzero.rows.inputs import batch_leaves, own_rows_of
from tfzero.rows.kinds import Kind


class ReplicaRun:
    """A replica's run of a function.

    Args:
        thread: the replica's thread, from `runtime.replica_thread`.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self.arguments = [thread.main_args, thread.main_kwargs]  # type: ignore[attr-defined]
        self.graph = thread.graph  # type: ignore[attr-defined]
        self.found_rows: tf.Tensor | None = None  # whether it has rows, if only its own tensors tell
        self.gathers_late = False  # whether it is a step that begins by gathering parameters
        self.gatherers: dict = {}  # of sharded parameters, by graph
        self.fractions: dict = {}  # batch fractions, by graph
        self.fed_rows: dict = {}  # that its worker has, by graph
        self.beginning: tf.Tensor | None = None  # of what is timed, if anything is
        self.dependence: Dependence | None = None
        self._has_rows: dict = {}  # by graph

    def own_rows(self) -> tf.Tensor | None:
        """Number of rows of the batch that it was given, int64; None if it was given no known rows."""
        return own_rows_of(self.arguments)

    def known_rows(self) -> tf.Tensor | None:
        """Number of its rows, or 1 for some, int64; None if that is unknown."""
        rows = self._cut_rows()
        return tf.cast(self.found_rows, tf.int64) if rows is None and self.found_rows is not None else rows

    def _cut_rows(self) -> tf.Tensor | None:
        """Number of its rows of a batch that tfzero cut, int64; None if there is none."""
        leaves = tf.nest.flatten(self.arguments)
        return next((rows for leaf in leaves if (rows := own_rows(leaf)) is not None), None)

    def has_rows(self) -> tf.Tensor | None:
        """Whether it has rows of the batch; None if it certainly has, or if that is unknown."""
        graph = current_graph()
        if graph not in self._has_rows:
            rows = self._cut_rows()
            static = None if rows is None else tf.get_static_value(rows)
            if self.found_rows is not None:
                self._has_rows[graph] = tf.identity(self.found_rows)
            else:
                self._has_rows[graph] = None if rows is None or (static is not None and static > 0) else rows > 0
        return self._has_rows[graph]

    def look_into(self, is_for_all: Sequence[bool]) -> Dependence:
        """Determines which tensors depend on its rows of the batch. [Note: kinds]

        Args:
            is_for_all: for each argument, whether all replicas get the same value.
        """
        rows = {id(leaf) for leaf in batch_leaves(self.arguments)}
        leaves = tf.nest.flatten(self.arguments)
        kinds = [
            (tensor, _kind_of(leaf, id(leaf) in rows, for_all))
            for leaf, for_all in zip(leaves, is_for_all, strict=True)
            for tensor in tf.nest.flatten(leaf, expand_composites=True)
            if tf.is_tensor(tensor)
        ]
        counts = [(own_rows(leaf), COUNT) for leaf in leaves if own_rows(leaf) is not None]
        self.dependence = Dependence([*kinds, *counts], self.graph)
        return self.dependence


def _kind_of(leaf: object, has_rows: bool, is_for_all: bool) -> Kind:
    if has_rows and isinstance(leaf, tf.Tensor):
        return ROWS
    return SAME if is_for_all else OTHER


_runs: weakref.WeakKeyDictionary[threading.Thread, ReplicaRun] = weakref.WeakKeyDictionary()


def current_run() -> ReplicaRun | None:
    """The run of the replica that is traced or runs eagerly in this thread; None outside replicas."""
    thread = runtime.replica_thread()
    if thread is None:
        return None
    if thread not in _runs:
        _runs[thread] = ReplicaRun(thread)
    return _runs[thread]


def current_graph() -> tf.Graph | None:
    """The graph that is being traced; None eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
