"""Several labels for each image: objects of one data set, or of two, on a canvas of 2 x 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from clstream.streams.data import CLASSES, NAMES, TABLES, known_name, plain_name, source
from clstream.streams.options import Tasks, check_options
from clstream.streams.tensors import from_tensors
from torch.nn import functional as F

from clstream.params import check_choice, check_integer
from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream

OBJECTS = tuple(name for name in NAMES if name not in TABLES)
"""The data sets that have images of objects."""

MOST_NUMBERS = 1 << 31
"""Pixels of all canvases at most."""

_CHUNK = 4096  # canvases that are made together


def multilabel_canvas(
    data: str = "digits",
    tasks: Tasks = 5,
    train: int = 4000,
    test: int = 1000,
    scenario: str = "class",
    epochs: int = 5,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    seed: int = 0,
    boundaries: bool = True,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """One to four objects on a canvas of 2 x 2, with several labels: multi-label class-incremental learning.

    How many objects a canvas has is drawn uniformly from 1 to 4, then their cells, then each object from all images of the data:
    training canvases have training images, test canvases test images. The target of a class is 1 if an object of it is there,
    however many. A task's training samples are the canvases with an object of its classes, and objects of all other classes count
    as background there: their targets are 0. Its test samples keep all of their targets. So a canvas can come in several tasks,
    each time with other labels: the setting of MULTI-LANE (De Min et al. 2024), on data that is made here.

    Canvases have the dtype of the data, and are twice as high and wide: float32 (1, 16, 16) of digits, uint8 (1, 56, 56) of MNIST.

    Args:
        data: "digits" (scikit-learn's, no download), "MNIST", "FashionMNIST", "CIFAR10" or "CIFAR100"; lower case is fine. Two of
            one shape are joined by a plus, as "mnist+fashion_mnist": the classes of the second one come after those of the first.
        tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, boundaries, drop_last: see `from_tensors`.
        train, test: how many canvases.
        seed: of the canvases; the data is a pure function of it.
        root: the folder with the data, as in `split_mnist`.

    References: De Min, Mancini, Lathuiliere, Roy, Ricci: Less is more: Summarizing patch tokens for efficient multi-label
    class-incremental learning, CoLLAs 2024.

    """
    check_options({name: value for name, value in locals().items() if name not in ("data", "test")})
    names = check_canvases(data, train, test, seed)
    train_set, test_set = canvases(data, train, test, seed, root)
    name = f"multilabel_canvas_{'_'.join(map(plain_name, names))}"
    stream = from_tensors(
        train_set.x, train_set.y, test_set.x, test_set.y, name, tasks, scenario, epochs, batch_size, class_order, sessions_per_task,
        validation, seed, boundaries=boundaries, drop_last=drop_last, target="multilabel",
    )  # fmt: skip
    note = f"1 to 4 objects of {' and '.join(names)} on a canvas of 2 x 2"
    options: dict[str, int | float | str | None] = {
        "data": "+".join(names),
        "train": int(train),
        "test": int(test),
        "seed": int(seed),
    }
    called = [f"{plain_name(data)}_{label}" for data in names for label in range(CLASSES.get(data, 10))] if len(names) > 1 else []
    return replace(stream, notes=(note, *stream.notes), class_names=tuple(called[: stream.classes])).with_source(
        DataSource({"train": train_set, "test": test_set}, "multilabel_canvas", options)
    )


def check_canvases(data: object, train: object, test: object, seed: object) -> list[str]:
    """Return the names of the data sets on the canvases. Raises ValueError for options that are not what they must be."""
    check_integer(1, train=train, test=test)
    check_integer(0, seed=seed)
    if not isinstance(data, str):
        raise ValueError(f"data must be the name of a data set, or of two joined by a plus, not {data!r:.100}")
    names = [known_name(name.strip()) for name in data.split("+")]
    for name in names:
        check_choice(OBJECTS, data=name)
    if len(set(names)) < len(names):
        raise ValueError(f"data must name data sets once each, not {data!r}")
    return names


def canvases(data: str, train: int, test: int, seed: int, root: str | Path | None = None) -> tuple[Samples, Samples]:
    """Return the canvases to train and to test on: see `multilabel_canvas`."""
    names = check_canvases(data, train, test, seed)
    parts = [source(name, root) for name in names]
    forms = {(tuple(part.x.shape[1:]), part.x.dtype) for part, _ in parts}
    if len(forms) > 1:
        raise ValueError(
            f"data sets on one canvas must have images of one shape and dtype, and {data} has {sorted(map(str, forms))}"
        )
    pixels = 4 * parts[0][0].x[0].numel() * (train + test)
    if pixels > MOST_NUMBERS:
        raise ValueError(f"{train + test:,} canvases have {pixels:,} pixels, more than {MOST_NUMBERS:,}: take fewer")
    counts = [int(part.y.max()) + 1 for part, _ in parts]
    joined = []
    for kind in (0, 1):
        x = torch.cat([part[kind].x for part in parts]) if len(parts) > 1 else parts[0][kind].x
        y = torch.cat([part[kind].y + sum(counts[:number]) for number, part in enumerate(parts)])
        joined.append(Samples(x, y))
    return (
        draw_canvases(joined[0], train, sum(counts), derive(seed, "canvas", "train")),
        draw_canvases(joined[1], test, sum(counts), derive(seed, "canvas", "test")),
    )


def draw_canvases(objects: Samples, count: int, classes: int, seed: int) -> Samples:
    """Return `count` canvases with one to four of some objects, drawn at random, and which of so many classes are on each."""
    draw = torch.Generator().manual_seed(seed)
    number = torch.randint(1, 5, (count, 1), generator=draw)
    occupied = torch.rand(count, 4, generator=draw, dtype=torch.float64).argsort(1).argsort(1) < number
    chosen = torch.randint(len(objects), (count, 4), generator=draw)
    channels, height, width = objects.x.shape[1:]
    x = torch.empty(count, channels, 2 * height, 2 * width, dtype=objects.x.dtype)
    for rows in torch.arange(count).split(_CHUNK):
        cells = objects.x[chosen[rows]] * occupied[rows, :, None, None, None]
        grid = cells.view(-1, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        x[rows] = grid.reshape(-1, channels, 2 * height, 2 * width)
    y = (F.one_hot(objects.y[chosen], classes) * occupied[..., None]).amax(1)
    return Samples(x, y.float(), target="multilabel")
