"""Labels that are bought: before each later session over a pool a strategy is asked which, and what it didn't buy stays hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clstream.bus import Event, with_parts
from clstream.strategy import Strategy
from clstream.stream import PoolSchedule, Samples, Stream, own_storage


@dataclass(frozen=True, slots=True, eq=False)
class LabelsQueried(Event):
    """Labels are asked for, before the session begins that they are learned in.

    Args:
        session: the number of that session.
        budget: how many may be bought.
        unlabelled: how many samples of the pool have none yet.

    """

    session: int
    budget: int
    unlabelled: int


@dataclass(frozen=True, slots=True, eq=False)
class LabelsRevealed(Event):
    """Labels were bought; no others of the pool are known.

    Args:
        rows: (budget,), int64, on the CPU: which samples of the pool they are of.
        samples: these, with their labels.
        labelled: how many samples have a label now, with those from the start.

    """

    rows: Tensor
    samples: Samples
    labelled: int

    def curves(self) -> dict[str, float]:
        """Return how many labels there are, for the tracker."""
        return {"labels/bought": self.labelled}


def buy_labels(stream: Stream, session: int, strategy: Strategy, emit: Callable[[Event], None]) -> Stream:
    """Have a strategy buy the labels of a session, and reveal them; return the stream that has them in this session.

    A strategy, or a part of it, that has a method `query(x, budget)` says which ones: x is what is unlabelled, (n, *input_shape),
    and it returns (budget,) rows of that, int64. For any other they are drawn at random. `stream` is over a pool, and has what was
    bought before. What the query computes counts as the learning of the session that it is for.

    Raises ValueError for an answer that is not so many rows, each once.
    """
    schedule = stream.schedule
    assert isinstance(schedule, PoolSchedule)
    free, budget = schedule.unlabelled(session), schedule.budget
    emit(LabelsQueried(session, budget, len(free)))
    asked: Any = next((part for part in with_parts(strategy) if callable(getattr(part, "query", None))), None)
    rows = schedule.draw(session)
    if asked is not None:
        pool = stream.tasks[0].train
        x = own_storage(pool[free.to(pool.y.device)]).x
        answer = asked.query(x if stream.device is None else x.to(stream.device), budget)
        rows = free[checked(answer, budget, len(free), type(asked).__name__)]
    stream = stream.scheduled(schedule.with_bought({**schedule.bought, session: rows}))
    emit(LabelsRevealed(rows, stream.session(session).samples[:], schedule.start + session * budget))
    return stream


def checked(rows: object, budget: int, samples: int, name: str) -> Tensor:
    """Return the rows that were asked for, on the CPU. Raises ValueError for what is no such answer."""
    if (
        not isinstance(rows, Tensor)
        or rows.dtype != torch.int64
        or rows.shape != (budget,)
        or not 0 <= int(rows.min()) <= int(rows.max()) < samples
        or len(rows.unique()) < budget
    ):
        raise ValueError(f"{name}.query must answer {samples} samples with {budget} of their rows, int64, each once")
    return rows.cpu()
