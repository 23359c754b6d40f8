"""Heads that grow with the classes, and networks that get outputs for more of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from clstream.params import check_positive


class CosineHead(nn.Linear):
    """A head with an output for each class from the start: `scale` times the cosine of the features and the class's weights.

    There is no bias, and how long the weights are doesn't matter, so that no class is ahead because it came last.
    """

    def __init__(self, in_features: int, classes: int, scale: float = 10.0) -> None:
        super().__init__(in_features, classes, bias=False)
        check_positive(scale=scale)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_features) to (n, classes); features that are all 0 give 0."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class GrowingHead(nn.Module):
    """A linear head with an output for each class seen so far; a class not seen yet scores -inf.

    Rows come in the order in which classes arrive (`grow`), so nothing of the future is in the initial weights.
    """

    labels: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, classes: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(0)) if bias else None)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_features) to (n, classes)."""
        seen = F.linear(features, self.weight, self.bias)
        return seen.new_full((len(features), self.classes), float("-inf")).index_copy(1, self.labels, seen)

    def grow(self, labels: Sequence[int]) -> int:
        """Add an output for each label that has none, and return how many; the parameters stay the same objects.

        Raises ValueError for a label that is not one of the classes.
        """
        old = set(self.labels.tolist())
        new = [label for label in dict.fromkeys(labels) if label not in old]
        if outside := [label for label in new if not 0 <= label < self.classes]:
            raise ValueError(f"a head for {self.classes} classes has no outputs for the labels {outside}")
        if not new:
            return 0
        bound = 1 / math.sqrt(self.in_features)  # as nn.Linear draws its weights and biases
        for parameter in self.parameters():
            more = torch.empty(len(new), *parameter.shape[1:]).uniform_(-bound, bound).to(parameter)
            parameter.data = torch.cat([parameter.data, more])
            parameter.grad = None
        self.labels = torch.cat([self.labels, torch.tensor(new).to(self.labels)])
        return len(new)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take as many rows as the state has, then load them."""
        for name in ("weight", "bias", "labels"):
            stored, own = state.get(prefix + name), getattr(self, name)
            if isinstance(stored, Tensor) and isinstance(own, Tensor) and stored.shape[1:] == own.shape[1:]:
                own.data = stored.detach().to(own, copy=True)
        super()._load_from_state_dict(state, prefix, *rest)


def grow_heads(model: nn.Module, optimizers: Sequence[Optimizer], labels: Callable[[], Sequence[int]]) -> None:
    """Grow each GrowingHead of a model by what is new in `labels()`; what optimizers know of the old rows is kept."""
    for head in [module for module in model.modules() if isinstance(module, GrowingHead)]:
        before = len(head.weight)
        if not head.grow(labels()):
            continue
        for optimizer in optimizers:
            grow_state(optimizer, dict.fromkeys(head.parameters(), before))


def widen(model: nn.Module, classes: int) -> None:
    """Give the GrowingHeads of a model room for more classes; they get outputs for them when these come."""
    for head in model.modules():
        if isinstance(head, GrowingHead):
            head.classes = max(head.classes, classes)


def grow(model: nn.Module, classes: int, random: torch.Generator | None = None) -> str:
    """Give a network outputs for more classes, in place, as its last layer; return the name of the layer that got them.

    The new rows come after the old ones, which stay as they are, and are drawn as `nn.Linear` draws its own. The parameters stay
    the same objects. A GrowingHead is given room: it draws its outputs when the classes come. A network with as many outputs
    already stays as it is; then, and with a GrowingHead, the name is "".

    Args:
        model: its `head`, or else its last linear layer, has an output for each class.
        classes: how many classes there are now.
        random: draws the new weights. None: torch's global generator.

    Raises:
        ValueError: for a network without such a layer, or one that is parametrized.

    """
    if any(isinstance(module, GrowingHead) for module in model.modules()):
        widen(model, classes)
        return ""
    name = output_layer(model)
    layer: Any = model.get_submodule(name)
    more = classes - layer.out_features
    if more <= 0:
        return ""
    bound = 1 / math.sqrt(layer.in_features)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            rows = torch.empty(more, *parameter.shape[1:]).uniform_(-bound, bound, generator=random)
            parameter.data = torch.cat([parameter.data, rows.to(parameter)])
            parameter.grad = None
    layer.out_features = classes
    return name or type(model).__name__


def output_layer(model: nn.Module) -> str:
    """Return the name of the linear layer that has the outputs of a network: its `head`, else the last one; "" is itself.

    Raises ValueError if there is none, or its weights are computed from others.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = linear[-1:] if "head" not in linear else ["head"]
    if not own or is_parametrized(model.get_submodule(own[0])):
        what = "no linear layer that has its outputs" if not own else f"the layer {own[0]!r} for its outputs, which is parametrized"
        raise ValueError(
            f"{type(model).__name__} has {what}, so it can't get more of them: build it with outputs for all classes, or with a "
            "clstream.models.GrowingHead"
        )
    return own[0]


def grow_state(optimizer: Optimizer, before: dict[nn.Parameter, int]) -> None:
    """Give an optimizer zeros for rows that parameters got since; `before` has how many rows they had."""
    for parameter, rows in before.items():
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == (rows, *parameter.shape[1:]):
                optimizer.state[parameter][name] = pad_rows(value, parameter)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"fixed": nn.Linear, "growing": GrowingHead, "cosine": CosineHead}


def pad_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with rows of zeros for those that a growing head got since."""
    if tensor.shape == like.shape:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(like) - len(tensor), *tensor.shape[1:])])
