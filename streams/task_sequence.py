"""A sequence of tasks in order of publication, each with classes and a kind of targets of its own; none shows its test samples.

The protocol of NEVIS'22 (Bornschein et al., arXiv 2211.11747), as its code (google-deepmind/dm_nevis, 2022-12-13) has it. A data
set that has no validation set is cut 70 / 15 / 15 into train, dev and dev_test; of one that has, the training set is cut 80 / 20
into train and dev, and the validation set is dev_test. Test is the data set's own. Here dev is a task's `validation`, and it is
tested on dev_test, or on test where `split` says so.

A stream has no tensor that leads to what it doesn't test on. Of what it tests on, a strategy that learns sees nothing: the tasks,
sessions and stream that it is given have `Withheld` in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from clstream.streams.options import check_options
from torch import Tensor

from clstream.params import check_choice
from clstream.seeds import derive
from clstream.stream import Delivery, Samples, Session, Stream, Task

SPLITS = ("dev_test", "test")
"""What tasks are tested on."""

SMALLEST_BATCH, LARGEST_BATCH = 16, 512


@dataclass(frozen=True, slots=True)
class TaskKey:
    """What tells tasks apart: those of one key are the same data set, and share their classes.

    Args:
        name: of the data set.
        kind: of its targets, "label" or "multilabel".
        year: of its publication.
        classes: their names.

    """

    name: str
    kind: str = "label"
    year: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """A data set as it was published: labels from 0 up, or (n, classes) multi-label targets.

    Args:
        key: what it is.
        train, test: its own sets.
        validation: its own, if it has one.

    """

    key: TaskKey
    train: Samples
    test: Samples
    validation: Samples | None = None


def batch_size_of(samples: float) -> int:
    """Return the batch size of the authors' code for so many training samples: 0.0025 of them, a power of 2 from 16 to 512."""
    return int(max(SMALLEST_BATCH, min(LARGEST_BATCH, 2.0 ** math.floor(math.log2(max(1.0, 0.0025 * samples))))))


def cut(samples: Samples, ends: Sequence[float], seed: int) -> list[Samples]:
    """Cut samples at random into parts, where `ends` are the shares up to the end of each; labels are cut class by class."""
    rank = torch.empty(len(samples), dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    groups = (
        [samples.y == label for label in samples.y.unique()] if samples.target == "label" else [torch.ones(len(samples)).bool()]
    )
    for group in groups:
        count = int(group.sum())
        rank[group] = torch.randperm(count, generator=draw).double() / count
    edges = torch.tensor(ends, dtype=torch.float64) - 1e-9  # 0.7 of 10 is 7, whatever 0.7 is in binary
    part = torch.bucketize(rank, edges[:-1], right=True)
    return [samples[(part == number).nonzero().flatten()] for number in range(len(ends))]


def splits_of(data: DataSet, seed: int) -> dict[str, Samples]:
    """Return train, dev, dev_test and test of a data set."""
    if data.validation is None:
        train, dev, dev_test = cut(data.train, (0.7, 0.85, 1.0), seed)
    else:
        (train, dev), dev_test = cut(data.train, (0.8, 1.0), seed), data.validation
    return {"train": train, "dev": dev, "dev_test": dev_test, "test": data.test}


class WithheldError(AttributeError):
    """A strategy that learns asked for what it will be tested on."""


class Withheld:
    """Stands for the test samples of a task while a strategy learns; it has their number, and nothing else."""

    def __init__(self, task: int, count: int) -> None:
        self._task, self._count = task, count

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what copies and pickles ask for
            raise AttributeError(name)
        raise WithheldError(
            f"a strategy that learns is not shown what it will be tested on: it asked the test samples of task {self._task} for "
            f"{name}; train and validation are what it may use"
        )

    def __getitem__(self, index: object) -> NoReturn:
        self.__getattr__("samples")


@dataclass(frozen=True, eq=False, repr=False)
class TaskSequence(Stream):
    """A stream of tasks with keys, which shows a strategy that learns no test samples.

    Args:
        keys: for each task what it is. Tasks of one key have the same classes.
        others: see `Stream`.

    """

    keys: tuple[TaskKey, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", tuple(self.keys)[: len(self.tasks)])

    @property
    def visible(self) -> TaskSequence:
        """What strategies are given: this stream without test samples."""
        return self._sealed

    @cached_property
    def _sealed(self) -> TaskSequence:
        tasks: list[Any] = [replace(task, test=Withheld(task.id, len(task.test))) for task in self.tasks]  # type: ignore[arg-type]
        sealed = self._like(tasks=tuple(tasks), probes=())
        vars(sealed)["_sealed"] = sealed
        return sealed  # type: ignore[return-value]  # a copy of this one

    def _like(self, **changes: object) -> Stream:
        twin = super()._like(**changes)
        vars(twin).pop("_sealed", None)
        return twin

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.tasks[0].train[:1].x.shape[1:])

    def session(self, index: int) -> Session:
        """Return a session by number, whose task has no test samples. Raises IndexError outside 0 to len(stream) - 1."""
        return super(TaskSequence, self._sealed).session(index)

    def deliveries(self, first: int = 0, end: int | None = None) -> Iterator[Delivery]:
        """Yield sessions with their tasks, which have no test samples: see `Stream.deliveries`."""
        return super(TaskSequence, self._sealed).deliveries(first, end)


def task_sequence(
    name: str,
    data: Sequence[DataSet],
    split: str = "dev_test",
    epochs: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    drop_last: bool = False,
    notes: tuple[str, ...] = (),
) -> TaskSequence:
    """Return a stream of a task for each data set, one session each, task-incremental, with classes of its own by key.

    Args:
        name: of the stream.
        data: the data sets, in order of publication. One that comes again has the same key.
        split: what tasks are tested on, "dev_test" or "test".
        epochs: passes over a task's training samples.
        batch_size: samples of a step. None: `batch_size_of` the mean number of training samples of a task.
        seed: of how data sets are cut, and of the order of batches.
        augment, drop_last, notes: see `Stream`.

    Raises ValueError, in one sentence, for data sets that make no such stream.

    """
    check_options({"epochs": epochs, "batch_size": batch_size, "seed": seed, "drop_last": drop_last}, "batch_size")
    check_choice(SPLITS, split=split)
    firsts: dict[TaskKey, int] = {}
    for whole in data:
        firsts.setdefault(whole.key, sum(len(key.classes) for key in firsts))
    total = sum(len(key.classes) for key in firsts)
    tasks = []
    for number, whole in enumerate(data):
        first, own = firsts[whole.key], len(whole.key.classes)
        parts = splits_of(whole, derive(seed, "splits", whole.key.name))
        train, dev, tested = (_numbered(parts[kind], first, own, total) for kind in ("train", "dev", split))
        if not min(len(train), len(dev), len(tested)):
            raise ValueError(f"{name}: {whole.key.name} has too few samples to cut into train, dev and {split}: {parts}")
        classes = range(own) if whole.key.kind == "label" else [label for label in range(own) if train.y[:, first + label].any()]
        tasks.append(Task(number, tuple(first + label for label in classes), train, tested, dev, whole.key.kind))
    mean = sum(len(task.train) for task in tasks) / len(tasks)
    last = max(max(task.classes) for task in tasks)
    names = tuple(f"{key.name}/{label}" for key in firsts for label in key.classes)
    return TaskSequence(
        name, tasks, None, epochs, batch_size_of(mean) if batch_size is None else batch_size, "task", seed, augment=augment,
        notes=(f"in order of publication, tested on {split}", *notes),
        drop_last=drop_last, class_names=names[: 1 + last], keys=tuple(whole.key for whole in data),
    )  # fmt: skip


def _numbered(samples: Samples, first: int, own: int, total: int) -> Samples:
    """Return samples with their classes numbered over the whole stream, from `first` on, in tensors of their own."""
    if samples.target == "label":
        return Samples(samples.x.clone(), samples.y + first)
    y = samples.y.new_zeros(len(samples), total)
    y[:, first : first + own] = samples.y
    return Samples(samples.x.clone(), y, target="multilabel")
