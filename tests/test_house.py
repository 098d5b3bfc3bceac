"""The house rules: one straight line of modules, private symbols in one place, small files and functions."""

import ast
import importlib
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import private as private_names
import pytest

ROOT = Path(__file__).parents[1]
# Each package imports only packages before it, and each module of a package only modules before it: this is the design.
LINE = {
    "plan": ("scheme", "mesh", "shares", "placement", "formats", "merging", "serving", "settings", "file_shards"),
    "costs": (),
    "host": (
        "versions", "notes", "backend", "registry", "tensorflow_names", "keras_names", "data_names", "runtime",
        "datasets", "graphs", "batch_rows", "distributed", "keras_objects", "keras_optimizers", "saved_model", "edges",
        "patches", "devices", "__main__",
    ),
    "workers": (
        "progress", "differences", "addresses", "slurm", "tasks", "cluster", "resolvers", "host_names", "stopping",
        "messages", "handshake", "meeting", "rendezvous", "channel", "fleet", "gpus", "job_worker", "options", "runs",
        "cuda_devices", "agreement", "digests", "device_agreement", "links",
    ),
    "launch": (),
    "collectives": (
        "counts", "keys", "ways", "transport", "rings", "over_links", "group", "self_test", "network", "codec", "pulse",
        "nccl_failures", "nccl", "transport_choice", "joining", "packing",
    ),
    "rows": (
        "kinds", "moves", "sums", "dependence", "apart", "shares", "inputs", "input_account", "unions", "raw_elements",
        "sharded", "own_data", "dealing", "replica_run", "padding", "combining",
    ),
    "variables": ("gathering", "allocation", "classes", "remote_slots", "row_state", "creation"),
    "extended": (),
    "training": (
        "pacing", "losses", "exchange", "overwriting", "stock_optimizers", "outer", "merging", "clipping", "walk",
        "traffic", "late_gathers", "local_steps",
    ),
    "servers": (
        "frames", "clocks", "layer_state", "store", "models", "server", "lines", "client", "parts",
        "remote", "keeping", "served_steps", "serve", "__main__",
    ),
    "optimizer": (),
    "report": (),
    "strategy": (),
    "checkpoint": (
        "slices", "manifests", "commits", "directories", "teamwork", "state", "outer", "served", "pieces", "opening",
        "saving", "resuming", "callback",
    ),
    "keras": (
        "model_building", "best_weights", "writing_callbacks", "training", "data", "losses", "layers", "files",
        "saved_models",
    ),
    "views": (
        "liveness", "audit", "drift", "gradient_time", "picture", "tensorboard", "facts", "speeds", "trials",
        "examination",
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
    private = (*private_names.PACKAGES, "tf.__internal__", "tensorflow.__internal__")
    return {
        name for name in [*imported_names(tree), *attributes] if f"{name}.".startswith(tuple(f"{p}." for p in private))
    }


def is_stage(node):
    """Whether an expression is the number of a stage: a name or an attribute that is called so."""
    name = getattr(node, "id", None) or getattr(node, "attr", "")
    return name == "stage" or name.endswith("_stage")


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def looked_at(node):
    """What a node decides by, or computes with: operands of comparisons, conditions, indices, subjects of `match`."""
    match node:
        case ast.Compare(left=left, comparators=others):
            pairs = zip(node.ops, [left, *others], others, strict=False)
            return [each for op, *pair in pairs if not any(map(is_none, pair)) for each in pair]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) | ast.Assert(test=test):
            return [test]
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(operand=operand):
            return [operand]
        case ast.BinOp(left=left, right=right):
            return [left, right]
        case ast.comprehension(ifs=tests):
            return tests
        case ast.Subscript(slice=index):
            return [index]
        case ast.Match(subject=subject):
            return [subject]
        case ast.Call(func=ast.Name(id="bool" | "range"), args=given):
            return given
        case ast.Call(func=ast.Attribute(attr="get"), args=given):
            return given
    return []


def stage_comparisons(source):
    """The lines that decide by the number of a stage; whether there is one, `stage is None`, may be asked anywhere."""
    return sorted({each.lineno for node in ast.walk(ast.parse(source)) for each in looked_at(node) if is_stage(each)})


def things_called(name, source):
    """Whether a source calls a parameter, a field or a variable of its own so; `group.world_size` is another's."""
    nodes = list(ast.walk(ast.parse(source)))
    given = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return name in given | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def tree_of(module):
    return ast.parse(read(module))


def own_names(modules):
    return set().union(*(private_names.defined_names(tree_of(module)) for module in modules))


def classes_of(modules):
    """The classes that these modules define."""
    loaded = [importlib.import_module(f"tfzero.{module}") for module in modules]
    return [
        each for m in loaded for each in vars(m).values() if inspect.isclass(each) and each.__module__ == m.__name__
    ]


def long_functions(source):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(source)) if isinstance(n, functions)}
    return {name: lines for name, lines in lengths.items() if lines >= MOST_LINES_OF_A_FUNCTION}


def without_types(source):
    """The functions of which a parameter or the result has no annotation; methods need none of `self` and `cls`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            bare = [each.arg for each in named if each and not each.annotation and each.arg not in ("self", "cls")]
            if bare or node.returns is None:
                found.append(f"line {node.lineno}: {node.name}({', '.join(bare)})")
    return found


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


# What TensorFlow and Keras keep for themselves: one row for each name, used in one folder.

HOST = [module for module in MODULES if module.startswith("host.")]
OUTSIDE = [module for module in MODULES if module not in HOST]


def rows():
    from tfzero.host import __main__ as listing

    return listing.names()


def last(row):
    """The attribute that a row is about."""
    return row.path.replace(":", ".").rpartition(".")[2]


@pytest.fixture(scope="module")
def not_ours():
    """Private names that stand in a row: outside of tfzero's own classes they are nobody else's."""
    return {name for row in rows() if private_names.is_private(name := last(row))}


@pytest.fixture(scope="module")
def ours():
    return own_names(OUTSIDE)


@pytest.mark.parametrize("module", OUTSIDE)
def test_private_attributes_of_others_are_used_in_a_folder_of_their_own(module, ours, not_ours):
    tree = tree_of(module)
    assert private_names.foreign_names(tree, ours) == set()
    assert private_names.asked_of_others(tree) & not_ours == set()


@pytest.mark.parametrize("module", OUTSIDE)
def test_nothing_is_reached_by_way_of_a_private_module(module):
    modules = set().union(*(private_names.imported_modules(tree_of(each)) for each in HOST))
    assert private_names.beyond(tree_of(module), modules) == set()


def test_private_methods_are_overridden_in_a_folder_of_their_own():
    found = {each.__qualname__: private_names.overrides(each) for each in classes_of(OUTSIDE)}
    assert {name: overridden for name, overridden in found.items() if overridden} == {}


def test_every_private_name_has_a_row_and_every_row_a_use():
    paths = {row.path for row in rows()} | {row.path for row in patched()}
    reached = set().union(*(private_names.reached(tree_of(module)) for module in HOST))
    # A module stands for what is reached by way of it.
    without = {path for path in reached if not any(f"{each}.".startswith(f"{path}.") for each in paths)}
    assert without == set()
    overridden = set().union(*map(private_names.overrides, classes_of(HOST)))
    names = set().union(*(private_names.foreign_names(tree_of(module), own_names([module])) for module in HOST))
    known = {last(row) for row in rows()}
    assert (names | overridden) - known - {last(row) for row in patched()} == set()
    # Of a private class public attributes are rows as well, wherever they are used.
    attributes = {n.attr for m in MODULES for n in ast.walk(tree_of(m)) if isinstance(n, ast.Attribute)}
    used = names | overridden | {path.rpartition(".")[2] for path in reached} | attributes
    defined = {node.name for m in MODULES for node in ast.walk(tree_of(m)) if isinstance(node, ast.FunctionDef)}
    assert known - used - defined == set()


def patched():
    from tfzero.host import __main__ as listing

    found, problems = listing.replaced()
    assert problems == []
    return found


def test_the_rows_are_as_installed_and_are_told_apart():
    found = [*rows(), *patched()]
    assert [row.problem for row in found if row.problem] == []
    assert len({row.path for row in found}) == len(found)
    assert all(row.why and row.since for row in found)


def test_each_row_names_a_test_that_is_there():
    missing = []
    for row in [*rows(), *patched()]:
        file, _, name = row.test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            missing.append(row.test)
    assert missing == []


def test_the_tests_of_cells_are_there():
    missing = []
    for file, names in runpy.run_path(str(ROOT / "tests" / "conftest.py"))["CELLS"].items():
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [f"{file}::{name}" for name in names or () if name.partition("[")[0] not in there]
    assert missing == []


@pytest.mark.parametrize("module", MODULES)
def test_one_module_knows_what_the_number_of_a_stage_means(module):
    if module not in ("plan.scheme", "benchmark", "measuring", "peers"):  # the benchmark is no part of the library
        assert stage_comparisons(read(module)) == []


def test_shards_and_replicas_are_told_apart():
    """A world size is that of a group of collectives, and what users call the number of replicas."""
    so_called = {module for module in MODULES if things_called("world_size", read(module))}
    so_called -= {"benchmark", "measuring", "peers"}
    assert so_called == {
        "collectives.group", "collectives.over_links", "collectives.packing", "collectives.transport", "costs",
        "memory",
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short(module):
    lines = len(read(module).splitlines())
    assert lines < MOST_LINES_OF_A_FILE


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    assert long_functions(read(module)) == {}


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_and_result_has_a_type(module):
    assert without_types(read(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_the_library_raises_and_never_asserts(module):
    assert [node.lineno for node in ast.walk(ast.parse(read(module))) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize(
    "name",
    [
        "tfzero", *(f"tfzero.plan.{module}" for module in LINE["plan"]), "tfzero.workers.cluster",
        "tfzero.workers.gpus", "tfzero.launch",
    ],
)  # fmt: skip
def test_importing_does_not_load_tensorflow(name):
    code = f"import sys, {name}; sys.exit(any(heavy in sys.modules for heavy in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_rules_notice_what_breaks_them():
    source = "def f():\n    from tfzero import strategy\n    import tfzero.plan.placement as p"
    assert imported_modules(source) == {"strategy", "plan.placement"}
    assert private_symbols("from keras.src import backend") == {"keras.src.backend"}
    assert private_symbols("import tensorflow as tf\nx = tf.python.eager") == {"tf.python", "tf.python.eager"}
    assert private_symbols("import keras\nkeras.srcs") == set()
    for names in ("def f(world_size): pass", "class A:\n    world_size: int", "for world_size in x: pass"):
        assert things_called("world_size", names), names
    assert not things_called("world_size", "f(group.world_size, world_size=x['world_size'])")
    for decides in (
        "stage == 3", "settings.stage < 2", "0 < self.stage", "stage in (1, 2)", "1 if stage else 0", "not stage",
        "stage and x", "x[settings.stage]", "{0: x}.get(stage, y)", "[x for y in z if stage]", "2 - stage",
        "bool(stage)", "while my_stage: pass", "match stage:\n    case 0: pass", "0 < x == stage",
    ):  # fmt: skip
        assert stage_comparisons(decides) == [1], decides
    for tells in ("stage is None", "f'{stage}'", "Setup(stage)", "scheme_of(a.stage).passes", "[x for stage in y]"):
        assert stage_comparisons(tells) == [], tells
    assert private_symbols("tf.__internal__.EagerTensor") == {"tf.__internal__", "tf.__internal__.EagerTensor"}
    taken = "self._own = strategy._taken\ngetattr(tensor, '_asked', 0)\nvars(x)['_looked_up']\nx._tfzero_note"
    assert private_names.foreign_names(ast.parse(taken), {"_own"}) == {"_taken", "_asked", "_looked_up"}
    assert private_names.asked_of_others(ast.parse("self._own = strategy._own")) == {"_own"}
    assert private_names.asked_of_others(ast.parse("super()._own()")) == {"_own"}
    reached = ast.parse("from tfzero.host import runtime\n@patch(runtime.trainer.Trainer, 'fit')\ndef f(): ...")
    assert private_names.beyond(reached, {"trainer"}) == set()
    assert private_names.beyond(ast.parse("runtime.trainer.Trainer"), {"trainer"}) == {"runtime.trainer.Trainer"}
    assert private_names.reached(ast.parse("from keras.src import ops\nops.add(1)")) == {
        "keras.src.ops", "keras.src.ops.add",
    }  # fmt: skip
    stock = importlib.import_module("keras").optimizers.SGD
    made = type("Own", (stock,), {"_apply_weight_decay": print, "_mine": print})
    assert private_names.overrides(made) == {"_apply_weight_decay"}
    assert long_functions("def f():\n" + "    pass\n" * 59) == {"f": 60}
    assert long_functions("def f():\n" + "    pass\n" * 58) == {}
    for bare in ("a", "a: int, b=1", "*a", "**a", "*, a", "a, /"):
        assert without_types(f"class A:\n    def f(self, {bare}) -> None: ..."), bare
    assert without_types("async def f(): ...") == ["line 1: f()"]
    assert without_types("def f() -> None:\n    def g(a): ...") == ["line 2: g(a)"]
    assert without_types("class A:\n    def f(self, a: int, *b: int, c: int = 1, **d: int) -> None: ...") == []
