"""The house rules: one straight line of modules, private symbols in one place, small files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package imports only packages before it, and each module of a package only modules before it: this is the design.
LINE = {
    "plan": ("placement", "formats"),
    "costs": (),
    "host": (
        "backend", "runtime", "datasets", "graphs", "batch_rows", "distributed", "keras_optimizers", "saved_model",
        "edges", "patches",
    ),
    "workers": (
        "progress", "differences", "cluster", "stopping", "messages", "handshake", "meeting", "channel", "fleet",
        "gpus", "cuda_devices", "agreement", "digests", "device_agreement", "settings", "links",
    ),
    "launch": (),
    "collectives": (
        "counts", "keys", "ways", "group", "self_test", "network", "codec", "pulse", "nccl_failures", "joining",
        "packing",
    ),
    "rows": ("kinds", "moves", "sums", "dependence", "inputs", "padding", "combining"),
    "variables": ("gathering", "allocation", "classes", "row_state", "creation"),
    "extended": (),
    "training": ("pacing", "losses", "exchange", "overwriting", "walk", "late_gathers", "stock_optimizers"),
    "optimizer": (),
    "report": (),
    "strategy": (),
    "checkpoint": (
        "slices", "manifests", "commits", "directories", "teamwork", "state", "pieces", "saving", "callbacks",
    ),
    "keras": (
        "model_building", "best_weights", "writing_callbacks", "training", "data", "losses", "layers", "files",
        "saved_models",
    ),
    "views": (
        "liveness", "audit", "gradient_time", "picture", "tensorboard", "facts", "speeds", "trials", "examination",
    ),
    "memory": (),
    "doctor": (),
    "benchmark": (),
}  # fmt: skip
ORDER = [f"{room}.{module}" if module else room for room, modules in LINE.items() for module in modules or [""]]
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "tfzero").with_suffix("").parts) for path in (ROOT / "tfzero").rglob("*.py")
)
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def read(module):
    return (ROOT / "tfzero" / f"{module.replace('.', '/')}.py").read_text()


def imported_names(tree):
    """All that is imported anywhere in a file: "a.b" for `import a.b` and for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(source):
    """The modules of tfzero that a source imports, such as "plan.placement"."""
    found = set()
    for name in imported_names(ast.parse(source)):
        package, *path = name.split(".")
        if package == "tfzero" and path:
            names = [".".join(path[:depth]) for depth in (2, 1)]
            found.add(next((each for each in names if each in ORDER), names[-1]))
    return found


def private_symbols(source):
    """What a source imports, or reaches by attributes, of the private parts of TensorFlow and Keras."""
    tree = ast.parse(source)
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    private = ("tensorflow.python", "tf.python", "keras.src")
    return {
        name for name in [*imported_names(tree), *attributes] if f"{name}.".startswith(tuple(f"{p}." for p in private))
    }


def long_functions(source):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(source)) if isinstance(n, functions)}
    return {name: lines for name, lines in lengths.items() if lines >= MOST_LINES_OF_A_FUNCTION}


def test_the_line_names_every_module():
    assert sorted(ORDER) == [module for module in MODULES if module.rpartition(".")[2] != "__init__"]


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_before_it(module):
    assert imported_modules(read(module)) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", [module for module in MODULES if module.endswith("__init__")])
def test_a_package_itself_imports_nothing_of_its_own(module):
    assert imported_modules(read(module)) == set()
    assert ast.get_docstring(ast.parse(read(module)))


@pytest.mark.parametrize("module", MODULES)
def test_private_symbols_stand_in_a_folder_of_their_own(module):
    if not module.startswith("host."):
        assert private_symbols(read(module)) == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short(module):
    lines = len(read(module).splitlines())
    assert lines < MOST_LINES_OF_A_FILE


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    assert long_functions(read(module)) == {}


@pytest.mark.parametrize("module", MODULES)
def test_the_library_raises_and_never_asserts(module):
    assert [node.lineno for node in ast.walk(ast.parse(read(module))) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize(
    "name", ["tfzero", "tfzero.plan.placement", "tfzero.workers.cluster", "tfzero.workers.gpus", "tfzero.launch"]
)
def test_importing_does_not_load_tensorflow(name):
    code = f"import sys, {name}; sys.exit(any(heavy in sys.modules for heavy in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_rules_notice_what_breaks_them():
    source = "def f():\n    from tfzero import strategy\n    import tfzero.plan.placement as p"
    assert imported_modules(source) == {"strategy", "plan.placement"}
    assert private_symbols("from keras.src import backend") == {"keras.src.backend"}
    assert private_symbols("import tensorflow as tf\nx = tf.python.eager") == {"tf.python", "tf.python.eager"}
    assert private_symbols("import keras\nkeras.srcs") == set()
    assert long_functions("def f():\n" + "    pass\n" * 59) == {"f": 60}
    assert long_functions("def f():\n" + "    pass\n" * 58) == {}
