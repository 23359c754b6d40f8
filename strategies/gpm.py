"""GPM: steps keep out of the subspaces that past inputs of each layer span.

Saha, Garg, Roy 2021, "Gradient Projection Memory for Continual Learning". Form implemented, for each linear layer and convolution
that is held, with R the (inputs, samples) matrix of what went into it, of a convolution a column for each patch:

    a step     G <- G - (G M) M'             G the gradient of its (outputs, inputs) matrix, M its basis: orthonormal columns
    task end   R^ = R - M M' R               what the basis does not span yet; its left singular vectors, the largest first, join M,
               until |M M' R|^2 >= e |R|^2   as few as reach it; e = threshold + threshold_step (number of the task)

R is of `samples` samples drawn from the task, in evaluation mode. A gradient of a layer lies in the span of its inputs, so what the
layer answers to old inputs stays as it is, up to the share 1 - e. All other parameters that are held (biases, scales and shifts of
norms) learn in the first task alone, as norms do in the authors' code, whose layers have no biases. Running statistics of batch
norm go on in later tasks, and old answers with them; the authors' batch norm keeps none. Steps of plain SGD without weight decay,
or with momentum, stay in the complement of M; those of Adam don't, for they scale each number by itself. Each task has an optimizer
of its own, as in the code, so that no momentum of the last one is left.

On a task-incremental stream the authors' networks have a head for each task, which is free: `parameters="stages.*"` does that here,
as the outputs of other tasks have no gradient. Thresholds in the code: 0.95 for the first layer and 0.99 for others (permuted
MNIST), 0.97 with a step of 0.003 (CIFAR-100); here there is one for all layers. Its samples are 300 (permuted MNIST), and from 24
to 125 by layer (CIFAR-100), without augmentation; R here is of augmented ones, if the stream augments.

Conflict: after the first task the authors' code takes one vector less than the paper's criterion; later on both are the same. Here
it is the paper's. Where a task has several sessions, R R' is summed over them, each at the weights where it ended, with as many
samples of each; the vectors are those of its eigenvectors, which are R's singular vectors.

Measured: steps and bases by hand (`tests/test_gradient_projection.py`). Split MNIST, 1 epoch, batch 32, SGD 0.03, Mlp 100-100, not
tuned, 3 seeds, mean and standard deviation: class-IL 0.756 ± 0.005; task-IL with `parameters="stages.*"` 0.951 ± 0.005.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionEnded, TaskEnded, TaskStarted
from clstream.params import check_bool, check_integer, check_number
from clstream.seeds import random_state_kept
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.layer_inputs import input_rows, inputs_of, layers_by_name, matrix_layers, other_parameters
from clstream.stream import TARGETS, Batch

TOGETHER = 64
"""Samples that are asked about together: patches of images take room."""


class GPM(Strategy):
    """Project gradients out of the span of past inputs, layer by layer.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        threshold: how much of the squares of a task's inputs the basis of a layer spans at least.
        threshold_step: what is added to it from task to task; it is never above 1.
        samples: of each session, that the inputs are taken of.
        parameters: which are held: a pattern of their names in the model, or several.
        renew_optimizer: whether each task has an optimizer of its own.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = ("schedule", "patience", "class_weights")
    learns_targets = TARGETS
    rehearsal_free = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        threshold: float = 0.97,
        threshold_step: float = 0.003,
        samples: int = 300,
        parameters: str | list[str] = "*",
        renew_optimizer: bool = True,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_number(0, 1, threshold=threshold, threshold_step=threshold_step)
        check_integer(1, samples=samples)
        check_bool(renew_optimizer=renew_optimizer)
        self.threshold, self.threshold_step, self.samples, self.parameters = threshold, threshold_step, samples, parameters
        self.renew_optimizer, self.make_optimizer = renew_optimizer, optimizer
        layers = matrix_layers(model, parameters)
        self.layers, self.others = [*layers], other_parameters(model, parameters, layers, biases=False)
        self.random = torch.Generator()
        self.clear()

    def clear(self) -> None:
        """Start with no bases."""
        self.bases: dict[str, Tensor] = {}  # M, (inputs, vectors), by layer
        self.squares: dict[str, Tensor] = {}  # R R' of the task that goes on, float64
        self.tasks = 0  # that are over

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with no bases: nothing was learned yet."""
        self.clear()

    @on(TaskStarted)
    def renew(self, event: TaskStarted) -> None:
        """Make the optimizer anew, if each task has its own."""
        if self.renew_optimizer and self.tasks:
            self.optimizer = self.make_optimizer(self.model.parameters())

    def learn(self, batch: Batch) -> Tensor:
        """Take one step along the projected gradient."""
        loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        if self.tasks:
            self.project()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def project(self) -> None:
        """Take out of the gradients what lies in the bases, and all of those of other parameters that are held."""
        for name, basis in self.bases.items():
            slope = self.model.get_parameter(f"{name}.weight" if name else "weight").grad
            if slope is not None:
                slope -= (slope.flatten(1) @ basis @ basis.T).view_as(slope)
        for name in self.others:
            slope = self.model.get_parameter(name).grad
            if slope is not None:
                slope.zero_()

    @on(SessionEnded)
    def take_inputs(self, event: SessionEnded) -> None:
        """Add up the products of what goes into the layers, over samples of the session."""
        session = event.session.samples
        layers = layers_by_name(self.model, self.layers)
        chosen = torch.randperm(len(session), generator=self.random)[: self.samples]
        with evaluating(self), random_state_kept(next(self.model.parameters()).device), inputs_of(layers) as noted:
            for rows in chosen.split(TOGETHER):
                self.outputs(session[rows.to(session[:1].y.device)])
                for name, layer in layers.items():
                    for given in noted[name]:
                        inputs = input_rows(layer, given).double()
                        self.squares[name] = inputs.T @ inputs + self.squares.get(name, 0.0)
                    noted[name].clear()

    @on(TaskEnded)
    def extend(self, event: TaskEnded) -> None:
        """Extend the bases to what this task's inputs span."""
        share = min(1.0, self.threshold + self.threshold_step * self.tasks)
        for name, squares in self.squares.items():
            old = self.bases.get(name, squares.new_zeros(len(squares), 0).float())
            self.bases[name] = extended(old, squares, share)
        self.squares = {}
        self.tasks += 1


def extended(basis: Tensor, squares: Tensor, share: float) -> Tensor:
    """Return a basis with the fewest vectors more that make it span a share of some inputs.

    Args:
        basis: (d, k), orthonormal columns.
        squares: (d, d), R R' of the inputs R, float64.
        share: of the sum of squares of all inputs, from 0 to 1.

    """
    old = basis.to(squares)
    beside = torch.eye(len(old), dtype=old.dtype, device=old.device) - old @ old.T
    left = beside @ squares @ beside
    sizes, vectors = torch.linalg.eigh((left + left.T) / 2)
    sizes, vectors = sizes.flip(0).clamp(min=0), vectors.flip(1)
    total = squares.trace()
    spanned = (total - left.trace()) + torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    slack = 1e-12 * total  # what rounding leaves of a span that is whole
    more = int((spanned < share * total - slack).sum().clamp(max=len(old) - old.shape[1]))
    return torch.linalg.qr(torch.cat([old, vectors[:, :more]], 1))[0].to(basis) if more else basis
