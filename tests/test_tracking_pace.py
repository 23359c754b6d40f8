"""Runs of short sessions: few writes, and in the end every point, once and with its own time."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from outages import Killed, Resumes, Saves, Unreliable, assert_complete, curves, lose_answers, play

from clstream import BatchLearned, Evaluated, SessionStarted, on
from clstream.tracking import MlflowTracker, parent_run
from clstream.tracking.journal import entries
from clstream.tracking.mlflow_store import sync
from clstream.tracking.outbox import FILE, count_pending

pytestmark = pytest.mark.slow

CONFIG = "seed: 0\n"


@pytest.fixture
def in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions are so short that all but the first end while the pause after the first write goes on."""
    for name in ("PAUSE_RATIO", "LONGEST_PAUSE"):
        monkeypatch.setattr(f"clstream.tracking.uploader.{name}", float("inf"))
    monkeypatch.setattr("clstream.tracking.uploader.SLOW", float("inf"))  # the first try that fails is followed by another


def items_of(folder: Path, do: str) -> list[dict]:
    return [entry for entry in entries(folder / FILE) if entry.get("do") == do]


@pytest.mark.usefixtures("in_a_moment")
def test_quick_sessions_make_few_writes_and_the_same_points(any_store: str, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=any_store, folder=tmp_path / "run", config=CONFIG)
    sent = lose_answers(tracker, OSError())
    result = play(tracker)
    assert sent.batches == 3  # the params, the first session, and all else at the end
    client = MlflowClient(any_store)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed
    metrics = items_of(tmp_path / "run", "metrics")
    assert len(metrics) == 7  # each session's own line, and the end's
    times = {(name, step): item["at"] for item in metrics for name, step, _ in item["points"]}
    written = {
        (name, point.step): point.timestamp
        for name in client.get_run(tracker.run_id).data.metrics
        for point in client.get_metric_history(tracker.run_id, name)
    }
    assert written == times
    marks = [entry["sent"] for entry in entries(tmp_path / "run" / FILE) if "sent" in entry]
    assert marks == sorted(set(marks)) and marks[-1] == len(marks)  # each line has a mark of its own


@pytest.mark.usefixtures("in_a_moment")
def test_no_write_has_more_points_than_mlflow_takes(store: str, undisturbed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for module in ("outbox", "mlflow_store"):
        monkeypatch.setattr(f"clstream.tracking.{module}.MOST_POINTS", 60)

    class Counts(Unreliable):
        def log_batch(self, run_id: str, metrics: object = (), params: object = ()) -> None:
            sizes.append(len(metrics))
            super().log_batch(run_id, metrics, params)

    tracker = MlflowTracker(uri=store, config=CONFIG)
    tracker.connection = Counts(tracker.connection[0], OSError(), ()), tracker.connection[1]
    play(tracker)
    assert max(sizes) <= 60 and sum(sizes) == sum(map(len, undisturbed.values()))
    assert curves(MlflowClient(store), tracker.run_id) == undisturbed


@pytest.mark.usefixtures("in_a_moment")
@pytest.mark.parametrize("then", ["sync", "resume"])
def test_a_killed_run_has_in_its_journal_what_waited(any_store: str, tmp_path: Path, undisturbed: dict, then: str) -> None:
    folder = tmp_path / "run"
    tracker = Killed(uri=any_store, folder=folder, config=CONFIG)
    play(tracker, after=(Saves(tracker, 60, tmp_path / "state"),))
    waits = count_pending(folder / FILE)
    assert waits == 5  # sessions 2 to 6
    client = MlflowClient(any_store)
    if then == "sync":
        assert (sync(folder / FILE).sent, sync(folder / FILE).sent) == (waits, 0)
        assert curves(client, tracker.run_id) == {
            name: points for name, points in undisturbed.items() if not name.startswith("final/")
        }
    else:
        resumed = MlflowTracker(uri=any_store, folder=folder, config=CONFIG, allow_offline=True)
        assert_complete(client, tracker.run_id, play(Resumes(resumed, 60, tmp_path / "state")))
        assert curves(client, tracker.run_id) == undisturbed


@pytest.mark.usefixtures("in_a_moment")
def test_a_batch_that_arrives_half_doubles_nothing(any_store: str, tmp_path: Path, undisturbed: dict) -> None:
    """Half of it arrives, then all of it without an answer: the run ends, and `clstream sync` sends what is missing."""
    tracker = MlflowTracker(uri=any_store, folder=tmp_path / "run", config=CONFIG)
    lose_answers(tracker, ConnectionError("no answer"), 4, halves=(3,))
    with pytest.warns(RuntimeWarning, match="to send them: clstream sync"):
        result = play(tracker)
    assert count_pending(tmp_path / "run" / FILE) > 6
    assert sync(tmp_path / "run" / FILE).left == 0
    client = MlflowClient(any_store)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed


@pytest.mark.usefixtures("in_a_moment")
def test_the_state_of_a_run_without_a_journal_is_of_what_was_sent(store: str, tmp_path: Path, undisturbed: dict) -> None:
    """So a checkpoint never says that a session is over whose points are gone with the process."""
    tracker = Killed(uri=store, config=CONFIG)
    play(tracker, after=(Saves(tracker, 60, tmp_path / "state"),))
    resumed = MlflowTracker(uri=store, config=CONFIG, allow_offline=True)
    play(Resumes(resumed, 60, tmp_path / "state"))
    assert curves(MlflowClient(store), tracker.run_id) == undisturbed


@pytest.mark.usefixtures("at_once")
def test_a_long_session_sends_what_the_short_ones_before_it_left(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clstream.tracking.tracker.LONGEST_PAUSE", 0.0)
    waiting: list[int] = []

    class Looks:
        @on(SessionStarted)
        def leave(self, event: SessionStarted) -> None:
            tracker.outbox.put("tags", values={"left": "here"})

        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            waiting.append(len(tracker.outbox.pending))

    tracker = MlflowTracker(uri=store)
    play(tracker, after=(Looks(),))
    assert waiting and not any(waiting)


@pytest.mark.usefixtures("in_a_moment")
def test_the_parent_of_quick_seeds_has_all_in_the_end(store: str) -> None:
    waiting: list[int] = []

    class Looks:
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            waiting.append(len(parent.uploader.outbox.pending))

    with parent_run("one", [0], uri=store) as parent:
        tracker = MlflowTracker(uri=store, parent=parent)
        play(tracker, after=(Looks(),))
    client = MlflowClient(store)
    assert max(waiting) > 3
    assert curves(client, parent.run_id) == curves(client, tracker.run_id)
