"""Early stopping: a session ends when its held-out samples are answered no better for some epochs, with the best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clstream.attributes import find_all
from clstream.bus import Emitter, Event, on
from clstream.evaluation import Questions, evaluate
from clstream.events import EpochEnded, SessionStarted
from clstream.measures import chosen
from clstream.strategy import Strategy
from clstream.stream import Stream


@dataclass(frozen=True, slots=True, eq=False)
class EpochMeasured(Event):
    """An epoch is over, and the session's held-out samples were answered; `value` is the main measure of their targets."""

    session: int
    epoch: int
    value: float

    def curves(self) -> Mapping[str, float]:
        """Return the value."""
        return {"train/held_out": self.value}


@dataclass(frozen=True, slots=True, eq=False)
class SessionStoppedEarly(Event):
    """A session ends before its last epoch. It was passed over `epochs` times, and `epochs_saved` passes are left out.

    The best weights, those after epoch `best_epoch`, from 0, are back; with them the held-out samples have `value`.
    """

    session: int
    epochs: int
    epochs_saved: int
    best_epoch: int
    value: float

    def curves(self) -> Mapping[str, float]:
        """Return the epochs that were saved."""
        return {"train/epochs_saved": float(self.epochs_saved)}


@dataclass(frozen=True, slots=True, eq=False)
class BestWeightsRestored(Event):
    """The weights after epoch `best_epoch`, from 0, are back, since the epochs after it answered held-out samples worse."""

    session: int
    best_epoch: int
    value: float


class EarlyStopping(Emitter):
    """After each epoch, asks a strategy about the held-out samples of the session; says when the session is to end (`stopped`).

    What is asked is the main measure of their targets (accuracy, map, r2), with the task given on a task-incremental stream. Of
    equal values the last one counts as the best, but is no reason to go on. Kept and restored are the parameters and buffers of
    modules that learn; memories, and what an optimizer keeps, go on as they are.

    Args:
        strategy: who is asked, the outermost one.
        patience: epochs without a better value than the best so far, after which the session ends.
        stream: whose sessions hold samples back: see `Stream.holding_out`.

    """

    not_state = ("stream", "questions")

    def __init__(self, strategy: Strategy, patience: int, stream: Stream) -> None:
        self.strategy, self.patience, self.stream = strategy, patience, stream
        self.questions: Questions | None = None
        self.stopped = False
        self.best: dict[str, dict[str, Tensor]] = {}
        self.value, self.best_epoch, self.waited = -math.inf, -1, 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        """Forget the session before."""
        self.questions, self.stopped, self.best = None, False, {}
        self.value, self.best_epoch, self.waited = -math.inf, -1, 0

    @on(EpochEnded)
    def look(self, event: EpochEnded) -> None:
        """Ask about the held-out samples; keep the weights if they are the best, and restore the best if the session ends."""
        session, epoch = event.epoch.session, event.epoch.index
        if self.questions is None and not len(self.stream.held_back(session.index)):
            return  # what was bought of a pool may be too little to hold any of it back: all epochs are learned
        value = self.measured(session.index)
        self.emit(EpochMeasured(session.index, epoch, value))
        self.waited = 0 if value > self.value else self.waited + 1
        if value >= self.value:  # of equal ones the weights that have learned more
            self.best, self.value, self.best_epoch = self.weights(), value, epoch
        left = session.epochs - epoch - 1
        self.stopped = left > 0 and self.waited >= self.patience
        if left and not self.stopped:
            return
        if self.best and self.best_epoch < epoch:
            self.restore()
            self.emit(BestWeightsRestored(session.index, self.best_epoch, self.value))
        self.best, self.questions = {}, None
        if self.stopped:
            self.emit(SessionStoppedEarly(session.index, epoch + 1, left, self.best_epoch, self.value))

    def measured(self, session: int) -> float:
        """Return how well the samples that a session holds back are answered."""
        number = self.stream.task_of(session)
        if self.questions is None:
            twin = self.stream.testing(self.stream.held_back(session), number)
            asked = torch.arange(len(twin.tasks)) == number
            self.questions = Questions(self.strategy, twin, asked, chosen(None, twin.targets, "task"))
        rows = evaluate(self.strategy, self.questions.stream, self.questions)
        return float(rows[self.stream.scenario == "task"][number])

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that learn, by path."""
        modules = find_all(self.strategy, nn.Module)
        return {path: module for path, module in modules if any(weight.requires_grad for weight in module.parameters())}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of what they hold, by path and name."""
        return {
            path: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            for path, module in self.modules().items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Give the modules the best weights."""
        modules = self.modules()
        for path, best in self.best.items():
            held = modules[path].state_dict()
            for name, tensor in best.items():
                held[name].copy_(tensor)
