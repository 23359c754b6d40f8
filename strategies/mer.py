"""MER: meta-experience replay, steps on single samples of now and of the past, of which the weights follow only a part of the way.

Riemer, Cases, Ajemian, Liu, Rish, Tu, Tesauro 2019, "Learning to Learn without Forgetting by Maximizing Transfer and Minimizing
Interference" (ICLR), algorithm 1, in the form of the authors' code. Reptile, which moves toward where some steps of SGD end, lines
up the gradients of the samples of these. For each example that comes, with w the weights:

    a <- w
    `batches` times:  b <- w;  a step of SGD on the example, then on each of `replay_batch` samples of the memory, one by one;
                      w <- b + beta (w - b)                                                 (Reptile within a batch)
    w <- a + gamma (w - a)                                                                  (Reptile across batches)
    the example is offered to the memory, a reservoir

The others of its algorithms are options, in both of which their gamma is `beta`: 6 is `batches=1, place="last"`, and 7 `batches=1,
place="random", current_factor=...`, the factor of the example's loss (their s there, which is not the s of algorithm 1). The
defaults are those of the authors' script for algorithm 1 with a memory of 500 on rotated MNIST (lr 0.1, beta 0.01, gamma 1, ten
batches of an example and ten past samples). It needs no task boundaries. Augmented samples are augmented afresh at each step;
momentum runs on across all of these steps.

examples="single"  each sample of the stream's batch is an example of its own, in its order: the paper's, whose batches are of 1
examples="batch"   all of it is one example: a step on each of its samples, one by one (as Avalanche's)
steps="batch"      one step on the example and the past samples together, in place of one on each (as Mammoth's, whose batches are
                   of 1, and which has both Reptile updates)

A sample is drawn once for a batch; the authors' code draws each by itself. Theirs keeps the n-th example with probability capacity
/ (n + 1), here capacity / n; and in algorithm 7 it stores the very first example without learning it. Only parameters take part in
Reptile: theirs averages buffers too. Networks whose batch norm can't learn a single sample need `steps="batch"`. With several
epochs (the paper has one) a session is offered in its first pass only.

Avalanche's, read: examples are batches, the memory takes in an experience when it is over, so that none of its own samples are
replayed. With the same draws it ends in the same weights as this (`tests/test_mer.py`).

Measured: `clstream parity` (class-IL Split MNIST, 2,000 samples a task, batches of 10 as examples, one batch of each, beta 0.3):
0.903 ± 0.008 over 5 seeds, Avalanche's 0.901 ± 0.012 (p = 0.71). By the defaults an example costs batches * (1 + replay_batch) =
110 steps, one after the other; with `steps="batch"` it costs `batches`. Class-IL Split MNIST, the first 1,000 samples of each task,
batches of 32, Mlp 100-100, algorithm 6 with the authors' options for 500 samples (`batches=1, place="last", beta=0.03`): 0.876 with
one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.measures.flops import same_flops
from clstream.memory import OFFERS, Reservoir, offered
from clstream.params import check_choice, check_integer, check_number
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Batch, Samples


class MER(Strategy):
    """Take steps on single samples of now and of the past, and follow them a part of the way.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples are learned with an example in each of its batches, at most all (the paper's k - 1).
        batches: how many batches there are of each example (the paper's s).
        beta: how far the weights follow the steps of a batch: 1 is all the way.
        gamma: how far they follow all batches of an example: 1 is all the way.
        examples: "single" (each sample of a batch of the stream) or "batch" (all of it).
        steps: "single" (a step on each sample) or "batch" (one step on all together).
        place: of the example among the samples of a batch: "first", "last" or "random".
        current_factor: the loss of the example is multiplied by it; needs `steps="single"`.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.
        offer: "first_epoch" (a session is offered to the memory in the first pass over it) or "every_epoch" (in each).

    """

    takes_controls = ("schedule", "patience", "renew_optimizer")
    learns_targets = TARGETS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        replay_batch: int = 10,
        batches: int = 10,
        beta: float = 0.01,
        gamma: float = 1.0,
        examples: str = "single",
        steps: str = "single",
        place: str = "first",
        current_factor: float = 1.0,
        active_classes: str = "all",
        offer: str = "first_epoch",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, replay_batch=replay_batch, batches=batches)
        check_number(0, beta=beta, gamma=gamma, current_factor=current_factor)
        check_choice(("single", "batch"), examples=examples)
        check_choice(("single", "batch"), steps=steps)
        check_choice(("first", "last", "random"), place=place)
        check_choice(OFFERS, offer=offer)
        if steps == "batch" and current_factor != 1:
            raise ValueError(f"current_factor={current_factor} is of a step on the example alone: take steps='single'")
        self.memory, self.replay_batch, self.batches = Reservoir(capacity), replay_batch, batches
        self.beta, self.gamma, self.examples, self.steps = beta, gamma, examples, steps
        self.place, self.current_factor, self.offer = place, current_factor, offer

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return the past samples of one batch of an example, if anything is kept."""
        return (self.memory.sample(self.replay_batch, repeats=False),) if len(self.memory) else ()

    def learn(self, batch: Batch) -> Tensor:
        """Learn the examples of a batch one after the other, and offer each to the memory; return their mean loss."""
        examples = [batch.samples] if self.examples == "batch" else singles(batch.samples)
        losses = []
        for example in examples:
            losses.append(self.learn_example(example))
            self.offer_example(example, batch.epoch)
        return torch.stack(losses).mean()

    def learn_example(self, example: Samples) -> Tensor:
        """Take the steps of all batches of an example, and both Reptile updates; return its mean loss at its steps."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        start, losses = copies(weights, self.gamma), []
        for _ in range(self.batches):
            before = copies(weights, self.beta)
            drawn = self.draw(example)
            with same_flops((len(example), *map(len, drawn))):
                losses += self.learn_together(example, drawn) if self.steps == "batch" else self.learn_singly(example, drawn)
            follow(weights, before, self.beta)
        follow(weights, start, self.gamma)
        return torch.stack(losses).mean()

    def learn_together(self, example: Samples, drawn: tuple[Samples, ...]) -> list[Tensor]:
        """Take one step on an example and past samples, and return their loss."""
        for past in drawn:
            example = example + past
        loss = self.objective(example)
        self.minimise(loss)
        return [loss.detach()]

    def learn_singly(self, example: Samples, drawn: tuple[Samples, ...]) -> list[Tensor]:
        """Take a step on each sample of an example and of the past, and return the losses of the example's, without the factor."""
        past = [sample for samples in drawn for sample in singles(samples)]
        current = singles(example)
        order = [*current, *past] if self.place == "first" else [*past, *current]
        own = set(map(id, current))
        if self.place == "random":
            order = [order[i] for i in torch.randperm(len(order), generator=self.memory.random).tolist()]
        losses = []
        for sample in order:
            loss = self.objective(sample)
            if id(sample) in own:
                losses.append(loss.detach())
                loss = self.current_factor * loss
            self.minimise(loss)
        return losses

    def offer_example(self, example: Samples, epoch: int) -> None:
        """Offer an example to the memory, in the passes that are offered."""
        if offered(self.offer, epoch):
            self.memory.add(example)


def singles(samples: Samples) -> list[Samples]:
    """Return samples one by one."""
    return [samples[row : row + 1] for row in range(len(samples))]


def copies(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return copies of weights, to follow later steps by a share from there; none where all of these are followed."""
    return [] if share == 1 else [weight.detach().clone() for weight in weights]


@torch.no_grad()
def follow(weights: list[nn.Parameter], before: list[Tensor], share: float) -> None:
    """Move weights, in place, to where a share of the way from before to here ends."""
    if share != 1:
        ends: list[Tensor] = [*weights]
        torch._foreach_copy_(ends, torch._foreach_lerp(before, ends, share))
