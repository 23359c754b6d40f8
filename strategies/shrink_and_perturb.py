"""Shrink and perturb: weights are made smaller, and get some noise, when new data come, so that a network goes on learning.

Ash, Adams 2020, "On Warm-Starting Neural Network Training" (NeurIPS), for any strategy: `ShrinkAndPerturb(Finetune(model))`. Form
implemented, for every parameter that requires a gradient, when a session starts that is not the first one:

    w <- shrink w + perturb e        e normal (`noise="normal"`), or drawn as the weight was at first (`noise="initial"`)

`when="step"` does it after each step, as Dohare et al. 2024 have it in online learning: weight decay and noise in each step; then
`shrink` is near 1, say 1 - lr * weight decay. An initial draw is uniform, with the spread of the first weights of each tensor: it
may have been drawn by any rule; constants, as biases of 0 and scales of 1 of a norm, get none. The optimizer goes on with what it
knows; `Training(renew_optimizer="session")` makes a new one.

The paper has shrink 0.6 and perturb 0.01 in its figures, as recalled, and trains to the end on all data so far; here the strategy
has what it has. In the authors' code (JordanAsh/warm_start: 0.4 and 0.1 by default) e is the weights of a newly initialised
network, constants too, and optimizer and running statistics are new: `noise="initial"` is near to it. Measured: see
`docs/plasticity.md`.
"""

from __future__ import annotations

import torch

from clstream.bus import on
from clstream.events import BatchLearned, RunStarted, SessionStarted
from clstream.models.heads import GrowingHead
from clstream.params import check_choice, check_number
from clstream.strategy import Strategy, Wrapper


class ShrinkAndPerturb(Wrapper):
    """Shrink the weights and add noise where new data come, while the wrapped strategy learns.

    Args:
        base: the strategy.
        shrink: what the weights are multiplied by.
        perturb: what the noise is multiplied by.
        noise: "normal" (standard deviation 1) or "initial" (the spread of each tensor's first numbers).
        when: "session" (before each one but the first) or "step" (after each).

    """

    def __init__(
        self, base: Strategy, shrink: float = 0.6, perturb: float = 0.01, noise: str = "normal", when: str = "session"
    ) -> None:
        super().__init__(base)
        check_number(0, 1, shrink=shrink)
        check_number(0, perturb=perturb)
        check_choice(("normal", "initial"), noise=noise)
        check_choice(("session", "step"), when=when)
        self.shrink, self.perturb, self.noise, self.when = shrink, perturb, noise, when
        self.bounds: dict[str, float] = {}  # of initial numbers, by the name of the parameter
        self.random = torch.Generator()
        self.sessions = 0

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Start with the first session, and with a generator on the device of the weights."""
        self.bounds, self.sessions = {}, 0
        self.random = torch.Generator(event.stream.device or "cpu")

    @on(SessionStarted)
    def open(self, event: SessionStarted) -> None:
        """Take down how the first weights spread; with "session", move those of later ones."""
        if self.noise == "initial":
            heads = [head for head in self.model.modules() if isinstance(head, GrowingHead)]
            drawn = {id(weight): 1 / head.in_features**0.5 for head in heads for weight in head.parameters()}
            for name, weight in self.model.named_parameters():
                if name not in self.bounds:
                    spread = 3**0.5 * float(weight.detach().std(correction=0)) if weight.numel() else 0.0
                    self.bounds[name] = drawn.get(id(weight), spread)
        self.sessions += 1
        if self.when == "session" and self.sessions > 1:
            self.move()

    @on(BatchLearned)
    def go_on(self, event: BatchLearned) -> None:
        """With "step", move the weights."""
        if self.when == "step":
            self.move()

    @torch.no_grad()
    def move(self) -> None:
        """Shrink the weights, and add noise."""
        for name, weight in self.model.named_parameters():
            if not weight.requires_grad:
                continue
            weight.mul_(self.shrink)
            if not self.perturb:
                continue
            if self.noise == "normal":
                drawn = torch.randn(weight.shape, generator=self.random, device=weight.device)
            else:
                drawn = self.bounds[name] * (2 * torch.rand(weight.shape, generator=self.random, device=weight.device) - 1)
            weight.add_(drawn, alpha=self.perturb)
