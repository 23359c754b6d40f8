"""The run: plays a stream to a strategy, and tells everyone what happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import index

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream import events, metrics
from clstream.bus import Bus, Emitter, subscriptions
from clstream.evaluation import Evaluation, check_labels, evaluate, evaluating
from clstream.params import Recorded, flat
from clstream.seeds import derive, isolated
from clstream.state import walk
from clstream.strategy import Strategy, needs
from clstream.stream import Batch, Session, Stream

FINITE_EVERY = 64
"""Batches after which the losses are checked together: one look at the device for all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Result(Evaluation):
    """What a run measured: its last evaluation, and what was run.

    Args:
        params: what was run, by name, in plain values.
        seconds: how long it took, evaluation and observers included.

    """

    params: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def average_accuracy(self) -> float:
        """Mean of the last row of the main matrix over the tasks seen."""
        return metrics.average_accuracy(self.main, self.taught)

    @property
    def forgetting(self) -> float:
        """Mean over tasks but the last of (best earlier - last), in the main matrix; NaN for a single task."""
        return metrics.forgetting(self.main, self.taught)


def run(
    strategy: Strategy,
    stream: Stream,
    *observers: object,
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
) -> Result:
    """Play `stream` to `strategy`, evaluate it after every session, and return what was measured.

    Args:
        strategy: learns, answers, and hears every event first.
        stream: what it learns.
        observers: objects with handlers (`on`), called after the strategy's: tracker, progress bar.
        seed: of all that is random in the run. The caller's global generators are the same before and after.
        device: where it runs, as torch names it.
        evaluate_every: also evaluate after every so many batches, counted over the whole run.
        max_sessions: stop after so many sessions; the last one ends its task.

    Raises:
        ValueError, TypeError: if these don't fit together; before anything is learned.
        FloatingPointError: if a loss is not finite; it names the task, session and batch.

    """
    check_fits(strategy, stream, device, evaluate_every, max_sessions, seed)
    seed = index(seed)
    bus = Bus(strategy, *observers)
    begin = time.perf_counter()
    with isolated(seed, "run", device=device):
        placed = Placed(strategy, device, seed, bus)
        stream = stream.reseeded(seed).to(device)
        emit = bus.emit
        sessions = min(len(stream), max_sessions or len(stream))
        error: BaseException | None = None
        try:
            emit(events.RunStarted(stream, strategy, seed))
            placed.update()
            measured = Measured(strategy, stream, emit)
            for position in range(sessions):
                session, number = stream.session(position), stream.task_of(position)
                if stream.boundaries and (position == 0 or stream.task_of(position - 1) != number):
                    emit(events.TaskStarted(stream.tasks[number]))
                emit(events.SessionStarted(session))
                placed.update()
                learn(strategy, session, emit, measured, evaluate_every)
                emit(events.SessionEnded(session))
                if stream.boundaries and (position + 1 == sessions or stream.task_of(position + 1) != number):
                    emit(events.TaskEnded(stream.tasks[number]))
                placed.update()
                measured.evaluate(number, within_session=False)
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                bus.close(events.RunEnded(error))
            finally:
                placed.leave()
    found = {each.name: getattr(measured.evaluation, each.name) for each in fields(Evaluation)}
    return Result(**found, params=described(strategy, stream, seed, device), seconds=time.perf_counter() - begin)


def learn(
    strategy: Strategy, session: Session, emit: Callable[[events.Event], None], measured: Measured, evaluate_every: int | None
) -> None:
    """Play one session."""
    number = measured.stream.task_of(session.index)
    for epoch in session:
        emit(events.EpochStarted(epoch))
        losses: list[Tensor] = []
        for batch in epoch:
            emit(events.BatchReady(batch))
            loss = strategy.learn(batch)
            emit(events.BatchLearned(batch, loss))
            losses.append(loss)
            if len(losses) == FINITE_EVERY:
                check_losses(losses, strategy, number, session, batch)
            measured.step += 1
            if evaluate_every and measured.step % evaluate_every == 0:
                check_losses(losses, strategy, number, session, batch)
                measured.evaluate(number, within_session=True)
        check_losses(losses, strategy, number, session, batch)
        emit(events.EpochEnded(epoch))


def check_losses(losses: list[Tensor], strategy: Strategy, task: int, session: Session, newest: Batch) -> None:
    """Refuse losses that are not detached, finite scalars, naming the batch of the first one; then forget them."""
    if not losses:
        return
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.requires_grad:
            raise TypeError(
                f"{type(strategy).__name__}.learn must return its loss as a detached scalar tensor: `return loss.detach()`"
            )
    finite = torch.stack(losses).isfinite()
    if not finite.all():
        back = len(losses) - 1 - int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"the loss is {float(losses[len(losses) - 1 - back])} in task {task}, session {session.index}, "
            f"epoch {newest.epoch}, batch {newest.index - back}: try a smaller learning rate, or look at that batch"
        )
    losses.clear()


class Placed:
    """What a strategy holds, in the run: modules on its device, generators seeded from its seed and their place, emitters heard.

    `update` takes in what came to be since: experts, heads, a memory for a new task.
    """

    def __init__(self, strategy: Strategy, device: str | torch.device, seed: int, bus: Bus) -> None:
        self.strategy, self.device, self.seed, self.bus = strategy, device, seed, bus
        self.known: dict[int, object] = {}  # the objects themselves, so that no new one gets the id of an old one
        self.update()

    def update(self) -> None:
        """Place what is new."""
        for path, value in walk(self.strategy):
            if not isinstance(value, (nn.Module, torch.Generator, Emitter)) or id(value) in self.known:
                continue
            self.known[id(value)] = value
            if isinstance(value, nn.Module):
                value.to(self.device)
            elif isinstance(value, torch.Generator):
                value.manual_seed(derive(self.seed, path))
            else:
                value.bus = self.bus

    def leave(self) -> None:
        """Take the emitters out of the run."""
        for value in self.known.values():
            if isinstance(value, Emitter):
                value.bus = None


def described(
    strategy: Strategy, stream: Stream, seed: int, device: str | torch.device
) -> dict[str, str | int | float | bool | None]:
    """Return what is run, by name, in plain values."""
    model = getattr(strategy, "model", None)
    return {
        **flat(strategy, "strategy"),
        **(flat(model, "model") if isinstance(model, Recorded) else {"model": type(model).__name__}),
        "stream": stream.name,
        "stream.tasks": len(stream.tasks),
        "stream.sessions": len(stream),
        "stream.scenario": stream.scenario,
        "stream.epochs": stream.epochs,
        "stream.batch_size": stream.batch_size,
        "stream.boundaries": stream.boundaries,
        "seed": seed,
        "device": str(device),
    }


class Measured:
    """What a run has measured so far, and how it measures more."""

    def __init__(self, strategy: Strategy, stream: Stream, emit: Callable[[events.Event], None]) -> None:
        self.strategy, self.stream, self.emit = strategy, stream, emit
        self.step = 0
        self.evaluation = Evaluation.of_untrained(*evaluate(strategy, stream), stream.scenario)

    def evaluate(self, task: int, within_session: bool) -> None:
        """Evaluate, keep the rows, and tell; `task` is what is being taught."""
        self.evaluation = self.evaluation.after(*evaluate(self.strategy, self.stream), task, self.step, within_session)
        self.emit(events.Evaluated(self.evaluation))


def check_fits(
    strategy: Strategy,
    stream: Stream,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    seed: int = 0,
) -> None:
    """Refuse, in one sentence, what can't run: see the errors of `run`."""
    given: tuple[object, object] = (strategy, stream)  # whatever they are annotated as
    if not isinstance(given[0], Strategy):
        what = f"the class {given[0].__name__}" if isinstance(given[0], type) else f"a {type(strategy).__name__}"
        raise TypeError(f"run takes a Strategy object, not {what}")
    if not isinstance(given[1], Stream):
        raise TypeError(f"run takes a Stream as its second argument, not a {type(stream).__name__}")
    for name, value in (("evaluate_every", evaluate_every), ("max_sessions", max_sessions)):
        if value is not None and (not hasattr(value, "__index__") or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, or None, not {value!r}")
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    check_device(device)
    list(subscriptions(strategy))  # refuses handlers and parts that can't be
    for need, reason in needs(strategy).items():
        if not stream.boundaries:
            raise ValueError(f"{type(strategy).__name__} needs {need}, which {stream.name} hides ({reason})")
    if type(strategy).learn is Strategy.learn and not isinstance(getattr(strategy, "optimizer", None), Optimizer):
        raise TypeError(f"{type(strategy).__name__} has no optimizer: call super().__init__(model, optimizer) in its constructor")
    check_answers(strategy, stream)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that isn't there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"there is no device {str(device)!r} here, only {', '.join(there)} ({str(error).splitlines()[0]})"
        ) from None


def check_answers(strategy: Strategy, stream: Stream) -> None:
    """Refuse a strategy whose answer to one sample is not what the stream asks for; the caller's generators stay as they are.

    One that overrides `scores` or `predict` may need the start of a run to answer: only the shape of an answer that it gives
    is checked, and the evaluation before the first session tells the rest.
    """
    plain = type(strategy).scores is Strategy.scores and type(strategy).predict is Strategy.predict
    model = getattr(strategy, "model", None)
    if plain and not isinstance(model, nn.Module):
        raise TypeError(f"{type(strategy).__name__} has no model: call super().__init__(model) in its constructor")
    first = stream.tasks[0].test[:1]
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    samples = first if parameter is None else first.to(parameter.device)
    name = type(model).__name__
    with isolated(0, "check"), evaluating(strategy):
        try:
            scores = strategy.scores(samples.x)
        except (RuntimeError, ValueError, TypeError) as error:
            if not plain:
                return
            raise ValueError(
                f"{name} can't take the inputs of {stream.name}, {tuple(first.x.shape[1:])} of {first.x.dtype}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        except Exception:  # noqa: BLE001  # its own business until the run has started
            return
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < stream.classes:
        who = name if plain else f"{type(strategy).__name__}.scores"
        raise ValueError(
            f"{who} answers one sample with {shape}, but {stream.name} has {stream.classes} classes: "
            f"build it with classes={stream.classes}"
        )
    if type(strategy).predict is not Strategy.predict:
        with isolated(0, "check"), evaluating(strategy):
            check_labels((strategy.predict(samples.x),), samples, strategy)
