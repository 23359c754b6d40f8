"""Recordings on the command line: `clstream record` and `--stream recorded:FILE`."""

from __future__ import annotations

import os

import pytest
from clstream.streams import (
    recorded,
    split_digits,
)

from clstream.cli import main
from clstream.recording import RecordedStream

SHORT = ["--strategy", "Replay", "--strategy.capacity", "50", "--model.hidden", "[16]", "--track", "false", "--seed", "3"]


def accuracies(printed: str) -> list[str]:
    """Return what is printed of a run but its seconds: accuracy and forgetting, and the accuracies session by session."""
    row, *curves = (line for line in printed.splitlines() if "Replay on split_digits" in line or "task " in line)
    return [*row.split("│")[1:4], *curves]


@pytest.mark.slow
def test_record_and_replay_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--stream.epochs", "1", "--stream.class_order", "2"]
    assert main(["record", "--stream", "split_digits", *options, "--out", "my.clstream"]) == 0
    said = capsys.readouterr().out
    stream = split_digits(epochs=1, class_order=2)
    size = (tmp_path / "my.clstream").stat().st_size
    assert str(stream) in said
    assert f"recorded in my.clstream: {size:,} bytes, fingerprint {stream.fingerprint}" in said
    results = []
    (tmp_path / "my.yaml").write_text("stream: recorded:my.clstream\n")
    for chosen in (
        ["--stream", "split_digits", *options], ["--stream", "recorded:my.clstream"], ["--stream=recorded:my.clstream"],
        ["--stream", "recorded", "--stream.file", "my.clstream"], ["--config", "my.yaml"],
    ):  # fmt: skip
        assert main(["run", *chosen, *SHORT]) == 0
        results.append(accuracies(capsys.readouterr().out))
    assert all(result == results[0] for result in results)
    assert len(results[0]) > 5
    assert main(["run", "--stream", "recorded:my.clstream", *SHORT, "--print_config"]) == 0
    (tmp_path / "whole.yaml").write_text(capsys.readouterr().out)
    assert main(["record", "--config", "whole.yaml", "--out", "again.clstream"]) == 0
    assert (tmp_path / "again.clstream").read_bytes() == (tmp_path / "my.clstream").read_bytes()


MINE = '''
import torch
from clstream import Stream
from clstream.streams import from_tensors

def half(x: torch.Tensor) -> torch.Tensor:
    return x / 2

def points(tasks: int = 2, shift: float = 0.0) -> Stream:
    """Points of my own."""
    x, y = torch.arange(80.0).view(40, 2) + shift, torch.arange(40) % 4
    return from_tensors(x, y, x, y, name="points", tasks=tasks, augment=half)
'''


@pytest.mark.slow
def test_samples_of_the_users_own_by_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "recorded_points.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["record", "--stream", "recorded_points.points", "--out", "my.clstream"]) == 0
    replay = ["run", "--stream", "recorded:my.clstream", *SHORT]
    assert main(replay) == 1
    assert "--stream.data my_file.my_stream" in capsys.readouterr().err
    given = ["--stream.data", "recorded_points.points", "--stream.functions", '{"half": recorded_points.half}']
    assert main([*replay, *given]) == 0
    assert main([*replay, *given, "--stream.data.shift", "0.5"]) == 1
    assert "the data of points is not the data that my.clstream was recorded from" in capsys.readouterr().err


@pytest.mark.data
def test_data_root_reaches_the_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = os.environ["CLSTREAM_DATA"]
    monkeypatch.delenv("CLSTREAM_DATA")
    small = ["--strategy", "Finetune", "--model.hidden", "[4]", "--track", "false", "--max_sessions", "1"]
    given = ["--stream", "split_mnist", "--stream.batch_size", "2000", "--data_root", root, "--stream.validation", "0.5"]
    assert main(["record", *given, "--out", "my.clstream"]) == 0
    assert main(["run", "--stream", "recorded:my.clstream", "--data_root", root, "--tune", *small]) == 0
    assert "Finetune on split_mnist (validation)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--stream", "blobs"], 2, "required: --out"),
        (["--out", "x"], 2, "clstream record needs the stream: --stream NAME"),
        (["--stream", "blobs", "--out", "x", "--strategy", "Replay"], 2, "clstream record has no option --strategy: it takes"),
        (["--stream", "blobs", "--out", "x", "--seed=1"], 2, "clstream record has no option --seed"),
        (["--stream", "blob", "--out", "x"], 2, "did you mean blobs?"),
        (["--stream", "blobs", "--stream.tusks", "2", "--out", "x"], 2, "did you mean tasks?"),
        (["--stream", "blobs", "--stream.tasks", "20", "--out", "x"], 2, "10 classes make 1 to 10 tasks"),
        (["--stream", "blobs", "--tune", "--out", "x"], 1, "holds back no validation samples"),
        (["--stream", "blobs", "--out", "missing/x"], 1, "missing/x can't be written"),
        (["--stream", "blobs", "--out", "there"], 1, "there holds something else: choose another file, or overwrite it"),
        (["--stream", "recorded:missing", "--out", "x"], 1, "there is no recording missing"),
        (["--stream", "recorded:there", "--out", "x"], 1, "there is no recording of clstream"),
        (["--stream", "recorded", "--out", "x"], 2, "--stream.file"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("my notes")
    try:
        found = main(["record", *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == status
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_force_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("my notes")
    assert main(["record", "--stream", "blobs", "--out", "there", "--force"]) == 0
    assert isinstance(recorded("there"), RecordedStream)
