"""Where `fit` resumes, and how its model is restored.

[Note: resuming with servers] The first worker looks for a checkpoint, and tells the others where all go on: where the
slowest was. Who was further leaves out the batches that it has trained. The first worker restores its model and the
servers, which give it to the others. So only the first worker needs the directory. With each checkpoint it tells anew
where all are, as a worker that is started again goes on from there: then the servers have all, and nothing is restored.
"""

from pathlib import Path
from typing import Any

import keras

from tfzero.checkpoint.opening import Team, find_newest, open_checkpoint
from tfzero.checkpoint.saving import restore
from tfzero.checkpoint.served import Floor, restore_for_all
from tfzero.checkpoint.state import METRICS
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

    def note_saved(self, manifest: dict | None) -> None:
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
        told = self._served.first_does(_PLACE, self._look)
        self._told: dict[str, Any] = told or {"folder": None, "position": None, "step": 0}
        self.position, self.step = self._told["position"], self._told["step"]

    def _look(self) -> dict[str, Any]:
        self._search()
        if self.found is None:
            return {"folder": None, "position": None, "step": 0}
        floor = Floor.of(self.found[1], self._served.workers)
        place = {"position": floor.position, "step": floor.step, "at": self._served.step}
        return {"folder": self.found[0].name, **place, "from": self._served.step}

    def restore(self, model: keras.Model) -> None:
        folder, done = self._told["folder"], None
        if folder is not None:
            done = restore_for_all(model, self._served, _RESTORING, lambda number: self._read(model, number))
        if self.position is not None:
            self._served.go_on_at(self._told["at"], done)

    def _read(self, model: keras.Model, number: int) -> tuple[list[int], list[dict]]:
        """On the first worker: restores the model and its slots on the servers. Returns which steps they have."""
        if self.found is None:  # it was told in a former life
            folder = self._directory / self._told["folder"]
            self.found = folder, open_checkpoint(folder, self._team)
        restore(model, *self.found, self._team, number=number)
        floor = Floor.of(self.found[1], self._served.workers)
        flights = floor.flights(self._served.workers, self._told["from"], self._served.keeping.layouts())
        return [min(each) for each in zip(*(flight["done"] for flight in flights), strict=True)], flights

    def note_saved(self, manifest: dict | None) -> None:
        if manifest is None:
            return
        floor = Floor.of(manifest, self._served.workers)
        at = min(min(each["done"]) for each in manifest["servers"])
        told = {**self._told, "position": floor.position, "step": floor.step, "at": at}
        self._served.tell_anew(_PLACE, told)
