"""Layers that multiply their inputs by a matrix, and what goes into them: for methods that hold weights by past inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from clstream.models import GrowingHead
from clstream.strategy.regulariser import matching

Layer = nn.Linear | nn.Conv2d | GrowingHead
"""What a matrix is taken of: (outputs, inputs), of a convolution (channels, inputs of a patch)."""


def matrix_layers(model: nn.Module, patterns: str | list[str] = "*") -> dict[str, Layer]:
    """Return the linear layers and convolutions of a model whose weight learns and matches a pattern, by name, in its order.

    Raises ValueError for a pattern that matches no parameter, for a model without such layers, and for grouped convolutions.
    """
    held = {id(weight) for weight in matching(model, patterns).values()}
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer) and id(module.weight) in held:
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                raise ValueError(f"{name} is a convolution of {module.groups} groups, and only those of one group can be held")
            layers[name] = module
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer or 2d convolution among {patterns}, so no inputs to hold it by"
        )
    return layers


def layers_by_name(model: nn.Module, names: list[str]) -> dict[str, Layer]:
    """Return layers of a model by their names."""
    return {name: cast(Layer, model.get_submodule(name)) for name in names}


def other_parameters(model: nn.Module, patterns: str | list[str], layers: dict[str, Layer], biases: bool) -> list[str]:
    """Return the names of the parameters that match a pattern and are no matrix of these layers; with `biases`, no bias either."""
    own = {id(layer.weight) for layer in layers.values()} | {id(layer.bias) for layer in layers.values() if biases}
    return [name for name, weight in matching(model, patterns).items() if id(weight) not in own]


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer's matrix multiplies, (rows, inputs): of a convolution a row for each patch of each image."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.mT.flatten(0, 1)


@contextmanager
def inputs_of(layers: dict[str, Layer]) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, note what goes into layers, detached, by name: one tensor for each time that the layer is asked."""
    noted: dict[str, list[Tensor]] = {name: [] for name in layers}
    names = {id(layer): name for name, layer in layers.items()}

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        noted[names[id(layer)]].append(given[0].detach())

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
