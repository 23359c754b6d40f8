"""Progress of many runs: a line as each ends, with the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any


class Progress:
    """Says how far many runs are.

    Args:
        groups: for each run what it is but for its seed: runs of one group take about as long.
        workers: how many go on at a time. None: it shows from the time that those take that end.
        seconds: by group, how long earlier ones took.

    """

    def __init__(self, groups: Sequence[str], workers: int | None, seconds: Mapping[str, Sequence[float]] | None = None) -> None:
        self.waiting, self.workers, self.total = list(groups), workers, len(groups)
        self.taken = {group: list(values) for group, values in (seconds or {}).items()}
        self.began, self.spent = time.monotonic(), 0.0

    def ended(self, group: str, seconds: float = math.nan) -> str:
        """Count a run that ended, and return what a line about it begins with: [3/40]. Seconds are NaN if it failed."""
        self.waiting.remove(group)
        if math.isfinite(seconds):
            self.taken.setdefault(group, []).append(seconds)
            self.spent += seconds
        return f"[{self.total - len(self.waiting)}/{self.total}]"

    @property
    def seconds_left(self) -> float:
        """How long the others take, from how long those did that ended; NaN if there are none."""
        if not self.waiting:
            return 0.0
        every = [value for values in self.taken.values() for value in values]
        if not every:
            return math.nan
        usual = fmean(every)
        each = [fmean(self.taken[group]) if self.taken.get(group) else usual for group in self.waiting]
        at_once = self.workers or max(1.0, self.spent / (time.monotonic() - self.began))
        return max(sum(each) / at_once, max(each))

    @property
    def left(self) -> str:
        """What a line ends with: how long the others take."""
        return "" if not self.waiting or math.isnan(self.seconds_left) else f"; about {duration(self.seconds_left)} left"


def duration(seconds: float) -> str:
    """Return a time in words: 40 s, 12 min, 3.5 h."""
    if math.isnan(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


OUR_ERRORS = ("Failure", "UsageError", "FolderError", "CaptureError", "ObserverError", "OtherRunError")
"""Errors whose message says it all."""


def sentence_of(error: Any) -> str:
    """Return an error of a job as a sentence: of our own errors, whose message says it all, without their kind."""
    text = " ".join(str(error).split())
    kind, colon, rest = text.partition(": ")
    return rest if colon and kind in OUR_ERRORS else text
