"""Which modules of the user's own belong to a run, and what of them counts: what is loaded, not what lies on the disk."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from clstream.strategies import EWC, Replay
from clstream.streams import from_tensors
from own_code import MINE, Stop, edit, forget, go_on, load, own_folder, sources, start, strategy, stream

from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.engine import ChangedCodeError
from clstream.models import Mlp
from clstream.serialization.same_code import changes
from clstream.serialization.source_code import definitions, user_sources


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_folder(tmp_path, monkeypatch)


# What belongs to a run -----------------------------------------------------------------------------------------------------


def package(place: Path) -> None:
    """Write a package: a strategy that imports near and far, at the top and within functions, names and modules."""
    (place / "lab" / "parts").mkdir(parents=True)
    (place / "space" / "inner").mkdir(parents=True)  # a namespace package: it has no __init__.py
    (place / "away" / "loose" / "looser").mkdir(parents=True)  # namespaces in a package that nothing has loaded
    files = {
        "lab/__init__.py": "SEED = 1\n",
        "lab/method.py": "from . import losses\nfrom .parts.heads import head as make\nimport space.inner.deep as deep\n"
        "from clstream.strategies import Finetune\nimport json, numpy\n\n\n"
        "class Mine(Finetune):\n    def loss(self, samples):\n        from . import lazy\n        return super().loss(samples)\n",
        "lab/losses.py": "from lab import constants as c\n",
        "lab/constants.py": "A = 1\n",
        "lab/parts/__init__.py": "",
        "lab/parts/heads.py": "def head(): ...\n",
        "lab/lazy.py": "import lab.later\nimport away.loose.near\nfrom away.loose.looser.far import FAR\n",
        "lab/later.py": "LATER = 1\n",
        "lab/unused.py": "X = 1\n",
        "space/inner/deep.py": "DEEP = 1\n",
        "away/__init__.py": "",
        "away/loose/near.py": "NEAR = 1\n",
        "away/loose/looser/far.py": "FAR = 1\n",
    }
    for name, text in files.items():
        (place / name).write_text(text)


def test_imports_are_followed(place):
    package(place)
    found = sources(strategy(load("lab.method")))
    assert set(found) == {
        "lab", "lab.method", "lab.losses", "lab.constants", "lab.parts", "lab.parts.heads", "lab.lazy", "lab.later",
        "space.inner.deep", "away", "away.loose.near", "away.loose.looser.far",
    }  # fmt: skip
    assert "lab.lazy" not in sys.modules  # found without being imported
    assert found["lab.constants"] == "A = 1\n"


@pytest.mark.parametrize(
    "file",
    [
        "lab/__init__.py",
        "lab/constants.py",
        "lab/parts/heads.py",
        "lab/later.py",
        "space/inner/deep.py",
        "away/loose/looser/far.py",
    ],
)
def test_a_change_in_what_is_imported_is_refused(place, file):
    package(place)
    start(built=strategy(load("lab.method")))
    assert (place / "run" / "code" / file).read_text() == (place / file).read_text()
    (place / file).write_text((place / file).read_text() + "MORE = 1\n")
    forget(*[name for name in sys.modules if name.startswith("space")])
    with pytest.raises(ChangedCodeError, match=rf"since its checkpoint was written: {file}\."):
        go_on(built=strategy(load("lab.method")))
    (place / "lab" / "unused.py").write_text("X = 2\n")
    assert go_on(built=strategy(load("lab.method")), accept_changed_code=True).accuracy.shape == (2, 2)


def test_what_is_installed_or_ours_is_left_out(place):
    (place / "other.py").write_text("import json, torch, numpy, clstream, pytest, clstream.tracking\nfrom os.path import join\n")
    assert set(sources(load("other"), Replay(Mlp(20, 4)), EWC(Mlp(20, 4)), stream(), torch.optim.SGD)) == {"other"}


PIECES = """
import functools
from dataclasses import dataclass
import torch
from torch import nn
from torch.optim import SGD


def brighter(x):
    return x + 1


@dataclass(frozen=True)
class Shift:
    by: float = 1.0

    def __call__(self, x):
        return x + self.by


class Steps(SGD): ...


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x):
        return self.layer(x.float())


def factory(params):
    return SGD(params, lr=0.1)


def twice(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner


def as_it_is(function):
    return function
"""


def test_every_slot_of_a_run_is_looked_into(place):
    (place / "pieces.py").write_text(PIECES)
    pieces = load("pieces")
    x, y = torch.randn(40, 20), torch.arange(40) % 4
    model = Mlp(20, 4, hidden=(8,))

    def built_from(built, over) -> set[str]:
        with pytest.raises(KeyboardInterrupt):
            run(built, over, Checkpointer("run", every_batches=1), Stop(1))
        found = set(newest("run")["code"]["run"])
        for file in Path("run").glob("*.pt"):
            file.unlink()
        return found - {"test_source_code_modules", "own_code", "conftest"}

    def over(**options):
        return from_tensors(x, y, x, y, tasks=2, **options)

    wrapped = torch.nn.Sequential(pieces.Net(), torch.nn.Identity())
    assert built_from(Replay(model), over()) == set()
    for built, streamed in (
        (Replay(wrapped), over()),
        (Replay(model, optimizer=pieces.factory), over()),
        (Replay(model, optimizer=partial(pieces.Steps, lr=0.1)), over()),
        (Replay(model, optimizer=pieces.twice(torch.optim.SGD)), over()),
        (Replay(model), over(augment=pieces.brighter)),
        (Replay(model), over(augment=pieces.Shift())),
        (Replay(model), over(augment=torch.nn.Sequential(pieces.Net()).forward)),
    ):
        assert built_from(built, streamed) == {"pieces"}
    with pytest.raises(KeyboardInterrupt):
        run(Replay(model), over(), Checkpointer("run"), Stop(1), code=[pieces.as_it_is])
    assert "pieces" in newest("run")["code"]["run"]


def test_a_function_put_in_place_of_a_method_of_ours_is_found(place, monkeypatch):
    (place / "pieces.py").write_text(PIECES)
    monkeypatch.setattr(Replay, "more", load("pieces").brighter, raising=False)
    assert set(sources(Replay(Mlp(20, 4)))) == {"pieces"}


# What is loaded, and what lies on the disk -----------------------------------------------------------------------------------


def test_a_file_edited_after_its_import_is_not_taken_for_what_runs(place):
    mine = load()
    edit(place / "mine.py", "* FACTOR", "* 7")
    start(built=strategy(mine))  # the old code runs, the new one lies there
    (source,) = [entry for name, entry in newest("run")["code"]["run"].items() if name == "mine"]
    assert source[2].startswith("python ")
    with pytest.raises(ChangedCodeError, match=r"mine\.py \(it was edited after it was imported, and the code that ran is not"):
        go_on()


def test_what_was_read_first_stays_though_the_file_changes_while_runs_follow_each_other(place):
    mine = load()
    first = sources(mine.Mine)
    edit(place / "mine.py", "FACTOR = 1.0", "FACTOR = 9.0")  # no function shows it
    assert sources(mine.Mine) == first
    importlib.invalidate_caches()
    assert "FACTOR = 9.0" in sources(importlib.reload(mine).Mine)["mine"]


def test_a_file_that_is_gone_is_compared_by_its_compiled_code(place):
    (place / "gone.py").write_text(MINE)
    built = load("gone")
    (place / "gone.py").unlink()
    (source,) = user_sources([built.Mine]).values()
    assert source.text == "# gone.py could not be read\n" and source.compiled
    assert changes({"gone": source}, {"gone": source}) == []


def test_a_symbolic_link_is_read_through(place):
    (place / "lib").mkdir()
    (place / "mine.py").rename(place / "lib" / "real.py")
    (place / "mine.py").symlink_to(place / "lib" / "real.py")
    start()
    edit(place / "lib" / "real.py", "* FACTOR", "* 2")
    with pytest.raises(ChangedCodeError, match=r": mine\.py \(Mine\.loss\)"):
        go_on()


def test_two_modules_of_one_name_are_both_kept(place):
    one = load()
    (place / "other").mkdir()
    (place / "other" / "mine.py").write_text(MINE.replace("1.0", "2.0"))
    spec = importlib.util.spec_from_file_location("mine", place / "other" / "mine.py")
    two = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two)
    found = sources(one.Mine, two.Mine)
    assert ["FACTOR = 1.0" in text for text in found.values()] == [True, False] or len(found) == 2
    assert set(found) == {"mine", "mine (2)"}


def test_an_extension_module_is_compared_by_its_bytes(place):
    libraries = sorted(Path(sysconfig.get_paths()["stdlib"], "lib-dynload").glob("_heapq.*.so"))
    if not libraries:
        pytest.skip("this Python has no extension module of that name")
    copy = place / libraries[0].name
    copy.write_bytes(libraries[0].read_bytes())
    spec = importlib.util.spec_from_file_location("_heapq", copy)
    module = importlib.util.module_from_spec(spec)
    (before,) = user_sources([module]).values()
    assert len(before.compiled) == 64 and "is no text" in before.text
    assert changes({"_heapq": before}, {"_heapq": before._replace(compiled="0" * 64)}) == [copy.name]


CELL = """
LIMIT = 3
SIZES = (3, 4)

class InNotebook(Base):
    width = 8

    sizes = (8, (9, None))

    def loss(self, samples, *, _=None):
        return super().loss(samples) * scale(LIMIT) * len(SIZES)

    def by(self, factor=2.0):
        return factor

def scale(number):
    return number
"""


def notebook(cell: str, name: str = "<cell 1>", lines: bool = True) -> dict:
    """Run a cell as a notebook does: in a namespace without a file; its lines are to be had, or not."""
    namespace = {"__name__": "__main__", "Base": Replay}
    exec(compile(cell, name, "exec"), namespace)  # it is what is tested
    if lines:
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    return namespace


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("* scale", "/ scale", True), ("return number", "return -number", True), ("LIMIT = 3", "LIMIT = 4", True),
        ("width = 8", "width = 9", True), ("(9, None)", "(9, 1)", True), ("(3, 4)", "(3, 5)", True), ("=2.0", "=3.0", True),
        ("def scale", "# a comment\ndef scale", False),
    ],
)  # fmt: skip
def test_a_class_of_a_notebook_is_compared_by_its_methods_or_its_compiled_code(lines, old, new, differs):
    before, after = (
        user_sources(definitions(notebook(cell, f"<cell {number} {lines}>", lines)["InNotebook"]))
        for number, cell in enumerate((CELL, CELL.replace(old, new)))
    )
    assert set(before) == set(after) == {"__main__.InNotebook", "__main__.scale"}
    assert bool(changes(before, after)) == differs
    assert ("Not all of its source" in before["__main__.InNotebook"].text) != lines
    assert bool(before["__main__.InNotebook"].compiled) != lines
