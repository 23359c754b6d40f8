"""The linear probe: what frozen features are worth, in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clstream.eval_mode import evaluating
from clstream.stream import Samples, Subset

TOGETHER = 1024
"""Samples whose features are computed together."""

RIDGE = 0.01


def linear_probe(model: nn.Module, train: Samples | Subset, test: Samples | Subset, ridge: float = RIDGE) -> float:
    """Return the accuracy on test samples of a linear classifier on a model's features that was fitted to training samples.

    It is ridge regression of the one-hot labels, in float64. With F the features, each standardised over the training samples, and
    Y the labels less their means:

        W = (F' F / n + ridge I)^-1 F' Y / n

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is asked in evaluation mode, and stays as it is.
        train, test: labelled samples; a test label that has no training sample is never right.
        ridge: what is added to the diagonal of the features' correlations.

    """
    classes = int(torch.cat([train.y, test.y]).max()) + 1
    with evaluating(model):
        squares: Tensor | None = None
        counts = torch.zeros(classes, dtype=torch.float64)
        for features, y in _features(model, train):
            if squares is None:
                width = features.shape[1]
                squares, sums = features.new_zeros(width, width), features.new_zeros(classes, width)
            squares.addmm_(features.T, features)
            sums.index_add_(0, y, features)
            counts += y.bincount(minlength=classes)
        assert squares is not None
        n = len(train)
        mean, share = sums.sum(0) / n, counts / n
        covariance = squares / n - mean.outer(mean)
        scale = covariance.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > 1e-9 * (1 + mean.abs()), scale, torch.inf)  # what never changes says nothing
        weights = torch.linalg.solve(
            covariance / scale.outer(scale) + ridge * torch.eye(len(mean), dtype=mean.dtype),
            ((sums - counts[:, None] * mean) / scale / n).T,
        )
        hits = 0
        for features, y in _features(model, test):
            scores = (features - mean) / scale @ weights + share
            hits += int((scores.masked_fill(counts == 0, -torch.inf).argmax(1) == y).sum())
    return hits / len(test)


def _features(model: nn.Module, samples: Samples | Subset) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features of samples, in float64, with their labels, on the CPU."""
    device = next(model.parameters()).device
    for start in range(0, len(samples), TOGETHER):
        part = samples[start : start + TOGETHER]
        features: Tensor = model.features(part.x.to(device))  # type: ignore[operator]  # that is asked of the caller
        if features.dim() != 2:
            raise ValueError(f"{type(model).__name__}.features must return (n, features), not {tuple(features.shape)}")
        yield features.cpu().double(), part.y.cpu()
