"""Extreme-value models of distances: how likely a sample is an outlier of its class, from the tail of the class's distances.

The form is that of libmr (Scheirer et al.), as open-set recognition after Bendale & Boult 2016 uses it: with a the smallest of the
tail's distances, a Weibull distribution of two parameters is fitted to tail + 1 - a by maximum likelihood, and

    omega(d) = 1 - exp(-((d + 1 - a) / scale)^shape),    0 where d + 1 - a < 0.

So omega is above 0 at the start of the tail and below it. The likelihood's only equation is solved by scipy's root finder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_TAIL = 3
"""Distances that a tail needs."""


@dataclass(frozen=True, slots=True)
class Weibull:
    """The distribution of distances in a tail: `start` is the smallest of them."""

    start: float
    scale: float
    shape: float

    def outlier_probability(self, distances: Tensor) -> Tensor:
        """Return omega of distances of any shape."""
        return outlier_probability(distances, *(distances.new_tensor(value) for value in (self.start, self.scale, self.shape)))

    def quantile(self, shares: Tensor) -> Tensor:
        """Return the distances at which omega is these shares, from 0 to below 1."""
        return self.scale * (-torch.log1p(-shares)) ** (1 / self.shape) - 1 + self.start


def outlier_probability(distances: Tensor, start: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """Return omega of distances, each by the parameters beside it, as broadcasting has it."""
    shifted = (distances + 1 - start).clamp(min=0)
    return -torch.expm1(-((shifted / scale) ** shape))


def fit_weibull(tail: Tensor) -> Weibull:
    """Fit the distribution to (n,) distances of a tail, by maximum likelihood.

    Raises ValueError for fewer than `LEAST_TAIL` of them, for ones that are not finite, and where all are equal.
    """
    distances = tail.detach().double().cpu().numpy()
    if len(distances) < LEAST_TAIL or not np.isfinite(distances).all():
        raise ValueError(f"an extreme-value model needs a tail of at least {LEAST_TAIL} finite distances, not {len(distances)}")
    start = float(distances.min())
    logs = np.log(distances + 1 - start)
    shape = _shape(logs)
    if math.isinf(shape):
        raise ValueError("an extreme-value model needs distances that differ, and those of the tail are all equal")
    scale = math.exp(logs.max()) * float(np.exp(shape * (logs - logs.max())).mean()) ** (1 / shape)
    return Weibull(start, scale, shape)


def _shape(logs: npt.NDArray[np.float64]) -> float:
    """Return the shape of greatest likelihood for the logarithms of values; infinite where they are equal."""
    from scipy.optimize import brentq

    def slope(shape: float) -> float:
        weights = np.exp(shape * (logs - logs.max()))
        return float((weights * logs).sum() / weights.sum() - 1 / shape - logs.mean())

    low, high = 1e-3, 1e8
    return float(brentq(slope, low, high, xtol=1e-12, rtol=1e-14)) if slope(low) < 0 < slope(high) else math.inf


def cosine_distances(z: Tensor, means: Tensor) -> Tensor:
    """Return 1 minus the cosine of rows of z and of means, as broadcasting has it."""
    return 1 - F.cosine_similarity(z, means, dim=-1)


class OutlierModel:
    """For each class a mean of latents and a Weibull distribution of the cosine distances in the tail around it."""

    def __init__(self) -> None:
        self.means = torch.empty(0, 0)  # (classes, latents)
        self.weibulls = torch.empty(0, 3)  # (classes, 3): start, scale, shape; NaN for classes without a model

    def fit(self, z: Tensor, y: Tensor, predicted: Tensor, classes: int, share: float) -> list[int]:
        """Fit the model anew; return the classes among y that can't have one, as too few of their samples are classified right.

        Args:
            z: (n, latents), of all training samples.
            y: (n,), their labels.
            predicted: (n,), the labels that they are classified as; others than y are left out.
            classes: number of labels.
            share: of the samples of an average class, that is its tail: each has int(n * share / classes among y), at least
                `LEAST_TAIL` and at most what it has.

        """
        labels = y.unique().tolist()
        size = max(LEAST_TAIL, int(len(y) * share / len(labels)))
        self.means, self.weibulls = z.new_zeros(classes, z.shape[1]), z.new_full((classes, 3), torch.nan)
        without = []
        for label in labels:
            own = z[(y == label) & (predicted == label)]
            if len(own):
                self.means[label] = own.mean(0)
            try:
                weibull = fit_weibull(cosine_distances(own, self.means[label]).sort().values[-size:])
            except ValueError:
                without.append(label)
            else:
                self.weibulls[label] = z.new_tensor([weibull.start, weibull.scale, weibull.shape])
        return without

    def __bool__(self) -> bool:
        """Return whether it was fitted."""
        return len(self.means) > 0

    def outlier_probability(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return (n,) omega of (n, latents) as samples of their (n,) labels; NaN for classes without a model."""
        start, scale, shape = self.weibulls[labels].unbind(1)
        return outlier_probability(cosine_distances(z, self.means[labels]), start, scale, shape)
