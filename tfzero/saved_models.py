"""SavedModels for serving: ordinary ones, that one of all workers writes.

[Note: export] `tf.saved_model.save` traces functions again while it saves, and takes the variables that they read. What
lies in shards is held whole meanwhile, as an ordinary variable, so this is what functions read and what the file holds;
TensorFlow alone loads it. `model.export`, `keras.export.ExportArchive` and TFLite's converter all come down to it.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from tfzero._compat_saved_model import distributed_variables, replace_listed, saver
from tfzero.patches import patch
from tfzero.strategy import ZeroStrategy
from tfzero.variables import ShardedVariable

_SAVING_SECONDS = 3600.0  # for the others to wait for the one that writes


@patch(
    saver,
    "save_and_return_nodes",
    "obj export_dir signatures options experimental_skip_checkpoint",
    "what lies in shards is held whole while it is saved, and one worker writes",
    "test_saved_models.py::test_plain_tensorflow_serves_what_the_model_gives",
)
def _save_saved_model(original, obj, export_dir, *args, **kwargs):
    variables = distributed_variables(obj)
    strategies = [v.distribute_strategy for v in variables if isinstance(v.distribute_strategy, ZeroStrategy)]
    if not strategies:
        return original(obj, export_dir, *args, **kwargs)
    channel, worker = strategies[0].channel, strategies[0].extended.seats.worker
    sharded = [variable for variable in variables if isinstance(variable, ShardedVariable)]
    channel.agree("saving a SavedModel", [variable.name for variable in sharded], "variables to save")
    path = os.path.abspath(os.fspath(export_dir))
    writes = channel.all_gather("naming a SavedModel", path).index(path) == worker
    result = error = None
    with _held(obj, sharded, writes):
        if writes:
            try:
                result = original(obj, export_dir, *args, **kwargs)
            except Exception as caught:  # the others are told, and it is raised again
                error = caught
    _raise_together(channel, error)
    return result


@contextlib.contextmanager
def _held(obj, sharded: Sequence[ShardedVariable], keeps: bool) -> Iterator[None]:
    """Whole values of sharded variables; who does not keep them takes part in gathering them, one after the other."""
    for variable in sharded:
        variable.hold()
        if not keeps:
            variable.let_go(write_back=False)
    if not keeps:
        yield
        return
    held = {id(part): variable.held for variable in sharded for part in (*variable.values, variable)}
    listed = replace_listed(obj, held)
    try:
        yield
    finally:
        if listed is not None:
            obj._all_variables = listed
        for variable in sharded:
            variable.let_go(write_back=False)


def _raise_together(channel, error: Exception | None) -> None:
    """Waits until all have saved; raises the first one's error, if there is one, on all workers."""
    mine = None if error is None else f"{type(error).__name__}: {error}"
    texts = channel.all_gather("a SavedModel is saved", mine, _SAVING_SECONDS)
    if error is not None:
        raise error
    failed = next((worker for worker, text in enumerate(texts) if text is not None), None)
    if failed is not None:
        raise RuntimeError(f"Worker {failed} could not write the SavedModel. {texts[failed]}")
