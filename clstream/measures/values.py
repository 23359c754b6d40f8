"""Measures of values: mean squared error and the coefficient of determination."""

from __future__ import annotations

from torch import Tensor

from clstream.measures.measure import Answers, Collected


class MeanSquaredError(Collected):
    """The mean over samples and outputs of the squared error."""

    name = "mse"
    higher_is_better = False
    targets = ("value",)

    def pick(self, answers: Answers) -> Tensor:
        """Return the values."""
        return answers.predicted

    def value(self, picked: Tensor, y: Tensor) -> Tensor:
        """Return the mean, by torchmetrics."""
        from torchmetrics.functional.regression import mean_squared_error

        return mean_squared_error(picked.double().flatten(), y.double().flatten())


class R2(Collected):
    """The coefficient of determination, 1 - squared error / variance: the mean over the outputs that vary among the samples.

    NaN if none does, as with a single sample.
    """

    name = "r2"
    targets = ("value",)

    def pick(self, answers: Answers) -> Tensor:
        """Return the values."""
        return answers.predicted

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the mean. It is not torchmetrics' r2_score, which takes squares that add up to less than 1e-4 for 0."""
        varying = (y != y[:1]).any(0)
        if not varying.any():
            return float("nan")
        picked, y = picked[:, varying].double(), y[:, varying].double()
        return (1 - (picked - y).square().sum(0) / (y - y.mean(0)).square().sum(0)).mean()
