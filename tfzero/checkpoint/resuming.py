"""Where `fit` resumes, and how its model is restored.

[Note: resuming with servers] The first worker looks for a checkpoint, and tells the others where all go on: where the
slowest was. Who was further leaves out the batches that it has trained. The first worker restores its model and the
servers, which give it to the others. So only the first worker needs the directory. With each checkpoint it tells anew
where each is, as a worker that is started again goes on from there: then the servers have all, and nothing is restored.
"""

import functools
from pathlib import Path
from typing import Any

import keras

from tfzero.checkpoint.opening import Team, find_newest, open_checkpoint
from tfzero.checkpoint.saving import restore
from tfzero.checkpoint.served import Floor, first_does, place_at, restore_for_all, take_scalars, tell_scalars
from tfzero.checkpoint.state import METRICS, build_optimizer
from tfzero.servers.parts import Number
from tfzero.servers.served_steps import ServedSteps

_PLACE, _RESTORING = "resuming", "restoring"  # topics of `ServedSteps.first_does`


class Resume:
    """The newest checkpoint of a directory, from which `fit` resumes.

    Args:
        team: the workers.
        directory: of the checkpoints.

    Attributes:
        found: its folder and manifest, where this worker has read it; None if there is none.
        damaged: the names of damaged ones after it.
        position: the position in the data (`checkpoint/callback.py`); None to begin.
        step: the steps behind it.

    Raises:
        ValueError: if it has no position.
    """

    def __init__(self, team: Team, directory: Path) -> None:
        self._team, self._directory = team, directory
        self.damaged: tuple[str, ...] = ()
        self.found: tuple[Path, dict] | None = None
        self.position: dict[str, Any] | None = None
        self.step = 0
        self._find()

    @classmethod
    def of(cls, team: Team, directory: Path) -> "Resume":
        """The resume of these workers."""
        return cls(team, directory) if team.served is None else ServedResume(team, directory, team.served)

    @property
    def is_repeating(self) -> bool:
        """Whether the program is where a former life of this worker has been."""
        return False

    def _find(self) -> None:
        self._search()
        if self.found is not None:
            self.position, self.step = self.found[1]["position"], self.found[1]["step"]

    def _search(self) -> None:
        search = find_newest(self._directory, self._team)
        self.found, self.damaged = search.found, search.damaged
        if self.found is not None and self.found[1]["position"] is None:
            raise ValueError(
                f"{self.found[0]} was saved with `tfzero.save_checkpoint` and does not know its place in the data. "
                "Load it with `tfzero.load_checkpoint`, and give the callback another directory."
            )

    def restore(self, model: keras.Model) -> None:
        """Restores the model. All workers call it."""
        if self.found is not None:
            restore(model, *self.found, self._team)

    def restore_metrics(self, model: keras.Model, epoch: int) -> None:
        """Restores metrics at the beginning of the epoch in which the checkpoint was saved."""
        if self.found is None or epoch < self.found[1]["position"]["epoch"]:
            return
        if self.found[1]["position"]["batch"]:
            restore(model, *self.found, self._team, only=METRICS)  # Keras has just reset them
        self.found = None

    def note_saved(self, model: keras.Model, manifest: dict | None) -> None:
        """Notes a new checkpoint."""


class ServedResume(Resume):
    """That of a worker of parameter servers. [Note: resuming with servers]"""

    def __init__(self, team: Team, directory: Path, served: ServedSteps) -> None:
        self._served = served
        super().__init__(team, directory)

    @property
    def is_repeating(self) -> bool:
        return self._served.is_behind()

    def _find(self) -> None:
        self._told: dict[str, Any] = first_does(self._served, _PLACE, self._look, is_of_fit=True)
        told, worker = self._told, self._served.worker
        if told["position"] is not None:
            back = min(max(told["at"] - told["done"][worker], 0), told["step"])
            self.position, self.step = place_at(told["position"], told["step"], back), told["step"] - back
            self._at = told["at"] - back

    def _look(self) -> dict[str, Any]:
        self._search()
        now, workers = self._served.step, self._served.workers
        told: dict[str, Any] = {"folder": None, "position": None, "from": now}
        if self.found is None:
            return told
        floor = Floor.of(self.found[1], workers)
        place = {"position": floor.position, "step": floor.step, "at": now, "done": [now] * workers}
        return {**told, "folder": self.found[0].name, **place}

    def restore(self, model: keras.Model) -> None:
        if self._told["folder"] is not None:
            read = functools.partial(self._read, model)
            restore_for_all(model, self._served, _RESTORING, read, is_of_fit=True)
        if self._told.get("scalars") is not None:  # those of a later checkpoint
            build_optimizer(model)
            take_scalars(model, self._told["scalars"])
        self._served.go_on_at(self._at)

    def _read(self, model: keras.Model, number: Number) -> tuple[str, list[dict]]:
        """On the first worker: restores the model, and what servers hold. Returns the folder, and their steps."""
        if self.found is None:  # it was told in a former life
            folder = self._directory / self._told["folder"]
            self.found = folder, open_checkpoint(folder, self._team)
        restore(model, *self.found, self._team, number=number)
        keeping, workers = self._served.keeping, self._served.workers
        layouts = keeping.layouts(keeping.remotes_of(model))
        return self._told["folder"], Floor.of(self.found[1], workers).flights(workers, self._told["from"], layouts)

    def note_saved(self, model: keras.Model, manifest: dict | None) -> None:
        if manifest is None:
            return
        done = [min(each) for each in zip(*(of_server["done"] for of_server in manifest["servers"]), strict=True)]
        place = {"position": manifest["position"], "step": manifest["step"], "at": done[0], "done": done}
        self._served.tell_anew(_PLACE, {**self._told, **place, "scalars": tell_scalars(model)})
