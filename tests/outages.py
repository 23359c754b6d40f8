"""Servers that go away, and what is to be in MLflow when they are back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch
from clstream.strategies import Replay
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from clstream import Event, Result, RunEnded, RunStarted, SessionEnded, on, run
from clstream.bus import Bus
from clstream.checks import example_model, example_stream
from clstream.tracking import MlflowTracker

AWAY = r"doesn't take what the run writes \(.*\): the run goes on, and keeps it in .*tracking.jsonl"


class Server:
    """An MLflow server on a SQLite file or another store, with artifacts in a folder; a process group of its own."""

    def __init__(self, folder: Path, store: str = "") -> None:
        self.folder, self.store = folder, store or f"sqlite:///{folder}/mlflow.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        store = ["--backend-store-uri", self.store, "--artifacts-destination", f"{self.folder}/artifacts"]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1", *store]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # eight processes that nothing here asks
            )  # fmt: skip
        until = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < until and self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class At:
    """Does something before the evaluations that follow these sessions, counted from 1."""

    def __init__(self, **what: object) -> None:
        self.what, self.sessions = what, 0

    @on(SessionEnded)
    def act(self, event: SessionEnded) -> None:
        self.sessions += 1
        call = self.what.get(f"session_{self.sessions}")
        if call:
            call()


def stream(sessions: int = 6):
    return example_stream(schedule=tuple(number % 3 for number in range(sessions)), batch_size=10)


def curves(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return every point of every metric, in order: one that was written twice is there twice. Clock readings are 0."""
    points_of = {}
    for name in client.get_run(run_id).data.metrics:
        points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        points_of[name] = [(step, 0.0) for step, _ in points] if "second" in name or "peak" in name else points
    return points_of


def expected(store: Path, seed: int = 0, sessions: int = 6, evaluate_every: int | None = 4) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run that nothing disturbs."""
    uri = f"sqlite:///{store}"
    tracker = MlflowTracker(uri=uri)
    run(Replay(example_model(), capacity=9), stream(sessions), tracker, seed=seed, evaluate_every=evaluate_every)
    return curves(MlflowClient(uri), tracker.run_id)


def play(tracker: object, *before: object, after: tuple[object, ...] = ()) -> Result:
    return run(Replay(example_model(), capacity=9), stream(), *before, tracker, *after, evaluate_every=4)


ARTIFACTS = {
    "accuracy.csv", "accuracy.png", "task_il_accuracy.csv", "task_il_accuracy.png", "forgetting_curves.png", "config.yaml",
    "stream.txt",
}  # fmt: skip


def assert_complete(client: MlflowClient, run_id: str, result: Result) -> None:
    tracked = client.get_run(run_id)
    assert tracked.info.status == "FINISHED" and tracked.info.end_time >= tracked.info.start_time
    assert tracked.data.params == {key: str(value) for key, value in result.params.items()}
    assert "error" not in tracked.data.tags
    assert {artifact.path for artifact in client.list_artifacts(run_id)} >= ARTIFACTS
    rows = Path(client.download_artifacts(run_id, "accuracy.csv")).read_text(encoding="utf-8").split()
    assert len(rows) == 7


def soon(tracker: MlflowTracker) -> None:
    """Have the next evaluation try again, as if the pause were over."""
    tracker.uploader.next_try = 0.0


class Saves:
    """Keeps the state of a tracker after the n-th event, as a checkpoint would."""

    def __init__(self, tracker: MlflowTracker, after: int, file: Path) -> None:
        self.tracker, self.after, self.file, self.heard = tracker, after, file, 0

    @on(Event)
    def count(self, event: Event) -> None:
        self.heard += 1
        if self.heard == self.after:
            torch.save(self.tracker.state_dict(), self.file)


class Resumes:
    """Plays to an observer what it would hear in a run that goes on after the n-th event of an earlier one."""

    def __init__(self, observer: object, after: int, file: Path) -> None:
        self.observer, self.after, self.file, self.heard = observer, after, file, 0
        self.bus = Bus(observer)

    @on(Event)
    def hear(self, event: Event) -> None:
        self.heard += 1
        if isinstance(event, RunStarted):
            self.bus.emit(RunStarted(event.stream, event.strategy, event.seed, True, event.run))
            self.observer.load_state_dict(torch.load(self.file, weights_only=True))
        if self.heard > self.after:
            self.bus.emit(event)


class Killed(MlflowTracker):
    """What a killed process leaves behind: its run never ended."""

    def close(self, event: RunEnded) -> None:
        self.uploader.outbox.close()


class Unreliable:
    """A real client some of whose answers are lost: it raises after the write has arrived, or after half of it has."""

    def __init__(self, client: MlflowClient, error: BaseException, lost: tuple[int, ...], halves: tuple[int, ...] = ()) -> None:
        self.client, self.error, self.lost, self.halves, self.batches = client, error, lost, halves, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()) -> None:
        self.batches += 1
        arrived = metrics[::2] if self.batches in self.halves else metrics
        self.client.log_batch(run_id, metrics=arrived, params=params)
        if self.batches in self.lost + self.halves:
            raise self.error


def lose_answers(tracker: MlflowTracker, error: BaseException, *lost: int, halves: tuple[int, ...] = ()) -> Unreliable:
    """Have the client of a tracker lose the answers to some of its batches, counted from 1; of `halves` half arrives."""
    client, experiment = tracker.connection
    unreliable = Unreliable(client, error, lost, halves)
    tracker.connection = unreliable, experiment
    return unreliable
