"""Nearest class mean (NCM): a sample has the class whose mean feature is nearest.

Mensink, Verbeek, Perronnin, Csurka 2013, "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost".
Form implemented, with m_c the mean of a class's features f so far, under a frozen network:

    euclidean   score_c = -|f - m_c|^2
    cosine      score_c = f . m_c / (|f| |m_c|)

What comes when, and in which batches, does not matter: a mean is a sum and a count. There is no learned metric, as there is in the
paper, and no step: "NCM on frozen features" as the field has it as a baseline; with the cosine "SimpleCIL" (Zhou et al. 2023).
`novelty` is the distance to the nearest mean (own choice, the squared one), or 1 minus the cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from clstream.params import check_choice
from clstream.strategy.frozen_features import FrozenFeatures, class_means


class NCM(FrozenFeatures):
    """Answer with the class whose mean feature is nearest.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is frozen, and its head is not used.
        distance: "euclidean" or "cosine".
        dtype: of the statistics, "float64" or "float32".

    """

    scores_are = "ranks"

    def __init__(self, model: nn.Module, distance: str = "euclidean", dtype: str = "float64") -> None:
        super().__init__(model, dtype)
        check_choice(("euclidean", "cosine"), distance=distance)
        self.distance = distance

    def solve(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the class means."""
        return class_means(statistics)

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return minus the squared distances, or the cosines."""
        if self.distance == "cosine":
            cosines: Tensor = F.normalize(features, dim=1) @ F.normalize(solved, dim=1).T
            return cosines
        distances: Tensor = features.square().sum(1, keepdim=True) + solved.square().sum(1) - 2 * features @ solved.T
        return -distances

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): how far the nearest mean is; the farthest there is before any class came."""
        nearest = scores.amax(1)
        return 1 - nearest.clamp(min=-1) if self.distance == "cosine" else -nearest.clamp(min=-1e30)
