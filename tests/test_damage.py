"""Files that were changed by chance or by hand: a checkpoint gives its values, or an error with a name.

Each case is drawn from a seed, so what fails can be run again.
"""

import copy
import json
import random
import shutil
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import sweep
from test_checkpoints import compiled, make_strategy, values_of

import tfzero
from tfzero.checkpoint import commits, manifests

NAMED = (tfzero.DamagedCheckpointError, ValueError)  # ValueError: it is one of another model, or of a newer tfzero
MOST_SECONDS = 60.0
CASES = [*range(40), *(sweep(seed) for seed in range(40, 1000))]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in the middle of an epoch, and what it holds."""
    strategy = make_strategy(2, 3)
    model = compiled(strategy)
    x, y = np.ones((32, 3), "float32"), np.ones((32, 3), "float32")

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise InterruptedError

    directory = tmp_path_factory.mktemp("original")
    callback = tfzero.CheckpointCallback(directory, save_every_steps=1, keep=1, asynchronous=False)
    with pytest.raises(InterruptedError):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback, Crash()])
    (folder,) = directory.glob("step-*")
    tfzero.load_checkpoint(model, folder)
    return folder, model, values_of(model)


def flip_bits(chance, folder):
    path = chance.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 3, 20])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(chance, folder):
    path = chance.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def overwrite(chance, folder):
    """A block of zeros or of another file, as file systems leave after a crash."""
    path, other = chance.choices(sorted(folder.iterdir()), k=2)
    content = bytearray(path.read_bytes())
    begin = chance.randrange(len(content))
    block = chance.choice([bytes(512), other.read_bytes()[:512], chance.randbytes(64)])
    content[begin : begin + len(block)] = block[: len(content) - begin]
    path.write_bytes(content)


def lose(chance, folder):
    path = chance.choice(sorted(folder.iterdir()))
    path.unlink()
    chance.choice([lambda: None, path.mkdir, lambda: path.symlink_to(path.name), path.touch])()


ODD = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, float("nan"), float("inf"), "", "x",
    "../../etc", "state.index", "/etc/passwd", "\0", "\ud800", [], [[]], {}, {"": {}}, [1, 2], [-1, "x"], [2**62] * 3,
    "x" * 100_000,
]  # fmt: skip


def places(node, path=()):
    """The paths of all values within nested lists and dicts; of long lists of the first and last only."""
    yield path
    if isinstance(node, dict):
        for key in node:
            yield from places(node[key], (*path, key))
    elif isinstance(node, list):
        for index in range(len(node)) if len(node) < 20 else (0, len(node) - 1):
            yield from places(node[index], (*path, index))


def forge(chance, folder):
    """Odd content under a right checksum: something is replaced, left out, doubled, or has another name."""
    content = json.loads((folder / "manifest.json").read_text())["manifest"]
    for _ in range(chance.choice([1, 1, 1, 4])):
        content = forge_once(chance, content)
        if not isinstance(content, dict):
            break
    whole = {"manifest": content, "checksum": commits._checksum_of(content)}
    (folder / "manifest.json").write_text(json.dumps(whole))


def forge_once(chance, content):
    content = copy.deepcopy(content)
    *way, last = chance.choice([path for path in places(content) if path] or [("",)])
    if chance.random() < 0.03 or last == "":
        return copy.deepcopy(chance.choice(ODD))
    owner = content
    for key in way:
        owner = owner[key]
    kind = chance.choice(["replace"] * 3 + ["leave out", "double", "rename"])
    if kind == "replace":
        owner[last] = copy.deepcopy(chance.choice(ODD))
    elif kind == "leave out":
        del owner[last]
    elif isinstance(owner, list):
        owner.append(copy.deepcopy(owner[last]))
    else:
        owner[chance.choice(["../state.index", "format", "x", str(last) * 2])] = copy.deepcopy(owner[last])
    return content


def nest(chance, folder):
    depth = chance.choice([100, 5000, 500_000])
    text = chance.choice(['{"manifest": ' + "[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, "1" * depth])
    (folder / "manifest.json").write_text(text)


KINDS = [flip_bits, flip_bits, truncate, overwrite, lose, forge, forge, forge, forge, nest]


@pytest.mark.parametrize("seed", CASES)
def test_a_changed_file_gives_the_values_or_an_error_with_a_name(original, tmp_path, seed):
    source, model, values = original
    chance = random.Random(seed)
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    kind = KINDS[seed % len(KINDS)]
    kind(chance, folder)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    began = time.monotonic()
    try:
        tfzero.load_checkpoint(model, folder)
    except NAMED as error:
        assert str(folder) in str(error), (kind.__name__, error)
    else:
        for mine, theirs in zip(values_of(model), values, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=kind.__name__)
    assert time.monotonic() - began < MOST_SECONDS, kind.__name__


@pytest.mark.parametrize("seed", [*range(8), *(sweep(seed) for seed in range(8, 100))])
def test_a_run_goes_on_from_the_one_before_or_says_why_not(original, tmp_path, seed):
    """`fit` and what it does with a position: a forged one is never a hang, nor an error without a name."""
    source, _, _ = original
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    chance = random.Random(seed)
    (forge if seed % 2 else flip_bits)(chance, folder)
    if seed % 4 == 1:  # at the right place, which a whole manifest seldom hits
        content = json.loads((source / "manifest.json").read_text())["manifest"]
        content["position"][chance.choice(sorted(content["position"]))] = copy.deepcopy(chance.choice(ODD))
        whole = {"manifest": content, "checksum": commits._checksum_of(content)}
        (folder / "manifest.json").write_text(json.dumps(whole))
    model = compiled(make_strategy(2, 3))
    x, y = np.ones((32, 3), "float32"), np.ones((32, 3), "float32")
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.fit(x, y, batch_size=8, verbose=0, callbacks=[tfzero.CheckpointCallback(tmp_path)])
    except NAMED as error:
        assert str(folder) in str(error), error
    assert time.monotonic() - began < 3 * MOST_SECONDS


GOOD = {
    "step": 7, "world_size": 2, "stage": 3, "optimizers": {"optimizer": "Adam"}, "bucket_bytes": {"optimizer": 1024},
    "files": {"state.index": [10, "a"], "checkpoint": [3, "b"], "state.data-00000-of-00001": [0, "c"]},
    "variables": [
        {"name": "model/kernel", "shape": [3, 0], "dtype": "float32", "replicas": None},
        {"name": "metrics/loss", "shape": [], "dtype": "float32", "replicas": 2},
    ],
    "position": {
        "epoch": 3, "batch": 1, "epoch_batches": 2, "first_epoch": 0, "finished": None,
        "randomness": {"seed": None, "python": [3, [0] * 624 + [624], None]}, "passes": [2],
    },
}  # fmt: skip
FAULTS = {
    ("step",): [None, -1, 1.0, True, "7", 2**60],
    ("world_size",): [0, -2, 2**30, "2", None],
    ("stage",): [4, -1, "3"],
    ("optimizers",): [None, [], {"optimizer": 1}],
    ("bucket_bytes",): [{"optimizer": 0}, {"optimizer": "1"}, []],
    ("files",): [{}, {"checkpoint": [1, "a"]}, [], None],
    ("files", "../state.index"): [[1, "a"]],
    ("files", "/etc/passwd"): [[1, "a"]],
    ("files", "state.data-00000-of-00001/../x"): [[1, "a"]],
    ("files", "state.index"): [[-1, "a"], [1], [1, 2], "ab", [2**60, "a"], [1.5, "a"]],
    ("variables",): [None, {}, [None], [[]], [{}]],
    ("variables", 0, "name"): ["", 1, None, "metrics/loss"],
    ("variables", 0, "shape"): [None, 3, [-1], [1.5], ["3"], [2**60], [1] * 300],
    ("variables", 0, "dtype"): [1, None],
    ("variables", 1, "replicas"): [0, -1, 3, 10**9, "2", True],
    ("position",): [[], 1, {}],
    ("position", "epoch"): [-1, 2**60, 8, None],
    ("position", "batch"): [-1, 8, "1", 1.0],
    ("position", "first_epoch"): [4, -1, "0"],
    ("position", "finished"): [-1, "x"],
    ("position", "passes"): [2, ["2"], [-1], [None], {}],
    ("position", "randomness"): [1, {}, {"seed": "x"}, {"seed": 1, "python": [3, [0] * 3, None]}],
    ("position", "randomness", "python"): [[2, [0] * 625, 0.0], [3, [0] * 624 + [625], 0.0], [3, [2**32] * 625, 0.0]],
}  # fmt: skip


def test_a_good_manifest_has_no_fault():
    assert manifests.find_fault(GOOD) == ""
    assert manifests.find_fault({**GOOD, "position": None, "stage": None}) == ""
    assert manifests.find_fault({key: value for key, value in GOOD.items() if key != "bucket_bytes"}) == ""


@pytest.mark.parametrize("path", list(FAULTS), ids=lambda path: "/".join(map(str, path)))
def test_every_odd_value_is_named(path):
    for odd in FAULTS[path]:
        content = copy.deepcopy(GOOD)
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = odd
        fault = manifests.find_fault(content)
        # A table is shown whole.
        assert fault and len(fault) < 400, (path, odd)
    if path[-1] in owner and path not in [("bucket_bytes",)] and isinstance(owner, dict) and len(path) != 2:
        del owner[path[-1]]
        assert manifests.find_fault(content), path


@pytest.mark.parametrize("content", [None, [], 1, "x", {}])
def test_what_is_no_table_is_no_manifest(content):
    assert manifests.find_fault(content)


def test_a_huge_manifest_is_not_read(original, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(original[0], tmp_path / original[0].name))
    monkeypatch.setattr(commits, "MOST_BYTES", 100)
    with pytest.raises(tfzero.DamagedCheckpointError, match="has more than 100 bytes"):
        commits.read_manifest(folder)
