"""Directories of checkpoints, each complete and unchanged or not there at all.

    directory/
        lock                             held by the run that writes here
        step-00000012/
            state.index, state.data-*    TensorFlow's checkpoint
            checkpoint                   lets `tf.train.load_checkpoint` take this directory
            manifest.json                what was saved, and a checksum of every file; written last
        .unfinished-step-00000015/       until it is complete

[Note: commit] A checkpoint is written under another name. Its files reach the disk before its manifest does, and the
manifest before the directory gets its name. Whatever instant the writers die at, what is named `step-...` is complete.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of the manifest and all that it describes; a reader takes this and older ones.
FORMAT = 1
STATE = "state"
_MANIFEST = "manifest.json"
_POINTER = "checkpoint"
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or has changed since it was written; the message names the file.

    Example:

    ```python
    folder = tfzero.save_checkpoint(model, "damaged")
    (folder / "state.index").write_bytes(b"")
    try:
        tfzero.load_checkpoint(model, folder)
    except tfzero.DamagedCheckpointError as error:
        print(error)  # state.index has 0 bytes instead of ...
    ```
    """


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return directory / f"{_PREFIX}{step:08d}"


def begin(final: Path) -> Path:
    """A new, empty directory to write a checkpoint into. For one worker."""
    unfinished = final.with_name(f"{_UNFINISHED}{final.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def commit(unfinished: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Completes a checkpoint of which all files are written, and gives it its name. [Note: commit]

    Args:
        unfinished: what `begin` gave.
        final: its name; a checkpoint that is there already is replaced.
        manifest: what is in it, as JSON has it, with `files`: name to `[bytes, checksum]`.
    """
    pointer = unfinished / _POINTER
    pointer.write_text(f'model_checkpoint_path: "{STATE}"\n')
    index = unfinished / f"{STATE}.index"
    files = {**manifest["files"], **{path.name: describe_file(path) for path in (pointer, index)}}
    for name, (size, _) in files.items():
        if (unfinished / name).stat().st_size != size:
            raise DamagedCheckpointError(f"{unfinished / name} has changed while the checkpoint was being written.")
    content = {"format": FORMAT, **manifest, "files": files}
    with (unfinished / _MANIFEST).open("w") as file:
        json.dump({"manifest": content, "checksum": _checksum_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(unfinished)
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(unfinished, final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def describe_file(path: Path) -> list[Any]:
    """`[bytes, checksum]` of a file, which is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()[:32]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        DamagedCheckpointError: if the manifest is missing or has changed.
        ValueError: if it was written by a newer tfzero.
    """
    path = folder / _MANIFEST
    try:
        whole = json.loads(path.read_text())
        content: dict[str, Any] = whole["manifest"]
        is_intact = whole["checksum"] == _checksum_of(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"The checkpoint {folder} cannot be read: {path}: {error}") from None
    if not is_intact:
        raise DamagedCheckpointError(f"The checkpoint {folder} is damaged: {path} has changed since it was written.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"The checkpoint {folder} has format {content['format']}, and this tfzero reads formats up to {FORMAT}. "
            "Update tfzero."
        )
    return content


def find_damage(folder: Path, manifest: Mapping[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, of which `part` of `parts` is looked at; workers share the work."""
    damages = []
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        path = folder / name
        try:
            found = [path.stat().st_size, expected[1]]
            if found == expected:
                found = describe_file(path)
        except OSError as error:
            damages.append(f"{path}: {os.strerror(error.errno or errno.EIO)}")
            continue
        if found[0] != expected[0]:
            damages.append(f"{path} has {found[0]} bytes instead of {expected[0]}")
        elif found != expected:
            damages.append(f"{path} has changed since it was written")
    return damages


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a directory, the newest first."""
    return sorted((path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the newest checkpoints."""
    for path in checkpoints(directory)[keep:]:
        # Out of sight at once, so that no half of a checkpoint can be seen.
        shutil.rmtree(path.rename(path.with_name(f"{_REPLACED}{path.name}")))


def tidy(directory: Path) -> None:
    """Deletes what writers that died left unfinished, and gives back its name to what they had not yet replaced."""
    for path in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
    for path in directory.glob(f"{_REPLACED}*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if final.exists() or not (path / _MANIFEST).exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raises OSError if one cannot write into a directory, which is made, or if its disk has not enough room."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise OSError(
            error.errno, f"Cannot write checkpoints into {directory}: {error.strerror}. Name another."
        ) from None
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"A checkpoint takes about {needed_bytes:,} bytes, but on the disk of {directory} only {free:,} are free. "
            "Make room, or name a directory on another disk.",
        )


class Lock:
    """Keeps a second run out of a directory, for as long as this process lives or until `release`."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._file = open(self._path, "a+")  # noqa: SIM115 - held open
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            raise OSError(
                errno.EAGAIN,
                f"Another run ({owner}) writes checkpoints into {directory}. Give each run a directory of its own.",
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def _checksum_of(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
