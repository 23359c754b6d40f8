"""What new units and new rows of the head start from: the weights of the nearest task, or of the nearest class."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from clstream.strategies.lifelong.groups import Groups, parts_of
from torch import Tensor, nn

from clstream.stream import Samples, Subset

MOST = 500
"""Samples of a session that class means are taken of, evenly from all of it."""

Nearest = Mapping[int, tuple[int, float]]
"""For each new class the nearest old one, and its cosine."""


@torch.no_grad()
def class_means(model: nn.Module, samples: Samples | Subset, device: torch.device) -> dict[int, Tensor]:
    """Return for each class the mean of its features below the head, (features,), over some samples of a session."""
    rows = torch.linspace(0, len(samples) - 1, min(len(samples), MOST)).long()
    source = samples.source if isinstance(samples, Subset) else samples
    part = samples[rows.to(source.y.device)].to(device)
    features = parts_of(model)[0](part.x)
    return {int(label): features[part.y == label].mean(0) for label in part.y.unique()}


def nearest_classes(groups: Groups, old: Mapping[int, Tensor], new: Mapping[int, Tensor], labels: Collection[int]) -> Nearest:
    """Return the nearest old class of each new label, by the cosine of class means over the units that the old one had."""
    nearest = {}
    source = groups.sources(f"{groups.head}.weight", groups.width)
    for label in [label for label in labels if label in new]:
        cosines = {}
        for other, mean in old.items():
            had = (source >= 0) & (source <= groups.owner[groups.head][groups.labels.index(other)])
            cosines[other] = float(torch.cosine_similarity(mean[had], new[label][had], dim=0))
        best = max(cosines, key=lambda other: cosines[other])
        nearest[label] = best, cosines[best]
    return nearest


@torch.no_grad()
def copy_units(groups: Groups, weights: Mapping[str, nn.Parameter], nearest: Nearest) -> None:
    """Give the units of the task that was allocated last weights from older units and inputs as the nearest task's units have them.

    It is the task whose classes have the greatest sum of cosines. The first unit is as the first one there, and so on.
    """
    sums: dict[int, float] = {}
    for old, cosine in nearest.values():
        owner = int(groups.owner[groups.head][groups.labels.index(old)])
        sums[owner] = sums.get(owner, 0.0) + cosine
    task, now = max(sums, key=lambda number: sums[number]), groups.allocated - 1
    for name, layer in groups.rows.items():
        if layer != groups.head:
            into, out = ((groups.owner[layer] == number).nonzero().flatten() for number in (now, task))
            many = min(len(into), len(out))
            copy_weights(groups, name, weights[name], into[:many], out[:many])


@torch.no_grad()
def copy_rows(groups: Groups, weights: Mapping[str, nn.Parameter], nearest: Nearest) -> None:
    """Give the head's rows of new classes what those of the nearest ones have, but for the weights from new units."""
    device = groups.owner[groups.head].device
    pairs = [(groups.labels.index(label), groups.labels.index(old)) for label, (old, _) in nearest.items()]
    into, out = torch.tensor(pairs, device=device).unbind(1)
    for name, layer in groups.rows.items():
        if layer == groups.head:
            copy_weights(groups, name, weights[name], into, out)


def copy_weights(groups: Groups, name: str, weight: Tensor, into: Tensor, out: Tensor) -> None:
    """Copy rows of a weight, from units older than the task that was allocated last, or of a bias."""
    if weight.dim() == 1:
        weight[into] = weight[out]
    else:
        source = groups.sources(name, weight.shape[1])
        older = ((source >= 0) & (source < groups.allocated - 1)).nonzero().flatten()
        weight[into[:, None], older] = weight[out[:, None], older]
