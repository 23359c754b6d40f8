"""Ensembles: networks of one architecture answer together, in one batched call over their stacked weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.conv import _ConvNd


class Ensemble:
    """Networks that answer together, in evaluation mode; their own modes stay as they are.

    Their weights are copied: `refresh` has to say when one has learned. Convolutions on a CPU are asked one by one, without copies:
    batched over weights, they take twice as long there. So are networks that `torch.func.vmap` refuses.

    Args:
        models: of one architecture.

    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.architecture = deepcopy(models[0]).eval()
        slow = any(isinstance(module, _ConvNd) and module.weight.device.type == "cpu" for module in models[0].modules())
        self.batched = len(models) > 1 and not slow
        self.rows: dict[str, Tensor] = {}
        if self.batched:
            parameters, buffers = stack_module_state(self.models)
            self.rows = {name: rows.detach() for name, rows in (parameters | buffers).items()}

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        """Copy the weights of one network anew."""
        if self.batched:
            for name, value in state_of(self.models[number]).items():
                self.rows[name][number].copy_(value)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """Return (networks, n, outputs) for raw inputs."""
        if self.batched:
            try:
                outputs: Tensor = vmap(self._answer, in_dims=(0, None))(self.rows, x)
                return outputs
            except (RuntimeError, ValueError):  # something in it can't be batched; a real error shows below as well
                self.batched = False
        return torch.stack([self.outputs_of(number, x) for number in range(len(self.models))])

    @torch.no_grad()
    def outputs_of(self, number: int, x: Tensor) -> Tensor:
        """Return (n, outputs) of one network, as it is now."""
        return self._answer(state_of(self.models[number]), x)

    def _answer(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.architecture, state, (x,))
        return outputs


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, with the buffers that a state dict leaves out."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
