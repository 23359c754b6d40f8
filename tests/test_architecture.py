"""The source itself: imports go one way, and `import clstream` stays light."""

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"clstream": ROOT / "clstream", "clstream.strategies": ROOT / "strategies", "clstream.streams": ROOT / "streams"}

LEAVES = (
    "seeds",
    "params",
    "state",
    "class_state",
    "models",
    "generators",
    "memory",
    "metrics",
    "losses",
    "figures",
    "journal",
    "samples",
    "mixing",
    "augmenting",
    "optional",
    "errors",
    "source_code",
    "torch_files",
)
LEVELS = (  # each imports from the levels before it, and from its own without going in circles
    (
        *LEAVES,
        "stream",
        "origin",
        "forms",
        "snapshot",
        "restoration",
        "comparing",
        "recording",
        "fisher",
        "chain",
        "showing",
        "pruning",
        "stacking",
        "answering",
    ),
    ("events",),
    ("bus",),
    ("strategy", "detectors"),
    ("evaluation", "regulariser", "rehearsal_free", "wrapper", "avalanche_names"),
    ("fits", "running", "single", "engine"),
    ("__init__",),
    (
        "store",
        "tracking",
        "checkpoint",
        "folders",
        "retention",
        "checks",
        "progress",
        "outbox",
        "eventlog",
        "pretraining",
        "detection",
        "prequential",
    ),
    ("yaml_files", "lookup"),
    ("settings", "option_help"),
    ("config",),
    ("anchors", "tries"),
    ("playing",),
    ("proof",),
    ("cli",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
BY_NAME = {"cli", "lookup", "anchors"}  # these find strategies and streams at run time
LAZY = {"models": {"timm"}, "figures": {"matplotlib"}, "mixing": {"torchvision"}}  # beside torch and numpy, inside functions


@cache
def modules():
    """Return the file of each module by its full name; a package is the name of its folder."""
    return {
        package if file.stem == "__init__" else f"{package}.{file.stem}": file
        for package, folder in FOLDERS.items()
        for file in sorted(folder.glob("*.py"))
    }


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node, top_only):
    """Yield the nodes of a tree without what is only there for type checkers, and without functions' bodies if `top_only`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield from (other, *statements(other, top_only))
        elif not (top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield child
            yield from statements(child, top_only)


@cache
def imports(name, top_only=False):
    """Return the full names of the modules that a module imports; `from a import b` is a.b where that is a module of ours."""
    file, found = modules()[name], set()
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in statements(ast.parse(file.read_text(encoding="utf-8")), top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            found |= {inner if (inner := f"{source}.{alias.name}") in modules() else source for alias in node.names}
    return found


def framework():
    return sorted(name for name in modules() if not name.startswith(("clstream.strategies", "clstream.streams")))


def of(folder):
    return sorted(name for name in modules() if name.startswith(f"{folder}."))


def level(name):
    return LEVEL["__init__" if name == "clstream" else name.removeprefix("clstream.")]


def ours(names):
    return {name for name in names if name == "clstream" or name.startswith("clstream.")}


def test_the_source_is_found():
    assert {"clstream", "clstream.engine", "clstream.strategies.replay", "clstream.streams.splits"} <= modules().keys()
    assert "clstream.seeds" in imports("clstream.stream")
    assert "clstream.strategy" not in imports("clstream.events")  # for type checkers only
    assert "torchvision" in imports("clstream.streams.data")
    assert "torchvision" not in imports("clstream.streams.data", top_only=True)


@pytest.mark.parametrize("name", framework())
def test_every_module_of_the_framework_has_a_level(name):
    assert name == "clstream" or name.removeprefix("clstream.") in LEVEL, f"give {name} a place in LEVELS"


@pytest.mark.parametrize("name", framework())
def test_the_framework_imports_one_way(name):
    inside = ours(imports(name))
    assert not {other for other in inside if other.startswith(("clstream.strategies", "clstream.streams"))}
    assert not {other for other in inside if level(other) > level(name)}


def test_nothing_in_the_framework_imports_in_a_circle():
    graph = {name: {other for other in ours(imports(name)) if other != name} for name in framework()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("name", [f"clstream.{leaf}" for leaf in LEAVES if f"clstream.{leaf}" in modules()])
def test_leaves_need_only_torch_numpy_and_each_other(name):
    leaf = name.removeprefix("clstream.")
    outside = {other.partition(".")[0] for other in imports(name) - ours(imports(name))}
    assert outside - sys.stdlib_module_names <= {"torch", "numpy"} | LAZY.get(leaf, set())
    at_top = {other.partition(".")[0] for other in imports(name, top_only=True)}
    assert not at_top & LAZY.get(leaf, set())


@pytest.mark.parametrize("name", ["stream", "recording", "events", "bus", "strategy", "evaluation", "engine"])
def test_a_run_needs_only_torch_and_numpy(name):
    found = imports(f"clstream.{name}")
    outside = {other.partition(".")[0] for other in found - ours(found)}
    assert outside - sys.stdlib_module_names <= {"torch", "numpy"} | ({"pandas"} if name == "engine" else set())  # Result.to_frame
    assert "pandas" not in imports(f"clstream.{name}", top_only=True)


@pytest.mark.parametrize("name", sorted(set(framework()) - {f"clstream.{name}" for name in BY_NAME}))
def test_only_the_command_line_names_strategies_and_streams(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if re.fullmatch(r"clstream\.(strategies|streams)(\.\w+)*", text)]


@pytest.mark.parametrize("name", of("clstream.strategies"))
def test_a_strategy_imports_no_stream_no_other_strategy_and_nothing_above_itself(name):
    inside = ours(imports(name))
    assert not {other for other in inside if other.startswith(("clstream.strategies", "clstream.streams"))}
    assert not {other for other in inside if level(other) > LEVEL["evaluation"]}


@pytest.mark.parametrize("name", of("clstream.streams"))
def test_a_stream_imports_no_strategy_and_nothing_above_itself(name):
    inside = {other for other in ours(imports(name)) if not other.startswith("clstream.streams")}
    assert not {other for other in inside if other.startswith("clstream.strategies")}
    assert not {other for other in inside if level(other) > LEVEL["stream"]}
    assert "clstream.recording" not in inside or name == "clstream.streams.recorded"  # it reads them; no other knows of files


@pytest.mark.parametrize("folder", ["clstream.strategies", "clstream.streams"])
def test_a_collection_gathers_its_own_modules_only(folder):
    assert imports(folder) <= {*of(folder), "__future__"}


def test_only_the_store_imports_mlflow():
    users = {name for name in modules() if any(other.partition(".")[0] == "mlflow" for other in imports(name))}
    assert users <= {"clstream.store"}


def test_only_what_imports_it_on_demand_names_avalanche():
    """Not by an import statement, anywhere: `clstream.optional` imports it, quietly, when one of its bridges asks."""
    assert not [name for name in modules() if any(other.partition(".")[0] == "avalanche" for other in imports(name))]
    users = {name for name in modules() if "clstream.optional" in imports(name)}
    assert users <= {"clstream.streams.avalanche", "clstream.strategies.avalanche", "clstream.cli"}


def test_the_collections_load_no_avalanche(tmp_path):
    script = (
        "import sys, clstream, clstream.strategies.avalanche as a, clstream.streams.avalanche as b;"
        "[hasattr(module, name) for module in (a, b) for name in ('pytest_plugins', '__all__')];"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"clstream.streams.avalanche", "clstream.strategies.finetune"} <= loaded
    assert not {name for name in loaded if name.partition(".")[0] in ("avalanche", "wandb", "torchmetrics", "GPUtil")}


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((3, 11), "the bridge needs Avalanche, which is not installed: pip install 'clstream[avalanche]'"),
        ((3, 13), "avalanche-lib 0.6.0 supports Python up to 3.12, and this is 3.13: use its bridge from an older Python"),
    ],
)
def test_without_avalanche_one_sentence_says_what_to_do(tmp_path, version, sentence):
    script = (
        "import sys; from collections import namedtuple; import clstream.cli, clstream.playing;"
        "sys.modules['avalanche'] = None;"  # it can't be imported then
        f"sys.version_info = namedtuple('V', 'major minor')(*{version});"
        "print([clstream.cli.main(['run', '--track', 'false', *given]) for given in"
        " (['--stream', 'avalanche:SplitMNIST'], ['--strategy', 'avalanche:EWC'])], clstream.cli.main(['parity']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[2,", "2]", "1"]
    assert done.stderr.splitlines() == [f"clstream: error: {sentence}"] * 3


def test_import_clstream_loads_nothing_heavy_and_no_strategy_or_stream(tmp_path):
    script = "import sys, clstream; clstream.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "clstream.engine" in loaded
    assert not loaded & {"mlflow", "avalanche", "sklearn", "matplotlib", "torchvision", "rich", "jsonargparse", "timm", "pandas"}
    assert not loaded & {"clstream.strategies", "clstream.streams", "clstream.tracking", "clstream.store", "clstream.cli"}


def test_every_command_that_tests_start_has_as_many_threads_as_they():
    """A checkpoint of a process with other threads is said to be of another run; and how many there are differs by machine."""
    commands = [
        (file.name, node.lineno, [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)])
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.List, ast.Tuple))
    ]
    started = [(name, line, "--threads" in words) for name, line, words in commands if {"-m", "clstream.cli"} <= {*words}]
    assert {name for name, *_ in started} >= {"test_cli.py", "test_resume.py"}
    assert not [(name, line) for name, line, told in started if not told], "give them --threads 1"
