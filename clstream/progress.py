"""A progress bar for the terminal: tasks, sessions and batches, with the accuracy so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clstream.bus import on
from clstream.events import BatchLearned, EpochStarted, Evaluated, RunEnded, RunStarted
from clstream.metrics import average_accuracy

EVERY = 0.1
"""Seconds between two looks at the bar."""


class ProgressBar:
    """Shows how far a run is, in a terminal; says nothing elsewhere.

    Args:
        title: what is run.
        console: where; by default the standard error.

    """

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
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.batches, self.shown = 0, 0.0

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Show an empty bar."""
        self.sessions = len(event.stream)
        self.bar = self.progress.add_task(self.title, total=None, note="")
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
            here = len(event.epoch) * session.epochs
            self.progress.update(self.bar, total=self.batches + here * (self.sessions - session.index), completed=self.batches)

    @on(BatchLearned)
    def advance(self, event: BatchLearned) -> None:
        """Count, and draw now and then."""
        self.batches += 1
        if time.monotonic() - self.shown > EVERY:
            self.shown = time.monotonic()
            self.progress.update(self.bar, completed=self.batches)

    @on(Evaluated)
    def note(self, event: Evaluated) -> None:
        """Show the accuracy so far."""
        found = event.evaluation
        if len(found.accuracy):
            mean = average_accuracy(found.main, found.taught)
            self.progress.update(self.bar, note=f"accuracy {mean:.3f} after {len(found.accuracy)} of {self.sessions} sessions")

    @on(RunEnded)
    def stop(self, event: RunEnded) -> None:
        """Take the bar away."""
        self.progress.stop()
