"""Runs that are killed and resumed go on in their MLflow run, without a step twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from outages import AWAY, At, Killed, Resumes, Saves, Server, assert_complete, curves, lose_answers, play, soon

from clstream import Evaluated, Event, RunStarted, on
from clstream.bus import Bus
from clstream.tracking import MlflowTracker
from clstream.tracking.outbox import FILE, Outbox, count_pending, find_run


class Dies(BaseException):
    """The process ends here."""


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_once")]


@pytest.fixture(autouse=True)
def nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests count doesn't depend on how fast the machine is."""
    monkeypatch.setattr("clstream.tracking.uploader.SLOW", float("inf"))


def test_an_answer_that_is_lost_writes_nothing_twice(any_store: str, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=any_store, folder=tmp_path / "run", config="seed: 0\n")
    # the params, whose second try is 2; session 1; half of session 2; the rest of it, so that this one has to wait
    client = lose_answers(tracker, ConnectionError("no answer"), 1, 3, 5, halves=(4,))
    with pytest.warns(RuntimeWarning, match=AWAY) as said:
        result = play(tracker, At(session_4=lambda: soon(tracker)))
    assert len(said) == 1 and client.batches == 9  # sessions 3 and 4 together, 5, 6, and the end
    client = MlflowClient(any_store)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed


LAST = 1 + 6 * 13 + 4
"""The number of the last evaluation among the events: 13 a session, and 4 evaluations within them."""

CHECKPOINTS = {"at the start": 1, "after session 2": 28, "within session 3": 33, "after an evaluation within session 3": 36}


@pytest.mark.parametrize("after", CHECKPOINTS.values(), ids=list(CHECKPOINTS))
def test_a_killed_run_goes_on_without_a_step_twice(any_store: str, tmp_path: Path, undisturbed: dict, after: int) -> None:
    """It dies between sending the evaluation of session 4 and noting that it has."""
    folder, file = tmp_path / "run", tmp_path / "state"
    tracker = Killed(uri=any_store, folder=folder, config="seed: 0\n")
    lose_answers(tracker, Dies(), 5)
    begin = time.perf_counter()
    with pytest.raises(Dies):
        play(tracker, after=(Saves(tracker, after, file),))
    first = time.perf_counter() - begin
    assert count_pending(folder / FILE) == 1
    resumed = MlflowTracker(uri=any_store, folder=folder, config="seed: 0\n", allow_offline=True)
    result = play(Resumes(resumed, after, file))
    assert resumed.run_id == tracker.run_id
    client = MlflowClient(any_store)
    assert_complete(client, resumed.run_id, result)
    assert curves(client, resumed.run_id) == undisturbed
    seconds = {point.step: point.value for point in client.get_metric_history(resumed.run_id, "seconds")}
    assert seconds[5] <= seconds[6] < first + result.seconds  # the clock goes on from the checkpoint


def test_an_interrupted_run_is_running_again_and_keeps_no_error(store: str, tmp_path: Path, undisturbed: dict) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    tracker = MlflowTracker(uri=store, config="seed: 0\n")  # without a folder, the journal is not there to tell what was sent
    with pytest.raises(KeyboardInterrupt):
        play(tracker, At(session_4=interrupt), after=(Saves(tracker, 33, tmp_path / "state"),))
    client = MlflowClient(store)
    assert client.get_run(tracker.run_id).info.status == "KILLED"
    assert not (tmp_path / "runs").exists()

    class Looks:
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            tracked = client.get_run(tracker.run_id)
            assert len(event.evaluation.accuracy) < 4 or (tracked.info.status == "RUNNING" and "error" not in tracked.data.tags)

    resumed = MlflowTracker(uri=store, allow_offline=True)
    result = play(Resumes(resumed, 33, tmp_path / "state"), after=(Looks(),))
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed


def test_a_run_that_resumes_after_its_last_evaluation_has_its_pictures(store: str, tmp_path: Path, undisturbed: dict) -> None:
    tracker = Killed(uri=store, folder=tmp_path / "run", config="seed: 0\n")
    play(tracker, after=(Saves(tracker, LAST, tmp_path / "state"),))
    resumed = MlflowTracker(uri=store, folder=tmp_path / "run", config="seed: 0\n", allow_offline=True)
    result = play(Resumes(resumed, LAST, tmp_path / "state"))
    assert_complete(MlflowClient(store), tracker.run_id, result)
    assert curves(MlflowClient(store), tracker.run_id) == undisturbed


KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import outages as those
from clstream.tracking import MlflowTracker, uploader

uploader.PAUSE_RATIO = 0

class Deadly(those.Unreliable):
    def log_batch(self, run_id, metrics=(), params=()):
        super().log_batch(run_id, metrics, params)
        if self.batches == 5:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[3])
tracker = MlflowTracker(uri=sys.argv[2], folder=folder, config="seed: 0\\n")
client, experiment = tracker.connection
tracker.connection = Deadly(client, OSError(), ()), experiment
those.play(tracker, after=(those.Saves(tracker, 33, folder / "state"),))
"""


def test_a_process_that_is_killed_between_sending_and_noting(server: Server, tmp_path: Path, undisturbed: dict) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", KILLS_ITSELF, str(Path(__file__).parent), server.uri, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert count_pending(folder / FILE) == 1
    resumed = MlflowTracker(uri=server.uri, folder=folder, config="seed: 0\n", allow_offline=True)
    result = play(Resumes(resumed, 33, folder / "state"))
    client = MlflowClient(server.uri)
    assert_complete(client, resumed.run_id, result)
    assert curves(client, resumed.run_id) == undisturbed


def test_a_torn_journal_is_taken_up_where_it_is_whole(store: str, tmp_path: Path, undisturbed: dict) -> None:
    """Cut at each of many bytes, as if the process had died there while it wrote; the rest of the run writes it again."""
    whole = tmp_path / "whole"
    tracker = Killed(uri=store, folder=whole, config="seed: 0\n")
    lose_answers(tracker, Dies(), 5)
    with pytest.raises(Dies):
        play(tracker, after=(Saves(tracker, 1, tmp_path / "state"),))
    text = (whole / FILE).read_bytes()
    last = text.rstrip().rfind(b"\n") + 1
    for size in (len(text) - 1, last + 1, last):
        folder = tmp_path / f"cut_{size}"
        folder.mkdir()
        (folder / FILE).write_bytes(text[:size])
        outbox = Outbox.read(folder / FILE)
        assert outbox.last_number == 8 and outbox.run_id == tracker.run_id
        outbox.close()
        assert (folder / FILE).read_bytes() == text[:last]
    (folder / FILE).write_bytes(text[:last] + b'\x00\x00\n{"item": 9, "do": "tags", "values": {"a": "b"}}\n{"ite')
    assert count_pending(folder / FILE) == 1
    resumed = MlflowTracker(uri=store, folder=folder, config="seed: 0\n", allow_offline=True)
    result = play(Resumes(resumed, 1, tmp_path / "state"))
    client = MlflowClient(store)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed
    assert client.get_run(tracker.run_id).data.tags["a"] == "b"


def test_a_resumed_run_follows_its_server_only_where_the_run_is(
    store: str, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Killed(uri=store)
    play(tracker, after=(Saves(tracker, 33, tmp_path / "state"),))
    state = torch.load(tmp_path / "state", weights_only=True)
    shutil.copy(migrated, tmp_path / "other.db")
    other, copy = f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}/copy.db"
    with pytest.raises(ValueError, match=r"is at .*mlflow.db, not at .*other.db: leave --tracking_uri out"):
        MlflowTracker(uri=other, allow_offline=True).load_state_dict(state)
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy.db")
    moved = MlflowTracker(uri=copy, allow_offline=True)
    with pytest.warns(RuntimeWarning, match=r"was at .*mlflow.db, and goes on at .*copy.db"):
        moved.load_state_dict(state)
    assert moved.uploader.send.uri == copy
    away = MlflowTracker(uri="http://127.0.0.1:9", allow_offline=True)
    with pytest.warns(RuntimeWarning, match=r"doesn't say whether it has the MLflow run .*: it goes on at .*mlflow.db"):
        away.load_state_dict(state)
    assert away.uploader.send.uri == store
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plain = MlflowTracker(allow_offline=True)  # the store of another working folder was not asked for
    plain.load_state_dict(state)
    assert plain.uploader.send.uri == store and plain.run_id == tracker.run_id


def test_a_resumed_run_that_was_not_tracked_before_gets_a_run_of_its_own(store: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=store, folder=tmp_path / "run", allow_offline=True)

    class Late:
        bus = Bus(tracker)

        @on(Event)
        def hear(self, event: Event) -> None:
            self.bus.emit(RunStarted(event.stream, event.strategy, event.seed, True) if isinstance(event, RunStarted) else event)

    play(Late())
    tracked = MlflowClient(store).get_run(tracker.run_id)
    assert (
        tracked.info.status == "FINISHED"
        and tracked.data.params["strategy"] == "Replay"
        and "accuracy/mean" in tracked.data.metrics
    )


def test_a_new_run_in_a_folder_ends_the_one_that_was_killed_there(store: str, tmp_path: Path) -> None:
    first = Killed(uri=store, folder=tmp_path / "run")
    play(first)
    second = MlflowTracker(uri=store, folder=tmp_path / "run")
    play(second)
    client = MlflowClient(store)
    assert first.run_id != second.run_id
    assert client.get_run(first.run_id).info.status == "KILLED" and client.get_run(second.run_id).info.status == "FINISHED"
    assert find_run(first.run_id, tmp_path) == find_run(second.run_id, tmp_path) == tmp_path / "run"
    assert find_run("another", tmp_path) is None
