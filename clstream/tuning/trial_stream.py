"""What a search is run on: a stream whose tests are held-out training samples, and that leads to no test sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from clstream.params import check_integer
from clstream.stream import MixedSchedule, Samples, Stream, Subset

Part = Samples | Subset


def trial_stream(stream: Stream, tasks: int | None = None) -> Stream:
    """Return a stream's first tasks, tested on their validation samples, with nothing in it that leads to a test sample.

    All that it holds in memory is copied: the samples to train and to validate on, and no others. Data that is larger than memory
    (`resident` is False) stays where it is, unless test samples lie in the same tensor.

    Args:
        stream: holds back samples (`validation` above 0).
        tasks: how many; each with all of its sessions. None: all.

    Raises:
        ValueError: if the stream holds nothing back, there are not so many tasks, or its sessions mix tasks.

    """
    check_integer(1, len(stream.tasks), none=True, tasks=tasks)
    tuned = stream.for_tuning()
    schedule, kept = tuned.schedule, tuned.tasks[:tasks]
    if len(kept) < len(tuned.tasks):
        if isinstance(schedule, MixedSchedule):
            raise ValueError(f"the sessions of {stream.name} mix tasks, so it has no first ones: tune on all of them")
        assert schedule is not None
        schedule = [number for number in schedule if number < len(kept)]
        if not schedule:
            raise ValueError(f"{stream.name} has no session of its first {len(kept)} tasks: tune on more of them")
    tested = {*_storages(task.test for task in stream.tasks), *_storages(probe.samples for probe in stream.probes)}
    own = _Copies([part for task in kept for part in (task.train, task.test)], tested, stream.resident)
    built = [replace(task, train=own.part(task.train), test=own.part(task.test)) for task in kept]
    classes = 1 + max((max(task.classes) for task in kept if task.classes), default=-1)
    return replace(tuned, tasks=built, schedule=schedule, class_names=tuned.class_names[:classes], data=None)


def _storages(parts: Iterable[Part]) -> set[int]:
    """Return where the storages of the inputs and targets of samples lie."""
    sources = [part.source if isinstance(part, Subset) else part for part in parts]
    return {rows.untyped_storage().data_ptr() for source in sources for rows in (source.x, source.y)}


class _Copies:
    """Samples without others that lie in the same tensors; what was of one source is of one source.

    Args:
        parts: the samples that are kept.
        tested: where the storages lie that have test samples.
        resident: whether the data is in memory, and all of it is copied.

    """

    def __init__(self, parts: list[Part], tested: set[int], resident: bool) -> None:
        self.tested, self.resident = tested, resident
        self.subsets = [part for part in parts if isinstance(part, Subset)]
        self.used: dict[int, Tensor] = {}  # by the identity of a source's inputs, the rows that are kept
        self.copies: dict[tuple[int, int], Tensor] = {}

    def part(self, part: Part) -> Part:
        """Return some samples, in tensors without others."""
        source = part.source if isinstance(part, Subset) else part
        if not self.resident and source.x.untyped_storage().data_ptr() not in self.tested:
            return part
        if isinstance(part, Samples):
            return self._copied(part, torch.arange(len(part)))
        rows = self._rows(source)
        cached = None if part.cached is None else self._copied(part.cached, torch.arange(len(part)))
        return replace(part, source=self._copied(source, rows), index=torch.searchsorted(rows, part.index), cached=cached)

    def _rows(self, source: Samples) -> Tensor:
        """Return the rows of a source that any part has, sorted, on its index's device."""
        if id(source.x) not in self.used:
            self.used[id(source.x)] = torch.cat([part.index for part in self.subsets if part.source.x is source.x]).unique()
        return self.used[id(source.x)]

    def _copied(self, source: Samples, rows: Tensor) -> Samples:
        def copied(field: Tensor) -> Tensor:
            key = (id(field), id(source.x))
            if key not in self.copies:
                self.copies[key] = field.index_select(0, rows.to(field.device))
            return self.copies[key]

        extra = {name: copied(field) for name, field in source.extra.items()}
        return Samples(copied(source.x), copied(source.y), extra, source.target)
