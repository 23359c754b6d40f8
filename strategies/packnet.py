"""PackNet: each task is learned in the weights that are free, half of these are pruned by magnitude, and the rest learns on alone.

Mallya & Lazebnik 2018, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning". Form implemented, for task t,
with the owner of each weight of the linear and convolutional layers below the head, 0 of those that are free:

begin      free weights get the owner t, and learn on from where they are: 0, but in the first task
first part all weights with the owner t learn; those of older tasks take part as they are
prune      in each layer, of the weights with the owner t the share `prune` that is smallest in magnitude, rounded to a whole
           number, gets the owner 0 and the value 0
last part  the share `retrain` of a session's steps: the weights that are left with the owner t learn on
answer     for task t: all weights with an owner from 1 to t, the others 0; and the task's head

Biases and norms, with their statistics, learn in the first task alone, as in the authors' code. So the answers of a task that is
over never change: they are the same bits. What is fixed has gradients of 0, and each task a new optimizer, so that no momentum
moves it; weight decay is refused. `retrain` is a third, as in the authors' scripts (10 epochs after 20); as a share of steps it is
there in a single pass too.

Deviations: the authors retrain with a new optimizer at a tenth of the rate; here the task's goes on. Their scripts prune 0.75 after
the first task, and may keep biases for each task. They begin with a pre-trained network; so does this one with a model that is
given as one. Equal magnitudes are pruned in their order, where the authors prune all of them. A task of several sessions is pruned
at the end of each: when the next one begins, the weights that it lost are its own again. In Avalanche 0.6.0 a share is rounded
down, the output layer is shared out like any other, and what was pruned begins the next task with the value that it had; but for
these the weights are the same. See `clstream.strategy.task_networks` for answers without the task given, heads, and tasks that come
again.

When all is owned, a later task has its head alone. Beside the network a byte is kept for each weight, and each task's head.

Measured: see `docs/task-networks.md`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchReady, RunStarted, SessionEnded, SessionStarted, TaskStarted
from clstream.params import check_number, check_share
from clstream.strategy import OptimizerFactory
from clstream.strategy.task_networks import NORMS, TaskNetworks

MOST = 255
"""Tasks that a byte can tell apart."""


class PackNet(TaskNetworks):
    """Learn each task in free weights, and free the smaller ones of these again.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits; parameters only in linear and convolutional layers, and norms.
        optimizer: makes the optimizer of a task, anew for each; without weight decay.
        prune: the share of a task's weights that are freed, from 0 to 1; of a list each task takes one, and the last one goes on.
        retrain: the share of a session's steps that come after pruning, from 0 to below 1.

    Raises:
        TypeError: for a model that has parameters in other modules.

    """

    allowed = NORMS

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        prune: float | list[float] = 0.5,
        retrain: float = 1 / 3,
    ) -> None:
        super().__init__(model, optimizer)
        if prune == []:
            raise ValueError("prune must be a share from 0 to 1, or a list of some, not []")
        for share in prune if isinstance(prune, list) else [prune]:
            check_number(0, 1, prune=share)
        check_share(retrain=retrain)
        self.prune, self.retrain = prune, retrain
        self.pruned = False  # whether the session that goes on is
        self.prune_at = 0  # which of its steps is the first one of the last part
        self.steps_per_epoch = 1

    def forget_tasks(self) -> None:
        """Start without tasks, all weights free."""
        super().forget_tasks()
        self.owner: dict[str, Tensor] = {}  # of each weight by its name, uint8

    @on(RunStarted)
    def own(self, event: RunStarted) -> None:
        """Let all weights be free, and norms learn."""
        weights = {f"{name}.weight": self.model.get_parameter(f"{name}.weight") for name in self.layers}
        self.owner = {name: torch.zeros_like(weight, dtype=torch.uint8) for name, weight in weights.items()}
        self.rest_norms(False)

    def rest_norms(self, rest: bool) -> None:
        """Put norms in evaluation mode, so that their statistics stay; or back into the model's mode."""
        for module in self.model.modules():
            if isinstance(module, NORMS):
                module.train(self.model.training and not rest)

    @on(TaskStarted)
    def check_room(self, event: TaskStarted) -> None:
        """Refuse more tasks than owners, and from the second one on leave norms as they are."""
        if len(self.tasks) > MOST:
            raise ValueError(f"PackNet tells {MOST} tasks apart, and task {event.task.id} is one more")
        self.rest_norms(len(self.tasks) > 1)

    @on(SessionStarted)
    def take(self, event: SessionStarted) -> None:
        """Let the task have what is free, and say when it is pruned."""
        for owner in self.owner.values():
            owner[owner == 0] = len(self.tasks)
        self.pruned = False
        self.steps_per_epoch = len(next(iter(event.session)))
        self.prune_at = round((1 - self.retrain) * self.steps_per_epoch * len(event.session))

    @on(BatchReady)
    def begin_last_part(self, event: BatchReady) -> None:
        """Prune before the first step of the last part."""
        if not self.pruned and event.batch.epoch * self.steps_per_epoch + event.batch.index >= self.prune_at:
            self.free()

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """Prune where no step was left for it."""
        if not self.pruned:
            self.free()

    @torch.no_grad()
    def free(self) -> None:
        """Free the smaller weights of the task."""
        self.pruned = True
        share = self.prune[min(len(self.tasks), len(self.prune)) - 1] if isinstance(self.prune, list) else self.prune
        for name, owner in self.owner.items():
            weight, own = self.model.get_parameter(name), owner.flatten()
            rows = (own == len(self.tasks)).nonzero().flatten()
            smallest = weight.flatten()[rows].abs().argsort(stable=True)[: round(share * len(rows))]
            own[rows[smallest]] = 0
            weight[owner == 0] = 0

    def protect(self) -> None:
        """Take the gradients of the weights that the task owns; from the second task on not those of biases and norms."""
        for name, weight in self.model.named_parameters():
            if weight.grad is None or name.startswith(f"{self.head}."):
                continue
            if name in self.owner:
                weight.grad.masked_fill_(self.owner[name] != len(self.tasks), 0)
            elif len(self.tasks) > 1:
                weight.grad.zero_()

    def settle(self) -> None:
        """Keep pruned weights at 0, whatever momentum they had."""
        if self.pruned:
            for name, owner in self.owner.items():
                self.model.get_parameter(name).masked_fill_(owner == 0, 0)

    def outputs_of(self, x: Tensor, place: int) -> Tensor:
        """Return the outputs of the weights of the first tasks, up to one, with its head."""
        outputs: Tensor
        if place == len(self.tasks) - 1 and not self.heads_of[place]:  # it learns: what is not its own is older, or 0
            outputs = self.model(x)
            return outputs
        weights = {
            name: torch.where((owner > 0) & (owner <= place + 1), self.model.get_parameter(name), 0)
            for name, owner in self.owner.items()
        }
        outputs = functional_call(self.model, {**weights, **self.heads_of[place]}, (x,))
        return outputs
