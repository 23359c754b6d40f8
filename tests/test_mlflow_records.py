"""Runs in an MLflow experiment are read back as records; a store of another schema is left as it is."""

from __future__ import annotations

import math
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Replay
from mlflow.tracking import MlflowClient
from tracked_runs import Stops

import clstream.tracking.mlflow_schema
from clstream import run
from clstream.checks import example_model, example_stream
from clstream.comparison import Record, compare, read_records, record_of
from clstream.results import Result
from clstream.tracking import MlflowTracker, parent_run


@pytest.fixture(scope="module")
def tracked(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Result], str]:
    """A store with two seeds below a parent, a task-incremental run, one that failed, and a comparison's, and the results."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(migrated, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    results = []
    stream = example_stream(epochs=2)
    with parent_run("Replay on example", [0, 1], "runs", uri) as parent:
        for seed in range(2):
            tracker = MlflowTracker("runs", uri, parent=parent)
            results.append(run(Replay(example_model(), capacity=20), stream, tracker, seed=seed, measures=["nll"]))
    results.append(run(Finetune(example_model()), example_stream(scenario="task"), MlflowTracker("runs", uri), seed=7))
    with pytest.raises(RuntimeError):
        run(Finetune(example_model()), stream, MlflowTracker("runs", uri), Stops(RuntimeError("no\nmemory")), seed=8)
    MlflowClient(uri).create_run(MlflowClient(uri).get_experiment_by_name("runs").experiment_id, run_name="comparison of a, b")
    return uri, results, stream.fingerprint


@pytest.fixture(scope="module")
def records(tracked: tuple[str, list[Result], str]) -> list[Record]:
    return read_records("mlflow:runs", tracked[0])


@pytest.mark.slow
def test_each_run_is_a_record_and_parents_are_none(records: list[Record], tracked: tuple[str, list[Result], str]) -> None:
    assert [(record.strategy, record.seed) for record in records] == [
        ("Replay", 0),
        ("Replay", 1),
        ("Finetune", 7),
        ("Finetune", 8),
    ]
    for record, result in zip(records, tracked[1], strict=False):
        own = record_of(result)
        assert (record.main, record.scenario, record.params) == (own.main, own.scenario, own.params)
        finite = {name: value for name, value in own.metrics.items() if math.isfinite(value)}
        assert record.metrics == finite
        assert record.higher_is_better == {name: own.higher_is_better[name] for name in finite}
        assert record.cost.keys() == own.cost.keys() and record.cost["memory_bytes"] == own.cost["memory_bytes"]
    assert records[0].fingerprint == tracked[2] and records[0].error == "" and records[0].code


def test_the_matrix_is_rebuilt_from_the_histories(records: list[Record], tracked: tuple[str, list[Result], str]) -> None:
    for record, result in zip(records, tracked[1], strict=False):
        seen = result.taught.int().cummax(0).values.bool()  # before it is taught, MLflow has nothing of a task
        assert torch.equal(record.main_matrix.nan_to_num(9), torch.where(seen, result.main, 9))
        assert torch.equal(record.taught, result.taught) and record.sessions == result.sessions


def test_a_run_that_failed_says_why(records: list[Record]) -> None:
    assert records[3].error == "RuntimeError: no memory"


def test_they_are_compared_with_those_of_files(records: list[Record], tracked: tuple[str, list[Result], str]) -> None:
    of_results = [record_of(result, fingerprint=tracked[2]) for result in tracked[1][:2]]
    comparison = compare([*of_results, *records])
    assert "2 runs came from several sources, with the same numbers, and counted once" in comparison.notes
    assert len(comparison.records) == 3 and len(comparison.failed) == 1


def test_matrices_can_be_left_out_and_experiments_be_named_by_number(tracked: tuple[str, list[Result], str]) -> None:
    number = MlflowClient(tracked[0]).get_experiment_by_name("runs").experiment_id
    plain = read_records(f"mlflow:{number}", tracked[0], matrices=False)
    assert len(plain) == 4 and all(record.matrix == [] for record in plain)


def test_what_is_not_there_is_said_and_not_made(store: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no MLflow experiment 'nothing': there are .*made by the tests"):
        read_records("mlflow:nothing", store)
    with pytest.raises(ValueError, match="'made by the tests' has no run of a strategy on a stream"):
        read_records("mlflow:made by the tests", store)
    with pytest.raises(OSError, match=r"there is no tracking store sqlite:///.*absent\.db"):
        read_records("mlflow:x", f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(ConnectionError, match="does not answer"):
        read_records("mlflow:x", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("revision", "dropped", "message"),
    [
        ("451aebb31d03", "workspaces", "an older version of MLflow .*copy it, then run: mlflow db upgrade sqlite"),
        ("451aebb31d03", "", "an older version of MLflow"),
        ("0123456789ab", "", "a newer version of MLflow .* install that version"),
    ],
)
def test_a_store_of_another_schema_is_refused_and_left_as_it_is(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str, dropped: str, message: str
) -> None:
    """Without a table, MLflow would alter all of it, unasked."""
    monkeypatch.setattr(clstream.tracking.mlflow_schema, "ALTERING", 0.3)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        if dropped:
            database.execute(f"DROP TABLE {dropped}")
    database.close()
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(OSError, match=message):
        read_records("mlflow:runs", store)
    with pytest.raises(OSError, match=message):
        MlflowTracker("runs", store)
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_tables_that_are_just_being_made_are_waited_for(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = iter(["", "451aebb31d03"])
    real = clstream.tracking.mlflow_schema._revision
    monkeypatch.setattr(clstream.tracking.mlflow_schema, "_revision", lambda uri: next(revisions, None) or real(uri))
    assert MlflowTracker("runs", store).experiment_id
