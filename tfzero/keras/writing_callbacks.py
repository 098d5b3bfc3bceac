"""Keras's callbacks that write files: all workers run them, one worker's files stay.

Logs are the same on all workers, so each would write the same file, all at once. Yet every worker must run them:
histograms of weights, and whatever a subclass computes, may be collectives. So elsewhere than on the first worker they
write where it is lost. What a callback writes when it is told its model before, in a `CallbackList` of the user's own,
as TensorBoard does with `write_graph`, each worker has written.
"""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import keras

from tfzero.host.keras_objects import close_writers
from tfzero.strategy import ZeroStrategy

_lost: weakref.WeakSet = weakref.WeakSet()  # callbacks that write so at this time


@contextlib.contextmanager
def one_worker_writes(callbacks: Sequence[keras.callbacks.Callback], strategy: ZeroStrategy) -> Iterator[None]:
    """Within it what Keras's own callbacks write on other workers than the first is lost.

    Args:
        callbacks: those of `fit`, `evaluate` or `predict`.
        strategy: the strategy of the model.

    Raises:
        ValueError: for a callback that several workers cannot have.
    """
    mesh = strategy.extended.mesh
    if mesh.workers > 1 and any(isinstance(callback, keras.callbacks.OrbaxCheckpoint) for callback in callbacks):
        raise ValueError(
            "OrbaxCheckpoint knows the processes of JAX only: several workers would write one directory, each all of "
            "it. Use `tfzero.CheckpointCallback(directory)`, or `keras.callbacks.ModelCheckpoint`."
        )
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if mesh.worker > 0 and callback not in _lost:  # validation within `fit` comes here again
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
                    if callback.model is not None:  # of a CallbackList, which has told it where to write
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
    """Within it an object has another attribute of its own."""
    own = vars(callback)
    former = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(former)
