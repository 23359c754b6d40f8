"""L2 init: weights are held near what they were at first, so that a network goes on learning.

Kumar, Marklund, Van Roy 2023, "Maintaining Plasticity in Continual Learning via Regenerative Regularization". Form implemented:

    loss + strength * sum over the held weights of (w - w_0)^2        w_0 the weights before anything was learned

A sum, without 1/2, as the paper has it; in the authors' code with 1/2, and without the parameters of layer norms. Weights that the
loss no longer asks for go back to where they began, from where they could learn. The anchor stays: that of `L2` moves to the end of
each task. Rows that a growing head gets are held near their own first values. Any strategy takes it: `Regularised(Replay(model),
[L2InitPenalty(0.001)])`; alone it is `L2Init`. The right strength depends on the optimizer and the stream. Measured: see
`docs/plasticity.md`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import SessionStarted
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree


class L2InitPenalty(Quadratic):
    """Hold weights near what they were before anything was learned.

    Args:
        strength, parameters: see `Quadratic`.

    """

    def __init__(self, strength: float | dict[str, Any] = 1e-3, parameters: str | list[str] = "*") -> None:
        super().__init__(strength, parameters)

    @on(SessionStarted)
    def anchor_new(self, event: SessionStarted) -> None:
        """Anchor the initial weights, and the rows that a growing head just got."""
        for name, weight in self.weights.items():
            now, held = weight.detach(), self.anchor.get(name)
            if held is None:
                self.anchor[name] = now.clone()
            elif now.dim() and len(now) > len(held):
                self.anchor[name] = torch.cat([held, now[len(held) :]])


class L2Init(RehearsalFree):
    """Hold the weights near what they were before anything was learned.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 1e-3,
        parameters: str | list[str] = "*",
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(L2InitPenalty(strength, parameters))
