"""`clstream watch`: it learns what a folder gets, tracks it, survives kill -9, and goes on by the same command."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from arrivals import session, write
from forked import Command
from mlflow import MlflowClient

from clstream.checkpoint import newest
from clstream.cli import main

OPTIONS = [
    "--strategy", "Replay", "--strategy.capacity", "10", "--stream.classes", "6", "--stream.batch_size", "8",
    "--stream.poll", "0.01", "--model.hidden", "[8]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def inbox(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def weights(folder: Path) -> list:
    [run] = (folder / "runs").iterdir()
    state = newest(run / "seed_0")
    assert state["position"] == [3, 0, 0]
    return state["evaluation"]["measured"]["accuracy"].nan_to_num(-1), state["random"]["torch"], state["ledger"]["meter"]


@pytest.mark.slow
def test_it_answers_learns_and_tracks_and_the_same_command_shows_what_was(inbox, migrated, capsys):
    for number in range(3):
        write(inbox, number)
    write(inbox, 3, x=torch.zeros(24, 2).numpy())
    store = f"sqlite:///{shutil.copy(migrated, inbox.parent / 'mlflow.db')}"
    command = ["watch", "inbox", *OPTIONS, "--max_sessions", "4", "--tracking_uri", store]
    write(inbox, 5, x=(10 + session(1)[0]).numpy())
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "00.npz: 19 samples to learn, 5 to test" in said
    assert "03.npz is set aside: it has inputs of (2,) torch.float32, and those of inbox are (3,) torch.float32" in said
    assert "before it was learned, accuracy" in said
    client = MlflowClient(store)
    [run] = client.search_runs([client.get_experiment_by_name("clstream").experiment_id], "params.stream = 'inbox'")
    curves = run.data.metrics
    assert curves["events/SetAside"] == 1
    assert {"accuracy/task_00", "accuracy/task_03", "prequential/mean", "forgetting/mean"} <= curves.keys()
    assert len(client.get_metric_history(run.info.run_id, "accuracy/task_00")) == 4
    assert len(client.get_metric_history(run.info.run_id, "accuracy/task_03")) == 1
    assert main(command) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_it_survives_a_kill_and_goes_on(inbox, tmp_path, monkeypatch):
    command = ["watch", "inbox", *OPTIONS, "--max_sessions", "3", "--track", "false", "--checkpoint_every", "0.001"]
    write(inbox, 0)
    write(inbox, 1)
    with Path("said.txt").open("w") as said:
        process = Command([sys.executable, "-m", "clstream.cli", *command, "--threads", "1"], stdout=said)
        while "waiting for more" not in Path("said.txt").read_text() and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    write(inbox, 2)
    assert main(command) == 0
    (tmp_path / "other").mkdir()
    inbox.rename(tmp_path / "other" / "inbox")
    monkeypatch.chdir(tmp_path / "other")
    assert main(command) == 0
    (ours, random, meter), (theirs, others_random, others_meter) = weights(tmp_path), weights(tmp_path / "other")
    assert torch.equal(ours, theirs)
    assert torch.equal(random, others_random)
    assert meter == others_meter


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "there is no folder nowhere to take sessions from: make it"),
        (["inbox", "--seeds", "0,1"], "clstream watch has no option --seeds"),
        (["inbox", "--stream", "blobs"], "clstream watch has no option --stream"),
        (["inbox", "--stream.classes", "none"], "--stream.classes takes"),
        (["inbox", "--workers", "2"], "clstream watch has no option --workers"),
    ],
)
def test_refusals(arguments, reason, capsys):
    assert main(["watch", *arguments, "--track", "false"]) in (1, 2)
    assert reason in capsys.readouterr().err


def test_it_waits_for_the_first_session(inbox, capsys, monkeypatch):
    def put(seconds: float) -> None:
        write(inbox, 0)

    monkeypatch.setattr("clstream.cli.watch.time.sleep", put)
    assert main(["watch", "inbox", *OPTIONS, "--max_sessions", "1", "--track", "false"]) == 0
    assert "nothing has arrived in inbox yet" in capsys.readouterr().err
