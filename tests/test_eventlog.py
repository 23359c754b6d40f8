"""The event log against the runs that it is of: what it says, killed, resumed, on a full disk, and as the command prints it."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from logged_runs import play

from clstream import BatchLearned, Event, RunStarted, SessionEnded, Strategy, on, run
from clstream.checks import example_model, example_stream
from clstream.cli import main
from clstream.tracking import EventLog
from clstream.tracking.event_log import FILE, read, to_plain
from clstream.tracking.event_log_text import format_log


class Hears:
    """Keeps the events themselves."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @on(Event)
    def hear(self, event: Event) -> None:
        self.events.append(event)


def test_it_says_what_happened(tmp_path: Path) -> None:
    heard = Hears()
    begin = time.time()
    result = play(EventLog(tmp_path / "run", batches=True), heard)
    log = list(read(tmp_path / "run"))
    first, *rest = log
    assert first["event"] == "RunStarted" and first["title"] == "Emits on example, seed 0"
    assert first["params"] == result.params and first["data_fingerprint"]
    kinds = [type(event).__name__ for event in heard.events]
    assert sorted(entry["event"] for entry in log) == sorted(kind for kind in kinds if kind != "BatchReady")
    assert [entry["event"] for entry in rest[1:]] == [kind for kind in kinds[2:] if kind != "BatchReady"]
    seconds = [entry["seconds"] for entry in log[2:]]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] <= result.seconds
    assert log[-1]["time"] > first["time"] and len(first["time"]) == len("2030-01-01T00:00:00.000+00:00")
    assert time.mktime(time.strptime(first["time"][:19], "%Y-%m-%dT%H:%M:%S")) >= begin - 1
    assert log[-1]["error"] is None

    def of(name: str) -> list[dict]:
        return [entry for entry in log if entry["event"] == name]

    assert [(entry["task"], entry["classes"], entry["train"], entry["test"]) for entry in of("TaskStarted")] == [
        (0, [0, 1], 60, 20), (1, [2, 3], 60, 20), (2, [4, 5], 60, 20),
    ]  # fmt: skip
    assert [(entry["session"], entry["task"], entry["samples"], entry["classes"]) for entry in of("SessionStarted")] == [
        (0, 0, 60, [0, 1]), (1, 1, 60, [2, 3]), (2, 2, 60, [4, 5]),
    ]  # fmt: skip
    assert [(entry["session"], entry["epoch"], entry["batches"]) for entry in of("EpochStarted")] == [
        (session, epoch, 6) for session in range(3) for epoch in range(2)
    ]
    learned = [event for event in heard.events if isinstance(event, BatchLearned)]
    assert [entry["loss"] for entry in of("BatchLearned")] == [float(event.loss) for event in learned]
    assert [(entry["epoch"], entry["batch"], entry["samples"]) for entry in of("BatchLearned")] == [
        (event.batch.epoch, event.batch.index, len(event.batch.samples)) for event in learned
    ]
    whole = [entry for entry in of("Evaluated") if not entry["within_session"]]
    assert [entry["accuracy"] for entry in whole] == result.accuracy.tolist()
    assert [entry["task_accuracy"] for entry in whole] == result.task_accuracy.tolist()
    assert whole[-1]["mean"] == result.average_accuracy and whole[-1]["forgetting"] == result.forgetting
    assert whole[0]["forgetting"] == "nan" and math.isnan(float(whole[0]["forgetting"]))
    probes = {entry["batches"]: entry["accuracy"] for entry in of("Evaluated") if entry["within_session"]}
    assert list(probes) == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert all(probes[step] == row for step, row in zip(result.probe_steps, result.probes.tolist(), strict=True) if step in probes)
    assert of("Shifted")[1] | {"time": 0, "seconds": 0} == {
        "event": "Shifted", "time": 0, "seconds": 0, "session": 1, "batches": 24,
        "fields": {
            "score": 0.5, "where": [1.0, "nan"], "large": {"shape": [9, 9], "dtype": "torch.float32"}, "array": [0, 1, 2],
            "names": ["a", "b"], "number": 2.0, "found": {"1": "-inf"}, "thing": "object",
        },
    }  # fmt: skip


def test_every_line_is_json_that_any_program_reads(tmp_path: Path) -> None:
    play(EventLog(tmp_path))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    assert "BatchLearned" not in {entry["event"] for entry in read(tmp_path)}


def test_values_become_plain() -> None:
    values = [None, True, np.int64(3), float("inf"), torch.tensor(2), {"a": (1, math.nan)}, torch.ones(65, dtype=torch.uint8)]
    assert [to_plain(value) for value in values] == [
        None, True, 3, "inf", 2, {"a": [1, "nan"]}, {"shape": [65], "dtype": "torch.uint8"},
    ]  # fmt: skip
    assert to_plain(example_stream().tasks[0]) == "Task(0, classes=(0, 1), train=60, test=20)"


class Stops:
    @on(SessionEnded)
    def stop(self, event: SessionEnded) -> None:
        if event.session.index == 1:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_says_by_what(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(EventLog(tmp_path, batches=True), Stops())
    log = list(read(tmp_path))
    assert log[-1]["event"] == "RunEnded" and log[-1]["error"] == "KeyboardInterrupt: "
    assert len([entry for entry in log if entry["event"] == "BatchLearned"]) == 24


class FailsAtOnce(Strategy):
    @on(RunStarted)
    def fail(self, event: RunStarted) -> None:
        raise RuntimeError("not today")


def test_one_log_serves_one_run_after_another(tmp_path: Path) -> None:
    """Each has its own file; a run that fails before the log hears of it leaves the earlier log as it was."""
    log = EventLog(tmp_path)
    play(log)
    with pytest.raises(RuntimeError):
        run(FailsAtOnce(example_model()), example_stream(), log)
    first = (tmp_path / FILE).read_bytes()
    play(log, seed=5)
    play(log, seed=6)
    assert (tmp_path / "events-1.jsonl").read_bytes() == first
    assert [next(read(tmp_path / name))["params"]["seed"] for name in ("events-1.jsonl", "events-2.jsonl", FILE)] == [0, 5, 6]


def test_the_command_prints_it_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    play(EventLog("runs/mine/seed_0", batches=True))
    assert main(["log", "runs/mine"]) == 0
    said = capsys.readouterr().out.splitlines()
    texts = [line[22:] for line in said]
    assert texts[0] == "Emits on example, seed 0: 3 sessions"
    assert texts[1] == "  Plain"
    assert texts[2:5] == ["  task 0: classes 0, 1", "    session 0: 60 samples of classes 0, 1", "      epoch 0: 6 batches"]
    probe = next(entry for entry in read("runs/mine/seed_0") if entry["event"] == "Evaluated")
    row = " ".join(f"{value:.3f}" for value in probe["accuracy"])
    assert texts[5] == f"        accuracy {probe['mean']:.3f} after 4 batches: {row}"
    assert "    Shifted: score 0.5, where [1, nan], large {'shape': [9, 9], 'dtype': 'torch.float32'}" in " ".join(texts)
    assert texts[-1] == "the run ended" and not any("batch 0" in text for text in texts)
    assert main(["log", "mine/seed_0", "--batches"]) == 0
    assert "        batch 0: 10 samples, loss " in capsys.readouterr().out
    shutil.copytree("runs/mine/seed_0", "runs/mine/seed_1")
    assert main(["log", "mine"]) == 0
    assert capsys.readouterr().out.count("Emits on example") == 2
    assert main(["log", "other"]) == 1
    assert "there is no run 'other'" in capsys.readouterr().err
    (tmp_path / "runs" / "empty").mkdir()
    assert main(["log", "empty"]) == 1
    assert "there is no event log in runs/empty" in capsys.readouterr().err


def test_a_line_of_another_version_is_shown_as_it_is() -> None:
    entry = {"event": "TaskStarted", "time": "2030-01-01T10:11:12.000+00:00", "seconds": 1.5, "new": 1}
    assert list(format_log([entry])) == [f"10:11:12      1.50 s  {json.dumps(entry)}"]


def test_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the folder of the event log .* can't be made"):
        EventLog(tmp_path / "file" / "run")
    with pytest.raises(FileNotFoundError, match=r"there is no event log at .*: pass EventLog\(folder\) to `run`"):
        read(tmp_path)
    with pytest.raises(RuntimeError, match="only while a run goes on"):
        EventLog(tmp_path).state_dict()
