"""What the tests of TAME share: a stream whose tasks no expert knows two of, a small strategy, and an observer of its events."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from clstream.strategies import TAME
from torch.optim import SGD

from clstream import Event, Samples, Stream, Task, on
from clstream.models import Mlp
from clstream.seeds import isolated


def moving(schedule: list[int], epochs: int = 6, per_task: int = 40, batch_size: int = 10, scenario: str = "domain") -> Stream:
    """Four tasks of four blobs: each is marked in its inputs, and has its labels in another order, so no expert knows two."""
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 10, generator=draw)

    def samples(task: int, n: int) -> Samples:
        y = torch.arange(4).repeat_interleave(n)
        blobs = centres[y] + 0.3 * torch.randn(len(y), 10, generator=draw)
        marks = 2.0 * (torch.arange(4) == task).expand(len(y), 4)
        return Samples(torch.cat([blobs, marks], 1), (y + task) % 4 + (4 * task if scenario == "class" else 0))

    def classes(task: int) -> tuple[int, ...]:
        return tuple(range(4 * task, 4 * task + 4) if scenario == "class" else range(4))

    tasks = [Task(number, classes(number), samples(number, per_task), samples(number, 10)) for number in range(4)]
    return Stream("moving", tasks, schedule, epochs, batch_size, scenario, boundaries=False)


def tame(seed: int = 0, classes: int = 4, **options: Any) -> TAME:
    short = {"window": 20, "selector_epochs": 30, "retrain_epochs": 8, "optimizer": partial(SGD, lr=0.1, momentum=0.9)}
    with isolated(seed, "model"):
        return TAME(Mlp(14, classes, hidden=(32,)), **short | options)


class Ear:
    """An observer that keeps a strategy's own events."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    @on(Event)
    def hear(self, event: Event) -> None:
        if type(event).__module__ != "clstream.events":
            self.heard.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]
