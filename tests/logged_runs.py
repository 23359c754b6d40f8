"""Runs that emit events of their own, for the tests of the event log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from clstream.strategies import Replay
from torch import Tensor

from clstream import Event, Result, RunStarted, TaskEnded, on, run
from clstream.checks import example_model, example_stream


@dataclass(frozen=True, slots=True, eq=False)
class Shifted(Event):
    """A detector's own event, with all kinds of fields."""

    score: float
    where: Tensor
    large: Tensor
    array: np.ndarray
    names: tuple[str, ...]
    number: np.float32
    found: dict[int, object] = field(default_factory=dict)
    thing: object = None


class Plain(Event):
    """An event that declares nothing."""


class Emits(Replay):
    """Emits events of its own, one of them as the run starts."""

    @on(RunStarted)
    def hello(self, event: RunStarted) -> None:
        self.emit(Plain())

    @on(TaskEnded)
    def shift(self, event: TaskEnded) -> None:
        infinite = float("-inf")
        self.emit(
            Shifted(
                0.5,
                torch.tensor([1.0, math.nan]),
                torch.zeros(9, 9),
                np.arange(3),
                ("a", "b"),
                np.float32(2),
                {1: infinite},
                object(),
            )
        )


def play(*observers: object, seed: int = 0, evaluate_every: int | None = 4) -> Result:
    strategy = Emits(example_model(), capacity=9)
    return run(strategy, example_stream(epochs=2, batch_size=10), *observers, seed=seed, evaluate_every=evaluate_every)
