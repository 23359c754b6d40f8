"""Riemannian walk (RWalk): weights are held near what they were, by a running Fisher and by what they did for the loss on the way.

Chaudhry, Dokania, Ajanthan, Torr 2018, "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence". Form
implemented, for each held weight w, with g the gradient of the batch's loss at a step's start and dw what the step did:

    F <- alpha g^2 + (1 - alpha) F                                   at each step; it runs on over tasks (EWC++)
    L <- L - g dw                                                    at each step
    s <- s + max(L, 0) / (1/2 F Dw^2 + damping),  then L <- 0        after each `interval` steps, Dw what these did
    S <- s after the first task, (S + s) / 2 after a later one,  then s <- 0
    loss + strength * sum of (F~ + S~) (w - anchor)^2                from the second task on, anchor the last task's weights

~ brings a quantity to 0 to 1: minus the least, by the range, over all held weights together. A window of steps that the task's end
cuts off counts for nothing. g is of the loss alone, without the penalty. Avalanche's g and F come from a pass of its own in
evaluation mode. No 1/2 in the penalty, as in the paper and the code.

Where paper, code and Avalanche differ, and what the options do:

                      paper's equations        authors' code (facebookresearch/agem)      Avalanche 0.6.0
F is renewed          fisher="step": each      fisher="window": each window, by the       each step
                      step                     sum of its squares since the task
                                               began / interval, after it was used
denominator           1/2 F Dw^2               F Dw^2, damping 1e-3                       1/2 F Dw^2, damping 1.2e-7
negative parts        put to 0, not where      clip="window": 0 in each window            clip="task": 0 in S
S at a task's end     (S + s) / 2              S + (S + s) / 2, where the paper's         (S + s) / 2
                                               average was meant, by its comment
0 to 1                                         as here                                    by the greatest alone
windows               of a task                of a task                                  counted on over tasks, begun anew

The paper's class-incremental results also learn samples of past tasks: `Regularised(Replay(model), [RWalkPenalty()])`. How these
are chosen there (by entropy, by distance from the boundary, by mean of features) is left out.

Measured: against Avalanche's plugin, the same weights (`tests/test_rwalk.py`).
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
from clstream.params import check_choice, check_integer, check_number, check_positive
from clstream.strategy import OptimizerFactory, Quadratic, RehearsalFree


class RWalkPenalty(Quadratic):
    """Hold weights near those of the last task, each by a running Fisher and a score of its way.

    Args:
        strength, parameters: see `Quadratic`.
        alpha: how much of the running Fisher is the newest, from 0 to 1.
        interval: the steps of a window, after which the score is renewed.
        damping: what is added to the length of a weight's way.
        fisher: "step" or "window": when the running Fisher is renewed.
        clip: "window" or "task": where what is below 0 is put to 0.

    """

    not_state = ("before",)

    def __init__(
        self,
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        alpha: float = 0.9,
        interval: int = 10,
        damping: float = 1e-3,
        fisher: str = "step",
        clip: str = "window",
    ) -> None:
        super().__init__(strength, parameters)
        check_number(0, 1, alpha=alpha)
        check_integer(1, interval=interval)
        check_positive(damping=damping)
        check_choice(("step", "window"), fisher=fisher)
        check_choice(("window", "task"), clip=clip)
        self.alpha, self.interval, self.damping, self.fisher, self.clip = alpha, interval, damping, fisher, clip
        self.before: list[Tensor] = []  # the weights before the step that is under way
        self.clear()

    def clear(self) -> None:
        """Start with nothing learned."""
        self.running: dict[str, Tensor] = {}  # F
        self.squares: dict[str, Tensor] = {}  # the sum of g^2 in the window
        self.path: dict[str, Tensor] = {}  # L
        self.start: dict[str, Tensor] = {}  # the weights at the window's start
        self.way_scores: dict[str, Tensor] = {}  # s
        self.scores: dict[str, Tensor] = {}  # S
        self.steps, self.all_steps = 0, 0  # in the window; in the run

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with nothing learned."""
        self.clear()

    @on(SessionStarted)
    def extend(self, event: SessionStarted) -> None:
        """Follow the weights from here on, also the rows that a growing head just got."""
        for name, weight in self.weights.items():
            now = weight.detach()
            for sums in (self.running, self.squares, self.path, self.way_scores):
                sums[name] = pad_rows(sums[name], now) if name in sums else torch.zeros_like(now)
            start = self.start.get(name, now[:0] if now.dim() else now)
            self.start[name] = torch.cat([start, now[len(start) :]]) if now.dim() else start.clone()

    @on(BatchReady)
    def note_weights(self, event: BatchReady) -> None:
        """Keep the weights that the step starts from."""
        self.before = [weight.detach().clone() for weight in self.weights.values()]

    @on(BatchLearned)
    @torch.no_grad()
    def follow(self, event: BatchLearned) -> None:
        """Take up the step in the running Fisher and in the path integral, and after some steps in the score."""
        newest = self.alpha if self.all_steps else 1.0
        for (name, weight), before in zip(self.weights.items(), self.before, strict=True):
            if weight.grad is None:  # nothing depends on it
                continue
            gradient = weight.grad
            if self.importance:
                gradient = gradient - pad_rows(self.penalty_gradient(name, before), gradient)
            self.path[name].addcmul_(gradient, weight - before, value=-1)
            if self.fisher == "step":
                self.running[name].lerp_(gradient.square(), newest)
            else:
                self.squares[name].addcmul_(gradient, gradient)
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        if self.steps == self.interval:
            self.close_window()

    @torch.no_grad()
    def close_window(self) -> None:
        """Add the window to the score, and start another."""
        for name, weight in self.weights.items():
            did = self.path[name].clamp(min=0) if self.clip == "window" else self.path[name]
            length = self.running[name] * (weight - self.start[name]).square() / 2
            self.way_scores[name].add_(did / (length + self.damping))
            if self.fisher == "window":
                self.running[name].lerp_(self.squares[name] / self.interval, self.alpha)
        self.start_window()

    def start_window(self) -> None:
        """Start a window where the weights are."""
        self.steps = 0
        for name, weight in self.weights.items():
            self.path[name].zero_()
            self.squares[name].zero_()
            self.start[name] = weight.detach().clone()

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Turn the running Fisher and the scores into importance."""
        self.set_anchor()
        for name, score in self.way_scores.items():
            self.scores[name] = (pad_rows(self.scores[name], score) + score) / 2 if name in self.scores else score.clone()
            score.zero_()
        scores = scaled({name: score.clamp(min=0) for name, score in self.scores.items()})
        self.importance = {name: fisher + scores[name] for name, fisher in scaled(self.running).items()}
        self.start_window()


class RWalk(RehearsalFree):
    """Hold the weights near those of the last task, each by a running Fisher and a score of its way.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        strength: of the penalty: a number, or one or a tensor for each held weight by its name.
        parameters: which weights are held: a pattern of their names in the model, or several.
        alpha: how much of the running Fisher is the newest, from 0 to 1.
        interval: the steps of a window, after which the score is renewed.
        damping: what is added to the length of a weight's way.
        fisher: "step" or "window": when the running Fisher is renewed.
        clip: "window" or "task": where what is below 0 is put to 0.
        form, bce_scale, bn_mode, renew_optimizer, active_classes: see `RehearsalFree`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        strength: float | dict[str, Any] = 1.0,
        parameters: str | list[str] = "*",
        alpha: float = 0.9,
        interval: int = 10,
        damping: float = 1e-3,
        fisher: str = "step",
        clip: str = "window",
        form: str = "softmax",
        bce_scale: float | None = 5.0,
        bn_mode: str = "train",
        renew_optimizer: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, form, bce_scale, bn_mode, renew_optimizer, active_classes)
        self.add_regularisers(RWalkPenalty(strength, parameters, alpha, interval, damping, fisher, clip))


def scaled(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values brought to 0 to 1 over all tensors together; all 0 if they are all alike."""
    least = torch.stack([value.amin() for value in values.values()]).amin()
    span = torch.stack([value.amax() for value in values.values()]).amax() - least
    return {name: (value - least) / torch.where(span > 0, span, 1) for name, value in values.items()}
