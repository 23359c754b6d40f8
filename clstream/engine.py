"""The run: plays a stream to a strategy, and tells everyone what happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from clstream import events, metrics
from clstream.bus import Bus, Emitter
from clstream.evaluation import Evaluation, evaluate
from clstream.params import Recorded, flat
from clstream.seeds import derive, isolated
from clstream.state import held
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
    check_fits(strategy, stream, device, evaluate_every, max_sessions)
    bus = Bus(strategy, *observers)
    begin = time.perf_counter()
    with isolated(seed, "run", device=device):
        place(strategy, device, seed)
        stream = stream.reseeded(seed).to(device)
        emit = bus.emit
        sessions = min(len(stream), max_sessions or len(stream))
        emitters = [emitter for _, emitter in held(strategy, Emitter)]
        error: BaseException | None = None
        try:
            for emitter in emitters:
                emitter.bus = bus
            emit(events.RunStarted(stream, strategy, seed))
            measured = Measured(strategy, stream, emit)
            for index in range(sessions):
                session, number = stream.session(index), stream.task_of(index)
                if stream.boundaries and (index == 0 or stream.task_of(index - 1) != number):
                    emit(events.TaskStarted(stream.tasks[number]))
                emit(events.SessionStarted(session))
                learn(strategy, session, emit, measured, evaluate_every)
                emit(events.SessionEnded(session))
                if stream.boundaries and (index + 1 == sessions or stream.task_of(index + 1) != number):
                    emit(events.TaskEnded(stream.tasks[number]))
                measured.evaluate(number, within_session=False)
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                bus.close(events.RunEnded(error))
            finally:
                for emitter in emitters:
                    emitter.bus = None
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


def place(strategy: Strategy, device: str | torch.device, seed: int) -> None:
    """Move what the strategy holds to the device, and seed each of its generators from the run's seed and its place."""
    for _, module in held(strategy, nn.Module):
        module.to(device)
    for path, generator in held(strategy, torch.Generator):
        generator.manual_seed(derive(seed, path))


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
    strategy: Strategy, stream: Stream, device: str | torch.device, evaluate_every: int | None, max_sessions: int | None
) -> None:
    """Refuse, in one sentence, what can't run: see the errors of `run`."""
    given: tuple[object, object] = (strategy, stream)  # whatever they are annotated as
    if not isinstance(given[0], Strategy):
        what = f"the class {given[0].__name__}" if isinstance(given[0], type) else f"a {type(strategy).__name__}"
        raise TypeError(f"run takes a Strategy object, not {what}")
    if not isinstance(given[1], Stream):
        raise TypeError(f"run takes a Stream as its second argument, not a {type(stream).__name__}")
    for name, value in (("evaluate_every", evaluate_every), ("max_sessions", max_sessions)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, or None, not {value!r}")
    check_device(device)
    for need, reason in needs(strategy).items():
        if not stream.boundaries:
            raise ValueError(f"{type(strategy).__name__} needs {need}, which {stream.name} hides ({reason})")
    check_model(strategy, stream)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that isn't there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"there is no device {str(device)!r} here, only {', '.join(there)} ({str(error).splitlines()[0]})"
        ) from None


def check_model(strategy: Strategy, stream: Stream) -> None:
    """Refuse a model that can't take the stream's inputs or has fewer outputs than the stream has classes."""
    if type(strategy).scores is not Strategy.scores:
        return  # what it makes of its model is its own business; its answers are checked before anything is learned
    x = stream.tasks[0].test[:1].x
    name = type(strategy.model).__name__
    parameter = next(strategy.model.parameters(), None)
    training = [module for module in strategy.model.modules() if module.training]
    strategy.model.eval()
    try:
        with torch.inference_mode():
            scores = strategy.model(x if parameter is None else x.to(parameter.device))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} can't take the inputs of {stream.name}, {tuple(x.shape[1:])} of {x.dtype}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < stream.classes:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{name} answers one sample with {shape}, but {stream.name} has {stream.classes} classes: "
            f"build it with classes={stream.classes}"
        )
