"""Profiles: where the time of a run goes, and that it goes on as without."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from clstream.strategies import Finetune, Replay
from conftest import built

from clstream import SessionEnded, Strategy, on, run
from clstream.checks import example_stream
from clstream.cli import main
from clstream.profiling import Profile


class Slow(Finetune):
    """Sleeps in each step, and when a session ends."""

    def learn(self, batch):
        time.sleep(0.002)
        return super().learn(batch)

    @on(SessionEnded)
    def consolidate(self, event: SessionEnded) -> None:
        """Sleep."""
        time.sleep(0.02)


class Watches:
    """An observer that takes its time."""

    @on(SessionEnded)
    def watch(self, event: SessionEnded) -> None:
        """Sleep."""
        time.sleep(0.03)


def test_the_parts_of_a_run_add_up_to_it(tmp_path: Path) -> None:
    profile, stream = Profile(skip=3, steps=4), example_stream(epochs=2, batch_size=8)
    result = run(built(Slow), stream, profile, Watches())
    batches, sessions = sum(len(epoch) for session in stream for epoch in session), len(stream)
    names = ["steps of Slow", "Slow at the end of sessions", "evaluation", "tracking", "engine"]
    assert list(profile.seconds) == names and profile.batches == batches and profile.recorded == 4
    steps, consolidating, _, tracking, engine = profile.seconds.values()
    assert steps >= 0.002 * (batches - 4) and consolidating >= 0.02 * sessions and tracking >= 0.03 * sessions and engine > 0
    assert sum(profile.seconds.values()) == pytest.approx(result.seconds - profile.left_out - profile.own, rel=0.05)
    operations = {operation.name: operation for operation in profile.operations}
    assert operations["aten::addmm"].calls % 4 == 0 and all(operation.seconds >= 0 for operation in profile.operations)
    assert str(profile).startswith("Slow on example: ") and "operations of 4 steps" in str(profile)
    folder = profile.save(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["profile.json", "profile.png", "trace.json"]
    assert json.loads((folder / "profile.json").read_text())["recorded_steps"] == 4
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Slow.learn" and event.get("cat") == "user_annotation" for event in trace) == 4


def test_a_profile_changes_nothing() -> None:
    strategies: list[Strategy] = [built(Replay), built(Replay)]
    results = [
        run(strategy, example_stream(), *observers) for strategy, observers in zip(strategies, ([Profile(2, 3)], []), strict=True)
    ]
    assert torch.equal(results[0].accuracy, results[1].accuracy)
    pairs = zip(strategies[0].model.parameters(), strategies[1].model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("skip", [2, 10_000])
def test_a_run_that_ends_early(skip: int) -> None:
    profile = Profile(skip=skip, steps=10_000)
    run(built(Finetune), example_stream(), profile, max_sessions=1)
    recorded = f"operations of {profile.recorded} steps" if skip == 2 else f"there were no more than {skip} batches"
    assert recorded in str(profile) and bool(profile.operations) == (skip == 2)


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        Profile(steps=0)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_profiled.py").write_text(
        "from clstream.strategies import Finetune\n\n\nclass Mine(Finetune):\n    '''Fine-tunes.'''\n"
    )
    blobs = ["--stream", "blobs", "--stream.tasks", "2", "--stream.train_per_class", "200", "--threads", "1"]
    assert main(["profile", *blobs, "--strategy", "mine_profiled.Mine", "--out", "where", "--steps", "5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Mine on blobs: ") and "  steps of Mine " in said and "operations of 5 steps" in said
    assert said.splitlines()[-1].startswith("where has profile.png, profile.json, and trace.json")
    assert (Path("where") / "trace.json").exists() and not Path("runs").exists() and not Path("mlflow.db").exists()
    for given, message in [
        (["--workers", "2"], "clstream profile has no option --workers"),
        (["--step", "2"], "clstream profile has no option --step: did you mean --steps?"),
        (["--steps", "0"], "--steps must be a whole number of at least 1, not 0"),
    ]:
        assert main(["profile", *blobs, *given]) == 2
        assert message in capsys.readouterr().err
