"""What parameter servers hold of a model's training, as checkpoints store it."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.checkpoint.state import HeldPart, Item, build_optimizer, scalars_of
from tfzero.checkpoint.teamwork import KINDS, kind_of
from tfzero.plan.mesh import Mesh
from tfzero.servers.parts import Number, RemotePart
from tfzero.servers.remote import assign_whole
from tfzero.servers.served_steps import ServedSteps


@dataclass(frozen=True)
class _OnServer:
    """A part as if it were a variable: read from the latest copies of its server, assigned under a number."""

    part: RemotePart
    number: Number | None
    device: str = "CPU:0"

    @property
    def shape(self) -> tf.TensorShape:
        return tf.TensorShape([self.part.end - self.part.begin])

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        with tf.device(self.device):
            return tf.convert_to_tensor(self.part.read(is_copied=True), dtype, name=name)

    def assign(self, value: tf.types.experimental.TensorLike) -> None:
        if self.number is not None:  # of what is saved nothing is assigned
            self.part.write(self.number, np.asarray(value))


@dataclass(frozen=True)
class ServedItem(Item):
    """A parameter or slot that servers hold.

    Args:
        parts: its parts.
        number: under which the program assigns it.
    """

    parts: tuple[RemotePart, ...] = ()
    number: Number | None = None

    @property
    def is_in_shards(self) -> bool:
        return True

    def held(self, mesh: Mesh) -> Iterator[HeldPart]:
        for part in self.parts:
            yield HeldPart(mesh.ranks[0], _OnServer(part, self.number), part.begin, part.end)


def items_on_servers(served: ServedSteps, items: Sequence[Item], number: Number | None = None) -> list[Item]:
    """The same items; those that servers hold are read and assigned there."""
    parts: dict[int, list[RemotePart]] = {}
    for held in served.keeping.held:
        for index, (variable, slots) in enumerate(zip(held.remote.variables, held.of_variables, strict=True)):
            if held.remote.trains(index):
                parts[id(variable.value)] = held.remote.parts(index, 0)
            parts |= {id(slot): held.remote.parts(index, place) for place, slot in enumerate(slots, start=1)}
    return [
        ServedItem(item.name, item.variable, parts=tuple(parts[id(item.value)]), number=number)
        if id(item.value) in parts
        else item
        for item in items
    ]


def first_does(served: ServedSteps, topic: str, function: Callable[[], Any], is_of_fit: bool = False) -> Any:
    """As `ServedSteps.first_does`; errors are of the kinds that `together` raises."""
    caught: list[Exception] = []

    def attempt() -> Any:
        try:
            return function()
        except Exception as error:
            caught.append(error)
            raise RuntimeError(f"{kind_of(error)}: {error}") from error

    try:
        return served.first_does(topic, attempt, is_of_fit)
    except RuntimeError as error:
        if caught:
            raise caught[0] from None
        kind, _, text = str(error).partition(": ")
        raise KINDS.get(kind, RuntimeError)(text if kind in KINDS else str(error)) from None


def restore_for_all(
    model: keras.Model, served: ServedSteps, topic: str, read: Callable[[Number], tuple[Any, list[dict] | None]],
    is_of_fit: bool = False,
) -> Any:  # fmt: skip
    """Has the first worker restore a model, for all workers and on the servers. All call it.

    Args:
        model: the model.
        served: the steps of this worker.
        topic: as in `first_does`.
        read: reads a checkpoint, and assigns under the number that it is given. Returns a value, as JSON, and which
            steps each server has (`Flight`); None for those that it has now.
        is_of_fit: as in `first_does`.

    Returns:
        The value; None if the first worker has passed here without.
    """
    build_optimizer(model)
    is_restored_here = False

    def restore() -> dict[str, Any]:
        nonlocal is_restored_here
        is_restored_here = True
        value = served.keeping.restore(model, read)
        served.take_restored(model)
        return {"value": value, "scalars": tell_scalars(model)}

    try:
        told = first_does(served, topic, restore, is_of_fit)
    except Exception:
        if not is_restored_here:
            served.keeping.count_restored()
        raise
    if told is None:
        return None
    if not is_restored_here:
        served.keeping.count_restored()
        take_scalars(model, told["scalars"])
        served.take_restored(model)
    return told["value"]


def tell_scalars(model: keras.Model) -> list[float]:
    """What a model's optimizers hold beside slots."""
    return [float(each.numpy()) for each in scalars_of(model)]


def take_scalars(model: keras.Model, values: Sequence[float]) -> None:
    """Takes what the first worker has told."""
    for variable, value in zip(scalars_of(model), values, strict=True):
        assign_whole(variable.value, np.array([value], variable.value.dtype.as_numpy_dtype))


# Where workers resume that are not equally far.


@dataclass(frozen=True)
class Floor:
    """Where the workers of a checkpoint go on: the slowest here, the others some steps later.

    Args:
        position: the position in the data, as in a manifest.
        step: steps behind it, as the callback counts them.
        ahead: by server, which steps it has since (`Flight`); None if all workers go on here.
    """

    position: dict[str, Any] | None
    step: int
    ahead: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any], workers: int) -> "Floor":
        """That of a checkpoint. Another number of workers goes on where the first one was.

        Args:
            manifest: of the checkpoint.
            workers: number of workers now.
        """
        stored, position, step = manifest.get("servers"), manifest["position"], manifest["step"]
        if not stored or len(stored[0]["done"]) != workers:
            return cls(position, step)
        first = max(each["done"][0] for each in stored)
        # A worker may be behind by more than this `fit` has taken.
        least = max(min(min(each["done"]) for each in stored), first - step)
        ahead = [each | {"done": [max(count - least, 0) for count in each["done"]]} for each in stored]
        is_over = position is not None and position["finished"] is not None and least == first
        return cls(place_at(position, step, first - least), step - (first - least), None if is_over else ahead)

    def flights(self, workers: int, step: int, layouts: Sequence[str]) -> list[dict[str, Any]]:
        """`Flight` of each server, and what it counts.

        Args:
            workers: number of workers.
            step: the number that the next step here has now.
            layouts: what each server holds now (`Keeping.layouts`). If it is something else than in the checkpoint,
                what was in flight counts as pushed everywhere.
        """
        if self.ahead is None:
            return [{"done": [step] * workers, "pushed": []} for _ in layouts]
        if [each["layout"] for each in self.ahead] == list(layouts):
            names = "pushed", "scalars"
            return [
                {"done": [step + count for count in each["done"]], **{name: each[name] for name in names}}
                for each in self.ahead
            ]
        begun = [
            max(each["done"][w] + any(of == w for _, of, _ in each["pushed"]) for each in self.ahead)
            for w in range(workers)
        ]
        return [{"done": [step + count for count in begun], "pushed": []} for _ in layouts]


def place_at(position: dict[str, Any] | None, step: int, back: int) -> dict[str, Any] | None:
    """The position in the data so many steps earlier."""
    if not back or position is None:
        return position
    begun = position.get("epoch_steps") or [0]
    epoch = max(bisect.bisect_right(begun, step - back) - 1, 0)
    return position | {
        "epoch": (position["first_epoch"] or 0) + epoch,
        "batch": step - back - begun[epoch],
        "epoch_batches": begun[epoch] - begun[epoch - 1] if epoch else 0,
        "epoch_steps": begun[:epoch],
        "finished": None,
    }
