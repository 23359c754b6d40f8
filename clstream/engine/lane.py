"""Lanes: the runs of several seeds beside each other, each with the random numbers of a run of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clstream import events
from clstream.engine.compiled_step import learner_of
from clstream.engine.loop import learn, play
from clstream.engine.simulation import Simulation
from clstream.results import Result, result_of
from clstream.stream import Batch, Samples

T = TypeVar("T")

State = tuple[Tensor, Tensor | None, Any, Any]


def global_state(device: torch.device) -> State:
    """Return the state of the global generators of torch, numpy and Python."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_global_state(state: State, device: torch.device) -> None:
    """Put the global generators into a state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    np.random.set_state(state[2])
    random.setstate(state[3])


def same_state(state: State, other: State) -> bool:
    """Return whether two states are the same."""
    cuda = state[1] is None or other[1] is None or torch.equal(state[1], other[1])
    words = np.array_equal(state[2][1], other[2][1]) and state[2][2:] == other[2][2:]
    return torch.equal(state[0], other[0]) and cuda and words and state[3] == other[3]


class Lane:
    """The run of one seed beside others: it stops at each batch, and goes on when that was learned.

    Its random numbers are its own, as in a run of one seed: what runs within `entered` finds the global generators as they were
    when it was left.
    """

    def __init__(self, simulation: Simulation, resume: Mapping[str, Any] | None) -> None:
        self.simulation, self.resume = simulation, resume
        self.strategy = simulation.strategy
        self.learner = learner_of(simulation.strategy)
        self.context, self.random = copy_context(), global_state(simulation.device)
        self.batches = self._batches()
        self.batch: Batch | None = None
        self.drawn: tuple[Samples, ...] = ()
        self.failure: BaseException | None = None
        self.finished = self.over = False
        self.result: Result | None = None

    def _batches(self) -> Generator[Batch | None]:
        with self.simulation.ledger.running():
            self.simulation.start(self.resume)
            yield from play(self.simulation)
        self.finished = True

    @property
    def samples(self) -> Samples:
        """Those of the batch."""
        assert self.batch is not None
        return self.batch.samples

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is: session, epoch and batch."""
        assert self.batch is not None
        return self.simulation.position.session, self.batch.epoch, self.batch.index

    @property
    def counts(self) -> bool:
        """Whether the FLOPs of the step on the batch are to be counted."""
        return self.simulation.ledger.meter.counts(len(self.samples))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the global generators in this seed's state."""
        set_global_state(self.random, self.simulation.device)
        try:
            yield
        finally:
            self.random = global_state(self.simulation.device)

    def attempt(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """Call a function, if nothing has failed so far; what it raises is kept in `failure`."""
        if self.failure:
            return None
        try:
            return self.context.run(call, *arguments)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # whatever it is, the other seeds go on for now
            self.failure = error
            return None

    def next_batch(self) -> bool:
        """Ask for what comes next; return whether it is a batch, and not something else than a step."""
        self.batch = self.attempt(next, self.batches, None)
        return self.batch is not None

    def go_on(self) -> None:
        """Go on until a batch is to be learned, or to the end of the run."""
        with self.entered():
            while not (self.failure or self.next_batch() or self.finished):
                pass
        if self.batch is None:
            self.end(self.failure)

    def settle(self) -> None:
        """Go on, if it has no batch, or end the run, if something failed."""
        if self.failure:
            self.batch = None
        if self.batch is None:
            self.go_on()

    def end(self, error: BaseException | None) -> None:
        """End the run, once, well or not."""
        if self.over:
            return
        self.over, self.batch = True, None
        before, self.failure = self.failure, None
        with self.entered():
            self.attempt(self._close, error)
        self.failure = before or self.failure
        if not (error or self.failure):
            self.result = result_of(self.simulation.measured())

    def _close(self, error: BaseException | None) -> None:
        try:
            self.batches.close()
            self.simulation.bus.close(events.RunEnded(error))
        finally:
            self.simulation.leave()

    def learn_alone(self) -> bool:
        """Take the step as a run of one seed does; return whether it drew from the global generators."""
        before = self.random
        with self.entered(), recorded(self):
            self.attempt(learn, self.simulation, self.batch)
        return not same_state(before, self.random)

    def draw(self) -> None:
        """Announce the batch, and draw what is learned beside it."""
        self.simulation.bus.emit(events.BatchReady(self.batch))  # type: ignore[arg-type]
        self.drawn = self.learner.draw(self.samples)

    def learn_drawn(self) -> None:
        """Take the step alone, when the batch was announced, and what is learned beside it was drawn."""
        self.learner.drawn_before = self.drawn
        try:
            loss = self.simulation.learn(self.batch)  # type: ignore[arg-type]
        finally:
            self.learner.drawn_before = None
        self.learned(loss)

    def learned(self, loss: Tensor) -> None:
        """Take up the loss of the batch."""
        self.simulation.bus.emit(events.BatchLearned(self.batch, loss))  # type: ignore[arg-type]
        self.simulation.losses.append(loss)


@contextmanager
def recorded(lane: Lane) -> Iterator[None]:
    """Keep what the strategy draws within as `drawn`."""
    learner = lane.learner
    draw, lane.drawn = learner.draw, ()

    def draw_recorded(samples: Samples) -> tuple[Samples, ...]:
        lane.drawn = draw(samples)
        return lane.drawn

    vars(learner)["draw"] = draw_recorded
    try:
        yield
    finally:
        del vars(learner)["draw"]
