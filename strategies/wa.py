"""WA (weight aligning): old outputs are distilled, then the head's rows for new classes are scaled to the length of the old ones.

Zhao, Xiao, Gan, Zhang, Xia 2020, "Maintaining Discrimination and Fairness in Class Incremental Learning". Form implemented, with n
old classes, m new ones (those of the session that goes on), o the network's outputs and o' those of a frozen copy from before it:

loss       lambda L_KD + (1 - lambda) L_CE, lambda = n / (n + m), over the session's samples and all exemplars
           L_CE = CE(softmax(o over old and new), y)
           L_KD = CE(softmax(o' / T), softmax(o / T)), both over the old classes, T = 2, no factor T^2
aligning   when a session ends, w <- gamma w for the rows w of the new classes in the head's weights,
           gamma = (mean of |w| over old rows) / (mean of |w| over new rows)
           Biases stay as they are. The aligned network answers, and is the teacher in the next session
exemplars  by herding, as in iCaRL (`clstream.strategy.exemplars`), K / (n + m) of each class, chosen after aligning
answer     the highest output of the classes that came

`clip_weights` holds the head's weights at 0 or above after each step: the paper's restriction, for features that are never
negative, so that longer rows mean higher outputs. Distillation leaves a shift of all old outputs alone, and aligning sees lengths:
without the restriction new classes may win by what old rows have lost, at equal lengths. DER-ClassIL's code for WA has it, without
biases; PyCIL's and a fork of FACIL's leave it out, or off.

Conflicts: the paper's body could not be read, so the form is that of these codes, which agree in aligning. The loss is as PyCIL's
and the fork have it; PyCIL's older code minimised L_CE + 2 L_KD. Both leave biases alone.

Deviations: K / (n + m) is rounded down. A class that comes again is new again. What an optimizer keeps of the rows, such as
momenta, is not scaled; the codes make a new one for each session (the training control `renew_optimizer`).

Measured: see the end of `docs/replay.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, SessionEnded
from clstream.losses import distillation
from clstream.models.heads import CosineHead, GrowingHead, output_layer
from clstream.params import check_bool, check_positive
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import mask_logits
from clstream.strategy.exemplars import Rehearsal
from clstream.stream import Samples


class WA(Rehearsal):
    """Learn beside exemplars with distillation, then align the head's weights.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits by a linear head, with `features`: the same to (n, features).
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most exemplars of all classes together; at least as many as there are classes.
        temperature: T, which outputs are divided by before the softmax of distillation.
        clip_weights: whether the head's weights are held at 0 or above.

    Raises:
        TypeError: for a model without a linear head; a cosine head is none.

    """

    takes_controls = ("schedule", "clip", "accumulate", "patience", "renew_optimizer")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 2000,
        temperature: float = 2.0,
        clip_weights: bool = True,
    ) -> None:
        super().__init__(model, optimizer, capacity)
        check_positive(temperature=temperature)
        check_bool(clip_weights=clip_weights)
        self.temperature, self.clip_weights = temperature, clip_weights
        try:
            linear = not isinstance(self.head, CosineHead)  # to which the length of its rows means nothing
        except ValueError:
            linear = False
        if not linear:
            raise TypeError(f"WA scales the rows of a linear head, and {type(model).__name__} has none")

    @property
    def head(self) -> nn.Module:
        """The layer that has the outputs."""
        growing = [module for module in self.model.modules() if isinstance(module, GrowingHead)]
        return growing[-1] if growing else self.model.get_submodule(output_layer(self.model))

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy, and from the second session on the distillation."""
        x, y = self.joined(samples)
        outputs = self.model(x)
        loss = F.cross_entropy(mask_logits(outputs, self.competing), y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            before = self.teacher(x)
        kept = len(self.old_classes) / len(self.competing)
        return kept * distillation(outputs, before, self.old_classes, self.temperature) + (1 - kept) * loss

    @on(BatchLearned)
    @torch.no_grad()
    def clip(self, event: BatchLearned) -> None:
        """Hold the head's weights at 0 or above, if that is asked for."""
        if self.clip_weights:
            self.head.weight.clamp_(min=0)  # type: ignore[operator]  # a linear layer's

    @on(SessionEnded)
    def close(self, event: SessionEnded) -> None:
        """Align the head, then choose exemplars."""
        if len(self.old_classes):
            align(self.head, self.old_classes, self.new_classes)
        super().close(event)


@torch.no_grad()
def align(head: nn.Module, old: Tensor, new: Tensor) -> None:
    """Scale a head's rows for new labels, so that their mean length is that of the rows for old ones; where all are 0 they stay."""
    weight: nn.Parameter = head.weight  # type: ignore[assignment]  # a linear layer's
    lengths = weight.norm(dim=1)
    old, new = (rows_of_labels(head, labels) for labels in (old, new))
    before, now = lengths[old].mean(), lengths[new].mean()
    weight[new] *= torch.where(now > 0, before / now, 1.0)  # gamma


def rows_of_labels(head: nn.Module, labels: Tensor) -> Tensor:
    """Return the rows that a head has for labels: (k,), int64."""
    return (labels[:, None] == head.labels).int().argmax(1) if isinstance(head, GrowingHead) else labels
