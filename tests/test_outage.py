"""Tracking on a real MLflow server that is killed, restarted, hung, or never comes back; and runs that are killed themselves."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Replay
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from clstream import Evaluated, Event, Result, RunEnded, RunStarted, SessionEnded, SessionStarted, on, run
from clstream.bus import Bus
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.tracking import MlflowTracker, parent_run
from clstream.tracking.journal import entries
from clstream.tracking.mlflow_store import sync
from clstream.tracking.outbox import FILE, Outbox, count_pending, find_run

AWAY = r"doesn't take what the run writes \(.*\): the run goes on, and keeps it in .*tracking.jsonl"
STILL_AWAY = r"writes wait in .*; to send them: clstream sync"


NOBODY = "http://127.0.0.1:9"
"""Where nobody listens."""


class Server:
    """An MLflow server on a SQLite file, with artifacts in a folder beside it; a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", f"{self.folder}/artifacts"]
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


@pytest.fixture(scope="module")
def shared(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(shared: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, up, and a working folder of the test's own."""
    shared.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine is no outage
    return shared


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
    """Return every point of every metric, in order: one that was written twice is there twice. Clock readings are left out."""
    found = {}
    for name in client.get_run(run_id).data.metrics:
        points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        found[name] = [(step, 0.0) for step, _ in points] if "second" in name else points
    return found


def expected(store: Path, seed: int = 0, sessions: int = 6, evaluate_every: int | None = 4) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run that nothing disturbs."""
    uri = f"sqlite:///{store}"
    tracker = MlflowTracker(uri=uri)
    run(Replay(example_model(), capacity=9), stream(sessions), tracker, seed=seed, evaluate_every=evaluate_every)
    return curves(MlflowClient(uri), tracker.run_id)


@pytest.fixture(scope="module")
def undisturbed(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float]]]:
    file = tmp_path_factory.mktemp("undisturbed") / "mlflow.db"
    shutil.copy(migrated, file)
    before = Path.cwd()
    os.chdir(file.parent)
    found = expected(file)
    os.chdir(before)
    assert len(found["accuracy/mean"]) == 6 and len(found["anytime/task_00"]) == 9 and len(found["final/min_accuracy"]) == 1
    return found


def play(tracker: object, *before: object, after: tuple[object, ...] = ()) -> Result:
    return run(Replay(example_model(), capacity=9), stream(), *before, tracker, *after, evaluate_every=4)


ARTIFACTS = {
    "accuracy.csv", "accuracy.png", "task_il_accuracy.csv", "task_il_accuracy.png", "forgetting_curves.png", "config.yaml",
    "stream.txt",
}  # fmt: skip


def assert_complete(client: MlflowClient, run_id: str, result: Result) -> None:
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.end_time >= found.info.start_time
    assert found.data.params == {key: str(value) for key, value in result.params.items()}
    assert "error" not in found.data.tags
    assert {artifact.path for artifact in client.list_artifacts(run_id)} >= ARTIFACTS
    rows = Path(client.download_artifacts(run_id, "accuracy.csv")).read_text(encoding="utf-8").split()
    assert len(rows) == 7


def soon(tracker: MlflowTracker) -> None:
    """Have the next evaluation try again, as if the pause were over."""
    tracker.uploader.next_try = 0.0


def test_a_server_that_is_killed_and_restarted_has_every_step_once(server: Server, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=server.uri, folder=tmp_path / "run", config="seed: 0\n")

    def back() -> None:
        server.start()
        soon(tracker)

    with pytest.warns(RuntimeWarning, match=AWAY) as said:
        result = play(tracker, At(session_2=server.kill, session_5=back))
    assert len(said) == 1
    client = MlflowClient(server.uri)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed
    assert count_pending(tmp_path / "run" / FILE) == 0


def test_a_server_that_never_comes_back_gets_all_from_sync(
    server: Server, tmp_path: Path, undisturbed: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MlflowTracker(uri=server.uri, config="seed: 0\n")  # without a folder, it makes one when it has to
    with pytest.warns(RuntimeWarning) as said:
        result = play(tracker, At(session_3=server.kill))
    assert len(said) == 2
    assert said[0].message.args[0].endswith("until it can be sent") and "clstream sync" in said[1].message.args[0]
    folder = tmp_path / "runs" / tracker.run_id
    assert find_run(tracker.run_id, tmp_path / "runs") == folder
    left = count_pending(folder / FILE)
    assert left > 3
    assert main(["sync", str(folder)]) == 1
    assert "could not be sent" in capsys.readouterr().out
    assert count_pending(folder / FILE) == left
    server.start()
    assert main(["sync", tracker.run_id]) == 0
    assert f"{left} writes sent" in capsys.readouterr().out
    client = MlflowClient(server.uri)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed
    assert main(["sync"]) == 0
    assert "nothing to send" in capsys.readouterr().out
    assert curves(client, tracker.run_id) == undisturbed


def test_a_run_that_starts_while_the_server_is_away_is_created_later(server: Server, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=NOBODY, folder=tmp_path / "run", config="seed: 0\n", allow_offline=True)
    with pytest.warns(RuntimeWarning):
        result = play(tracker)
    assert tracker.run_id is None
    with pytest.raises(ConnectionError, match="does not answer"):
        MlflowTracker(uri=NOBODY)
    done = sync(tmp_path / "run" / FILE, server.uri)
    assert (done.left, done.error, done.ended) == (0, "", True)
    client = MlflowClient(server.uri)
    assert_complete(client, done.run_id, result)
    assert curves(client, done.run_id) == undisturbed


def pending(server: socket.socket) -> Iterator[str]:
    """Yield the address of each client that a server has not heard yet."""
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, address = server.accept()
            connection.close()
            yield str(address)


def test_a_server_that_hangs_costs_a_timeout_or_two(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(uri=server.uri, folder=tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as hangs:

        def hang() -> None:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            tracker.uploader.send.connection = MlflowClient(f"http://127.0.0.1:{hangs.getsockname()[1]}"), "0"

        with pytest.warns(RuntimeWarning) as said:
            play(tracker, At(session_2=hang))
        tries = list(pending(hangs))
    assert len(tries) == 2  # when it began to hang, and at the end; of a second each
    assert len(said) == 2 and "read timeout=1" in said[0].message.args[0]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert sync(tmp_path / "run" / FILE).left == 0


def test_what_a_server_refuses_is_kept(server: Server, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=server.uri, folder=tmp_path / "run", config="seed: 0\n")
    client = MlflowClient(server.uri)

    def restore() -> None:
        client.restore_run(tracker.run_id)
        soon(tracker)

    with pytest.warns(RuntimeWarning, match=AWAY) as said:
        result = play(tracker, At(session_2=lambda: client.delete_run(tracker.run_id), session_4=restore))
    assert len(said) == 1
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed


class Dies(BaseException):
    """The process ends here."""


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
    client, experiment = tracker.connection
    unreliable = Unreliable(client, error, lost, halves)
    tracker.connection = unreliable, experiment
    return unreliable


@pytest.fixture(params=["sqlite", "files"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that drops equal points by itself, and one that keeps all that it is given."""
    if request.param == "sqlite":
        return request.getfixturevalue("store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(tmp_path / "mlruns")


def test_an_answer_that_is_lost_writes_nothing_twice(any_store: str, tmp_path: Path, undisturbed: dict) -> None:
    tracker = MlflowTracker(uri=any_store, folder=tmp_path / "run", config="seed: 0\n")
    # the params, whose second try is 2; session 1; half of session 2; the rest of it, so that this one has to wait
    client = lose_answers(tracker, ConnectionError("no answer"), 1, 3, 5, halves=(4,))
    with pytest.warns(RuntimeWarning, match=AWAY) as said:
        result = play(tracker, At(session_4=lambda: soon(tracker)))
    assert len(said) == 1 and client.batches == 10  # sessions 3 to 6, and the end
    client = MlflowClient(any_store)
    assert_complete(client, tracker.run_id, result)
    assert curves(client, tracker.run_id) == undisturbed


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
            self.bus.emit(RunStarted(event.stream, event.strategy, event.seed, True))
            self.observer.load_state_dict(torch.load(self.file, weights_only=True))
        if self.heard > self.after:
            self.bus.emit(event)


class Killed(MlflowTracker):
    """What a killed process leaves behind: its run never ended."""

    def close(self, event: RunEnded) -> None:
        self.uploader.outbox.close()


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
            found = client.get_run(tracker.run_id)
            assert len(event.evaluation.accuracy) < 4 or (found.info.status == "RUNNING" and "error" not in found.data.tags)

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
import test_outage as those
from clstream.tracking import MlflowTracker

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
        assert outbox.numbered == 8 and outbox.run_id == tracker.run_id
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


def test_sync_is_refused_while_the_run_goes_on(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "mine"
    tracker = MlflowTracker(uri=store, folder=folder)
    said: list[str] = []

    class Syncs:
        @on(SessionStarted)
        def sync(self, event: SessionStarted) -> None:
            tracker.outbox.put("tags", values={"still": "here"})
            assert main(["sync", "mine"]) == 1
            said.append(capsys.readouterr().out)

    run(Finetune(example_model()), example_stream(), Syncs(), tracker)
    assert all("is in use" in each for each in said) and len(said) == 3
    outbox = Outbox.read(folder / FILE)
    outbox.put("tags", values={"late": "yes"})
    outbox.close()
    hold = "import sys, pathlib, clstream.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        assert main(["sync", "mine"]) == 1
        assert "is in use by another process" in capsys.readouterr().out
        other.stdin.close()
    assert main(["sync", "mine"]) == 0
    assert MlflowClient(store).get_run(tracker.run_id).data.tags["late"] == "yes"


def test_sync_goes_to_another_address_if_told(server: Server, tmp_path: Path, undisturbed: dict) -> None:
    """A run that is resumed while the server is away, as it moved, and sent to the new address."""
    killed = Killed(uri=server.uri, folder=tmp_path / "runs" / "mine", config="seed: 0\n")
    play(killed, after=(Saves(killed, 33, tmp_path / "state"),))
    state = torch.load(tmp_path / "state", weights_only=True)
    state["outbox"]["uri"] = NOBODY
    torch.save(state, tmp_path / "state")
    tracker = MlflowTracker(uri=NOBODY, folder=tmp_path / "runs" / "mine", config="seed: 0\n", allow_offline=True)
    with pytest.warns(RuntimeWarning, match=f"{AWAY}|{STILL_AWAY}") as said:
        result = play(Resumes(tracker, 33, tmp_path / "state"))
    assert len(said) == 2
    assert main(["sync", "mine"]) == 1
    assert main(["sync", "mine", "--tracking_uri", server.uri]) == 0
    assert_complete(MlflowClient(server.uri), tracker.run_id, result)
    assert curves(MlflowClient(server.uri), tracker.run_id) == undisturbed


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


def test_a_full_disk_under_run_and_store_alike_loses_nothing_if_it_has_room_again(
    store: str, tmp_path: Path, undisturbed: dict
) -> None:
    tracker = MlflowTracker(uri=store, folder=tmp_path / "run", config="seed: 0\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        size = (tmp_path / "run" / FILE).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))  # no file of the process grows beyond that

    def room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        soon(tracker)

    try:
        with pytest.warns(RuntimeWarning) as said:
            result = play(tracker, At(session_2=full, session_4=room))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 2 and "tracking.jsonl can't be written (File too large)" in said[0].message.args[0]
    assert_complete(MlflowClient(store), tracker.run_id, result)
    assert curves(MlflowClient(store), tracker.run_id) == undisturbed
    assert [entry["item"] for entry in entries(tmp_path / "run" / FILE) if "item" in entry][:3] == [1, 2, 3]
    assert count_pending(tmp_path / "run" / FILE) == 0


def test_a_resumed_run_that_was_not_tracked_before_gets_a_run_of_its_own(store: str, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=store, folder=tmp_path / "run", allow_offline=True)

    class Late:
        bus = Bus(tracker)

        @on(Event)
        def hear(self, event: Event) -> None:
            self.bus.emit(RunStarted(event.stream, event.strategy, event.seed, True) if isinstance(event, RunStarted) else event)

    play(Late())
    found = MlflowClient(store).get_run(tracker.run_id)
    assert found.info.status == "FINISHED" and found.data.params["strategy"] == "Replay" and "accuracy/mean" in found.data.metrics


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


def test_the_parent_of_several_seeds_outlives_an_outage_and_goes_on(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seeds"
    with pytest.raises(KeyboardInterrupt), parent_run("seeds", [0, 1], uri=server.uri, folder=folder) as first:  # noqa: PT012
        run_id = first.run_id
        raise KeyboardInterrupt
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "KILLED"
    with pytest.warns(RuntimeWarning), parent_run("seeds", [0, 1], uri=NOBODY, folder=folder, resumed=True) as second:  # noqa: PT031
        assert second.run_id == run_id
        second.describe({"strategy": "Replay", "seed": 0}, {})
        second.add(0, [("accuracy/mean", 1, 0.25)])
        second.add(1, [("accuracy/mean", 1, 0.75)])
    assert main(["sync", "seeds", "--tracking_uri", server.uri]) == 0
    found = client.get_run(run_id)
    assert (
        found.info.status == "FINISHED"
        and found.data.params == {"strategy": "Replay", "seeds": "0,1"}
        and found.data.metrics["accuracy/mean"] == 0.5
    )


def test_files_become_artifacts_by_reference(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text("{}\n")
    tracker = MlflowTracker(uri=store, folder=folder, files=[folder / "events.jsonl", folder / "never_made"])
    play(tracker)
    named = [entry["path"] for entry in entries(folder / FILE) if entry.get("do") == "file"]
    assert named == ["events.jsonl"]  # so that the folder may be moved
    client = MlflowClient(store)
    assert Path(client.download_artifacts(tracker.run_id, "events.jsonl")).read_text(encoding="utf-8") == "{}\n"
    outbox = Outbox.read(folder / FILE)
    outbox.put("file", path="gone")
    outbox.close()
    with pytest.warns(RuntimeWarning, match=r"the artifact .*gone is gone"):
        assert sync(folder / FILE).left == 0


def test_the_password_of_a_server_is_written_nowhere(server: Server, tmp_path: Path) -> None:
    password = "".join(reversed("terces"))  # the source of this module is among what is written
    uri = server.uri.replace("//", f"//me:{password}@")
    tracker = MlflowTracker(uri=uri, folder=tmp_path / "run")
    play(tracker, after=(Saves(tracker, 33, tmp_path / "state"),))
    assert password.encode() not in (tmp_path / "run" / FILE).read_bytes() + (tmp_path / "state").read_bytes()


def test_what_sync_and_the_tracker_refuse(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "nothing_like_it"]) == 1
    assert "there is no run 'nothing_like_it'" in capsys.readouterr().err
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / FILE).write_text('{"something": "else"}\n')
    with pytest.raises(ValueError, match="is not the journal of a tracker"):
        sync(tmp_path / "runs" / "odd" / FILE)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the run folder .* can't be made"):
        MlflowTracker(uri=store, folder=tmp_path / "file" / "run")
    with pytest.raises(RuntimeError, match="only while a run goes on"):
        MlflowTracker(uri=store).state_dict()
