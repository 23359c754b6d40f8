"""Mixing: two images in one, with a label between theirs; for whole batches, each mixed with another image of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.params import check_choice

MIXES = ("cutmix", "resizemix")
SMALLEST, LARGEST = 0.1, 0.8
"""The sides of a pasted image in ResizeMix, relative to those of the image."""


def mix(kind: str, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return mixed images and their (n, classes) targets, float32, each row of sum 1. Draws from torch's global generator.

    Args:
        kind: "cutmix" (Yun et al. 2019, by torchvision, alpha 1: a rectangle of another image in its place) or "resizemix" (Qin et
            al. 2020: another image, shrunk to 0.1 to 0.8 of its sides, anywhere). One size and place is drawn for the batch.
        x: (n, channels, height, width) images of any dtype.
        y: (n,) labels, int64.
        classes: number of columns of the targets.

    Raises:
        ValueError: for another kind, or inputs that are no images.

    """
    check_mix(kind)
    if x.dim() != 4:
        raise ValueError(f"{kind} mixes images (n, channels, height, width), not inputs of shape {tuple(x.shape)}")
    if kind == "cutmix":
        from torchvision.transforms.v2 import CutMix

        mixed, targets = CutMix(num_classes=classes)(x, y)
        return mixed, targets
    return _resizemix(x, y, classes)


def check_mix(kind: str) -> None:
    """Raise ValueError for a kind of mixing that there is not."""
    check_choice(MIXES, mix=kind)


def _resizemix(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    from torchvision.transforms.v2.functional import resize

    height, width = x.shape[2:]
    scale = SMALLEST + (LARGEST - SMALLEST) * float(torch.rand(()))
    tall, wide = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (int(torch.randint(room + 1, ())) for room in (height - tall, width - wide))
    mixed = x.clone()
    mixed[:, :, top : top + tall, left : left + wide] = resize(x.roll(1, 0), [tall, wide])
    share = tall * wide / (height * width)
    targets = F.one_hot(y, classes).to(torch.float32)
    return mixed, (1 - share) * targets + share * targets.roll(1, 0)
