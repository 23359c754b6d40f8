"""Classes dealt to tasks: by number, sizes or groups, in an order, numbered anew, and a share of their samples held back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from clstream.streams.options import Tasks
from torch import Tensor

from clstream.params import check_share
from clstream.stream import Samples

Array = Tensor | npt.NDArray[Any]


def places(y: Tensor, groups: list[list[int]]) -> Tensor:
    """Return for each label its place within its task; for one that no task has, 0."""
    labels, order = torch.tensor([label for group in groups for label in group]).sort()
    place = torch.tensor([position for group in groups for position in range(len(group))])[order]
    nearest = torch.searchsorted(labels, y).clamp(max=len(labels) - 1)
    return torch.where(labels[nearest] == y, place[nearest], 0)


def hold_back(rows: Tensor, share: float, seed: int, what: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows in a random order, and apart from them a share that is held back to validate on (None for 0)."""
    check_share(validation=share)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    held = round(share * len(rows))
    if share and not 0 < held < len(rows):
        raise ValueError(f"{what}: validation={share} of {len(rows)} training samples leaves one part empty")
    return rows[held:], rows[:held] if held else None


def relabelled(
    name: str, y: Array, y_test: Array, tasks: Tasks, class_order: int | Sequence[int | str] | None
) -> tuple[Tensor, Tensor, Tasks, int | list[int] | None, tuple[str, ...]]:
    """Return labels numbered 0, 1, ... in their order, tasks and class order in these numbers, and what each was before."""

    def array(part: object) -> npt.NDArray[Any]:
        listed = isinstance(part, (list, tuple))  # of numbers and strings numpy would make strings
        return np.array(part, dtype=object) if listed else np.asarray(part.cpu() if isinstance(part, Tensor) else part)

    old, old_test = array(y), array(y_test)
    for what, part in (("training", old), ("test", old_test)):
        if part.ndim != 1 or part.dtype.kind not in "iuUbO" or not all(type(label) in (str, int, bool) for label in part.tolist()):
            raise TypeError(
                f"{name}: {what} labels must be one whole number or string each, to be numbered anew, not {part.shape} "
                f"of {part.dtype}"
            )
    try:
        labels = sorted({*old.tolist(), *old_test.tolist()})
    except TypeError:
        raise TypeError(f"{name}: labels must be all whole numbers, or all strings") from None
    number = {label: position for position, label in enumerate(labels)}

    def numbers(option: str, named: Sequence[int | str]) -> list[int]:
        if unknown := [label for label in named if label not in number]:
            raise ValueError(f"{name}: {option} names {unknown[0]!r}, which is not one of the labels")
        return [number[label] for label in named]

    if isinstance(class_order, (list, tuple)):
        class_order = numbers("class_order", class_order)
    if are_groups(tasks):
        tasks = [numbers(f"tasks[{position}]", group) for position, group in enumerate(tasks)]
    numbered = (torch.tensor([number[label] for label in part.tolist()], dtype=torch.int64) for part in (old, old_test))
    return *numbered, tasks, class_order, tuple(map(str, labels))  # type: ignore[return-value]  # two tensors, and these


def split_classes(
    name: str,
    y: Tensor,
    y_test: Tensor,
    tasks: Tasks,
    class_order: int | list[int] | None,
    scenario: str = "class",
    names: tuple[str, ...] = (),
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Deal the labels of `y` to tasks, and say where they don't divide evenly (the first get one more), and which are left out."""
    labels = y.unique().tolist()
    if extra := sorted(set(y_test.unique().tolist()) - set(labels)):
        raise ValueError(f"{name}: the labels {extra} are in the test set only: a class needs training samples")
    if are_groups(tasks):
        if class_order is not None:
            raise ValueError(f"{name}: tasks that name their labels have an order: class_order goes with numbers, not with groups")
        groups = _known_groups(name, tasks, labels, scenario)
    else:
        labels = _ordered(name, labels, class_order)
        groups = _dealt(name, tasks, labels)
    notes = []
    if not isinstance(tasks, (list, tuple)) and len({len(group) for group in groups}) > 1:
        sizes = ", ".join(str(len(group)) for group in groups)
        notes.append(f"{len(labels)} classes don't divide evenly into {tasks} tasks: they have {sizes}")
    if left := sorted(set(labels) - {label for group in groups for label in group}):
        shown = ", ".join(names[label] if names else str(label) for label in left[:20]) + (" ..." if len(left) > 20 else "")
        notes.append(f"{len(left)} of {len(labels)} classes are left out, they are in no task: {shown}")
    return groups, tuple(notes)


def are_groups(tasks: object) -> TypeGuard[list[list[int]]]:
    """Return whether tasks are given as the labels of each; `check_options` has seen that they are all that, or none is."""
    return isinstance(tasks, (list, tuple)) and isinstance(tasks[0], (list, tuple))


def _known_groups(name: str, groups: list[list[int]], labels: list[int], scenario: str) -> list[list[int]]:
    """Return the labels of each task. Raises ValueError for unknown ones, and for shared ones where tasks can't share."""
    owner: dict[int, int] = {}
    for number, group in enumerate(groups):
        for label in group:
            if label not in labels:
                raise ValueError(f"{name}: tasks[{number}] names {label!r}, which is not one of the labels")
            if owner.setdefault(label, number) != number and scenario != "task":
                raise ValueError(
                    f"{name}: tasks {owner[label]} and {number} both have the label {label}: tasks share classes only where the "
                    'scenario is "task"'
                )
    return [[int(label) for label in group] for group in groups]


def _ordered(name: str, labels: list[int], class_order: int | list[int] | None) -> list[int]:
    if class_order is None:
        return labels
    if not isinstance(class_order, (list, tuple)):
        shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(class_order)))
        return [labels[position] for position in shuffle.tolist()]
    if sorted(class_order) != labels:
        raise ValueError(f"{name}: class_order must name each of the classes {labels} once, not {class_order}")
    return [int(label) for label in class_order]


def _dealt(name: str, tasks: int | list[int] | list[list[int]], labels: list[int]) -> list[list[int]]:
    """Cut the labels, in their order, into a number of tasks or into tasks of given sizes."""
    if not isinstance(tasks, (list, tuple)):
        if tasks > len(labels):
            raise ValueError(f"{name}: {len(labels)} classes make 1 to {len(labels)} tasks, not {tasks}")
        return [[int(label) for label in part] for part in np.array_split(np.array(labels), tasks)]
    sizes = [index(size) for size in tasks]  # type: ignore[arg-type]  # they are no groups
    if sum(sizes) > len(labels):
        raise ValueError(f"{name}: there are {len(labels)} classes, and the sizes in tasks add up to {sum(sizes)}")
    ends = list(accumulate(sizes))
    return [labels[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def without_gaps(
    train: Samples, test: Samples, groups: list[list[int]], names: tuple[str, ...]
) -> tuple[Samples, Samples, list[list[int]], tuple[str, ...]]:
    """Number labels that no task has after all others, so that there are no gaps; return names of those that tasks have."""
    used = sorted({label for group in groups for label in group})
    if len(used) < len(names):
        number = torch.empty(len(names), dtype=torch.int64)
        number[used + sorted(set(range(len(names))) - set(used))] = torch.arange(len(names))
        train, test = (Samples(part.x, number[part.y]) for part in (train, test))
        groups = [number[group].tolist() for group in groups]
    return train, test, groups, tuple(names[label] for label in used)
