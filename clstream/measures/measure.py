"""Measure: a number that says how well the samples of a test set are answered.

    class WorstClass(Measure):
        name = "worst_class"
        targets = ("label",)

        def __init__(self):
            self.hits = torch.zeros(1000)
            self.samples = torch.zeros(1000)

        def update(self, answers, y):
            self.hits += (y[answers.predicted == y]).bincount(minlength=1000)
            self.samples += y.bincount(minlength=1000)

        def compute(self):
            return float((self.hits / self.samples).nan_to_num(1).min())

    run(strategy, stream, measures=[WorstClass()])

For each evaluation and each test set a copy of the measure is made. It is given the answers a part at a time, then asked for its
value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

ASKS = ("class", "task", "novelty")

SCORES = ("logits", "probabilities", "ranks")
"""What scores may be: see `clstream.Strategy.scores_are`."""


class Answers:
    """What a strategy answers about some samples of a test set; it is asked for what is read here, and for nothing else.

    Args:
        scores: returns the (n, outputs) scores.
        predicted: returns the predictions: labels (n,), multi-label targets (n, outputs) of 0 and 1, values (n, outputs).
        novelty: returns (n,), higher is stranger.
        columns: (classes,), bool: with multi-label targets the classes that are asked about. None: all.
        scores_are: "logits", "probabilities" or "ranks" (numbers that say no more than an order).
        target: the kind of targets: "label", "multilabel" or "value".

    """

    def __init__(
        self,
        scores: Callable[[], Tensor],
        predicted: Callable[[], Tensor],
        novelty: Callable[[], Tensor],
        columns: Tensor | None = None,
        scores_are: str = "logits",
        target: str = "label",
    ) -> None:
        self._scores, self._predicted, self._novelty = scores, predicted, novelty
        self.columns, self.scores_are, self.target = columns, scores_are, target

    @cached_property
    def scores(self) -> Tensor:
        """(n, outputs), higher is likelier; of values the values."""
        return self._scores()

    @cached_property
    def predicted(self) -> Tensor:
        """Labels (n,), multi-label targets (n, outputs) of 0 and 1, or values (n, outputs)."""
        return self._predicted()

    @cached_property
    def novelty(self) -> Tensor:
        """(n,), higher is stranger."""
        return self._novelty()

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, outputs), float64: of labels they add up to 1, of multi-label targets each class has its own from 0 to 1."""
        scores = self.scores.double()
        if self.target == "multilabel":
            return scores.sigmoid() if self.scores_are == "logits" else scores
        return scores.softmax(1) if self.scores_are == "logits" else scores / scores.sum(1, keepdim=True)


class Measure(ABC):
    """How well the samples of a test set are answered; a subclass has a name, `update` and `compute`."""

    name: str
    """What tables, curves and `Result.measured` call it."""

    higher_is_better: bool = True

    asks: str = "class"
    """Whether strategies are asked without the task ("class"), with it ("task"), or how strange samples are ("novelty").

    With "novelty" it is given all known samples seen so far, then the strange ones, with y 0 for the known and 1 for the strange.
    """

    targets: tuple[str, ...] = ("label",)
    """The kinds of targets that it can be asked about."""

    scores_are: tuple[str, ...] = SCORES
    """The kinds of scores that it can make something of."""

    @abstractmethod
    def update(self, answers: Answers, y: Tensor) -> None:
        """Take up the answers about some samples, whose targets are y."""

    @abstractmethod
    def compute(self) -> float:
        """Return the value over all samples that were taken up, a number; NaN where it is not defined.

        It is asked for only where some samples were.
        """


class Collected(Measure):
    """A measure of all samples together: a subclass says what it keeps of answers (`pick`), and its value from all (`value`)."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.columns: Tensor | None = None

    def update(self, answers: Answers, y: Tensor) -> None:
        """Keep what it needs of the answers."""
        self.columns = answers.columns
        self.parts.append((self.pick(answers), y))

    def compute(self) -> float:
        """Return the value over all samples; NaN of none."""
        if not self.parts:
            return float("nan")
        picked, targets = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        return float(self.value(picked, targets))

    @abstractmethod
    def pick(self, answers: Answers) -> Tensor:
        """Return what is kept of some answers, a row for each sample."""

    @abstractmethod
    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the value from what was kept of all samples, and their targets."""
