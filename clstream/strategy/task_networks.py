"""A network for each task, all within what one strategy holds: what PackNet, HAT and PNN share.

A task's network is learned while the task goes on, and answers for it from then on as it was when the task ended: with the task
given it answers alone; if not, each class has the logarithm of its probability in the network of its own task, so that the network
that is surest answers. The papers ask with the task given; the other answer is our own choice, of networks that were never taught
to compete. It takes as many forward passes as there are tasks.

In the loss the outputs of the task's own classes compete. Each task has a new optimizer, and a head of its own: the model's head
learns on, and what it was when a task ended is kept. A task that comes again is a further one, and its newest network answers for
it; where tasks share classes, and the task is not given, the newest network that knows a class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from clstream.bus import on
from clstream.events import RunStarted, TaskEnded, TaskStarted
from clstream.models.heads import GrowingHead, output_layer
from clstream.strategy.strategy import OptimizerFactory, Strategy
from clstream.stream import Batch, Task

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose weights or units are shared out among tasks; and those that derive from them."""

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class TaskNetworks(Strategy):
    """Learn each task in a network of its own, which is part of what was learned for it.

    A subclass says what network number `place` answers (`outputs_of`), and which gradients a step may take (`protect`).

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer of a task, anew for each; without weight decay.

    Raises:
        ValueError: for an optimizer with weight decay, which would move what old tasks answer with.
        TypeError: for a model with parameters in other layers than the method can share out.

    """

    needs_task = True
    rehearsal_free = True
    takes_regularisers = False
    takes_controls = ("schedule", "class_weights")
    fixed_classes = "those of the task in the loss, those that came in an answer"

    allowed: tuple[type[nn.Module], ...] = ()
    """Modules beside linear and convolutional layers that may have parameters of their own."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory) -> None:
        super().__init__(model, optimizer)
        if any(group.get("weight_decay") for group in self.optimizer.param_groups):
            name = type(self).__name__
            raise ValueError(
                f"{name} keeps what old tasks answer with as it is, and weight decay would move it: give an optimizer without, "
                "weight_decay=0"
            )
        self.make_optimizer = optimizer
        self.head, self.layers = layers_of(model, type(self).__name__, self.allowed)
        self.forget_tasks()

    def forget_tasks(self) -> None:
        """Start without tasks."""
        self.tasks: list[int] = []  # the number of the task of each network
        self.classes_of: list[Tensor] = []  # its labels
        self.heads_of: list[dict[str, Tensor]] = []  # its head, by name in the model; {} while it learns
        self.shares_classes = False  # whether a class is of several tasks, so that a question with the task given is another one

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start without tasks."""
        self.forget_tasks()

    @on(TaskStarted)
    def open_task(self, event: TaskStarted) -> None:
        """Give the task a network, and that a new optimizer."""
        device = next(self.model.parameters()).device
        self.tasks.append(event.task.id)
        self.classes_of.append(torch.tensor(event.task.classes, device=device))
        self.heads_of.append({})
        labels = [label for place in self.newest() for label in self.classes_of[place].tolist()]
        self.shares_classes = len({*labels}) < len(labels)
        self.optimizer = self.make_optimizer(self.learned_weights())

    @on(TaskEnded)
    def close_task(self, event: TaskEnded) -> None:
        """Keep the head that the task has."""
        state = self.model.state_dict().items()
        self.heads_of[-1] = {name: value.detach().clone() for name, value in state if name.startswith(f"{self.head}.")}

    def learned_weights(self) -> Iterable[nn.Parameter]:
        """Return the parameters that the newest task's optimizer has: here the model's."""
        return self.model.parameters()

    def learn(self, batch: Batch) -> Tensor:
        """Take one step that leaves what old tasks answer with as it is."""
        loss = self.objective(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            self.protect()
            self.optimizer.step()
            self.settle()
        return loss.detach()

    def protect(self) -> None:
        """Change the gradients, so that a step moves nothing that old tasks answer with. Here nothing."""

    def settle(self) -> None:
        """Do what is to be done after each step. Here nothing."""

    def mask_other_heads(self, outputs: Tensor, y: Tensor, task: Tensor | None = None) -> Tensor:
        """Return (n, outputs) with those of other tasks' classes masked with -inf."""
        return self.masked(outputs, len(self.tasks) - 1)

    def masked(self, outputs: Tensor, place: int) -> Tensor:
        """Return (n, outputs) of a network with those of other tasks' classes masked with -inf."""
        others = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        return outputs.masked_fill(others.index_fill_(0, self.classes_of[place], False), float("-inf"))

    @abstractmethod
    def outputs_of(self, x: Tensor, place: int) -> Tensor:
        """Return the (n, outputs) outputs of network number `place` for raw inputs."""

    def outputs_of_all(self, x: Tensor, places: list[int]) -> list[Tensor]:
        """Return the (n, outputs) outputs of some networks for raw inputs."""
        return [self.outputs_of(x, place) for place in places]

    def newest(self) -> list[int]:
        """Return the numbers of the networks that answer, oldest first: of a task that came again the newest one."""
        return sorted({task: place for place, task in enumerate(self.tasks)}.values())

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: unless tasks share classes."""
        return self.predicts_from_scores and not self.shares_classes

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, outputs): each class's log-probability in the network of its task, -inf for classes that have not come.

        With the task given, those of its network where tasks share classes. Before the first task, the model's outputs.
        """
        if not self.tasks:
            outputs: Tensor = self.model(x)
            return outputs
        places = self.newest()
        if task is not None and task.id in self.tasks and self.shares_classes:
            places = [place for place in places if self.tasks[place] == task.id]
        answers = zip(self.outputs_of_all(x, places), places, strict=True)
        *older, scores = (self.masked(outputs, place).log_softmax(1) for outputs, place in answers)
        for answer in reversed(older):
            more = max(0, scores.shape[1] - answer.shape[1])  # outputs that the network got since
            scores = torch.where(scores == float("-inf"), F.pad(answer, (0, more), value=float("-inf")), scores)
        return scores

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: the model's, and the heads of old tasks."""
        yield from super().answering_weights()
        for head in self.heads_of:
            yield from head.values()


def layers_of(model: nn.Module, method: str, allowed: tuple[type[nn.Module], ...] = ()) -> tuple[str, list[str]]:
    """Return the names of a network's head, and of the linear and convolutional layers below it in the order of their definition.

    Args:
        model: the network.
        method: for the sentence.
        allowed: further modules that may have parameters of their own.

    Raises TypeError for a network with parameters in other modules, or without such a layer below its head.
    """
    growing = [name for name, module in model.named_modules() if isinstance(module, GrowingHead)]
    try:
        head = growing[-1] if growing else output_layer(model)
    except ValueError as error:
        raise TypeError(f"{method} takes a network with a linear head, and {type(model).__name__} has none") from error
    layers = []
    for name, module in model.named_modules():
        if name == head or next(module.parameters(recurse=False), None) is None:
            continue
        if isinstance(module, LAYERS):
            layers.append(name)
        elif not isinstance(module, allowed):
            raise TypeError(
                f"{method} shares out linear and convolutional layers, and {type(model).__name__} has other weights, in "
                f"{name or 'itself'} ({type(module).__name__})"
            )
    if not layers:
        raise TypeError(f"{method} shares out the layers below the head, and {type(model).__name__} has none")
    return head, layers
