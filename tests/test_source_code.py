"""The user's own source code is part of a run: changed code is refused, or accepted and said."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from clstream.strategies import Replay
from own_code import MINE, Stop, edit, go_on, load, own_folder, start, strategy, stream

from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.engine import ChangedCodeError, OtherRunError
from clstream.files import FolderError
from clstream.models import Mlp
from clstream.online_metrics import Prequential
from clstream.serialization.same_code import same_code
from clstream.serialization.source_code import checkout_hash
from clstream.tracking import EventLog
from clstream.tracking.event_log import read


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_folder(tmp_path, monkeypatch)


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


def test_a_run_that_is_continued_has_the_code_that_it_had_and_maybe_more(place):
    first = run(strategy(load()), stream(), Checkpointer("first"), max_sessions=1)
    assert first.accuracy.shape == (1, 2)

    def goes_on(**options):
        return run(strategy(load()), stream(), continues="first", **options).accuracy.shape

    edit(place / "mine.py", "FACTOR = 1.0", "FACTOR = 1.0\nimport math\nLATER = math.pi\n\ndef next_month():\n    return LATER")
    assert goes_on() == (2, 2)
    before = (place / "mine.py").read_text()
    for old, new, where in (
        ("* FACTOR", "* 2", r" \(next_month, Mine\.loss\)"),
        ("LATER = math.pi", "FACTOR = 2.0", ""),
        ("FACTOR = 1.0\n", "", ""),
    ):
        (place / "mine.py").write_text(before.replace(old, new))
        with pytest.raises(ChangedCodeError, match=rf"has changed since .*: mine\.py{where}"):
            goes_on()
    (place / "mine.py").write_text(before.replace("* FACTOR", "* 2"))
    assert goes_on(accept_changed_code=True) == (2, 2)


def test_accepted_code_goes_on_and_the_log_and_the_folder_say_so(place):
    start(EventLog("run"))
    edit(place / "mine.py", "FACTOR = 1.0", "FACTOR = 0.5")
    edit(place / "mine.py", "self.batches = 0", "self.batches = 1")
    go_on(EventLog("run"), accept_changed_code=True)
    (resumed,) = [entry for entry in read("run") if entry["event"] == "Resumed"]
    assert resumed["changed_code"] == ["mine.py (Counts.__init__)"]  # FACTOR is in no class or function, and the others have names
    assert "FACTOR = 1.0" in (place / "run" / "code" / "mine.py").read_text()
    assert (place / "run" / "code.2" / "mine.py").read_text() == (place / "mine.py").read_text()
    assert {entry.name for entry in (place / "run").iterdir() if entry.is_dir()} == {"code", "code.2"}


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
