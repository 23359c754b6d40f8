"""Detection of boundaries, measured: what a strategy that is told none has found, against where the stream has them.

Steps count the batches of a run from 0. A boundary at step b is where batch b is the first one of another task. It is detected by
the first alarm from b on, before the next boundary and at most `within` steps later. All other alarms are false.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clstream.bus import on
from clstream.detectors import ShiftDetected
from clstream.events import BatchLearned, Event, RunStarted, SessionEnded, SessionStarted
from clstream.params import check_integer


def delays(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> list[int | None]:
    """Return for each boundary the steps until it is detected; None for one that is not."""
    found: list[int | None] = []
    heard, ordered = sorted(alarms), sorted(boundaries)
    for first, end in zip(ordered, [*ordered[1:], math.inf][: len(ordered)], strict=True):
        last = end if within is None else min(end, first + within + 1)
        place = bisect_left(heard, first)
        found.append(heard[place] - first if place < len(heard) and heard[place] < last else None)
    return found


def precision(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the share of alarms that detect a boundary; NaN without alarms."""
    return _share(sum(delay is not None for delay in delays(alarms, boundaries, within)), len(alarms))


def recall(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the share of boundaries that are detected; NaN without boundaries."""
    return _share(sum(delay is not None for delay in delays(alarms, boundaries, within)), len(boundaries))


def mean_delay(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the mean number of steps until a boundary is detected, over those that are; NaN if none is."""
    known = [delay for delay in delays(alarms, boundaries, within) if delay is not None]
    return _share(sum(known), len(known))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class DetectionMeasured(Event):
    """A session is over: how well the boundaries so far were detected."""

    precision: float
    recall: float
    delay: float
    false_alarms: int

    def curves(self) -> dict[str, float]:
        """Return all of it, for the tracker."""
        return {
            "detection/precision": self.precision,
            "detection/recall": self.recall,
            "detection/delay": self.delay,
            "detection/false_alarms": self.false_alarms,
        }


class Detection:
    """An observer that collects alarms (`ShiftDetected`) and true boundaries, which it takes from the stream.

    A boundary is where a session draws from another task than the one before. When a session ends it emits `DetectionMeasured`,
    so the tracker draws it.

    Args:
        within: steps after which an alarm no longer counts for a boundary. None: until the next one.

    """

    def __init__(self, within: int | None = None) -> None:
        check_integer(0, none=True, within=within)
        self.within = within
        self.alarms: list[int] = []
        self.boundaries: list[int] = []
        self.step = 0

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget what was before."""
        self.started = event
        self.alarms, self.boundaries, self.step = [], [], 0

    @on(SessionStarted)
    def look(self, event: SessionStarted) -> None:
        """Note a boundary."""
        index, task_of = event.session.index, self.started.stream.task_of
        if index and task_of(index) != task_of(index - 1):
            self.boundaries.append(self.step)

    @on(ShiftDetected)
    def hear(self, event: ShiftDetected) -> None:
        """Note an alarm; it comes before the batch is learned."""
        self.alarms.append(self.step)

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        """Count a batch."""
        self.step += 1

    @property
    def delays(self) -> list[int | None]:
        """For each boundary the steps until it was detected; None for one that was not."""
        return delays(self.alarms, self.boundaries, self.within)

    @property
    def measured(self) -> DetectionMeasured:
        """How well the boundaries so far were detected."""
        given = self.alarms, self.boundaries, self.within
        hits = sum(delay is not None for delay in self.delays)
        return DetectionMeasured(precision(*given), recall(*given), mean_delay(*given), len(self.alarms) - hits)

    @on(SessionEnded)
    def tell(self, event: SessionEnded) -> None:
        """Tell everyone."""
        if self.started.run is not None:
            self.started.run.watching.emit(self.measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"alarms": list(self.alarms), "boundaries": list(self.boundaries), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        self.alarms, self.boundaries, self.step = list(state["alarms"]), list(state["boundaries"]), state["step"]
