"""What in a directory is a checkpoint, what is kept, and whose the directory is."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from test_commits import is_good, write

from tfzero.checkpoint import commits, directories

FULL = "step-00000002"


def names(directory):
    return [path.name for path in directories.checkpoints(directory)]


def flip(folder: Path) -> str:
    """Changes a byte of a data file, which keeps its size; gives the checkpoint's name."""
    path = folder / "state.data-00000-of-00002"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    return folder.name


STRANGERS = [
    "step-best", "step-00000010.mybackup", "step-size-0.1", "step-", "step-2", "step-0000000002", "step-0x000002",
    "step--0000002", "step-٠٠٠٠٠٠٠٢", "Step-00000002", "last", ".unfinished-step-best", ".replaced-mine",
    ".deleted-step-2", ".unfinished-", ".replaced-.unfinished-step-00000002",
]  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_other_names_are_never_taken_pruned_or_tidied_away(tmp_path, stranger):
    original = write(tmp_path, 2)
    shutil.copytree(original, tmp_path / stranger)
    for step in (3, 4):
        write(tmp_path, step)
    directories.tidy(tmp_path)
    directories.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000004"]
    assert {path.name for path in tmp_path.iterdir()} == {stranger, "step-00000004"}
    assert is_good(tmp_path / stranger)


def test_a_file_with_the_name_of_a_checkpoint_is_none(tmp_path):
    (tmp_path / FULL).write_text("")
    assert names(tmp_path) == []


def test_order_is_by_number(tmp_path):
    steps = [99_999_999, 100_000_000, 9, 1_000_000_000]
    for step in steps:
        write(tmp_path, step)
    assert names(tmp_path) == ["step-1000000000", "step-100000000", "step-99999999", "step-00000009"]
    assert [directories.step_of(path) for path in directories.checkpoints(tmp_path)] == sorted(steps, reverse=True)
    directories.prune(tmp_path, 2)
    assert names(tmp_path) == ["step-1000000000", "step-100000000"]


def test_what_cannot_be_loaded_does_not_count_as_kept(tmp_path):
    known = {flip(write(tmp_path, step)) for step in (16, 18)}
    (write(tmp_path, 20) / "state.index").unlink()  # seen without reading contents
    for step in (2, 4, 6):
        folder = write(tmp_path, step)
        directories.prune(tmp_path, 2, known)
        assert is_good(folder)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (20, 18, 16, 6, 4)]
    for step in (16, 18, 20, 22):
        known.discard(write(tmp_path, step).name)
        directories.prune(tmp_path, 2, known)
    assert names(tmp_path) == ["step-00000022", "step-00000020"]
    assert all(map(is_good, directories.checkpoints(tmp_path)))


def test_as_long_as_too_few_are_whole_none_is_deleted(tmp_path):
    known = {flip(write(tmp_path, step)) for step in (2, 4, 6, 8)}
    write(tmp_path, 5)
    directories.prune(tmp_path, 2, known)
    assert len(names(tmp_path)) == 5


def test_a_deletion_that_was_broken_off_is_completed(tmp_path, monkeypatch):
    """Whatever of a deleted checkpoint is left, it does not come back."""
    for step in (2, 4):
        write(tmp_path, step)

    def die(path):
        (path / "state.data-00000-of-00002").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            directories.prune(tmp_path, 1)
    directories.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 2)
    here = tmp_path / "here"
    write(here, 4)
    (here / FULL).symlink_to(elsewhere)
    assert names(here) == ["step-00000004", FULL]
    directories.prune(here, 1)
    assert os.listdir(here) == ["step-00000004"] and is_good(elsewhere)


# Unreadable is not damaged.


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "state.index"])
def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, number, name):
    folder = write(tmp_path, 2)
    original = os.open

    def failing(path, *args, **kwargs):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match=f"{name}: {os.strerror(number)}. It may be whole, .* or move it away") as caught:
        commits.find_damage(folder, commits.read_manifest(folder))
    assert caught.value.errno == number and not isinstance(caught.value, commits.DamagedCheckpointError)
    with pytest.raises(OSError, match=os.strerror(number)):
        directories.prune(tmp_path, 1) if name == "manifest.json" else commits.find_damage(folder, {"files": {name: 0}})


def test_an_error_of_the_disk_while_reading_is_not_damage(tmp_path, monkeypatch):
    folder = write(tmp_path, 2)
    manifest = commits.read_manifest(folder)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(commits.hashlib, "blake2b", failing)
    with pytest.raises(OSError, match=r"step-00000002/checkpoint: Input/output error. It may be whole"):
        commits.find_damage(folder, manifest)


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    def failing(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    assert names(tmp_path / "missing") == []
    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(PermissionError):
        directories.checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "state.index"])
def test_a_pipe_or_folder_in_place_of_a_file_is_damage_and_nobody_waits(tmp_path, name):
    folder = write(tmp_path, 2)
    for make in (os.mkfifo, os.mkdir):
        if (folder / name).is_dir():
            (folder / name).rmdir()
        else:
            (folder / name).unlink()
        make(folder / name)
        try:
            (damage,) = commits.find_damage(folder, commits.read_manifest(folder))
        except commits.DamagedCheckpointError as error:
            damage = str(error)
        assert name in damage and ("no regular file" in damage or "Is a directory" in damage)


# Paths.


@pytest.mark.parametrize(
    "url", ["gs://bucket/run", "s3://bucket", "file:///tmp/run", "hdfs://host:1/x", Path("gs://bucket/run"), "gs:"]
)
def test_urls_are_refused_and_make_no_folder(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL. Mount the storage, and name a directory there"):
        directories.local_path(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["run", "/tmp/gs:/run", "./gs:/run", "a b", "lr[0.1]", "12:30/run", "C:", Path("x")])
def test_other_paths_are_paths(path):
    assert directories.local_path(path) == Path(path)


# The lock.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.warns(UserWarning, match=rf"has no locks \({os.strerror(number)}\), so a second run .* not be noticed"):
        lock = directories.Lock(tmp_path)
    lock.release()


def test_another_error_of_locking_is_no_other_run(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="Cannot lock .*/lock: Input/output error"):
        directories.Lock(tmp_path)


def test_nothing_of_somebody_else_is_opened_or_changed_as_lock(tmp_path):
    path, mine = tmp_path / "lock", tmp_path / "mine"
    mine.write_text("precious")
    for make, what in (
        (lambda: path.symlink_to(mine), "a link"),
        (lambda: path.symlink_to(tmp_path / "nowhere"), "a link"),
        (lambda: path.hardlink_to(mine), "a file of something else"),
        (lambda: os.mkfifo(path), "no regular file"),
    ):
        make()
        with pytest.raises(OSError, match=f"/lock is {what}. Move it away, or name another directory") as caught:
            directories.Lock(tmp_path)
        assert caught.value.errno == errno.EEXIST
        path.unlink()
        assert mine.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    directories.Lock(tmp_path).release()
    directories.Lock(tmp_path).release()  # its own file is taken again
    assert path.read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
