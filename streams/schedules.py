"""Schedules of drift: how likely each part of the data is at each moment of a stream.

A *part* is the training samples of one class in one task. A schedule is pure data: a frozen dataclass of plain numbers that gives
the weights of all parts at any moments, from 0, the stream's begin, to 1, its end. `drifting` makes a stream by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clstream.params import check_integers, check_number, check_positive


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a stream's training samples, those of task 0 first, by label within a task.

    Args:
        tasks, labels: (parts,), int64: of each part.
        count: how many tasks there are.

    """

    tasks: Tensor
    labels: Tensor
    count: int

    def __len__(self) -> int:
        return len(self.tasks)

    def share(self, weights: Tensor) -> Tensor:
        """Return (moments, parts) from (moments, tasks): the parts of a task have equal shares of its weight."""
        return (weights / self.tasks.bincount(minlength=self.count))[:, self.tasks]


class Schedule(Protocol):
    """How likely each part is at each moment."""

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights at some moments: (moments, parts), float64, from 0; only their ratios count."""
        ...

    def segments(self, parts: Parts) -> int:
        """Return into how many equal segments of time the jumps of the weights cut the stream; 1 if there are none."""
        ...


@dataclass(frozen=True)
class Transitions:
    """Task after task, each as long; from one to the next the weights change linearly.

    Args:
        width: of a transition, as a share of a task's time, from 0 (sharp) to 1 (never one task alone).
        order: the tasks in the order in which they come; one may come again. (): each once.

    """

    width: float = 0.0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_number(0, 1, width=self.width)
        check_integers(0, order=self.order)

    def turns(self, parts: Parts) -> Tensor:
        """Return the task of each segment."""
        turns = torch.tensor(self.order or range(parts.count))
        if set(turns.tolist()) != set(range(parts.count)):
            raise ValueError(f"the order must name each of the tasks 0 to {parts.count - 1}, not {list(self.order)}")
        return turns

    def segments(self, parts: Parts) -> int:
        """Return the number of turns, if the transitions are sharp."""
        return 1 if self.width else len(self.turns(parts))

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights: see `Schedule`."""
        turns = self.turns(parts)
        now, turn = (at * len(turns))[:, None], torch.arange(len(turns), dtype=torch.float64)
        if self.width:
            begun = ((now - turn) / self.width + 0.5).clamp(0, 1)  # how far the transition into each turn has gone
            begun[:, 0] = 1
            present = begun - torch.cat([begun[:, 1:], begun.new_zeros(len(at), 1)], 1)
        else:
            present = (now.floor() == turn).double()
        return parts.share(present.new_zeros(len(at), parts.count).index_add_(1, turns, present))


@dataclass(frozen=True)
class Gaussian:
    """Each part has its peak, in order, and comes and goes as a normal density does, next to those of all others.

    Args:
        width: standard deviation, in distances from one peak to the next.

    """

    width: float = 1.0

    def __post_init__(self) -> None:
        check_positive(width=self.width)

    def segments(self, parts: Parts) -> int:
        """Return 1: nothing jumps."""
        return 1

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights: see `Schedule`."""
        peaks = torch.arange(len(parts), dtype=torch.float64) + 0.5
        return (-((at[:, None] * len(parts) - peaks) / self.width).square() / 2).softmax(1)


@dataclass(frozen=True)
class LabelShift:
    """The first label is the likeliest at the begin, the last one at the end, geometrically in between; all are equal midway.

    Args:
        ratio: how much likelier the likeliest label is than the least likely one, at the begin and at the end.

    """

    ratio: float = 20.0

    def __post_init__(self) -> None:
        check_number(1, ratio=self.ratio)

    def segments(self, parts: Parts) -> int:
        """Return 1: nothing jumps."""
        return 1

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights: see `Schedule`."""
        labels, place, counts = parts.labels.unique(return_inverse=True, return_counts=True)
        spread = 0.5 - torch.arange(len(labels), dtype=torch.float64) / max(1, len(labels) - 1)
        likely: Tensor = torch.exp(math.log(self.ratio) * (1 - 2 * at[:, None]) * spread) / counts
        return likely[:, place]


@dataclass(frozen=True)
class Blurry:
    """Task after task, where a share of the samples of some classes is spread over the whole stream.

    Args:
        blurry: the labels of which that is true; the others are disjoint: they come in their task only.
        blur: share of their samples that is spread.
        shares: which share of these each task's time gets. (): equal ones.

    """

    blurry: tuple[int, ...]
    blur: float = 0.1
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_number(0, 1, blur=self.blur)
        if self.shares and not (min(self.shares) >= 0 and math.isclose(math.fsum(self.shares), 1, abs_tol=1e-3)):
            raise ValueError(f"shares are parts of a whole, from 0 up, with the sum 1, not {self.shares}")

    def segments(self, parts: Parts) -> int:
        """Return the number of tasks. Raises ValueError for shares or labels that are not those of the parts."""
        if self.shares and len(self.shares) != parts.count:
            raise ValueError(f"there must be a share for each of the {parts.count} tasks, not {len(self.shares)}")
        if unknown := set(self.blurry) - set(parts.labels.tolist()):
            raise ValueError(f"blurry names labels that the stream hasn't: {sorted(unknown)}")
        return parts.count

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights: see `Schedule`."""
        now = (at * parts.count).floor().long()
        home = (now[:, None] == parts.tasks).double()
        shares = torch.tensor(self.shares or [1 / parts.count] * parts.count, dtype=torch.float64)
        blurred = torch.isin(parts.labels, torch.tensor(self.blurry, dtype=torch.int64))
        return torch.where(blurred, (1 - self.blur) * home + self.blur * shares[now][:, None], home)


@dataclass(frozen=True)
class Both:
    """Two schedules at once: the weights are multiplied, as those of a label shift within fuzzy tasks."""

    first: Schedule
    second: Schedule

    def segments(self, parts: Parts) -> int:
        """Return the segments in which both have no jump."""
        return math.lcm(self.first.segments(parts), self.second.segments(parts))

    def weights(self, at: Tensor, parts: Parts) -> Tensor:
        """Return the weights: see `Schedule`."""
        return self.first.weights(at, parts) * self.second.weights(at, parts)
