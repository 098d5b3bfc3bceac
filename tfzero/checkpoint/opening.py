"""The workers that save and load together, and the checkpoints that they find."""

import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import keras

from tfzero.checkpoint import commits, directories
from tfzero.checkpoint.pieces import patience
from tfzero.checkpoint.state import mesh_of
from tfzero.checkpoint.teamwork import together
from tfzero.collectives.joining import channel_of_one
from tfzero.host import versions
from tfzero.plan.mesh import Mesh
from tfzero.servers.served_steps import ServedSteps
from tfzero.strategy import ZeroStrategy
from tfzero.workers.channel import Channel

_SAVE_SECONDS = 60.0  # for workers without a strategy's timeout

# [Note: one thread] Two threads cannot use one control channel at a time: which of them speaks first may differ between
# workers. So whoever needs the channel for saving waits for the thread that writes in the background. All workers begin
# both at the same places of the program.
writing: weakref.WeakKeyDictionary[Channel, Thread] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Team:
    """The workers that save and load together.

    Args:
        channel: between them.
        mesh: the mesh of the workers.
        stage: of their strategy; None for plain Keras.
        timeout_seconds: how long they wait for each other.
        served: the steps of a worker of parameter servers; None without servers.
    """

    channel: Channel
    mesh: Mesh
    stage: int | None
    timeout_seconds: float
    served: ServedSteps | None = None

    @classmethod
    def of(cls, model: keras.Model) -> "Team":
        """The team of a model, with its control channel for saving. [Note: one thread]"""
        versions.refuse_keras_2(model)
        strategy = model.distribute_strategy
        if isinstance(strategy, ZeroStrategy):
            channel, settings = strategy.saving_channel, strategy.settings
            if (thread := writing.get(channel)) is not None:
                thread.join()
            return cls(channel, mesh_of(strategy), settings.stage, settings.timeout_seconds, strategy.served)
        if strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"tfzero's checkpoints are for models of a ZeroStrategy or of one device. Received: {strategy!r}"
            )
        return cls(channel_of_one(), mesh_of(strategy), None, _SAVE_SECONDS)

    @property
    def is_chief(self) -> bool:
        return self.mesh.is_chief and self.takes_part

    @property
    def takes_part(self) -> bool:
        """Whether this worker saves and loads: of workers of servers only the first one does."""
        return self.served is None or self.served.is_first

    def together(self, what: str, function: Callable[[], Any]) -> Any:
        """Calls `function` on all workers, and returns the leader's result. It fails on all if it fails on one.

        For short work.
        """
        return together(self.channel, what, function)[0]


def open_checkpoint(folder: Path, team: Team) -> dict:
    """Checks every file of a checkpoint, and returns its manifest. The workers share the work.

    Raises:
        DamagedCheckpointError: on all workers; the message names what is damaged.
        OSError: on all workers, if one of them cannot read what is there, or sees another checkpoint.
        ValueError: if a newer tfzero wrote it.
    """
    read: dict = {}

    def check() -> list:
        try:
            read.update(commits.read_manifest(folder))
        except commits.NewerFormatError as error:
            return ["", [], str(error)]
        except commits.DamagedCheckpointError as error:
            return ["", [str(error)], ""]
        step = directories.step_of(folder)
        if step not in (None, read["step"]):
            return ["", [f"its manifest is of step {read['step']}, so it was renamed or copied"], ""]
        damages = commits.find_damage(folder, read, team.mesh.worker, team.mesh.workers)
        return [json.dumps(read["files"], sort_keys=True), damages, ""]

    answers = together(team.channel, f"opening {folder}", check, _seconds_to_check(folder, team))
    newer = next((text for _, _, text in answers if text), "")
    if newer:
        raise ValueError(newer)
    found = list(dict.fromkeys(damage for _, damages, _ in answers for damage in damages))
    if found:
        raise commits.DamagedCheckpointError(f"The checkpoint {folder} is damaged: {'; '.join(found)}.")
    if len({files for files, _, _ in answers}) > 1:
        raise OSError(f"The workers see different checkpoints at {folder}. They need one file system that all share.")
    return read


def _seconds_to_check(folder: Path, team: Team) -> float:
    try:
        sizes = [path.stat().st_size for path in folder.iterdir()]
    except OSError:
        sizes = []
    return patience(team.timeout_seconds, sum(sizes))


@dataclass(frozen=True)
class Search:
    """The result of a search for checkpoints in a directory.

    Args:
        found: the last checkpoint that is not damaged, and its manifest; None if there is none.
        damaged: the names of the damaged ones after it.
    """

    found: tuple[Path, dict] | None
    damaged: tuple[str, ...]


def find_newest(directory: Path, team: Team) -> Search:
    """Finds the last checkpoint that is not damaged. It warns of damaged ones."""
    names = team.together("looking for checkpoints", lambda: [path.name for path in directories.checkpoints(directory)])
    for place, name in enumerate(names):
        try:
            return Search((directory / name, open_checkpoint(directory / name, team)), tuple(names[:place]))
        except commits.DamagedCheckpointError as error:
            rest = "The one before it is used." if place + 1 < len(names) else "There is none before it."
            warnings.warn(f"{error} {rest}", stacklevel=2)
    return Search(None, tuple(names))
