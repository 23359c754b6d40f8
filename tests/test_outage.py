"""Tracking on a real MLflow server that is killed, restarted, hung, or never comes back; and runs that are killed themselves."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune
from mlflow.tracking import MlflowClient
from outages import AWAY, At, Killed, Resumes, Saves, Server, assert_complete, curves, play, soon

from clstream import SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.tracking import MlflowTracker, parent_run
from clstream.tracking.journal import entries
from clstream.tracking.mlflow_store import sync
from clstream.tracking.outbox import FILE, Outbox, count_pending, find_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_once")]

STILL_AWAY = r"writes wait in .*; to send them: clstream sync"


NOBODY = "http://127.0.0.1:9"
"""Where nobody listens."""


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
    assert all("is in use" in line for line in said) and len(said) == 3
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
    tracked = client.get_run(run_id)
    assert (
        tracked.info.status == "FINISHED"
        and tracked.data.params == {"strategy": "Replay", "seeds": "0,1"}
        and tracked.data.metrics["accuracy/mean"] == 0.5
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
