"""Transforms that bring test samples to another shape, or corrupt them: frozen dataclasses, so that a recording can name them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clstream.params import check_choice, check_integer, check_number

KINDS = ("noise", "blur", "occlusion", "contrast")

SEVERITIES = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "blur": (0.02, 0.03, 0.045, 0.065, 0.09),
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
}
"""What severities 1 to 5 are: see `Corrupt`."""

MOST_SIDE = 1024
"""Pixels of a side at most: a recording may name any number."""


MOST_NUMBERS = 1 << 28
"""Of all images that are brought to another size together, at most."""


@dataclass(frozen=True)
class Corrupt:
    """Images with noise, blurred, partly hidden or with less contrast; severities 1 to 5 are `SEVERITIES`.

    "noise" is Gaussian, and its number the standard deviation, with white being 1. "blur" is Gaussian too, and its number the
    standard deviation as a share of the image's height. "occlusion" sets a rectangle to zero, at a place of its own in each image;
    its height and width are this share of the image's. "contrast" multiplies the distance from the mean grey of each image by its
    number. Noise has the numbers of ImageNet-C, contrast those of CIFAR-10-C (Hendrycks & Dietterich 2019).

    Images are uint8, or float from 0 to 1, (n, channels, height, width). Rows of a table, (n, features), can have noise.
    What is random is drawn from `seed`.
    """

    kind: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(KINDS, kind=self.kind)
        check_integer(1, 5, severity=self.severity)
        check_integer(0, seed=self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return inputs of the same shape and dtype. Raises ValueError for inputs that can't be corrupted so."""
        from torchvision.transforms.v2 import functional as images

        check_corruptible(x, self.kind)
        number = SEVERITIES[self.kind][self.severity - 1]
        draw = torch.Generator().manual_seed(self.seed)
        if self.kind == "noise":
            noise = number * torch.randn(x.shape, generator=draw).to(x.device)
            if x.dim() == 2:
                return x + noise
            white = 255 if x.dtype == torch.uint8 else 1
            noisy = (x + white * noise).clamp(0, white)
            return noisy.round().to(x.dtype) if white == 255 else noisy
        height, width = x.shape[2:]
        changed: Tensor
        if self.kind == "blur":
            sigma = number * height
            kernel = [min(1 + 2 * max(1, round(3 * sigma)), 2 * side - 1) for side in (width, height)]
            changed = images.gaussian_blur(x, kernel, [sigma, sigma])
        elif self.kind == "contrast":
            changed = images.adjust_contrast(x, number)
        else:
            down, across = (max(1, round(number * side)) for side in (height, width))
            top, left = (
                torch.randint(side - own + 1, (len(x), 1), generator=draw) for side, own in ((height, down), (width, across))
            )
            rows, columns = torch.arange(height), torch.arange(width)
            hidden = ((rows >= top) & (rows < top + down))[:, :, None] & ((columns >= left) & (columns < left + across))[:, None]
            changed = x.masked_fill(hidden[:, None].to(x.device), 0)
        return changed


def check_corruptible(x: Tensor, kind: str) -> None:
    """Raise ValueError, in one sentence, for inputs that a kind of corruption is not for."""
    if x.dim() == 2 and x.is_floating_point() and kind == "noise":
        return
    what = f"inputs of {tuple(x.shape[1:])} {x.dtype}"
    if x.dim() != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"{kind} is for images, (channels, height, width) of uint8 or from 0 to 1, not for {what}")
    if x.is_floating_point() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"{kind} is for images, and those of floats must be from 0 to 1, not {float(x.min()):g} to {float(x.max()):g}"
        )
    if kind == "contrast" and x.shape[1] not in (1, 3):
        raise ValueError(f"contrast is for grey images and those of three colours, not for {what}")


@dataclass(frozen=True)
class PixelNoise:
    """Images with a share of their numbers replaced by noise, exactly int(share * channels * height * width) of them in each image.

    Which these are is drawn over all channels and pixels, for each image by itself, and each becomes uniform from 0 to 1, or a
    uniform byte (the instance test of Kowadlo et al. 2024).
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(0, 1, share=self.share)
        check_integer(0, seed=self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return images of the same shape and dtype. Raises ValueError for inputs that can't be corrupted so."""
        check_corruptible(x, "noise")
        draw, flat = torch.Generator().manual_seed(self.seed), x.flatten(1)
        places = torch.rand(flat.shape, generator=draw, dtype=torch.float64).argsort(1)[:, : int(self.share * flat.shape[1])]
        noise = torch.rand(places.shape, generator=draw)
        values = (256 * noise).to(x.dtype) if x.dtype == torch.uint8 else noise.to(x.dtype)
        return flat.scatter(1, places.to(x.device), values.to(x.device)).view(x.shape)


@dataclass(frozen=True)
class Disc:
    """Images partly hidden by a disc, which is 0 in all channels.

    Its radius is int(radius * height) pixels, and a pixel belongs to it whose centre is no farther than that from its centre, which
    is drawn for each image by itself: a pixel at least the radius away from the borders above and left, and more than that from
    those below and right; the one in the middle where there is none (the instance test of Kowadlo et al. 2024). On black ink
    on white paper, as Omniglot is, 0 is ink.
    """

    radius: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(0, 0.5, radius=self.radius)
        check_integer(0, seed=self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return images of the same shape and dtype. Raises ValueError for inputs that can't be corrupted so."""
        check_corruptible(x, "occlusion")
        draw, reach = torch.Generator().manual_seed(self.seed), int(self.radius * x.shape[2])
        squares = []
        for side in x.shape[2:]:
            if side < 2 * reach:
                raise ValueError(f"a disc of radius {reach} does not fit images of {tuple(x.shape[2:])}")
            centre = reach + torch.randint(max(1, side - 2 * reach), (len(x), 1), generator=draw)
            squares.append((torch.arange(side) - centre).square())
        hidden = squares[0][:, :, None] + squares[1][:, None, :] <= reach**2
        return x.masked_fill(hidden[:, None].to(x.device), 0)


@dataclass(frozen=True)
class Fit:
    """Images in other colours, size and dtype: grey or RGB, scaled bilinearly, uint8 or float from 0 to 1; all by torchvision."""

    channels: int
    height: int
    width: int
    dtype: str

    def __post_init__(self) -> None:
        check_integer(1, 3, channels=self.channels)
        check_integer(1, MOST_SIDE, height=self.height, width=self.width)
        check_choice(("uint8", "float32"), dtype=self.dtype)
        if self.channels == 2:
            raise ValueError("channels must be 1 or 3, not 2")

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, channels, height, width). Raises ValueError for more numbers than `MOST_NUMBERS`."""
        if len(x) * self.channels * self.height * self.width > MOST_NUMBERS:
            raise ValueError(
                f"{len(x):,} images of {self.height} x {self.width} are more than {MOST_NUMBERS:,} numbers: take fewer"
            )
        from torchvision.transforms.v2 import functional as images

        if x.shape[1] != self.channels:
            x = images.rgb_to_grayscale(x, 1) if self.channels == 1 else images.grayscale_to_rgb(x)
        if x.shape[2:] != (self.height, self.width):
            x = images.resize(x, [self.height, self.width], antialias=True)
        fitted: Tensor = images.to_dtype(x, getattr(torch, self.dtype), scale=True)
        return fitted.contiguous()
