"""TAME's experts: networks drawn anew, with as many outputs as there are classes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.drift_detection import LossWindow
from clstream.memory import Reservoir
from clstream.models import GrowingHead
from clstream.params import HasParams


@dataclass(slots=True, eq=False)
class Expert:
    """A network, its optimizer, and its losses so far; `memory` and `masks` are for pruning."""

    model: nn.Module
    optimizer: Optimizer
    loss_window: LossWindow
    memory: Reservoir | None
    steps: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)


def check_redrawable(model: nn.Module, anew: bool, selector: bool) -> None:
    """Refuse a model that no further experts, or no selector, can be made from."""
    if any(isinstance(module, GrowingHead) for module in model.modules()):
        raise ValueError("the experts of TAME have the same outputs from the start: build the model with head='fixed'")
    if next(model.parameters(), None) is None:
        raise ValueError(f"TAME trains experts, and {type(model).__name__} has no parameters")
    if isinstance(model, HasParams):
        return
    fixed = [
        type(module).__name__
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters")
    ]
    if fixed and (anew or selector):
        raise ValueError(
            f"TAME can't draw the weights of {fixed[0]} anew: give it a method reset_parameters, or TAME initial='given' and "
            "selector='mlp'"
        )
    if selector and not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no linear layer to make a selector of: give TAME selector='mlp'")


def redrawn(model: nn.Module) -> nn.Module:
    """Return a network of the same architecture with weights from torch's global generator, as the first one had them."""
    if isinstance(model, HasParams):
        return type(model)(**model.params)
    network = deepcopy(model)
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return network


def with_outputs(model: nn.Module, n: int) -> nn.Module:
    """Return a network of the same architecture, but for the number of its outputs, with weights drawn anew."""
    if isinstance(model, HasParams) and "classes" in model.params:
        return type(model)(**model.params | {"classes": n})
    network = redrawn(model)
    name, last = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    head = nn.Linear(last.in_features, n, bias=last.bias is not None)
    if not name:
        return head
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, head)
    return network
