"""Which two classes are taken for each other, and what is free in a pass that is to tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from clstream.strategies.lifelong.groups import FREE, Groups
from torch import Tensor

TOP = 0.25
"""The share of a pair's inputs whose weights are free in a pass for it."""


def error(scores: Tensor, y: Tensor, pair: tuple[int, int] | None = None) -> float:
    """Return the share of samples that (n, classes) scores answer wrongly; with a pair, between its classes alone."""
    if pair is None:
        return float((scores.argmax(1) != y).float().mean())
    labels = torch.tensor(pair, device=scores.device)
    return float((labels[scores[:, labels].argmax(1)] != y).float().mean())


def worst_pair(scores: Tensor, y: Tensor) -> tuple[int, int] | None:
    """Return the two classes that are taken for each other most often; None if no two are."""
    many = scores.shape[1]
    counts = torch.bincount(y * many + scores.argmax(1), minlength=many * many).view(many, many)
    both = (counts + counts.T).triu(1)
    first, second = divmod(int(both.argmax()), many)
    return (first, second) if int(both.max()) else None


def freed_for(
    pair: tuple[int, int], groups: Groups, weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], stiffness: float
) -> dict[str, Tensor]:
    """Return the stiffness of all weights in a pass for a pair: infinite but for its rows of the head, on their top inputs.

    Args:
        pair: two labels.
        groups: the owners of the units; what belongs to no task is not free.
        weights: all weights by name.
        fisher: by name, of the head's weights at least.
        stiffness: of what is free.

    """
    rows = torch.tensor([groups.labels.index(label) for label in pair])
    freed = {}
    for name, weight in weights.items():
        b = torch.full_like(weight, inf)
        if groups.rows.get(name) == groups.head:
            if weight.dim() == 1:
                b[rows] = stiffness
            else:
                top = fisher[name][rows].sum(0).topk(max(1, int(TOP * weight.shape[1]))).indices
                b[rows[:, None], top.cpu()] = stiffness
            b[groups.numbers(name, weight, groups.allocated) == FREE] = inf
        freed[name] = b
    return freed
