"""SHARP's memories of activations, short-term and long-term, and their quantisation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P", bound="PerClass")


@dataclass(slots=True, eq=False)
class PerClass:
    """What is kept of classes: tensors with a row for each. `count` is how many of its samples are real; the rest repeats one."""

    labels: Tensor
    episodes: Tensor
    count: Tensor

    def where(self: P, chosen: Tensor) -> P:
        """Return some of the classes: a (classes,) mask."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def updated(self: P, new: P) -> P:
        """Return these classes and new ones; what is new replaces what was kept of the same class."""
        old = self.where(~torch.isin(self.labels, new.labels))
        return type(self)(**{field.name: torch.cat([getattr(old, field.name), getattr(new, field.name)]) for field in fields(self)})

    @property
    def bytes(self) -> int:
        """The bytes of all of it."""
        tensors: list[Tensor] = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(slots=True, eq=False)
class ShortTerm(PerClass):
    """Activations at the cut, at 8 bits: codes (classes, n, ...) uint8 between each class's least and greatest value."""

    codes: Tensor
    least: Tensor
    greatest: Tensor

    def activations(self) -> Tensor:
        """Return what is stored, as (classes, n, ...) float32."""
        return dequantise(self.codes, self.least, self.greatest)


@dataclass(slots=True, eq=False)
class LongTerm(PerClass):
    """Exemplars (classes, n, width) float32, and (classes, width) bool: the units that each class is recognised by."""

    exemplars: Tensor
    units: Tensor


def quantise(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (classes, n, ...) values as uint8 codes, and each class's least and greatest value: (classes,).

    What `dequantise` makes of them is off by (greatest - least) / 510 at most.
    """
    rows = values.flatten(1)
    least, greatest = rows.aminmax(dim=1)
    width = torch.where(greatest > least, greatest - least, 1)
    codes = ((rows - least[:, None]) / width[:, None] * 255).round().to(torch.uint8)
    return codes.view(values.shape), least, greatest


def dequantise(codes: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Return the float32 values of codes that `quantise` made."""
    step = (greatest - least) / 255
    rows = codes.flatten(1).to(torch.float32).mul_(step[:, None]).add_(least[:, None])
    return rows.view(codes.shape)


def leading(y: Tensor, order: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels in y, the positions of the first n samples of each in an order, and how many of these are real.

    (classes,), (classes, n) and (classes,), int64; where a class has fewer than n, its first is repeated.
    """
    labels, inverse = y[order].unique(return_inverse=True)
    count = torch.bincount(inverse, minlength=len(labels))
    grouped = order[inverse.argsort(stable=True)]
    start = count.cumsum(0) - count
    place = torch.arange(n).expand(len(labels), -1)
    place = torch.where(place < count[:, None], place, 0)
    return labels, grouped[start[:, None] + place], count.clamp(max=n)
