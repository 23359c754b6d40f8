"""OWM: weights move in directions that are orthogonal to all past inputs of their layer.

Zeng, Chen, Cui, Yu 2019, "Continual learning of context-dependent processing in neural networks". Form implemented, for each linear
layer and convolution that is held, with G the gradient of its (outputs, inputs) matrix, and of its bias as one column more, whose
input is 1:

    a step     G <- G P                                         P the layer's projector, at first the identity
    inputs     P <- P - P r r' P / (alpha + r' P r)             for the mean r over a batch of what goes into the layer

After n such inputs, the columns of A, P = I - A (A'A + alpha I)^-1 A', as long as alpha is one: all but orthogonal to them. Of a
convolution each place's patch of the mean input is a column. Over a task alpha falls from `alpha` to `alpha` times `alpha_decay`.

update="task" is the paper's procedure, as recalled: the first task is learned freely, and P is renewed when a task is over, by its
samples in batches as the stream's; within a task it stays. "step" is that of the authors' code: P takes up each batch before its
step, from the first one on, in each pass. The code's alphas are by layer: from 0.9 by 0.001, from 1 by 0.1, 0.6 (three layers,
MNIST, 20 passes, batches of 40), from 1 by 1e-5 (convolutions); here there is one for all. Of a convolution the code takes every
second place's patch, though its stride is 1. The paper's r is the layer's input for the mean of the samples, the
code's, and this, the mean of the layer's inputs. In the code norms of gradients are cut off at 10, here not.

A layer's bias goes with its matrix. Held parameters that are neither (scales and shifts of norms) learn in the first task alone,
our own choice: the networks there have none. Running statistics of batch norm go on, and old answers with them. With update="task",
steps of plain SGD without weight decay, or with momentum, are sums of projected gradients; those of Adam aren't.
Each task has an optimizer of its own (`renew_optimizer`), so that no momentum of the last one is left. The context-dependent part
of the paper (CDP) is left out.

Measured: steps and projectors by hand (`tests/test_gradient_projection.py`). Class-IL Split MNIST, 1 epoch, batch 32, SGD 0.03, Mlp
100-100, not tuned, 3 seeds, mean and standard deviation: 0.384 ± 0.014.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionEnded, SessionStarted, TaskEnded, TaskStarted
from clstream.measures.flops import same_flops
from clstream.params import check_bool, check_choice, check_positive
from clstream.seeds import random_state_kept
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.layer_inputs import Layer, input_rows, inputs_of, layers_by_name, matrix_layers, other_parameters
from clstream.stream import TARGETS, Batch


class OWM(Strategy):
    """Project gradients to be orthogonal to past inputs, layer by layer, by recursive least squares.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        alpha: what is added to the squares of an input; the smaller, the more exactly steps are orthogonal to it.
        alpha_decay: what alpha is multiplied by over a task, from above 0.
        update: "task" (the paper's) or "step" (the authors' code's): when the projectors take up inputs.
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
        alpha: float = 1.0,
        alpha_decay: float = 0.01,
        update: str = "task",
        parameters: str | list[str] = "*",
        renew_optimizer: bool = True,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_positive(alpha=alpha, alpha_decay=alpha_decay)
        check_choice(("task", "step"), update=update)
        check_bool(renew_optimizer=renew_optimizer)
        self.alpha, self.alpha_decay, self.update, self.parameters = alpha, alpha_decay, update, parameters
        self.renew_optimizer, self.make_optimizer = renew_optimizer, optimizer
        layers = matrix_layers(model, parameters)
        self.layers, self.others = [*layers], other_parameters(model, parameters, layers, biases=True)
        self.clear()

    def clear(self) -> None:
        """Start with the identity as each projector."""
        self.projectors: dict[str, Tensor] = {}  # P, (inputs, inputs), by layer
        self.coming: dict[str, Tensor] = {}  # those that hold from the next task on
        self.tasks = 0  # that are over
        self.steps, self.done = 1, 0  # of the session that goes on

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start with no inputs: nothing was learned yet."""
        self.clear()

    @on(TaskStarted)
    def renew(self, event: TaskStarted) -> None:
        """Make the optimizer anew, if each task has its own."""
        if self.renew_optimizer and self.tasks:
            self.optimizer = self.make_optimizer(self.model.parameters())

    @on(SessionStarted)
    def count_steps(self, event: SessionStarted) -> None:
        """Take down how many steps alpha falls over."""
        self.steps, self.done = -(-len(event.session.samples) // event.session.batch_size) * event.session.epochs, 0

    def learn(self, batch: Batch) -> Tensor:
        """Take one step along the projected gradient."""
        layers = layers_by_name(self.model, self.layers)
        with inputs_of(layers if self.update == "step" else {}) as noted:
            loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        if self.update == "step":
            self.take_up(self.projectors, layers, noted, self.done / self.steps)
        if self.projectors:
            self.project(layers)
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def project(self, layers: dict[str, Layer]) -> None:
        """Multiply the gradients of the matrices by their projectors; those of others that are held are 0 after a task."""
        for name, projector in self.projectors.items():
            slope, bias = layers[name].weight.grad, layers[name].bias
            if slope is None:  # nothing depends on it
                continue
            columns = [slope.flatten(1), *([bias.grad[:, None]] if bias is not None and bias.grad is not None else [])]
            joined = torch.cat(columns, 1)
            projected = joined @ projector[: joined.shape[1]]
            slope.copy_(projected[:, : columns[0].shape[1]].view_as(slope))
            for column in columns[1:]:
                column.copy_(projected[:, -1:])
        for name in self.others if self.tasks else []:
            slope = self.model.get_parameter(name).grad
            if slope is not None:
                slope.zero_()

    @torch.no_grad()
    def take_up(self, projectors: dict[str, Tensor], layers: dict[str, Layer], noted: dict[str, list[Tensor]], done: float) -> None:
        """Renew projectors by the mean of what went into each layer; `done` is the part of the session that is over."""
        alpha = self.alpha * self.alpha_decay**done
        for name, layer in layers.items():
            for given in noted[name]:
                rows = input_rows(layer, given.mean(0, keepdim=True))
                if layer.bias is not None:
                    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                before = projectors.get(name, torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device))
                projectors[name] = renewed(before, rows, alpha)

    @on(SessionEnded)
    def take_inputs(self, event: SessionEnded) -> None:
        """Have the projectors of the next tasks take up the session's samples, if that is when they do."""
        if self.update == "step":
            return
        session, layers = event.session.samples, layers_by_name(self.model, self.layers)
        batches = torch.arange(len(session)).split(event.session.batch_size)
        self.coming = self.coming or dict(self.projectors)
        with evaluating(self), random_state_kept(next(self.model.parameters()).device):
            for number, rows in enumerate(batches):
                with same_flops(len(rows)), inputs_of(layers) as noted:
                    self.outputs(session[rows.to(session[:1].y.device)])
                    self.take_up(self.coming, layers, noted, number / len(batches))

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        """Let the projectors of the tasks so far hold."""
        self.projectors = self.coming or self.projectors
        self.coming = {}
        self.tasks += 1


def renewed(projector: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Return (P^-1 + R' R / alpha)^-1, which is P renewed by each of some inputs: recursive least squares.

    Args:
        projector: P, (d, d).
        rows: R, (n, d).
        alpha: above 0.

    """
    products = projector @ rows.T
    if len(rows) < len(projector):
        inner = rows @ products + alpha * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        less: Tensor = products @ torch.linalg.solve(inner, products.T)
        return projector - less
    unit = torch.eye(len(projector), dtype=rows.dtype, device=rows.device)
    solved: Tensor = torch.linalg.solve(unit + products @ rows / alpha, projector)
    return solved
