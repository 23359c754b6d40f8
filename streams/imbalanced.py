"""Rare classes: task after task, with long tails; `data` is as in `clstream.streams.task_free`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clstream.streams.drifting import long_tailed
from clstream.streams.options import Tasks, check_options
from clstream.streams.task_free import split_source

from clstream.stream import Stream


def imbalanced_tasks(
    data: str = "digits",
    tasks: Tasks = 5,
    ratio: float = 20.0,
    shuffled: bool = True,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    boundaries: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """A long tail: task after task, with ever fewer training samples from class to class.

    Args:
        ratio: of the samples of the most frequent class to those of the rarest one.
        shuffled: whether the classes become rare in a random order; if not, by label.
        boundaries: whether strategies are told of tasks.
        seed: of that order, and of which samples are left.
        data, tasks, epochs, batch_size, class_order, validation, root, drop_last: see `fuzzy_tasks`.

    """
    check_options(locals())
    stream = split_source("imbalanced", data, root, tasks, epochs, batch_size, class_order, validation, seed)
    return replace(long_tailed(stream, ratio, shuffled, seed), boundaries=boundaries, drop_last=drop_last)
