"""What is public has a docstring that tells of its arguments, and every listing in docstrings and documents runs."""

import ast
import functools
import importlib.util
import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_house import LINE

import tfzero

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
COMMAND = re.compile(r"python -m (tfzero\.\w+)((?: (?!\S*\.py|-m )[^\s`#]+)*)")
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MOST_BYTES_OF_THE_README = 10_000
OF_TENSORFLOW = {"Restart your program to reset"}


def blocks(text):
    return BLOCK.findall(text)


def public_objects():
    yield from ((name, getattr(tfzero, name)) for name in tfzero.__all__)
    for name, method in vars(tfzero.ZeroStrategy).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            yield f"ZeroStrategy.{name}", method


OBJECTS = dict(public_objects())
LISTED = [page for page in PAGES if blocks((ROOT / page).read_text())]


def links(text):
    """The files and headings that a page leads to, without addresses of other sites."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    return [(target, anchor) for target, anchor in LINK.findall(prose) if "://" not in target]


def anchors(text):
    """The names under which headings are found."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def commands(text):
    """What is started by `python -m`, and with which options."""
    return [(module, re.findall(r"(?<= )--[\w-]+", rest)) for module, rest in COMMAND.findall(text)]


def parameters(thing):
    """The names of what a caller gives."""
    own = inspect.isfunction(thing) or "__init__" in vars(thing)
    return [name for name in inspect.signature(thing).parameters if name != "self"] if own else []


def make_model():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(512, activation="relu"), keras.layers.Dense(3)])


@functools.cache
def namespace():
    """What a listing may use: it need not make data, a strategy and a model that was trained a little."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(48, 8)).astype("float32"), random.normal(size=(48, 3)).astype("float32")
    strategy = tfzero.ZeroStrategy(2, devices=["CPU:0", "CPU:1"])
    with strategy.scope():
        model = make_model()
    model.compile("adam", "mse")
    model.train_on_batch(x, y)
    modules = {"keras": keras, "np": np, "tf": tf, "tfzero": tfzero}
    return {"strategy": strategy, "model": model, "make_model": make_model, "x": x, "y": y} | modules


def run(source, name, namespace):
    exec(compile(source, f"<{name}>", "exec"), namespace)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_name_tells_of_its_arguments(name):
    text = inspect.getdoc(OBJECTS[name])
    undocumented = [each for each in parameters(OBJECTS[name]) if not re.search(rf"^ +{each}: ", text, re.MULTILINE)]
    assert not undocumented
    assert blocks(text), "there is no example"


@pytest.mark.parametrize("name", OBJECTS)
def test_the_examples_of_a_public_name_run(name):
    for source in blocks(inspect.getdoc(OBJECTS[name])):
        run(source, name, {"__name__": "__main__", **namespace()})


@functools.cache
def eight_lines():
    """The names that the README's first listing leaves, with which those of all pages go on."""
    namespace = {"__name__": "__main__"}
    run(blocks((ROOT / "README.md").read_text())[0], "README.md, listing 0", namespace)
    return namespace


@pytest.mark.parametrize("page", LISTED)
def test_the_listings_of_a_page_run_as_one_program(page):
    listings = blocks((ROOT / page).read_text())
    namespace = dict(eight_lines())
    if listings[0] == blocks((ROOT / "README.md").read_text())[0]:
        listings = listings[1:]
    for number, source in enumerate(listings):
        run(source, f"{page}, listing {number}", namespace)
    if page == "docs/clusters.md":
        assert len(namespace["losses"]) == 2  # of workers


def test_pages_have_listings():
    assert {"README.md", "CONTRIBUTING.md", "docs/clusters.md"} < set(LISTED) and len(LISTED) >= 8


def test_the_readme_is_short_and_says_what_is_unproven():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= MOST_BYTES_OF_THE_README
    assert "GPUs are unproven" in text
    assert "GPUs are unproven" in (ROOT / "docs/gpus.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in links((ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_have_their_options(page):
    for module, options in commands((ROOT / page).read_text()):
        found = importlib.util.find_spec(module)
        assert found, module
        folders = {"tfzero.benchmark": "benchmarks/*.py", "tfzero.launch": "tfzero/workers/options.py"}
        sources = ROOT.glob(folders[module]) if module in folders else []  # where its options are
        known = "".join(path.read_text() for path in [Path(found.origin), *sources])
        assert not [each for each in options if f'"{each}"' not in known], module


def test_the_reference_names_all_that_is_public():
    shown = re.findall(r"^::: tfzero\.(.*)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == tfzero.__all__


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_start_leads_to_every_page(page):
    targets = {(ROOT / page).parent / target for target, _ in links((ROOT / page).read_text())}
    others = {ROOT / each for each in PAGES if each.startswith("docs/")} - {ROOT / "docs/index.md"}
    assert not others - targets


def test_listings_are_found_and_fail_by_name():
    assert blocks("a\n```python\nb\nc\n```\nd\n```bash\ne\n```\n```python\nf\n```") == ["b\nc\n", "f\n"]
    with pytest.raises(NameError, match="absent"):
        run("absent", "test", {})
    assert links("[a](b.md#c) `[d](e)` [f](#g) [h](https://i)") == [("b.md", "c"), ("", "g")]
    assert anchors("# A b\n\n## `c`, d-e\n") == ["a-b", "c-d-e"]
    assert commands("`python -m tfzero.launch --workers 2 a.py --c`; python -m tfzero.memory --d") == [
        ("tfzero.launch", ["--workers"]), ("tfzero.memory", ["--d"]),
    ]  # fmt: skip
    assert parameters(tfzero.CheckpointCallback) == [
        "directory", "save_every_steps", "save_every_epochs", "keep", "asynchronous",
    ]  # fmt: skip


def test_the_tree_has_every_folder_in_the_order_of_imports():
    told = re.findall(r"^tfzero/(\w+)/ ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert told == [room for room, modules in LINE.items() if modules]


def strings_of_the_library():
    """All that the library may say; what stands for a value is "…"."""
    for path in (ROOT / "tfzero").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_are_explained_are_said():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    explained = [phrase for phrase in re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE) if phrase not in OF_TENSORFLOW]
    assert len(explained) >= 50
    patterns = [re.compile(re.escape(phrase).replace("…", ".*")) for phrase in explained]
    said = list(strings_of_the_library())
    assert not [pattern.pattern for pattern in patterns if not any(map(pattern.search, said))]
