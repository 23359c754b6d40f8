"""Domain-incremental benchmarks: all of MNIST in every task, changed in a way of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from clstream.streams.class_splits import hold_back
from clstream.streams.data import digits, load
from clstream.streams.options import check_options
from torch import Tensor
from torch.nn import functional as F

from clstream.params import check_bool, check_integer, check_number
from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream, Subset, Task

MOST_PAD = 64
"""Pixels on each side: a recording may name any number, and memory grows with its square."""


@dataclass(frozen=True)
class Permute:
    """The pixels in another order, the same for every image: drawn from `seed`, after zero-padding each side by `pad`."""

    seed: int
    pad: int = 0

    def __post_init__(self) -> None:
        check_integer(0, seed=self.seed)
        check_integer(0, MOST_PAD, pad=self.pad)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, channels, height + 2 pad, width + 2 pad)."""
        x = F.pad(x, (self.pad,) * 4) if self.pad else x
        order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        return x.flatten(1)[:, order].view_as(x)


@dataclass(frozen=True)
class Pad:
    """Zeros on each side of the images."""

    pad: int

    def __post_init__(self) -> None:
        check_integer(0, MOST_PAD, pad=self.pad)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, channels, height + 2 pad, width + 2 pad)."""
        return F.pad(x, (self.pad,) * 4)


@dataclass(frozen=True)
class Rotate:
    """Images turned counter-clockwise about their centre, by torchvision; the corners are filled with zeros."""

    degrees: float
    bilinear: bool = False

    def __post_init__(self) -> None:
        check_number(degrees=self.degrees)
        check_bool(bilinear=self.bilinear)

    def __call__(self, x: Tensor) -> Tensor:
        """Return images of the same shape and dtype."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import rotate

        turned: Tensor = rotate(x, self.degrees, InterpolationMode.BILINEAR if self.bilinear else InterpolationMode.NEAREST)
        return turned


def permuted_mnist(
    tasks: int = 10,
    scenario: str = "domain",
    epochs: int = 1,
    batch_size: int = 32,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    seed: int = 0,
    pad: int = 0,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """MNIST with its pixels in another order in each task; the first task is MNIST as it is (Goodfellow et al. 2014).

    Args:
        tasks: how many orders.
        scenario: "domain" (10 classes that all tasks share), or "class" or "task" (each task has ten classes of its own).
        epochs: passes over a session.
        batch_size: samples of a step.
        sessions_per_task: sessions that each task's samples are dealt out to.
        validation: share of each task's training samples held back as `task.validation`.
        root: as in `split_mnist`.
        seed: of the orders of the pixels.
        pad: zeros added to each side before, as 2 for 32 x 32.
        boundaries: whether strategies are told of tasks.
        drop_last: whether each pass leaves out the last batch if it is not full.

    """
    check_options(locals())
    check_integer(1, tasks=tasks)
    first = Pad(pad) if pad else None
    changes = [first, *(Permute(derive(seed, "pixels", number), pad) for number in range(1, tasks))]
    return _domains(
        "permuted_mnist", changes, scenario, epochs, batch_size, sessions_per_task, validation, root, seed, boundaries, drop_last
    )


def permuted_digits(
    tasks: int = 10,
    scenario: str = "domain",
    epochs: int = 1,
    batch_size: int = 10,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    seed: int = 0,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """scikit-learn's digits with their pixels in another order in each task: `permuted_mnist` in small, without a download.

    Args:
        tasks, scenario, epochs, batch_size, sessions_per_task, validation, seed, boundaries, drop_last: as in `permuted_mnist`.

    """
    check_options(locals())
    check_integer(1, tasks=tasks)
    changes = [None, *(Permute(derive(seed, "pixels", number)) for number in range(1, tasks))]
    return _domains(
        "permuted_digits", changes, scenario, epochs, batch_size, sessions_per_task, validation, None, seed, boundaries, drop_last
    )


def rotated_mnist(
    tasks: int = 20,
    scenario: str = "domain",
    epochs: int = 1,
    batch_size: int = 32,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    seed: int = 0,
    degrees: list[float] | None = None,
    bilinear: bool = False,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """MNIST turned by an angle of its own in each task, drawn uniformly from 0 to 180 degrees (Buzzega et al. 2020).

    Args:
        tasks: how many angles.
        scenario, epochs, batch_size, sessions_per_task, validation, root, boundaries, drop_last: as in
            `permuted_mnist`.
        seed: of the angles.
        degrees: the angles, one for each task, in place of drawn ones.
        bilinear: interpolate between pixels; if not, take the nearest, as torchvision does unless told.

    """
    check_options(locals())
    check_integer(1, tasks=tasks)
    if degrees is None:
        degrees = (
            180 * torch.rand(tasks, generator=torch.Generator().manual_seed(derive(seed, "angles")), dtype=torch.float64)
        ).tolist()
    if not isinstance(degrees, (list, tuple)) or len(degrees) != tasks:
        given = len(degrees) if isinstance(degrees, (list, tuple)) else repr(degrees)
        raise ValueError(f"rotated_mnist: degrees must name an angle for each of {tasks} tasks, not {given}")
    for angle in degrees:
        check_number(degrees=angle)
    changes = [Rotate(angle, bilinear) for angle in degrees]
    return _domains(
        "rotated_mnist", changes, scenario, epochs, batch_size, sessions_per_task, validation, root, seed, boundaries, drop_last
    )


def _domains(
    name: str,
    changes: Sequence[Callable[[Tensor], Tensor] | None],
    scenario: str,
    epochs: int,
    batch_size: int,
    sessions_per_task: int,
    validation: float,
    root: str | Path | None,
    seed: int,
    boundaries: bool,
    drop_last: bool,
) -> Stream:
    """Build a stream of MNIST or digits, a version for each change; the training images are changed session by session."""
    of_digits = name == "permuted_digits"
    train, test = digits() if of_digits else load("MNIST", root)
    tasks = []
    for number, change in enumerate(changes):
        shift = 0 if scenario == "domain" else 10 * number
        own = Samples(train.x, train.y + shift)
        own_test = Subset(Samples(test.x, test.y + shift), torch.arange(len(test)), change)
        if isinstance(change, Rotate):  # what is tested again and again is turned once; reordering pixels costs next to nothing
            own_test = own_test.cache()
        kept, held = hold_back(torch.arange(len(own)), validation, derive(seed, "samples", number), f"{name}: task {number}")
        back = None if held is None else Subset(own, held, change)
        tasks.append(Task(number, tuple(range(shift, shift + 10)), Subset(own, kept, change), own_test, back))
    schedule = [number for number in range(len(tasks)) for _ in range(sessions_per_task)]
    data = DataSource({"train": train, "test": test}, "digits" if of_digits else "MNIST")
    return Stream(name, tasks, schedule, epochs, batch_size, scenario, seed, boundaries, data=data, drop_last=drop_last)
