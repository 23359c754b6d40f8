"""When a run evaluates, and about which tasks it asks: `evaluate_at` and `evaluate_on`."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.strategies import Finetune, Replay
from mlflow.tracking import MlflowClient
from tracked_runs import curve

from clstream import Evaluated, Event, metrics, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import SESSION, Checkpoints, Trace
from clstream.cli import main
from clstream.engine import OtherRunError
from clstream.evaluation import evaluate
from clstream.figures import accuracy_matrix, forgetting_curves
from clstream.results import Evaluation, Result
from clstream.strategy import Strategy
from clstream.tracking import EventLog, MlflowTracker
from clstream.tracking.event_log import read

SCHEDULE = (0, 0, 1, 0, 2, 2)
WORDS = {
    "tasks": f"R(T({SESSION})+tV)*r",
    "end": f"R(T({SESSION})+t)*Vr",
    "end, hidden": f"R({SESSION})+Vr",
}


def play(*observers: object, **options: Any) -> Result:
    return run(Finetune(example_model()), example_stream(SCHEDULE, epochs=2), *observers, **options)


class Kept:
    """Keeps each evaluation."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []

    @on(Evaluated)
    def keep(self, event: Evaluated) -> None:
        self.evaluations.append(event.evaluation)


@pytest.mark.parametrize("way", WORDS)
def test_an_evaluation_comes_only_where_the_grammar_says(way: str) -> None:
    trace, hidden = Trace(), "hidden" in way
    stream = example_stream(SCHEDULE, epochs=2, boundaries=not hidden)
    run(Strategy(example_model()), stream, trace, evaluate_at=way.split(",")[0])
    assert re.fullmatch(WORDS[way], trace.word)
    assert trace.word.count("V") == (4 if way == "tasks" else 1) and trace.word.count("S") == 6


def test_rows_that_are_left_out_change_nothing_else() -> None:
    all_rows, tasks, end = (play(evaluate_at=when) for when in ("sessions", "tasks", "end"))
    assert all_rows.sessions == (1, 2, 3, 4, 5, 6) and tasks.sessions == (2, 3, 4, 6) and end.sessions == (6,)
    for fewer in (tasks, end):
        kept = [number - 1 for number in fewer.sessions]
        assert torch.equal(fewer.accuracy, all_rows.accuracy[kept])
        assert torch.equal(fewer.task_accuracy, all_rows.task_accuracy[kept])
        assert torch.equal(fewer.probes, fewer.accuracy) and torch.equal(fewer.probe_taught, fewer.taught)
        assert torch.equal(fewer.baseline, all_rows.baseline)
    assert tasks.taught.int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert end.taught.tolist() == [[True, True, True]]
    assert tasks.average_accuracy == end.average_accuracy == all_rows.average_accuracy
    assert math.isnan(end.forgetting) and end.to_frame().index.tolist() == [6]
    assert [line.split()[0] for line in repr(tasks).splitlines()[2:]] == ["2", "3", "4", "6"]


def test_what_was_taught_since_a_probe_is_of_the_batches_between() -> None:
    """Sessions of 6, 12, 12 and 6 batches: the probes at 18 and 30 come with the end of a session, those at 10 and 20 within."""
    kept = Kept()
    stream = example_stream((0, 1, 2, 0), epochs=2, batch_size=10)
    result = run(Finetune(example_model()), stream, kept, evaluate_at="end", evaluate_every=18)
    assert result.probe_steps == (18, 36) and result.sessions == (4,)
    assert result.probe_taught.int().tolist() == [[1, 1, 0], [1, 0, 1]] and result.taught.all()
    assert [evaluation.sessions_finished for evaluation in kept.evaluations] == [1, 3, 4]
    between = run(Finetune(example_model()), stream, evaluate_at="end", evaluate_every=10)
    assert between.probe_steps == (10, 20, 30, 36)
    assert between.probe_taught.int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]]


def test_only_tasks_that_were_taught_are_asked_about() -> None:
    asked: list[set[int]] = []

    class Asked(Strategy):
        def predict(self, x: torch.Tensor, task: Any = None) -> torch.Tensor:
            if task is not None:
                asked.append({task.id})
            return super().predict(x, task)

    run(Asked(example_model()), example_stream(), evaluate_on="seen")
    assert [task for some in asked for task in some] == [0, 0, 1, 0, 1, 2]
    whole, seen = play(evaluate_every=7), play(evaluate_every=7, evaluate_on="seen")
    for name, marks in (("accuracy", "taught"), ("task_accuracy", "taught"), ("probes", "probe_taught")):
        by_then = getattr(seen, marks).int().cummax(0).values.bool()
        assert torch.equal(getattr(seen, name).isnan(), ~by_then)
        assert torch.equal(getattr(seen, name)[by_then], getattr(whole, name)[by_then])
    assert seen.baseline.isnan().all() and seen.task_baseline.isnan().all()
    for metric in (metrics.average_incremental_accuracy, metrics.learning_accuracy, metrics.backward_transfer):
        assert metric(seen.main, seen.taught) == metric(whole.main, whole.taught)
    assert math.isnan(metrics.forward_transfer(seen.accuracy, seen.baseline, seen.taught))
    assert not math.isnan(seen.forgetting)


def test_an_answer_that_is_nan_still_ends_the_run() -> None:
    class Breaks(Strategy):
        @on(Event)
        def break_weights(self, event: Event) -> None:
            if type(event).__name__ == "TaskEnded":
                self.model.head.weight.data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match="answers test samples of example with NaN"):
        run(Breaks(example_model()), example_stream(), evaluate_on="seen")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evaluate_at": "tasks"},
            "and evaluate_at='tasks' would tell of them: take 'sessions' or 'end'",
        ),
        ({"evaluate_on": "seen"}, "example hides its boundaries, and evaluate_on='seen' would tell of them: take 'all'"),
        ({"evaluate_at": "task"}, "evaluate_at must be one of sessions, tasks, end, not 'task': did you mean tasks?"),
        ({"evaluate_on": None}, "evaluate_on must be one of all, seen, not None"),
    ],
)
def test_what_would_tell_of_tasks_or_is_no_choice_is_refused_before_the_run(options: dict[str, Any], message: str) -> None:
    trace = Trace()
    with pytest.raises(ValueError, match=re.escape(message)):
        run(Strategy(example_model()), example_stream(boundaries=False), trace, **options)
    assert not trace.word


@pytest.mark.parametrize(("when", "about"), itertools.product(("tasks", "end"), ("all", "seen")))
def test_it_resumes_exactly(when: str, about: str) -> None:
    def go_on(observer: Checkpoints, state: Any = None) -> Result:
        strategy = Replay(example_model(), capacity=9)
        options = {"evaluate_every": 7, "evaluate_at": when, "evaluate_on": about}
        return run(strategy, example_stream(SCHEDULE), observer, resume=state, **options)

    whole = Checkpoints(step=5)
    expected = go_on(whole)
    for number in range(len(whole.written) - 1):
        rest = Checkpoints(every=0)
        result = go_on(rest, whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None
        assert torch.equal(result.accuracy.nan_to_num(-1), expected.accuracy.nan_to_num(-1))
        assert (result.sessions, result.probe_steps) == (expected.sessions, expected.probe_steps)
        assert torch.equal(result.taught, expected.taught) and torch.equal(result.probe_taught, expected.probe_taught)


@pytest.mark.parametrize(("name", "before", "value"), [("evaluate_at", "sessions", "end"), ("evaluate_on", "all", "seen")])
def test_they_are_of_a_runs_identity(name: str, before: str, value: str) -> None:
    kept = Checkpoints()
    play(kept)
    with pytest.raises(OtherRunError, match=f"{name} was '{before}', now it is '{value}'"):
        play(resume=kept.load(1), **{name: value})


@pytest.mark.slow
def test_the_tracker_and_the_log_keep_to_sessions_finished(store: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=store)
    result = play(tracker, EventLog(tmp_path), evaluate_at="tasks", evaluate_on="seen")
    client, run_id = MlflowClient(store), tracker.run_id
    assert run_id is not None
    means = metrics.seen_averages(result.accuracy, result.taught).tolist()
    assert curve(client, run_id, "accuracy/mean") == dict(zip((2, 3, 4, 6), means, strict=True))
    assert curve(client, run_id, "accuracy/task_01") == dict(zip((3, 4, 6), result.accuracy[1:, 1].tolist(), strict=True))
    assert list(curve(client, run_id, "accuracy/task_02")) == [6]
    text = Path(client.download_artifacts(run_id, "accuracy.csv", str(tmp_path))).read_text().splitlines()
    assert [line.split(",")[0] for line in text] == ["sessions_finished", "2", "3", "4", "6"]
    assert text[1].split(",")[2:4] == ["nan", "nan"]
    entries = [entry for entry in read(tmp_path) if entry["event"] == "Evaluated"]
    assert [entry["sessions"] for entry in entries] == [2, 3, 4, 6]


def test_pictures_leave_out_what_was_not_asked() -> None:
    result = play(evaluate_at="tasks", evaluate_on="seen")
    lines = forgetting_curves(result.main, result.taught, sessions=result.sessions).axes[0].lines
    assert lines[0].get_xdata().tolist() == [2, 3, 4, 6] and lines[1].get_xdata().tolist() == [3, 4, 6]
    assert all(math.isfinite(value) for line in lines for value in line.get_ydata())
    figure = accuracy_matrix(result.accuracy, sessions=result.sessions)
    assert sum(1 for text in figure.axes[0].texts) == int((~result.accuracy.isnan()).sum())
    figure.draw_without_rendering()
    assert "3" in [label.get_text() for label in figure.axes[0].get_yticklabels()]  # the row after session 3


@pytest.mark.slow
def test_the_command_line_has_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["run", "--strategy", "Finetune", "--stream", "blobs", "--track", "false", "--threads", "1"]
    assert main([*options, "--evaluate_at", "tasks", "--evaluate_on", "seen"]) == 0
    assert "Finetune on blobs" in capsys.readouterr().out
    assert main([*options, "--evaluate_at", "task"]) == 2
    assert "--evaluate_at" in capsys.readouterr().err
    assert main([*options, "--stream.boundaries", "false", "--evaluate_on", "seen"]) == 1
    assert "hides its boundaries, and evaluate_on='seen' would tell of them" in capsys.readouterr().err


def test_questions_about_some_tasks_leave_the_others_nan() -> None:
    from clstream.evaluation import Questions

    strategy, stream = Finetune(example_model()), example_stream()
    whole = evaluate(strategy, stream)
    some = evaluate(strategy, stream, Questions(strategy, stream, torch.tensor([False, True, True])))
    for row, part in zip(whole, some, strict=True):
        assert part.isnan().tolist() == [True, False, False] and torch.equal(row[1:], part[1:])
