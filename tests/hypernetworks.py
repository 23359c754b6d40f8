"""What the tests of hypernetworks share: small ones, one that stands within a task, an observer, and networks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from clstream.strategies import Hypernetwork
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import BatchReady, Stream, TaskEnded, TaskStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated

SMALL = {"chunk": 500, "task_size": 8, "chunk_size": 8}

LSTM = SMALL | {"generator": "lstm", "hidden": (16,)}


def built(model: nn.Module | None = None, **options: Any) -> Hypernetwork:
    with isolated(0, "strategy"):
        return Hypernetwork(model or example_model(), **SMALL | options)


def learned(stream: Stream, **options: Any) -> Hypernetwork:
    strategy = built(**options)
    run(strategy, stream)
    return strategy


class Watching:
    """An observer that calls something at each start of a task, after the strategy has heard of it, and at each end."""

    def __init__(self, start: Any = None, end: Any = None, batch: Any = None) -> None:
        self.start, self.end, self.batch = start, end, batch

    @on(TaskStarted)
    def started(self, event: TaskStarted) -> None:
        if self.start is not None:
            self.start(event.task.id)

    @on(TaskEnded)
    def ended(self, event: TaskEnded) -> None:
        if self.end is not None:
            self.end(event.task.id)

    @on(BatchReady)
    def ready(self, event: BatchReady) -> None:
        if self.batch is not None:
            self.batch(event.batch)


def at_second_task(stream: Stream | None = None, batches: int = 3, task: int = 1, **options: Any) -> tuple[Hypernetwork, Any]:
    """Return a strategy that stands in a task, after some batches of it, and the next batch."""

    class Enough(Exception):
        pass

    kept: list[Any] = []

    def look(batch: Any) -> None:
        if batch.task.id == task and batch.index == batches:
            kept.append((deepcopy(strategy), batch))
            raise Enough

    strategy = built(**options)
    with pytest.raises(Enough):
        run(strategy, stream or example_stream(), Watching(batch=look))
    return kept[0]


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


class Normed(nn.Module):
    """A network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.into(x.flatten(1).float() / 255))))


class Raw(nn.Module):
    """Raw images as rows of floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float() / 255
