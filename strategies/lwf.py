"""Learning without forgetting (LwF): the old outputs for new samples are held near those of a frozen copy of the network.

Li & Hoiem 2016, "Learning without Forgetting". Form implemented, with o and o' the outputs of network and teacher:

    weight * cross-entropy + alpha * sum over the old heads of CE(softmax(o' / T), softmax(o / T))

The teacher is the network as the last task left it, in evaluation mode, asked about the same augmented inputs. T = 2 and alpha = 1
as in the paper, without a factor T^2. In the first task it is the cross-entropy. `alpha` and `weight` may be lists, a value for
each task. With `distil="seen"` the softmax of o is over all classes that came, and the teacher's answer for new ones is 0.

On a task-incremental stream each past task is a head, as in the paper, and the sum is over them. On a class-incremental one
there is one head, where the paper has none: all old classes are one softmax in the distillation. What competes in the
cross-entropy and in answers is `active_classes`.

Deviations: the paper first trains the new head alone ("warm-up"), and has weight decay; here all is trained from the first step,
and decay is the optimizer's business. It writes the distillation as the cross-entropy of probabilities raised to 1 / T: the same.

The form with sigmoids, often called LwF too, is `LwFMC`. Measured: see `docs/rehearsal-free.md`; against Avalanche's LwF:
`docs/avalanche.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.losses import distillation
from clstream.params import check_choice, check_number, check_positive
from clstream.strategy import OptimizerFactory
from clstream.strategy.rehearsal_free import Distilling
from clstream.stream import Samples


class LwF(Distilling):
    """Hold the old outputs for new samples near those of the network as the last task left it.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        alpha: weight of the distillation; of a list each task takes one, and the last one goes on.
        weight: of the classification loss; likewise.
        temperature: T, by which outputs are divided before the softmax of the distillation.
        distil: "old" or "seen": the outputs that compete in the distillation.
        bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    forms = ("softmax_kd",)
    learns_targets: tuple[str, ...] = ("label",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        alpha: float | list[float] = 1.0,
        weight: float | list[float] = 1.0,
        temperature: float = 2.0,
        distil: str = "old",
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, "softmax_kd", None, bn_mode, renew_optimizer, active_classes)
        check_positive(temperature=temperature)
        check_choice(("old", "seen"), distil=distil)
        if [] in (alpha, weight):
            raise ValueError("alpha and weight must be a number from 0 up, or a list of some, not []")
        for value in alpha if isinstance(alpha, list) else [alpha]:
            check_number(0, alpha=value)
        for value in weight if isinstance(weight, list) else [weight]:
            check_number(0, weight=value)
        self.alpha, self.weight, self.temperature, self.distil = alpha, weight, temperature, distil

    def loss(self, samples: Samples) -> Tensor:
        """Return the sum of both terms: cross-entropy and distillation."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        outputs = self.model(x)
        with torch.no_grad():  # with alpha 0 the teacher is not asked
            before = None if self.teacher is None or value_for(self.alpha, self.tasks) == 0 else self.teacher(x)
        own = self.mask_other_heads(outputs, samples.y, samples.extra.get("task"))
        loss = value_for(self.weight, self.tasks) * F.cross_entropy(own, samples.y)
        if before is not None:
            whole = self.distil == "seen" and not self.task_given
            losses = []
            for head in self.past:
                competing = self.known_classes if whole else head
                losses.append(distillation(outputs, before, head, self.temperature, competing))
            loss = loss + value_for(self.alpha, self.tasks) * torch.stack(losses).sum()
        return loss


def value_for(values: float | list[float], number: int) -> float:
    """Return the value for a task: of a list the task's own, or the last one; else the one for all."""
    return values[min(number, len(values) - 1)] if isinstance(values, list) else values
