"""Several seeds of one strategy in one process, batch by batch beside each other, each as in a run of its own.

Each seed has a simulation, with its own memory, generators, penalties, evaluation and observers. Only the steps are shared: where
all that differs are numbers in tensors, one stacked step is taken for all seeds (`clstream.engine.stacked_step`). The first step
after anything else than a step, and those whose FLOPs are counted, are taken by each seed alone; the first ones also show whether
stacked steps do the same.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any

import torch

from clstream.engine.compatibility import check_fits
from clstream.engine.controls import prepared
from clstream.engine.lane import Lane, global_state, same_state
from clstream.engine.loop import note_used
from clstream.engine.numerics import Numerics
from clstream.engine.simulation import Simulation
from clstream.engine.stacked_step import OWN_STEPS, Stack, UnstackableError, why_unstackable
from clstream.eval_mode import as_written
from clstream.measures import Measure
from clstream.params import check_bool, check_integer
from clstream.results import Result
from clstream.seeds import isolated, random_state_kept
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.training import Training


class SeedsError(RuntimeError):
    """Some seeds failed, and the others ended.

    Args:
        errors: of those that failed, by seed.
        results: of the others, by seed.

    """

    def __init__(self, errors: Mapping[int, Exception], results: Mapping[int, Result]) -> None:
        seed, error = next(iter(errors.items()))
        more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        super().__init__(f"seed {seed} failed{more}: {error}")
        self.errors, self.results = dict(errors), dict(results)


def run_seeds(
    make_strategy: Callable[[int], Strategy],
    stream: Stream,
    seeds: Sequence[int],
    *,
    observers: Callable[[int], Sequence[object]] | None = None,
    resume: Mapping[int, Mapping[str, Any] | None] | None = None,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    accept_changed_code: bool = False,
    code: Sequence[object] = (),
    evaluate_at: str = "sessions",
    evaluate_on: str = "all",
    measures: Sequence[str | Measure | type[Measure]] | None = None,
    deterministic: bool = False,
    train: Training | None = None,
) -> list[Result]:
    """Run a strategy with several seeds in this process at once, their weights stacked: see docs/performance.md for when it pays.

    Each seed ends as its own `run` does, up to rounding: the same batches, draws and memories. Where the steps can't be stacked,
    each seed takes them by itself, with a warning that says why. `seconds` of a result are those of all seeds together.

    Args:
        make_strategy: returns a new strategy for a seed, with a new model. It is called with torch's global generator seeded, as
            `clstream run` does: initial weights come from the seed.
        stream: what they learn.
        seeds: distinct whole numbers from 0 up.
        observers: returns the observers of a seed, new ones for each. None: there are none.
        resume: checkpoints by seed, to go on from; a seed without one starts anew.
        device, evaluate_every, max_sessions, accept_changed_code, code, evaluate_at, evaluate_on, measures, deterministic, train:
            as in `run`.

    Returns:
        The results, in the order of the seeds.

    Raises:
        ValueError, TypeError: as `run` does, before anything is learned.
        SeedsError: if seeds failed, when the others have ended; it has their results.

    """
    numbers = [index(seed) for seed in seeds]
    for number in numbers:
        check_integer(0, seeds=number)
    if not numbers or len({*numbers}) < len(numbers):
        raise ValueError(f"seeds must be distinct whole numbers, at least one, not {seeds!r}")
    check_bool(accept_changed_code=accept_changed_code)
    numerics = Numerics("fp32", deterministic)
    numerics.check(device)
    where, played = torch.device(device), prepared(stream, train)
    with random_state_kept(where), signals_kept(), as_written(), numerics.running(where):
        lanes = []
        for seed in numbers:
            with isolated(seed, "model"):
                strategy = make_strategy(seed)
            taken = check_fits(
                strategy, stream, device, evaluate_every, max_sessions, seed, evaluate_at, evaluate_on, measures, train
            )
            state, watching = (resume or {}).get(seed), () if observers is None else tuple(observers(seed))
            with isolated(seed, "run", device=device):
                simulation = Simulation(
                    strategy, played, watching, seed, device, evaluate_every, max_sessions, code, accept_changed_code,
                    evaluate_at, evaluate_on, taken, numerics, train,
                )  # fmt: skip
                if state is not None:
                    simulation.check_same(state)
                note_used(strategy, warn=state is None)
                lanes.append(Lane(simulation, state))
        Together(lanes).play()
    errors = {lane.simulation.seed: lane.failure for lane in lanes if isinstance(lane.failure, Exception)}
    results = {lane.simulation.seed: lane.result for lane in lanes if lane.result is not None}
    if errors:
        raise SeedsError(errors, results)
    return [results[seed] for seed in numbers]


@contextmanager
def signals_kept() -> Iterator[None]:
    """Restore the handlers of the signals that checkpointers handle: each lane's puts back what was there before its own."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


class Together:
    """Plays the runs of several seeds, batch by batch beside each other."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.reason = next((reason for lane in lanes if (reason := why_apart(lane))), "")
        self.told = set[str]()

    def play(self) -> None:
        """Play all runs to their ends. Raises what a run raises at its start; later errors are in the lanes."""
        try:
            for lane in self.lanes:
                lane.go_on()
                if lane.failure:
                    raise lane.failure
            while waiting := [lane for lane in self.lanes if not lane.over]:
                first = min(lane.place for lane in waiting)
                group = [lane for lane in waiting if lane.place == first]
                self.learn([lane for lane in group if alike(lane, group[0])])
        except BaseException as error:
            for lane in reversed(self.lanes):
                lane.end(error)
            raise

    def learn(self, lanes: list[Lane]) -> None:
        """Take the steps of some lanes until something else comes: the first ones alone, then together, if they can be."""
        reason = self.reason if len(lanes) > 1 else "it is the only seed"
        stack: Stack | None = None
        try:
            stack = None if reason else Stack([lane.strategy for lane in lanes])
        except UnstackableError as error:
            reason = str(error)
        while True:
            drew = [lane.learn_alone() for lane in lanes]
            if any(drew) and not reason:
                reason = "a step draws from the global random generators, as dropout and augmentations do"
            if stack is not None and not reason and not any(lane.failure for lane in lanes):
                reason = differs(stack, lanes)
            stack = None
            ready = [lane.next_batch() for lane in lanes]
            if not all(ready):
                for lane in lanes:
                    lane.settle()
                break
            if not all(alike(lane, lanes[0]) for lane in lanes):
                break
            if not reason and not any(lane.counts for lane in lanes):
                reason = self.learn_stacked(lanes)
                if not reason:
                    break
        for lane in lanes:
            if isinstance(lane.failure, KeyboardInterrupt):  # the others were at a pause since, where they may have stopped too
                raise lane.failure
        if len(lanes) > 1 and reason and reason not in self.told:
            self.told.add(reason)
            warnings.warn(
                f"the seeds of {type(lanes[0].strategy).__name__} take their steps one after the other: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )

    def learn_stacked(self, lanes: list[Lane]) -> str:
        """Take steps together until something else comes; return why that can't be, if so."""
        try:
            stack = Stack([lane.strategy for lane in lanes])
            stack.enter()
        except UnstackableError as error:
            return str(error)
        before = global_state(lanes[0].simulation.device)
        try:
            while self.step(stack, lanes):
                ready = [lane.next_batch() for lane in lanes]
                if not all(ready) or any(lane.counts or not alike(lane, lanes[0]) for lane in lanes) or not stack.is_current():
                    break
        finally:
            stack.leave()
        if not same_state(before, global_state(lanes[0].simulation.device)):
            raise RuntimeError(
                f"the steps of {type(lanes[0].strategy).__name__} draw from the global random generators now and then, so its "
                "seeds can't run together: run each by itself"
            )
        for lane in lanes:
            lane.settle()
        return ""

    def step(self, stack: Stack, lanes: list[Lane]) -> bool:
        """Take a step together; return whether the lanes have yet to ask for what comes next."""
        for lane in lanes:
            lane.simulation.ledger.meter.skips(len(lane.samples))
            lane.attempt(lane.draw)
        drawn = [lane.drawn for lane in lanes]
        sizes = [[len(past) for past in own] for own in drawn]
        if sizes.count(sizes[0]) < len(sizes) or any(lane.failure for lane in lanes):
            stack.leave()
            for lane in lanes:
                lane.attempt(lane.learn_drawn)
                lane.next_batch()
            return False
        losses = stack.step([lane.samples for lane in lanes], drawn)
        for lane, loss in zip(lanes, losses, strict=True):
            lane.attempt(lane.learned, loss)
        return True


def why_apart(lane: Lane) -> str:
    """Return why the steps of a lane can't be taken together with those of others; "" if nothing shows before a run."""
    return OWN_STEPS if lane.simulation.controls.steps_apart else why_unstackable(lane.strategy)


def alike(lane: Lane, other: Lane) -> bool:
    """Return whether the batches of two lanes have the same shapes."""
    mine, theirs = lane.samples, other.samples
    return mine.x.shape == theirs.x.shape and mine.y.shape == theirs.y.shape and mine.target == theirs.target


def differs(stack: Stack, lanes: Sequence[Lane]) -> str:
    """Return how the losses of a stacked step differ from those that lanes had alone; "" if they don't."""
    alone = torch.stack([lane.simulation.losses[-1] for lane in lanes])
    try:
        with torch.no_grad():
            together = stack.losses([lane.samples for lane in lanes], [lane.drawn for lane in lanes], assign=False)
    except Exception as error:  # noqa: BLE001  # whatever torch can't map over seeds
        return str(error).strip().partition("\n")[0] or type(error).__name__
    if torch.allclose(alone, together, rtol=1e-3, atol=1e-4, equal_nan=True):
        return ""
    return f"a stacked step has other losses ({together.tolist()}) than the seeds have alone ({alone.tolist()})"
