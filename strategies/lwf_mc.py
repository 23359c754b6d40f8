"""LwF.MC, PredKD: the sigmoids of old outputs for new samples are held near those of a frozen copy of the network.

Rebuffi, Kolesnikov, Sperl, Lampert 2017, "iCaRL: Incremental Classifier and Representation Learning", which has it as the form of
Li & Hoiem's LwF for one head with all classes; the PredKD of Smith, Tian, Halbe, Hsu, Kira 2023, "A Closer Look at Rehearsal-Free
Continual Learning". The teacher is the network as the last task left it, in evaluation mode, asked about the same augmented inputs.
With o and o' the outputs of network and teacher for old classes, B samples, K_old old classes, K_new of this task, K both:

bce_kd        bce_scale * mean over B x K of BCE(sigmoid(o), u), u = sigmoid(o') for old classes, the one-hot label for new; default
bce_balanced  N K_new / K + O K_old / K: O the mean over B x K_old of BCE(sigmoid(o), sigmoid(o')); N that over B x C, C = K_new, of
              the new classes' BCE, weighing 1 / C where the target is 0, times 2 C / (1 + 1 / C). No bce_scale. The first task: N

Both fix what competes: old and new classes in the loss, as written; classes that came in an answer. In the first task bce_kd is bce
over its classes. The form without a teacher (`RehearsalFree`: bce) with `active_classes="task"` is the paper's row without PredKD.

Paper and code: the paper's form, as summarised, is a cross-entropy of predictions, realised as LwF.MC. Research code of the same
group has bce_kd at scale 5 (2022), summed over classes (early 2022: `bce_scale=None`) or at 1 (later). Regularisers weigh against
it, so their strengths belong to a scale. Own choice: a class that is old and new (domain-IL, recurring tasks) counts in both parts,
and K is K_old + K_new. Rebuffi et al. write sums over samples and classes; their weight decay and schedule are the user's choice.

Our own extension: multi-label targets stand in place of the one-hot label. With values all outputs are new, and from the
second task on old too; squared errors, which bce_scale leaves as they are, stand in place of BCE, the teacher's outputs are
taken without a sigmoid, and bce_balanced, whose weights go by the zeros among the targets, is refused.

Measured: see `docs/rehearsal-free.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import mask_logits
from clstream.strategy.rehearsal_free import FORMS, Distilling, binary_cross_entropy, one_hot
from clstream.stream import Samples


class LwFMC(Distilling):
    """Hold the sigmoids of old outputs for new samples near those of the network as the last task left it.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        form: "bce_kd", "bce_balanced", or "bce", which has no teacher.
        bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`. Forms with a teacher fix which outputs compete.

    """

    fixed_classes = "forms with a teacher: old and new in the loss, seen in an answer"
    forms = ("bce_kd", "bce_balanced", "bce")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        form: str = "bce_kd",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)

    @on(RunStarted)
    def check_form(self, event: RunStarted) -> None:
        """Refuse the form that values don't have, before anything is learned."""
        if self.form == "bce_balanced" and "value" in getattr(event.stream, "targets", (event.stream.target,)):
            raise ValueError(
                f"form='bce_balanced' of {type(self).__name__} weighs labels that are absent, and {event.stream.name} has values: "
                "take form='bce_kd'"
            )

    def sample_losses(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n,), the classification loss by itself, without a teacher: in forms with one that of the new classes."""
        if self.form in FORMS:
            return super().sample_losses(outputs, y, task)
        return self.scaled_mean(self.errors(outputs[:, self.new_classes], one_hot(y, self.new_classes, outputs)))

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss of the form."""
        if self.form in FORMS:
            return super().loss(samples)
        x = samples.x if self.augment is None else self.augment(samples.x)
        outputs = self.model(x)
        with torch.no_grad():
            before = None if self.teacher is None else self.teacher(x)
        return (self.bce_kd_loss if self.form == "bce_kd" else self.bce_balanced_loss)(outputs, before, samples.y)

    def mask_answer(self, outputs: Tensor) -> Tensor:
        """Return the outputs for a question; in forms with a teacher, only classes that came compete."""
        if self.form not in FORMS and not self.task_given:
            return mask_logits(outputs, self.seen_classes)
        return super().mask_answer(outputs)

    def bce_kd_loss(self, outputs: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
        """Return form bce_kd."""
        terms = self.errors(outputs[:, self.new_classes], one_hot(y, self.new_classes, outputs))
        if before is not None:
            kept = before[:, self.old_classes]
            kept = kept if self.target == "value" else kept.sigmoid()
            terms = torch.cat([self.errors(outputs[:, self.old_classes], kept), terms], 1)
        if not terms.shape[1]:  # multi-label, and no sample so far had a positive
            return terms.sum()
        return terms.sum(1).mean() if self.mean_scale is None else self.mean_scale * terms.mean()

    def bce_balanced_loss(self, outputs: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
        """Return form bce_balanced."""
        new, targets = len(self.new_classes), one_hot(y, self.new_classes, outputs)
        weights = targets + (1 - targets) / new
        loss = (weights * binary_cross_entropy(outputs[:, self.new_classes], targets)).mean() * (2 * new / (1 + 1 / new))
        if before is None:
            return loss
        old = len(self.old_classes)
        kept = binary_cross_entropy(outputs[:, self.old_classes], before[:, self.old_classes].sigmoid()).mean()
        return loss * (new / (new + old)) + kept * (old / (new + old))
