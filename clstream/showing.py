"""What a stream delivers over time, before anything is run: counts, for a picture and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clstream.stream import Stream

MOST = 240
"""Sessions that are looked at; of more, every so many of them."""


@dataclass(frozen=True, eq=False)
class Composition:
    """How many samples of each class or task the sessions of a stream deliver.

    Args:
        by: "class" or "task".
        names: what the classes or tasks are called: their numbers, or the stream's names of its classes.
        sessions: (shown,), int64: the numbers of the sessions that were looked at.
        counts: (shown, names), int64.

    """

    by: str
    names: tuple[int | str, ...]
    sessions: Tensor
    counts: Tensor


def composition(stream: Stream, by: str | None = None, most: int = MOST) -> Composition:
    """Return what a stream delivers, by "class" or by "task"; None: by task if the tasks share their classes, else by class."""
    by = by or ("task" if stream.scenario == "domain" else "class")
    if by not in ("class", "task"):
        raise ValueError(f"by must be class or task, not {by!r}")
    sessions = torch.linspace(0, len(stream) - 1, min(len(stream), most), dtype=torch.float64).round().long()
    if by == "task":
        counts = torch.stack([stream.mix(number) for number in sessions.tolist()])
        return Composition(by, tuple(range(len(stream.tasks))), sessions, counts)
    labels = sorted({label for task in stream.tasks for label in task.classes})
    names: list[int | str] = [stream.class_name(label) if stream.class_names else label for label in labels]
    found = [stream.labels(number).bincount(minlength=stream.classes) for number in sessions.tolist()]
    return Composition(by, tuple(names), sessions, torch.stack(found)[:, labels])
