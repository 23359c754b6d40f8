"""The progress bar: how far a run is, with the accuracy so far; lines where there is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError:
    raise ImportError("the progress bar needs the package rich: pip install rich, or run without a ProgressBar") from None

from clstream.bus import on
from clstream.events import BatchLearned, EpochStarted, Evaluated, RunEnded, RunStarted
from clstream.metrics import average_accuracy, forgetting
from clstream.results import Evaluation

EVERY = 0.1
"""Seconds between two looks at the bar."""

LINES = 10.0
"""Seconds before the first line where there is no terminal; later ones come after a tenth of the time so far."""


class ProgressBar:
    """Shows how far a run is: a bar in a terminal, a line now and then elsewhere (a file, a notebook), and a line at its end.

    Args:
        title: what is run; by default the strategy, the stream and the seed.
        console: where; by default the standard error.

    """

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self, title: str = "", console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.title = title
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.lines = not self.console.is_terminal or self.console.is_jupyter
        self.progress = Progress(*columns, console=self.console, transient=True, disable=self.lines)
        self.evaluation: Evaluation | None = None

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Show an empty bar."""
        self.endless = event.stream.arrives
        self.sessions = len(event.stream) if event.run is None else event.run.sessions
        self.name = self.title or f"{type(event.strategy).__name__} on {event.stream.name}, seed {event.seed}"
        self.evaluation = None
        self.batches, self.began = 0, time.monotonic()
        self.shown, self.every = self.began, LINES if self.lines else EVERY
        for old in self.progress.task_ids:  # of an earlier run
            self.progress.remove_task(old)
        self.bar = self.progress.add_task(self.name, total=None, note="")
        self.progress.start()

    def state_dict(self) -> dict[str, Any]:
        """Return how far the run is."""
        return {"batches": self.batches, "total": self.progress.tasks[0].total, "note": self.progress.tasks[0].fields["note"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Show how far a resumed run is."""
        self.batches = state["batches"]
        self.progress.update(self.bar, total=state["total"], completed=self.batches, note=state["note"])

    @on(EpochStarted)
    def size(self, event: EpochStarted) -> None:
        """Guess the length of the run from that of this session."""
        if event.epoch.index == 0:
            session = event.epoch.session
            left = 1 if self.endless else self.sessions - session.index
            here = len(event.epoch) * session.epochs
            self.progress.update(self.bar, total=self.batches + here * left, completed=self.batches)

    @on(BatchLearned)
    def advance(self, event: BatchLearned) -> None:
        """Count, and draw now and then."""
        self.batches += 1
        now = time.monotonic()
        if now - self.shown > self.every:
            self.shown = now
            self.progress.update(self.bar, completed=self.batches)
            if self.lines:
                self.every = max(LINES, (now - self.began) / 10)
                bar = self.progress.tasks[0]
                of = f" of about {bar.total:.0f}" if bar.total else ""
                self.say(f"{self.batches}{of} batches, {now - self.began:.0f} s{bar.fields['note'] and ', '}{bar.fields['note']}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(f"{self.name}: {text}", markup=False, highlight=False, soft_wrap=True)

    @on(Evaluated)
    def note(self, event: Evaluated) -> None:
        """Show the main measure so far."""
        self.evaluation = evaluation = event.evaluation
        if len(evaluation.accuracy):
            mean = average_accuracy(evaluation.main, evaluation.taught)
            done = f"after {evaluation.sessions[-1]}{'' if self.endless else f' of {self.sessions}'} sessions"
            self.progress.update(self.bar, note=f"{evaluation.main_name} {mean:.3f} {done}")

    @on(RunEnded)
    def stop(self, event: RunEnded) -> None:
        """Take the bar away, and say how it ended; what went wrong is said elsewhere."""
        self.progress.stop()
        evaluation = self.evaluation
        if event.error is None and evaluation is not None and len(evaluation.accuracy):
            mean, lost = average_accuracy(evaluation.main, evaluation.taught), forgetting(evaluation.main, evaluation.taught)
            forgotten = "" if math.isnan(lost) else f", forgetting {lost:.3f}"  # with a single task there is none
            self.say(f"{evaluation.main_name} {mean:.3f}{forgotten}, {time.monotonic() - self.began:.1f} s")
