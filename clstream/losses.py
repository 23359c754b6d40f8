"""Losses that several strategies share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_contrastive(features: Tensor, y: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, the sum over positives outside the logarithm).

    With z the rows of `features` at unit length, s = z z' / T, P(i) the other rows of i's label and A(i) all other rows:

        mean over i of  -1/|P(i)| sum over p in P(i) of ( s_ip - log sum over a in A(i) of exp(s_ia) )

    A row that is alone with its label has no positives: it stays in the sums of the others, and out of the mean. Of such rows
    alone the loss is 0. Some codes scale the loss by T / 0.07: that is left to the caller.

    Args:
        features: (n, d), n at least 1; a row of zeros stays one.
        y: (n,), int64.
        temperature: T.
        counted: (n,), bool: rows that are not are left out of all sums. None: all are.

    """
    z = F.normalize(features, dim=1)
    similar = z @ z.T / temperature
    itself = y.new_ones(len(y)).diag().bool()
    if counted is not None:
        itself |= ~counted
    positive = (y[:, None] == y) & ~itself
    positives = positive.sum(1)
    near = (similar * positive).sum(1) / positives.clamp(min=1)
    every = similar.masked_fill(itself, torch.finfo(z.dtype).min).logsumexp(1)  # it subtracts the greatest of each row first
    paired = positives > 0 if counted is None else (positives > 0) & counted
    return ((every - near) * paired).sum() / paired.sum().clamp(min=1)
