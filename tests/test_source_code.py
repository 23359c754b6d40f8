"""The user's own source code is part of a run: changed code is refused, or accepted and said; the sources are kept with the run."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from clstream.strategies import EWC, Replay
from clstream.streams import blobs, from_tensors
from mlflow.tracking import MlflowClient

from clstream import BatchLearned, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import main
from clstream.engine import ChangedCodeError, OtherRunError
from clstream.files import FolderError
from clstream.models import Mlp
from clstream.online_metrics import Prequential
from clstream.serialization.same_code import changes, same_code
from clstream.serialization.source_code import checkout_hash, definitions, user_sources
from clstream.tracking import EventLog
from clstream.tracking.event_log import read

MINE = '''
"""A method of my own."""

import signal
from pathlib import Path

from torch import Tensor, nn

from clstream import BatchLearned, Samples, on
from clstream.strategies import Finetune

FACTOR = 1.0


class Mine(Finetune):
    """Scales its loss."""

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss."""
        return super().loss(samples) * FACTOR

    @on(BatchLearned)
    def stop(self, event: BatchLearned) -> None:
        if event.batch.index == 2 and Path("stop").exists():
            Path("stop").unlink()
            signal.raise_signal(signal.SIGINT)


class Counts:
    """An observer."""

    def __init__(self) -> None:
        self.batches = 0

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.batches += 1
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder from which modules are imported, and leave no trace."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second of the last one is seen
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    forget(*(name for name in set(sys.modules) - before if str(tmp_path) in str(getattr(sys.modules[name], "__file__", ""))))


def forget(*names: str) -> None:
    for name in names:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    linecache.clearcache()


def load(name: str = "mine") -> ModuleType:
    """Import a module as a new process would."""
    forget(*[loaded for loaded in sys.modules if loaded.partition(".")[0] == name.partition(".")[0]])
    return importlib.import_module(name)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def sources(*values: object) -> dict[str, str]:
    return {name: source.text for name, source in user_sources(definitions(*values)).items()}


class Stop:
    """Ends a run after some batches."""

    def __init__(self, batches: int = 3) -> None:
        self.left = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def strategy(module: ModuleType, **options: object):
    torch.manual_seed(0)
    return module.Mine(Mlp(20, 4, hidden=(8,)), **options)


def stream(**options):
    return blobs(tasks=2, classes=4, train_per_class=20, **options)


def start(*observers: object, built=None, over=None, **options) -> None:
    """Run what is in mine.py for some batches."""
    with pytest.raises(KeyboardInterrupt):
        run(built or strategy(load()), over or stream(), Checkpointer("run", every_batches=1), *observers, Stop(), **options)


def go_on(*observers: object, built=None, over=None, **options):
    return run(built or strategy(load()), over or stream(), Checkpointer("run"), *observers, resume=newest("run"), **options)


# Changed code ------------------------------------------------------------------------------------------------------------


def test_changed_code_is_refused_and_names_the_file_and_the_method(place):
    start()
    edit(place / "mine.py", "super().loss(samples) * FACTOR", "super().loss(samples) * 2")
    with pytest.raises(
        ChangedCodeError, match=r"has changed since .*: mine\.py \(Mine\.loss\)\. Go on .* accept_changed_code=True"
    ):
        go_on()
    edit(place / "mine.py", "super().loss(samples) * 2", "super().loss(samples) * FACTOR")
    assert go_on().accuracy.shape == (2, 2)


def test_accepted_code_goes_on_and_the_log_and_the_folder_say_so(place):
    start(EventLog("run"))
    edit(place / "mine.py", "FACTOR = 1.0", "FACTOR = 0.5")
    edit(place / "mine.py", "self.batches = 0", "self.batches = 1")
    go_on(EventLog("run"), accept_changed_code=True)
    (resumed,) = [entry for entry in read("run") if entry["event"] == "Resumed"]
    assert resumed["changed_code"] == ["mine.py (Counts.__init__)"]  # FACTOR is in no class or function, and the others have names
    assert "FACTOR = 1.0" in (place / "run" / "code" / "mine.py").read_text()
    assert (place / "run" / "code.2" / "mine.py").read_text() == (place / "mine.py").read_text()
    assert {each.name for each in (place / "run").iterdir() if each.is_dir()} == {"code", "code.2"}


def test_code_that_was_accepted_is_the_runs_from_then_on(place):
    start()
    edit(place / "mine.py", "FACTOR = 1.0", "FACTOR = 0.5")
    with pytest.raises(KeyboardInterrupt):
        run(
            strategy(load()),
            stream(),
            Checkpointer("run", every_batches=1),
            Stop(2),
            resume=newest("run"),
            accept_changed_code=True,
        )
    assert go_on().accuracy.shape == (2, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Return the loss."""', '"""Return the loss, scaled."""  # as ever'),
        ('        """Return the loss."""\n', ""),
        ("FACTOR = 1.0\n", "FACTOR    =    (\n    1.0)\n\n\n"),
        ("class Counts", 'if __name__ == "__main__":\n    print("a script")\n\n\nclass Counts'),
    ],
)
def test_comments_layout_docstrings_and_scripts_do_not_count(place, old, new):
    start()
    edit(place / "mine.py", old, new)
    assert go_on().accuracy.shape == (2, 2)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("FACTOR = 1.0", "FACTOR = 2.0", r"mine\.py;|mine\.py\."),
        ("* FACTOR", "/ FACTOR", r"mine\.py \(Mine\.loss\)"),
        ("class Mine(Finetune):", "class Mine(Finetune, object):", r"mine\.py \(Mine\)"),
        ("samples: Samples) -> Tensor", "samples: Samples, *_: object) -> Tensor", r"mine\.py \(Mine\.loss\)"),
        ("class Counts", "def loss(self, samples):\n    return 0\n\n\nMine.loss = loss\n\n\nclass Counts", r"mine\.py \(loss\)"),
        ("* FACTOR", "* FACTOR if samples else 'a text'", r"mine\.py \(Mine\.loss\)"),
    ],
)
def test_whatever_else_counts(place, old, new, where):
    start()
    edit(place / "mine.py", old, new)
    with pytest.raises(ChangedCodeError, match=where):
        go_on()


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("run(1)", "run(2)", True), ("runs = [run(seed) for seed in range(3)]", "runs = []", True), ("one = 1", "one = 2", True),
        ("stream = 1", "stream = 2", True), ("LIMIT = 1", "LIMIT = 2", False), ("LIMIT += 1", "LIMIT += 2", False),
        ("import one as LIMIT", "import two as LIMIT", False), ("from one import LIMIT", "from two import LIMIT", False),
        ("def f(): return 1", "def f(): return 2", False), ("run(lambda: 1)", "run(lambda: 2)", False),
        ("if a:\n        class A: b = 1", "if a:\n        class A: b = 2", False),
        ("for LIMIT in 1, 2: run()", "for LIMIT in 1,: run()", False),
        ("a()\nelse:\n    b = 1", "a()\nelse:\n    b = 2", False), ("a()\nelse:\n    b = 1", "c()\nelse:\n    b = 1", True),
    ],
)  # fmt: skip
def test_of_a_script_counts_what_it_defines_and_what_functions_read(before, after, same):
    text = "def loss(stream):\n    one = 1\n    return LIMIT * stream * one\n\nif __name__ == '__main__':\n    "
    assert same_code(text + before, text + after) == same
    assert same_code(text + before, text.replace("'__main__'", '"__main__"') + before + "  # a comment")


def test_same_code():
    assert same_code("x = 1 # a", "x = (1)\n")
    assert not same_code("x = 1", "x = 1.0")
    assert not same_code("def f(): 'a text'", "def f(): return 'a text'")
    assert not same_code("x = (", "x = ((")  # neither is Python
    assert same_code("x = (", "x = (")


def test_another_file_of_the_same_name_in_another_folder_is_refused(place, monkeypatch):
    start()
    (place / "other").mkdir()
    (place / "other" / "mine.py").write_text(MINE.replace("* FACTOR", "* 3"))
    monkeypatch.chdir(place / "other")
    monkeypatch.syspath_prepend(str(place / "other"))
    with pytest.raises(ChangedCodeError, match=r"mine\.py \(Mine\.loss\)"):
        run(strategy(load()), stream(), Checkpointer("../run"), resume=newest("../run"))


def test_a_class_of_the_same_name_in_another_module_is_refused(place):
    start()
    (place / "other.py").write_text(MINE)
    with pytest.raises(ChangedCodeError, match=r"mine\.py \(it is no part of the run any more\); other\.py \(it was no part of"):
        go_on(built=strategy(load("other")))


def test_a_class_of_ours_whose_name_the_user_takes_is_refused(place):
    model = Mlp(20, 4, hidden=(8,))
    start(built=Replay(model))
    (place / "other.py").write_text("from clstream.strategies import Replay as Base\n\n\nclass Replay(Base): ...\n")
    with pytest.raises(ChangedCodeError, match=r"other\.py \(it was no part of the run\)"):
        go_on(built=load("other").Replay(model))


def test_observers_code_is_checked_and_observers_may_come_and_go(place):
    start(load().Counts())
    edit(place / "mine.py", "self.batches += 1", "self.batches += 2")
    with pytest.raises(ChangedCodeError, match=r"mine\.py \(Counts\.count\)"):
        go_on(load().Counts())


def test_observers_that_were_not_there_or_are_gone_are_no_change(place):
    (place / "watching.py").write_text(MINE)
    start(load("watching").Counts(), built=Replay(Mlp(20, 4, hidden=(8,))))
    edit(place / "watching.py", "self.batches += 1", "self.batches += 2")
    assert go_on(built=Replay(Mlp(20, 4, hidden=(8,)))).accuracy.shape == (2, 2)
    state = newest("run")
    assert state["code"]["run"] == {} and not state["code"]["observers"].keys() & {"watching"}


# What belongs to a run -----------------------------------------------------------------------------------------------------


def package(place: Path) -> None:
    """Write a package: a strategy that imports near and far, at the top and within functions, names and modules."""
    (place / "lab" / "parts").mkdir(parents=True)
    (place / "space" / "inner").mkdir(parents=True)  # a namespace package: it has no __init__.py
    files = {
        "lab/__init__.py": "SEED = 1\n",
        "lab/method.py": "from . import losses\nfrom .parts.heads import head as make\nimport space.inner.deep as deep\n"
        "from clstream.strategies import Finetune\nimport json, numpy\n\n\n"
        "class Mine(Finetune):\n    def loss(self, samples):\n        from . import lazy\n        return super().loss(samples)\n",
        "lab/losses.py": "from lab import constants as c\n",
        "lab/constants.py": "A = 1\n",
        "lab/parts/__init__.py": "",
        "lab/parts/heads.py": "def head(): ...\n",
        "lab/lazy.py": "import lab.later\n",
        "lab/later.py": "LATER = 1\n",
        "lab/unused.py": "X = 1\n",
        "space/inner/deep.py": "DEEP = 1\n",
    }
    for name, text in files.items():
        (place / name).write_text(text)


def test_imports_are_followed(place):
    package(place)
    found = sources(strategy(load("lab.method")))
    assert set(found) == {
        "lab", "lab.method", "lab.losses", "lab.constants", "lab.parts", "lab.parts.heads", "lab.lazy", "lab.later",
        "space.inner.deep",
    }  # fmt: skip
    assert "lab.lazy" not in sys.modules  # found without being imported
    assert found["lab.constants"] == "A = 1\n"


@pytest.mark.parametrize(
    "file", ["lab/__init__.py", "lab/constants.py", "lab/parts/heads.py", "lab/later.py", "space/inner/deep.py"]
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
        return found - {"test_source_code", "conftest"}

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


# Data, options, folders: another run ------------------------------------------------------------------------------------------


def test_other_data_is_refused(place):
    start()
    with pytest.raises(OtherRunError, match="data fingerprint was"):
        go_on(over=stream(spread=1.01))


def test_a_folder_of_a_run_with_other_code_is_refused_by_the_checkpointer_too(place):
    start()
    state = newest("run")
    (place / "elsewhere").mkdir()
    edit(place / "mine.py", "* FACTOR", "* 2")
    built = strategy(load())
    with pytest.raises(KeyboardInterrupt):
        run(built, stream(), Checkpointer("elsewhere", every_batches=1), Stop())
    edit(place / "mine.py", "* 2", "* FACTOR")
    module = load()
    with pytest.raises(FolderError, match=r"elsewhere has the checkpoints of another run: the code of the run has changed"):
        run(strategy(module), stream(), Checkpointer("elsewhere"), resume=state)


def test_other_code_of_a_checkout_of_clstream_is_a_warning(place):
    start()
    state = newest("run")
    assert state["clstream code"] == "" or len(state["clstream code"]) == 16
    with (
        pytest.warns(RuntimeWarning, match="this is a checkout of clstream, and its code is not what it was")
        if state["clstream code"]
        else nullcontext()
    ):
        run(strategy(load()), stream(), resume={**state, "clstream code": state["clstream code"] and "0" * 16})


def test_the_hash_of_a_checkout_is_of_its_packages_too(tmp_path, monkeypatch):
    def hashed(name: str, code: str) -> str:
        folder = tmp_path / name / "clstream"
        (folder / "engine").mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "engine" / "__init__.py").touch()
        (folder / "engine" / "loop.py").write_text(code)
        monkeypatch.setattr(sys.modules["clstream"], "__file__", str(folder / "__init__.py"))
        return checkout_hash([])

    assert hashed("checkout", "STEPS = 1") == hashed("copy", "STEPS = 1") != hashed("edited", "STEPS = 2")


def test_a_measure_that_was_not_there_before_is_said(place):
    start(Prequential())
    go_on(Prequential())
    for file in Path("run").glob("*.pt"):
        file.unlink()
    start()
    with pytest.warns(
        RuntimeWarning, match="Prequential was not among the observers when the checkpoint was written: it sees only"
    ):
        go_on(Prequential(), EventLog("run"))


# On the command line --------------------------------------------------------------------------------------------------------

COMMAND = [
    "run", "--stream", "blobs", "--stream.train_per_class", "20", "--stream.batch_size", "8", "--strategy", "mine.Mine",
    "--model.hidden", "[8]", "--resume", "auto",
]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    forget("mine")
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_a_stopped_run_with_changed_code_on_the_command_line(store, place, capsys):
    (place / "stop").touch()
    said(capsys, 130, *COMMAND)
    (folder,) = Path("runs").iterdir()
    edit(place / "mine.py", "* FACTOR", "* 2")
    for again in (COMMAND, ["resume", str(folder)]):
        assert "has changed since its checkpoint was written: mine.py (Mine.loss). Go on" in said(capsys, 1, *again)
    assert "going on in" in said(capsys, 0, "resume", str(folder), "--accept-changed-code")
    assert "accept" not in (folder / "config.yaml").read_text()
    assert "; with changed code: mine.py (Mine.loss)" in said(capsys, 0, "log", str(folder))
    client = MlflowClient()
    (tracked,) = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    assert tracked.data.tags["changed_code"] == "mine.py (Mine.loss)"
    for name, text in (("code", MINE), ("code.2", (place / "mine.py").read_text())):
        artifact = client.download_artifacts(tracked.info.run_id, f"{name}/mine.py", str(place))
        assert Path(artifact).read_text() == text == (folder / "seed_0" / name / "mine.py").read_text()


def test_a_finished_run_says_so_and_is_not_taken_for_a_run_of_other_code(place, capsys):
    untracked = [*COMMAND, "--track", "false"]
    assert "finished" not in said(capsys, 0, *untracked)
    (folder,) = Path("runs").iterdir()
    for again in (untracked, ["resume", str(folder)]):
        text = said(capsys, 0, *again)
        assert f"the run in {folder} is finished: nothing is run now, and what follows was measured then" in text
        assert "going on" not in text and "Mine on blobs" in text
    edit(place / "mine.py", "* FACTOR", "* 2")
    for again in (untracked, ["resume", str(folder)]):
        text = said(capsys, 1, *again)
        assert "seed 0 is finished, and the code of the run has changed since: mine.py (Mine.loss). To run the changed code" in text
        assert "│" not in text  # no table
    text = said(capsys, 0, *untracked, "--accept-changed-code")
    assert "seed 0 was run by other code than there is now: mine.py (Mine.loss); its results are of the old code" in text
    assert f"checkpoints in {folder}.2" in said(capsys, 0, *(word.replace("auto", "never") for word in untracked))


def test_a_finished_run_whose_config_was_edited_is_refused(place, capsys):
    said(capsys, 0, *COMMAND, "--track", "false")
    (folder,) = Path("runs").iterdir()
    edit(folder / "config.yaml", "batch_size: 8", "batch_size: 9")
    assert "another run: stream.batch_size was 8, now it is 9" in said(capsys, 1, "resume", str(folder))


def test_a_finished_run_without_its_checkpoint_is_not_run_anew_without_a_word(place, capsys):
    said(capsys, 0, *COMMAND, "--track", "false")
    (folder,) = Path("runs").iterdir()
    for file in (folder / "seed_0").glob("*.pt"):
        file.unlink()
    text = said(capsys, 1, "resume", str(folder))
    assert "is marked as finished, but its last checkpoint, which has the results, is gone" in text
    (folder / "seed_0" / "finished").unlink()
    assert "going on in" in said(capsys, 0, "resume", str(folder))


STREAM = """

def points(spread: float = 1.0) -> Stream:
    return blobs(tasks=2, classes=4, train_per_class=20, spread=spread)
"""


def test_the_function_that_builds_the_stream_belongs_to_the_run(place, capsys):
    (place / "mine.py").write_text("from clstream import Stream\nfrom clstream.streams import blobs\n" + STREAM)
    given = ["run", "--stream", "mine.points", "--track", "false", "--resume", "auto", "--model.hidden", "[8]"]
    said(capsys, 0, *given)
    (folder,) = Path("runs").iterdir()
    assert (folder / "seed_0" / "code" / "mine.py").read_text() == (place / "mine.py").read_text()
    edit(place / "mine.py", "classes=4", "classes=4, features=20")
    assert "mine.py (points)" in said(capsys, 1, *given)


def test_a_script_is_named_by_its_file(place):
    module = ModuleType("__main__")
    module.__file__ = str(place / "train.py")
    (place / "train.py").write_text(MINE)
    exec(compile(MINE, str(place / "train.py"), "exec"), vars(module))  # as `python train.py` does
    assert sources(module.Mine) == {"train": MINE}
    assert os.path.relpath(user_sources([module.Mine])["train"].file) == "train.py"
