"""Learning without past samples: what L2, EWC, SI and LwF share. A classification loss, batch norm at rest, optimizer by task."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted, SessionStarted, TaskEnded, TaskStarted
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, Task

FORMS = ("softmax", "softmax_all", "masked_ce", "bce_all", "bce_local")


class RehearsalFree(Strategy):
    """Learn each task with a loss of one of several forms; nothing of its samples is kept when it is over.

    Forms, with K the outputs for the classes that have come, in this task and in those before:

    softmax       cross-entropy over K
    softmax_all   cross-entropy over all outputs, also those of classes that never came
    masked_ce     cross-entropy over the outputs for this task's classes
    bce_all       binary cross-entropy of K against the one-hot label, its mean over K times `bce_scale`
    bce_local     the same over this task's classes alone

    On a task-incremental stream the cross-entropies are over a sample's own head. An answer is one of the classes that came so
    far (softmax_all: any).

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        form: of the classification loss.
        bce_scale: of binary cross-entropies, of their mean over outputs. None: their sum.
        bn_mode: "eval" (batch norm's statistics stay as they are, in training too) or "train".
        renew_optimizer: whether each task has an optimizer of its own.

    """

    rehearsal_free = True
    forms: tuple[str, ...] = FORMS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "eval",
        renew_optimizer: bool = False,
    ) -> None:
        super().__init__(model, optimizer)
        if form not in self.forms:
            raise ValueError(f"form must be one of {', '.join(self.forms)}, not {form!r}")
        if bn_mode not in ("eval", "train"):
            raise ValueError(f"bn_mode must be eval or train, not {bn_mode!r}")
        if bce_scale is not None and not 0 < bce_scale < float("inf"):
            raise ValueError(f"bce_scale must be a number above 0, or None, not {bce_scale}")
        self.form, self.bce_scale, self.bn_mode = form, bce_scale, bn_mode
        self.renew_optimizer, self.make_optimizer = renew_optimizer, optimizer
        self.old = torch.empty(0, dtype=torch.int64)  # labels that came in tasks that are over
        self.new = torch.empty(0, dtype=torch.int64)  # in this task
        self.seen = torch.empty(0, dtype=torch.int64)  # in either

    @on(RunStarted)
    def rest_norms(self, event: RunStarted) -> None:
        """Put batch norm in evaluation mode for good, if it is to be."""
        if self.bn_mode == "eval":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self.old = self.new = self.seen = torch.empty(0, dtype=torch.int64, device=event.stream.device or "cpu")

    @on(TaskStarted)
    def open(self, event: TaskStarted) -> None:
        """Begin with no classes."""
        self.new = self.old[:0].clone()
        if self.renew_optimizer:
            self.optimizer = self.make_optimizer(self.model.parameters())

    @on(SessionStarted)
    def let_in(self, event: SessionStarted) -> None:
        """Let the session's classes in, which a growing head has outputs for by now."""
        self.new = torch.cat([self.new, self.new.new_tensor(event.session.classes)]).unique()
        self.seen = torch.cat([self.old, self.new]).unique()

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        """Count the task's classes among the old ones."""
        self.old = self.seen

    def own_heads(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the outputs, with those that don't compete for a label silenced by -inf."""
        if self.heads is not None:
            return super().own_heads(outputs, y)
        return self.silenced(outputs, self.new if self.form == "masked_ce" else self.seen)

    def silenced(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the outputs, with all but those for some labels silenced; of no labels, as they are."""
        if self.form.startswith("softmax_all") or not len(labels):
            return outputs
        silent = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        silent[labels] = False
        return outputs.masked_fill(silent, float("-inf"))

    def sample_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return (n,), the classification loss of each of (n, classes) outputs."""
        if not self.form.startswith("bce"):
            return super().sample_losses(outputs, y)
        labels = self.new if self.form == "bce_local" else self.seen
        terms = binary(outputs[:, labels], one_hot(y, labels, outputs))
        return terms.sum(1) if self.bce_scale is None else self.bce_scale * terms.mean(1)

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean classification loss."""
        if not self.form.startswith("bce"):
            return super().loss(samples)
        return self.sample_losses(self.outputs(samples), samples.y).mean()

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes), -inf for classes that have not come."""
        scores = super().scores(x, task)
        return scores if self.heads is not None else self.silenced(scores, self.seen)

    @property
    def answers_once(self) -> bool:
        """Whether one answer of `scores` serves both questions, without and with the task given."""
        return type(self).scores is RehearsalFree.scores and type(self).predict is Strategy.predict


def one_hot(y: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """Return (n, labels): 1 where a sample has the label."""
    return (y[:, None] == labels).to(like.dtype)


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of each output, before its sigmoid, and its target from 0 to 1."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
