"""Updates of the weights: with gradients of several batches, and clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.bus import on
from clstream.events import BatchReady, EpochStarted


class Updates:
    """Takes the optimizer's steps in place of `Strategy.minimise`: see there.

    Args:
        clip: the greatest norm of the gradients of all weights together; those of a greater norm are scaled down to it (Pascanu,
            Mikolov, Bengio 2013). None: any.
        accumulate: batches whose mean gradient makes one step. The last batches of an epoch make one of their own if they are
            fewer.

    """

    def __init__(self, clip: float | None, accumulate: int) -> None:
        self.clip, self.accumulate = clip, accumulate
        self.batches = 0  # of the epoch
        self.number = 0  # of the batch that is learned, from 1
        self.waiting = 0  # batches whose gradients wait for a step

    @on(EpochStarted)
    def begin(self, event: EpochStarted) -> None:
        """Take down how many batches the epoch has."""
        self.batches = len(event.epoch)

    @on(BatchReady)
    def count(self, event: BatchReady) -> None:
        """Take down which batch is learned."""
        self.number = event.batch.index + 1

    def step(self, optimizer: Optimizer, loss: Tensor) -> None:
        """Add the gradients of a loss, and take the optimizer's step if it is due."""
        if not self.waiting:
            optimizer.zero_grad()
        loss.backward()
        self.update(optimizer)

    def add(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients that were computed already; those on a GPU may be overwritten by the next step."""
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                weight.grad = weight.grad if self.waiting else None
            elif self.waiting and weight.grad is not None:
                weight.grad = weight.grad + gradient
            else:
                weight.grad = gradient.clone() if gradient.is_cuda else gradient

    def update(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step on the gradients that are there, if it is due."""
        self.waiting += 1
        if self.number % self.accumulate and self.number < self.batches:
            return
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        if self.waiting > 1:
            torch._foreach_div_([weight.grad for weight in weights], float(self.waiting))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(weights, self.clip)
        optimizer.step()
        self.waiting = 0
