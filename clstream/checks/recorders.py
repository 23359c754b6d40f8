"""What the checks observe: the trace of events, and checkpoints of every pause."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clstream import events
from clstream.bus import Event, on
from clstream.strategy import Regulariser
from clstream.stream import Samples

LETTERS = {
    events.RunStarted: "R", events.TaskStarted: "T", events.SessionStarted: "S", events.EpochStarted: "E", events.BatchReady: "b",
    events.BatchLearned: "l", events.EpochEnded: "e", events.SessionEnded: "s", events.TaskEnded: "t", events.Evaluated: "V",
    events.RunEnded: "r",
}  # fmt: skip

SESSION = "S(E(bl)*e)+s"

SHOWN = re.compile(f"R(T({SESSION}V)*{SESSION}tV)*r")

HIDDEN = re.compile(f"R({SESSION}V)*r")


class Trace:
    """An observer that writes each event of a run down as a letter; events of a strategy's own are left out."""

    def __init__(self) -> None:
        self.word = ""

    @on(Event)
    def write(self, event: Event) -> None:
        """Write the letter."""
        self.word += LETTERS.get(type(event), "")


class Checkpoints:
    """An observer that keeps checkpoints of a run in memory, as they would be on disk.

    Args:
        every: take one after the start, after every so many batches and after each session; 0: the last one only.
        at: the number of a batch, from 1, after which one is taken too.
        step: of these, keep every so manieth, from the middle of the first so many on, and the last one.

    """

    def __init__(self, every: int = 1, at: int = 0, step: int = 1) -> None:
        self.every, self.at, self.step, self.batches, self.passed = every, at, step, 0, 0
        self.written: list[bytes | Mapping[str, Any]] = []

    @on(events.RunStarted)
    def begin(self, event: events.RunStarted) -> None:
        """Take the first checkpoint."""
        assert event.run is not None
        self.run = event.run
        if self.every:
            self.run.defer(self.write)
        elif self.at:
            self.run.defer(lambda: None)  # as one who takes checkpoints: what they refer to is noted before anything is learned

    @on(events.BatchLearned)
    def learned(self, event: events.BatchLearned) -> None:
        """Take a checkpoint after the batch."""
        self.batches += 1
        if self.batches == self.at or (self.every and self.batches % self.every == 0):
            self.run.defer(self.write)

    @on(events.Evaluated)
    def evaluated(self, event: events.Evaluated) -> None:
        """Take a checkpoint after the evaluation; within a session that is the one after the batch."""
        last = event.evaluation.sessions_finished == self.run.sessions
        if last and not event.evaluation.within_session:
            self.run.defer(self.keep)
        elif self.every and not event.evaluation.within_session:
            self.run.defer(self.write)

    def write(self) -> None:
        """Keep a checkpoint, if it is one of those to keep."""
        if self.passed % self.step == self.step // 2:
            self.keep()
        self.passed += 1

    def keep(self) -> None:
        """Keep a checkpoint: as a file or, where it is the last one alone, as it is."""
        state = self.run.state()
        if self.every:
            file = io.BytesIO()
            torch.save(state, file)
            self.written.append(file.getvalue())
        else:
            storages = [storage.clone() for storage in state["strategy"]["storages"]]
            self.written.append({**state, "strategy": {**state["strategy"], "storages": storages}})

    def load(self, number: int) -> Mapping[str, Any]:
        """Return a checkpoint, for `run(resume=...)`."""
        written = self.written[number]
        state: Mapping[str, Any]
        state = torch.load(io.BytesIO(written), weights_only=True) if isinstance(written, bytes) else written
        return state


class Asking:
    """An observer that asks the strategy for answers: around the first steps of a session, at its end, and after each evaluation.

    What it was answered at the end is in `answers`.
    """

    def __init__(self) -> None:
        self.answers: list[Tensor] = []

    @on(Event)
    def ask(self, event: Event) -> None:
        """Ask for scores and labels, in every way that there is."""
        if isinstance(event, events.RunStarted):  # some have nothing to answer with yet
            self.strategy, self.task = event.strategy, event.stream.tasks[0]
        early = isinstance(event, (events.BatchReady, events.BatchLearned)) and event.batch.index < 2
        if not early and not isinstance(event, (events.SessionEnded, events.Evaluated, events.RunEnded)):
            return
        x, strategy = self.task.test[:].x, self.strategy
        self.answers = [strategy.scores(x), strategy.predict(x), strategy.predict(x, self.task), strategy.predict_online(x)]
        assert not any(answer.requires_grad for answer in self.answers), "an answer has the graph that it was computed by"


class Losses:
    """An observer that keeps the loss of each step."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []

    @on(events.BatchLearned)
    def keep(self, event: events.BatchLearned) -> None:
        """Keep the loss."""
        self.all.append(event.loss)


class SquaredNorm(Regulariser):
    """A penalty: the sum of the squares of the strategy's weights that learn."""

    def penalty(self, samples: Samples) -> Tensor:
        """Return the sum: a scalar."""
        return torch.stack([weight.square().sum() for weight in self.strategy.model.parameters() if weight.requires_grad]).sum()
