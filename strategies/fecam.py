"""FeCAM: the class whose mean is nearest by the Mahalanobis distance of its own covariance.

Goswami, Liu, Twardowski, van de Weijer 2023, "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual
Learning". Form implemented, under a frozen network, in the steps of the authors' code, with t(f) = f^tukey:

    S_c = covariance of t(f) over the samples of class c (divided by their number less 1)
    S_c <- S_c + shrink_diagonal v I + shrink_off_diagonal o (1 - I),    v the mean of its diagonal, o of its other entries
    R_c = S_c as correlations: divided by the roots of its diagonal on both sides
    d = t(f) / |t(f)| - t(m_c) / |t(m_c)|,    score_c = -d' R_c^+ d,    m_c the mean of f, R^+ the pseudo-inverse

With `tukey=None` t is the identity, and f is divided by its length first, in the covariance and the mean too, as the authors have
it for vision transformers (shrink_diagonal 1, shrink_off_diagonal 0 there; 1 and 1 on features of ResNets, with tukey 0.5: the
defaults). Tukey's power is of features from 0 up: others are refused. A class of one sample has no covariance: its R is I.

The authors' code takes o over the entries that are not 0. Then, where most features of a class are 0, o can exceed v, and distances
get below 0: on sparse features one class wins everything. With the mean over all entries, as the paper says it, R has no negative
eigenvalue; without zeros both are the same.

Deviation: the authors' code answers by plain distances in the first task; here each task is alike. What comes when does not matter.
A class keeps features x features numbers: 13 MB in float64 for 1,280 features. `novelty` is the distance to the nearest class.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.params import check_number
from clstream.strategy.frozen_features import FrozenFeatures, add_by_class, class_means


class FeCAM(FrozenFeatures):
    """Answer with the class that is nearest by its own Mahalanobis distance.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is frozen, and its head is not used.
        tukey: the power that features are raised to, from above 0 to 1. None: they are divided by their length.
        shrink_diagonal, shrink_off_diagonal: what is added to a covariance, as shares of its own means.
        dtype: of the statistics, "float64" or "float32".

    """

    scores_are = "ranks"

    def __init__(
        self,
        model: nn.Module,
        tukey: float | None = 0.5,
        shrink_diagonal: float = 1.0,
        shrink_off_diagonal: float = 1.0,
        dtype: str = "float64",
    ) -> None:
        super().__init__(model, dtype)
        if tukey is not None:
            check_number(0, 1, tukey=tukey)
            if not tukey:
                raise ValueError("tukey must be above 0, or all features were 1: 0.5 is the authors', None leaves it out")
        check_number(0, shrink_diagonal=shrink_diagonal, shrink_off_diagonal=shrink_off_diagonal)
        self.tukey, self.shrink_diagonal, self.shrink_off_diagonal = tukey, shrink_diagonal, shrink_off_diagonal

    by_class = MappingProxyType({"counts": 0, "sums": 0, "transformed": 0, "products": 0})

    def features(self, x: Tensor) -> Tensor:
        """Return the network's features; of length 1 if they are not raised to a power."""
        features = super().features(x)
        return F.normalize(features, dim=1) if self.tukey is None else features

    def transform(self, features: Tensor) -> Tensor:
        """Return features raised to the power."""
        return features if self.tukey is None else features.pow(self.tukey)

    def start(self, features: Tensor) -> dict[str, Tensor]:
        """Return no samples, and of transformed features no sums and no products: (classes, features, features)."""
        statistics = super().start(features)
        width = features.shape[1]
        products = features.new_zeros(self.classes, width, width)
        return {**statistics, "transformed": torch.zeros_like(statistics["sums"]), "products": products}

    def take_up(self, statistics: dict[str, Tensor], features: Tensor, y: Tensor) -> None:
        """Add the transformed features, and their products by class. Raises ValueError for features that have no power."""
        if self.tukey is not None and bool((features < 0).any()):
            raise ValueError(
                f"features of {type(self.model).__name__} are below 0, which have no power of {self.tukey}: take tukey=None"
            )
        super().take_up(statistics, features, y)
        transformed = self.transform(features)
        add_by_class(statistics["transformed"], y, transformed)
        for label in y.unique().tolist():
            own = transformed[y == label]
            statistics["products"][label].addmm_(own.T, own)

    def solve(self, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prototypes (classes, features) and the inverse correlations (classes, features, features)."""
        inverses = torch.zeros_like(statistics["products"])
        for label in statistics["counts"].nonzero().flatten().tolist():
            n, total = statistics["counts"][label], statistics["transformed"][label]
            if n > 1:
                covariance = (statistics["products"][label] - total[:, None] * total / n) / (n - 1)
                inverses[label] = torch.linalg.pinv(self.correlations(covariance), hermitian=True)
            else:
                inverses[label] = torch.eye(len(total)).to(total)
        return F.normalize(self.transform(class_means(statistics)), dim=1), inverses

    def correlations(self, covariance: Tensor) -> Tensor:
        """Return a covariance (features, features) shrunk, as correlations; what never varies is correlated with itself alone."""
        covariance = (covariance + covariance.T) / 2
        identity = torch.eye(len(covariance)).to(covariance)
        mean = (covariance * (1 - identity)).sum() / max(1, len(identity) * (len(identity) - 1))
        covariance = covariance + self.shrink_diagonal * covariance.diagonal().mean() * identity
        covariance = covariance + self.shrink_off_diagonal * mean * (1 - identity)
        deviations = covariance.diagonal().clamp(min=0).sqrt()
        deviations = torch.where(deviations > 0, deviations, 1)
        correlations = covariance / (deviations[:, None] * deviations)
        correlations.diagonal().fill_(1)
        return correlations

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return minus the squared Mahalanobis distances."""
        prototypes, inverses = solved
        vectors = F.normalize(self.transform(features.clamp(min=0) if self.tukey is not None else features), dim=1)
        scores = []
        for prototype, inverse in zip(prototypes, inverses, strict=True):  # classes are few beside what each costs
            differences = vectors - prototype
            scores.append(-((differences @ inverse) * differences).sum(1))
        return torch.stack(scores, 1)

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): the squared Mahalanobis distance to the nearest class."""
        return -scores.amax(1).clamp(min=-1e30)
