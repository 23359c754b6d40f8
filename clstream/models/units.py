"""Hidden units of a network: which layer makes each, and which layer alone takes it.

A linear layer's units are its outputs, a convolution's are its channels. Their activations are what goes into the layer that takes
them: after a nonlinearity, norm or pooling between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.models.heads import GrowingHead

MAKERS = (nn.Linear, nn.Conv2d, nn.Conv1d)


@dataclass(frozen=True, eq=False)
class HiddenUnits:
    """The units between two layers.

    Args:
        names: of the two layers, in the model.
        maker: the layer that makes them: row i of its weight, and of its bias, makes unit i.
        taker: the only layer that takes them.

    """

    names: tuple[str, str]
    maker: nn.Module
    taker: nn.Module

    @property
    def incoming(self) -> Tensor:
        """The (units, ...) weight that makes them."""
        weight: Tensor = self.maker.weight  # type: ignore[assignment]  # a layer of MAKERS
        return weight

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.incoming)

    @property
    def outgoing(self) -> Tensor:
        """The weight that takes them, as a view: (outputs, units, inputs of each unit)."""
        weight: Tensor = self.taker.weight  # type: ignore[assignment]  # as above
        return weight.view(len(weight), len(self), -1)

    def activations_of(self, taken: Tensor) -> Tensor:
        """Return (n, units, places) of what went into the taker, which may take each unit in several places of an image or text."""
        if isinstance(self.taker, nn.Linear) and taken.dim() > 2:
            taken = taken.movedim(-1, 1)
        return taken.reshape(len(taken), len(self), -1)

    def initial_bound(self) -> float:
        """Return the bound of uniform numbers that spread as the incoming weights do now: asked before anything is learned."""
        return 3**0.5 * float(self.incoming.detach().std(correction=0))

    @torch.no_grad()
    def renew(self, chosen: Tensor, bound: float, random: torch.Generator, optimizer: Optimizer) -> None:
        """Start units anew: new incoming weights, no bias, and outgoing weights of 0; the optimizer forgets what it knew of them.

        Args:
            chosen: (units,), bool.
            bound: of the new incoming weights, which are uniform.
            random: draws them, on the CPU.
            optimizer: of the weights; of its state the numbers of each weight become 0, its count of steps stays.

        """
        weight = self.incoming
        drawn = (bound * (2 * torch.rand(weight.shape, generator=random) - 1)).to(weight)
        rows = chosen.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_(torch.where(rows, drawn, weight))
        bias = self.maker.bias
        masks = {weight: rows, self.taker.weight: self._taken(chosen)}
        if isinstance(bias, Tensor):
            bias.masked_fill_(chosen, 0)
            masks[bias] = chosen
        self.outgoing.masked_fill_(chosen[:, None], 0)
        for parameter, mask in masks.items():
            for value in optimizer.state.get(parameter, {}).values():  # type: ignore[arg-type]  # a layer of MAKERS
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(mask, 0)

    def _taken(self, chosen: Tensor) -> Tensor:
        """Return which of the taker's weights take chosen units, in a shape that broadcasts to them."""
        weight: Tensor = self.taker.weight  # type: ignore[assignment]  # a layer of MAKERS
        return chosen[:, None].expand(len(self), weight[0].numel() // len(self)).reshape(1, *weight.shape[1:])


def hidden_units(model: nn.Module, x: Tensor) -> list[HiddenUnits]:
    """Return the units of a network, layer by layer, that are made by one layer alone and taken by one other alone.

    Where something goes around a layer, as in residual networks, they are left out: that is tried out on the inputs.

    Args:
        model: (n, *input_shape) raw inputs to (n, outputs). It is asked in evaluation mode, and left as it is.
        x: some raw inputs, no two of them alike.

    Raises:
        ValueError: for a network without any.

    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            found = list(_chained(model, x))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no hidden units that one layer makes and another takes: a chain of linear layers and "
            "convolutions has"
        )
    return found


def _chained(model: nn.Module, x: Tensor) -> Iterator[HiddenUnits]:
    order: list[tuple[str, nn.Module]] = []
    names = {module: name for name, module in model.named_modules() if isinstance(module, (*MAKERS, GrowingHead))}
    hooks = [module.register_forward_pre_hook(lambda layer, _: order.append((names[layer], layer))) for module in names]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [module for _, module in order]
    for (name, maker), (other, taker) in pairwise(order):
        weights: Tensor = maker.weight  # type: ignore[assignment]  # a layer of MAKERS
        taken: Tensor = taker.weight  # type: ignore[assignment]  # as above
        once = layers.count(maker) == layers.count(taker) == 1 and not isinstance(maker, GrowingHead)
        if once and not taken.shape[1] % len(weights) and _are_between(model, x, maker, taker):
            yield HiddenUnits((name, other), maker, taker)


def units_between(model: nn.Module, names: Sequence[tuple[str, str]]) -> list[HiddenUnits]:
    """Return the units between layers of a model, by the names of these: what `hidden_units` found."""
    return [HiddenUnits(pair, model.get_submodule(pair[0]), model.get_submodule(pair[1])) for pair in names]


def _are_between(model: nn.Module, x: Tensor, maker: nn.Module, taker: nn.Module) -> bool:
    """Return whether all that one layer makes goes into another one alone, and nothing else does."""
    taken: list[Tensor] = []

    def shut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        taken.append(inputs[0])
        return (torch.zeros_like(inputs[0]),)

    with ExitStack() as hooks:
        hooks.callback(taker.register_forward_pre_hook(shut).remove)
        before = model(x)
        hooks.callback(maker.register_forward_hook(lambda _layer, _inputs, output: torch.zeros_like(output)).remove)
        after = model(x)
    return torch.equal(before, after) and torch.equal(taken[1], taken[1][:1].expand_as(taken[1]))


@contextmanager
def noting(units: Sequence[HiddenUnits]) -> Iterator[list[Tensor]]:
    """Within it, note what units are in each forward pass, detached: the newest (n, units, places), layer by layer."""
    noted: list[Tensor] = [torch.empty(0)] * len(units)

    def note(place: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            noted[place] = units[place].activations_of(inputs[0].detach())

        return hook

    hooks = [layer.taker.register_forward_pre_hook(note(place)) for place, layer in enumerate(units)]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
