"""Writes and reads the state of a model's training: all workers at once, each its own part.

[Note: forms] A variable is stored in its own shape, whoever holds it. A rank stores its shard as the rectangles that it
covers (`checkpoint/slices.py`). The owner stores an owned variable. One worker stores a variable that is equal
everywhere. So any number of workers, at any stage, can read what any other number wrote. Values that each replica
accumulates for itself (metrics, accumulators at stage 1) are stored as `[replicas, *shape]`. The same number of
replicas gets its own values back. With another number the first replica gets the sum, and the others get zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfzero.checkpoint import commits
from tfzero.checkpoint.slices import Rectangle, rectangles
from tfzero.checkpoint.state import LAG, OUTER, HeldPart, Item
from tfzero.checkpoint.teamwork import together
from tfzero.plan.mesh import Mesh
from tfzero.variables.allocation import on_host, placed
from tfzero.variables.classes import ShardedVariable
from tfzero.workers.channel import Channel

# Pieces are written in batches: of as many bytes as the largest variable has, but at least this.
_LEAST_BATCH_BYTES = 4 * 2**20
_SLOWEST_BYTES_PER_SECOND = 5e6  # of a disk that does not count as broken
# How TensorFlow reports files that do not hold what is read.
_DAMAGES = (
    tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError, tf.errors.OutOfRangeError,
)  # fmt: skip


# Which slices of each variable a replica has.


def _writers(items: Sequence[Item], mesh: Mesh) -> dict[str, int]:
    """The worker that writes each variable that is equal on all workers, or of which each holds all shards.

    The largest variable comes first, and goes to the worker that has the least to write so far.
    """
    load = [0] * mesh.workers
    writers = {}
    equal = [item for item in items if item.is_equal_everywhere or _is_in_each_worker(item, mesh)]
    for item in sorted(equal, key=lambda item: -item.bytes):
        writers[item.name] = load.index(min(load))
        load[writers[item.name]] += item.bytes
    return writers


def _is_in_each_worker(item: Item, mesh: Mesh) -> bool:
    """Whether each of several copies of the state has all shards of a variable."""
    return mesh.copies > 1 and not item.is_local and isinstance(item.value, ShardedVariable)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored variable and its value."""

    name: str
    rectangle: Rectangle
    value: tf.Tensor


def pieces_to_write(items: Sequence[Item], mesh: Mesh, advance: Callable[[int], None]) -> Iterator[Piece]:
    """Yields this worker's part of a checkpoint. Tensors are read one by one.

    `advance` gets the bytes of each whole variable, when this worker's part of it has been taken.
    """
    writers = _writers(items, mesh)
    for item in items:
        for held in item.held(mesh):
            if item.is_per_replica:
                row = Rectangle.whole(item.shape).of(mesh.replicas, held.rank)
                yield Piece(item.name, row, tf.convert_to_tensor(held.component)[tf.newaxis])
            elif writers.get(item.name, mesh.worker) == mesh.worker and (
                item.is_in_shards or held.rank == mesh.ranks[0]
            ):
                yield from _cut(item, held, (mesh.copies, mesh.copy(held.rank)) if item.is_local else None)
        advance(item.bytes)


def _cut(item: Item, held: HeldPart, lead: tuple[int, int] | None) -> Iterator[Piece]:
    """The pieces of a part; `lead` is how many copies are stored, and which this is."""
    if held.begin >= held.end:
        return
    flat = tf.reshape(tf.convert_to_tensor(held.component), [-1])
    offset = 0
    for rectangle in rectangles(item.shape, held.begin, held.end):
        values = tf.slice(flat, [offset], [rectangle.elements])
        offset += rectangle.elements
        stored = rectangle if lead is None else rectangle.of(*lead)
        yield Piece(item.name, stored, tf.reshape(values, stored.sizes))


# Writing.


def snapshot(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies pieces into host memory, where training does not change them."""
    with tf.device("CPU:0"):
        return [Piece(piece.name, piece.rectangle, tf.raw_ops.DeepCopy(x=piece.value)) for piece in pieces]


def write_pieces(folder: Path, worker: int, pieces: Iterator[Piece], batch_bytes: int) -> list[list]:
    """Writes a worker's pieces. Returns name without suffix, bytes and checksum of each of its files."""
    written: list[list] = []
    batch: list[Piece] = []
    size_bytes = 0

    def write_batch() -> None:
        name = f"worker-{worker:05d}-{len(written):05d}"
        with commits.plain_path(folder) as plain:
            tf.raw_ops.SaveV2(
                prefix=f"{plain}/{name}",
                tensor_names=[piece.name for piece in batch],
                shape_and_slices=[piece.rectangle.spec for piece in batch],
                tensors=[piece.value for piece in batch],
            )
        commits.describe_file(folder / f"{name}.index")
        written.append([name, *commits.describe_file(folder / f"{name}.data-00000-of-00001")])

    for piece in pieces:
        batch.append(piece)
        size_bytes += piece.rectangle.elements * piece.value.dtype.size
        del piece
        if size_bytes >= batch_bytes:
            write_batch()
            batch.clear()
            size_bytes = 0
    if batch:
        write_batch()
    return written


def merge(folder: Path, written: Sequence[Sequence]) -> dict[str, list]:
    """Merges all workers' files into one checkpoint. Returns bytes and checksum of each of its data files, by name."""
    with commits.plain_path(folder) as plain:
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[f"{plain}/{name}" for name, _, _ in written],
            destination_prefix=f"{plain}/{commits.STATE}",
            delete_old_dirs=False,
        )
    # MergeV2Checkpoints numbers data files in the order of the prefixes (tensor_bundle.cc, MergeBundles).
    names = (f"{commits.STATE}.data-{k:05d}-of-{len(written):05d}" for k in range(len(written)))
    return {name: [size, checksum] for name, (_, size, checksum) in zip(names, written, strict=True)}


class Writer:
    """Writes a checkpoint together with the other workers.

    Args:
        channel: a control channel that nothing else uses meanwhile.
        mesh: the mesh of the workers.
        final: the final directory of the checkpoint.
        timeout_seconds: how long a worker waits for the others, on top of the time to write.
    """

    def __init__(self, channel: Channel, mesh: Mesh, final: Path, timeout_seconds: float) -> None:
        self._channel = channel
        self._mesh = mesh
        self._final = final
        self._timeout_seconds = timeout_seconds

    def write(self, pieces: Iterator[Piece], items: Sequence[Item], manifest: Mapping) -> None:
        """Writes the pieces of all workers and commits. [Note: commit] in `checkpoint/commits.py`.

        Raises:
            OSError: on all workers, if one of them cannot write; the text names it.
            RuntimeError: on all workers, for any other error.
        """
        manifest = {**manifest, "variables": [item.describe(self._mesh) for item in items]}
        self._timeout_seconds = patience(self._timeout_seconds, sum(item.bytes for item in items))
        batch_bytes = max(_LEAST_BATCH_BYTES, *(item.bytes for item in items))
        is_chief = self._mesh.is_chief
        folder = self._final.with_name(self._together("begin", self._begin if is_chief else lambda: None)[0])
        written = self._together("write", lambda: write_pieces(folder, self._mesh.worker, pieces, batch_bytes))

        def commit() -> None:
            files = merge(folder, [file for of_worker in written for file in of_worker])
            commits.commit(folder, self._final, {**manifest, "files": files})

        self._together("commit", commit if is_chief else lambda: None)

    def _begin(self) -> str:
        return commits.begin(self._final).name

    def _together(self, what: str, function: Callable[[], object]) -> list:
        try:
            return together(self._channel, f"checkpoint: {what}", function, self._timeout_seconds)
        except (OSError, ValueError, RuntimeError) as error:
            kind = OSError if isinstance(error, OSError | commits.DamagedCheckpointError) else RuntimeError
            raise kind(f"The checkpoint {self._final} could not be written. {error}") from error


def patience(timeout_seconds: float, size_bytes: int) -> float:
    """How long to wait for another worker that reads or writes `size_bytes`."""
    return timeout_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND


# Reading.


def check_fits(items: Sequence[Item], manifest: Mapping, folder: Path, optimizers: Mapping[str, str]) -> dict:
    """The manifest's entry for each item, by name. Variables are matched by their order, as names may be counted up.

    Raises:
        ValueError: if the checkpoint is of another model or optimizer; the message says what differs, and how.
    """
    for name, kind in optimizers.items():
        stored = manifest["optimizers"].get(name)
        if stored != kind:
            raise ValueError(f"{folder} is a checkpoint of another optimizer: `{name}` is {kind} here, {stored} there.")
    entries: dict = {}
    for section in dict.fromkeys(item.section for item in items if not item.is_optional):
        here = [item for item in items if item.section == section]
        there = [entry for entry in manifest["variables"] if entry["name"].split("/")[0] == section]
        for item, entry in zip(here, there, strict=False):
            if (list(item.shape), item.dtype.name) != (entry["shape"], entry["dtype"]):
                raise ValueError(
                    f"{folder} is a checkpoint of another model: {item.name!r} is {item.dtype.name} of shape "
                    f"{item.shape} here, and {entry['name']!r} is {entry['dtype']} of shape {tuple(entry['shape'])} "
                    "there."
                )
            entries[item.name] = entry
        if len(here) != len(there):
            rest = [item.name for item in here[len(there) :]] or [entry["name"] for entry in there[len(here) :]]
            where = "here" if len(here) > len(there) else "there"
            raise ValueError(
                f"{folder} is a checkpoint of another model: `{section}` has {len(here)} variables here and "
                f"{len(there)} there; only {where} is {rest[0]!r}."
            )
    return entries | _optional_entries(items, entries, manifest)


def _optional_entries(items: Sequence[Item], entries: Mapping[str, dict], manifest: Mapping) -> dict:
    """Like `check_fits`, for what compression and outer optimizers keep. A run may resume with others, or without.

    If a lag is stored for a variable that has none here, it becomes "lag" in the variable's own entry.
    """
    stored = {entry["name"]: entry for entry in manifest["variables"]}
    kept_here = {item.name for item in items if item.is_optional}
    names = {item.of: entries[item.name]["name"].partition("/")[2] for item in items if item.section == "model"}
    names[""] = ""
    found = {}
    for item in items:
        if item.is_optional:
            there = item.name.removesuffix(item.of) + names[item.of]
            if there in stored and stored[there]["shape"] == list(item.shape):
                found[item.name] = stored[there]
            continue
        if item.section != "model" or f"{LAG}/{item.of}" in kept_here:
            continue
        if (lag := f"{LAG}/{names[item.of]}") in stored:
            found[item.name] = {**entries[item.name], "lag": stored[lag]}
    return found


def read_state(
    folder: Path, items: Sequence[Item], entries: Mapping[str, dict], mesh: Mesh, advance: Callable[[int], None]
) -> None:
    """Restores every variable of this worker, one after the other. `advance` gets the bytes of each.

    Raises:
        DamagedCheckpointError: if the files do not hold what the manifest says.
    """
    with commits.plain_path(folder) as plain:
        for item in items:
            try:
                _read_item(f"{plain}/{commits.STATE}", item, entries.get(item.name), mesh)
            except _DAMAGES as error:
                reason = error.message.replace(plain, str(folder))
                raise commits.DamagedCheckpointError(
                    f"The checkpoint {folder} is damaged: {item.name!r} cannot be read ({reason}). What is read before "
                    "it has its value already: load another checkpoint."
                ) from None
            advance(item.bytes)


def _read_item(prefix: str, item: Item, entry: Mapping | None, mesh: Mesh) -> None:
    for held in item.held(mesh):
        component = held.component
        if component is None or (entry is None and not item.of):
            continue  # what this replica does not hold, and settings of an optimizer that the checkpoint does not know
        if entry is None:  # what is optional, and the checkpoint does not hold it
            value = tf.fill(component.shape, tf.cast(item.unknown, item.dtype))
        else:
            value = _value_for(prefix, item, entry, held, mesh)
        value = on_host(value)
        with tf.device(component.device):
            component.assign(placed(value, component.device) if isinstance(value, np.ndarray) else value)


def _value_for(prefix: str, item: Item, entry: Mapping, held: HeldPart, mesh: Mesh) -> tf.Tensor:
    rank, begin, end = held.rank, held.begin, held.end
    stored_by = entry["replicas"]
    if item.is_per_replica and stored_by == mesh.replicas:
        return tf.reshape(_read(prefix, entry, [_row(entry, rank)], item), item.shape)
    if item.is_per_replica and rank != 0:
        return tf.zeros(item.shape, item.dtype)
    copies = entry.get("copies")
    if copies:
        flat = _of_copies(prefix, item, entry, rectangles(item.shape, begin, end), mesh.copy(rank), mesh.copies)
    elif stored_by:
        whole = tf.add_n([tf.cast(_read(prefix, entry, [_row(entry, k)], item), item.dtype) for k in range(stored_by)])
        flat = tf.reshape(whole, [-1])[begin:end]
    else:
        flat = _read(prefix, entry, rectangles(item.shape, begin, end), item)
        if "lag" in entry:
            flat += _read(prefix, entry["lag"], rectangles(item.shape, begin, end), item)
    elements = held.component.shape.num_elements()
    if begin < end and end - begin < elements:
        last = tf.zeros_like(flat[-1:]) if item.section == OUTER else flat[-1:]  # as `as_rows` and `local_shard` pad
        flat = tf.concat([flat, tf.repeat(last, elements - (end - begin))], 0)
    if begin == end and elements:
        flat = tf.zeros([elements], item.dtype)
    return tf.reshape(flat, held.component.shape)


def _of_copies(
    prefix: str, item: Item, entry: Mapping, wanted: Sequence[Rectangle], copy: int, copies: int
) -> tf.Tensor:
    """What this worker had, if there are as many now, and else the mean of all; of whole numbers the first."""
    stored = entry["copies"]
    taken = [copy] if item.is_local and stored == copies else range(stored) if item.dtype.is_floating else [0]
    values = [_read(prefix, entry, [each.of(stored, k) for each in wanted], item) for k in taken]
    return values[0] if len(values) == 1 else tf.add_n(values) / len(values)


def _row(entry: Mapping, replica: int) -> Rectangle:
    return Rectangle.whole(tuple(entry["shape"])).of(entry["replicas"], replica)


def _read(prefix: str, entry: Mapping, wanted: Sequence[Rectangle], item: Item) -> tf.Tensor:
    """Reads stored rectangles, flattened and concatenated."""
    if not wanted:
        return tf.zeros([0], item.dtype)
    with tf.device("CPU:0"):
        read = tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=[entry["name"]] * len(wanted),
            shape_and_slices=[rectangle.spec for rectangle in wanted],
            dtypes=[item.dtype] * len(wanted),
        )
        return tf.concat([tf.reshape(values, [-1]) for values in read], 0)
