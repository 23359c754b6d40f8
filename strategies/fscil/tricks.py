"""What the tricks of FSCIL are made of: copies of images, equiangular tight frames, and what they ask of streams and models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clstream.models import GrowingHead
from clstream.stream import Stream, StreamView

COPIES: dict[str, list[tuple[int, int]]] = {
    "none": [(0, 0)],
    "half_turn": [(0, 0), (2, 0)],
    "turns_and_channels": [(turns, shift) for turns in range(4) for shift in range(3)],
}
"""Quarter turns of each copy of an image, and by how many places its channels are rolled."""


def etf_columns(features: int, labels: int) -> Tensor:
    """Return random columns of a simplex equiangular tight frame as rows: (labels, features); ValueError for too few features."""
    if not 2 <= labels <= features:
        raise ValueError(
            f"an equiangular tight frame of {labels} labels (classes times copies) needs at least 2, and as many features, and the "
            f"model has {features}: take a wider one, or etf='none'"
        )
    return simplex(torch.linalg.qr(torch.randn(features, labels))[0]).T.contiguous()


def simplex(orthonormal: Tensor) -> Tensor:
    """Return sqrt(K / (K - 1)) Q (I - 11'/K) of (features, K) orthonormal columns: K columns with cosines of -1 / (K - 1)."""
    many = orthonormal.shape[1]
    return math.sqrt(many / (many - 1)) * (orthonormal - orthonormal.mean(1, keepdim=True))


def dot_regression(directions: Tensor, columns: Tensor) -> Tensor:
    """Return the mean of (h e - 1)^2 / 2 over rows at unit length and the columns of their classes: both (n, features)."""
    return ((directions * columns).sum(1) - 1).square().mean() / 2


def last_block(model: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices and kernels of the last of a model's `stages` that has any; TypeError if none has."""
    for stage in reversed(list(getattr(model, "stages", nn.Sequential()).children())):
        if weights := [weight for weight in stage.parameters() if weight.dim() > 1]:
            return weights
    raise TypeError(
        f"subnet of FSCIL needs a model with `stages`, as those of clstream, which {type(model).__name__} hasn't: take 0"
    )


def ranked(weight: Tensor, share: float, which: str) -> Tensor:
    """Return which entries are the share of a weight with the smallest, or the largest, absolute values: bool, of its shape."""
    many = round(share * weight.numel())
    chosen = weight.detach().abs().flatten().argsort(descending=which == "largest", stable=True)[:many]
    return torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device).index_fill(0, chosen, True).view(weight.shape)


def check_images(stream: Stream | StreamView, **tricks: bool) -> None:
    """Raise ValueError for a stream whose inputs are no images, where one of the tricks needs them."""
    if len(stream.input_shape) != 3 and any(tricks.values()):
        used = " and ".join(name for name, chosen in tricks.items() if chosen)
        raise ValueError(
            f"{used} of FSCIL needs images (channels, height, width), and {stream.name} has inputs of shape {stream.input_shape}"
        )


def check_square(stream: Stream | StreamView) -> None:
    """Raise ValueError for images that a quarter turn gives another shape."""
    _, height, width = stream.input_shape
    if height != width:
        raise ValueError(f"FSCIL turns images by quarters, which must be square, and those of {stream.name} are {height} x {width}")


def turned(x: Tensor, turns: int) -> Tensor:
    """Return (n, channels, height, width) images turned by some quarters, counterclockwise."""
    return x.rot90(turns, (2, 3))


def widths(model: nn.Module) -> tuple[int, int]:
    """Return the width of a model's features, and its number of classes; TypeError for a model that doesn't show them."""
    head = getattr(model, "head", None)
    if not callable(getattr(model, "features", None)) or not isinstance(head, (nn.Linear, GrowingHead)):
        raise TypeError(
            f"FSCIL needs a model with a method `features` and a linear `head`, as those of clstream, not {type(model).__name__}"
        )
    return head.in_features, head.out_features if isinstance(head, nn.Linear) else head.classes
