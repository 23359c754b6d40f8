"""TAME's selector, and what is trained from memories: the selector itself, and pruned networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from clstream.strategies.tame.experts import with_outputs
from clstream.strategies.tame.pruning import Masks, cut, magnitude_masks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from clstream.evaluation import CHUNK
from clstream.measures.flops import same_flops
from clstream.models import Mlp
from clstream.params import HasParams, reason_of
from clstream.seeds import isolated
from clstream.stream import Samples

BATCH = 128
"""Samples of a step."""

PrunedModel = tuple[nn.Module, Masks]
"""A network, and which of its weights pruning has left."""

Outputs = Callable[[nn.Module, Tensor], Tensor]
"""A network and raw inputs to the outputs that are trained."""


def new_selector(kind: str, first: nn.Module, experts: int, shape: tuple[int, ...]) -> nn.Module:
    """Return a network with an output for each expert: of the first expert's architecture ("expert"), or a perceptron ("mlp")."""
    if kind == "expert":
        return with_outputs(first, experts)
    params = first.params if isinstance(first, HasParams) else {}
    norm = {name: params[name] for name in ("mean", "std") if isinstance(params.get(name), float)}
    return Mlp(shape, experts, hidden=(100,), **norm)


def check_selector(first: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a model that no selector of the same architecture can be made of, before anything is learned."""
    with isolated(0, "check"), torch.no_grad():
        try:
            selector = with_outputs(first, 2).to(device).eval()
            answer: object = tuple(selector(torch.zeros(1, *shape, device=device)).shape)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            answer = reason_of(error)
    if answer != (1, 2):
        raise ValueError(
            f"TAME can't make a selector of {type(first).__name__}: with two outputs it answers one sample with {answer}; give "
            "TAME selector='mlp', or the model a parameter `classes`"
        )


@torch.no_grad()
def is_collapsed(selector: nn.Module, x: Tensor) -> bool:
    """Return whether a selector sends all inputs to one expert: saturated sigmoids have no gradient to get out of that."""
    return len(torch.cat([selector(part).argmax(1) for part in x.split(CHUNK)]).unique()) == 1


def fit(
    model: nn.Module, samples: Samples, epochs: int, optimizer: Optimizer, outputs: Outputs, masks: Masks | None = None
) -> None:
    """Train a network on all of some samples; with masks, pruned weights stay at zero, and the learning rate falls."""
    model.train()
    counted: dict[int, int] = {}
    for epoch in range(epochs):
        if masks and epoch and epoch in (epochs // 2, 3 * epochs // 4):
            optimizer.param_groups[0]["lr"] /= 10
        for rows in torch.randperm(len(samples)).to(samples.y.device).split(BATCH):
            with same_flops(len(rows), counted):
                scores = outputs(model, samples.x[rows])
                optimizer.zero_grad()
                F.cross_entropy(scores, samples.y[rows]).backward()
                optimizer.step()
            if masks:
                cut(model, masks)


def prune(model: nn.Module, samples: Samples, sparsity: float, epochs: int, lr: float, outputs: Outputs) -> dict[str, Tensor]:
    """Cut the smallest weights of a network, train what is left, and return the masks."""
    masks = magnitude_masks(model, sparsity)
    cut(model, masks)
    fit(model, samples, epochs, SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4), outputs, masks)
    return masks
