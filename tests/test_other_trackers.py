"""CSV, TensorBoard and Weights & Biases: the points that MLflow gets, by the same names, each once, also after a resumption."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clstream.strategies import Finetune, Replay
from conftest import StopAt
from mlflow.tracking import MlflowClient

from clstream import run
from clstream.checkpoint import Checkpointer, newest
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.tracking import CsvTracker, MlflowTracker, TensorBoardTracker, WandbTracker

Curves = dict[str, list[tuple[int, float]]]


def read_csv(folder: Path) -> Curves:
    curves: Curves = defaultdict(list)
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            curves[row["metric"]].append((int(row["step"]), float(row["value"])))
    return curves


def read_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(folder: Path) -> Curves:
    curves: Curves = defaultdict(list)
    number = json.loads((folder / "wandb.json").read_text())["id"]
    for file in sorted(Path("wandb").glob(f"*-{number}/*.wandb")):
        for record in records(file):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items.get("batches", items.get("sessions"))
            for name, value in items.items():
                if name[0] != "_" and name not in ("batches", "sessions"):
                    curves[name].append((step, value))
            for item in record.summary.update:
                name = item.key or "/".join(item.nested_key)
                if name.startswith("final/"):
                    curves[name] = [(0, json.loads(item.value_json))]
    return curves


def records(file: Path) -> list[Any]:
    """Return the records of a file of wandb's, once the last one is there: another process writes them."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + 60
    while True:
        whole = []
        for content in log_records(file.read_bytes()):
            whole.append(Record())
            whole[-1].ParseFromString(content)
        if any(record.WhichOneof("record_type") == "exit" for record in whole):
            return whole
        assert time.monotonic() < until, [record.WhichOneof("record_type") for record in whole]
        time.sleep(0.05)


def log_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file of wandb's: LevelDB's log format, after a header of seven bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole one, or the last part
            yield whole
            whole = b""


def csv_tracker(folder: Path) -> CsvTracker:
    return CsvTracker(folder)


def tensorboard_tracker(folder: Path) -> TensorBoardTracker:
    pytest.importorskip("tensorboard")
    return TensorBoardTracker(folder)


def wandb_tracker(folder: Path) -> WandbTracker:
    pytest.importorskip("wandb")
    return WandbTracker(folder)


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Curves]]] = {
    "csv": (csv_tracker, read_csv),
    "tensorboard": (tensorboard_tracker, read_tensorboard),
    "wandb": (wandb_tracker, read_wandb),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-own"))


def told_by_the_clock(name: str) -> bool:
    return "seconds" in name or name == "samples_per_second" or "peak" in name


def same(curves: Curves, expected: Curves, digits: float = 1e-6) -> None:
    """Compare names and steps, and the values that are the same each time: TensorBoard's are of 32 bits."""
    assert curves.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        if not told_by_the_clock(name):
            assert [value for _, value in curves[name]] == pytest.approx([value for _, value in points], rel=digits), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_points_that_mlflow_has(store: str, tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    tracker, mlflow = make(tmp_path / "own"), MlflowTracker(uri=store)
    run(Replay(example_model(), capacity=20), example_stream(), mlflow, tracker, evaluate_every=5, measures=["nll"])
    client = MlflowClient(store)
    names = client.get_run(mlflow.run_id).data.metrics
    expected = {
        name: sorted((point.step, point.value) for point in client.get_metric_history(mlflow.run_id, name)) for name in names
    }
    assert {
        "accuracy/task_00",
        "forgetting/mean",
        "nll/seen",
        "anytime/task_02",
        "final/average_accuracy",
        "loss",
    } <= expected.keys()
    same(read(tmp_path / "own"), expected)
    assert read(tmp_path / "own")["accuracy/mean"][-1][1] == pytest.approx(expected["final/average_accuracy"][0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_has_each_point_once(tmp_path: Path, kind: str) -> None:
    """It is stopped in the third session, and its checkpoint is of the second: what was written after that comes again."""
    make, read = KINDS[kind]
    run(Finetune(example_model()), example_stream(), make(tmp_path / "whole"), evaluate_every=3)
    whole = read(tmp_path / "whole")
    checkpointer = Checkpointer(tmp_path / "checkpoints", every_batches=10, every_seconds=None)
    with pytest.raises(KeyboardInterrupt):
        run(Finetune(example_model()), example_stream(), make(tmp_path / "own"), StopAt(19), checkpointer, evaluate_every=3)
    partial = read(tmp_path / "own")
    assert [step for step, _ in partial["accuracy/mean"]] == [1, 2] and not any(name.startswith("final/") for name in partial)
    if kind == "wandb":
        time.sleep(1.1)  # its folders are called by the second
    state = newest(tmp_path / "checkpoints")
    assert state is not None and state["position"][0] == 1
    run(Finetune(example_model()), example_stream(), make(tmp_path / "own"), evaluate_every=3, resume=state)
    same(read(tmp_path / "own"), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_not_tracked_here_begins_where_it_is(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    checkpointer = Checkpointer(tmp_path / "checkpoints", every_batches=10, every_seconds=None)
    with pytest.raises(KeyboardInterrupt):
        run(Finetune(example_model()), example_stream(), StopAt(19), checkpointer)
    run(Finetune(example_model()), example_stream(), make(tmp_path / "own"), resume=newest(tmp_path / "checkpoints"))
    curves = read(tmp_path / "own")
    assert [step for step, _ in curves["accuracy/mean"]] == [2, 3] and "final/average_accuracy" in curves


def test_a_new_run_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for sessions in (3, 2):
        for make in (csv_tracker, tensorboard_tracker):
            run(Finetune(example_model()), example_stream(), make(tmp_path), max_sessions=sessions)
    for read in (read_csv, read_tensorboard):
        assert [step for step, _ in read(tmp_path)["accuracy/mean"]] == [1, 2]
    with (tmp_path / "params.csv").open(newline="") as file:
        params = dict(csv.reader(file))
    assert params["name"] == "Finetune on example, seed 0" and params["strategy"] == "Finetune"
    assert params["strategy.optimizer"] == "SGD(lr=0.1)"


@pytest.mark.slow
def test_on_the_command_line_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["run", "--stream", "blobs", "--model.hidden", "[4]", "--track", "false", "--threads", "1"]
    assert main([*given, "--observers", "csv,tensorboard", "--seeds", "0,1"]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    for seed in (0, 1):
        same(read_tensorboard(folder / f"seed_{seed}"), read_csv(folder / f"seed_{seed}"))
    assert main(["resume", str(folder)]) == 0  # it is finished: nothing is written
    assert len(read_csv(folder / "seed_0")["final/average_accuracy"]) == 1
    assert main([*given, "--observers", "csv", "--checkpoint_every", "0"]) == 2
    assert "--observers csv needs a run folder, and --checkpoint_every 0 makes none" in capsys.readouterr().err
    assert main([*given, "--observers", "tensorbord"]) == 2
    assert "not 'tensorbord': did you mean tensorboard?" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    given = ["run", "--stream", "blobs", "--model.hidden", "[4]", "--track", "false", "--threads", "1", "--experiment", "mine"]
    assert main([*given, "--observers", "wandb"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert main(["resume", str(folder)]) == 0
    assert len(read_wandb(folder / "seed_0")["accuracy/mean"]) == 5
