"""Directories of checkpoints: which checkpoints exist, which are kept, and which run owns the directory.

    directory/
        lock              held by the run that writes here
        step-00000012/    a checkpoint (`checkpoint/commits.py`)
        .unfinished-...   being written, or left by a writer that died
        .replaced-...     moved aside for a new checkpoint of the same step
        .deleted-...      being deleted, out of sight, so that nobody sees half a checkpoint

Only these names are ever taken for checkpoints or deleted.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path

from tfzero.checkpoint.commits import REPLACED, UNFINISHED, is_checkpoint, looks_whole

_DELETED = ".deleted-"
_NAME = re.compile(r"step-(\d{8,})")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?|$)")
# Errors of `flock` if another process has locked the file, and on file systems without locks.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_OWNER = re.compile(rb"process \d+ on [^\n]*\n")


def local_path(directory: str | os.PathLike[str]) -> Path:
    """A directory as a path.

    Raises:
        ValueError: for a URL, which would become a local folder such as `gs:`.
    """
    if _URL.match(os.fspath(directory)):
        raise ValueError(
            f"Checkpoints go to a file system that all workers see, and {os.fspath(directory)!r} is a URL. "
            "Mount the storage, and name a directory there."
        )
    return Path(directory)


def step_folder(directory: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return directory / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None if it is not the name of a checkpoint, such as `step-best`."""
    match = _NAME.fullmatch(folder.name)
    step = int(match[1]) if match and match[1].isascii() else None
    return step if step is not None and step_folder(folder.parent, step) == folder else None


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, last step first.

    Raises:
        OSError: if the directory exists but cannot be read.
    """
    folders = [path for path in _entries(directory) if step_of(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda path: step_of(path) or 0, reverse=True)


def _entries(directory: Path) -> list[Path]:
    # Not `Path.glob`: it silently skips directories that it may not read.
    try:
        return [directory / name for name in os.listdir(directory)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def prune(directory: Path, keep: int, damaged: Collection[str] = ()) -> None:
    """Deletes all but the last checkpoints. Checkpoints that cannot be loaded do not count as kept.

    Args:
        directory: of the checkpoints.
        keep: how many whole checkpoints to keep, as far as manifests and sizes tell.
        damaged: names of checkpoints that are known to be damaged.
    """
    folders = checkpoints(directory)
    whole = [path for path in folders if path.name not in damaged and looks_whole(path)]
    if len(whole) >= keep:
        for path in folders[folders.index(whole[keep - 1]) + 1 :]:
            _delete(path)


def _delete(path: Path) -> None:
    aside = path.rename(path.with_name(f"{_DELETED}{path.name}"))
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def tidy(directory: Path) -> None:
    """Deletes leftovers of dead writers, and renames back checkpoints that they moved aside but did not replace."""
    for path in _entries(directory):
        for prefix in (UNFINISHED, REPLACED, _DELETED):
            name = path.name.removeprefix(prefix)
            final = directory / name
            if name in ("", path.name) or step_of(final) is None:
                continue
            if prefix == REPLACED and is_checkpoint(path) and not final.exists():
                path.rename(final)
            else:
                _remove(path)


def check_room(directory: Path, needed_bytes: int) -> None:
    """Makes a directory. Raises OSError if it is not writable, or if its disk has too little room."""
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
    """Keeps a second run out of a directory, until `release` or the end of this process.

    Raises:
        OSError: if another run holds it, or if the file `lock` is not one of tfzero's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "lock"
        self._handle = self._open()
        try:
            self._take()
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        except BaseException:
            os.close(self._handle)
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._not_ours("a link") from None
            raise

    def _take(self) -> None:
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise self._not_ours("no regular file")
        owner = os.pread(self._handle, 1000, 0)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                who = owner.decode(errors="replace").strip()
                advice = "Give each run a directory of its own."
                what = f"Another run ({who}) writes checkpoints into {self._directory}. {advice}"
                raise OSError(errno.EAGAIN, what) from None
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"Cannot lock {self._path}: {error.strerror}") from None
            warnings.warn(
                f"The file system of {self._directory} has no locks ({error.strerror}), so a second run that writes "
                "there would not be noticed. Give each run a directory of its own.",
                stacklevel=2,
            )
        if owner and not _OWNER.fullmatch(owner):
            raise self._not_ours("a file of something else")

    def _not_ours(self, what: str) -> OSError:
        return OSError(
            errno.EEXIST,
            f"tfzero locks the file `lock` in a directory of checkpoints, but {self._path} is {what}. Move it away, or "
            "name another directory.",
        )

    def release(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # closing is not enough if a forked child has the file open, too
        os.close(self._handle)
