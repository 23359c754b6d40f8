"""Answers: which outputs compete, and the predictions and the novelty that are read from scores."""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.stream import Session, Task


def mask_logits(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """Return (n, classes) outputs with all but those for some labels masked with -inf; of no labels, as they are."""
    if labels is None or not len(labels):
        return outputs
    masked = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
    masked[labels] = False
    return outputs.masked_fill(masked, float("-inf"))


def allowed(task: Task, scores: Tensor) -> Tensor:
    """Return (classes,), bool, on the scores' device: which of their columns are classes of a task."""
    columns = torch.zeros(scores.shape[1], dtype=torch.bool)
    columns[list(task.classes)] = True
    return columns.to(scores.device)


def session_outputs(session: Session) -> list[int]:
    """Return the outputs that a session has something to learn for: those of its classes; with values all that there are."""
    return list(range(session.samples[:1].y.shape[1])) if session.target == "value" else session.classes


def heads_of_positives(y: Tensor, heads: Tensor, current: Tensor | None) -> Tensor:
    """Return (n, outputs), bool: which outputs compete for samples with (n, columns) multi-label targets.

    Args:
        y: the targets.
        heads: (classes, outputs), bool: which outputs compete for a sample of each class.
        current: labels of the task that goes on, for samples without a positive.

    """
    competing = (y[:, : len(heads)] @ heads.to(y.dtype)) > 0
    own = torch.zeros(heads.shape[1], dtype=torch.bool, device=y.device)
    if current is not None:
        own[current] = True
    return torch.where((y > 0).any(1, keepdim=True), competing, own)


def predictions_of(scores: Tensor, target: str, scores_are: str, threshold: float) -> Tensor:
    """Return what scores predict: (n,) int64 labels, (n, outputs) float32 of 0 and 1 for multi-label targets, or the values."""
    if target == "label":
        return scores.argmax(dim=1)
    if target == "value":
        return scores
    return ((scores.sigmoid() if scores_are == "logits" else scores) > threshold).float()


def softmax_novelty(scores: Tensor, scores_are: str, target: str) -> Tensor:
    """Return (n,), how strange samples are: 1 minus the greatest probability that their scores give a class.

    Probabilities are the softmax of logits (Hendrycks & Gimpel 2017), their sigmoids with multi-label targets, or the scores. Where
    no class competes it is 1. Raises TypeError for ranks and for values.
    """
    if target == "value":
        raise TypeError("values have no novelty: it is 1 minus the probability of the likeliest class, and they have no classes")
    if scores_are == "ranks":
        raise TypeError("scores that only rank classes give no probabilities, so there is no novelty: define `novelty`")
    best = scores.amax(1)
    if scores_are == "logits":
        probability = best.sigmoid() if target == "multilabel" else scores.softmax(1).amax(1)
        return 1 - torch.where(best == float("-inf"), 0, probability)
    return 1 - best.clamp(min=0)
