"""Boundaries for a strategy that needs them, on a stream that has none: a wrapper that cuts the stream where the loss rises.

The detector is TAME's (Zhu et al. 2024; `clstream.drift_detection`). It is told the cross-entropy of each batch before it is
learned, of the wrapped strategy's model in evaluation mode. Where it sees a shift, the wrapped strategy is told

    EpochEnded, SessionEnded, TaskEnded, TaskStarted, SessionStarted, EpochStarted

before that batch, so what it hears has the grammar of a stream with boundaries. No one else hears these: observers are told of
`ShiftDetected`, and of the stream's own events. True boundaries, where a stream shows them, are kept from the wrapped strategy.

Tasks are made from what was seen, and nothing else:

a task when it starts     its first batch
a task when it ends       a uniform sample of at most `keep` of the samples since it started, of the first epoch in which it saw
                          each session; there are no test samples
a session that was cut    when it ends, the same since it started or was cut; when it starts, and where it was not cut, the session
                          as it is delivered
epochs                    count from the cut

A shift is seen some batches late: the end of a task, and the session that is cut there, hold these samples of the next one. A
strategy that reads the task of a batch or session is refused, and one that hears evaluations: a detected task says nothing about
which task it is. Of the stream it is told what `StreamView` says, and it is not told the task of a question, unless the stream is
task-incremental. When the run ends, the last task ends.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.bus import Event, Handler, on, subscriptions
from clstream.drift_detection import ShiftDetector
from clstream.events import (
    BatchLearned,
    BatchReady,
    EpochEnded,
    EpochStarted,
    Evaluated,
    RunEnded,
    RunStarted,
    SessionEnded,
    SessionStarted,
    TaskEnded,
    TaskStarted,
)
from clstream.measures.flops import consolidating
from clstream.memory import Reservoir
from clstream.models.ensemble import Ensemble
from clstream.params import check_integer
from clstream.strategy import CONTROLS, Regulariser, Strategy, Wrapper, needs
from clstream.stream import Batch, Epoch, Samples, Session, Task


class WithDetectedBoundaries(Wrapper):
    """Tell the wrapped strategy of boundaries where its loss rises.

    Args:
        base: the strategy; it has a `model` that gives logits.
        alpha, window, deviations, floor, warmup: of the detector, see `clstream.drift_detection.ShiftDetector`.
        keep: the most samples that are kept of a task, and of a session.

    """

    not_state: tuple[str, ...] = ("handlers", "ensemble")
    takes_controls = CONTROLS  # as far as the base does
    rehearsal_free = False  # it keeps samples, whatever the base does
    exempt = MappingProxyType({"continues_exactly": "the detector goes by the loss of a guess, with as many classes as at first"})
    learns_targets = ("label",)  # the detector goes by their cross-entropy
    mixes_targets = False

    def __init__(
        self,
        base: Strategy,
        alpha: float = 0.2,
        window: int = 100,
        deviations: float = 3.0,
        floor: float = 0.005,
        warmup: int = 10,
        keep: int = 1000,
    ) -> None:
        super().__init__(base)
        self.parts = ()  # all that the base hears, it hears from here
        check_integer(1, keep=keep)
        self.check_base()
        self.keep = keep
        self.shows_task = False  # whether the stream is task-incremental
        self.detector = ShiftDetector(alpha, window, deviations, floor, warmup)
        self.of_task, self.of_session = Reservoir(keep), Reservoir(keep)
        self.chance_loss = 0.0
        self.tasks = 0  # that began
        self.current_session: Session | None = None  # that the stream is in
        self.session_open = False  # whether the base was told of it
        self.cut_epoch = 0  # the epoch of it in which it was cut
        self.was_cut = False
        self.handlers: list[tuple[type[Event], Handler]] = []  # what the base hears, from here
        self.ensemble: Ensemble | None = None  # the model, to be asked in evaluation mode

    def check_base(self) -> None:
        """Refuse a base that needs what can't be detected."""
        name = type(self.base).__name__
        if reason := needs(self.base).get("task ids"):
            raise ValueError(f"WithDetectedBoundaries finds boundaries, not which task it is, and {name} needs that ({reason})")
        if self.base.active_classes == "task" and not any(issubclass(event, TaskStarted) for event, _ in subscriptions(self.base)):
            raise ValueError(
                "WithDetectedBoundaries finds boundaries, but a session tells no task there, which active_classes='task' of "
                f"{name} goes by: take 'seen' or 'all'"
            )
        for event, handler in subscriptions(self.base):
            if issubclass(event, Evaluated):
                raise ValueError(
                    f"WithDetectedBoundaries tells nothing of evaluations, which say what was taught, and {name} needs them "
                    f"({handler.__qualname__} handles Evaluated)"
                )

    def add_regularisers(self, *regularisers: Regulariser) -> None:
        """Add them to the wrapped strategy. Raises ValueError for one that needs what can't be detected."""
        super().add_regularisers(*regularisers)
        self.check_base()

    def tell(self, event: Event) -> None:
        """Have the wrapped strategy handle an event."""
        for kind, handler in self.handlers:
            if isinstance(event, kind):
                handler(event)

    @on(Event)
    def relay(self, event: Event) -> None:
        """Pass an event on to the wrapped strategy, true boundaries left out, with the detected ones before their batch."""
        if isinstance(event, (TaskStarted, TaskEnded, Evaluated)):
            return
        if isinstance(event, RunStarted):
            event = self.begin_run(event)
        elif isinstance(event, SessionStarted):
            self.current_session, self.cut_epoch, self.was_cut = event.session, 0, False
            return  # the base is told when its first batch comes, since that may be a shift
        elif isinstance(event, EpochStarted):
            if not self.session_open:
                return
            event = EpochStarted(self.epoch(event.epoch.index))
        elif isinstance(event, EpochEnded):
            event = EpochEnded(self.epoch(event.epoch.index))
        elif isinstance(event, SessionEnded):
            event, self.session_open = SessionEnded(self.session()), False
        elif isinstance(event, BatchReady):
            self.detect(event.batch)
            event = BatchReady(self.batch(event.batch))
        elif isinstance(event, BatchLearned):
            if event.batch.epoch == self.cut_epoch:  # in later ones the samples come again
                seen = self.hide_task(event.batch.samples)
                self.of_task.add(seen)
                self.of_session.add(seen)
            event = BatchLearned(self.batch(event.batch), event.loss)
        elif isinstance(event, RunEnded) and event.error is None and self.tasks:
            with consolidating():
                self.tell(TaskEnded(self.task(self.of_task.all())))
        self.tell(event)

    def begin_run(self, event: RunStarted) -> RunStarted:
        """Start anew, for all that the base has among its parts by now. Return the event that the base gets."""
        self.handlers = list(subscriptions(self.base))
        self.chance_loss, self.shows_task = math.log(event.stream.classes), event.stream.scenario == "task"
        self.detector.reset(self.chance_loss)
        self.detector.step = 0
        self.tasks, self.current_session, self.session_open = 0, None, False
        stream: Any = event.stream
        return event if self.shows_task else replace(event, stream=getattr(stream, "view", stream), run=None)

    @on(SessionStarted)
    def grow_head(self, event: SessionStarted) -> None:
        """Grow nothing: the wrapped strategy does, when it gets the session, after a task that ends there."""

    def detect(self, batch: Batch) -> None:
        """Before a batch: test whether it is a shift, and tell the wrapped strategy what begins and ends."""
        samples = self.hide_task(batch.samples)
        shifted = self.detector.detect(self.loss_before(samples))
        if shifted and self.session_open:
            self.tell(EpochEnded(self.epoch(batch.epoch)))
            self.cut_epoch, self.was_cut, self.session_open = batch.epoch, True, False
            with consolidating():
                self.tell(SessionEnded(self.session()))
        if shifted:
            with consolidating():
                self.tell(TaskEnded(self.task(self.of_task.all())))
        if shifted or not self.tasks:
            self.tasks += 1
            self.of_task = Reservoir(self.keep)
            self.tell(TaskStarted(self.task(samples)))
        if not self.session_open:
            self.session_open, self.of_session = True, Reservoir(self.keep)
            assert self.current_session is not None
            self.tell(SessionStarted(replace(self.current_session, task_if_shown=None)))
            self.tell(EpochStarted(self.epoch(batch.epoch)))

    @torch.no_grad()
    def loss_before(self, samples: Samples) -> float:
        """Return the cross-entropy of a batch, in evaluation mode, that of a guess where no output is of the label yet.

        It waits for the device.
        """
        if self.ensemble is None or self.ensemble.models[0] is not self.model:
            self.ensemble = Ensemble([self.model])
        outputs = Strategy.mask_other_heads(self, self.ensemble.outputs_of(0, samples.x), samples.y, samples.extra.get("task"))
        losses = F.cross_entropy(outputs, samples.y, reduction="none")
        unknown = outputs.gather(1, samples.y[:, None]).flatten().isneginf()
        return float(torch.where(unknown, self.chance_loss, losses).mean())

    def task(self, samples: Samples) -> Task:
        """Return the task that runs, with what is known of it."""
        return Task(self.tasks - 1, tuple(samples.y.unique().tolist()), samples, samples[:0])

    def hide_task(self, samples: Samples) -> Samples:
        """Return samples with nothing else that may tell of tasks, unless the stream tells the task of each."""
        task = samples.extra.get("task") if self.shows_task else None
        return Samples(samples.x, samples.y) if task is None else Samples(samples.x, samples.y, {"task": task})

    def session(self) -> Session:
        """Return the session that runs, as the wrapped strategy may know it: with what was seen, if it was cut."""
        assert self.current_session is not None
        session = replace(self.current_session, task_if_shown=None)
        return replace(session, samples=self.of_session.all()) if self.was_cut else session

    def epoch(self, index: int) -> Epoch:
        """Return an epoch by its number in the stream's session; it counts from the cut."""
        assert self.current_session is not None
        return Epoch(replace(self.current_session, task_if_shown=None), index - self.cut_epoch)

    def batch(self, batch: Batch) -> Batch:
        """Return a batch, as the wrapped strategy may know it."""
        return replace(batch, task_if_shown=None, epoch=batch.epoch - self.cut_epoch)

    def learn(self, batch: Batch) -> Tensor:
        """Learn as the wrapped strategy does."""
        return self.base.learn(self.batch(batch))

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Answer as the wrapped strategy does; it is not given the task."""
        return self.base.scores(x, task if self.shows_task else None)

    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | None = None, threshold: float = 0.5) -> Tensor:
        """Answer as the wrapped strategy does; with a task that it is not given, by the highest of its scores among the task's."""
        if task is None or self.shows_task:
            return super().predict(x, task, threshold)
        return Strategy.predict(self, x, task, threshold)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether the wrapped strategy does."""
        return self.base.scores_ignore_task
