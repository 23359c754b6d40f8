"""What happens in a run: one frozen dataclass for each kind of event.

The events of a whole run, one letter each (RunStarted R, TaskStarted T, SessionStarted S, EpochStarted E, BatchReady b,
BatchLearned l, EpochEnded e, SessionEnded s, TaskEnded t, Evaluated V, RunEnded r), always match

    R ( T (S..s V)* S..s t V )* r        on a stream that shows its boundaries,
    R (S..s V)* r                        on one that hides them,

where S..s is one session, S ( E (b l)* e )+ s. TaskEnded comes before the evaluation that follows the task's last session:
what a strategy consolidates there is what gets tested. Those are the words with `evaluate_at="sessions"`. With "tasks" and "end"
a V is rarer:

    R ( T S..s+ t V )* r                 with "tasks", which a stream must show its boundaries for,
    R ( T S..s+ t )* V r                 with "end", on a stream that shows them,
    R S..s+ V r                          with "end", on one that hides them.

With `evaluate_every=N`, a V also follows every N-th l. Before each V, and at the start, observers that handle `Answered` hear
what was answered. A run that
fails or is stopped ends in r wherever it is. One that is resumed begins with an R of its own, and then goes on with what would
have come after the checkpoint; one that continues another one has a RunContinued after its R. A strategy or a detector may emit
events of its own: subclass `Event`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from clstream.bus import Event as Event
from clstream.measures import Answers, Cost
from clstream.results import Evaluation
from clstream.stream import Batch, Epoch, Session, Stream, Task, TestSet

if TYPE_CHECKING:
    from clstream.strategy import Strategy


class RunControl(Protocol):
    """What an observer may ask of a run."""

    sessions: int
    """The number of sessions of the run."""

    options: dict[str, str | int | float | bool]
    """Options of the engine that change the bits of a run, by name, where they are not as by default."""

    changed_code: list[str]
    """The user's own code that has changed since the checkpoint, and was accepted: a text for each file."""

    notes: dict[str, str]
    """What observers note for a run that continues this one, by name: the id of its MLflow run."""

    @property
    def continues(self) -> Mapping[str, str] | None:
        """What was noted of the run that this one continues; None if it continues none."""

    @property
    def source_files(self) -> Mapping[str, str]:
        """The source code of the user's own that the run is built from: texts by the names of files."""

    @property
    def cost(self) -> Cost:
        """What the run took so far; the last row is of the session that goes on, or was the last."""

    def defer(self, call: Callable[[], object]) -> None:
        """Have a function called as soon as no event is being handled: between two batches, or after an evaluation."""

    def emit_to_observers(self, event: Event) -> None:
        """Emit an event to the observers alone: the strategy must not hear what was measured against the truth."""

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors: the objects' own, not copies.

        Raises CaptureError for what the strategy holds that can't be written.
        """

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another run, and say what differs: raises OtherRunError, a ValueError."""


@dataclass(frozen=True, slots=True, eq=False)
class RunStarted(Event):
    """A run begins: nothing was learned yet. The stream is on the run's device, with the run's seed in its own.

    To a strategy on a stream that hides its boundaries `stream` is a `StreamView` of it, and there is no run.

    If `resumed`, the run goes on from a checkpoint: what the strategy and the observers hold is restored after this event.
    `run` is what an observer may ask of the run: to have something done between two events, `event.run.defer(call)`.
    """

    stream: Stream
    strategy: Strategy
    seed: int = 0
    resumed: bool = False
    run: RunControl | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RunContinued(Event):
    """A run goes on where another one ended: it comes right after RunStarted, when all is as it was at that end.

    A strategy that was built anew hears RunStarted before it gets its state; one that was just run hears no second RunStarted.
    What has a size by the number of classes grows now. Outputs of networks, what optimizers know of them, and outputs that
    memories keep have grown before this event.

    Args:
        stream: what is learned from here on, as in RunStarted: its first tasks and sessions are those that were learned.
        sessions: how many were finished.
        tasks: how many tasks the stream had until now; strategies hear 0 where the stream hides them.
        classes: how many classes it had until now.

    """

    stream: Stream
    sessions: int
    tasks: int
    classes: int


@dataclass(frozen=True, slots=True, eq=False)
class TaskStarted(Event):
    """A task begins: the next session draws from another task than the last one. Only on streams that show their boundaries."""

    task: Task


@dataclass(frozen=True, slots=True, eq=False)
class SessionStarted(Event):
    """A session begins: it has new samples."""

    session: Session


@dataclass(frozen=True, slots=True, eq=False)
class EpochStarted(Event):
    """A pass over the session begins."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, eq=False)
class BatchReady(Event):
    """A batch is about to be learned."""

    batch: Batch


@dataclass(frozen=True, slots=True, eq=False)
class BatchLearned(Event):
    """A batch was learned; `loss` is what `Strategy.learn` returned: detached, still on the device."""

    batch: Batch
    loss: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EpochEnded(Event):
    """A pass over the session is over."""

    epoch: Epoch


@dataclass(frozen=True, slots=True, eq=False)
class SessionEnded(Event):
    """The session is over: its samples won't come again."""

    session: Session


@dataclass(frozen=True, slots=True, eq=False)
class TaskEnded(Event):
    """A task is over: the next session, if any, draws from another one. Only on streams that show their boundaries."""

    task: Task


@dataclass(frozen=True, slots=True, eq=False)
class Answered(Event):
    """The strategy answered samples of a test set, in an evaluation: a part of it at a time. For observers that handle it, alone.

    `y` are the targets of the samples, and `rows` their numbers in the test set. All of it is on the run's device. On a
    task-incremental stream the task was given, if they are of one. Nothing is asked for this: what an observer reads of the
    answers, that the measures don't, costs a forward pass only where they read no scores at all. Strange samples
    (`test_set.known` is False) are answered where a measure of novelty is taken; their targets say nothing of the stream's classes.
    """

    test_set: TestSet
    answers: Answers
    y: Tensor
    rows: Tensor

    @property
    def scores(self) -> Tensor:
        """(n, outputs), higher is likelier."""
        return self.answers.scores

    @property
    def predictions(self) -> Tensor:
        """Labels (n,), multi-label targets (n, outputs) of 0 and 1, or values (n, outputs)."""
        return self.answers.predicted


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated(Event):
    """The strategy was asked about the tasks; `evaluation` has the rows of the accuracy matrices so far."""

    evaluation: Evaluation


@dataclass(frozen=True, slots=True, eq=False)
class NothingArrived(Event):
    """On a stream that arrives, `sessions` were learned, all that came: the run waits or, if `ended`, is over. For observers."""

    sessions: int
    ended: bool


@dataclass(frozen=True, slots=True, eq=False)
class RunEnded(Event):
    """The run is over: `error` is None, or what ended it. Always fires, once."""

    error: BaseException | None
