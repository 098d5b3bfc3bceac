"""The house rules: one straight line of modules, private symbols in one place, small files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module imports only modules before it: the list is the design.
LINE = (
    "plan", "slices", "wire", "costs", "manifests", "commits", "directories", "progress", "differences", "cluster",
    "stopping", "messages", "handshake", "meeting", "channel", "fleet", "launch", "backend", "_compat",
    "_compat_data", "_compat_graphs", "_compat_batches", "_compat_cluster", "_compat_optimizers",
    "_compat_saved_model", "edges", "agreement", "digests", "teamwork", "patches", "settings", "links", "lanes",
    "collectives", "network", "compression", "pulse", "joining", "packing", "pacing", "gathering", "components",
    "dependence", "inputs", "padding", "combining", "variables", "row_state", "creation", "extended", "losses",
    "exchange",
    "overwriting", "step", "late_gathers", "inner", "optimizer", "report", "liveness", "memory", "strategy", "state",
    "auditing", "checkpoint", "checkpointing", "callbacks", "gradient_time", "picture", "tensorboard",
    "model_building", "best_weights", "writing_callbacks", "keras_hooks", "keras_data", "keras_losses",
    "keras_layers", "keras_files", "saved_models", "measuring", "peers", "benchmark",
)  # fmt: skip
MODULES = sorted(path.stem for path in (ROOT / "tfzero").glob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def read(module):
    return (ROOT / "tfzero" / f"{module}.py").read_text()


def imported_names(tree):
    """All that is imported anywhere in a file: "a.b" for `import a.b` and for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(source):
    """The modules of tfzero that a source imports."""
    names = [name.split(".") for name in imported_names(ast.parse(source))]
    return {name[1] for name in names if name[0] == "tfzero" and len(name) > 1}


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
    assert sorted(LINE) == [module for module in MODULES if module != "__init__"]


@pytest.mark.parametrize("module", LINE)
def test_a_module_imports_only_modules_before_it(module):
    assert imported_modules(read(module)) <= set(LINE[: LINE.index(module)])


def test_the_package_itself_imports_nothing_of_its_own():
    assert imported_modules(read("__init__")) == set()


@pytest.mark.parametrize("module", MODULES)
def test_private_symbols_stand_in_modules_of_their_own(module):
    if module.startswith("_compat"):  # siblings, each of one topic
        assert f"{module}." in (ROOT / "tests" / "test_compat.py").read_text()
    else:
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


@pytest.mark.parametrize("name", ["tfzero", "tfzero.plan", "tfzero.cluster", "tfzero.launch"])
def test_importing_does_not_load_tensorflow(name):
    code = f"import sys, {name}; sys.exit(any(heavy in sys.modules for heavy in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_rules_notice_what_breaks_them():
    assert imported_modules("def f():\n    from tfzero import step\n    import tfzero.plan as p") == {"step", "plan"}
    assert private_symbols("from keras.src import backend") == {"keras.src.backend"}
    assert private_symbols("import tensorflow as tf\nx = tf.python.eager") == {"tf.python", "tf.python.eager"}
    assert private_symbols("import keras\nkeras.srcs") == set()
    assert long_functions("def f():\n" + "    pass\n" * 59) == {"f": 60}
    assert long_functions("def f():\n" + "    pass\n" * 58) == {}
