"""Drift detection: a loss that has risen says that the stream draws from something else now.

One detector, as TAME's code has it (Zhu et al. 2024). It is given the loss of each batch from before the batch is learned:

    S <- alpha l + (1 - alpha) S                        the smoothed loss, S = l at first
    shift if S > mean(W) + deviations max(std(W), floor)

W is a window of the newest losses, not smoothed, of before this batch; std is that of a population. It starts with one value: the
loss of a guess, ln(classes). So the threshold of a batch never knows the batch, and a falling loss is no shift.

It takes the loss as a Python float: where the loss is on a GPU, each batch waits for it once, since a decision can't wait.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clstream.bus import Emitter, Event, on
from clstream.events import BatchLearned, RunControl, RunStarted
from clstream.params import check_integer, check_number


@dataclass(frozen=True, slots=True, eq=False)
class ShiftDetected(Event):
    """A loss has risen: `smoothed` is above `threshold`, at the batch `step` of the run, counted from 0."""

    step: int
    smoothed: float
    threshold: float

    def curves(self) -> dict[str, float]:
        """Return both, for the tracker."""
        return {"shift/smoothed_loss": self.smoothed, "shift/threshold": self.threshold}


class LossWindow:
    """A window of the newest values of one loss, its smoothed value, and the threshold that they give.

    Args:
        start: the first value of the window.
        length: the most losses in the window.

    """

    def __init__(self, start: float, length: int) -> None:
        self.losses = deque([start], maxlen=length)
        self.smoothed: float | None = None  # over every loss that was there
        self.learned: float | None = None  # over those of batches that were learned
        self.threshold: float | None = None

    def update_threshold(self, deviations: float, floor: float) -> float:
        """Set the threshold from the window as it is now, and return it."""
        mean = math.fsum(self.losses) / len(self.losses)
        std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses))
        self.threshold = mean + deviations * max(std, floor)
        return self.threshold

    def add(self, loss: float, alpha: float) -> None:
        """Add the loss of a batch that is learned now."""
        self.losses.append(loss)
        self.learned = smooth(self.learned, loss, alpha)


def smooth(before: float | None, loss: float, alpha: float) -> float:
    """Return the exponential moving average with one more loss."""
    return loss if before is None else alpha * loss + (1 - alpha) * before


def check_detection(alpha: float, window: int, deviations: float, floor: float) -> None:
    """Raise ValueError for invalid settings of a detector."""
    check_integer(1, window=window)
    check_number(0, 1, alpha=alpha)
    if not alpha:
        raise ValueError("alpha is the weight of a new loss, above 0 and at most 1, not 0")
    check_number(0, deviations=deviations, floor=floor)


class ShiftDetector(Emitter):
    """A drift detector: reports when a loss has risen, and resets itself then.

    Args:
        alpha: weight of a new loss in the smoothed one.
        window: the most losses that the threshold is taken from.
        deviations: standard deviations from their mean to the threshold.
        floor: what their standard deviation counts at least.
        warmup: losses after a start before there can be a shift.

    """

    def __init__(
        self, alpha: float = 0.2, window: int = 100, deviations: float = 3.0, floor: float = 0.005, warmup: int = 0
    ) -> None:
        check_detection(alpha, window, deviations, floor)
        check_integer(0, warmup=warmup)
        self.alpha, self.length, self.deviations, self.floor, self.warmup = alpha, window, deviations, floor, warmup
        self.step = 0
        self.reset(0.0)

    def reset(self, initial_loss: float) -> None:
        """Forget all losses; `initial_loss` is the loss of a guess, which the window starts with."""
        self.initial_loss, self.count = initial_loss, 0
        self.losses = LossWindow(initial_loss, self.length)

    def detect(self, loss: float) -> bool:
        """Return whether the loss of one more batch says that there was a shift; a shift is emitted as `ShiftDetected`.

        The batch of a shift is the first one of what comes after it.
        """
        losses = self.losses
        losses.smoothed = smooth(losses.smoothed, loss, self.alpha)
        threshold = losses.update_threshold(self.deviations, self.floor)
        shifted = self.count >= self.warmup and losses.smoothed > threshold
        if shifted:
            self.emit(ShiftDetected(self.step, losses.smoothed, threshold))
            self.reset(self.initial_loss)
            self.losses.smoothed = loss
        self.losses.add(loss, self.alpha)
        self.count += 1
        self.step += 1
        return shifted


class DriftAlarm:
    """Raises an alarm, `ShiftDetected`, where the loss of new batches has risen: the data is not what it was.

    It looks at the loss that a step began with, in the first epoch of a session, as `clstream.drift_detection` says; the loss of a
    guess is that of the first batch. The tracker draws the smoothed loss at each alarm, and counts the alarms. Where the loss is on
    a GPU, each batch waits for it.

    Args:
        alpha, window, deviations, floor: see `ShiftDetector`.
        warmup: losses after a start, or an alarm, before there can be one.

    """

    def __init__(
        self, alpha: float = 0.2, window: int = 100, deviations: float = 3.0, floor: float = 0.005, warmup: int = 10
    ) -> None:
        self.detector = _Reporting(alpha, window, deviations, floor, warmup)
        self.began = False

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before."""
        self.detector.run, self.detector.step, self.began = event.run, 0, False

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        """Look at the loss of a batch."""
        if event.batch.epoch:
            return
        loss = float(event.loss)
        if not math.isfinite(loss):
            return
        if not self.began:
            self.detector.reset(loss)
            self.began = True
        self.detector.detect(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        detector, losses = self.detector, self.detector.losses
        return {
            "began": self.began, "step": detector.step, "count": detector.count, "initial": detector.initial_loss,
            "losses": list(losses.losses), "smoothed": losses.smoothed, "learned": losses.learned,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        detector = self.detector
        detector.reset(state["initial"])
        self.began, detector.step, detector.count = state["began"], state["step"], state["count"]
        detector.losses.losses = deque(state["losses"], maxlen=detector.length)
        detector.losses.smoothed, detector.losses.learned = state["smoothed"], state["learned"]


class _Reporting(ShiftDetector):
    """A detector whose alarms only observers hear."""

    run: RunControl | None = None

    def emit(self, event: Event) -> None:
        if self.run is not None:
            self.run.emit_to_observers(event)
