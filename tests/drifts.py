"""What the tests of drifting streams share: schedules that are given, and streams whose inputs are their row numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from clstream.streams import (
    from_tensors,
)
from clstream.streams.schedules import Blurry, Both, Gaussian, LabelShift, Parts, Schedule, Transitions
from torch import Tensor

from clstream import Stream

SCHEDULES: dict[str, Schedule] = {
    "sharp": Transitions(),
    "fuzzy": Transitions(0.6),
    "recurring": Transitions(0.0, (0, 1, 2, 1)),
    "gaussian": Gaussian(0.8),
    "label shift": LabelShift(9.0),
    "blurry": Blurry((1, 2, 5), 0.3),
    "both": Both(Transitions(0.5), LabelShift(4.0)),
}


@dataclass(frozen=True)
class Given:
    """The weights that a function gives for moments and a number of parts."""

    make: Callable[[Tensor, int], Any]
    jumps: int = 1

    def __repr__(self) -> str:
        return "given"

    def segments(self, parts: Parts) -> int:
        return self.jumps

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        return self.make(at, len(parts))


class Nameless(Transitions):
    """A schedule that doesn't say what it is."""

    __repr__ = object.__repr__


@dataclass(frozen=True)
class Numbers:
    """A mixture of one session that draws what it is given."""

    drawn: list[int]
    once: bool = True

    def __len__(self) -> int:
        return 1

    def draw(self, session: int) -> Tensor:
        return torch.tensor(self.drawn, dtype=torch.int64)


def numbered(first: int = 24, classes: int = 6, tasks: int = 3, **options: Any) -> Stream:
    """Return a stream whose inputs are their own row numbers; classes have from `first` samples on, each one more than the last."""
    y = torch.cat([torch.full((first + label,), label) for label in range(classes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    x = torch.arange(len(y)).float()[:, None]
    return from_tensors(x, y, x[-classes:], torch.arange(classes), tasks=tasks, **options)


def rows(session: Any) -> list[int]:
    return session.samples.x.flatten().long().tolist()


def shares(stream: Stream) -> Tensor:
    """Return (sessions, classes): how the samples of each session are spread over the classes."""
    counts = torch.stack([session.samples.y.bincount(minlength=stream.classes) for session in stream])
    return counts / counts.sum(1, keepdim=True)
