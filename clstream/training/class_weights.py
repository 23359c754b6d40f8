"""Class weights: rare classes of a session weigh as much as frequent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.bus import on
from clstream.events import BatchLearned, SessionStarted
from clstream.strategy import Strategy


class ClassWeights:
    """Weighs the labels of a session, so that each of its classes has as much of the loss as another.

    A class with n of the session's N samples, of K classes, has the weight N / (K n), scikit-learn's "balanced"; classes that are
    not in the session, such as those of replayed samples, have 1. The loss is the weighted mean, as torch's `cross_entropy` has it.

    Args:
        learner: whose loss is weighed: its `train_class_weights`.
        outputs: the number of labels over the whole stream, as far as it is known.

    """

    def __init__(self, learner: Strategy, outputs: int) -> None:
        self.learner, self.outputs = learner, outputs
        self.weights: Tensor | None = None  # of the session's classes

    @on(SessionStarted)
    def weigh(self, event: SessionStarted) -> None:
        """Count the labels."""
        device = next((weight.device for weight in self.learner.model.parameters()), None)
        y = event.session.samples.y
        self.outputs = max(self.outputs, int(y.max()) + 1)  # how many there are may show as sessions come
        self.learner.train_class_weights = self.weights = balanced(y, self.outputs).to(device)
        self.learner.train_weighed = False

    @on(BatchLearned)
    def check_weighed(self, event: BatchLearned) -> None:
        """Refuse a loss that leaves the weights out. Raises TypeError."""
        if not self.learner.train_weighed:
            name = type(self.learner).__name__
            raise TypeError(
                f"the loss of {name} leaves class weights out: it is not computed by Strategy.loss or loss_of_outputs, which weigh "
                f"the classes. Have {name}.loss call them, or leave class_weights out"
            )


def balanced(y: Tensor, outputs: int) -> Tensor:
    """Return (outputs,), float32: the weight of each class among (n,) labels, 1 of one that is not there."""
    counts = y.bincount(minlength=outputs).double()
    weights = len(y) / (int((counts > 0).sum()) * counts)
    return torch.where(counts > 0, weights, 1.0).float()
