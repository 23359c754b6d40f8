"""Gaussian blobs: a stream that needs no data, for tests and first steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from clstream.streams.options import Tasks, check_options
from clstream.streams.tensors import from_tensors

from clstream.stream import DataSource, Samples, Stream


def blobs(
    tasks: Tasks = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    classes: int = 10,
    features: int = 20,
    train_per_class: int = 200,
    test_per_class: int = 50,
    spread: float = 1.0,
    seed: int = 0,
    schedule: Sequence[int] | None = None,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Points around one centre for each class, split by class.

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, schedule, boundaries,
            drop_last: see `from_tensors`.
        classes: number of classes.
        features: dimensions of a point; the centres are drawn with standard deviation 2 in each.
        train_per_class, test_per_class: points of each class.
        spread: standard deviation of the points around their centre.
        seed: of centres and points.

    """
    check_options(locals())
    train, test = points(classes, features, train_per_class, test_per_class, spread, seed)
    stream = from_tensors(
        train.x, train.y, test.x, test.y,
        name="blobs", tasks=tasks, scenario=scenario, epochs=epochs, batch_size=batch_size, class_order=class_order,
        sessions_per_task=sessions_per_task, validation=validation, seed=seed, schedule=schedule, boundaries=boundaries,
        drop_last=drop_last,
    )  # fmt: skip
    options = {
        "classes": classes, "features": features, "train_per_class": train_per_class, "test_per_class": test_per_class,
        "spread": spread, "seed": seed,
    }  # fmt: skip
    return stream.with_source(DataSource({"train": train, "test": test}, "blobs", options))


def points(
    classes: int, features: int, train_per_class: int, test_per_class: int, spread: float, seed: int
) -> tuple[Samples, Samples]:
    """Return the points to train and to test on: see `blobs`."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=draw) * 2

    def samples(per_class: int) -> Samples:
        y = torch.arange(classes).repeat_interleave(per_class)
        return Samples(centres[y] + spread * torch.randn(len(y), features, generator=draw), y)

    return samples(train_per_class), samples(test_per_class)
