"""Writes and checks one checkpoint: complete and unchanged, or not there. `checkpoint/directories.py` handles several.

    step-00000012/
        state.index, state.data-*    TensorFlow's checkpoint
        checkpoint                   lets `tf.train.load_checkpoint` take this directory
        manifest.json                what was saved, and a checksum of every file; written last
    .unfinished-step-00000015/       until it is complete

[Note: commit] A checkpoint is written under another name. Its files reach the disk before its manifest does, and the
manifest before the directory gets its final name. So a directory named `step-...` is complete, whenever writers die.

[Note: unreadable] A checkpoint is damaged if a file is missing, cut or changed. Then the checkpoint before it is used.
A file that cannot be read for another reason (no permission, a disk or a server that fails) may be whole, so its error
ends the run.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from tfzero.checkpoint.manifests import MOST_BYTES, find_fault

# The format of the manifest and all that it describes. A reader accepts this and older ones.
FORMAT = 1
STATE = "state"
UNFINISHED = ".unfinished-"
REPLACED = ".replaced-"
_MANIFEST = "manifest.json"
_POINTER = "checkpoint"
# How opening fails if there is no such file, or something else in its place.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_PATTERN = "*?[\\"


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


class NewerFormatError(ValueError):
    """A checkpoint was written by a newer tfzero, in a format that this one does not know."""


def begin(final: Path) -> Path:
    """Makes a new, empty directory to write a checkpoint into. Only one worker calls it."""
    unfinished = final.with_name(f"{UNFINISHED}{final.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def commit(unfinished: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Completes a checkpoint after all its files are written, and gives it its final name. [Note: commit]

    Args:
        unfinished: the directory from `begin`.
        final: its final path; a checkpoint that is there already is replaced.
        manifest: what is in it, as JSON, with `files`: name to `[bytes, checksum]`.
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
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(unfinished, final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def describe_file(path: Path) -> list[Any]:
    """Flushes a file to disk, and returns its `[bytes, checksum]`."""
    with _open(path) as file:
        os.fsync(file.fileno())
        return _describe(file)


def _describe(file: BufferedReader) -> list[Any]:
    checksum, buffer = hashlib.blake2b(), memoryview(bytearray(2**18))
    while count := file.readinto(buffer):
        checksum.update(buffer[:count])
    return [os.fstat(file.fileno()).st_size, checksum.hexdigest()[:32]]


def is_checkpoint(folder: Path) -> bool:
    """Whether a directory holds a checkpoint, whatever its name."""
    return os.path.lexists(folder / _MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest, and checks that it is intact and valid (`checkpoint/manifests.py`).

    Raises:
        DamagedCheckpointError: if the manifest is missing, has changed, or is not valid.
        NewerFormatError: if a newer tfzero wrote it.
        OSError: if it cannot be read for another reason. [Note: unreadable]
    """
    path = folder / _MANIFEST
    try:
        with _open(path) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        whole = json.loads(text)
        content: dict[str, Any] = whole["manifest"]
        is_intact = whole["checksum"] == _checksum_of(content)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"The checkpoint {folder} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedCheckpointError(f"The checkpoint {folder} cannot be read: {path}: {reason}") from None
    if not is_intact:
        raise DamagedCheckpointError(f"The checkpoint {folder} is damaged: {path} has changed since it was written.")
    written_in = content.get("format") if isinstance(content, dict) else None
    if type(written_in) is int and written_in > FORMAT:
        raise NewerFormatError(
            f"The checkpoint {folder} has format {written_in}, and this tfzero reads formats up to {FORMAT}. "
            "Update tfzero."
        )
    fault = f"its format is {written_in!r}" if type(written_in) is not int or written_in < 1 else find_fault(content)
    if fault:
        raise DamagedCheckpointError(f"The checkpoint {folder} is damaged: {path} is no manifest: {fault}.")
    return content


def find_damage(folder: Path, manifest: Mapping[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint. It checks `part` of `parts`, so workers can share the work.

    Raises:
        OSError: if a file exists but cannot be read. [Note: unreadable]
    """
    damages = []
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        path = folder / name
        try:
            with _open(path) as file:
                found = [os.fstat(file.fileno()).st_size, expected[1]]
                if found == expected:
                    found = _describe(file)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            continue
        if found[0] != expected[0]:
            damages.append(f"{path} has {found[0]} bytes instead of {expected[0]}")
        elif found != expected:
            damages.append(f"{path} has changed since it was written")
    return damages


def looks_whole(folder: Path) -> bool:
    """Whether the manifest is intact and every file has its size. The contents of files are not read."""
    try:
        files = read_manifest(folder)["files"]
        for name, (size, _) in files.items():
            with _open(folder / name) as file:
                if os.fstat(file.fileno()).st_size != size:
                    return False
    except NewerFormatError:
        return True
    except DamagedCheckpointError:
        return False
    return True


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """Another path to a directory, for TensorFlow: its `RestoreV2` reads `[`, `*`, `?` and `\\` as patterns."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = f"/proc/self/fd/{handle}"
        if not os.path.exists(path):  # on systems without /proc
            path = str(folder)
            if set(path) & set(_PATTERN):
                raise ValueError(f"TensorFlow takes {path} for a pattern. Use a directory without {_PATTERN} here.")
        yield path
    finally:
        os.close(handle)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """Opens a file for reading. It never blocks, even if the file is a pipe.

    Raises:
        DamagedCheckpointError: if it is missing or not a regular file.
        OSError: if it cannot be read; the text says what to do. [Note: unreadable]
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DamagedCheckpointError(f"{path} is no regular file")
            yield file
    except OSError as error:
        if error.errno in _MISSING:
            raise DamagedCheckpointError(f"{path}: {error.strerror}") from None
        advice = "It may be whole, so no other checkpoint is taken in its place: make it readable, or move it away."
        raise OSError(error.errno, f"{path}: {error.strerror}. {advice}") from None


def _checksum_of(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
