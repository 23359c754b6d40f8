"""`clstream continue`, and what MLflow knows of where a run comes from."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tracked_runs import curve

from clstream.checkpoint import newest
from clstream.cli import main
from clstream.recording import read

OWN = """
from dataclasses import replace

from clstream import Stream
from clstream.checks import example_stream


def first(tasks: int = 2) -> Stream:
    whole = example_stream()
    return replace(whole, name="first", tasks=whole.tasks[:tasks], schedule=None)


def last() -> Stream:
    whole = example_stream()
    return replace(whole, name="last", tasks=[replace(whole.tasks[2], id=0)], schedule=None)
"""

RUN = ["--strategy", "Replay", "--model.hidden", "[16]", "--model.head", "growing", "--threads", "1"]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")


def kept(folder: Path) -> list[bytes]:
    """Return what the last checkpoint of seed 0 of a run has of tensors."""
    state = newest(folder / "seed_0")
    assert state is not None
    return [storage.numpy().tobytes() for storage in state["strategy"]["storages"]]


@pytest.mark.slow
@pytest.mark.usefixtures("_folder")
def test_a_run_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    untracked = [*RUN, "--track", "false"]
    assert main(["run", "--stream", "mine.first", *untracked]) == 0
    assert main(["run", "--stream", "mine.first", "--stream.tasks", "3", *untracked, "--runs", "whole"]) == 0
    folder = next(Path("runs").iterdir())
    capsys.readouterr()
    assert main(["continue", str(folder), "--stream", "mine.last"]) == 0
    shown = capsys.readouterr()
    assert "task 0" in shown.out and "first, last: class-incremental" in shown.err
    after = next(path for path in Path("runs").iterdir() if "last" in path.name)
    assert kept(after) == kept(next(Path("whole").iterdir()))
    assert main(["record", "--config", str(folder / "config.yaml"), "--out", "run.clstream"]) == 0
    assert main(["record", "--config", str(after / "config.yaml"), "--out", "run.clstream", "--extend"]) == 0
    assert len(read("run.clstream").about["sessions"]) == 3
    shutil.move(folder, "away")  # it needs nothing of it any more
    assert main(["resume", str(after)]) == 0  # it is over: nothing is learned
    assert "nothing is run now" in capsys.readouterr().err
    for seed_folder in after.glob("seed_*"):  # as if it had been killed before its first checkpoint
        shutil.rmtree(seed_folder)
    assert main(["resume", str(after)]) == 0 and kept(after) == kept(next(Path("whole").iterdir()))
    shutil.copytree("away", "copy")
    again = ["continue", "copy", "--stream", "mine.last", "--resume", "auto"]
    assert main(again) == 0
    second = next(path for path in Path("runs").iterdir() if path != after)
    shutil.rmtree("copy")
    shutil.rmtree(second / "seed_0")
    assert main(["run", "--config", str(second / "config.yaml"), "--resume", "auto"]) == 0
    assert kept(second) == kept(after) and len([*Path("runs").iterdir()]) == 2
    later = ["--stream", "mine.first", "--stream.tasks", "3"]  # what a run that continues this one knows of both
    assert main(["continue", str(after), *later]) == 1
    assert "all 3 sessions of first were learned" in capsys.readouterr().err
    shutil.move("away", folder)
    capsys.readouterr()
    assert main(["continue", str(folder)]) == 1
    assert "all 2 sessions of first were learned by the run before: give a stream with more of them" in capsys.readouterr().err
    assert main(["continue", str(folder), "--stream", "mine.last", "--workers", "2", "--seeds", "0,1"]) == 2
    assert "leave --together and --workers out" in capsys.readouterr().err
    assert main(["continue", str(folder), "--stream", "mine.last", "--seed", "3"]) == 1
    assert "has no checkpoint of seed 3 to go on from" in capsys.readouterr().err
    assert main(["continue", "nowhere"]) == 2
    assert main(["continue"]) == 2 and "usage: clstream continue RUN" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("_folder")
def test_mlflow_keeps_the_lineage(store: str) -> None:
    assert main(["run", "--stream", "mine.first", "--evaluate_every", "4", *RUN]) == 0
    folder = next(path for path in Path("runs").iterdir())
    assert main(["continue", str(folder), "--stream", "mine.last"]) == 0
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("clstream")
    assert experiment is not None
    second, first = client.search_runs([experiment.experiment_id])  # the newest one first
    assert second.data.tags["continues"] == first.info.run_id
    assert f"(#/experiments/{experiment.experiment_id}/runs/{first.info.run_id})" in second.data.tags["mlflow.note.content"]
    assert [*curve(client, first.info.run_id, "accuracy/mean")] == [1, 2]
    assert [*curve(client, second.info.run_id, "accuracy/mean")] == [3]
    before = {*curve(client, first.info.run_id, "anytime/task_00")}
    assert before and before.isdisjoint(curve(client, second.info.run_id, "anytime/task_00"))
    assert "continues" not in first.data.tags
