"""What OpenVAE draws to replay: latents of a normal distribution, of which a filter lets some pass, up to a quota of each class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOGETHER = 8192
"""Latents drawn together."""


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents with labels, and what it took to have them.

    Args:
        z: (n, latents).
        y: (n,), labels.
        proposals: latents that were drawn.
        accepted: those that passed the filter.
        room: (classes,), how many of each class there are too few.

    """

    z: Tensor
    y: Tensor
    proposals: int
    accepted: int
    room: Tensor


def draw_latents(
    classify: Callable[[Tensor], Tensor],
    accept: Callable[[Tensor, Tensor], Tensor],
    quota: Tensor,
    width: int,
    proposals: int,
    random: torch.Generator,
    scale: float = 1.0,
) -> Latents:
    """Draw latents of a normal distribution until each class has its quota, or so many were drawn.

    Args:
        classify: (n, width) to (n,) labels.
        accept: latents and their labels to (n,) bool: which may stay.
        quota: (classes,), int64: how many of each class are wanted; it is on the device where all of it happens.
        width: of a latent.
        proposals: the most that are drawn, rounded up to whole chunks of `TOGETHER`.
        random: draws them, on the CPU.
        scale: standard deviation of the normal distribution.

    """
    room, drawn = quota.clone(), 0
    passed = torch.zeros((), dtype=torch.int64, device=quota.device)
    kept: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, width, device=quota.device), quota[:0])]
    while drawn < proposals and bool((room > 0).any()):
        z = (scale * torch.randn(TOGETHER, width, generator=random)).to(quota.device)
        y = classify(z)
        stays = accept(z, y)
        passed += stays.sum()
        drawn += TOGETHER
        z, y = z[stays], y[stays]
        places = torch.nn.functional.one_hot(y, len(room)).cumsum(0).gather(1, y[:, None])[:, 0]  # 1 for the first of its class
        fits = places <= room[y]
        kept.append((z[fits], y[fits]))
        room = room - y[fits].bincount(minlength=len(room))
    latents, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Latents(latents, labels, drawn, int(passed), room)
