"""Pruning: the smallest weights of a network are cut, all layers ranked together, and stay at zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clstream.params import check_number

Masks = Mapping[str, Tensor]
"""For each pruned parameter by name, bool: which of its weights stay."""


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, by name: biases and norms are never pruned."""
    return {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Return masks that cut the share `sparsity` of all prunable weights, the smallest in magnitude, to the weight exactly."""
    check_number(0, 1, sparsity=sparsity)
    weights = prunable(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no convolution and no linear layer to prune")
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    stay = torch.ones_like(sizes, dtype=torch.bool)
    stay[sizes.topk(round(sparsity * len(sizes)), largest=False).indices] = False
    parts = stay.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


@torch.no_grad()
def cut(model: nn.Module, masks: Masks) -> None:
    """Set the weights that don't stay to zero."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weights[name].mul_(mask)


def parameter_counts(model: nn.Module, masks: Masks | None = None) -> tuple[int, int]:
    """Return how many parameters a network has, and how many of them are left by its masks."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    return dense, dense - sum(int((~mask).sum()) for mask in (masks or {}).values())
