"""Measures of multi-label targets: mean average precision, and F1 by class and overall."""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.measures.measure import Answers, Collected
from clstream.params import check_number


class MeanAveragePrecision(Collected):
    """The mean over classes of the average precision of their scores (macro mAP); classes without a positive are left out.

    It says nothing more of scores than their order, so none is rounded by a sigmoid first: scores become ranks, which torchmetrics
    takes. NaN if no class that is asked about has a positive.
    """

    name = "map"
    targets = ("multilabel",)

    def pick(self, answers: Answers) -> Tensor:
        """Return the scores."""
        return answers.scores

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the mean."""
        columns = with_positives(y, self.columns)
        return average_precisions(picked[:, columns], y[:, columns]).mean() if len(columns) else float("nan")


class ClassF1(Collected):
    """CF1: the mean over classes of F1, for probabilities above a threshold; classes without a positive are left out.

    Many papers mean the F1 of mean precision and mean recall by it, which is another number: see `F1OfMeans`.

    Args:
        threshold: a class is answered where its probability is above this.

    """

    targets = ("multilabel",)
    scores_are = ("logits", "probabilities")
    short = "cf1"

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        check_number(0, 1, threshold=threshold)
        self.threshold = threshold
        self.name = self.short if threshold == 0.5 else f"{self.short}:{threshold:g}"

    def pick(self, answers: Answers) -> Tensor:
        """Return the probabilities."""
        return answers.probabilities

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the mean."""
        columns = with_positives(y, self.columns)
        if not len(columns):
            return float("nan")
        return torch.stack([f1(picked[:, column], y[:, column], self.threshold) for column in columns.tolist()]).mean()


class F1OfMeans(ClassF1):
    """CF1 as many papers have it: the F1 of mean precision and mean recall, over classes with a positive.

    A class that is never answered has a precision of 0.

    Args:
        threshold: a class is answered where its probability is above this.

    """

    short = "cf1_of_means"

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the F1; NaN if there is no class with a positive."""
        columns = with_positives(y, self.columns)
        if not len(columns):
            return float("nan")
        answered, positive = picked[:, columns] > self.threshold, y[:, columns] > 0
        hits = (answered & positive).sum(0).double()
        precision, recall = (hits / counted.sum(0).clamp(min=1) for counted in (answered, positive))
        return 2 * precision.mean() * recall.mean() / (precision.mean() + recall.mean()).clamp(min=torch.finfo(hits.dtype).tiny)


class OverallF1(ClassF1):
    """OF1: F1 of the counts of all classes that are asked about together.

    Args:
        threshold: a class is answered where its probability is above this.

    """

    short = "of1"

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the F1; NaN if there is no positive."""
        columns = torch.arange(y.shape[1], device=y.device) if self.columns is None else self.columns.nonzero().flatten()
        return f1(picked[:, columns], y[:, columns], self.threshold) if y[:, columns].any() else float("nan")


def average_precisions(scores: Tensor, y: Tensor) -> Tensor:
    """Return the average precision of each class by torchmetrics: (classes,); each has a positive."""
    from torchmetrics.functional.classification import binary_average_precision

    pairs = zip(scores.unbind(1), y.unbind(1), strict=True)
    return torch.stack([binary_average_precision(ranks(column), own.long()) for column, own in pairs])


def f1(probabilities: Tensor, y: Tensor, threshold: float) -> Tensor:
    """Return the F1 of all numbers together, by torchmetrics."""
    from torchmetrics.functional.classification import binary_f1_score

    return binary_f1_score(probabilities.flatten(), y.flatten().long(), threshold)


def with_positives(y: Tensor, columns: Tensor | None) -> Tensor:
    """Return the numbers of the columns that are asked about and have a positive."""
    positive = y.any(0)
    if columns is not None:
        positive = positive & columns[: y.shape[1]]
    return positive.nonzero().flatten()


def ranks(scores: Tensor) -> Tensor:
    """Return scores in their order, equal ones equal, as numbers from 0 to 1: (n,), float64."""
    place: Tensor = scores.unique(return_inverse=True)[1]
    return place.double() / place.max().clamp(min=1)
