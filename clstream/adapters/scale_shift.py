"""Scale and shift: what a layer gives, times a number for each channel, plus another.

Lian, Zhou, Feng, Wang 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning" (SSF). Form implemented,
of a layer that gives y: scale * y + shift, both (channels,). They begin as 1 and 0, so that the network begins as it was; the
authors draw them around these, with a deviation of 0.02 (recalled).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clstream.adapters.adapter import AdapterLayer, ModuleAdapter


class ScaleShift(ModuleAdapter):
    """What layers give, scaled and shifted channel by channel (SSF, Lian et al. 2022).

    Args:
        modules: patterns of module names. Linear layers, convolutions, layer and batch norms are meant; others are passed over.

    """

    takes = "linear layers, convolutions, layer norms and batch norms"

    def __init__(self, modules: str | list[str] = "*") -> None:
        super().__init__(modules)

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is a layer whose channels are known."""
        return isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, _BatchNorm))

    def layer(self, name: str, host: nn.Module) -> Channels:
        """Return the scale and the shift for a host."""
        if isinstance(host, nn.LayerNorm):
            return Channels(host.normalized_shape[-1], last=True)
        if isinstance(host, nn.Linear):
            return Channels(host.out_features, last=True)
        assert isinstance(host, (nn.Conv2d, _BatchNorm))
        return Channels(host.out_channels if isinstance(host, nn.Conv2d) else host.num_features, last=False)


class Channels(AdapterLayer):
    """What ScaleShift puts on a layer: `scale` and `shift`, of the last dimension, or of the second."""

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.scale, self.shift, self.last = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), last

    def forward(self, taken: Tensor, given: Tensor) -> Tensor:
        """Return what the host gave, scaled and shifted."""
        if self.last or given.dim() == 2:
            return given * self.scale + self.shift
        shape = (-1, *[1] * (given.dim() - 2))
        return given * self.scale.view(shape) + self.shift.view(shape)
