"""Measures of labels: accuracies, and how good probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.measures.measure import Answers, Collected, Measure
from clstream.params import check_integer


class Accuracy(Measure):
    """The share of samples with the right label."""

    name = "accuracy"

    def __init__(self) -> None:
        self.hits, self.samples = 0, 0

    def update(self, answers: Answers, y: Tensor) -> None:
        """Count the hits."""
        self.hits += int((answers.predicted == y).sum())
        self.samples += len(y)

    def compute(self) -> float:
        """Return the share."""
        return self.hits / self.samples if self.samples else float("nan")


class TopK(Collected):
    """The share of samples whose label is among the k highest scores; of equal scores the lower label comes first.

    Args:
        k: how many labels may be named.

    """

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        check_integer(1, k=k)
        self.k, self.name = k, f"top{k}"

    def pick(self, answers: Answers) -> Tensor:
        """Return the scores."""
        return answers.scores

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the share. A label that doesn't compete (-inf) is not named."""
        own = picked.gather(1, y[:, None])
        lower = torch.arange(picked.shape[1], device=y.device) < y[:, None]
        before = (picked > own).sum(1) + ((picked == own) & lower).sum(1)
        return ((before < self.k) & (own[:, 0] > float("-inf"))).double().mean()


class BalancedAccuracy(Collected):
    """The mean over the classes that the samples have of the share of their samples with the right label."""

    name = "balanced_accuracy"

    def pick(self, answers: Answers) -> Tensor:
        """Return the predicted labels."""
        return answers.predicted

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the mean of the classes' recalls."""
        samples, hits = y.bincount().double(), y[picked == y].bincount(minlength=int(y.max()) + 1).double()
        return (hits / samples)[samples > 0].mean()


class OfProbabilities(Collected):
    """What measures of probabilities share."""

    higher_is_better = False
    scores_are = ("logits", "probabilities")

    def pick(self, answers: Answers) -> Tensor:
        """Return the probabilities."""
        return answers.probabilities


class NegativeLogLikelihood(OfProbabilities):
    """The mean over the samples of minus the logarithm of their label's probability."""

    name = "nll"

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the mean; infinite if a label has probability 0."""
        return -picked.gather(1, y[:, None]).log().mean()


class Brier(OfProbabilities):
    """The mean over the samples of the squared distance of the probabilities to the one-hot label (Brier 1950): from 0 to 2."""

    name = "brier"

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the mean."""
        hit = picked.gather(1, y[:, None])[:, 0]
        return (picked.square().sum(1) - 2 * hit + 1).mean()


class CalibrationError(OfProbabilities):
    """The expected calibration error (Guo et al. 2017): how far confidence and accuracy are apart, in 15 bins of equal width."""

    name = "ece"

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the weighted mean of the bins' gaps, by torchmetrics; NaN if a probability is."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        if picked.isnan().any():
            return y.new_full((), torch.nan, dtype=torch.float64)
        several = F.pad(picked, (0, 1))  # torchmetrics takes two classes or more: one that is never answered changes nothing
        return multiclass_calibration_error(several, y, num_classes=several.shape[1], n_bins=15, norm="l1")
