"""Losses that several strategies share: of each kind of targets, and the supervised contrastive one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BCE_MEANS = ("all", "competing")
"""What the binary cross-entropies of a sample are averaged over: see `sample_losses`."""


def sample_losses(outputs: Tensor, y: Tensor, target: str = "label", bce_mean: str = "all") -> Tensor:
    """Return (n,), the loss of each sample by the kind of its targets. An output of -inf doesn't compete, and has no gradient.

    label       cross-entropy over the outputs that compete
    multilabel  binary cross-entropy with logits: the sum over the columns that compete, divided by the number of all columns of
                `y` (`bce_mean="all"`) or of those that compete ("competing"); outputs beyond the columns of `y` are left out
    value       the mean squared error over outputs

    MULTI-LANE (De Min et al. 2024) puts logits and targets of columns that don't compete to 0, and averages over all columns: each
    such column then adds log 2 / columns to the loss, and nothing to the gradient. Here, with "all", this constant is left out;
    the gradient is the same: (competing / all) times that of "competing".

    Args:
        outputs: (n, outputs), logits or values.
        y: the targets, as in `Samples`.
        target: "label", "multilabel" or "value".
        bce_mean: "all" or "competing".

    """
    if target == "label":
        return F.cross_entropy(outputs, y, reduction="none")
    if target == "value":
        return (outputs - y).square().mean(1)
    outputs = outputs[:, : y.shape[1]]
    masked = outputs == float("-inf")  # and not `isfinite`: a NaN is to show
    terms = F.binary_cross_entropy_with_logits(outputs.masked_fill(masked, 0), y, reduction="none").masked_fill(masked, 0)
    return terms.sum(1) / (y.shape[1] if bce_mean == "all" else (~masked).sum(1).clamp(min=1))


def mean_loss(outputs: Tensor, y: Tensor, target: str = "label", bce_mean: str = "all") -> Tensor:
    """Return the mean of the losses of samples, a scalar: see `sample_losses`."""
    return F.cross_entropy(outputs, y) if target == "label" else sample_losses(outputs, y, target, bce_mean).mean()


def distillation(outputs: Tensor, before: Tensor, labels: Tensor, temperature: float, competing: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of a teacher's softened answer for some labels with that of outputs: the mean over samples.

    With T the temperature: - sum over labels of softmax(before / T) log softmax(outputs / T), without a factor T^2.

    Args:
        outputs: (n, classes).
        before: the teacher's, (n, classes).
        labels: (k,), those whose outputs the teacher's softmax is over.
        temperature: T.
        competing: (c,), those that the softmax of `outputs` is over. None: `labels`.

    """
    targets = (before[:, labels] / temperature).softmax(1)
    whole = (outputs[:, labels if competing is None else competing] / temperature).logsumexp(1, keepdim=True)
    return (targets * (whole - outputs[:, labels] / temperature)).sum(1).mean()


def supervised_contrastive(features: Tensor, y: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, the sum over positives outside the logarithm).

    With z the rows of `features` at unit length, s = z z' / T, P(i) the other rows of i's label and A(i) all other rows:

        mean over i of  -1/|P(i)| sum over p in P(i) of ( s_ip - log sum over a in A(i) of exp(s_ia) )

    A row that is alone with its label has no positives: it stays in the sums of the others, and out of the mean. Of such rows
    alone the loss is 0. Some codes scale the loss by T / 0.07: that is left to the caller. With features (..., n, d) it is (...).

    Args:
        features: (n, d), or (..., n, d) of several spaces, n at least 1; a row of zeros stays one.
        y: (n,), int64.
        temperature: T.
        counted: (n,), bool: rows that are not are left out of all sums. None: all are.

    """
    z = F.normalize(features, dim=-1)
    similar = z @ z.mT / temperature
    itself = y.new_ones(len(y)).diag().bool()
    if counted is not None:
        itself |= ~counted
    positive = (y[:, None] == y) & ~itself
    positives = positive.sum(1)
    near = (similar * positive).sum(-1) / positives.clamp(min=1)
    every = similar.masked_fill(itself, torch.finfo(z.dtype).min).logsumexp(-1)  # it subtracts the greatest of each row first
    paired = positives > 0 if counted is None else (positives > 0) & counted
    return ((every - near) * paired).sum(-1) / paired.sum().clamp(min=1)


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Return NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020): each row is to find the other view of its sample.

    With z the rows at unit length, i and p(i) the two views of a sample, and s = z z' / T, the mean over all 2n rows of

        -log( exp(s_i,p(i)) / sum over a other than i of exp(s_ia) )

    Args:
        projections: (2n, d): the first views of n samples, then the second ones, in the same order.
        temperature: T.

    """
    samples = torch.arange(len(projections) // 2, device=projections.device)
    return supervised_contrastive(projections, samples.repeat(2), temperature)


SIMILARITIES = ("squared", "cosine", "dot")
"""How near a sample's features f are to a prototype m: -|f - m|^2, their cosine, or their dot product."""


def prototype_scores(features: Tensor, prototypes: Tensor, similarity: str = "squared", scale: float = 1.0) -> Tensor:
    """Return how near features are to prototypes, times `scale`: (..., n, classes), as logits.

    Args:
        features: (..., n, d).
        prototypes: (..., classes, d).
        similarity: one of SIMILARITIES. The cosine with a row of zeros is 0.
        scale: above 0.

    """
    if similarity == "cosine":
        features, prototypes = F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1)
    products = features @ prototypes.mT
    if similarity == "squared":
        lengths = features.square().sum(-1)[..., :, None] + prototypes.square().sum(-1)[..., None, :]
        return scale * (2 * products - lengths)
    return scale * products


def prototypical(support: Tensor, queries: Tensor, ways: int, similarity: str = "squared", scale: float = 1.0) -> Tensor:
    """Return the mean cross-entropy of queries over the prototypes of their episode, a scalar (Snell, Swersky, Zemel 2017).

    Args:
        support: (ways * shots, d), the features of an episode's support samples, class by class; their means are the prototypes.
        queries: (ways * queries, d), likewise of the samples that are asked about.
        ways: the number of classes.
        similarity, scale: see `prototype_scores`.

    """
    prototypes = support.view(ways, -1, support.shape[1]).mean(1)
    labels = torch.arange(ways, device=queries.device).repeat_interleave(len(queries) // ways)
    return F.cross_entropy(prototype_scores(queries, prototypes, similarity, scale), labels)
