"""Generators: modules that make all weights of a network, chunk by chunk, from an embedding of a task and one of each chunk.

`Target` is a network whose weights are made.

The weights are one row of `size` numbers, cut into `n_chunks` = ceil(size / chunk) chunks. Chunk i is made from [e ; c_i]: the
embedding of the task, then that of the chunk. What the last chunk has too much is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clstream.models import GrowingHead
from clstream.params import check_choice, check_integer, check_integers, check_number

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}

FactoredWeights = tuple[Tensor, Tensor, Tensor]
"""What weights are made of: (tasks, n_chunks, width) states, and weight and bias of the last layer, which is linear."""


class ChunkGenerator(nn.Module):
    """The base of both generators: the chunks' embeddings, and the way from embeddings to rows and from chunks to weights.

    Args:
        size: how many weights are made.
        chunk: how many at a time.
        task_size, chunk_size: of the embeddings.
        chunk_std: of the normal that the chunks' embeddings are drawn from. None: there are none, each call brings its own.

    """

    output: nn.Linear

    def __init__(self, size: int, chunk: int, task_size: int, chunk_size: int, chunk_std: float | None = 1.0) -> None:
        super().__init__()
        check_integer(1, size=size, chunk=chunk, task_size=task_size, chunk_size=chunk_size)
        check_number(0, none=True, chunk_std=chunk_std)
        self.size, self.chunk, self.n_chunks, self.in_features = size, chunk, -(-size // chunk), task_size + chunk_size
        chunks = None if chunk_std is None else nn.Parameter(chunk_std * torch.randn(self.n_chunks, chunk_size))
        self.register_parameter("chunks", chunks)

    def inputs(self, embeddings: Tensor, chunks: Tensor | None) -> Tensor:
        """Return (tasks, n_chunks, task_size + chunk_size) from (tasks, task_size) and (tasks, n_chunks, chunk_size) or None."""
        shared: Tensor | None = self.chunks  # type: ignore[assignment]  # it is a parameter
        if chunks is None:
            assert shared is not None
            chunks = shared.expand(len(embeddings), -1, -1)
        return torch.cat([embeddings[:, None].expand(-1, self.n_chunks, -1), chunks], 2)

    def weights(self, states: Tensor) -> Tensor:
        """Return (tasks, size) weights from (tasks, n_chunks, width) states."""
        chunks: Tensor = self.output(states)
        return chunks.flatten(1)[:, : self.size]


def squared_distance(new: FactoredWeights, old: FactoredWeights, size: int) -> Tensor:
    """Return the sum of squares of the differences between two sets of weights, without making the weights.

    They are linear in a few states: the difference of two chunks is (A - A') s + (b - b') + A' (s - s'), a matrix times a vector.
    The sum of its squares needs no more of the matrix than the products of its columns, and those don't depend on how many chunks
    are made. No large square is subtracted from another.

    Args:
        new, old: (tasks, n_chunks, width) states, and weight and bias of the last layer.
        size: how many weights there are of each task: the last chunk counts as far as it is used.

    """
    (states, weight, bias), (old_states, old_weight, old_bias) = new, old
    columns = torch.cat([weight - old_weight, (bias - old_bias)[:, None], old_weight], 1)
    rows = torch.cat([states, torch.ones_like(states[..., :1]), states - old_states], 2)
    used, left = columns.tensor_split([size - (states.shape[1] - 1) * len(weight)])
    last = used.T @ used
    full = last + left.T @ left
    return (rows @ full).mul(rows)[:, :-1].sum() + (rows[:, -1] @ last).mul(rows[:, -1]).sum()


class MlpGenerator(ChunkGenerator):
    """A network with hidden layers makes each chunk by itself; all chunks of all tasks in one batch.

    Args:
        size, chunk, task_size, chunk_size, chunk_std: see `ChunkGenerator`.
        hidden: width of each hidden layer; none of them makes it linear.
        activation: "relu", "elu", "sigmoid" or "tanh".

    """

    def __init__(
        self,
        size: int,
        chunk: int,
        task_size: int,
        chunk_size: int,
        chunk_std: float | None = 1.0,
        hidden: tuple[int, ...] = (10, 10),
        activation: str = "relu",
    ) -> None:
        super().__init__(size, chunk, task_size, chunk_size, chunk_std)
        check_integers(1, hidden=hidden)
        check_choice(ACTIVATIONS, activation=activation)
        layers: list[nn.Module] = []
        for in_features, out_features in pairwise((self.in_features, *hidden)):
            layers += [nn.Linear(in_features, out_features), ACTIVATIONS[activation]()]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear((self.in_features, *hidden)[-1], chunk)
        with torch.no_grad():
            for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, embeddings: Tensor, chunks: Tensor | None = None, only_states: bool = False) -> Tensor:
        """Map (tasks, task_size) embeddings, and (tasks, n_chunks, chunk_size) or its own, to (tasks, size) weights.

        With `only_states`, to (tasks, n_chunks, width) states: what the last layer makes the weights of.
        """
        states: Tensor = self.hidden(self.inputs(embeddings, chunks))
        return states if only_states else self.weights(states)


class LstmGenerator(ChunkGenerator):
    """An LSTM makes one chunk after the other, so a chunk depends on all before it; all tasks in one call.

    It starts from zeros each time that weights are made.

    Args:
        size, chunk, task_size, chunk_size, chunk_std: see `ChunkGenerator`.
        hidden: size of the LSTM's state.

    """

    def __init__(
        self, size: int, chunk: int, task_size: int, chunk_size: int, chunk_std: float | None = 1.0, hidden: int = 64
    ) -> None:
        super().__init__(size, chunk, task_size, chunk_size, chunk_std)
        check_integer(1, hidden=hidden)
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(4 * hidden, n)) for n in (self.in_features, hidden))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.zeros(4 * hidden)) for _ in range(2))
        self.output = nn.Linear(hidden, chunk)
        with torch.no_grad():
            for gate in (*self.weight_ih.split(hidden), *self.weight_hh.split(hidden), self.output.weight):
                nn.init.xavier_uniform_(gate)
            nn.init.zeros_(self.output.bias)

    def forward(self, embeddings: Tensor, chunks: Tensor | None = None, only_states: bool = False) -> Tensor:
        """Map (tasks, task_size) embeddings, and (tasks, n_chunks, chunk_size) or its own, to (tasks, size) weights.

        With `only_states`, to (tasks, n_chunks, width) states: what the last layer makes the weights of.
        """
        # what nn.LSTM calls; that module has a list of its weights where those of a functional_call stay, also in a checkpoint
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        start = embeddings.new_zeros(1, len(embeddings), self.weight_hh.shape[1])
        inputs = self.inputs(embeddings, chunks).transpose(0, 1)
        states: Tensor = torch.lstm(inputs, (start, start), weights, True, 1, 0.0, self.training, False, False)[0].transpose(0, 1)
        return states if only_states else self.weights(states)

    def recurrent(self) -> dict[str, nn.Parameter]:
        """Return the weights and biases from state to state, by name."""
        return {name: weight for name, weight in self.named_parameters() if name.endswith("_hh")}


class Target:
    """A network whose weights come as one row of numbers: those that require a gradient, in the order in which the model has them.

    Args:
        model: gives the shapes, and the way from inputs to outputs.

    Raises:
        ValueError: for a model without such weights, with others than float32, or with a head that grows.

    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head: str | None = None  # the linear layer that gives the outputs, once it was looked for
        for name, weight in model.named_parameters():
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: ask the model once before it is given")
            if weight.requires_grad and weight.dtype != torch.float32:
                raise ValueError(f"the weights that are made are float32, and {name} is {weight.dtype}: call model.float()")
        self.shapes = {name: weight.shape for name, weight in model.named_parameters() if weight.requires_grad}
        self.size = sum(shape.numel() for shape in self.shapes.values())
        if not self.shapes:
            raise ValueError(f"{type(model).__name__} has no weights that require a gradient, so there are none to make")
        if any(isinstance(module, GrowingHead) for module in model.modules()):
            raise ValueError(
                "all weights of the network are made from the start, so its head can't grow: build the model with head='fixed', or "
                "with the outputs of one task and Hypernetwork with head='shared'"
            )

    def unflatten(self, row: Tensor) -> dict[str, Tensor]:
        """Return a row of weights, (size,), by name, each in its shape."""
        parts = row.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def outputs(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the (n, outputs) of the network with these weights and buffers, which batch norm in training mode updates."""
        outputs: Tensor = functional_call(self.model, {**weights, **buffers}, (x,))
        return outputs

    @torch.no_grad()
    def with_weights(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the model, in evaluation mode, that has these weights and buffers as its own."""
        model = deepcopy(self.model).eval()
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
        for name, buffer in buffers.items():
            model.get_buffer(name).copy_(buffer)
        return model

    def find_head(self, x: Tensor) -> int:
        """Run inputs through the network, to find the linear layer that gives the outputs; return the number of outputs."""
        layers: dict[int, str] = {}  # by the identity of their output
        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: layers.update({id(output): name}))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            outputs: Tensor = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        self.head = layers.get(id(outputs))
        return outputs.shape[1]

    def head_mask(self, columns: Tensor) -> Tensor:
        """Return (size,): 0 for the weights of outputs that are not among `columns`, 1 for all others."""
        parts = []
        for name, shape in self.shapes.items():
            part = torch.ones(shape, device=columns.device)
            if name.rpartition(".")[0] == self.head:
                part = torch.zeros_like(part).index_fill(0, columns, 1.0)
            parts.append(part.flatten())
        return torch.cat(parts)
