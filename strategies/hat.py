"""HAT (hard attention to the task): each task learns which units it uses, and what earlier tasks use is no longer learned.

Serra, Suris, Miron, Karatzoglou 2018, "Overcoming Catastrophic Forgetting with Hard Attention to the Task". Form implemented, for
task t, layer l of linear and convolutional layers below the head, unit i (a channel, where the layer is convolutional), as the
authors' code has it:

gates       a_li = sigmoid(s e_li), e the embeddings of task and layer, drawn from N(0, 1); a factor of the unit's output
s           from 1 / s_max to s_max over the batches of each pass: 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1)
loss        cross-entropy + lambda R, R = (sum of a_li (1 - c_li)) / (sum of 1 - c_li), c the greatest gate of the tasks before
weights     the gradient of w_lij times 1 - min(c_li, c_(l-1)j), that of the bias of unit i times 1 - c_li; inputs count as 1
embeddings  the gradient of e times s_max (cosh(s e) + 1) / (s (cosh(e) + 1)), s e within +-50; after a step e is held within +-6
task's end  c_li <- max(c_li, a_li at s_max)
answer      gates at s_max, and the task's head

With `gates="sigmoid"`, the paper's, gates are within 4e-8 of 0 and 1 but for units with |s_max e| below some 17: what old tasks
answer stays the same to the extent that the paper has. With "hard" they are 1 where e > 0, else 0, in an answer and in c; then old
answers are the same bits. In both, learning has sigmoids. So has CLArena's code for HAT. Adam, which scales each number by itself,
undoes a factor such as 1 - c that is not 0: it is for hard gates alone.

A gate on the output of layer l is computed as a factor of the columns of the next layer's weights: the same number, whatever
nonlinearity, pooling or dropout lies between. So it takes any network whose layers form a chain; units whose gates are 0 must
change nothing, which is tried before the run with every second unit of a layer: channels are flattened in their order. Norms, which
would tie units together, are refused.

Conflicts: in the code b - 1 is divided by B, and the gradient's norm is clipped at 10,000, which is not done here. Its learning
rate falls when a held-out loss doesn't. Deviations: with a single batch a pass, s stays at 1 / s_max. Momentum is allowed, and
starts anew with each task. See `clstream.strategy.task_networks` for answers without the task given, and tasks that come again.

Measured: see `docs/task-networks.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import BatchReady, EpochStarted, RunStarted, TaskEnded, TaskStarted
from clstream.params import check_choice, check_number
from clstream.strategy import OptimizerFactory
from clstream.strategy.task_networks import TaskNetworks
from clstream.stream import Samples

MOST_COSH, MOST_EMBEDDING = 50.0, 6.0
"""What s e is held within where the gradient of e is compensated, and what e is held within: the authors' numbers."""


class HAT(TaskNetworks):
    """Learn each task with gates on units, and spare the units that tasks before it use.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits: a chain of linear and convolutional layers, without norms.
        optimizer: makes the optimizer of a task, anew for each; without weight decay.
        s_max: the greatest s.
        lamb: lambda, the weight of R.
        gates: of an answer, "sigmoid" (at s_max) or "hard" (1 where e > 0, else 0).

    Raises:
        TypeError: for a model that has parameters in other modules.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.05),
        s_max: float = 400.0,
        lamb: float = 0.75,
        gates: str = "sigmoid",
    ) -> None:
        super().__init__(model, optimizer)
        check_number(1, s_max=s_max)
        check_number(0, lamb=lamb)
        check_choice(("sigmoid", "hard"), gates=gates)
        self.s_max, self.lamb, self.gates = s_max, lamb, gates
        self.random = torch.Generator()
        self.batches, self.turn = 1, 0

    def forget_tasks(self) -> None:
        """Start without tasks: no unit is in use."""
        super().forget_tasks()
        self.embeddings: list[nn.ParameterList] = []  # of each task, (units,) for each layer
        self.used: list[Tensor] = []  # c, (units,) of each layer

    @on(RunStarted)
    def check_chain(self, event: RunStarted) -> None:
        """Let no unit be in use. Raises TypeError for a network whose layers form no chain."""
        weights = [self.model.get_parameter(f"{name}.weight") for name in self.layers]
        self.used = [weight.new_zeros(len(weight)) for weight in weights]
        x = torch.rand(2, *event.stream.input_shape, device=weights[0].device)
        with evaluating(self):
            for layer, name in enumerate(self.layers):
                gates = [torch.ones_like(used) for used in self.used]
                gates[layer][::2] = 0
                try:
                    before = self.gated(x, gates)
                    same = all(torch.equal(before, self.gated(x, gates, self.moved(name, by))) for by in (1, -1))
                except (RuntimeError, ValueError):
                    same = False
                if not same:
                    raise TypeError(
                        f"HAT takes a network whose layers form a chain, and in {type(self.model).__name__} the outputs of "
                        f"{name!r} don't go through the layer that is defined next alone, in their order"
                    )

    def moved(self, name: str, by: int) -> dict[str, Tensor]:
        """Return a layer's parameters with those of every other unit moved: weights by a number, a bias so that a ReLU opens."""
        own = {key: value.detach().clone() for key, value in self.model.get_submodule(name).named_parameters(recurse=False)}
        for key, value in own.items():
            value[::2] += by if key == "weight" else 10 + value.abs().amax()
        return {f"{name}.{key}": value for key, value in own.items()}

    @on(TaskStarted)
    def open_task(self, event: TaskStarted) -> None:
        """Draw the embeddings of the task, and give it an optimizer."""
        own = [torch.randn(len(used), generator=self.random).to(used) for used in self.used]
        self.embeddings.append(nn.ParameterList(nn.Parameter(embedding) for embedding in own))
        super().open_task(event)

    def learned_weights(self) -> Iterable[nn.Parameter]:
        """Return the model's parameters, and the embeddings of the newest task."""
        return [*self.model.parameters(), *self.embeddings[-1].parameters()]

    @on(EpochStarted)
    def begin_pass(self, event: EpochStarted) -> None:
        """Take down how many batches the pass has."""
        self.batches = len(event.epoch)

    @on(BatchReady)
    def count_batch(self, event: BatchReady) -> None:
        """Take down which batch of the pass is learned."""
        self.turn = event.batch.index

    @property
    def s(self) -> float:
        """The slope of the gates in the step that goes on."""
        low = 1 / self.s_max
        return low + (self.s_max - low) * self.turn / max(1, self.batches - 1)

    def gates_of(self, place: int, s: float) -> list[Tensor]:
        """Return a, (units,) of each layer, of task number `place`."""
        return [(s * embedding).sigmoid() for embedding in self.embeddings[place]]

    def answering_gates(self, place: int) -> list[Tensor]:
        """Return the gates that task number `place` answers with."""
        if self.gates == "hard":
            return [(embedding > 0).to(embedding) for embedding in self.embeddings[place]]
        return self.gates_of(place, self.s_max)

    def gated(self, x: Tensor, gates: list[Tensor], head: dict[str, Tensor] | None = None) -> Tensor:
        """Return the (n, outputs) outputs of the network with gates on its units, for raw or augmented inputs."""
        weights = dict(head or {})
        for gate, name in zip(gates, [*self.layers[1:], self.head], strict=True):
            key = f"{name}.weight"
            weight = weights.get(key, self.model.get_parameter(key))
            weights[key] = weight * of_columns(gate, weight)
        outputs: Tensor = functional_call(self.model, weights, (x,))
        return outputs

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy with the gates of the step, and the capacity regulariser."""
        gates = self.gates_of(len(self.tasks) - 1, self.s)
        outputs = self.gated(samples.x if self.augment is None else self.augment(samples.x), gates)
        return self.loss_of_outputs(outputs, samples) + self.lamb * capacity(gates, self.used)

    def protect(self) -> None:
        """Spare the weights between units in use, and compensate the gradients of the embeddings."""
        for name, used, before in zip(self.layers, self.used, [None, *self.used[:-1]], strict=True):
            layer: Any = self.model.get_submodule(name)
            weight, bias = layer.weight, layer.bias
            if weight.grad is not None:
                rows = used.view(-1, *[1] * (weight.dim() - 1))
                weight.grad *= 1 - (rows if before is None else torch.minimum(rows, of_columns(before, weight)))
            if bias is not None and bias.grad is not None:
                bias.grad *= 1 - used
        s = self.s
        for embedding in self.embeddings[-1]:
            if embedding.grad is not None:
                steep = (s * embedding).clamp(-MOST_COSH, MOST_COSH).cosh() + 1
                embedding.grad *= self.s_max / s * steep / (embedding.cosh() + 1)

    def settle(self) -> None:
        """Hold the embeddings where the gradient of their gates can still move them."""
        for embedding in self.embeddings[-1]:
            embedding.clamp_(-MOST_EMBEDDING, MOST_EMBEDDING)

    @on(TaskEnded)
    @torch.no_grad()
    def close_task(self, event: TaskEnded) -> None:
        """Count the task's units among those in use."""
        super().close_task(event)
        self.used = [
            torch.maximum(used, gate) for used, gate in zip(self.used, self.answering_gates(len(self.tasks) - 1), strict=True)
        ]

    def outputs_of(self, x: Tensor, place: int) -> Tensor:
        """Return the outputs of the network with a task's gates and head."""
        return self.gated(x, self.answering_gates(place), self.heads_of[place])

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights that it answers with: the model's, heads, and embeddings."""
        yield from super().answering_weights()
        for embeddings in self.embeddings:
            yield from embeddings.parameters()


def of_columns(gate: Tensor, weight: Tensor) -> Tensor:
    """Return (units,) of a layer as a factor of the next one's columns, of which a channel that was flattened has several."""
    columns = weight.shape[1]
    if columns % len(gate):
        raise ValueError(f"a layer of {len(gate)} units is followed by one of {columns} inputs")
    return gate.repeat_interleave(columns // len(gate)).view(1, -1, *[1] * (weight.dim() - 2))


def capacity(gates: list[Tensor], used: list[Tensor]) -> Tensor:
    """Return R: the mean gate of the units that are not in use; 0 if all are."""
    free = [1 - own for own in used]
    spent = torch.stack([(gate * own).sum() for gate, own in zip(gates, free, strict=True)]).sum()
    return spent / torch.stack([own.sum() for own in free]).sum().clamp(min=torch.finfo(spent.dtype).tiny)
