"""Streams from the user's own tensors, arrays or torch data sets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clstream.seeds import derive
from clstream.stream import SCENARIOS, Data, Samples, Stream, Subset, Task

Array = Tensor | npt.NDArray[Any]


def from_tensors(
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    name: str = "tensors",
    tasks: int = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    seed: int = 0,
    schedule: Sequence[int] | None = None,
    boundaries: bool = True,
    augment: Callable[[Tensor], Tensor] | None = None,
    resident: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Split labelled samples by class into tasks.

    Args:
        x: (n, *input_shape) training inputs, uint8 or float; float64 becomes float32. A memory-mapped array stays on disk.
        y: (n,) training labels, whole numbers from 0.
        x_test, y_test: the same for the test.
        name: how tables and MLflow call the stream.
        tasks: how many tasks the classes are dealt to. Classes that don't divide evenly are spread: the first tasks get one
            more, and the card says so.
        scenario: "class", "task" or "domain"; in the last, each label becomes its class's place within its task.
        epochs: passes over a session.
        batch_size: samples of a step.
        class_order: None for the natural one, a whole number as the seed of a shuffle, or the labels in order.
        sessions_per_task: each task's samples are dealt out to so many sessions, one after the other.
        validation: share of each task's training samples, from 0 to below 1, that is held back as `task.validation`.
        seed: of the order of batches, of what validation holds back, and of who comes in which session.
        schedule: the task of each session in place of one task after the other (recurring tasks); see `Stream`.
        boundaries: whether strategies are told of tasks.
        augment: a batched function of raw inputs, applied where samples are learned.
        resident: False keeps the samples where they are and moves each batch to the run's device.
        drop_last: whether each pass leaves out the last batch if it is not full.

    Returns:
        The stream, with the samples ungathered: the tasks are views of one copy of the data.

    Raises:
        ValueError, TypeError: for options or data that don't fit; see also `Stream`.

    """
    train, test = as_samples(x, y, f"{name}: training"), as_samples(x_test, y_test, f"{name}: test")
    if scenario not in SCENARIOS:
        raise ValueError(f"{name}: scenario must be one of {', '.join(SCENARIOS)}, not {scenario!r}")
    if sessions_per_task < 1:
        raise ValueError(f"{name}: sessions_per_task must be at least 1, not {sessions_per_task}")
    if schedule is not None and sessions_per_task != 1:
        raise ValueError(f"{name}: sessions_per_task and schedule exclude each other: a schedule names the task of every session")
    data = Data({"train": train, "test": test})
    groups, notes = split_classes(name, train.y, test.y, tasks, class_order)
    train_rows, test_rows = [
        [torch.isin(part.y, torch.tensor(group)).nonzero().flatten() for group in groups] for part in (train, test)
    ]
    if scenario == "domain":
        train, test = (Samples(part.x, places(part.y, groups)) for part in (train, test))
    made = []
    for number, group in enumerate(groups):
        kept, held = hold_back(train_rows[number], validation, derive(seed, "samples", number), f"{name}: task {number}")
        made.append(
            Task(
                number,
                tuple(range(len(group))) if scenario == "domain" else tuple(group),
                Subset(train, kept),
                Subset(test, test_rows[number]),
                None if held is None else Subset(train, held),
            )
        )
    if schedule is None:
        schedule = [number for number in range(tasks) for _ in range(sessions_per_task)]
    return Stream(
        name, made, schedule, epochs, batch_size, scenario, seed, boundaries, augment, resident, notes, data, drop_last=drop_last
    )


def places(y: Tensor, groups: list[list[int]]) -> Tensor:
    """Return for each label its place within its task."""
    labels, order = torch.tensor([label for group in groups for label in group]).sort()
    place = torch.tensor([position for group in groups for position in range(len(group))])[order]
    return place[torch.searchsorted(labels, y)]


def hold_back(rows: Tensor, share: float, seed: int, what: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows in a random order, and apart from them a share that is held back to validate on (None for 0)."""
    if not 0 <= share < 1:
        raise ValueError(f"{what}: validation is the share of the training samples held back, from 0 to below 1, not {share}")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    held = round(share * len(rows))
    if share and not 0 < held < len(rows):
        raise ValueError(f"{what}: validation={share} of {len(rows)} training samples leaves one part empty")
    return rows[held:], rows[:held] if held else None


def split_classes(
    name: str, y: Tensor, y_test: Tensor, tasks: int, class_order: int | list[int] | None
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Deal the labels of `y` to tasks, and say so where they don't divide evenly: the first tasks get one more."""
    labels = y.unique().tolist()
    if extra := sorted(set(y_test.unique().tolist()) - set(labels)):
        raise ValueError(f"{name}: the labels {extra} are in the test set only: a class needs training samples")
    if not 1 <= tasks <= len(labels):
        raise ValueError(f"{name}: {len(labels)} classes make 1 to {len(labels)} tasks, not {tasks}")
    if isinstance(class_order, (int, np.integer)):
        shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(class_order)))
        labels = [labels[position] for position in shuffle.tolist()]
    elif class_order is not None:
        if sorted(class_order) != labels:
            raise ValueError(f"{name}: class_order must name each of the classes {labels} once, not {class_order}")
        labels = list(class_order)
    groups = [[int(label) for label in part] for part in np.array_split(np.array(labels), tasks)]
    sizes = [len(group) for group in groups]
    uneven = f"{len(labels)} classes don't divide evenly into {tasks} tasks: they have {', '.join(map(str, sizes))}"
    return groups, (uneven,) if len(set(sizes)) > 1 else ()


def as_samples(x: Array, y: Array, what: str) -> Samples:
    """Return inputs and labels as Samples, or refuse them in one sentence."""
    try:
        with warnings.catch_warnings():  # a read-only memory map is fine: nothing here writes
            warnings.filterwarnings("ignore", message=".*not writable.*")
            inputs, labels = torch.as_tensor(x), torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} samples must be tensors or arrays of numbers: {error}") from None
    if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.dim() != 1:
        raise TypeError(f"{what} labels must be one whole number each, not {tuple(labels.shape)} of {labels.dtype}")
    if not inputs.dim():
        raise ValueError(f"{what} inputs must be (samples, ...), not a single number")
    if len(inputs) != len(labels):
        raise ValueError(f"{what} inputs are {len(inputs)}, labels {len(labels)}: there must be one label for each")
    if not len(labels):
        raise ValueError(f"{what} set is empty")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"{what} labels must be from 0 up, not {int(labels.min())}")
    if inputs.dtype != torch.uint8:
        if inputs.dtype == torch.bool or inputs.is_complex():
            raise TypeError(f"{what} inputs must be uint8 or real numbers, not {inputs.dtype}")
        inputs = inputs.to(torch.float32)
    return Samples(inputs, labels)


def from_dataset(
    train: Dataset[Any],
    test: Dataset[Any],
    name: str = "dataset",
    tasks: int = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    seed: int = 0,
    schedule: Sequence[int] | None = None,
    boundaries: bool = True,
    augment: Callable[[Tensor], Tensor] | None = None,
    memory_map: str | Path | None = None,
    workers: int = 0,
    progress: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Split a torch data set by class: each sample is read once, here, and kept as a tensor.

    Args:
        train, test: map-style data sets of (input, label); inputs are tensors, arrays or PIL images of one shape.
        name, tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, seed, schedule, boundaries,
            augment, drop_last: see `from_tensors`. A random transform inside the data set would be drawn once, for good: leave it
            out there, and pass it, batched, as `augment`.
        memory_map: a folder for the inputs of data larger than memory: two files, memory-mapped.
        workers: processes that read.
        progress: whether to show a bar, in a terminal.

    Raises:
        ValueError, TypeError: for an empty data set or samples that are not of one shape; see also `from_tensors`.

    """
    folder = None if memory_map is None else Path(memory_map)
    parts = {
        kind: read(part, f"{name}: {kind}", None if folder is None else folder / f"{kind}.raw", workers, progress)
        for kind, part in (("train", train), ("test", test))
    }
    return from_tensors(
        parts["train"].x, parts["train"].y, parts["test"].x, parts["test"].y,
        name=name, tasks=tasks, scenario=scenario, epochs=epochs, batch_size=batch_size, class_order=class_order,
        sessions_per_task=sessions_per_task, validation=validation, seed=seed, schedule=schedule, boundaries=boundaries,
        augment=augment, resident=memory_map is None, drop_last=drop_last,
    )  # fmt: skip


def read(dataset: Dataset[Any], what: str, file: Path | None, workers: int = 0, progress: bool = True) -> Samples:
    """Read each sample of a data set once into whole tensors; the inputs into a memory-mapped file if one is named."""
    from rich.console import Console
    from rich.progress import track

    if not hasattr(dataset, "__len__"):
        raise TypeError(f"{what} set has no length: from_dataset takes data sets that are indexed, not iterated")
    total = len(dataset)
    if not total:
        raise ValueError(f"{what} set is empty")
    x: Tensor | None = None
    y = torch.empty(total, dtype=torch.int64)
    loader = DataLoader(dataset, batch_size=256, num_workers=workers, collate_fn=collate, generator=torch.Generator())
    done = 0
    console = Console(stderr=True)
    for inputs, labels in track(loader, f"reading {what}", console=console, disable=not (progress and console.is_terminal)):
        if x is None:
            x = _room((total, *inputs.shape[1:]), inputs.dtype, file)
        if inputs.shape[1:] != x.shape[1:] or inputs.dtype != x.dtype:
            raise ValueError(
                f"{what}: input {done} or one of the next {len(inputs)} is {tuple(inputs.shape[1:])} of {inputs.dtype}, "
                f"the first was {tuple(x.shape[1:])} of {x.dtype}"
            )
        x[done : done + len(inputs)] = inputs
        y[done : done + len(inputs)] = labels
        done += len(inputs)
    assert x is not None
    return Samples(x, y)


def _room(shape: tuple[int, ...], dtype: torch.dtype, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(shape, dtype=dtype)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.unlink(missing_ok=True)
        room = torch.from_file(str(new), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)
        new.replace(file)  # a stream that maps the file of this name keeps the old one
        return room
    except (OSError, RuntimeError) as error:
        raise OSError(f"can't make the memory-mapped file {file}: {error}") from None


def collate(samples: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Join samples as they are: PIL images become (channels, height, width), float64 becomes float32."""
    inputs = []
    for x, _ in samples:
        if not isinstance(x, Tensor):
            image = not isinstance(x, np.ndarray)
            x = torch.from_numpy(np.array(x))
            if image:  # PIL has the channels last, or none
                x = x[None] if x.dim() == 2 else x.movedim(-1, 0)
        inputs.append(x.to(torch.float32) if x.dtype == torch.float64 else x)
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise ValueError(f"inputs must have one shape, not {sorted(shapes)}: resize them in the data set's transform")
    try:
        labels = torch.tensor([y.item() if isinstance(y, Tensor) else y for _, y in samples])
    except (TypeError, ValueError) as error:
        raise TypeError(f"labels must be whole numbers, not {samples[0][1]!r} ({error})") from None
    if labels.is_floating_point():
        raise TypeError(f"labels must be whole numbers, not {labels.tolist()[:3]}")
    return torch.stack(inputs), labels
