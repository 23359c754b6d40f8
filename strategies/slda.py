"""Streaming linear discriminant analysis (SLDA): class means, and one covariance for all classes, taken up sample by sample.

Hayes & Kanan 2020, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis". Form implemented, with m_c the
mean of a class's features, S a covariance within classes, and shrinkage e, under a frozen network:

    W = ((1 - e) S + e I)^-1,    score_c = f . W m_c - m_c . W m_c / 2

These are the logits of Gaussians with one covariance and equal priors. What S is:

covariance="within" (default)  the scatter of all features around their class means, divided by their number: linear discriminant
                               analysis, exactly, in whatever order samples come
"streaming"                    the paper's recursion, as the authors' code has it: the t-th sample, counted from 0, adds
                               t / (t + 1) d d', d what it differs by from its class's mean before it. It depends on the order, and
                               the first sample of a class counts from a mean of 0; merging two learners' sums is no run of one
                               learner, and is refused

The authors start from a base set, with its covariance by oracle-approximating shrinkage; here nothing comes before the stream.
S of fewer samples than features is singular, and the shrinkage makes it regular, as in the paper (e = 1e-4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clstream.params import check_choice, check_number
from clstream.strategy.frozen_features import FrozenFeatures, class_means
from clstream.strategy.merging import Payload


class SLDA(FrozenFeatures):
    """Answer by linear discriminant analysis of all features so far.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is frozen, and its head is not used.
        shrinkage: e, from above 0 to 1.
        covariance: "within" or "streaming".
        dtype: of the statistics, "float64" or "float32".

    """

    def __init__(self, model: nn.Module, shrinkage: float = 1e-4, covariance: str = "within", dtype: str = "float64") -> None:
        super().__init__(model, dtype)
        check_number(0, 1, shrinkage=shrinkage)
        if not shrinkage:
            raise ValueError("shrinkage must be above 0, or a covariance of few samples has no inverse: 1e-4 is the paper's")
        check_choice(("within", "streaming"), covariance=covariance)
        self.shrinkage, self.covariance = shrinkage, covariance

    def start(self, features: Tensor) -> dict[str, Tensor]:
        """Return no samples of any class, and no products of features: (features, features)."""
        return {**super().start(features), "products": features.new_zeros(features.shape[1], features.shape[1])}

    def take_up(self, statistics: dict[str, Tensor], features: Tensor, y: Tensor) -> None:
        """Add products of features with themselves, or of what they differ by from their class's mean before them."""
        if self.covariance == "within":
            statistics["products"].addmm_(features.T, features)
        else:
            before = means_before(statistics, features, y)
            step = statistics["counts"].sum() + torch.arange(len(y), device=y.device)
            differences = features - before
            statistics["products"].addmm_((differences * (step / (step + 1))[:, None]).T, differences)
        super().take_up(statistics, features, y)

    def solve(self, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the weights (features, classes) and biases (classes,) of the linear answer."""
        means, scatter = class_means(statistics), statistics["products"]
        if self.covariance == "within":
            scatter = scatter - (means * statistics["counts"][:, None]).T @ means
        covariance = (1 - self.shrinkage) * scatter / statistics["counts"].sum()
        covariance = (covariance + covariance.T) / 2
        covariance.diagonal().add_(self.shrinkage)
        weights = torch.linalg.solve(covariance, means.T)
        return weights, (means.T * weights).sum(0) / 2

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return the logits."""
        weights, biases = solved
        logits: Tensor = features @ weights - biases
        return logits

    def check_payload(self, payload: Payload) -> None:
        """Raise ValueError for statistics of other shapes, and with covariance="streaming"."""
        if self.covariance == "streaming":
            raise ValueError("the sums of covariance='streaming' depend on the order of samples: merge learners of 'within'")
        super().check_payload(payload)


def means_before(statistics: Mapping[str, Tensor], features: Tensor, y: Tensor) -> Tensor:
    """Return for each of (n, features) the mean of its class over all samples before it: (n, features); 0 for the first one."""
    order = y.argsort(stable=True)
    ordered, labels = features[order], y[order]
    sums = ordered.cumsum(0) - ordered
    first = (labels[:, None] == labels).int().argmax(1)  # where the samples of its class begin
    rank = torch.arange(len(y), device=y.device) - first
    sums = sums - sums[first] + statistics["sums"][labels]
    before = sums / (statistics["counts"][labels] + rank).clamp(min=1)[:, None]
    return torch.empty_like(before).index_copy_(0, order, before)
