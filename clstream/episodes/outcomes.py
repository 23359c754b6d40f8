"""What came of episodes: one by one, and over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clstream.bus import Event

if TYPE_CHECKING:
    from clstream.comparison.statistics import Mean

CLEAN = "accuracy"
"""What the targets as they are are called, beside the names of corruptions."""


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """What came of one episode. Accuracies are from 0 to 1.

    Args:
        index: the number of the episode.
        accuracy: over the targets of all support sets, with all labels of the episode competing.
        by_set: over the targets of each support set, in the order in which these came.
        corrupted: by corruption, over the targets of all sets.
        nearest: of the nearest neighbour (1-NN), by the squared distance of raw inputs to all support samples: of the targets as
            they are, "accuracy", and by corruption.
        steps: gradient steps, or batches that a learner without any took.
        memory_bytes: what the strategy kept at the end; of episodes in a batch NaN.
        seconds: that it took.

    """

    index: int
    accuracy: float
    by_set: tuple[float, ...]
    corrupted: Mapping[str, float]
    nearest: Mapping[str, float]
    steps: int
    memory_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeEnded(Event):
    """An episode is over, and was asked about; observers of `run_episodes` hear it."""

    outcome: EpisodeOutcome


@dataclass(frozen=True, eq=False, repr=False)
class EpisodesResult:
    """What came of all episodes, in the order of their numbers.

    Args:
        name: of the learner.
        episodes: their family, as text.
        chance: the accuracy of a guess.
        outcomes: of each episode.

    """

    name: str
    episodes: str
    chance: float
    outcomes: tuple[EpisodeOutcome, ...]

    @property
    def accuracy(self) -> Tensor:
        """(episodes,), float64: the accuracy over all targets of each episode."""
        return torch.tensor([outcome.accuracy for outcome in self.outcomes], dtype=torch.float64)

    @property
    def by_set(self) -> Tensor:
        """(episodes, sets), float64: the accuracy over the targets of each support set, in the order in which these came."""
        return torch.tensor([outcome.by_set for outcome in self.outcomes], dtype=torch.float64)

    @property
    def corrupted(self) -> dict[str, Tensor]:
        """By corruption (episodes,), float64: the accuracy over all targets."""
        names = self.outcomes[0].corrupted if self.outcomes else ()
        return {name: torch.tensor([own.corrupted[name] for own in self.outcomes], dtype=torch.float64) for name in names}

    @property
    def nearest(self) -> dict[str, Tensor]:
        """Of the nearest neighbour among raw inputs, "accuracy" and by corruption, (episodes,), float64."""
        names = self.outcomes[0].nearest if self.outcomes else ()
        return {name: torch.tensor([own.nearest[name] for own in self.outcomes], dtype=torch.float64) for name in names}

    @property
    def mean(self) -> Mean:
        """The mean accuracy over episodes, with its 95 % interval by Student's t."""
        return interval(self.accuracy)

    def lines(self) -> list[str]:
        """Return the results as lines of text, with those of the nearest neighbour and of a guess."""
        if not self.outcomes:
            return [f"{self.name}: no episode has ended yet"]
        nearest = self.nearest
        rows = [("accuracy", interval(self.accuracy), interval(nearest[CLEAN]))]
        rows += [(name, interval(values), interval(nearest[name])) for name, values in self.corrupted.items()]
        width = max(len(name) for name, *_ in rows)
        return [
            f"{self.name}, {len(self.outcomes)} of {self.episodes}",
            *(f"  {name:{width}}  {shown(learner)}   1-NN on inputs {shown(neighbour)}" for name, learner, neighbour in rows),
            f"  {'chance':{width}}  {self.chance:.4f}",
            f"  by set  {' '.join(f'{value:.3f}' for value in self.by_set.mean(0).tolist())}",
        ]

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def interval(values: Tensor | Sequence[float]) -> Mean:
    """Return the mean of some values, with its 95 % interval by Student's t."""
    from clstream.comparison.statistics import mean_interval  # it needs scipy

    return mean_interval([float(value) for value in values])


def shown(mean: Mean) -> str:
    """Return a mean, with half the width of its interval, as text."""
    return f"{mean.mean:.4f} ± {mean.half_width:.4f}" if mean.size > 1 else f"{mean.mean:.4f}"
