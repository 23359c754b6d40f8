"""The training controls of a run, while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clstream.bus import Bus
from clstream.strategy import Strategy
from clstream.stream import Session, Stream
from clstream.training import (
    ClassWeights,
    EarlyStopping,
    OptimizerRenewal,
    RateSchedule,
    Training,
    Updates,
    learner_within,
)


def prepared(stream: Stream, train: Training | None) -> Stream:
    """Return a stream as a run with these controls plays it: with early stopping its sessions hold samples back."""
    held = isinstance(train, Training) and train.patience is not None and isinstance(stream, Stream) and not stream.arrives
    return stream.holding_out(train.held_out) if held and train is not None else stream


def session_steps(stream: Stream, max_sessions: int | None) -> list[int]:
    """Return how many batches each session of a run has, over all of its epochs."""
    whole = min(len(stream), max_sessions or len(stream))
    steps = []
    for index in range(whole):
        samples, size = stream.size_of(index), stream.batch_size
        steps.append(stream.epochs * (samples // size if stream.drop_last else -(-samples // size)))
    return steps


class Controls:
    """What carries out the training controls of a run: it hears the run after the strategy, and the strategy doesn't hold it.

    Args:
        train: the controls; None: there are none.
        strategy, stream, max_sessions: of the run.

    """

    def __init__(self, train: Training | None, strategy: Strategy, stream: Stream, max_sessions: int | None) -> None:
        self.strategy, self.learner = strategy, learner_within(strategy)
        self.updates: Updates | None = None
        self.weights: ClassWeights | None = None
        self.stopping: EarlyStopping | None = None
        self.parts: tuple[object, ...] = () if train is None else tuple(self._made(train, stream, max_sessions))
        self.enter()

    def _made(self, train: Training, stream: Stream, max_sessions: int | None) -> Iterator[object]:
        if train.renew_optimizer is not None:
            yield OptimizerRenewal(self.strategy, train.renew_optimizer)
        if train.has_schedule:
            sizes = session_steps(stream, max_sessions) if train.schedule_over == "run" else None
            yield RateSchedule(self.learner, train.schedule or "constant", train.warmup, sizes)
        if train.clip is not None or train.accumulate > 1:
            self.updates = Updates(train.clip, train.accumulate)
            yield self.updates
        if train.class_weights is not None:
            self.weights = ClassWeights(self.learner, stream.outputs)
            yield self.weights
        if train.patience is not None:
            self.stopping = EarlyStopping(self.strategy, train.patience, stream)
            yield self.stopping

    @property
    def learning(self) -> object:
        """What hears the run first: the strategy, and then the controls."""
        return Learning((self.strategy, *self.parts)) if self.parts else self.strategy

    @property
    def steps_apart(self) -> bool:
        """Whether a step is not the same for several seeds at once: gradients are clipped or added up, or rates change."""
        return self.updates is not None or any(isinstance(part, RateSchedule) for part in self.parts)

    def enter(self) -> None:
        """Have the strategy step as the controls say, from where they are."""
        self.leave()  # what a run that was refused left
        if self.updates is not None:
            self.learner.train_updates = self.updates
        if self.weights is not None:
            self.learner.train_class_weights = self.weights.weights

    def go_on(self, task: int, stream: Stream) -> None:
        """Go on after a session of a task, of another run, with a stream that may have more classes."""
        for part in self.parts:
            if isinstance(part, OptimizerRenewal):
                part.task = task
        if self.weights is not None:
            self.weights.outputs = max(self.weights.outputs, stream.outputs)

    def connect(self, bus: Bus) -> None:
        """Have what early stopping tells heard in the run."""
        if self.stopping is not None:
            self.stopping.bus = bus

    def epochs_saved(self, session: Session, epoch: int) -> int:
        """Return how many epochs of a session are left out after one, by its number; 0 if it goes on."""
        return session.epochs - epoch - 1 if self.stopping is not None and self.stopping.stopped else 0

    def leave(self) -> None:
        """Leave the strategy as it steps by itself."""
        for name in ("train_updates", "train_class_weights", "train_weighed"):
            vars(self.learner).pop(name, None)


@dataclass(frozen=True, eq=False)
class Learning:
    """A strategy and what controls its steps, as one subscriber."""

    parts: tuple[object, ...]
