"""A session as a data set, an experience and a data loader of Avalanche's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clstream.avalanche.imports import import_avalanche
from clstream.bus import on
from clstream.events import TaskEnded
from clstream.stream import Samples, Session


class AtBoundaries:
    """A part that declares the need of boundaries, for a strategy that consolidates when tasks end."""

    @on(TaskEnded)
    def consolidate(self, event: TaskEnded) -> None:
        """Do nothing: their own callbacks consolidate, whenever a session ends."""


class SessionDataset(Dataset[Any]):
    """The samples of a session, one at a time, as Avalanche's data sets read them."""

    not_state = ("samples",)

    def __init__(self, session: Session, samples: Samples) -> None:
        self.session, self.samples = session, samples
        self.targets: list[int] = samples.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if "samples" not in vars(self):  # the run was resumed
            self.samples = self.session.samples[:]
        return self.samples.x[index], self.targets[index]


def new_experience(dataset: SessionDataset, labels: int | list[int], number: int) -> Any:
    """Return an experience of theirs with a data set of some samples, which have these task labels."""
    wrap = import_avalanche("benchmarks.utils")._make_taskaware_classification_dataset
    wrapped = wrap(dataset, task_labels=labels, collate_fn=collate)
    benchmarks = import_avalanche("benchmarks")
    experience = benchmarks.DatasetExperience(dataset=wrapped, current_experience=number)
    experience.origin_stream = benchmarks.CLStream("train", [])
    return experience


def collate(samples: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Return samples of theirs as a batch: inputs, labels, ..., task labels."""
    columns = zip(*samples, strict=True)
    return [torch.stack(list(column)) if isinstance(column[0], Tensor) else torch.tensor(column) for column in columns]


class Batches:
    """Stands for a loader of our batches."""

    def __init__(self, dataset: SessionDataset, batch_size: int, drop_last: bool) -> None:
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last

    def __len__(self) -> int:
        return (len(self.dataset) if self.drop_last else len(self.dataset) + self.batch_size - 1) // self.batch_size


@contextmanager
def quiet() -> Iterator[None]:
    """Let warnings through, but for those of Avalanche that it calls what it itself deprecates."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning) or "/avalanche/" not in warning.filename.replace("\\", "/"):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_whole(theirs: Any, dataset: SessionDataset) -> bool:
    """Return whether an Avalanche data set is all of a session, in its order."""
    inside = theirs._flat_data
    while hasattr(inside, "_datasets"):
        if inside._indices is not None or len(inside._datasets) != 1:
            return False
        inside = inside._datasets[0]
    return inside is dataset
