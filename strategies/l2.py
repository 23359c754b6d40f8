"""L2: weights are held near what they were, all of them alike.

The baseline of Kirkpatrick et al. 2017 and Hsu et al. 2018; Smith, Tian, Halbe, Hsu, Kira 2023, "A Closer Look at Rehearsal-Free
Continual Learning". Form implemented:

    loss + strength * sum over the held weights of (w - anchor)^2

The anchor is single: the weights at the end of the last task. A sum, not a mean, and no 1/2, as in both codes, so the right
strength depends on the number of weights. What the papers do differently is options:

                  Smith et al. (research code of their group)    Hsu et al. (their code)
from_start        True: the first task has the initial anchor    False: held from the second task on
parameters        the feature extractor: "stages.*"              "*", the head too
strength          0.05                                           0.01 / 0.5 / 100 (task- / domain- / class-IL Split MNIST)
form              BCE, alone or with distillation (`LwFMC`)      softmax
active_classes    "task", or as `LwFMC` has it                   "seen"
bn_mode           "eval" (pre-trained, or not)                   no batch norm
renew_optimizer   True                                           False

With pre-trained weights the first anchor is these. `parameters="*.attn.qkv.*"` holds queries, keys and values of a ViT of timm's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import SessionStarted, TaskEnded
from clstream.params import check_bool
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree


class L2Penalty(Quadratic):
    """Hold weights near those at the end of the last task.

    Args:
        strength, parameters: see `Quadratic`.
        from_start: whether the first task's anchor is the initial weights; if not, it has none.

    """

    def __init__(self, strength: float | dict[str, Any] = 0.05, parameters: str | list[str] = "*", from_start: bool = True) -> None:
        super().__init__(strength, parameters)
        check_bool(from_start=from_start)
        self.from_start = from_start

    @on(SessionStarted)
    def anchor_start(self, event: SessionStarted) -> None:
        """Anchor the initial weights, once a growing head has its first rows."""
        if self.from_start and not self.anchor:
            self.set_anchor()

    @on(TaskEnded)
    def anchor_end(self, event: TaskEnded) -> None:
        """Anchor the weights where the task left them."""
        self.set_anchor()


class L2(RehearsalFree):
    """Hold the weights near those of the last task.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        from_start: whether the first task's anchor is the initial weights; if not, it has none.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 0.05,
        parameters: str | list[str] = "*",
        from_start: bool = True,
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(L2Penalty(strength, parameters, from_start))
