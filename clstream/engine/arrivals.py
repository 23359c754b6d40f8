"""Sessions that arrive: the run takes what has come, learns it, and waits for more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from clstream.bus import Event
from clstream.checkpoint.saved_state import Position
from clstream.events import NothingArrived
from clstream.stream import Arrival, ArrivingStream, Delivery, Refusal, Stream, Task

ENDLESS = 2**31 - 1
"""The number of sessions of a run whose end nobody knows."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionArrived(Event):
    """A session has arrived, and is learned next. For observers.

    Args:
        name, session: what it is called, and its number.
        samples, test_samples: how many are learned, and how many were held out, or brought, for the test.
        y: the targets of all that it has but test samples of its own, in the order in which they came.

    """

    name: str
    session: int
    samples: int
    test_samples: int
    y: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class InputsArrived(Event):
    """Inputs have arrived whose labels come later, (n, *input_shape), under the same name. For observers."""

    name: str
    x: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SetAside(Event):
    """What has arrived can't be learned: its name, and the reason. The run goes on without it. For observers."""

    name: str
    reason: str


class Waiting(Protocol):
    """What is needed of a run: see `Simulation`."""

    stream: Stream
    position: Position
    sessions: int
    begun: int
    deferred: list[Callable[[], object]]
    began: float

    def run_deferred(self) -> None:
        """See `Simulation`."""

    def add_task(self, task: Task) -> None:
        """See `Simulation`."""

    def emit_to_observers(self, event: Event) -> None:
        """See `Simulation`."""


def arrivals(simulation: Waiting) -> Iterator[Delivery]:
    """Yield the sessions of a stream as they arrive, until the source ends or there were as many as are to be learned."""
    stream = simulation.stream
    assert isinstance(stream, ArrivingStream)
    index = simulation.position.session
    while index < simulation.sessions:
        if index == len(stream.progress.sessions) and not wait(simulation, stream):
            simulation.sessions = index
            break
        simulation.begun = index + 1
        yield stream.deliver(index)
        stream.release()
        index += 1
    simulation.emit_to_observers(NothingArrived(index, True))
    simulation.run_deferred()


def wait(simulation: Waiting, stream: ArrivingStream) -> bool:
    """Wait for the next session, which is one of the stream's tasks then; return False if there is none. It is no time of the run.

    What was deferred is done meanwhile: checkpoints, and the end of a run that is stopped.
    """
    said = False
    while True:
        if simulation.deferred:
            simulation.run_deferred()
        came = stream.arrive()
        said = said and came is None
        if isinstance(came, Refusal):
            simulation.emit_to_observers(SetAside(came.name, came.reason))
        elif isinstance(came, Arrival):
            x = came.x if simulation.stream.device is None else came.x.to(simulation.stream.device)
            simulation.emit_to_observers(InputsArrived(came.name, x))
        elif came is not None:
            name = list(stream.progress.sessions)[came.id]
            simulation.add_task(came)
            assert stream.progress.targets is not None
            simulation.emit_to_observers(SessionArrived(name, came.id, len(came.train), len(came.test), stream.progress.targets))
            return True
        elif stream.ended:
            return False
        else:
            if not said:
                said = True
                simulation.emit_to_observers(NothingArrived(len(stream.progress.sessions), False))
            if simulation.deferred:
                continue
            before = time.perf_counter()
            time.sleep(stream.poll)
            simulation.began += time.perf_counter() - before
