"""A stream's classes as one task: ordinary supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clstream.params import check_integer
from clstream.pretraining.weights import ranges
from clstream.stream import Samples, Stream, Subset, Task


def join_tasks(stream: Stream, classes: Sequence[int] | None = None, epochs: int | None = None) -> Stream:
    """Return a stream with all classes of another one, or some, in one task and one session: ordinary supervised training.

    The task has the validation samples of all tasks, if they hold some back.

    Args:
        stream: where the samples come from; they are gathered in memory.
        classes: the labels that are kept. None: all.
        epochs: passes over the session. None: as many as over those of the stream.

    Raises ValueError for labels that the stream doesn't have, and for a stream of other targets than labels.
    """
    if stream.targets != ("label",):
        raise ValueError(f"{stream.name} has {' and '.join(stream.targets)} targets: tasks are joined for training on labels only")
    check_integer(1, none=True, epochs=epochs)
    labels = {label for task in stream.tasks for label in task.classes}
    kept = sorted(labels if classes is None else set(classes))
    if strange := [label for label in kept if label not in labels]:
        raise ValueError(f"{stream.name} has no classes {ranges(strange)}: it has {ranges(labels)}")
    if not kept:
        raise ValueError("there are no classes to train on")
    wanted = torch.tensor(kept)

    def gather(parts: Sequence[Samples | Subset]) -> Samples:
        first, *others = [part[torch.isin(part.y, wanted).nonzero().flatten()] for part in parts]
        for samples in others:
            first = first + samples
        return first

    held = [task.validation for task in stream.tasks if task.validation is not None]
    joined = Task(
        0,
        tuple(kept),
        gather([task.train for task in stream.tasks]),
        gather([task.test for task in stream.tasks]),
        gather(held) if held else None,
    )
    name, epochs = f"{stream.name}, joined", stream.epochs if epochs is None else epochs
    return replace(
        stream, name=name, tasks=[joined], schedule=None, scenario="class", epochs=epochs, data=None, probes=(),
        class_names=stream.class_names[: kept[-1] + 1],
    )  # fmt: skip
