"""Measures of an open set: how well strange samples are told from known ones."""

from __future__ import annotations

from torch import Tensor

from clstream.measures.measure import Answers, Collected
from clstream.measures.multilabel import ranks


class Auroc(Collected):
    """The area under the ROC curve of the novelty: how often a strange sample is stranger than a known one; equal ones count half.

    NaN where all samples are known, or all strange.
    """

    name = "auroc"
    asks = "novelty"
    targets = ("label", "multilabel", "value")

    def pick(self, answers: Answers) -> Tensor:
        """Return the novelty."""
        return answers.novelty

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the area, by torchmetrics."""
        from torchmetrics.functional.classification import binary_auroc

        return binary_auroc(ranks(picked), y.long()) if 0 < int(y.sum()) < len(y) else float("nan")


class Fpr95(Auroc):
    """The false positive rate at 95 % true positives: the share of strange samples that pass where 95 % of the known ones do."""

    name = "fpr95"
    higher_is_better = False

    def value(self, picked: Tensor, y: Tensor) -> Tensor | float:
        """Return the share at the strictest threshold that lets 95 % of the known samples in, by torchmetrics."""
        from torchmetrics.functional.classification import binary_roc

        if not 0 < int(y.sum()) < len(y):
            return float("nan")
        false_rate, true_rate, _ = binary_roc(1 - ranks(picked), 1 - y.long())
        return false_rate[true_rate >= 0.95].min()
