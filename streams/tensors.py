"""Streams from the user's own tensors, arrays or torch data sets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clstream.streams.class_splits import Array, hold_back, places, relabelled, split_classes, without_gaps
from clstream.streams.options import Tasks, check_options
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
) -> Stream:
    """Split labelled samples by class into tasks.

    Args:
        x: (n, *input_shape) training inputs. Integers (uint8 images, int64 tokens) keep their dtype, all other numbers become
            float32. A memory-mapped array stays on disk.
        y: (n,) training labels, whole numbers from 0; with `relabel` any whole numbers, or strings.
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

    Returns:
        The stream, with the samples ungathered: the tasks are views of one copy of the data.

    Raises:
        ValueError, TypeError: for options or data that don't fit; see also `Stream`.

    """
    check_options({name: value for name, value in locals().items() if name != "class_order" or not relabel})
    names: tuple[str, ...] = ()
    if relabel:
        y, y_test, tasks, class_order, names = relabelled(name, y, y_test, tasks, class_order)
    train, test = as_samples(x, y, f"{name}: training"), as_samples(x_test, y_test, f"{name}: test")
    if schedule is not None and sessions_per_task != 1:
        raise ValueError(f"{name}: sessions_per_task and schedule exclude each other: a schedule names the task of every session")
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


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes of inputs that are kept as they are; of these, models divide uint8 by 255."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
"""Dtypes that torch can do little with, and those that hold the same numbers."""


def as_samples(x: Array, y: Array, what: str) -> Samples:
    """Return inputs and labels as Samples, or refuse them in one sentence."""
    labels = as_labels(y, what)
    inputs = as_tensor(x, f"{what} inputs")
    if not inputs.dim():
        raise ValueError(f"{what} inputs must be (samples, ...), not a single number")
    if len(inputs) != len(labels):
        raise ValueError(f"{what} inputs are {len(inputs)}, labels {len(labels)}: there must be one label for each")
    return Samples(as_inputs(inputs, f"{what} inputs"), labels)


def as_inputs(inputs: Tensor, what: str) -> Tensor:
    """Return inputs in a dtype that streams have: integers as they are, all other numbers as float32."""
    inputs = inputs.to(WIDER.get(inputs.dtype, inputs.dtype))
    if inputs.dtype in INTEGERS:
        return inputs
    if not inputs.is_floating_point():
        numbers = ": .float() makes zeros and ones" if inputs.dtype == torch.bool else ""
        raise TypeError(f"{what} must be integers or real numbers, not {inputs.dtype}{numbers}")
    return inputs.to(torch.float32)


def as_labels(y: object, what: str) -> Tensor:
    """Return labels as (n,) int64, or refuse them in one sentence that says what to do."""
    if _are_strings(y):
        raise TypeError(f"{what} labels are strings: relabel=True numbers them, and reports call them what they were")
    labels = as_tensor(y, f"{what} labels")
    if labels.dim() == 2 and len(labels):
        one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all())
        instead = "samples with several labels are not supported"
        instead = "y.flatten() are the labels" if labels.shape[1] == 1 else "y.argmax(1) are the labels" if one_hot else instead
        raise TypeError(f"{what} labels must be one whole number each, not a row of {labels.shape[1]} numbers: {instead}")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex() or labels.dim() != 1:
        hint = ": y.long() makes whole numbers" if labels.dim() == 1 and not labels.is_complex() else ""
        raise TypeError(f"{what} labels must be one whole number each, not {tuple(labels.shape)} of {labels.dtype}{hint}")
    if not len(labels):
        raise ValueError(f"{what} set is empty")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise ValueError(f"{what} labels must be from 0 up, not {int(labels.min())}: relabel=True numbers any labels")
    return labels


def as_tensor(value: object, what: str) -> Tensor:
    """Return a tensor of numbers from a tensor, an array or nested lists, or refuse what is none of them in one sentence."""
    if hasattr(value, "to_numpy"):
        raise TypeError(f"{what} must be a tensor or an array, not a {type(value).__name__}: its .to_numpy() makes one")
    if hasattr(value, "toarray"):
        raise TypeError(f"{what} must be dense, not a sparse {type(value).__name__}: its .toarray() makes them so")
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        raise TypeError(f"{what} must be a tensor, an array or a list of numbers, not a {type(value).__name__}")
    try:
        with warnings.catch_warnings():  # a read-only memory map is fine: nothing here writes
            warnings.filterwarnings("ignore", message=".*not writable.*")
            tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{what} must be a tensor, an array or a list of numbers: {' '.join(str(error).split())}") from None
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} must be dense, not sparse: .to_dense() makes them so")
    if tensor.requires_grad:
        raise ValueError(f"{what} require a gradient, which would be kept from batch to batch: .detach() them")
    return tensor


def _are_strings(y: object) -> bool:
    if isinstance(y, np.ndarray):
        return y.dtype.kind in "US" or (y.dtype == object and bool(y.size) and isinstance(y.flat[0], str))
    return isinstance(y, (list, tuple)) and bool(y) and isinstance(y[0], str)


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
) -> Stream:
    """Split a torch data set by class: each sample is read once, here, and kept as a tensor.

    Args:
        train, test: map-style data sets of (input, label); inputs are tensors, arrays or PIL images of one shape.
        name, tasks, scenario, epochs, batch_size, class_order, sessions_per_task, validation, seed, schedule, boundaries,
            augment, drop_last, relabel: see `from_tensors`. A random transform inside the data set would be drawn once, for good:
            leave it out there, and pass it, batched, as `augment`.
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
        kind: read(part, f"{name}: {kind}", None if folder is None else folder / f"{kind}.raw", workers, progress, relabel)
        for kind, part in (("train", train), ("test", test))
    }
    return from_tensors(
        *parts["train"], *parts["test"],
        name=name, tasks=tasks, scenario=scenario, epochs=epochs, batch_size=batch_size, class_order=class_order,
        sessions_per_task=sessions_per_task, validation=validation, seed=seed, schedule=schedule, boundaries=boundaries,
        augment=augment, resident=memory_map is None, drop_last=drop_last, relabel=relabel,
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
    dataset: Dataset[Any], what: str, file: Path | None, workers: int = 0, progress: bool = True, relabel: bool = False
) -> tuple[Tensor, Array]:
    """Read each sample of a data set once: inputs into one tensor, memory-mapped if a file is named, and labels into another.

    Labels that are to be numbered anew are an array of what the data set has.
    """
    from rich.console import Console
    from rich.progress import track

    if isinstance(dataset, DataLoader):
        raise TypeError(f"{what} set is a DataLoader, which makes batches of its own: pass its data set, loader.dataset")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{what} set has no length, or no items: from_dataset takes data sets that are indexed, not iterated")
    total = len(dataset)
    if not total:
        raise ValueError(f"{what} set is empty")
    x: Tensor | None = None
    y: list[Any] = []
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
        y += labels
        done += len(inputs)
    assert x is not None
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


def collate(samples: list[Any]) -> tuple[Tensor, list[Any]]:
    """Join inputs as they are, and list their labels: PIL images become (channels, height, width), float64 becomes float32."""
    inputs, labels = [], []
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            what = f"{len(sample)} values" if isinstance(sample, (tuple, list)) else f"a {type(sample).__name__}"
            raise TypeError(f"each sample must be a pair of input and label, not {what}: wrap the data set in one that gives pairs")
        x, y = sample
        if hasattr(x, "getbands"):  # an image of PIL's has the channels last, or none
            x = torch.from_numpy(np.array(x))
            x = x[None] if x.dim() == 2 else x.movedim(-1, 0)
        x = as_tensor([x] if isinstance(x, (int, float)) else x, "inputs")
        inputs.append(as_inputs(x, "inputs"))
        labels.append(_label(y))
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
            f"labels must be one whole number each, not {size}: of a one-hot row take y.argmax(); samples with several labels are "
            "not supported"
        )
    if isinstance(y, (Tensor, np.ndarray, np.generic)):
        y = y.item()
    if isinstance(y, bool) or not isinstance(y, (int, str)):
        raise TypeError(f"labels must be whole numbers, not {y!r}")
    return y
