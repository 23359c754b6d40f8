"""A network that is a chain: layers of units, each followed by a ReLU, entered at the input or at a cut further up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clstream.models import Classifier, GrowingHead
from clstream.models.layers import LinearRelu, Normalise

BETWEEN = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of a chain: its units are the output channels of a convolution, or the outputs of a linear layer.

    Args:
        name: of the stage of the model that it is alone in, else its own.
        module: holds the weight, (units, inputs, ...), and perhaps a bias.
        early: whether it lies below the cut.
        span: how many of its inputs come from one unit of the layer before; of the first layer, 1.

    """

    name: str
    module: nn.Conv2d | nn.Linear
    early: bool
    span: int

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self.module.weight)

    @property
    def inputs(self) -> int:
        """The number of its inputs: channels, or features."""
        return self.module.weight.shape[1]

    @property
    def kernel(self) -> int:
        """The number of weights of one connection: those of a convolution's kernel, or 1."""
        return self.module.weight[0, 0].numel()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A path's part of one layer: which of its units, and which of its inputs (None: all); (n,), int64."""

    outputs: Tensor
    inputs: Tensor | None


Path = tuple[Step, ...]


class Chain:
    """The layers of a model below its head, in order, and the two ways in.

    Args:
        model: a `Classifier` of clstream.models or an `nn.Sequential`, of Conv2d and Linear layers. Each is followed by a ReLU,
            perhaps with pooling or Flatten around it; a last Linear without one is the head, and is left out.
        cut: the name of a module within it; `below` ends, and `above` begins, after it. None: the Classifier's own, if layers
            follow it; else before the first linear layer, which may be at the input itself.

    Raises:
        TypeError, ValueError: for another model, or a module within it that a chain can't have; the message names it.

    """

    def __init__(self, model: nn.Module, cut: str | None = None) -> None:
        body = model.stages if isinstance(model, Classifier) else model
        if not isinstance(body, nn.Sequential):
            raise TypeError(
                f"a chain of layers is a Classifier of clstream.models or an nn.Sequential, not a {type(model).__name__}: "
                "its layers must follow one another"
            )
        named = [(name, module) for name, module in body.named_modules(remove_duplicate=False) if name]
        leaves = [(name, module) for name, module in named if not isinstance(module, nn.Sequential)]
        if len({id(module) for _, module in leaves if _has_units(module)}) < sum(_has_units(module) for _, module in leaves):
            raise ValueError("a layer comes twice in this chain: each must have weights of its own")
        self.head, leaves = _split_head(model, leaves)
        _check(leaves)
        self.layers: list[Layer] = []
        at = _position(model, cut, named, leaves)
        self.cut = leaves[at - 1][0] if at else "input"
        units = 0
        for place, (name, module) in enumerate(leaves):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                inputs = module.weight.shape[1]
                if units and inputs % units:
                    raise ValueError(f"{name} has {inputs} inputs, which {units} units before it can't share evenly")
                stage = name.partition(".")[0]
                alone = sum(_has_units(leaf) for other, leaf in leaves if other.partition(".")[0] == stage) == 1
                self.layers.append(Layer(stage if alone else name, module, place < at, inputs // units if units else 1))
                units = len(module.weight)
        if not self.layers or self.layers[-1].early:
            raise ValueError(f"there is no layer above the cut {self.cut!r}: choose one further down")
        self.early = sum(layer.early for layer in self.layers)
        self._below, self._above = ([module for _, module in part] for part in (leaves[:at], leaves[at:]))

    @property
    def width(self) -> int:
        """The number of units of the last layer."""
        return self.layers[-1].units

    def below(self, x: Tensor, path: Path | None = None) -> Tensor:
        """Map raw (n, *input_shape) inputs to the activations at the cut: (n, ...); along a path, to those of its units."""
        return _through(self._below, x, None if path is None else path[: self.early])

    def above(self, activations: Tensor, path: Path | None = None) -> Tensor:
        """Map activations at the cut to those of the last layer: (n, width); along a path, of its units to its units."""
        return _through(self._above, activations, None if path is None else path[self.early :])

    def path(self, units: Sequence[Tensor]) -> Path:
        """Return the path through some units of each layer, numbered in an (n,) int64 tensor each.

        What is left out must have no connections to what is in it: then both ways in give the same along the path as without.
        """
        steps: list[Step] = []
        for layer, outputs in zip(self.layers, units, strict=True):
            if steps:
                spans = torch.arange(layer.span, device=outputs.device)
                steps.append(Step(outputs, (steps[-1].outputs[:, None] * layer.span + spans).flatten()))
            else:
                steps.append(Step(outputs, None))
        return tuple(steps)

    def along(self, activations: Tensor, path: Path) -> Tensor:
        """Return of (n, ...) activations at the cut those of a path's units."""
        if not self.early:
            return activations
        last = self.layers[self.early - 1]
        units = path[self.early - 1].outputs if activations.shape[1] == last.units else path[self.early].inputs
        return activations if units is None else activations.index_select(1, units)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights and biases of the layers."""
        for layer in self.layers:
            yield from layer.module.parameters()

    @torch.no_grad()
    def activity(self, x: Tensor) -> list[Tensor]:
        """Return for each layer the sum of each unit's activations over samples and positions, after ReLU, before pooling.

        Each is (units,), float64.
        """
        sums = []
        for module in (*self._below, *self._above):
            x = module(x)
            if _has_units(module):
                positive = F.relu(x)
                sums.append(positive.flatten(2).sum(2).double().sum(0) if x.dim() > 2 else positive.double().sum(0))
        return sums


def _through(modules: list[nn.Module], x: Tensor, path: Path | None) -> Tensor:
    """Put x through modules; those with units compute what a path has of them only."""
    steps = iter(path or ())
    for module in modules:
        if path is None or not _has_units(module):
            x = module(x)
            continue
        step = next(steps)
        weights = {name: weight.index_select(0, step.outputs) for name, weight in module.named_parameters()}
        if step.inputs is not None:
            weights["weight"] = weights["weight"].index_select(1, step.inputs)
        x = functional_call(module, weights, (x,))
    return x


def _has_units(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _split_head(model: nn.Module, leaves: list[tuple[str, nn.Module]]) -> tuple[nn.Module | None, list[tuple[str, nn.Module]]]:
    """Return the head, and the leaves below it."""
    if isinstance(model, Classifier):
        return model.head, leaves
    last = leaves[-1][1] if leaves else None
    if isinstance(last, GrowingHead) or (isinstance(last, nn.Linear) and not isinstance(last, LinearRelu)):
        return last, leaves[:-1]
    return None, leaves


def _check(leaves: list[tuple[str, nn.Module]]) -> None:
    """Refuse what a chain can't have, by name."""
    ready = True  # for a layer with units: what came before was put through a ReLU, or is the input
    started = False
    for name, module in leaves:
        if isinstance(module, Normalise) and not started:
            continue
        if _has_units(module):
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                raise ValueError(f"{name} is a convolution of {module.groups} groups: a chain takes ungrouped ones")
            if not ready:
                raise ValueError(f"there is no ReLU before {name}: a chain needs one after each of its layers")
            started, ready = True, isinstance(module, LinearRelu)
        elif isinstance(module, BETWEEN):
            ready = ready or isinstance(module, nn.ReLU)
        else:
            raise TypeError(
                f"{name} is a {type(module).__name__}, which a chain can't have: Conv2d and Linear layers, with ReLU, pooling and "
                "Flatten between them, one after the other"
            )
    if not ready:
        raise ValueError("there is no ReLU after the last layer below the head: a chain needs one after each of its layers")


def _position(model: nn.Module, cut: str | None, named: list[tuple[str, nn.Module]], leaves: list[tuple[str, nn.Module]]) -> int:
    """Return how many leaves lie below the cut."""
    names = [name for name, _ in leaves]

    def after(cut: str) -> int:
        inside = [place for place, name in enumerate(names) if name == cut or name.startswith(f"{cut}.")]
        return inside[-1] + 1 if inside else 0

    if cut is not None:
        if not after(cut):
            raise ValueError(f"the cut must be one of {', '.join(name for name, _ in named)}, not {cut!r}")
        return after(cut)
    if isinstance(model, Classifier) and any(_has_units(module) for _, module in leaves[after(model.cut) :]):
        return after(model.cut)
    return next((place for place, (_, module) in enumerate(leaves) if isinstance(module, nn.Linear)), len(leaves))
