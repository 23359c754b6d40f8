"""The tracker, into a real MLflow store and read back through its client."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Replay
from clstream.streams import blurry_tasks, from_tensors
from mlflow.tracking import MlflowClient
from tracked_runs import Stops, curve

from clstream import BatchLearned, Event, RunStarted, SessionStarted, Strategy, TaskEnded, metrics, on, run
from clstream.checks import example_model, example_stream
from clstream.models import Mlp
from clstream.tracking import MlflowTracker
from clstream.tracking.mlflow_store import connect, tracking_uri, without_password
from clstream.tracking.run_metrics import tasks_with_curves


def test_curves_equal_the_result(store: str) -> None:
    tracker = MlflowTracker(uri=store)
    result = run(Replay(example_model(), capacity=7), example_stream(epochs=3), tracker, seed=4)
    client, run_id = MlflowClient(store), tracker.run_id
    for task in range(3):  # from the session that taught it on
        assert curve(client, run_id, f"accuracy/task_{task:02d}") == {row + 1: result.accuracy[row, task] for row in range(task, 3)}
        assert curve(client, run_id, f"task_il/accuracy/task_{task:02d}") == {
            row + 1: result.task_accuracy[row, task] for row in range(task, 3)
        }
    for row in range(3):
        rows = result.accuracy[: row + 1], result.taught[: row + 1]
        assert curve(client, run_id, "accuracy/mean")[row + 1] == metrics.average_accuracy(*rows)
        if row:  # with one task there is nothing to forget, and nothing is written
            assert curve(client, run_id, "forgetting/mean")[row + 1] == metrics.forgetting(*rows)
            assert curve(client, run_id, "transfer/backward")[row + 1] == metrics.backward_transfer(*rows)
            forward = metrics.forward_transfer(rows[0], result.baseline, rows[1])
            assert curve(client, run_id, "transfer/forward")[row + 1] == forward
    assert sorted(curve(client, run_id, "forgetting/mean")) == [2, 3]
    assert sorted(curve(client, run_id, "forgetting/task_00")) == [2, 3]
    assert sorted(curve(client, run_id, "forgetting/task_01")) == [3]
    seconds = curve(client, run_id, "seconds")
    assert 0 < seconds[1] < seconds[2] < seconds[3] <= result.seconds
    assert min(curve(client, run_id, "samples_per_second").values()) > 0


def test_params_tags_and_status(store: str) -> None:
    stream = example_stream()
    tracker = MlflowTracker(uri=store, config="seed: 4\n", tags={"why": "a test"})
    result = run(Replay(example_model(), capacity=7), stream, tracker, seed=4)
    tracked = MlflowClient(store).get_run(tracker.run_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "Replay on example, seed 4"
    assert tracked.data.params == {key: str(value) for key, value in result.params.items()}
    assert {"strategy": "Replay", "strategy.capacity": "7", "model": "Mlp", "model.hidden": "[32]", "seed": "4"}.items() <= (
        tracked.data.params.items()
    )
    assert tracked.data.tags["data_fingerprint"] == stream.fingerprint
    assert tracked.data.tags["torch"] == torch.__version__ and tracked.data.tags["why"] == "a test"


def test_loss_is_the_mean_over_the_session(store: str) -> None:
    losses: list[float] = []

    class Watch:
        @on(BatchLearned)
        def see(self, event: BatchLearned) -> None:
            losses.append(float(event.loss))

    tracker = MlflowTracker(uri=store)
    run(Finetune(example_model()), example_stream(batch_size=10), tracker, Watch())
    means = curve(MlflowClient(store), tracker.run_id, "loss")
    assert means == {step: pytest.approx(sum(losses[6 * (step - 1) : 6 * step]) / 6) for step in (1, 2, 3)}


@pytest.mark.slow
def test_artifacts_hold_the_matrix_and_pictures(store: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=store, config="seed: 0\n")
    result = run(Finetune(example_model()), example_stream(epochs=3), tracker)
    client = MlflowClient(store)
    names = {artifact.path for artifact in client.list_artifacts(tracker.run_id)}
    assert names == {
        "accuracy.csv", "accuracy.png", "task_il_accuracy.csv", "task_il_accuracy.png", "forgetting_curves.png", "config.yaml",
        "stream.txt", "images",
    }  # fmt: skip
    text = Path(client.download_artifacts(tracker.run_id, "accuracy.csv", str(tmp_path))).read_text(encoding="utf-8").splitlines()
    assert text[0] == "sessions_finished,task_0,task_1,task_2,mean"
    rows = torch.tensor([[float(value) for value in line.split(",")] for line in text[1:]], dtype=torch.float64)
    assert torch.equal(rows[:, 1:4], result.accuracy)  # untaught tasks too: forward transfer can be had from it
    assert rows[:, 0].tolist() == [1, 2, 3] and rows[:, 4].tolist() == metrics.seen_averages(result.accuracy).tolist()
    for name in ("accuracy.png", "forgetting_curves.png"):
        assert Path(client.download_artifacts(tracker.run_id, name, str(tmp_path))).read_bytes().startswith(b"\x89PNG")


def test_probes_are_curves_over_batches(store: str) -> None:
    tracker = MlflowTracker(uri=store)
    result = run(Finetune(example_model()), example_stream(batch_size=10), tracker, evaluate_every=4)
    client = MlflowClient(store)
    for task in range(3):
        expected = dict(zip(result.probe_steps, result.probes[:, task].tolist(), strict=True))
        assert curve(client, tracker.run_id, f"anytime/task_{task:02d}") == expected
    final = client.get_run(tracker.run_id).data.metrics
    assert final["final/min_accuracy"] == metrics.min_accuracy(result.probes, result.probe_taught)
    assert final["final/worst_case_accuracy"] == metrics.worst_case_accuracy(result.probes, result.probe_taught)
    assert final["final/anytime_average_accuracy"] == metrics.anytime_average_accuracy(result.probes, result.probe_taught)


@pytest.mark.slow
def test_of_many_tasks_some_have_curves_and_all_are_in_the_csv(store: str, tmp_path: Path) -> None:
    assert tasks_with_curves(100) == list(range(100)) and tasks_with_curves(3) == [0, 1, 2]
    assert [len(set(tasks_with_curves(tasks))) for tasks in (101, 1000)] == [20, 20]
    y = torch.arange(120)
    stream = from_tensors(x := torch.eye(120), y, x, y, tasks=120)
    tracker = MlflowTracker(uri=store)
    result = run(Finetune(Mlp(120, 120, hidden=(8,))), stream, tracker, max_sessions=2, evaluate_every=1, evaluate_at="end")
    client = MlflowClient(store)
    names = set(client.get_run(tracker.run_id).data.metrics)
    some = {f"{task:03d}" for task in tasks_with_curves(120)}
    assert {"000", "119"} <= some and {name[-3:] for name in names if name.startswith("anytime/task_")} == some
    assert {name for name in names if name.startswith("accuracy/")} == {
        "accuracy/task_000",
        "accuracy/mean",
        "accuracy/seen",
    }  # of those that began
    for name, matrix, steps in (("accuracy", result.accuracy, (2,)), ("anytime", result.probes, (1, 2))):
        rows = Path(client.download_artifacts(tracker.run_id, f"{name}.csv", str(tmp_path))).read_text().splitlines()
        values = torch.tensor([[float(value) for value in row.split(",")] for row in rows[1:]], dtype=torch.float64)
        assert rows[0].startswith("batches_learned,task_0," if name == "anytime" else "sessions_finished,task_0,")
        assert tuple(values[:, 0].tolist()) == steps and torch.equal(values[:, 1:-1], matrix)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("the disk is on fire"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_that_ends_early_keeps_what_was_measured(store: str, error: BaseException, status: str) -> None:
    tracker = MlflowTracker(uri=store)
    with pytest.raises(type(error)):
        run(Finetune(example_model()), example_stream(), tracker, Stops(error))
    client = MlflowClient(store)
    tracked = client.get_run(tracker.run_id)
    assert tracked.info.status == status
    assert tracked.data.tags["error"] == f"{type(error).__name__}: {error}"
    assert list(curve(client, tracker.run_id, "accuracy/mean")) == [1]
    assert not [name for name in tracked.data.metrics if name.startswith("final/")]  # it may be resumed, and has these once
    names = {artifact.path for artifact in client.list_artifacts(tracker.run_id)}
    assert {"error.txt", "accuracy.csv", "forgetting_curves.png"} <= names


def test_a_non_finite_loss_marks_the_run_failed(store: str) -> None:
    class Explodes(Strategy):
        @on(SessionStarted)
        def explode(self, event: SessionStarted) -> None:
            if event.session.index == 1:
                self.model.head.weight.data.fill_(float("nan"))

    tracker = MlflowTracker(uri=store)
    with pytest.raises(FloatingPointError, match="in task 1, session 1, epoch 0, batch 0"):
        run(Explodes(example_model()), example_stream(), tracker)
    tracked = MlflowClient(store).get_run(tracker.run_id)
    assert tracked.info.status == "FAILED" and "FloatingPointError" in tracked.data.tags["error"]
    assert "accuracy/mean" in tracked.data.metrics


def test_events_of_a_strategys_own_are_counted(store: str) -> None:
    class Consolidated(Event):
        pass

    class Noting(Strategy):
        @on(TaskEnded)
        def note(self, event: TaskEnded) -> None:
            self.emit(Consolidated())

    tracker = MlflowTracker(uri=store)
    run(Noting(example_model()), example_stream(), tracker)
    assert curve(MlflowClient(store), tracker.run_id, "events/Consolidated") == {1: 1, 2: 2, 3: 3}


@pytest.mark.slow
@pytest.mark.parametrize("boundaries", [True, False])
def test_a_task_that_comes_again_has_its_curve_from_the_first_time_on(store: str, boundaries: bool) -> None:
    stream = replace(example_stream(), schedule=(1, 0, 1, 2), boundaries=boundaries)
    tracker = MlflowTracker(uri=store)
    result = run(Finetune(example_model()), stream, tracker)
    for task, first in ((0, 1), (1, 0), (2, 3)):
        expected = {row + 1: result.accuracy[row, task] for row in range(first, 4)}
        assert curve(MlflowClient(store), tracker.run_id, f"accuracy/task_{task:02d}") == expected


@pytest.mark.slow
def test_a_task_that_is_mixed_into_the_sessions_of_others_has_its_curve_from_its_first_sample_on(store: str) -> None:
    stream = blurry_tasks(disjoint=0.0, blur=0.1, batch_size=64)
    tracker = MlflowTracker(uri=store)
    result = run(Finetune(Mlp(stream.input_shape, stream.classes, (8,))), stream, tracker)
    begun = torch.stack([stream.mix(session) > 0 for session in range(len(stream))]).int().cummax(0).values.bool()
    assert not torch.equal(begun, result.taught.int().cummax(0).values.bool())  # else this says nothing
    for task in range(5):
        expected = {row + 1: result.accuracy[row, task] for row in range(len(stream)) if begun[row, task]}
        assert curve(MlflowClient(store), tracker.run_id, f"accuracy/task_{task:02d}") == expected


@pytest.mark.slow
def test_two_trackers_do_not_share_a_run(store: str) -> None:
    first, second = MlflowTracker(uri=store), MlflowTracker(uri=store)
    run(Finetune(example_model()), example_stream(), first, second)
    assert first.run_id != second.run_id
    client = MlflowClient(store)
    assert curve(client, first.run_id, "accuracy/mean") == curve(client, second.run_id, "accuracy/mean")


def test_a_server_that_does_not_answer_is_said_at_once() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match=r"does not answer .* start it, or choose another"):
            MlflowTracker(uri=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert time.monotonic() - begin < 60  # with the patience of MLflow's client it is minutes


def test_a_store_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"can't be written: the folder .* is missing or read-only"):
        MlflowTracker(uri=f"sqlite:///{tmp_path}/missing/mlflow.db")


def test_the_file_of_a_store_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("sqlite:///sub/all.db") == f"sqlite:///{tmp_path}/sub/all.db"
    assert tracking_uri("mlruns") == f"{tmp_path}/mlruns"
    assert tracking_uri("http://me:secret@host:5000/x") == "http://me:secret@host:5000/x"
    assert without_password("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert without_password(tracking_uri()) == tracking_uri()


def test_an_experiment_is_made_once(store: str) -> None:
    _, first = connect(store, "mine")
    _, second = connect(store, "mine")
    assert first == second


@pytest.mark.slow
def test_a_tracker_serves_one_run_after_another(store: str) -> None:
    """Each gets an MLflow run of its own, and a failure at the start of the second leaves the first as it was."""

    class FailsAtOnce(Strategy):
        @on(RunStarted)
        def fail(self, event: RunStarted) -> None:
            raise RuntimeError("not today")

    tracker = MlflowTracker(uri=store)
    run(Finetune(example_model()), example_stream(batch_size=10), tracker, evaluate_every=4)
    first = tracker.run_id
    with pytest.raises(RuntimeError):
        run(FailsAtOnce(example_model()), example_stream(), tracker)
    client = MlflowClient(store)
    assert client.get_run(first).info.status == "FINISHED" and "error" not in client.get_run(first).data.tags
    run(Finetune(example_model()), example_stream(batch_size=10), tracker, evaluate_every=4)
    assert tracker.run_id != first
    assert curve(client, tracker.run_id, "anytime/task_00") == curve(client, first, "anytime/task_00")


def test_probes_since_the_last_session_are_kept_when_the_run_fails(store: str) -> None:
    class StopsWithin:
        @on(BatchLearned)
        def stop(self, event: BatchLearned) -> None:
            if event.batch.index == 5:
                raise KeyboardInterrupt

    tracker = MlflowTracker(uri=store)
    with pytest.raises(KeyboardInterrupt):
        run(Finetune(example_model()), example_stream(batch_size=10), tracker, StopsWithin(), evaluate_every=2)
    assert list(curve(MlflowClient(store), tracker.run_id, "anytime/task_00")) == [2, 4]


@pytest.mark.slow
def test_two_processes_may_make_the_store_at_once(tmp_path: Path) -> None:
    code = "import sys; from clstream.tracking.mlflow_store import connect; print(connect(sys.argv[1])[1])"
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=600)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""


@pytest.mark.slow
def test_costs_are_curves_of_what_was_spent_so_far(store: str) -> None:
    tracker = MlflowTracker(uri=store)
    cost = run(Replay(example_model(), capacity=20), example_stream(), tracker).cost
    client = MlflowClient(store)
    for name in ("learning_flops", "evaluating_flops", "flops"):
        assert list(curve(client, tracker.run_id, f"cost/{name}").values()) == getattr(cost, name).cumsum(0).tolist()
    assert list(curve(client, tracker.run_id, "cost/memory_bytes").values()) == cost.memory_bytes.tolist()
    assert list(curve(client, tracker.run_id, "cost/parameters").values()) == cost.parameters.tolist()
    assert list(curve(client, tracker.run_id, "cost/learning_seconds")) == [1, 2, 3]
    final = client.get_run(tracker.run_id).data.metrics
    assert final["final/flops"] == cost.total["flops"] and final["final/memory_bytes"] == cost.total["memory_bytes"]
