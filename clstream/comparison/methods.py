"""Methods: the runs of one method on one stream, one for each seed, and what they measured together; pictures are of these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clstream.comparison.comparisons import value_of
from clstream.comparison.labels import stream_key, tell_apart, without_repeats
from clstream.comparison.records import Record
from clstream.comparison.statistics import Ranking, mean_interval, ranking
from clstream.metrics import seen_averages

COSTS = {
    "memory kept, bytes": ("memory_bytes",),
    "training FLOPs": ("learning_flops", "consolidating_flops"),
    "training seconds": ("learning_seconds", "consolidating_seconds"),
}
"""What accuracy is drawn against: by its name, the costs of a record that it is the sum of."""


@dataclass(frozen=True)
class Method:
    """The runs of one method on one stream that ended well, one for each seed."""

    label: str
    records: tuple[Record, ...]

    @property
    def finals(self) -> Tensor:
        """(seeds,), float64: the mean of the main measure over the tasks, after the last session."""
        return torch.tensor([value_of(record, "average") for record in self.records], dtype=torch.float64)

    @property
    def mean(self) -> float:
        """The mean of `finals`."""
        return float(self.finals.mean())

    @cached_property
    def curves(self) -> tuple[Record, ...]:
        """The runs with rows after the same sessions, of which curves have means: those that most of the runs have."""
        shapes = [(record.sessions, tuple(record.main_matrix.shape)) for record in self.records]
        most = Counter(shapes).most_common(1)[0][0]
        return tuple(record for record, shape in zip(self.records, shapes, strict=True) if shape == most and record.matrix)

    @property
    def sessions(self) -> tuple[int, ...]:
        """For each row of the matrices, the sessions finished by then."""
        return self.curves[0].sessions if self.curves else ()

    @cached_property
    def matrices(self) -> Tensor:
        """(seeds, evaluations, tasks), float64, the main measure; NaN: not asked."""
        return torch.stack([record.main_matrix for record in self.curves])

    @cached_property
    def taught(self) -> Tensor:
        """(seeds, evaluations, tasks), bool: which tasks were taught since the row before."""
        return torch.stack([record.taught for record in self.curves])

    @property
    def seen_averages(self) -> Tensor:
        """(seeds, evaluations), float64: the mean over the tasks seen by then."""
        return torch.stack([seen_averages(record.main_matrix, record.taught) for record in self.curves])

    @property
    def starts(self) -> list[int]:
        """For each task the first row by which all seeds were taught it; the number of rows if one never was."""
        first = torch.where(self.taught.any(1), self.taught.int().argmax(1), self.taught.shape[1])
        return [int(row) for row in first.amax(0).tolist()]

    def tasks_shown(self, most: int) -> list[int]:
        """Return the tasks that have curves of their own: all, or of more than so many some from the first to the last."""
        tasks = int(self.matrices.shape[2])
        return list(range(tasks)) if tasks <= most else [round(place * (tasks - 1) / (most - 1)) for place in range(most)]

    def cost(self, name: str) -> Tensor:
        """Return a cost in `COSTS`, (seeds,), float64; NaN: unknown."""
        sums = [sum(record.cost.get(part, math.nan) for part in COSTS[name]) for record in self.records]
        return torch.tensor(sums, dtype=torch.float64)


@dataclass(frozen=True)
class Panel:
    """The methods on one stream, whose values can be drawn against each other: they have one main measure."""

    stream: str
    scenario: str
    measure: str
    methods: tuple[Method, ...]

    @property
    def title(self) -> str:
        """What is above a picture: the stream and the scenario."""
        return f"{self.stream}, {self.scenario}-IL"

    @property
    def seeds(self) -> str:
        """How many seeds the methods have, in words."""
        counts = sorted({len(method.records) for method in self.methods})
        return f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"

    @property
    def best_first(self) -> list[int]:
        """The numbers of the methods, the one with the best mean first."""
        means = [method.mean for method in self.methods]
        return sorted(range(len(means)), key=lambda number: (math.isnan(means[number]), -means[number], number))


def panels_of(records: Sequence[Record]) -> list[Panel]:
    """Return the methods by stream, scenario and main measure, in the order of the records, without the runs that failed.

    A method of which a run has no value in the end has no mean, and is left out of what is drawn on that stream.

    Runs of other options are other methods, and none counts twice: see `clstream.comparison.labels`. Raises ValueError if no run
    ended well, or two that should be the same have other numbers.
    """
    together: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in without_repeats(tell_apart(records))[0]:
        if not record.error:
            labels = together.setdefault(stream_key(record), {})
            labels.setdefault(record.label, []).append(record)
    panels = []
    for place, labels in together.items():
        methods = [Method(label, tuple(runs)) for label, runs in labels.items()]
        if drawn := tuple(method for method in methods if math.isfinite(method.mean)):
            panels.append(Panel(*place, drawn))
    if not panels:
        raise ValueError("there is nothing to draw: no run ended well")
    return panels


def half_width(values: Tensor) -> float:
    """Return half the width of the 95 % interval of the mean of (seeds,); 0 of a single one, which has none."""
    return mean_interval(values.tolist()).half_width if len(values) > 1 else 0.0


def rank_methods(panels: Sequence[Panel]) -> tuple[list[str], Ranking] | None:
    """Return the methods that ran on all of several streams, by label, and their ranks; None if there are no two of either."""
    means = [{method.label: method.mean for method in panel.methods} for panel in panels]
    labels = [label for label in means[0] if all(label in others for others in means)]
    if len(panels) < 2 or len(labels) < 2:
        return None
    return labels, ranking([[values[label] for label in labels] for values in means])
