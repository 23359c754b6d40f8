"""Layers of the models: normalisation of raw input, and fused layers that train as their parts do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.params import check_number, check_positive


class Normalise(nn.Module):
    """Raw input to float32: uint8 divided by 255, then `(x - mean) / std`, for all channels or for each."""

    shift: Tensor | None
    scale: Tensor | None

    channels_last = True
    """Whether a CPU's images leave it with the channels last in memory: pooling them is eight times as fast."""

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        for value in mean if isinstance(mean, (list, tuple)) else [mean]:
            check_number(mean=value)
        for value in std if isinstance(std, (list, tuple)) else [std]:
            check_positive(std=value)
        plain = mean == 0.0 and std == 1.0
        for name, value in (("shift", mean), ("scale", std)):
            rows = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, None if plain else rows.reshape(-1, 1, 1) if rows.dim() else rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, ...) float32; of images on a CPU the layout is that of `channels_last`."""
        x = self.normalised(x)
        return _channels_last(x) if self.channels_last and x.dim() == 4 and x.device.type == "cpu" else x

    def normalised(self, x: Tensor) -> Tensor:
        """Return (n, ...) float32, laid out as x is."""
        x = x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)
        return x if self.shift is None or self.scale is None else (x - self.shift) / self.scale


def _channels_last(x: Tensor) -> Tensor:
    """Return (n, channels, height, width) in torch's channels-last layout, also for one channel, where torch takes any for it."""
    n, channels, height, width = x.shape
    return x.movedim(1, -1).flatten(1).view(n, height, width, channels).movedim(-1, 1)


class FlatInput(Normalise):
    """`Normalise`, then one row a sample: (n, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width) float32."""
        return self.normalised(x).flatten(1)


class PaddedInput(Normalise):
    """Zeros around raw images up to a least height and width, then `Normalise`."""

    def __init__(self, least: int, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__(mean, std)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, channels, at least least, at least least) float32."""
        high, wide = (max(self.least - size, 0) for size in x.shape[2:])
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return super().forward(x)


class LinearRelu(nn.Linear):
    """A fully connected layer and its ReLU: one module, because calling a module costs as much as a small layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear names it
        """Map (n, in_features) to (n, out_features)."""
        return F.relu(super().forward(input))


class LinearTanh(nn.Linear):
    """A fully connected layer and its hyperbolic tangent, in one module too."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear names it
        """Map (n, in_features) to (n, out_features)."""
        return super().forward(input).tanh()


class HalvingPool(nn.MaxPool2d):
    """`nn.MaxPool2d(2)`. On a CPU, answers without gradients take a tenth to four fifths of its time, and are the same."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.MaxPool2d names it
        """Map (n, channels, height, width) to (n, channels, height // 2, width // 2)."""
        if input.device.type != "cpu" or (input.requires_grad and torch.is_grad_enabled()):
            pooled: Tensor = super().forward(input)
            return pooled
        high, wide = (size // 2 * 2 for size in input.shape[-2:])
        rows = torch.maximum(input[..., 0:high:2, :], input[..., 1:high:2, :])
        return torch.maximum(rows[..., 0:wide:2], rows[..., 1:wide:2])
