"""GEM: a step may not raise the loss on the samples of any past task, to first order.

Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning". Form implemented: g is the gradient of the batch's
loss, the rows of G those of the mean loss over the whole memory of each past task. If G g has a number below 0, the step takes in
place of g the vector nearest to it whose products with all rows are not below 0, by the dual of that quadratic program, of as many
numbers as there are past tasks:

    v = argmin 1/2 v' (G G' + ridge I) v + (G g)' v    subject to v >= margin,        g <- g + G' v

A margin above 0 takes more of the past's gradients than is needed, which favours backward transfer (gamma in the paper; 0.5 in the
authors' scripts). It applies where something is below 0, as in their code. `ridge` is 1e-3 in the authors' code since 2018, in Hsu
et al.'s and in Avalanche; 0 is the paper's equation, and their first release. Where gradients are small, its share in G G' is not:
then less is taken off than the constraints ask for.

With u = v - margin the program is least squares under u >= 0, |A u - b|^2 with A'A = G G' + ridge I, which scipy solves exactly
(`nnls`, an active-set method, as that of quadprog is). The products of G with itself and with g are all that leaves the device: a
step after the first task waits for them.

memory="ring" keeps the newest `per_task` samples of each task, as paper and code do; "reservoir" a uniform sample. They are offered
in the first pass over a session. It needs task boundaries. A task that comes again adds to its own memory, which is no constraint
while it is learned. g and G are taken over all parameters that have a gradient g, together.

Measured: against Avalanche's GEM, where nothing is random, the same weights (`tests/test_gem.py`). Class-IL Split MNIST, 1 epoch,
batch 32, 250 a task, SGD 0.03, Mlp 100-100, not tuned, 3 seeds, mean and standard deviation: 0.885 ± 0.012.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, TaskStarted
from clstream.measures.flops import same_flops
from clstream.memory import Memory, Reservoir, Ring
from clstream.params import check_choice, check_integer, check_number
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import TARGETS, Batch

Numbers = npt.NDArray[np.float64]


class GEM(Strategy):
    """Project gradients so that they don't point against that of any past task.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        per_task: how many samples of each task are kept.
        margin: the least share of a past task's gradient that is added where gradients are projected.
        ridge: what is added to the diagonal of the quadratic program.
        memory: "ring" (the newest samples) or "reservoir" (a uniform sample).
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = ("schedule", "patience", "class_weights", "renew_optimizer")
    learns_targets = TARGETS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        per_task: int = 256,
        margin: float = 0.5,
        ridge: float = 1e-3,
        memory: str = "ring",
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, per_task=per_task)
        check_number(0, margin=margin, ridge=ridge)
        check_choice(("ring", "reservoir"), memory=memory)
        self.per_task, self.margin, self.ridge, self.memory = per_task, margin, ridge, memory
        self.kept: dict[int, Memory] = {}  # by task
        self.task = -1  # that goes on

    def learn(self, batch: Batch) -> Tensor:
        """Take one step along the projected gradient."""
        loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        past = [memory for task, memory in self.kept.items() if task != self.task and len(memory)]
        if past:
            self.project(past)
        self.optimizer.step()
        return loss.detach()

    def project(self, past: list[Memory]) -> None:
        """Change the gradients so that, to first order, a step doesn't raise the loss on any of some memories."""
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        gradient = flat([weight.grad for weight in weights if weight.grad is not None])
        rows = []
        for memory in past:
            with same_flops(len(memory)):
                rows.append(flat(torch.autograd.grad(self.loss(memory.all()), weights, materialize_grads=True)))
        references = torch.stack(rows)
        products = (references @ torch.cat([references, gradient[None]]).T).double().cpu().numpy()
        if (products[:, -1] >= 0).all():
            return
        multipliers = solve_dual(products[:, :-1], products[:, -1], self.margin, self.ridge)
        with same_flops(("project", len(past))):
            change = torch.from_numpy(multipliers).to(references) @ references
        parts = change.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            assert weight.grad is not None
            weight.grad += part.view_as(weight)

    @on(TaskStarted)
    def open(self, event: TaskStarted) -> None:
        """Start the memory of the task, or go on with the one that it has."""
        self.task = event.task.id
        if self.task not in self.kept:
            self.kept[self.task] = Ring(self.per_task) if self.memory == "ring" else Reservoir(self.per_task)

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory of the task, in the first pass."""
        if event.batch.epoch == 0:
            self.kept[self.task].add(event.batch.samples)


def solve_dual(gram: Numbers, products: Numbers, margin: float = 0.0, ridge: float = 0.0) -> Numbers:
    """Return the (t,) minimiser v of 1/2 v' (gram + ridge I) v + products' v subject to v >= margin.

    Args:
        gram: (t, t), the products of the past tasks' gradients with each other.
        products: (t,), those with the gradient that is projected.
        margin, ridge: not below 0.

    """
    from scipy.optimize import nnls

    sizes, axes = np.linalg.eigh((gram + gram.T) / 2 + ridge * np.eye(len(gram)))
    roots = np.sqrt(sizes.clip(min=0))
    slope = axes.T @ (products + margin * (gram.sum(1) + ridge))
    flat_axes = roots <= 1e-7 * roots.max(initial=0)  # along these nothing changes: gradients that depend on each other
    factor = np.where(flat_axes, 0, 1 / np.where(flat_axes, 1, roots))
    solution: Numbers = nnls(roots[:, None] * axes.T, -factor * slope)[0]
    return solution + margin


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return tensors flattened and joined to one row."""
    return torch.cat([tensor.flatten() for tensor in tensors])
