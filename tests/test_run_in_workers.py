"""`clstream run --workers`: several seeds at a time end as one after the other, and so does their parent in MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from clstream.cli import main
from clstream.cli.experiment import run_experiment

pytestmark = pytest.mark.slow

BLOBS = ["--stream", "blobs", "--strategy", "fails_when_told.Mine", "--model.hidden", "[8]", "--threads", "1"]
MINE = """
from pathlib import Path
import clstream.strategies as zoo

class Mine(zoo.Replay):
    def learn(self, batch):
        try:
            Path("fails").unlink()
        except FileNotFoundError:
            return super().learn(batch)
        raise RuntimeError("told to fail")
"""


def means(store: str) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of the parent run in a store, but for what is measured in seconds."""
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("clstream").experiment_id
    (parent,) = [run for run in client.search_runs([experiment]) if run.info.run_name.endswith("seeds")]
    assert parent.info.status == "FINISHED"
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 2 and {child.info.status for child in children} == {"FINISHED"}
    assert "error" not in parent.data.tags
    names = [name for name in parent.data.metrics if "second" not in name and "peak" not in name]
    return {name: [(p.step, p.value) for p in client.get_metric_history(parent.info.run_id, name)] for name in names}


def test_seeds_in_workers_are_those_in_one_process(
    migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fails_when_told.py").write_text(MINE)
    shutil.copy(migrated, tmp_path / "serial.db")
    shutil.copy(migrated, tmp_path / "parallel.db")
    arguments = [*BLOBS, "--seeds", "0,1", "--tracking_uri"]
    serial = run_experiment([*arguments, f"sqlite:///{tmp_path}/serial.db", "--runs", "serial"]).results
    (tmp_path / "fails").touch()  # the first of the two that learns a batch removes it, and fails
    assert main(["run", *arguments, f"sqlite:///{tmp_path}/parallel.db", "--workers", "2"]) == 1
    said = capsys.readouterr().err
    (folder,) = tmp_path.glob("runs/*")
    assert "failed: RuntimeError: told to fail" in said and "[2/2] " in said and f"clstream resume runs/{folder.name}" in said
    (finished,) = (int(file.parent.name[-1]) for file in folder.glob("seed_*/finished"))
    assert f"seed {finished}: accuracy" in (folder / f"seed_{finished}" / "output.txt").read_text()
    parallel = run_experiment(["--config", str(folder / "config.yaml")], folder).results
    for one, other in zip(serial, parallel, strict=True):
        assert one.accuracy.equal(other.accuracy) and one.params == other.params
    curves = means(f"sqlite:///{tmp_path}/serial.db")
    assert len(curves["accuracy/mean"]) == 5 and curves == means(f"sqlite:///{tmp_path}/parallel.db")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--workers", "two"], "--workers takes"),
        (["--workers", "2", "--checkpoint_every", "0"], "--workers needs a run folder"),
    ],
)
def test_workers_that_can_not_be_are_refused(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--seeds", "0-1", "--track", "false", *options]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())
