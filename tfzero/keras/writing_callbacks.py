"""Keras's callbacks that write files: all workers run them, one worker's files stay.

Logs are the same on all workers, so all would write the same file at once. Yet every worker must run the callbacks:
histograms of weights, and whatever a subclass computes, may be collectives. So on all workers but the first they write
to a place where it is lost. One exception: a user's own `CallbackList` sets the model earlier, and what a callback
writes then (TensorBoard with `write_graph`) has been written by each worker.
"""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import keras

from tfzero.host.keras_objects import close_writers
from tfzero.strategy import ZeroStrategy

_lost: weakref.WeakSet = weakref.WeakSet()  # callbacks whose writes are lost at present


@contextlib.contextmanager
def one_worker_writes(callbacks: Sequence[keras.callbacks.Callback], strategy: ZeroStrategy) -> Iterator[None]:
    """Discards what Keras's own callbacks write within it on workers other than the first.

    Args:
        callbacks: those of `fit`, `evaluate` or `predict`.
        strategy: the strategy of the model.

    Raises:
        ValueError: for a callback that does not work with several workers.
    """
    mesh = strategy.extended.fleet
    orbax = getattr(keras.callbacks, "OrbaxCheckpoint", ())  # since Keras 3.14
    if mesh.workers > 1 and any(isinstance(callback, orbax) for callback in callbacks):
        raise ValueError(
            "OrbaxCheckpoint knows the processes of JAX only: several workers would write one directory, each all of "
            "it. Use `tfzero.CheckpointCallback(directory)`, or `keras.callbacks.ModelCheckpoint`."
        )
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if mesh.worker > 0 and callback not in _lost:  # validation within `fit` enters again
                stack.enter_context(_writes_lost(callback))
        yield


@contextlib.contextmanager
def _writes_lost(callback: keras.callbacks.Callback) -> Iterator[None]:
    _lost.add(callback)
    try:
        if isinstance(callback, keras.callbacks.CSVLogger):
            with _replaced(callback, "filename", os.devnull):
                yield
        elif isinstance(callback, keras.callbacks.TensorBoard):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                with _replaced(callback, "log_dir", folder):
                    if callback.model is not None:  # set by a CallbackList: it writes elsewhere already
                        callback.set_model(callback.model)
                    yield
                close_writers(callback)
        elif isinstance(callback, keras.callbacks.RemoteMonitor):
            with _replaced(callback, "on_epoch_end", lambda epoch, logs=None: None):
                yield
        elif isinstance(callback, keras.callbacks.BackupAndRestore):  # the rest: `keras/files.py`
            with _replaced(callback, "delete_checkpoint", False):
                yield
        else:
            yield
    finally:
        _lost.discard(callback)


@contextlib.contextmanager
def _replaced(callback: keras.callbacks.Callback, name: str, value: object) -> Iterator[None]:
    """Replaces an attribute of this one object within it."""
    own = vars(callback)
    former = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(former)
