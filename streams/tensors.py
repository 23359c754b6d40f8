"""Streams from the user's own tensors, arrays or torch data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clstream.streams.arrays import as_inputs, as_labels, as_samples, as_tensor
from clstream.streams.class_splits import Array, hold_back, places, relabelled, split_classes, without_gaps
from clstream.streams.options import Tasks, check_options
from clstream.streams.progress import progress_bar
from clstream.streams.targets import multilabel_tasks, value_tasks
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream, Subset, Task


def from_tensors(
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    name: str = "tensors",
    tasks: Tasks = 5,
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
    relabel: bool = False,
    target: str = "label",
) -> Stream:
    """Split samples into tasks: labelled ones by class, those with several labels too, and those with values at random.

    Args:
        x: (n, *input_shape) training inputs. Integers (uint8 images, int64 tokens) keep their dtype, all other numbers become
            float32. A memory-mapped array stays on disk.
        y: (n,) training labels, whole numbers from 0; with `relabel` any whole numbers, or strings. For other targets see `target`.
        x_test, y_test: the same for the test.
        name: how tables and MLflow call the stream.
        tasks: how many tasks the classes are dealt to. Classes that don't divide evenly are spread: the first tasks get one
            more, and the card says so. Or the number of classes of each task, in the order of the classes, as [5, 1, 1]; or the
            labels of each, as [[0, 3], [1]]. Classes that these leave out are in no task, and the card names them. Groups share
            a class only where the scenario is "task": then each of its tasks has all of its samples.
        scenario: "class", "task" or "domain"; in the last, each label becomes its class's place within its task.
        epochs: passes over a session.
        batch_size: samples of a step.
        class_order: None for the natural one, a whole number as the seed of a shuffle, or the labels in order. Not together with
            groups of labels.
        sessions_per_task: each task's samples are dealt out to so many sessions, one after the other.
        validation: share of each task's training samples, from 0 to below 1, that is held back as `task.validation`.
        seed: of the order of batches, of what validation holds back, and of who comes in which session.
        schedule: the task of each session in place of one task after the other (recurring tasks); see `Stream`.
        boundaries: whether strategies are told of tasks.
        augment: a batched function of raw inputs, applied where samples are learned.
        resident: False keeps the samples where they are and moves each batch to the run's device.
        drop_last: whether each pass leaves out the last batch if it is not full.
        relabel: number the labels 0, 1, ... in their order, for labels with gaps (models have an output for each number up to the
            greatest label) or strings; those that no task has come last. Cards, pictures and event logs call them what they were
            (`Stream.class_names`), and `tasks` and `class_order` name them so.
        target: the kind of targets. "label". "multilabel": `y` is (n, classes), 0 or 1 in any dtype; a task has the samples with a
            positive among its classes, training samples with the targets of all other classes 0, test and validation samples with
            all of theirs. "value": `y` is (n,) or (n, outputs), real numbers; `tasks` is a number, and rows are dealt out to so
            many tasks at random, evenly. The tasks share their outputs, so the scenario is "domain" then.

    Returns:
        The stream, with the samples ungathered: the tasks are views of one copy of the data.

    Raises:
        ValueError, TypeError: for options or data that don't fit; see also `Stream`.

    """
    check_options({name: value for name, value in locals().items() if name != "class_order" or not relabel})
    if schedule is not None and sessions_per_task != 1:
        raise ValueError(f"{name}: sessions_per_task and schedule exclude each other: a schedule names the task of every session")
    names: tuple[str, ...] = ()
    if target != "label":
        if relabel:
            raise ValueError(f"{name}: relabel numbers labels anew, and {target} targets are none")
        deal = multilabel_tasks if target == "multilabel" else value_tasks
        built, notes, scenario, data = deal(name, x, y, x_test, y_test, tasks, class_order, scenario, validation, seed)
        if schedule is None:
            schedule = [number for number in range(len(built)) for _ in range(sessions_per_task)]
        return Stream(
            name, built, schedule, epochs, batch_size, scenario, seed, boundaries, augment, resident, notes, data,
            drop_last=drop_last,
        )  # fmt: skip
    if relabel:
        y, y_test, tasks, class_order, names = relabelled(name, y, y_test, tasks, class_order)
    train, test = as_samples(x, y, f"{name}: training"), as_samples(x_test, y_test, f"{name}: test")
    groups, notes = split_classes(name, train.y, test.y, tasks, class_order, scenario, names)
    if relabel:
        train, test, groups, names = without_gaps(train, test, groups, names)
    data = DataSource({"train": train, "test": test})
    train_rows, test_rows = [
        [torch.isin(part.y, torch.tensor(group)).nonzero().flatten() for group in groups] for part in (train, test)
    ]
    if scenario == "domain":
        train, test = (Samples(part.x, places(part.y, groups)) for part in (train, test))
    built = []
    for number, group in enumerate(groups):
        kept, held = hold_back(train_rows[number], validation, derive(seed, "samples", number), f"{name}: task {number}")
        built.append(
            Task(
                number,
                tuple(range(len(group))) if scenario == "domain" else tuple(group),
                Subset(train, kept),
                Subset(test, test_rows[number]),
                None if held is None else Subset(train, held),
            )
        )
    if schedule is None:
        schedule = [number for number in range(len(groups)) for _ in range(sessions_per_task)]
    return Stream(
        name, built, schedule, epochs, batch_size, scenario, seed, boundaries, augment, resident, notes, data, drop_last=drop_last,
        class_names=() if scenario == "domain" else names,
    )  # fmt: skip


def from_dataset(
    train: Dataset[Any],
    test: Dataset[Any],
    name: str = "dataset",
    tasks: Tasks = 5,
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
    relabel: bool = False,
    target: str = "label",
) -> Stream:
    """Split a torch data set by class: each sample is read once, here, and kept as a tensor.

    Args:
        train, test: map-style data sets of (input, label); inputs are tensors, arrays or PIL images of one shape. With other
            targets, pairs of (input, row of zeros and ones) or (input, value or row of values).
        name, tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, seed, schedule, boundaries,
            augment, drop_last, relabel, target: see `from_tensors`. A random transform inside the data set would be drawn once, for
            good: leave it out there, and pass it, batched, as `augment`.
        memory_map: a folder for the inputs of data larger than memory: two files, memory-mapped.
        workers: processes that read.
        progress: whether to show a bar, in a terminal.

    Raises:
        ValueError, TypeError: for an empty data set, samples that are not of one shape, and a `class_to_idx` of the two data sets
            that gives one label two names; see also `from_tensors`.

    """
    check_options({name: value for name, value in locals().items() if name != "class_order" or not relabel})
    check_same_names(train, test, name)
    folder = None if memory_map is None else Path(memory_map)
    parts = {
        kind: read(part, f"{name}: {kind}", None if folder is None else folder / f"{kind}.raw", workers, progress, relabel, target)
        for kind, part in (("train", train), ("test", test))
    }
    return from_tensors(
        *parts["train"], *parts["test"],
        name=name, tasks=tasks, scenario=scenario, epochs=epochs, batch_size=batch_size, class_order=class_order,
        sessions_per_task=sessions_per_task, validation=validation, seed=seed, schedule=schedule, boundaries=boundaries,
        augment=augment, resident=memory_map is None, drop_last=drop_last, relabel=relabel, target=target,
    )  # fmt: skip


def check_same_names(train: object, test: object, name: str) -> None:
    """Refuse data sets, as torchvision's `ImageFolder`, that number classes of other names alike: one folder more does that."""
    train_names, test_names = (getattr(dataset, "class_to_idx", None) for dataset in (train, test))
    if not isinstance(train_names, Mapping) or not isinstance(test_names, Mapping):
        return
    names = {label: of for of, label in train_names.items()}
    for of, label in test_names.items():
        if label in names and names[label] != of:
            raise ValueError(
                f"{name}: label {label} is {names[label]!r} in the training set and {of!r} in the test set: give both the same "
                "classes, as folders of the same names"
            )


def read(
    dataset: Dataset[Any],
    what: str,
    file: Path | None,
    workers: int = 0,
    progress: bool = True,
    relabel: bool = False,
    target: str = "label",
) -> tuple[Tensor, Array]:
    """Read each sample of a data set once: inputs into one tensor, memory-mapped if a file is named, and targets into another.

    Labels that are to be numbered anew are an array of what the data set has.
    """
    if isinstance(dataset, DataLoader):
        raise TypeError(f"{what} set is a DataLoader, which makes batches of its own: pass its data set, loader.dataset")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{what} set has no length, or no items: from_dataset takes data sets that are indexed, not iterated")
    total = len(dataset)
    if not total:
        raise ValueError(f"{what} set is empty")
    x: Tensor | None = None
    y: list[Any] = []
    loader = DataLoader(
        dataset, batch_size=256, num_workers=workers, collate_fn=partial(collate, target=target), generator=torch.Generator()
    )
    done = 0
    with progress_bar(f"reading {what}", total, progress) as advance:
        for inputs, labels in loader:
            if x is None:
                x = _room((total, *inputs.shape[1:]), inputs.dtype, file)
            if inputs.shape[1:] != x.shape[1:] or inputs.dtype != x.dtype:
                raise ValueError(
                    f"{what}: input {done} or one of the next {len(inputs)} is {tuple(inputs.shape[1:])} of {inputs.dtype}, "
                    f"the first was {tuple(x.shape[1:])} of {x.dtype}"
                )
            x[done : done + len(inputs)] = inputs
            y += labels
            done += len(inputs)
            advance(len(inputs))
    assert x is not None
    if target != "label":
        if len(widths := {len(row) for row in y}) > 1:
            raise ValueError(f"{what} targets must be rows of one length, not of {sorted(widths)[:5]}")
        return x, torch.stack(y)
    if relabel:
        return x, np.array(y, dtype=object)
    return x, as_labels(y, what)


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


def collate(samples: list[Any], target: str = "label") -> tuple[Tensor, list[Any]]:
    """Join inputs as they are, and list their targets: PIL images become (channels, height, width), float64 becomes float32."""
    inputs, labels = [], []
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            what = f"{len(sample)} values" if isinstance(sample, (tuple, list)) else f"a {type(sample).__name__}"
            raise TypeError(
                f"each sample must be a pair of input and {target}, not {what}: wrap the data set in one that gives pairs"
            )
        x, y = sample
        if hasattr(x, "getbands"):  # an image of PIL's has the channels last, or none
            x = torch.from_numpy(np.array(x))
            x = x[None] if x.dim() == 2 else x.movedim(-1, 0)
        x = as_tensor([x] if isinstance(x, (int, float)) else x, "inputs")
        inputs.append(as_inputs(x, "inputs"))
        labels.append(_label(y) if target == "label" else _target_row(y, target))
    for what, kinds in (("shape", {tuple(x.shape) for x in inputs}), ("dtype", {x.dtype for x in inputs})):
        if len(kinds) > 1:
            hint = ": resize them in the data set's transform" if what == "shape" else ""
            raise ValueError(f"inputs must have one {what}, not {sorted(kinds, key=str)}{hint}")
    return torch.stack(inputs), labels


def _label(y: Any) -> Any:
    """Return a label as a plain number or string, or refuse it in one sentence."""
    shape = tuple(getattr(y, "shape", ()))
    if isinstance(y, (list, tuple, dict)) or shape not in ((), (1,)):
        size = f"of shape {shape}" if shape else f"a {type(y).__name__}"
        raise TypeError(
            f"labels must be one whole number each, not {size}: of a one-hot row take y.argmax(); several labels of a sample need "
            "from_dataset(..., target='multilabel'), real numbers target='value'"
        )
    if isinstance(y, (Tensor, np.ndarray, np.generic)):
        y = y.item()
    if isinstance(y, bool) or not isinstance(y, (int, str)):
        hint = ": real numbers need from_dataset(..., target='value')" if isinstance(y, float) else ""
        raise TypeError(f"labels must be whole numbers, not {y!r}{hint}")
    return y


def _target_row(y: Any, target: str) -> Tensor:
    """Return the targets of a sample as a row, or refuse them in one sentence."""
    if isinstance(y, str) or not isinstance(y, (Tensor, np.ndarray, np.generic, list, tuple, int, float)):
        raise TypeError(f"{target} targets must be numbers, not {y!r:.100}")
    plain = isinstance(y, (np.generic, int, float))
    row = as_tensor([y] if plain else y, f"{target} targets")
    if row.dim() > 1:
        raise TypeError(f"{target} targets must be a row of numbers for each sample, not of shape {tuple(row.shape)}")
    return row.reshape(-1)
