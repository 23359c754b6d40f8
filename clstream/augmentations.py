"""Augmentations: batched functions of raw inputs, and mixtures of two samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.params import check_bool, check_choice, check_number, check_positive

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
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@dataclass(frozen=True)
class CropFlipJitter:
    """Random crops and flips, colour jitter and grayscale: float32 images from 0 to 1 out of uint8 ones, or floats from 0 to 1.

    A jittered image gets, in this order, brightness added, contrast multiplied, and the saturation of HSV multiplied, each by an
    amount of its own, and is clamped to 0..1 after each. Images of one channel have no saturation, and are gray already. Draws
    from torch's global generator.

    Args:
        brightness, contrast, saturation: the most that is added or taken away: to pixels, and to factors of 1.
        jitter, grayscale: the share of images that get it.
        clamp_quirk: jitter as if on images from -1 to 1, clamped to 0..1 all the same: whatever is darker than mid-grey becomes it.

    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    jitter: float = 0.8
    grayscale: float = 0.2
    clamp_quirk: bool = False

    def __post_init__(self) -> None:
        check_number(0, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        check_number(0, 1, jitter=self.jitter, grayscale=self.grayscale)
        check_bool(clamp_quirk=self.clamp_quirk)

    def __call__(self, x: Tensor) -> Tensor:
        """Return augmented (n, channels, height, width) images."""
        x = crop_and_flip(x)
        x = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x
        jittered = (self.jittered(2 * x - 1) + 1) / 2 if self.clamp_quirk else self.jittered(x)
        x = torch.where(_uniform(x) < self.jitter, jittered, x)
        return torch.where(_uniform(x) < self.grayscale, gray(x), x)

    def jittered(self, x: Tensor) -> Tensor:
        """Return every image with its colours changed, from 0 to 1."""
        amounts = [spread * (2 * _uniform(x) - 1) for spread in (self.brightness, self.contrast, self.saturation)]
        x = ((x + amounts[0]).clamp(0, 1) * (1 + amounts[1])).clamp(0, 1)
        value, range_ = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        most = value / range_.clamp(min=torch.finfo(x.dtype).tiny)  # beyond it the saturation would pass 1
        return (value - torch.minimum(1 + amounts[2], most) * (value - x)).clamp(0, 1)


@dataclass(frozen=True)
class ContrastiveViews:
    """The views of SimCLR (Chen et al. 2020): float32 images from 0 to 1 out of uint8 ones, or floats from 0 to 1.

    In this order: a random resized crop of the size of the image (a share of its area, an aspect ratio from 3/4 to 4/3, bilinear),
    mirrored in half of the images; colour jitter; grayscale; Gaussian blur with a deviation of 0.1 to 2 pixels, over a tenth of the
    side, at least 3 pixels. Each image draws its own amounts, from torch's global generator. Of the jitter images of one channel
    have brightness and contrast alone.

    Deviations: a crop that is too long is cut to the image, not drawn anew; the parts of the jitter come in one order (brightness,
    contrast, saturation, hue), not in a random one; hue is turned about the grey axis of RGB, not in HSV.

    Args:
        smallest: the least share of the image's area that a crop has.
        flip: whether images are mirrored. None: those of three channels are; mirrored digits would be no digits.
        jitter: strength of the colour jitter: factors are from 1 - 0.8 jitter to 1 + 0.8 jitter, and hue turns by up to 0.2 jitter
            of a circle. The paper has 1.0 for ImageNet, and 0.5 for CIFAR-10.
        jittered, grayscale, blur: the share of images that get it. The paper leaves out blur on CIFAR-10.

    """

    smallest: float = 0.08
    flip: bool | None = None
    jitter: float = 0.5
    jittered: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5

    def __post_init__(self) -> None:
        check_number(0, 1, smallest=self.smallest, jittered=self.jittered, grayscale=self.grayscale, blur=self.blur)
        check_positive(smallest=self.smallest)
        check_number(0, 1.25, jitter=self.jitter)
        check_bool(none=True, flip=self.flip)

    def __call__(self, x: Tensor) -> Tensor:
        """Return a view of each of (n, channels, height, width) images."""
        x = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32)
        x = self.cropped(x)
        if self.jitter and self.jittered:
            x = torch.where(_uniform(x) < self.jittered, self.coloured(x), x)
        if self.grayscale and x.shape[1] == 3:
            x = torch.where(_uniform(x) < self.grayscale, gray(x), x)
        return torch.where(_uniform(x) < self.blur, self.blurred(x), x) if self.blur else x

    def cropped(self, x: Tensor) -> Tensor:
        """Return a random crop of each image, in the image's size, mirrored or not."""
        n, channels, height, width = x.shape
        area, shape, top, left, mirrored = torch.rand(5, n, device=x.device)
        area = self.smallest + (1 - self.smallest) * area
        root = ((2 * shape - 1) * math.log(4 / 3) / 2).exp()  # of the aspect ratio in pixels
        wide = (area.sqrt() * root * math.sqrt(height / width)).clamp(max=1)  # shares of the sides
        high = (area.sqrt() / root * math.sqrt(width / height)).clamp(max=1)
        flips = channels == 3 if self.flip is None else self.flip
        sign = torch.where(mirrored < 0.5, -1.0, 1.0) if flips else 1.0
        none = torch.zeros_like(wide)
        rows = [[wide * sign, none, (1 - wide) * (2 * left - 1)], [none, high, (1 - high) * (2 * top - 1)]]
        places = torch.stack([torch.stack(row, 1) for row in rows], 1).to(x.dtype)
        grid = F.affine_grid(places, [n, channels, height, width], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def coloured(self, x: Tensor) -> Tensor:
        """Return every image with brightness, contrast, saturation and hue changed, from 0 to 1."""
        brightness, contrast, saturation = (1 + 0.8 * self.jitter * (2 * _uniform(x) - 1) for _ in range(3))
        x = (brightness * x).clamp(0, 1)
        mean = gray(x).mean((1, 2, 3), keepdim=True)
        x = (mean + contrast * (x - mean)).clamp(0, 1)
        if x.shape[1] != 3:
            return x
        x = torch.lerp(gray(x), x, saturation).clamp(0, 1)
        angle = 0.4 * math.pi * self.jitter * (2 * _uniform(x) - 1)
        across = x.roll(1, 1) - x.roll(-1, 1)  # the cross product with (1, 1, 1)
        grey = x.mean(1, keepdim=True)
        return (grey + angle.cos() * (x - grey) + angle.sin() / math.sqrt(3) * across).clamp(0, 1)

    def blurred(self, x: Tensor) -> Tensor:
        """Return every image blurred; at the border the image goes on as it ends."""
        n, channels, height, width = x.shape
        reach = max(1, round(min(height, width) / 20))
        deviation = 0.1 + 1.9 * torch.rand(n, 1, device=x.device)
        weights = torch.exp(-((torch.arange(-reach, reach + 1, device=x.device) / deviation) ** 2) / 2)
        weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype).repeat_interleave(channels, 0)[:, None, None]
        planes = F.pad(x.reshape(1, n * channels, height, width), (reach,) * 4, mode="replicate")
        planes = F.conv2d(planes, weights, groups=n * channels)
        return F.conv2d(planes, weights.mT, groups=n * channels).view(x.shape)


def gray(x: Tensor) -> Tensor:
    """Return images with the luma of red, green and blue in each channel; with another number of channels, their mean."""
    weights = [0.299, 0.587, 0.114] if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1]
    return (x * x.new_tensor(weights)[:, None, None]).sum(1, keepdim=True).expand_as(x)


def _uniform(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, device=x.device)


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
