"""Changed code on the command line: refused, or accepted; the sources are kept with the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mlflow.tracking import MlflowClient
from own_code import MINE, edit, forget, own_folder, sources

from clstream.cli import main
from clstream.serialization.source_code import user_sources


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_folder(tmp_path, monkeypatch)


COMMAND = [
    "run", "--stream", "blobs", "--stream.train_per_class", "20", "--stream.batch_size", "8", "--strategy", "mine.Mine",
    "--model.hidden", "[8]", "--resume", "auto",
]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    forget("mine")
    assert main(arguments) == status
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.slow
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


@pytest.mark.slow
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
