"""A-GEM: a step may not raise the loss on samples of past tasks, to first order.

Chaudhry, Ranzato, Rohrbach, Elhoseiny 2019, "Efficient Lifelong Learning with A-GEM". Form implemented: g is the gradient of the
batch's loss, r that of the mean loss over samples drawn from the memory of past tasks. If g . r < 0, the step takes
g - (g . r / r . r) r in place of g, so that it no longer points against r. Each task leaves a uniform sample of `per_task` of its
samples, taken in when it ends: it needs task boundaries, as in the paper. A task that comes again adds to its own sample, and what
it left before is part of its past. g and r are taken over all parameters that have a gradient g, together.

`AGEMR` (A-GEM-R in Mammoth's code; Buzzega et al. 2020, "Dark Experience for General Continual Learning", compare with it) does the
same without boundaries: the past is a uniform sample of all that came, the task that goes on included, which takes in each batch
after its step. Mammoth draws as many samples as a batch has, and doesn't augment them; with several passes it takes in
each of them (`offer`).

Measured (class-IL Split MNIST, 1 epoch, batch 10, 250 a task, 60 drawn, SGD 0.03, Mlp 100-100): accuracy 0.405 ± 0.017 over 5
seeds, Avalanche's A-GEM 0.377 ± 0.025 (p = 0.08); see `docs/avalanche.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, TaskEnded, TaskStarted
from clstream.measures.flops import same_flops
from clstream.memory import OFFERS, Reservoir, offered
from clstream.params import check_choice, check_integer
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Batch, Samples


class AGEM(Strategy):
    """Project gradients so that they don't point against that of past tasks.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        per_task: how many samples of each task are kept.
        sample: how many kept samples the reference gradient is taken on, at most.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = ("schedule", "patience", "class_weights", "renew_optimizer")
    learns_targets = TARGETS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        per_task: int = 250,
        sample: int = 256,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, per_task=per_task, sample=sample)
        self.per_task, self.sample = per_task, sample
        self.kept: dict[int, Reservoir] = {}  # by task
        self.past: Samples | None = None  # what the memories held when the last task ended
        self.random = torch.Generator()

    def learn(self, batch: Batch) -> Tensor:
        """Take one step along the projected gradient."""
        loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        if self.past is not None:
            self.project(self.past)
        self.optimizer.step()
        return loss.detach()

    def project(self, past: Samples) -> None:
        """Change the gradients so that, to first order, a step doesn't raise the loss on samples drawn from the past."""
        rows = torch.randperm(len(past), generator=self.random)[: self.sample].to(past.y.device)
        project(self, past[rows])

    @on(TaskStarted)
    def open(self, event: TaskStarted) -> None:
        """Start the memory of the task, or go on with the one that it has."""
        self.current = self.kept.setdefault(event.task.id, Reservoir(self.per_task))

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory of the task, in the first pass."""
        if event.batch.epoch == 0:
            self.current.add(event.batch.samples)

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        """Join what the memories hold: this is the past until the next task ends."""
        first, *others = (kept.all() for kept in self.kept.values())
        self.past = first[torch.arange(len(first), device=first.y.device)]  # a copy: the memory goes on changing
        for other in others:
            self.past = self.past + other


class AGEMR(Strategy):
    """Project gradients so that they don't point against that of a uniform sample of all that came.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        sample: how many kept samples the reference gradient is taken on, at most.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.
        offer: "first_epoch" (a session is offered to the memory in the first pass over it) or "every_epoch" (in each).

    """

    takes_controls = ("schedule", "patience", "class_weights", "renew_optimizer")
    learns_targets = TARGETS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        sample: int = 256,
        active_classes: str = "all",
        offer: str = "first_epoch",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, sample=sample)
        check_choice(OFFERS, offer=offer)
        self.memory, self.sample, self.offer = Reservoir(capacity), sample, offer

    def learn(self, batch: Batch) -> Tensor:
        """Take one step along the projected gradient."""
        loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        if len(self.memory):
            drawn = self.memory.sample(self.sample, repeats=False)
            with same_flops(len(drawn)):
                project(self, drawn)
        self.optimizer.step()
        return loss.detach()

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory."""
        if offered(self.offer, event.batch.epoch):
            self.memory.add(event.batch.samples)


def project(strategy: Strategy, drawn: Samples) -> None:
    """Change the gradients of a strategy's model so that, to first order, a step doesn't raise its loss on some samples."""
    weights = [weight for weight in strategy.model.parameters() if weight.grad is not None]
    reference = flat(torch.autograd.grad(strategy.loss(drawn), weights, materialize_grads=True))
    gradient = flat([weight.grad for weight in weights if weight.grad is not None])
    against = (gradient @ reference / (reference @ reference).clamp_min(torch.finfo(gradient.dtype).tiny)).clamp_max(0)
    parts = (against * reference).split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        assert weight.grad is not None
        weight.grad -= part.view_as(weight)


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return tensors flattened and joined to one row."""
    return torch.cat([tensor.flatten() for tensor in tensors])
