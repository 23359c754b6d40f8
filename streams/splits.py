"""Split benchmarks: the classes of one data set, dealt out to tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import digits, load
from clstream.streams.domains import Pad
from clstream.streams.options import Tasks, check_options
from clstream.streams.tensors import from_tensors
from torch import Tensor

from clstream.params import check_bool
from clstream.stream import DataSource, Samples, Stream, Subset, Task


def split_digits(
    tasks: Tasks = 5,
    scenario: str = "class",
    epochs: int = 10,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """scikit-learn's handwritten digits by class: 1,797 images of 8 x 8 that need no download.

    Every fourth image of each class is for the test. Inputs are float32 from 0 to 1, (1, 8, 8).

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, drop_last: see
            `from_tensors`.

    """
    return _split("split_digits", "digits", locals())


def split_mnist(
    tasks: Tasks = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    boundaries: bool = True,
    pad: int = 0,
    schedule: list[int] | None = None,
    drop_last: bool = False,
) -> Stream:
    """MNIST by class: 60,000 + 10,000 images, uint8, (1, 28, 28).

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, schedule,
            drop_last: see `from_tensors`.
        root: the folder with the data, as torchvision lays it out. None: CLSTREAM_DATA, else a cache folder, to which
            torchvision downloads it.
        pad: zeros added to each side of the images, as 2 for 32 x 32.

    """
    return _split("split_mnist", "MNIST", locals())


def split_fashion_mnist(
    tasks: Tasks = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Fashion-MNIST by class: 60,000 + 10,000 images, uint8, (1, 28, 28).

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, drop_last: see
            `from_tensors`.
        root: as in `split_mnist`.

    """
    return _split("split_fashion_mnist", "FashionMNIST", locals())


def split_cifar10(
    tasks: Tasks = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    boundaries: bool = True,
    augment: bool = False,
    drop_last: bool = False,
) -> Stream:
    """CIFAR-10 by class: 50,000 + 10,000 images, uint8, (3, 32, 32).

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, drop_last: see
            `from_tensors`.
        root: as in `split_mnist`.
        augment: random crops (padding 4) and horizontal flips where samples are learned.

    """
    return _split("split_cifar10", "CIFAR10", locals())


def split_cifar100(
    tasks: Tasks = 10,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    root: str | Path | None = None,
    boundaries: bool = True,
    augment: bool = False,
    drop_last: bool = False,
) -> Stream:
    """CIFAR-100 by class: 50,000 + 10,000 images, uint8, (3, 32, 32).

    Args:
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, drop_last: see
            `from_tensors`.
        root: as in `split_mnist`.
        augment: random crops (padding 4) and horizontal flips where samples are learned.

    """
    return _split("split_cifar100", "CIFAR100", locals())


def _split(name: str, data: str, options: dict[str, Any]) -> Stream:
    """Build the stream of a data set from the options of the function that was called."""
    shared = (
        "tasks",
        "scenario",
        "epochs",
        "batch_size",
        "class_order",
        "sessions_per_task",
        "validation",
        "boundaries",
        "drop_last",
    )
    check_options(options)
    check_bool(augment=options.get("augment", False))
    augment: Callable[[Tensor], Tensor] | None = crop_and_flip if options.get("augment") else None
    train, test = digits() if data == "digits" else load(data, options["root"])
    chosen = {key: options[key] for key in shared} | {"schedule": options.get("schedule")}
    stream = from_tensors(train.x, train.y, test.x, test.y, name=name, augment=augment, **chosen)
    if pad := options.get("pad", 0):
        stream = replace(stream, tasks=[_padded(task, pad) for task in stream.tasks])
    return stream.with_source(DataSource({"train": train, "test": test}, data))


def _padded(task: Task, pad: int) -> Task:
    """Return a task with zeros around its images."""

    def wider(part: Samples | Subset) -> Subset:
        assert isinstance(part, Subset)  # as `from_tensors` makes them
        return Subset(part.source, part.index, Pad(pad))

    held = None if task.validation is None else wider(task.validation).cache()
    return replace(task, train=wider(task.train), test=wider(task.test).cache(), validation=held)
