"""Transforms of a data set, sample by sample, in torchvision's way: which are random, and how those act on whole batches.

A chain of transforms is parted in two. What is deterministic is applied once, when the samples are read. What is random is taken
out and becomes a batched function of what was read, if it gives the same there: crops and flips move pixels, so they may come after
transforms that change each pixel by itself (to a tensor, normalisation), if what a crop fills in has gone through these too.

    [RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor(), Normalize(mean, std)]

is read as ToTensor and Normalize, and then learned through Crop(padding 4, filled with -mean / std) and Flip, a batch at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.seeds import isolated

BY_PIXEL = ("ToTensor", "PILToTensor", "ConvertImageDtype", "Normalize", "ToImage", "ToDtype", "ToPureTensor")
"""Those of torchvision that change each pixel by itself."""

RANDOM = ("ColorJitter", "GaussianBlur", "GaussianNoise", "ElasticTransform", "AutoAugment", "RandAugment", "TrivialAugmentWide",
          "AugMix", "ScaleJitter", "MixUp", "CutMix")  # fmt: skip
"""Those of torchvision that are random without saying so in their name."""


@dataclass(frozen=True)
class Crop:
    """Images cropped at random to the size that they have, after padding.

    Args:
        padding: left, top, right, bottom.
        fill: the value of the padding, for each channel.

    """

    padding: tuple[int, int, int, int]
    fill: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return cropped (n, channels, height, width) images, each in its own way; the dtype is kept."""
        n, channels, height, width = x.shape
        left, top, right, bottom = self.padding
        fill = torch.tensor(self.fill, device=x.device).to(x.dtype)[:, None, None]
        padded = F.pad(x, (left, right, top, bottom))
        inside = F.pad(x.new_ones(1, 1, height, width), (left, right, top, bottom)).bool()
        padded = torch.where(inside, padded, fill.expand(channels, 1, 1))
        rows = torch.randint(top + bottom + 1, (n, 1), device=x.device) + torch.arange(height, device=x.device)
        columns = torch.randint(left + right + 1, (n, 1), device=x.device) + torch.arange(width, device=x.device)
        image = torch.arange(n, device=x.device)[:, None, None]
        return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@dataclass(frozen=True)
class Flip:
    """Images mirrored, each with a probability.

    Args:
        probability: of each image.
        axis: -1 mirrors left and right, -2 top and bottom.

    """

    probability: float
    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, channels, height, width) images, some of them mirrored."""
        chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < self.probability
        return torch.where(chosen, x.flip(self.axis), x)


@dataclass(frozen=True)
class Steps:
    """Batched steps, one after the other."""

    steps: tuple[Crop | Flip, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the last step gives."""
        for step in self.steps:
            x = step(x)
        return x


@dataclass(frozen=True)
class PerSample:
    """A chain of transforms on one sample after the other, each taken back to what the chain starts from: slow, and exact.

    Args:
        chain: the transforms, from the first random one on.
        back: those that undo, on what was read, the deterministic ones among them, in order.

    """

    chain: tuple[Callable[[Any], Any], ...]
    back: tuple[Callable[[Any], Any], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return transformed inputs, of the shape and dtype that they have."""
        return torch.stack([self.transform(sample) for sample in x.cpu()]).to(x)

    def transform(self, sample: Any) -> Tensor:
        """Return one transformed input."""
        for step in (*self.back, *self.chain):
            sample = step(sample)
        return torch.as_tensor(sample)


@dataclass(frozen=True)
class Denormalize:
    """Normalize, undone."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return (channels, height, width) as it was before."""
        mean, std = (torch.tensor(values, dtype=x.dtype)[:, None, None] for values in (self.mean, self.std))
        return x * std + mean


@dataclass(frozen=True)
class ToImage:
    """An image of PIL's again, from floats from 0 to 1 or from bytes."""

    def __call__(self, x: Tensor) -> Any:
        """Return the image of a (channels, height, width) tensor."""
        from torchvision.transforms.functional import to_pil_image

        return to_pil_image(x if x.dtype == torch.uint8 else (x * 255).round().clamp(0, 255).to(torch.uint8))


def torchvision_name(transform: object) -> str:
    """Return the name of one of torchvision's transforms, or nothing for any other."""
    cls = type(transform)
    return cls.__name__ if cls.__module__.startswith("torchvision.transforms") else ""


def flatten(transform: Any) -> list[Any]:
    """Return the single transforms of inputs that one is composed of, in order."""
    if transform is None:
        return []
    if torchvision_name(transform) == "Compose":
        return [step for inner in transform.transforms for step in flatten(inner)]
    kind = type(transform).__name__ if type(transform).__module__.startswith("avalanche.") else ""
    if kind == "TupleTransform":  # of the input, and of the label
        return flatten(transform.transforms[0]) if transform.transforms else []
    if kind == "MultiParamCompose":
        return [step for inner in transform.transforms for step in flatten(inner)]
    return flatten(transform.transform) if kind == "MultiParamTransformCallable" else [transform]


def remove(transform: Any, taken: Sequence[Any]) -> Any:
    """Return a composed transform without some of the single ones."""
    if any(transform is step for step in taken):
        return identity
    inner = flatten(transform)
    if not inner or inner[0] is transform:
        return transform
    changed = copy(transform)
    if type(transform).__name__ == "MultiParamTransformCallable":
        changed.transform = remove(transform.transform, taken)
    else:  # a Compose, or one of Avalanche's own kinds
        changed.transforms = [remove(step, taken) for step in transform.transforms]
    return changed


def identity(x: Any) -> Any:
    """Return what is given."""
    return x


def is_random(transform: Any, sample: Any) -> bool:
    """Return whether a transform is random: by what torchvision calls it, or by what it does with a sample."""
    name = torchvision_name(transform)
    if name == "RandomRotation" and len(set(transform.degrees)) == 1:
        return False
    if name.startswith("Random") or name in RANDOM:
        return True
    return name in ("", "Lambda") and is_nondeterministic(lambda: transform(sample))


def is_nondeterministic(call: Callable[[], Any]) -> bool:
    """Return whether a call draws from the global generators, or gives another answer the second time; they stay as they were."""
    with isolated(0, "transforms"):
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        first = call()
        after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        others = [call() for _ in range(7)]  # one that draws by itself may do nothing at first
    if not torch.equal(before[0], after[0]) or before[1:] != after[1:]:
        return True
    return any(not samples_equal(first, other) for other in others)


def samples_equal(first: Any, second: Any) -> bool:
    """Return whether two samples are equal, also where they hold NaN."""
    first, second = np.asarray(first), np.asarray(second)
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))


def as_batched_steps(chain: Sequence[Any], sample: Any, read: Tensor) -> Steps | str:
    """Return the random transforms of a chain as batched steps on what is read without them, or why that can't be.

    Args:
        chain: the transforms, random ones among them.
        sample: what one sample is before the first of them.
        read: the same sample as it is read: (channels, height, width).

    """
    steps: list[Crop | Flip] = []
    for position, transform in enumerate(chain):
        name = torchvision_name(transform)
        if not is_random(transform, sample):
            if steps and name not in BY_PIXEL:
                return f"{_display_name(transform)} comes after a random one and moves pixels"
            sample = transform(sample)
            continue
        if read.dim() != 3:
            return f"{_display_name(transform)} is for images, and the inputs are {tuple(read.shape)}"
        if name in ("RandomHorizontalFlip", "RandomVerticalFlip"):
            steps.append(Flip(float(transform.p), -1 if name == "RandomHorizontalFlip" else -2))
        elif name == "RandomCrop":
            crop = _crop(transform, [later for later in chain[position + 1 :] if not is_random(later, sample)], sample, read)
            if isinstance(crop, str):
                return crop
            steps.append(crop)
        else:
            return f"{_display_name(transform)} is random, and is not known to act on whole batches"
    return Steps(tuple(steps))


def _crop(transform: Any, later: list[Any], sample: Any, read: Tensor) -> Crop | str:
    """Return a RandomCrop as a batched step, or why it can't be one."""
    mode, needed = transform.padding_mode, transform.pad_if_needed
    if str(getattr(mode, "value", mode)) != "constant" or needed:
        return f"{_display_name(transform)} pads in another way than with a constant"
    if tuple(transform.size) != tuple(read.shape[1:]):
        return f"{_display_name(transform)} changes the size of the images, which are {tuple(read.shape[1:])} as they are read"
    given = transform.padding
    sides = [given] if isinstance(given, int) else list(given or [0])
    left, top, right, bottom = sides * (4 // len(sides))
    if ".v2." in type(transform).__module__:  # it keeps left, right, top, bottom
        left, right, top, bottom = sides * (4 // len(sides))
    fill = transform.fill if not isinstance(transform.fill, dict) else 0
    constant = _filled(sample, fill)
    for step in later:
        constant = step(constant)
    pixels = torch.as_tensor(constant) if isinstance(constant, Tensor) else torch.from_numpy(np.array(constant))
    pixels = pixels if isinstance(constant, Tensor) or pixels.dim() == 2 else pixels.movedim(-1, 0)
    channels = pixels.reshape(-1, *pixels.shape[-2:])
    return Crop((left, top, right, bottom), tuple(float(value) for value in channels[:, 0, 0]))


def _filled(sample: Any, fill: Any) -> Any:
    """Return something like a sample whose pixels all have one value."""
    if isinstance(sample, Tensor):
        values = torch.as_tensor(fill, dtype=sample.dtype).reshape(-1, 1, 1)
        return torch.zeros_like(sample) + values
    from PIL import Image

    bands = len(sample.getbands())
    fills = tuple(fill) if isinstance(fill, (list, tuple)) else (fill,) * bands
    return Image.new(sample.mode, sample.size, fills if bands > 1 else fills[0])


def as_per_sample(chain: Sequence[Any], sample: Any, read: Tensor) -> PerSample | str:
    """Return the transforms of a chain from the first random one on, for one sample after the other, or why that can't be.

    Args: as for `batched`.
    """
    first = next(position for position, step in enumerate(chain) if is_random(step, sample))
    for step in chain[:first]:
        sample = step(sample)
    back: list[Callable[[Any], Any]] = []
    for step in reversed([step for step in chain[first:] if not is_random(step, sample)]):
        name = torchvision_name(step)
        if name == "Normalize":
            back.append(Denormalize(tuple(map(float, step.mean)), tuple(map(float, step.std))))
        elif name in ("ToTensor", "PILToTensor") and not isinstance(sample, (Tensor, np.ndarray)):
            back.append(ToImage())
        else:
            return f"{_display_name(step)} can't be undone, to start from what the random ones start from"
    chain_per_sample = PerSample(tuple(chain[first:]), tuple(back))
    with isolated(0, "transforms"):
        given = chain_per_sample.transform(read)
    if given.shape != read.shape or given.dtype != read.dtype:
        return f"they give {tuple(given.shape)} of {given.dtype}, and without them it is {tuple(read.shape)} of {read.dtype}"
    return chain_per_sample


def _display_name(transform: Any) -> str:
    return getattr(transform, "__name__", None) or type(transform).__name__
