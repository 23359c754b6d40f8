"""Progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from clstream.strategies import Finetune
from rich.console import Console

from clstream import BatchLearned, RunStarted, on, progress, run
from clstream.checks import example_model, example_stream
from clstream.pretraining import join_tasks
from clstream.progress import ProgressBar


def said(bar: ProgressBar, *observers: object, max_sessions: int | None = None) -> str:
    run(Finetune(example_model()), example_stream(batch_size=10), *observers, bar, max_sessions=max_sessions)
    file = bar.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_off_a_terminal_a_short_run_says_one_line() -> None:
    text = said(ProgressBar(console=Console(file=io.StringIO())))
    assert text.count("\n") == 1 and text.startswith("Finetune on example, seed 0: accuracy ") and ", forgetting " in text


def test_a_run_of_one_task_says_nothing_of_forgetting() -> None:
    bar = ProgressBar(console=Console(file=io.StringIO()))
    run(Finetune(example_model()), join_tasks(example_stream()), bar)
    assert "accuracy" in bar.console.file.getvalue() and "forgetting" not in bar.console.file.getvalue()


def test_off_a_terminal_a_long_run_says_lines_that_grow_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        @on(BatchLearned)
        def pass_by(self, event: BatchLearned) -> None:
            self.now += 40

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    lines = said(ProgressBar("a long one", console=Console(file=io.StringIO(), width=30)), clock).splitlines()
    assert lines[0] == "a long one: 1 of about 18 batches, 40 s"  # 3 sessions of 6 batches; never cut
    assert lines[7].startswith("a long one: 8 of about 18 batches, 320 s, accuracy ") and "after 1 of 3 sessions" in lines[7]
    assert 12 < len(lines) < 19  # from 400 s on, less often than each batch
    bar = ProgressBar("a short one", console=Console(file=io.StringIO()))
    lines = said(bar, clock, max_sessions=2).splitlines()
    assert lines[0].startswith("a short one: 1 of about 12 batches") and "after 1 of 2 sessions" in lines[7]


def test_a_terminal_has_a_bar_and_a_line_at_the_end() -> None:
    text = said(ProgressBar("replay", console=Console(file=io.StringIO(), force_terminal=True, width=100)))
    assert "━" in text and text.rstrip().splitlines()[-1].endswith(" s") and "replay: accuracy " in text


def test_a_run_that_fails_is_not_told_as_one_that_ended() -> None:
    class Fails:
        @on(BatchLearned)
        def fail(self, event: BatchLearned) -> None:
            raise RuntimeError("not today")

    class FailsAtOnce:
        @on(RunStarted)
        def fail(self, event: RunStarted) -> None:
            raise RuntimeError("not today")

    bar = ProgressBar(console=Console(file=io.StringIO()))
    for observer in (Fails(), FailsAtOnce()):
        with pytest.raises(RuntimeError, match="not today"):
            said(bar, observer)
    with pytest.raises(RuntimeError, match="not today"):  # it never started
        said(ProgressBar(), FailsAtOnce())
    assert bar.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_bar_serves_one_run_after_another() -> None:
    bar = ProgressBar(console=Console(file=io.StringIO()))
    said(bar)
    assert said(bar).count("accuracy") == 2
