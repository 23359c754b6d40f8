"""`clstream sweep`: all combinations of a grid end, each once, whatever comes between."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from clstream.cli import main
from clstream.cli.experiment import run_experiment
from clstream.cli.sweep_plan import plan_of
from clstream.comparison import Record, read_records

pytestmark = pytest.mark.slow

GRID = """\
stream: {class_path: blobs, init_args: {train_per_class: 60}}
model: {class_path: Mlp, init_args: {hidden: [8]}}
track: false
sweep:
  strategy: [Finetune, sweep_mine.Mine]
  strategy.capacity: [20, 40]
  seed: 0-1
"""
MINE = """\
import os
from pathlib import Path
import clstream.strategies as zoo


class Mine(zoo.Replay):
    '''It does what files in the working folder say, once each, within the run with capacity 40 and its last session.'''

    def learn(self, batch):
        self.seen = getattr(self, "seen", 0) + 1
        for name in ("fail", "stop", "die") if self.seen > 14 and self.memory.capacity == 40 else ():
            if Path(name).exists():
                Path(name).unlink()
                if name == "die":
                    os.kill(os.getpid(), 9)
                raise RuntimeError("told to fail") if name == "fail" else KeyboardInterrupt
        return super().learn(batch)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a grid of six runs and a strategy of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sweep_mine", raising=False)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "sweep_mine.py").write_text(MINE)
    return tmp_path


def records(folder: Path) -> dict[str, Record]:
    """Return the records of a sweep by identity, of which there is one each."""
    kept = read_records(folder)
    by_identity = {record.identity: record for record in kept}
    assert len(by_identity) == len(kept) and all("-" in identity for identity in by_identity)
    return by_identity


def measured(folder: Path) -> dict[str, list[list[float | None]]]:
    return {identity: record.matrix for identity, record in records(folder).items()}


def test_a_sweep_is_the_runs_that_its_combinations_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "6 runs, 1 at a time, in sweeps/grid"
    assert said[1].startswith("[1/6] Finetune on blobs, seed 0: accuracy 0.") and said[1].endswith(" left")
    assert said[6].startswith("[6/6] Mine, capacity 40 on blobs, seed 1: accuracy") and "left" not in said[6]
    kept = list(records(place / "sweeps" / "grid").values())
    assert [(record.label, record.seed) for record in kept] == [
        (label, seed) for label in ("Finetune", "Mine, capacity 20", "Mine, capacity 40") for seed in (0, 1)
    ]
    assert all(record.error == "" and Path(record.source, "finished").exists() for record in kept)
    config = ["--config", str(Path(kept[3].source).parent / "config.yaml"), "--checkpoint_every", "0"]
    result = run_experiment([*config, "--threads", "1"]).results[0]
    assert result.main.tolist() == kept[3].matrix and result.params["strategy.capacity"] == 20 and result.params["seed"] == 1
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0
    assert capsys.readouterr().out == "all 6 runs are finished; see them: clstream compare sweeps/grid\n"


def test_a_failed_run_stops_no_other_is_listed_and_is_run_again(
    place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "grid.yaml").write_text(GRID.replace("track: false\n", ""))
    (place / "fail").touch()
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "[5/6] Mine, capacity 40 on blobs, seed 0 failed: RuntimeError: told to fail" in printed.out
    assert "1 of 6 runs failed" in printed.err
    kept = records(place / "sweeps" / "grid")
    assert [record.error for record in kept.values()] == ["", "", "", "", "RuntimeError: told to fail", ""]
    assert [(run.info.status, run.info.run_name) for run in parents(store)] == [("FAILED", "sweep grid")]
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0
    assert "1 run of 6, 5 are finished" in capsys.readouterr().out
    again = records(place / "sweeps" / "grid")
    assert again.keys() == kept.keys() and not any(record.error for record in again.values())
    (parent,) = parents(store)
    assert parent.info.status == "FINISHED" and "error" not in parent.data.tags
    children = MlflowClient(store).search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [child.info.status for child in children] == ["FINISHED"] * 6  # the one that failed went on from its checkpoint


def parents(store: str) -> list[Run]:
    client = MlflowClient(store)
    return list(client.search_runs([client.get_experiment_by_name("clstream").experiment_id], "tags.sweep = 'grid'"))


def test_an_interrupted_sweep_goes_on_where_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "grid.yaml", "--workers", "1", "--sweeps", "whole"]) == 0
    (place / "stop").touch()
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 130
    assert "stopped with 2 runs left; the same command goes on with them" in capsys.readouterr().err
    assert len(records(place / "sweeps" / "grid")) == 4
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0
    assert measured(place / "sweeps" / "grid") == measured(place / "whole" / "grid")


def test_a_worker_that_dies_takes_nothing_along(place: Path) -> None:
    assert main(["sweep", "grid.yaml", "--workers", "1", "--sweeps", "serial"]) == 0
    (place / "die").touch()
    assert main(["sweep", "grid.yaml", "--workers", "2"]) == 0
    assert not (place / "die").exists()
    assert measured(place / "sweeps" / "grid") == measured(place / "serial" / "grid")


def test_what_another_file_has_as_finished_is_not_run_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = GRID.replace("seed: 0-1", "seed: 0")
    (place / "grid.yaml").write_text(few)
    assert main(["sweep", "grid.yaml", "--workers", "1", "--records", "kept.jsonl", "--sweeps", "first"]) == 0
    (place / "grid.yaml").write_text(GRID)
    assert main(["sweep", "grid.yaml", "--workers", "1", "--records", "kept.jsonl", "--sweeps", "second"]) == 0
    assert "3 runs of 6, 3 are finished" in capsys.readouterr().out
    assert len(records(place / "second" / "grid")) == 6
    assert records(place / "kept.jsonl") == records(place / "second" / "grid")


def test_changed_code_is_run_again_and_comments_are_no_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [run.identity for run in plan_of("grid.yaml", []).runs]
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0

    def changed(text: str) -> list[bool]:
        (place / "sweep_mine.py").write_text(text)
        sys.modules.pop("sweep_mine")
        return [run.identity == old for run, old in zip(plan_of("grid.yaml", []).runs, before, strict=True)]

    assert changed(MINE.replace("import os", "import os  # for kill")) == [True] * 6
    assert changed(MINE.replace("> 14", "> 13")) == [True, True, False, False, False, False]
    capsys.readouterr()
    assert main(["sweep", "grid.yaml", "--workers", "1", "--accept-changed-code"]) == 0
    assert "all 6 runs are finished" in capsys.readouterr().out
    assert main(["sweep", "grid.yaml", "--workers", "1"]) == 0
    assert "4 of them were finished by other code" in capsys.readouterr().out
    assert len(records(place / "sweeps" / "grid")) == 10


def test_the_identity_is_of_what_is_run_not_of_how_it_is_kept(place: Path) -> None:
    runs = plan_of("grid.yaml", []).runs
    kept_otherwise = ["--runs", "other", "--checkpoint_every", "5", "--threads", "3", "--experiment", "mine", "--log_batches"]
    assert [run.identity for run in plan_of("grid.yaml", kept_otherwise).runs] == [run.identity for run in runs]
    assert not {run.identity for run in plan_of("grid.yaml", ["--max_sessions", "2"]).runs} & {run.identity for run in runs}
    other_data = plan_of("grid.yaml", ["--stream.train_per_class", "61"]).runs
    assert {run.identity.data for run in other_data}.isdisjoint({run.identity.data for run in runs})
    assert len({run.folder_name for run in runs}) == 6
    by_default = plan_of("grid.yaml", ["--stream.batch_size", "32", "--device", "cpu"]).runs
    assert [run.identity for run in by_default] == [run.identity for run in runs]


def test_a_dry_run_prints_the_plan_and_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.iterdir())
    assert main(["sweep", "grid.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 runs in sweeps/grid, 0 of them finished" in said and "  Mine, capacity 40 on blobs, seeds 0, 1" in said
    assert ("seeds 0, 1, 0 s each, tried" in said and "about 1 s with" in said) or "about 0 s with" in said
    assert [file for file in sorted(place.iterdir()) if file.name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("grid", "given", "sentence"),
    [
        ("stream: blobs\n", [], "it has no section `sweep:`"),
        ("sweep: {}\n", [], "it has no section `sweep:`"),
        ("sweep: {strategy: []}\n", [], "strategy has no values"),
        (
            "sweep: {strategy.capacity: [1, 2]}\nstrategy: Finetune\n",
            [],
            "no strategy of the grid (Finetune) has the option 'capacity'",
        ),
        ("sweep: {stream: [nowhere]}\n", [], "there is no stream 'nowhere'"),
        ("sweep: {strategy.capacity: [0]}\nstream: blobs\n", [], "capacity"),
        ("sweep: {strategy.capacity: [few]}\nstream: blobs\n", [], "--strategy.capacity takes"),
        ("sweep: {strategy.capacity: [500, 100]}\nstream: blobs\n", ["--strategy.capacity", "3"], "they are the same run"),
        ("sweep: {strategy: [Replay], threads: [1, 2]}\nstream: blobs\n", [], "they are the same run"),
        ("sweep: {strategy: [Replay]}\ntrust: os\n", [], "a config can't say what to trust"),
        ("sweep: {strategy: [os.system]}\n", [], "can't be named by a config"),
        ("sweep: {strategy: [this.Mine], strategy.capacity: [1, 2]}\n", [], "this.Mine can't be named by a config"),
        ("sweep: {model: [this.Mine], model.hidden: [1, 2]}\n", [], "this.Mine can't be named by a config"),
        ("sweep: {stream.tasks: [1, 2]}\nstream: {class_path: this.mine}\n", [], "this.mine can't be named by a config"),
        ("sweep: {strategy: [EWC]}\nstream: {class_path: blobs, init_args: {boundaries: false}}\n", [], "EWC"),
        ("sweep: {seed: 0-1}\n", ["--worker", "3"], "unknown option --worker"),
        ("sweep: {seed: 0-1}\n", ["--workers", "0"], "--workers must be at least 1"),
        ("sweep: {seed: 0-1}\n", ["--engine", "slurm"], "--engine takes loky, ray, dask, not slurm"),
        ("sweep: {seed: 0-1}\n", ["--address", "localhost:1"], "choose --engine ray or --engine dask"),
        ("sweep: {seed: 0-1}\n", ["--records", "nowhere/kept.jsonl"], "there is no folder nowhere"),
    ],
)
def test_what_can_not_be_run_is_said_before_anything_is(
    grid: str,
    given: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(grid)
    assert main(["sweep", "grid.yaml", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clstream: error: ") and sentence in said and said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["grid.yaml"] and "this" not in sys.modules


def test_a_store_that_can_not_be_used_is_said_before_anything_is_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mlflow.db").write_text("no database")
    assert main(["sweep", "grid.yaml", "--track", "true", "--tracking_uri", f"sqlite:///{place}/mlflow.db"]) == 1
    said = capsys.readouterr().err
    assert "mlflow.db" in said and said.count("\n") == 1 and not (place / "sweeps").exists()
    assert (place / "mlflow.db").read_text() == "no database"


def test_nothing_is_written_where_a_link_leads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = place / "other"
    other.mkdir()
    plan = plan_of("grid.yaml", [])
    runs = place / "sweeps" / "grid" / "runs"
    for name in (runs / plan.runs[0].folder_name, runs / plan.runs[0].folder_name / f"seed_{plan.runs[0].seed}"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(other)
        assert main(["sweep", "grid.yaml", "--workers", "1"]) == 1
        assert "is a link, and what it leads to may be anybody's: remove it" in capsys.readouterr().err
        assert not list(other.iterdir())
        name.unlink()
    assert main(["sweep", "grid.yaml", "--records", str(other)]) == 2
    assert "other is no regular file" in capsys.readouterr().err


def test_damaged_records_are_refused_and_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "kept.jsonl").write_text("{}\n")
    assert main(["sweep", "grid.yaml", "--records", "kept.jsonl"]) == 1
    assert "line 1 of kept.jsonl: this is no record of a run" in capsys.readouterr().err
    assert (place / "kept.jsonl").read_text() == "{}\n" and not (place / "sweeps").exists()


@pytest.mark.parametrize(("engine", "module"), [("ray", "ray"), ("dask", "distributed")])
def test_a_cluster_needs_an_extra(
    engine: str, module: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # it can't be imported then
    assert main(["sweep", "grid.yaml", "--engine", engine]) == 1
    assert f"which is not installed: pip install 'clstream[{engine}]'" in capsys.readouterr().err
