"""Batched augmentations of raw images: each image of a batch is changed in its own way, without a loop over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


def crop_and_flip(x: Tensor) -> Tensor:
    """Return (n, channels, height, width) images cropped at random after zero-padding by 4, half of them mirrored.

    The usual augmentation for CIFAR (He et al. 2016). The dtype is kept. Draws from torch's global generator.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, (PADDING,) * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    each = torch.arange(n, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
