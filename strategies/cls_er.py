"""CLS-ER: replay, and two slow averages of the network, of which the better one on a past sample says what is to be answered.

Arani, Sarfraz, Zonooz 2022, "Learning Fast, Learning Slow: A General Continual Learning Method based on Complementary Learning
System". Form implemented, with f the network, p and s its plastic and its stable average, and t the steps so far:

    loss       CE(f) over the batch and the past samples drawn, + reg_weight * mean (f - z)^2 over outputs of those drawn
               z of a sample: the outputs of s if its softmax at the label is above that of p, else those of p; no gradient
    a step     with probability plastic_rate   p <- a p + (1 - a) f,   a = min(1 - 1 / (t + 1), plastic_alpha)
               with probability stable_rate    s <- a s + (1 - a) f,   a = min(1 - 1 / (t + 1), stable_alpha)
    answer     s (`answer="stable"`), as in the paper

A low rate makes an average slow. The defaults are those of the authors' code, whose scripts set them by the data set. Both averages
run in training mode in a step, as theirs do, so that batch norm has statistics of its own in each; parameters alone are averaged.
Past samples are drawn once for both terms, without repeats, as many as the batch has, and go through f twice, as in their code;
here they are augmented anew for each term, there once. Their script for Split MNIST with 500 samples has alphas of 0.99, rates of
0.9 and 1, and a weight of 2.

With several labels or values, which no softmax is at, the average with the lower loss on a sample is the better one, which for
labels is the same. Outputs that don't compete for a sample have no part in the mean. A batch is offered to the memory in each pass,
as in their code (`offer`).

Measured: the loop by hand ends in the same weights (`tests/test_cls_er.py`). Class-IL Split MNIST, 1 epoch, batch 32, SGD 0.03, Mlp
100-100, not tuned, 3 seeds: 0.355 ± 0.021. These are 1,878 steps, over which averages with alphas of 0.999 still hold much of how
they began: shorter streams need lower alphas. Tuned, with alphas of 0.99: 0.905, see `docs/results.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, RunStarted, SessionStarted
from clstream.memory import OFFERS, Reservoir, offered
from clstream.models import GrowingHead
from clstream.params import check_choice, check_integer, check_number
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Samples, Task


class CLSER(Strategy):
    """Learn each batch with samples of a memory, whose outputs are held near the better of two averages of the network.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples are drawn for each batch. None: as many as the batch holds.
        reg_weight: of the squared difference to the averages' outputs.
        stable_rate, plastic_rate: how often each average is renewed, a probability.
        stable_alpha, plastic_alpha: how much of each average stays when it is.
        answer: "stable", "plastic" or "network": which of the three answers.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.
        offer: "first_epoch" (a session is offered to the memory in the first pass over it) or "every_epoch" (in each).

    """

    learns_targets = TARGETS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        replay_batch: int | None = None,
        reg_weight: float = 0.1,
        stable_rate: float = 0.7,
        stable_alpha: float = 0.999,
        plastic_rate: float = 0.9,
        plastic_alpha: float = 0.999,
        answer: str = "stable",
        active_classes: str = "all",
        offer: str = "every_epoch",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, none=True, replay_batch=replay_batch)
        check_number(0, reg_weight=reg_weight)
        check_number(0, 1, stable_rate=stable_rate, stable_alpha=stable_alpha)
        check_number(0, 1, plastic_rate=plastic_rate, plastic_alpha=plastic_alpha)
        check_choice(("stable", "plastic", "network"), answer=answer)
        check_choice(OFFERS, offer=offer)
        self.memory, self.replay_batch, self.reg_weight = Reservoir(capacity), replay_batch, reg_weight
        self.stable_rate, self.stable_alpha = stable_rate, stable_alpha
        self.plastic_rate, self.plastic_alpha = plastic_rate, plastic_alpha
        self.answer, self.offer = answer, offer
        self.random = torch.Generator()
        self.start()

    def start(self) -> None:
        """Start both averages at the network as it is."""
        self.stable, self.plastic = (deepcopy(self.model).requires_grad_(False) for _ in range(2))
        self.steps = 0

    @on(RunStarted)
    def restart(self, event: RunStarted) -> None:
        """Start both averages at the network that the run starts with."""
        self.start()

    @on(SessionStarted)
    def grow_averages(self, event: SessionStarted) -> None:
        """Give the averages the rows that a growing head just got, as they are in the network."""
        for average in (self.stable, self.plastic):
            for mean, weight in zip(average.parameters(), self.model.parameters(), strict=True):
                if mean.shape != weight.shape:
                    mean.data = torch.cat([mean.data, weight.detach()[len(mean) :]])
            heads = (module for module in self.model.modules() if isinstance(module, GrowingHead))
            for own, head in zip((module for module in average.modules() if isinstance(module, GrowingHead)), heads, strict=True):
                own.labels, own.classes = head.labels.clone(), head.classes

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return one draw, if anything is kept."""
        return (self.memory.sample(self.replay_batch or len(samples), repeats=False),) if len(self.memory) else ()

    def loss(self, samples: Samples) -> Tensor:
        """Return the loss over the batch and the samples drawn for it, and what these differ by from the better average."""
        drawn = self.drawn_for(samples)
        if not drawn:
            return super().loss(samples)
        (past,) = drawn
        return self.consistency(past) + super().loss(samples + past)

    def consistency(self, past: Samples) -> Tensor:
        """Return the weighted mean squared difference of past samples' outputs to those of the average that is better on each."""
        x = past.x if self.augment is None else self.augment(past.x)
        task = past.extra.get("task")
        with torch.no_grad():
            stable, plastic = self.stable(x), self.plastic(x)
            stable_losses, plastic_losses = (self.sample_losses(outputs, past.y, task) for outputs in (stable, plastic))
            better = torch.where((stable_losses < plastic_losses)[:, None], stable, plastic)
            counted = self.mask_other_heads(better, past.y, task).isfinite()
        errors = torch.where(counted, self.model(x) - torch.where(counted, better, 0), 0).square()
        return self.reg_weight * errors.sum() / counted.sum().clamp(min=1)

    @on(BatchLearned)
    @torch.no_grad()
    def average(self, event: BatchLearned) -> None:
        """Offer the batch to the memory, and renew the averages, each as often as it is to be."""
        if offered(self.offer, event.batch.epoch):
            self.memory.add(event.batch.samples)
        self.steps += 1
        chance = torch.rand(2, generator=self.random).tolist()
        for average, rate, alpha, drawn in (
            (self.plastic, self.plastic_rate, self.plastic_alpha, chance[0]),
            (self.stable, self.stable_rate, self.stable_alpha, chance[1]),
        ):
            if drawn < rate:
                stays = min(1 - 1 / (self.steps + 1), alpha)
                means: list[Tensor] = [*average.parameters()]
                weights: list[Tensor] = [*self.model.parameters()]
                torch._foreach_lerp_(means, weights, 1 - stays)

    def answering(self) -> nn.Module:
        """Return the network that answers."""
        return {"stable": self.stable, "plastic": self.plastic, "network": self.model}[self.answer]

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return the outputs of the network that answers."""
        outputs: Tensor = self.answering()(x)
        return self.mask_answer(outputs)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether it answers as it does unless overridden: the same with and without the task given."""
        return type(self).scores is CLSER.scores and self.predicts_from_scores

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of the network that answers."""
        yield from (*self.answering().parameters(), *self.answering().buffers())
