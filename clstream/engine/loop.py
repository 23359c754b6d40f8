"""The loop: the definition of a simulation. A stream is played to a strategy, and each step is an event for all who listen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from clstream import events
from clstream.bus import with_parts
from clstream.checkpoint.saved_state import Position
from clstream.engine.compatibility import check_answers, check_fits, check_played
from clstream.engine.compiled_step import compiling
from clstream.engine.continuation import continuation_of, note_end, resumed
from clstream.engine.controls import prepared
from clstream.engine.finite_losses import FiniteLosses
from clstream.engine.numerics import Numerics
from clstream.engine.simulation import Simulation
from clstream.eval_mode import as_written
from clstream.measures import Measure, chosen
from clstream.params import check_bool
from clstream.results import Result, result_of
from clstream.seeds import isolated
from clstream.strategy import Strategy
from clstream.stream import Batch, Session, Stream, Task
from clstream.training import Training

FINITE_EVERY = 64
"""Batches after which the losses are looked at together."""

_RAN = WeakValueDictionary[int, Strategy]()
"""The strategies that were run, by id, so that a second run of one is noticed."""


def run(
    strategy: Strategy,
    stream: Stream,
    *observers: object,
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    resume: Mapping[str, Any] | None = None,
    accept_changed_code: bool = False,
    code: Sequence[object] = (),
    evaluate_at: str = "sessions",
    evaluate_on: str = "all",
    measures: Sequence[str | Measure | type[Measure]] | None = None,
    precision: str = "fp32",
    deterministic: bool = False,
    compile: bool = False,  # noqa: A002  # as torch calls it
    train: Training | None = None,
    continues: Result | str | Path | Mapping[str, Any] | None = None,
) -> Result:
    """Play `stream` to `strategy`, evaluate it, and return what was measured.

    Args:
        strategy: learns, answers, and hears every event first.
        stream: what it learns.
        observers: objects with handlers (`on`), called after the strategy's: tracker, progress bar, checkpointer.
        seed: of all that is random in the run. The caller's global generators are the same before and after.
        device: where it runs, as torch names it.
        evaluate_every: also evaluate after every so many batches, counted over the whole run.
        evaluate_at: "sessions" (after every session), "tasks" (after the last session of each task, before another one's) or "end"
            (after the last session of all).
        evaluate_on: "all" (all tasks of the stream) or "seen" (those taught so far; the accuracy on others is NaN, which metrics
            leave out).
        measures: what is measured beside the main measure of the stream's targets: names, as "top5", "nll", "auroc" (see
            `clstream.measures.MEASURES`), or measures of your own (`clstream.measures.Measure`). None: nothing.
        max_sessions: stop after so many sessions; the last one ends its task.
        resume: a checkpoint of this very run, as `clstream.checkpoint.newest` returns it: the run goes on from there, and ends
            as it would have without the break, bit for bit. None starts anew.
        accept_changed_code: go on from a checkpoint though source code of your own has changed since; it is logged, and tracked. A
            run that continues another one may have more of it without.
        code: classes, functions and modules of your own that belong to the run beside those of the strategy, the model, what the
            stream applies to samples, and the observers: the function that built the stream.
        precision: "fp32", or "bf16": networks compute in bfloat16 where torch's autocast takes it, while batches are learned and
            while the strategy is evaluated; weights, losses, memories and statistics stay float32.
        deterministic: run none but torch's deterministic algorithms. On CUDA, results are the same bits in each run then; on the
            CPU they are so without.
        compile: compile the steps on full batches by torch.compile; what they learn of memories is drawn before. Results are the
            same but for rounding. A strategy whose steps can't be compiled takes them as they are written, with a warning that
            says why. See `clstream.engine.compiled_step`.
        train: training controls: a schedule of the learning rate, clipped and accumulated gradients, early stopping, class
            weights, new optimizers. None: steps are taken as the strategy takes them.
        continues: what another run ended with: its result, if `strategy` is the one that it ran, or the folder of its
            checkpoints, or one of these, for a strategy that is built as that one was. The run goes on from there with more
            sessions, tasks or classes. If the stream begins with the sessions that were learned, those after them come; else all of
            its sessions come after them. `max_sessions` counts the ones to come. `train` may be another one than then, unless the
            run before was stopped within a session. See docs/continue.md.

    Raises:
        ValueError, TypeError: if these don't fit together, or `resume` is of another run; before anything is learned.
        FloatingPointError: if a loss is not finite; it names the task, session and batch.
        NotDeterministicError: a RuntimeError, for an operation that has no deterministic form in a run that is to be so.

    """
    check_bool(accept_changed_code=accept_changed_code)
    given, stream = stream, prepared(stream, train)
    continuation, lineage, whole = None, None, stream
    if resume is not None and "continued" in resume:
        whole, lineage = resumed(stream, resume)
    elif continues is not None and resume is None:
        check_played(strategy, stream)
        if isinstance(train, Training) and train.schedule_over == "run":
            raise ValueError(
                "a schedule over the run is laid over the sessions that there are when it begins, so none goes with continues: "
                "take schedule_over='session'"
            )
        continuation = continuation_of(continues, strategy, stream)
        whole, lineage = continuation.stream, continuation.lineage
    least = None if lineage is None else lineage.outputs
    taken = check_fits(
        strategy, given, device, evaluate_every, max_sessions, seed, evaluate_at, evaluate_on, measures, train, least
    )
    numerics = Numerics(precision, deterministic, compile)
    numerics.check(device)
    error: BaseException | None = None
    with isolated(index(seed), "run", device=device), as_written():  # observers are outside
        simulation = Simulation(
            strategy, whole, observers, index(seed), device, evaluate_every, max_sessions, code, accept_changed_code,
            evaluate_at, evaluate_on, taken, numerics, train, lineage, continuation,
        )  # fmt: skip
        if resume is not None:
            simulation.check_same(resume)
        if continuation is not None:
            simulation.check_code(continuation.state, may_grow=True)
        note_used(strategy, warn=resume is None and continues is None)
        try:
            with simulation.ledger.running(), numerics.running(simulation.device), compiling(compile):
                if continuation is None:
                    simulation.start(resume)
                else:
                    simulation.go_on()
                    check_answers(strategy, stream, whole.outputs)
                for batch in play(simulation):
                    if batch is not None:
                        learn(simulation, batch)
            end = simulation.progress()
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                simulation.bus.close(events.RunEnded(error))
            finally:
                simulation.leave()
    result = result_of(simulation.measured())
    note_end(result, strategy, end)
    return result


def note_used(strategy: Strategy, warn: bool) -> None:
    """Remember that a strategy, and those that it wraps, are run now; if asked to, warn where one was run before."""
    strategies = [part for part in with_parts(strategy) if isinstance(part, Strategy)]
    used = [type(part).__name__ for part in strategies if _RAN.get(id(part)) is part]
    if used and warn:
        warnings.warn(
            f"this {used[0]} was run before, and goes on from the weights and memories that it has: build a new one, with a new "
            "model, for a fresh start",
            UserWarning,
            stacklevel=3,
        )
    _RAN.update({id(part): part for part in strategies})


def check_same_run(
    strategy: Strategy,
    stream: Stream,
    *observers: object,
    resume: Mapping[str, Any],
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    accept_changed_code: bool = False,
    code: Sequence[object] = (),
    evaluate_at: str = "sessions",
    evaluate_on: str = "all",
    measures: Sequence[str | Measure | type[Measure]] | None = None,
    precision: str = "fp32",
    deterministic: bool = False,
    compile: bool = False,  # noqa: A002
    train: Training | None = None,
) -> list[str]:
    """Check that `run` with these arguments would go on from a checkpoint, and return what code of the user's own has changed.

    Raises OtherRunError, a ValueError, if the checkpoint is of another run; ChangedCodeError, one of these, if it is of the same
    with other code, and that is not accepted.
    """
    stream = prepared(stream, train)
    whole, lineage = resumed(stream, resume) if "continued" in resume else (stream, None)
    with isolated(index(seed), "run", device=device):
        simulation = Simulation(
            strategy, whole, observers, index(seed), device, evaluate_every, max_sessions, code, accept_changed_code,
            evaluate_at, evaluate_on, chosen(measures, stream.targets, stream.scenario, stream.name),
            Numerics(precision, deterministic, compile), train, lineage,
        )  # fmt: skip
        try:
            simulation.check_same(resume)
        finally:
            simulation.leave()
    return simulation.changed_code


def play(simulation: Simulation) -> Iterator[Batch | None]:
    """Play the sessions that are left: yield each batch when it is to be learned, and None when what comes next is no step.

    The loss of a batch is to be in `simulation.losses` before the next one is asked for.
    """
    emit, ledger = simulation.bus.emit, simulation.ledger
    for delivery in simulation.deliveries():
        session, task = delivery.session, delivery.task
        if simulation.position == Position(session.index):  # else it goes on within the session
            ledger.begin_session(session.index)
            with ledger.meter.counting("learning"):
                if delivery.begins_task:
                    emit(events.TaskStarted(task))
                emit(events.SessionStarted(session))
            simulation.placement.update()
            ledger.look()
        if simulation.compiled is not None:
            simulation.compiled.begin_session()
        yield from play_session(simulation, session, task)
        with ledger.consolidating():
            emit(events.SessionEnded(session))
            if delivery.ends_task:
                emit(events.TaskEnded(task))
        simulation.placement.update()
        ledger.end_session()
        simulation.after_session(delivery)
        simulation.position = Position(session.index + 1)
        simulation.run_deferred()


def play_session(simulation: Simulation, session: Session, task: Task) -> Iterator[Batch | None]:
    """Play what is left of a session. `task` is its task or, where it mixes tasks, the one that most of its samples are of."""
    emit, every, checked = simulation.bus.emit, simulation.evaluate_every, FiniteLosses(simulation.strategy, task, session)
    first, meter = simulation.position, simulation.ledger.meter
    losses = simulation.losses = list[Tensor]()
    for epoch in islice(session, first.epoch, None):
        begin = first.batch if epoch.index == first.epoch else 0
        if not begin:
            with meter.counting("learning"):
                emit(events.EpochStarted(epoch))
        for batch in epoch.batches(begin):
            yield batch
            simulation.step += 1
            evaluating = every and simulation.step % every == 0
            if evaluating or simulation.deferred or len(losses) == FINITE_EVERY:
                checked.look(losses, batch)
            if evaluating or simulation.deferred:
                checked.finish()
            if evaluating:
                yield None
                simulation.evaluate(task, within_session=True)
            if simulation.deferred:
                yield None
                simulation.position = Position(session.index, epoch.index, batch.index + 1)
                simulation.run_deferred()
        if losses:
            checked.look(losses, batch)
        yield None
        with meter.counting("learning"):
            emit(events.EpochEnded(epoch))
        if saved := simulation.controls.epochs_saved(session, epoch.index):
            simulation.ledger.epochs_saved[-1] += saved
            break
    checked.finish()


def learn(simulation: Simulation, batch: Batch) -> None:
    """Have the strategy take its step on a batch."""
    size, meter = len(batch.samples), simulation.ledger.meter
    simulation.losses.append(step(simulation, batch) if meter.skips(size) else meter.step(size, step, simulation, batch))


def step(simulation: Simulation, batch: Batch) -> Tensor:
    """Emit the events around a step, and take it."""
    emit = simulation.bus.emit
    emit(events.BatchReady(batch))
    loss = simulation.learn(batch)
    emit(events.BatchLearned(batch, loss))
    return loss
