"""A directory of checkpoints holds complete ones only, whatever instant a writer dies at."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfzero.checkpoint import commits, directories
from tfzero.checkpoint.slices import rectangles

SHAPES = [(), (7,), (3, 5), (2, 3, 4), (5, 1, 3), (1, 1), (2, 3, 2, 3), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_cover_a_range_in_order(shape):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for begin, end in itertools.combinations_with_replacement(range(whole.size + 1), 2):
        parts = rectangles(shape, begin, end)
        covered = [whole[tuple(slice(s, s + n) for s, n in zip(r.starts, r.sizes, strict=True))].ravel() for r in parts]
        assert np.concatenate([*covered, []]).tolist() == list(range(begin, end))
        assert len(parts) <= max(1, 2 * len(shape) - 1)
        assert sum(part.elements for part in parts) == end - begin


def test_a_rectangle_is_named_as_tensorflow_does():
    (part,) = rectangles((5, 3), 3, 9)
    assert part.spec == "5 3 1,2:0,3"
    assert rectangles((5, 3), 0, 15)[0].spec == ""


def write(directory: Path, step: int, content: bytes = b"values") -> Path:
    """A checkpoint of two data files, as `checkpoint/pieces.py` makes them."""
    final = directories.step_folder(directory, step)
    folder = commits.begin(final)
    (folder / "state.index").write_bytes(b"index")
    files = {}
    for name in ("state.data-00000-of-00002", "state.data-00001-of-00002"):
        (folder / name).write_bytes(content + name.encode())
        files[name] = commits.describe_file(folder / name)
    about = {"step": step, "world_size": 1, "stage": None, "position": None, "optimizers": {}, "variables": []}
    commits.commit(folder, final, {**about, "files": files})
    return final


def is_good(folder: Path) -> bool:
    return not commits.find_damage(folder, commits.read_manifest(folder))


def test_a_checkpoint_tells_what_was_written(tmp_path):
    folder = write(tmp_path, 12)
    assert folder.name == "step-00000012"
    manifest = commits.read_manifest(folder)
    assert (manifest["step"], manifest["format"]) == (12, commits.FORMAT)
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert is_good(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("replaces", [False, True])
def test_whatever_instant_a_writer_dies_at_a_complete_checkpoint_is_there(tmp_path, monkeypatch, replaces):
    """Dies before each call that changes the disk, one after the other, until one save is completed."""
    calls = {(os, "fsync"), (os, "rename"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text"), (json, "dump")}
    originals = {(owner, name): getattr(owner, name) for owner, name in calls}
    for last in itertools.count():
        directory = tmp_path / str(last)
        write(directory, 3, b"old")
        countdown = itertools.count()

        def dying(original, countdown=countdown, last=last):
            def call(*args, **kwargs):
                if next(countdown) >= last:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patches:
            for owner, name in calls:
                patches.setattr(owner, name, dying(originals[owner, name]))
            try:
                write(directory, 3 if replaces else 6, b"new")
                completed = True
            except Killed:
                completed = False
        directories.tidy(directory)
        found = directories.checkpoints(directory)
        assert found and all(map(is_good, found))
        assert {path.name for path in directory.iterdir()} == {path.name for path in found}
        if completed:
            break
    assert last >= 12
    content = (found[0] / "state.data-00000-of-00002").read_bytes()
    assert content.startswith(b"new") and len(found) == (1 if replaces else 2)


def test_every_flipped_byte_is_noticed_and_named(tmp_path):
    folder = write(tmp_path, 1)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for place in range(len(original)):
            flipped = bytearray(original)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            try:
                damages = commits.find_damage(folder, commits.read_manifest(folder))
            except commits.DamagedCheckpointError as error:
                damages = [str(error)]
            assert len(damages) == 1 and str(path) in damages[0], (path, place)
        path.write_bytes(original)
    assert is_good(folder)


def test_a_truncated_and_a_missing_file_are_named(tmp_path):
    folder = write(tmp_path, 1)
    cut, missing = folder / "state.data-00000-of-00002", folder / "state.index"
    os.truncate(cut, 3)
    missing.unlink()
    damages = commits.find_damage(folder, commits.read_manifest(folder))
    assert damages == [f"{cut} has 3 bytes instead of 31", f"{missing}: No such file or directory"]


def test_workers_share_the_checking(tmp_path):
    folder = write(tmp_path, 1)
    manifest = commits.read_manifest(folder)
    os.truncate(folder / "state.index", 0)
    assert sorted(len(commits.find_damage(folder, manifest, part, 3)) for part in range(3)) == [0, 0, 1]


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "FORMAT", 2)
    folder = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format 2, and this tfzero reads formats up to 1\. Update tfzero"):
        commits.read_manifest(folder)


def test_only_the_newest_are_kept(tmp_path):
    for step in (3, 6, 9, 12):
        write(tmp_path, step)
    directories.prune(tmp_path, 2)
    assert [path.name for path in directories.checkpoints(tmp_path)] == ["step-00000012", "step-00000009"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write checkpoints into .*file/inside: Not a directory. Name another"):
        directories.check_room(tmp_path / "file" / "inside", 0)


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"takes about 1,000,000,000,000,000,000 bytes, but .* only [0-9,]+ are free"):
        directories.check_room(tmp_path, 10**18)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tfzero.checkpoint.directories import Lock; Lock(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    lock = directories.Lock(tmp_path)
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"Another run (process {os.getpid()} on {os.uname().nodename}) writes checkpoints" in second.stderr
    with pytest.raises(OSError, match="Give each run a directory of its own") as caught:
        directories.Lock(tmp_path)
    assert caught.value.errno == errno.EAGAIN
    lock.release()
    assert subprocess.run(command, timeout=60).returncode == 0
