"""Synaptic intelligence (SI): weights are held near what they were, the more they did for the loss along the way.

Zenke, Poole, Ganguli 2017, "Continual Learning Through Synaptic Intelligence". Form implemented: while a task is learned, each step
adds to each held weight's path integral, and the task's end turns it into importance:

    omega <- omega - g dw                            g the gradient of the loss at the step's start, dw what the step did
    Omega <- Omega + omega / (Dw^2 + damping)        Dw what the task did; then omega <- 0
    loss + strength * sum of Omega (w - anchor)^2    anchor the weights at the last task's end; from the second task on

No 1/2, as in the paper. Two things are read differently in codes, and are options: whether g is of the loss alone
(`gradient="loss"`: Hsu et al. 2018) or of all that the step minimises, SI's own penalty too ("objective": Avalanche); and whether
Omega is cut off above (`most`: Avalanche does so at 0.001, after Maltoni & Lomonaco 2018, and halves its penalty). Omega can be
negative where noise led uphill; it is left so, as in these codes. Penalties of other regularisers count as loss.

Hsu et al.'s strengths on Split MNIST are 300 / 3000 / 600 (task- / domain- / class-IL), damping 0.1.

Measured: see `docs/rehearsal-free.md`; against Avalanche's SI: `docs/avalanche.md`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, BatchReady, RunStarted, SessionStarted, TaskEnded
from clstream.models.heads import pad_rows
from clstream.params import check_choice, check_positive
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree


class SIPenalty(Quadratic):
    """Hold weights near those of the last task, each by what it did for the loss.

    Args:
        strength, parameters: see `Quadratic`.
        damping: what is added to the square of a weight's way.
        gradient: "loss" or "objective": of what the path integral is.
        most: the greatest importance that a weight can have. None: any.

    """

    not_state = ("before",)

    def __init__(
        self,
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        damping: float = 0.1,
        gradient: str = "loss",
        most: float | None = None,
    ) -> None:
        super().__init__(strength, parameters)
        check_positive(damping=damping)
        check_positive(none=True, most=most)
        check_choice(("loss", "objective"), gradient=gradient)
        self.damping, self.gradient, self.most = damping, gradient, most
        self.path: dict[str, Tensor] = {}  # omega
        self.start: dict[str, Tensor] = {}  # the weights at the task's start
        self.uncut: dict[str, Tensor] = {}  # Omega before it is cut off
        self.before: list[Tensor] = []  # the weights before the step that is under way

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with no path integrals: nothing was learned yet."""
        self.path, self.start, self.uncut = {}, {}, {}

    @on(SessionStarted)
    def extend(self, event: SessionStarted) -> None:
        """Follow the weights from here on, also the rows that a growing head just got."""
        for name, weight in self.weights.items():
            now = weight.detach()
            self.path[name] = pad_rows(self.path[name], now) if name in self.path else torch.zeros_like(now)
            start = self.start.get(name, now[:0] if now.dim() else now)
            self.start[name] = torch.cat([start, now[len(start) :]]) if now.dim() else start.clone()

    @on(BatchReady)
    def note_weights(self, event: BatchReady) -> None:
        """Keep the weights that the step starts from."""
        self.before = [weight.detach().clone() for weight in self.weights.values()]

    @on(BatchLearned)
    @torch.no_grad()
    def integrate(self, event: BatchLearned) -> None:
        """Add what the step did to the path integrals."""
        for (name, weight), before in zip(self.weights.items(), self.before, strict=True):
            if weight.grad is None:  # nothing depends on it
                continue
            gradient = weight.grad
            if self.gradient == "loss" and self.importance:
                gradient = gradient - pad_rows(self.penalty_gradient(name, before), gradient)
            self.path[name].addcmul_(gradient, weight - before, value=-1)

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Turn the path integrals into importance."""
        self.set_anchor()
        for name, path in self.path.items():
            new = path / ((self.anchor[name] - self.start[name]).square() + self.damping)
            self.uncut[name] = new + pad_rows(self.uncut[name], new) if name in self.uncut else new
            self.importance[name] = self.uncut[name] if self.most is None else self.uncut[name].clamp(max=self.most)
            self.start[name] = self.anchor[name]
            self.path[name] = torch.zeros_like(path)


class SI(RehearsalFree):
    """Hold the weights near those of the last task, each by what it did for the loss.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        damping: what is added to the square of a weight's way.
        gradient: "loss" or "objective": of what the path integral is.
        most: the greatest importance that a weight can have. None: any.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        damping: float = 0.1,
        gradient: str = "loss",
        most: float | None = None,
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(SIPenalty(strength, parameters, damping, gradient, most))
