"""Learning without forgetting (LwF), PredKD: the old outputs for new samples are held near those of a frozen copy of the network.

Li & Hoiem 2016, "Learning without Forgetting"; in its form with sigmoids ("LwF.MC", Rebuffi et al. 2017) the PredKD of Smith, Tian,
Halbe, Hsu, Kira 2023, "A Closer Look at Rehearsal-Free Continual Learning". The teacher is the network as the last task left it, in
evaluation mode, asked about the same augmented inputs. With o and o' the outputs of network and teacher for old classes, B samples,
K_old old classes, K_new of this task, K both:

bce_kd        bce_scale * mean over B x K of BCE(sigmoid(o), u), u = sigmoid(o') for old classes, the one-hot label for new; default
bce_balanced  N K_new / K + O K_old / K: O the mean over B x K_old of BCE(sigmoid(o), sigmoid(o')); N that over B x C, C = K_new, of
              the new classes' BCE, weighing 1 / C where the target is 0, times 2 C / (1 + 1 / C). No bce_scale. The first task: N
softmax_kd    weight * cross-entropy + alpha * sum over the old heads of CE(softmax(o' / T), softmax(o / T)), no factor T^2; with
              `distil="seen"` the softmax of o is over K, and the teacher's answer for new classes is 0

What competes in the cross-entropy and in the answers of softmax_kd is `active_classes`. The forms of sigmoids fix it: old and new
classes in the loss, as written; classes that came in an answer. The forms without a teacher (`RehearsalFree`: softmax, bce) with
`active_classes="task"` are the rows of that paper without PredKD. In the first task bce_kd is bce over its classes, softmax_kd is
softmax. `alpha` and `weight` may be lists, a value for each task.

Paper and code: the paper's form, as summarised, is a cross-entropy of predictions, realised as LwF.MC. Research code of the same
group has bce_kd at scale 5 (2022), summed over classes (early 2022: `bce_scale=None`) or at 1 (later). Regularisers weigh against
it, so their strengths belong to a scale. Own choice: a class that is old and new (domain-IL, recurring tasks) counts in both parts,
and K is K_old + K_new. On a task-incremental stream each past task is a head of softmax_kd, and the sum is over them (Li & Hoiem).

Measured: see `docs/rehearsal-free.md`; against Avalanche's LwF: `docs/avalanche.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import RunStarted, TaskEnded
from clstream.params import check_number, check_positive
from clstream.regulariser import frozen
from clstream.rehearsal_free import FORMS, RehearsalFree, binary, one_hot
from clstream.strategy import OptimizerFactory, silenced
from clstream.stream import Samples


class LwF(RehearsalFree):
    """Hold the old outputs for new samples near those of the network as the last task left it.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        form: "bce_kd", "bce_balanced", "softmax_kd", or one of `RehearsalFree`, which have no teacher.
        alpha: weight of the distillation in forms of softmax; of a list each task takes one, and the last one goes on.
        weight: of the classification loss in forms of softmax; likewise.
        temperature: T of the forms of softmax.
        distil: "old" or "seen": the outputs that compete in the distillation of the forms of softmax.
        bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`. The forms of sigmoids fix which outputs compete.

    """

    fixed_classes = "forms of sigmoids: old and new in the loss, seen in an answer"
    forms = (*FORMS, "bce_kd", "bce_balanced", "softmax_kd")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        form: str = "bce_kd",
        alpha: float | list[float] = 1.0,
        weight: float | list[float] = 1.0,
        temperature: float = 2.0,
        distil: str = "old",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        check_positive(temperature=temperature)
        if distil not in ("old", "seen"):
            raise ValueError(f"distil must be old or seen, not {distil!r}")
        if [] in (alpha, weight):
            raise ValueError("alpha and weight must be a number from 0 up, or a list of some, not []")
        for value in alpha if isinstance(alpha, list) else [alpha]:
            check_number(0, alpha=value)
        for value in weight if isinstance(weight, list) else [weight]:
            check_number(0, weight=value)
        self.alpha, self.weight, self.temperature, self.distil = alpha, weight, temperature, distil
        self.teacher: nn.Module | None = None
        self.past: list[Tensor] = []  # the labels of each head that the teacher knows
        self.tasks = 0  # that are over

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Nothing was learned yet."""
        self.teacher, self.past, self.tasks = None, [], 0

    @on(TaskEnded)
    def freeze(self, event: TaskEnded) -> None:
        """Make the network as it is the teacher."""
        self.tasks += 1
        if self.form in FORMS:
            return
        self.teacher = frozen(self.model)
        if not self.task_given:
            self.past = [self.old_classes]
        elif not any(torch.equal(self.new_classes, labels) for labels in self.past):
            self.past = [*self.past, self.new_classes]

    def sample_losses(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n,), the classification loss by itself, without a teacher: in the forms of sigmoids of the new classes."""
        if self.form not in ("bce_kd", "bce_balanced"):
            return super().sample_losses(outputs, y, task)
        terms = binary(outputs[:, self.new_classes], one_hot(y, self.new_classes, outputs))
        return terms.sum(1) if self.bce_scale is None else self.bce_scale * terms.mean(1)

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss of the form."""
        if self.form in FORMS:
            return super().loss(samples)
        x = samples.x if self.augment is None else self.augment(samples.x)
        outputs = self.model(x)
        alike = self.form == "softmax_kd" and turn(self.alpha, self.tasks) == 0  # then the teacher has no say
        with torch.no_grad():
            before = None if self.teacher is None or alike else self.teacher(x)
        if self.form == "bce_kd":
            return self.distilled(outputs, before, samples.y)
        if self.form == "bce_balanced":
            return self.balanced(outputs, before, samples.y)
        own = self.own_heads(outputs, samples.y, samples.extra.get("task"))
        loss = turn(self.weight, self.tasks) * F.cross_entropy(own, samples.y)
        if before is not None:
            whole = self.distil == "seen" and not self.task_given
            kept = [softened(outputs, before, each, self.known_classes if whole else each, self.temperature) for each in self.past]
            loss = loss + turn(self.alpha, self.tasks) * torch.stack(kept).sum()
        return loss

    def mask_answer(self, outputs: Tensor) -> Tensor:
        """Return the outputs for a question; in the forms of sigmoids of classes that came alone."""
        if self.form in ("bce_kd", "bce_balanced") and not self.task_given:
            return silenced(outputs, self.seen_classes)
        return super().mask_answer(outputs)

    def distilled(self, outputs: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
        """Return form bce_kd."""
        terms = binary(outputs[:, self.new_classes], one_hot(y, self.new_classes, outputs))
        if before is not None:
            terms = torch.cat([binary(outputs[:, self.old_classes], before[:, self.old_classes].sigmoid()), terms], 1)
        return terms.sum(1).mean() if self.bce_scale is None else self.bce_scale * terms.mean()

    def balanced(self, outputs: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
        """Return form bce_balanced."""
        new, targets = len(self.new_classes), one_hot(y, self.new_classes, outputs)
        weights = targets + (1 - targets) / new
        loss = (weights * binary(outputs[:, self.new_classes], targets)).mean() * (2 * new / (1 + 1 / new))
        if before is None:
            return loss
        old = len(self.old_classes)
        kept = binary(outputs[:, self.old_classes], before[:, self.old_classes].sigmoid()).mean()
        return loss * (new / (new + old)) + kept * (old / (new + old))


def softened(outputs: Tensor, before: Tensor, labels: Tensor, competing: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of softened outputs with a teacher's for some labels: the mean over samples."""
    targets = (before[:, labels] / temperature).softmax(1)
    whole = (outputs[:, competing] / temperature).logsumexp(1, keepdim=True)
    return (targets * (whole - outputs[:, labels] / temperature)).sum(1).mean()


def turn(values: float | list[float], number: int) -> float:
    """Return a task's value of some, or of one for all."""
    return values[min(number, len(values) - 1)] if isinstance(values, list) else values
