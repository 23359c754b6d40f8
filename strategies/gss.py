"""GSS-greedy: replay from a memory of samples whose gradients point in different directions.

Aljundi, Lin, Goujaud, Bengio 2019, "Gradient based Sample Selection for Online Continual Learning" (NeurIPS), algorithm 2, in the
form of the authors' code. For a batch, `iterations` times: a step on it, and a step on as many kept samples, drawn without repeats.
Then, with the network as it is now and in evaluation mode, G_1 ... G_n are the gradients of the mean losses of `gradients` subsets
of the memory, each of the size of a batch and all disjoint, and c(g) = max over i of cos(g, G_i) tells how near g is to them:

memory not full   each sample of the batch is kept, as far as there is room, with its score C = c(its gradient); the first batch has
                  no one to be near to, and gets 0.1
memory full       if c(the batch's gradient) < `cosine_below`, the batch may enter: as many kept samples are drawn, no one twice, in
                  proportion to (C - least) / (greatest - least + 0.01), so rather those that are like others; each meets one of
                  the batch, and is replaced by it with probability (C + 1) / ((C + 1) + (c + 1)), c the score of that sample

It needs no task boundaries. The paper's algorithm and the code differ: there a sample is scored against gradients of single kept
samples, enters if its own c is below 0, not its batch's, and is drawn in proportion to C + 1. The other variant of the paper,
integer programming (GSS-IQP), is left out. With several epochs (the paper has one) a session is offered in its first pass only.

Avalanche's plugin selects at the forward pass, before the step, in every epoch, and out of minibatches that hold samples of the
memory too: a sample may be kept several times, and what enters is judged together with what is there already. Its memory is
replayed from the second experience on, in one step with the batch.

The gradients of all subsets are taken at once, and those of the samples of a batch too (`torch.func.vmap`), never one by one. They
are those of all parameters that require one. Whether a batch may enter is looked at first: most don't, and need no gradients of
their single samples.

Measured (class-IL Split MNIST with the first 1,000 samples of each task, batch 10, 3 iterations, memory 300, SGD 0.05, Mlp 100-100,
the authors' script): accuracy 0.824 ± 0.011 over 3 seeds; published 0.82, as ContinualAI's continual-learning-baselines quotes it,
whose own run gives 0.78.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import SGD

from clstream.measures.flops import same_flops
from clstream.memory import Memory
from clstream.params import check_integer, check_number
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Samples

FIRST = 0.1
"""The score of the first samples, which no others are there to be compared with."""


class ScoredMemory(Memory):
    """Samples with scores from -1 to 1: of two that are alike, the one with the higher score goes first.

    Args:
        capacity: the most samples that are kept, at least 1.

    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.scores = torch.zeros(capacity, dtype=torch.float64)

    def fill(self, samples: Samples, scores: Tensor) -> None:
        """Keep samples with their (n,) scores; they are at most as many as there is room for."""
        self._prepare(samples)
        slots, rows = torch.arange(self.size, self.size + len(samples)), torch.arange(len(samples))
        self._write(samples, slots.numpy(), rows.numpy())
        self.scores[slots] = scores.double()
        self.size += len(samples)

    def exchange(self, samples: Samples, scores: Tensor) -> None:
        """Let samples with (n,) scores meet as many kept ones, each of which is replaced by chance; the memory is full."""
        self._prepare(samples)
        kept, n = self.scores, min(len(samples), self.capacity)
        weights = (kept - kept.min()) / (kept.max() - kept.min() + 0.01)
        slots = torch.multinomial(weights.clamp_min(1e-12), n, generator=self.random)  # all of them 0 couldn't be drawn
        old, new = kept[slots] + 1, scores[:n].double() + 1
        rows = (torch.rand(n, generator=self.random, dtype=torch.float64) * (old + new) < old).nonzero().flatten()
        self._write(samples, slots[rows].numpy(), rows.numpy())
        kept[slots[rows]] = new[rows] - 1


class GSS(Strategy):
    """Replay kept samples, which are chosen so that their gradients differ.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits; `torch.func.vmap` must be able to follow it.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples a step of replay learns, at most all. None: as many as the batch holds.
        iterations: how often a batch, and a draw, are learned.
        gradients: of how many subsets of the memory gradients are compared with those of new samples, at most all disjoint ones.
        cosine_below: the cosine below which the gradient of a batch must be for it to enter a full memory.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = ("schedule", "patience", "class_weights", "renew_optimizer")
    learns_targets = ("label",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.05),
        capacity: int = 300,
        replay_batch: int | None = None,
        iterations: int = 1,
        gradients: int = 10,
        cosine_below: float = 0.0,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, none=True, replay_batch=replay_batch)
        check_integer(1, iterations=iterations, gradients=gradients)
        check_number(-1, 1, cosine_below=cosine_below)
        self.memory = ScoredMemory(capacity)
        self.replay_batch, self.iterations, self.gradients, self.cosine_below = replay_batch, iterations, gradients, cosine_below

    def learn(self, batch: Batch) -> Tensor:
        """Take the steps on a batch and on what is drawn beside it, then offer it to the memory."""
        samples = batch.samples
        draws = self.draw(samples)
        for iteration in range(self.iterations):
            loss = self.objective(samples)
            self.step(loss)
            if draws:
                drawn = draws[iteration % len(draws)]
                with same_flops(("drawn", len(drawn))):
                    self.step(self.objective(drawn))
        if batch.epoch == 0:
            modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()
            self.offer(samples)
            for module, training in modes:
                module.training = training
        return loss.detach()

    def step(self, loss: Tensor) -> None:
        """Take one step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return a draw for each iteration, all disjoint, as far as the memory goes; none if nothing is kept."""
        if not len(self.memory):
            return ()
        size = self.replay_batch or len(samples)
        drawn = self.memory.sample(size * self.iterations, repeats=False)
        return tuple(drawn[start : start + size] for start in range(0, len(drawn), size))

    def offer(self, samples: Samples) -> None:
        """Keep samples of a batch, if there is room or their gradients are unlike those of the memory."""
        memory = self.memory
        room = memory.capacity - len(memory)
        if not len(memory):
            memory.fill(samples[:room], torch.full((min(room, len(samples)),), FIRST))
            return
        order = torch.randperm(len(memory), generator=memory.random)
        references = self.references(order, len(samples))
        if room:
            memory.fill(samples[:room], self.similarities(samples[:room], references).cpu())
        elif float(self.batch_similarity(samples, references)) < self.cosine_below:
            memory.exchange(samples, self.similarities(samples, references).cpu())

    def references(self, order: Tensor, size: int) -> Tensor:
        """Return (subsets, parameters): unit gradients of the mean losses of subsets of `size` kept samples, in a given order."""
        subsets = order[: self.gradients * size].split(size)
        rows = nn.utils.rnn.pad_sequence(list(subsets), batch_first=True)
        counted = torch.arange(rows.shape[1]) < torch.tensor([[len(subset)] for subset in subsets])
        kept = self.memory.all()
        device = kept.y.device
        with same_flops(("references", tuple(rows.shape))):
            return self.unit_gradients(kept[rows.flatten().to(device)], counted.to(device))

    def similarities(self, samples: Samples, references: Tensor) -> Tensor:
        """Return (n,): the greatest cosine of each sample's gradient with one of the references."""
        with same_flops(("similarities", len(samples), len(references))):
            own = self.unit_gradients(samples, torch.ones(len(samples), 1, dtype=torch.bool, device=samples.y.device))
            return (own @ references.T).amax(1)

    def batch_similarity(self, samples: Samples, references: Tensor) -> Tensor:
        """Return the greatest cosine of the gradient of the mean loss of a batch with one of the references: a scalar."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        with same_flops(("batch", len(samples), len(references))):
            losses = self.sample_losses(self.model(samples.x), samples.y, samples.extra.get("task"))
            slopes = torch.autograd.grad(losses.mean(), weights, materialize_grads=True)
            return (references @ F.normalize(torch.cat([slope.flatten() for slope in slopes]), dim=0)).amax()

    def unit_gradients(self, samples: Samples, counted: Tensor) -> Tensor:
        """Return (groups, parameters): the gradient of the mean loss of each group of samples, divided by its length.

        Args:
            samples: group after group, each of the same number.
            counted: (groups, samples of a group), bool: which samples of each are part of its mean.

        """
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        groups, size = counted.shape
        x, y = (rows.view(groups, size, *rows.shape[1:]) for rows in (samples.x, samples.y))
        tasks = samples.extra["task"].view(groups, size) if "task" in samples.extra else None

        def mean_loss(free: dict[str, Tensor], x: Tensor, y: Tensor, task: Tensor | None, counted: Tensor) -> Tensor:
            losses = self.sample_losses(functional_call(self.model, free, (x,)), y, task)
            return torch.where(counted, losses, 0).sum() / counted.sum()

        dims = (None, 0, 0, None if tasks is None else 0, 0)
        slopes = vmap(grad(mean_loss), dims, randomness="different")(
            {name: weight.detach() for name, weight in weights.items()}, x, y, tasks, counted
        )
        return F.normalize(torch.cat([slope.flatten(1) for slope in slopes.values()], 1), dim=1)
