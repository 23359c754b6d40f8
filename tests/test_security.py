"""SECURITY.md is kept: the tests that it names are there, and the source reads no file in a form that could run code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(file for folder in ("clstream", "strategies", "streams", "experiments") for file in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load",
    "cloudpickle.load", "cloudpickle.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "jsonpickle.decode", "eval", "exec", "__import__", "os.system", "os.popen", "torch.jit.load", "torch.package.PackageImporter",
    "runpy.run_path",
    "torch.hub.load", "numpy.load", "pandas.read_pickle", "torch.serialization.add_safe_globals", "mlflow.pyfunc.load_model",
}  # fmt: skip
"""What could run code from a file; numpy's files are read by `numpy.lib.format`, or not at all."""


def calls(text: str) -> list[tuple[str, ast.Call]]:
    """Return the calls in a text, by the full name of what is called as far as its imports tell."""
    tree = ast.parse(text)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            found.append((".".join(filter(None, (names.get(first, first), rest))), node))
    return found


def unsafe(text: str) -> list[str]:
    """Return the calls in a text that are not of a safe form."""
    wrong = []
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    safe = {node.name for node in classes if [*map(ast.unparse, node.bases)] == ["yaml.SafeLoader"]}
    for name, call in calls(text):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        bad = name in FORBIDDEN and not (name == "yaml.load" and options.get("Loader") in safe)
        bad |= name == "torch.load" and options.get("weights_only") != "True"
        bad |= name.startswith(("numpy.load", "numpy.lib.format.")) and options.get("allow_pickle", "False") != "False"
        bad |= (
            name in ("numpy.load", "numpy.lib.format.read_array", "numpy.lib.format.write_array") and "allow_pickle" not in options
        )
        bad |= name.startswith("subprocess.") and options.get("shell", "False") != "False"
        if bad:
            wrong.append(f"line {call.lineno}: {ast.unparse(call)[:80]}")
    return wrong


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_could_run_code_from_a_file(file):
    assert unsafe(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load as l\nl('x')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.lib.format.read_array(file)",
        "import pickle\npickle.loads(data)",
        "from pickle import Unpickler\nUnpickler(file)",
        "eval('1')",
        "import subprocess\nsubprocess.run('x', shell=True)",
    ],
)
def test_such_calls_would_be_seen(text):
    assert len(unsafe(text)) == 1


def test_the_forms_that_are_safe_are_taken():
    assert unsafe("import torch, yaml\ntorch.load('x', weights_only=True)\nyaml.safe_load('x')\nmodel.eval()") == []


def test_every_format_names_tests_that_are_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| file", "|---"))]
    formats = (
        "checkpoint",
        "weights",
        "recording",
        "config",
        "run folder",
        "source code",
        "journal",
        "event log",
        "anchor",
        "MLflow",
        "folder or zip archive of images",
        "cache of images",
        "IDX",
    )
    assert [row.removeprefix("| ").startswith(name) for row, name in zip(rows, formats, strict=True)] == [True] * len(formats)
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)`", row.split("|")[-2])
        assert named, row
        assert all((ROOT / name).is_file() for name in named), row
