"""What is measured of streams that arrive: answers whose truth comes later, and losses that rise."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clstream.bus import Event, ObserverError, on
from clstream.drift_detection import ShiftDetector
from clstream.engine import InputsArrived, SessionArrived
from clstream.evaluation import evaluating
from clstream.events import BatchLearned, RunControl, RunStarted


@dataclass(frozen=True, slots=True, eq=False)
class DelayedMeasured(Event):
    """The labels of inputs came that were answered when they arrived: the accuracy of those answers, and of all such so far."""

    name: str
    session: float
    mean: float

    def curves(self) -> dict[str, float]:
        """Return both, for the tracker."""
        return {"delayed/session": self.session, "delayed/mean": self.mean}


class Delayed:
    """Measures answers to inputs whose labels come later: the strategy predicts when they arrive, and the labels judge that.

    Prequential accuracy asks when a batch is about to be learned; by then the strategy may have learned what came in between. It
    is for labels. When the labels come it emits `DelayedMeasured`, so the tracker draws it.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Tensor] = {}  # predictions, (n,), int64, on the CPU, by the name of the session
        self.hits, self.samples = 0, 0

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before. Raises ObserverError for a stream with other targets than labels."""
        if event.stream.target != "label":
            raise ObserverError(f"Delayed is of labels, and {event.stream.name} has {event.stream.target} ones: leave it out")
        self.started, self.answers, self.hits, self.samples = event, {}, 0, 0

    @on(InputsArrived)
    def answer(self, event: InputsArrived) -> None:
        """Have the strategy predict the labels, once."""
        if event.name not in self.answers:
            strategy = self.started.strategy
            with evaluating(strategy):
                parts = [strategy.predict_online(x) for x in event.x.split(1024)]
            self.answers[event.name] = torch.cat(parts).cpu()

    @on(SessionArrived)
    def judge(self, event: SessionArrived) -> None:
        """Emit how many answers were right, if the session's inputs were answered when they arrived."""
        answers = self.answers.pop(event.name, None)
        if answers is None or self.started.run is None:
            return
        right = int((answers == event.y.cpu()).sum())
        self.hits, self.samples = self.hits + right, self.samples + len(answers)
        measured = DelayedMeasured(event.name, right / len(answers), self.hits / self.samples)
        self.started.run.emit_to_observers(measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"answers": dict(self.answers), "hits": self.hits, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.answers, self.hits, self.samples = dict(state["answers"]), state["hits"], state["samples"]


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
