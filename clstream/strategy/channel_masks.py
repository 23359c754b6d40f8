"""Masks of channels: which ones of a network can be shut, its features with masks, its share of weights, and a pruned copy of it.

A mask is a factor of the output channels (or units) of a layer. It is computed as a factor of the columns of the layer that
follows: the same number, whatever norms per channel, nonlinearity, pooling or dropout lie between. So only layers are masked whose
outputs go through one further layer alone, which is tried: in a chain all but the last, in a residual block those within it.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from clstream.eval_mode import evaluating

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Features(nn.Module):
    """A network whose answer is its features, so that it can be called with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, features) for raw inputs."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # who makes one has asked for it
        return features


def followers(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Return for each layer that can be masked the one that follows it, by name.

    A change of its weights must be seen in the features, and no more once the columns of the other are 0; and without one of its
    channels the network must give what it gives with a mask on it.

    Args:
        model: has `features`.
        x: (n, *input_shape) raw inputs to try it with.

    """
    found, whole = dict[str, str](), Features(model)
    random = torch.Generator().manual_seed(0)
    with evaluating(whole):
        features = whole(x)
        for name, after in pairwise(layers_of(model)):
            layer, follower = (model.get_submodule(part) for part in (name, after))
            weight, columns = (model.get_parameter(f"{part}.weight") for part in (name, after))
            grouped = any(getattr(part, "groups", 1) > 1 for part in (layer, follower))
            mixes = any(isinstance(norm, (nn.GroupNorm, nn.LayerNorm)) for norm in between(model, name, after))
            if grouped or mixes or columns.shape[1] % len(weight):
                continue
            shut = {f"model.{after}.weight": torch.zeros_like(columns)}
            other = {f"model.{name}.weight": torch.randn(weight.shape, generator=random).to(weight)}
            seen = not torch.equal(functional_call(whole, other, (x,)), features)
            hidden = torch.equal(functional_call(whole, shut | other, (x,)), functional_call(whole, shut, (x,)))
            if seen and hidden and len(weight) > 1 and _can_be_pruned(model, {name: after}, len(weight), x):
                found[name] = after
    return found


def _can_be_pruned(model: nn.Module, follows: dict[str, str], channels: int, x: Tensor) -> bool:
    keep = torch.arange(channels, device=x.device) > 0
    try:
        small = Features(pruned(model, follows, [keep]))(x)
    except RuntimeError:  # of shapes: what lies between the layers is not cut as they are
        return False
    return torch.allclose(small, masked_features(model, follows, [keep.to(small)], x), rtol=1e-3, atol=1e-5)


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the linear and convolutional layers below a network's head, in the order of their definition."""
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    return [name for name in names if name.partition(".")[0] != "head"]


def between(model: nn.Module, name: str, after: str) -> list[nn.Module]:
    """Return the modules that are defined between two layers."""
    names = [own for own, _ in model.named_modules()]
    return [model.get_submodule(own) for own in names[names.index(name) + 1 : names.index(after)]]


def masked_features(model: nn.Module, follows: dict[str, str], masks: list[Tensor], x: Tensor) -> Tensor:
    """Return the (n, features) of raw inputs, with (channels,) masks on the layers of `follows`."""
    weights = dict[str, Tensor]()
    for mask, after in zip(masks, follows.values(), strict=True):
        weight = model.get_parameter(f"{after}.weight")
        columns = mask.repeat_interleave(weight.shape[1] // len(mask))
        weights[f"model.{after}.weight"] = weight * columns.view(1, -1, *[1] * (weight.dim() - 2))
    features: Tensor = functional_call(Features(model), weights, (x,))
    return features


def used_share(model: nn.Module, follows: dict[str, str], masks: list[Tensor]) -> Tensor:
    """Return the share of the layers' weights that masks leave, a scalar: sum of K |m_in| |m_out| / sum of K c_in c_out.

    K is the size of a layer's kernel, c its channels, |m| the sum of their mask; what has no mask counts whole.
    """
    of_output = dict(zip(follows, masks, strict=True))
    of_input = dict(zip(follows.values(), masks, strict=True))
    used, every = [], 0
    for name in layers_of(model):
        weight = model.get_parameter(f"{name}.weight")
        out, into = (of[name].mean() if name in of else torch.ones((), device=weight.device) for of in (of_output, of_input))
        used.append(weight.numel() * out * into)
        every += weight.numel()
    return torch.stack(used).sum() / every


@torch.no_grad()
def pruned(model: nn.Module, follows: dict[str, str], kept: list[Tensor]) -> nn.Module:
    """Return a copy of a network without the channels that are not kept, (channels,) bool for each layer of `follows`."""
    small = deepcopy(model)
    for keep, (name, after) in zip(kept, follows.items(), strict=True):
        layer: Any = small.get_submodule(name)
        follower: Any = small.get_submodule(after)
        width, rows = len(keep), keep.nonzero().flatten()
        for norm in between(small, name, after):
            if isinstance(norm, _NormBase) and norm.num_features == width:
                for part, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
                    if value.dim():
                        set_rows(norm, part, value[rows])
                norm.num_features = len(rows)
        for part, value in [*layer.named_parameters(recurse=False)]:
            set_rows(layer, part, value[rows])
        columns = keep.repeat_interleave(follower.weight.shape[1] // width)
        follower.weight = nn.Parameter(follower.weight[:, columns].clone(), follower.weight.requires_grad)
        if isinstance(layer, nn.Linear):
            layer.out_features = len(rows)
        else:
            layer.out_channels = len(rows)
        if isinstance(follower, nn.Linear):
            follower.in_features = int(columns.sum())
        else:
            follower.in_channels = len(rows)
    return small


def set_rows(module: nn.Module, name: str, rows: Tensor) -> None:
    """Have a module hold other rows as a parameter or buffer."""
    old: Tensor = getattr(module, name)
    setattr(module, name, nn.Parameter(rows.clone(), old.requires_grad) if isinstance(old, nn.Parameter) else rows.clone())
