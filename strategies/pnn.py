"""PNN (progressive neural networks): each task has a column of its own, which is given what earlier columns make of the input.

Rusu, Rabinowitz, Desjardins, Soyer, Kirkpatrick, Kavukcuoglu, Pascanu, Hadsell 2016, "Progressive Neural Networks". Form
implemented, for column k and its layer i, one of the linear and convolutional layers and the head, with h_j what column j gives to
its own layer i:

adapter="mlp"     f(W h_k + U relu(V [alpha_1 h_1, ..., alpha_(k-1) h_(k-1)])), the default
adapter="linear"  f(W h_k + sum over columns j < k of U_j h_j)

No lateral connection goes to the first layer, which sees the input. Where layer i is convolutional, V is a 1 x 1 convolution and U
one like W. V has as many outputs as h_k has channels, or as the layer has, where these are fewer; alpha begins as small random
numbers. When its task ends, a column is frozen, in evaluation mode: its answers stay the same bits, since it sees no later column.

Each column is the model as it was given: the first one with its weights, each other with these in another order within each tensor,
which is a new draw where the numbers of a tensor were drawn alike. Lateral connections are computed as further inputs of the layer,
with further columns of its weights: the same number, also where a layer and its nonlinearity are one module.

Deviations: of the widths for V that codes have, the layer's inputs (joansj/hat) and its outputs (Avalanche), this is the smaller.
V has no bias (the paper leaves biases out). Only the outputs of the task's own classes have lateral connections. A task
that comes again gets a further column. In Avalanche 0.6.0 the first layer has lateral connections to the input too, the output
layer has none, V and U have biases, and alpha is drawn from N(0, 1); of a layer in between, it is the same function. See
`clstream.strategy.task_networks` for answers without the task given.

Weights grow with the square of the number of tasks.

Measured: see `docs/task-networks.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import SessionStarted, TaskEnded, TaskStarted
from clstream.models.heads import grow_heads
from clstream.params import check_choice
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import session_outputs
from clstream.strategy.task_networks import NORMS, TaskNetworks
from clstream.stream import Samples


class Lateral(nn.Module):
    """The lateral connections to one layer of a column: from what all earlier columns give to that layer of theirs.

    Args:
        weight: of the layer, (out, in, ...); for the head of a column, as many rows as the task has classes.
        columns: how many earlier columns there are.
        adapter: "mlp" or "linear".
        random: draws the weights, as `nn.Linear` draws its own.

    """

    U: nn.Parameter
    V: nn.Parameter
    alpha: nn.Parameter

    def __init__(self, weight: Tensor, columns: int, adapter: str, random: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=random).to(weight))

        out, channels, *kernel = weight.shape
        width = min(channels, out) if adapter == "mlp" else columns * channels
        self.U = drawn(out, width, *kernel)
        if adapter == "mlp":
            self.V = drawn(width, columns * channels)
            self.alpha = nn.Parameter(0.1 * torch.randn(columns, generator=random).to(weight))

    def forward(self, given: list[Tensor]) -> Tensor:
        """Return (n, width, ...), what U is applied to, for (n, channels, ...) of each earlier column."""
        if "V" not in self._parameters:
            return torch.cat(given, 1)
        joined = torch.cat([scale * h for scale, h in zip(self.alpha, given, strict=True)], 1)
        if joined.dim() == 2:
            return F.linear(joined, self.V).relu()
        return torch.einsum("oc,nc...->no...", self.V, joined).relu()


class PNN(TaskNetworks):
    """Learn each task in a column of its own, beside those of earlier tasks.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits: what each column is; parameters only in linear and convolutional
            layers, without groups, and norms.
        optimizer: makes the optimizer of a task, anew for each; without weight decay.
        adapter: "mlp" or "linear": the form of lateral connections.

    Raises:
        TypeError: for a model that has parameters in other modules, or a convolution with groups.

    """

    allowed = NORMS

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory = partial(SGD, lr=0.1), adapter: str = "mlp") -> None:
        super().__init__(model, optimizer)
        check_choice(("mlp", "linear"), adapter=adapter)
        for name in self.layers:
            if getattr(model.get_submodule(name), "groups", 1) > 1:
                raise TypeError(f"PNN gives layers further inputs, and {name} of {type(model).__name__} has groups of them")
        self.adapter = adapter
        self.random = torch.Generator()

    def forget_tasks(self) -> None:
        """Start without columns."""
        super().forget_tasks()
        self.columns: list[nn.Module] = []
        self.laterals: list[list[Lateral]] = []  # of each column, for each layer but the first, and the head

    @on(TaskStarted)
    def open_task(self, event: TaskStarted) -> None:
        """Add a column with its lateral connections, and give it an optimizer."""
        column, before = deepcopy(self.model).train(self.model.training), len(self.columns)
        laterals = list[Lateral]()
        if before:
            for parameter in column.parameters():
                order = torch.randperm(parameter.numel(), generator=self.random).to(parameter.device)
                parameter.data = parameter.data.flatten()[order].view_as(parameter)
            weights: list[Tensor] = [self.model.get_parameter(f"{name}.weight") for name in self.layers[1:]]
            head = self.model.get_parameter(f"{self.head}.weight")
            weights.append(head.new_empty(len(event.task.classes), head.shape[1]))
            laterals.extend(Lateral(weight, before, self.adapter, self.random) for weight in weights)
        self.columns.append(column)
        self.laterals.append(laterals)
        super().open_task(event)

    def learned_weights(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the newest column, and of its lateral connections."""
        return [parameter for module in (self.columns[-1], *self.laterals[-1]) for parameter in module.parameters()]

    @on(SessionStarted)
    def grow_column(self, event: SessionStarted) -> None:
        """Give a growing head of the newest column the outputs of the session's classes."""
        grow_heads(self.columns[-1], [self.optimizer], lambda: session_outputs(event.session))

    @on(TaskEnded)
    def close_task(self, event: TaskEnded) -> None:
        """Freeze the column."""
        for module in (self.columns[-1], *self.laterals[-1]):
            module.eval().requires_grad_(False)

    def outputs(self, samples: Samples) -> Tensor:
        """Return the newest column's (n, outputs) for samples to learn, augmented."""
        return self.outputs_of(samples.x if self.augment is None else self.augment(samples.x), len(self.columns) - 1)

    def outputs_of(self, x: Tensor, place: int) -> Tensor:
        """Return the (n, outputs) outputs of a column for raw inputs."""
        return self.outputs_of_all(x, [place])[0]

    def outputs_of_all(self, x: Tensor, places: list[int]) -> list[Tensor]:
        """Return the (n, outputs) outputs of some columns for raw inputs; each column is computed once."""
        given: list[list[Tensor]] = [[] for _ in range(len(self.layers))]  # to each layer but the first, and the head, by column
        outputs = dict[int, Tensor]()
        for place in range(max(places) + 1):
            answer = self.column_outputs(x, place, given)
            if place in places:
                outputs[place] = answer
        return [outputs[place] for place in places]

    def column_outputs(self, x: Tensor, place: int, given: list[list[Tensor]]) -> Tensor:
        """Return the (n, outputs) outputs of a column, and add what it gives to its layers to `given`."""
        column, laterals, weights = self.columns[place], self.laterals[place], dict[str, Tensor]()
        beside = dict[str, Tensor]()  # of the head

        def widened(_: nn.Module, inputs: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...] | None:
            (own,) = inputs
            others = list(given[layer])
            given[layer].append(own)
            if not others:
                return None
            more = laterals[layer](others)
            if layer < len(self.layers) - 1:
                return (torch.cat([own, more], 1),)
            beside["head"] = more
            return None

        names = [*self.layers[1:], self.head]
        for lateral, name in zip(laterals, names[:-1], strict=False):
            weights[f"{name}.weight"] = torch.cat([column.get_parameter(f"{name}.weight"), lateral.U], 1)
        with ExitStack() as hooks:
            for layer, name in enumerate(names):
                hooks.enter_context(column.get_submodule(name).register_forward_pre_hook(partial(widened, layer=layer)))
            outputs: Tensor = functional_call(column, weights, (x,))
        if "head" in beside:
            outputs = outputs.index_add(1, self.classes_of[place], F.linear(beside["head"], laterals[-1].U))
        return outputs

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: those of all columns and their lateral connections."""
        for module in (*self.columns, *(lateral for laterals in self.laterals for lateral in laterals)):
            yield from (*module.parameters(), *module.buffers())
