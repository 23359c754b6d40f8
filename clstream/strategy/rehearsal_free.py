"""Learning without past samples: what L2, EWC, SI, LwF and LwFMC share. A loss, batch norm, optimizers by task."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted, TaskEnded, TaskStarted
from clstream.models import GrowingHead
from clstream.params import check_bool, check_choice, check_positive
from clstream.strategy.regulariser import frozen
from clstream.strategy.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Samples

FORMS = ("softmax", "bce")

BN_MODES = ("train", "eval")


class RehearsalFree(Strategy):
    """Learn each task with a loss of one of two forms; nothing of its samples is kept when it is over.

    Forms, over the outputs that compete (`active_classes`):

    softmax  cross-entropy; with multi-label targets or values the loss of that kind, as in `clstream.losses`
    bce      binary cross-entropy of each against the one-hot label, or multi-label targets, their mean times `bce_scale`; on a
             task-incremental stream too; with values squared errors in place of these

    With all defaults and no penalty it is `Finetune`, bit for bit.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        form: of the classification loss, "softmax" or "bce".
        bce_scale: of binary cross-entropies, of their mean over outputs; the mean of squared errors is as it is. None: their sum.
        bn_mode: "train" (batch norm as in any training), or "eval": its statistics stay as they are, in training too. That is for a
            pre-trained start, as Smith et al. 2023 have it: a new network's are 0 and 1, and with these it hardly learns.
        renew_optimizer: whether each task has an optimizer of its own.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    rehearsal_free = True
    learns_targets = TARGETS
    forms: tuple[str, ...] = FORMS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_choice(self.forms, form=form)
        check_choice(BN_MODES, bn_mode=bn_mode)
        check_positive(none=True, bce_scale=bce_scale)
        check_bool(renew_optimizer=renew_optimizer)
        self.form, self.bce_scale, self.bn_mode = form, bce_scale, bn_mode
        self.renew_optimizer, self.make_optimizer = renew_optimizer, optimizer
        self.grows = False  # whether the head does
        self.old_classes = torch.empty(0, dtype=torch.int64)  # labels that came in tasks that are over
        self.seen_classes = self.task_classes = self.old_classes

    @on(RunStarted)
    def freeze_batch_norm(self, event: RunStarted) -> None:
        """With `bn_mode="eval"`, put batch norm in evaluation mode for good."""
        if self.bn_mode == "eval":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        self.grows = any(isinstance(module, GrowingHead) for module in self.model.modules())
        self.track_classes(event.stream.device or "cpu")
        self.old_classes = self.known_classes

    @property
    def known_classes(self) -> Tensor:
        """Labels that came so far."""
        assert self.seen_classes is not None
        return self.seen_classes

    @property
    def new_classes(self) -> Tensor:
        """Labels that came in the task that goes on."""
        assert self.task_classes is not None
        return self.task_classes

    @on(TaskStarted)
    def open(self, event: TaskStarted) -> None:
        """Start a task: none of its classes has come yet, and with `renew_optimizer` the optimizer is new."""
        self.task_classes = self.new_classes[:0]
        if self.renew_optimizer:
            self.optimizer = self.make_optimizer(self.model.parameters())

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        """Count the task's classes among the old ones."""
        self.old_classes = self.known_classes

    def sample_losses(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n,), the classification loss of each of (n, classes) outputs."""
        if self.form != "bce":
            return super().sample_losses(outputs, y, task)
        if self.active_classes == "all" and not self.grows:  # a growing head has -inf for classes that did not come
            labels = torch.arange(y.shape[1] if y.dim() == 2 else outputs.shape[1], device=outputs.device)
        else:
            labels = self.new_classes if self.active_classes == "task" else self.known_classes
        return self.scaled_mean(self.errors(outputs[:, labels], one_hot(y, labels, outputs)))

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each output by itself: its binary cross-entropy, or for values its squared error."""
        return (outputs - targets).square() if self.target == "value" else binary_cross_entropy(outputs, targets)

    def scaled_mean(self, errors: Tensor) -> Tensor:
        """Return (n,), the losses of samples from (n, outputs) errors, as `bce_scale` has it; 0 where nothing competes."""
        return errors.sum(1) if self.mean_scale is None or not errors.shape[1] else self.mean_scale * errors.mean(1)

    @property
    def mean_scale(self) -> float | None:
        """What the mean over outputs is multiplied by; None: it is the sum."""
        return 1.0 if self.target == "value" and self.bce_scale is not None else self.bce_scale

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean classification loss."""
        if self.form != "bce":
            return super().loss(samples)
        return self.sample_losses(self.outputs(samples), samples.y).mean()


class Distilling(RehearsalFree):
    """A `RehearsalFree` with a teacher, for LwF and LwFMC: the network as the last task left it, in evaluation mode.

    Args:
        model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`. Its own forms have no
            teacher.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        form: str,
        bce_scale: float | None,
        bn_mode: str,
        renew_optimizer: bool,
        active_classes: str,
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.teacher: nn.Module | None = None
        self.past: list[Tensor] = []  # the labels of each head that the teacher knows
        self.tasks = 0  # that are over

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Forget the teacher: nothing was learned yet."""
        self.teacher, self.past, self.tasks = None, [], 0

    @on(TaskEnded)
    def freeze(self, event: TaskEnded) -> None:
        """Make the network as it is the teacher, if the form has one."""
        self.tasks += 1
        if self.form in FORMS:
            return
        self.teacher = frozen(self.model)
        if not self.task_given:
            self.past = [self.old_classes]
        elif not any(torch.equal(self.new_classes, labels) for labels in self.past):
            self.past = [*self.past, self.new_classes]


def one_hot(y: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """Return (n, labels): 1 where a sample has the label; of multi-label targets and values, their columns of these numbers."""
    return (y[:, labels] if y.dim() == 2 else y[:, None] == labels).to(like.dtype)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of each output, before its sigmoid, and its target from 0 to 1."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
