"""`clstream run --seeds --together`: results, run folders and MLflow are those of the seeds run one after the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from clstream.checkpoint import newest
from clstream.cli import main
from clstream.cli.experiment import run_experiment
from clstream.cli.seed_jobs import SeedJob
from clstream.cli.worker_runs import run_seeds_job
from clstream.results import Result

pytestmark = pytest.mark.slow

BLOBS = ["--stream", "blobs", "--stream.tasks", "2", "--model.hidden", "[8]", "--threads", "1", "--seeds", "0,4"]
STOPS = """
import signal
from clstream import BatchLearned, on

class Stops:
    batches = 0

    @on(BatchLearned)
    def count(self, event):
        Stops.batches += 1
        if Stops.batches == 61:
            signal.raise_signal(signal.SIGTERM)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def same(results: list[Result], singles: list[Result]) -> bool:
    return all(
        abs(float((result.accuracy - single.accuracy).abs().max())) <= 0.03 and result.params["seed"] == single.params["seed"]
        for result, single in zip(results, singles, strict=True)
    )


def test_seeds_together_are_tracked_as_seeds_are(migrated: Path, place: Path) -> None:
    shutil.copy(migrated, place / "mlflow.db")
    store = f"sqlite:///{place}/mlflow.db"
    together = run_experiment([*BLOBS, "--together", "--tracking_uri", store]).results
    apart = run_experiment([*BLOBS, "--track", "false", "--checkpoint_every", "0"]).results
    assert same(together, apart)
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    means = sorted(run.data.metrics["accuracy/mean"] for run in children)
    assert means == pytest.approx(sorted(result.average_accuracy for result in together))
    assert parent.data.metrics["accuracy/mean"] == pytest.approx(sum(means) / 2)


def test_seeds_that_are_stopped_together_go_on_together(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "stops.py").write_text(STOPS)
    options = [*BLOBS, "--strategy", "EWC", "--track", "false"]
    assert main(["run", *options, "--together", "--observers", "stops.Stops"]) == 128 + 15
    (folder,) = place.glob("runs/*")
    assert f"to go on: clstream resume runs/{folder.name}" in capsys.readouterr().err
    states = [newest(folder / f"seed_{seed}") for seed in (0, 4)]
    assert [None if state is None else state["step"] for state in states] == [31, 31]
    resumed = run_experiment(["--config", str(folder / "config.yaml")], folder).results
    assert same(resumed, run_experiment([*options, "--checkpoint_every", "0"]).results)
    again = run_experiment(["--config", str(folder / "config.yaml")], folder).results
    assert all(torch.equal(result.accuracy, earlier.accuracy) for result, earlier in zip(again, resumed, strict=True))


def test_a_worker_runs_its_seeds_together(place: Path) -> None:
    run_experiment([*BLOBS, "--track", "false", "--together", "--max_sessions", "1"])
    (folder,) = place.glob("runs/*")
    job = SeedJob((folder / "config.yaml").read_text(), 0, place / "worker", place, others=(4,))
    ended = run_seeds_job(job)
    assert {*ended} == {0, 4} and all(isinstance(result, Result) for result in ended.values())
    assert (place / "worker" / "seed_0" / "output.txt").exists() and (place / "worker" / "seed_4" / "finished").exists()


def test_what_cannot_run_together_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*BLOBS, "--strategy", "AGEM", "--together", "--track", "false", "--max_sessions", "1", "--workers", "1"]
    assert main(["run", *options]) == 0
    assert "the seeds are run each by itself, for AGEM takes its steps by a `learn` of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "3"], "--together is for several seeds"),
        (["--seeds", "3"], "--together is for several seeds"),
        (["--seeds", "0,1", "--precision", "bf16"], "--together and --precision don't go together"),
        (["--seeds", "0,1", "--compile"], "--together and --compile don't go together"),
    ],
)
def test_together_is_refused_where_it_means_nothing(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--stream", "blobs", *options, "--together"]) == 2
    assert message in capsys.readouterr().err
