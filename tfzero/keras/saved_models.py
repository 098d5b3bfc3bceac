"""SavedModels for serving: ordinary ones, written by one of all workers.

[Note: export] `tf.saved_model.save` traces functions again while it saves, and takes the variables that they read.
Sharded variables are held whole meanwhile, as ordinary variables. The functions read those, and the file holds those,
so plain TensorFlow loads it. `model.export`, `keras.export.ExportArchive` and TFLite's converter all end in this call.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tfzero.checkpoint.teamwork import SAVING_SECONDS, together
from tfzero.host.patches import patch
from tfzero.host.saved_model import distributed_variables, list_anew, replace_listed, saver
from tfzero.strategy import ZeroStrategy
from tfzero.variables.classes import ShardedVariable, agree_on_sharded


@patch(
    saver,
    "save_and_return_nodes",
    "obj export_dir signatures options experimental_skip_checkpoint",
    "what lies in shards is held whole while it is saved, and one worker writes",
    "test_saved_models.py::test_plain_tensorflow_serves_what_the_model_gives",
)
def _save_saved_model(
    original: Callable[..., Any], obj: Any, export_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    variables = distributed_variables(obj)
    strategies = [v.distribute_strategy for v in variables if isinstance(v.distribute_strategy, ZeroStrategy)]
    if not strategies:
        return original(obj, export_dir, *args, **kwargs)
    strategies[0].merge("saving a SavedModel")
    channel, worker = strategies[0].channel, strategies[0].extended.mesh.worker
    sharded = [variable for variable in variables if isinstance(variable, ShardedVariable)]
    agree_on_sharded(channel, "saving a SavedModel", sharded, "variables to save")
    path = os.path.abspath(os.fspath(export_dir))
    writes = channel.all_gather("naming a SavedModel", path).index(path) == worker
    saved = []

    def save() -> None:
        if writes:
            saved.append(original(obj, export_dir, *args, **kwargs))

    with _held(obj, sharded, writes):
        together(channel, "a SavedModel is saved", save, SAVING_SECONDS)
    return saved[0] if saved else None


@contextlib.contextmanager
def _held(obj: Any, sharded: Sequence[ShardedVariable], keeps: bool) -> Iterator[None]:
    """Holds whole values of sharded variables; without `keeps`, only takes part in their gathers, one at a time."""
    for variable in sharded:
        variable.hold(to_export=True)
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
            list_anew(obj, listed)
        for variable in sharded:
            variable.let_go(write_back=False)
