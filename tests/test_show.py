"""`clstream show`: counts that are right, in the terminal and in a picture; and what is asked wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clstream.streams import blobs, drifting, fuzzy_tasks
from clstream.streams.schedules import Gaussian
from PIL import Image

from clstream.cli import main
from clstream.figures import BARS, composition, composition_figure, composition_lines


def test_counts_are_those_of_the_sessions() -> None:
    stream = fuzzy_tasks(sessions=10)
    shown = composition(stream)
    assert shown.by == "class" and shown.names == tuple(range(10)) and shown.sessions.tolist() == list(range(10))
    assert torch.equal(shown.counts, torch.stack([session.samples.y.bincount(minlength=10) for session in stream]))
    by_task = composition(stream, "task")
    assert torch.equal(by_task.counts, shown.counts.view(10, 5, 2).sum(2))
    domain = composition(blobs(scenario="domain", sessions_per_task=2))
    assert domain.by == "task" and domain.counts.count_nonzero(1).tolist() == [1] * 10 and int(domain.counts.sum()) == 2000


def test_of_many_sessions_every_so_many_are_looked_at() -> None:
    shown = composition(drifting(blobs(), Gaussian(), 10_000, 20), most=100)
    assert len(shown.sessions) == 100 and shown.sessions[0] == 0 and shown.sessions[-1] == 9999
    assert shown.counts.sum(1).tolist() == [20] * 100


def test_bars_are_as_high_as_the_counts() -> None:
    counts = torch.tensor([[8, 0], [4, 1], [0, 8]])
    assert composition_lines(counts, (3, 12), "class") == [
        f"class 3   {BARS[8]}{BARS[5]}{BARS[0]}  12", f"class 12  {BARS[0]}{BARS[2]}{BARS[8]}  9"
    ]  # fmt: skip
    wide = composition_lines(torch.eye(500, dtype=torch.int64)[:, :1], (0,), "task", width=50)
    assert len(wide[0]) == len("task 0   ") + 1 + 50 + len("  1") - 1


def test_the_areas_of_the_picture_are_the_counts() -> None:
    shown = composition(fuzzy_tasks(sessions=10))
    axes = composition_figure(shown.counts, shown.sessions, shown.names, shown.by, "mine").axes[0]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops == pytest.approx(shown.counts.cumsum(1).max(0).values.tolist())
    assert axes.get_title() == "mine" and axes.get_xlim() == (0, 10)


def test_it_shows_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "fuzzy_tasks", "--stream.sessions", "10", "--out", "fuzzy.png"]) == 0
    said = capsys.readouterr().out
    stream = fuzzy_tasks(sessions=10)
    assert str(stream) in said and "samples of each class, session by session\n" in said and "drawn in fuzzy.png" in said
    for line in composition_lines(composition(stream).counts, range(10), "class"):
        assert line in said
    assert Image.open(tmp_path / "fuzzy.png").size == (880, 352)
    assert main(["show", "--stream", "gaussian_schedule", "--stream.sessions", "1000", "--by", "task"]) == 0
    said = capsys.readouterr().out
    assert "session by session, 240 of 1000" in said and "task 4" in said and "class 4 " not in said


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "clstream show needs the stream"),
        (["fuzzy"], 2, "did you mean fuzzy_tasks?"),
        (["fuzzy_tasks", "--seed", "1"], 2, "clstream show has no option --seed"),
        (["fuzzy_tasks", "--stream.wdth", "1"], 2, "did you mean width?"),
        (["fuzzy_tasks", "--stream.width", "2"], 2, "width must be a finite number from 0 to 1, not 2"),
        (["blobs", "--out", "missing/x.png"], 1, "missing/x.png can't be written"),
        (["blobs", "--out", "x.doc"], 1, "x.doc can't be written"),
        (["blobs", "--by", "hour"], 2, "invalid choice"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(
    arguments: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["show", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == status and message in said and "Traceback" not in said
