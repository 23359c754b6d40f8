"""Tasks of samples whose targets are no labels: several labels dealt out by class, and values at random."""

from __future__ import annotations

from itertools import pairwise

import torch
from clstream.streams.arrays import with_targets
from clstream.streams.class_splits import Array, hold_back, split_classes
from clstream.streams.options import Tasks
from torch import Tensor

from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Subset, Task

Dealt = tuple[list[Task], tuple[str, ...], str, DataSource]
"""Tasks, notes for the card, the scenario, and where the samples come from."""


def multilabel_tasks(
    name: str,
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    tasks: Tasks,
    class_order: int | list[int] | None,
    scenario: str,
    validation: float,
    seed: int,
) -> Dealt:
    """Deal classes to tasks: each has the samples with a positive among its classes, to learn with the targets of these alone."""
    if scenario == "domain":
        raise ValueError(
            f"{name}: tasks of multi-label targets have classes of their own: scenario must be class or task, not domain"
        )
    train, test = _both(name, x, y, x_test, y_test, "multilabel")
    classes = train.y.shape[1]
    present = train.y.any(0)
    if empty := (~present).nonzero().flatten().tolist():
        raise ValueError(f"{name}: no training sample has a positive of the classes {empty[:20]}: leave their columns out")
    labels = torch.arange(classes)
    groups, notes = split_classes(name, labels, labels[test.y.any(0)], tasks, class_order, scenario)
    built = []
    times = torch.zeros(len(train), dtype=torch.int64)
    for number, group in enumerate(groups):
        mask = torch.zeros(classes, dtype=torch.bool)
        mask[group] = True
        rows, test_rows = (part.y[:, mask].any(1).nonzero().flatten() for part in (train, test))
        times[rows] += 1
        kept, held = hold_back(rows, validation, derive(seed, "samples", number), f"{name}: task {number}")
        back = None if held is None else Subset(train, held)
        built.append(Task(number, tuple(group), Subset(train, kept, class_mask=mask), Subset(test, test_rows), back))
    notes = (*notes, "a task's training samples have the targets of its own classes, those of all others are 0")
    if several := int((times > 1).sum()):
        notes = (*notes, f"{several:,} of {len(train):,} training samples come in more than one task, each time with its targets")
    if left := int((times == 0).sum()):
        notes = (*notes, f"{left:,} of {len(train):,} training samples have no positive of any task's classes, and are left out")
    return built, notes, scenario, DataSource({"train": train, "test": test})


def value_tasks(
    name: str,
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    tasks: Tasks,
    class_order: object,
    scenario: str,
    validation: float,
    seed: int,
) -> Dealt:
    """Deal rows to tasks at random, evenly."""
    if class_order is not None or scenario == "task":
        raise ValueError(f"{name}: values have no classes: class_order must be None, and scenario domain")
    if isinstance(tasks, (list, tuple)):
        raise ValueError(f"{name}: of values tasks is a number; for other groups of rows make a Stream of Task objects")
    train, test = _both(name, x, y, x_test, y_test, "value")
    if tasks > min(len(train), len(test)):
        raise ValueError(f"{name}: {len(train)} training and {len(test)} test samples are too few for {tasks} tasks")
    rows, test_rows = (_dealt(len(part), tasks, derive(seed, "rows", kind)) for kind, part in (("train", train), ("test", test)))
    note = f"rows are dealt out to {tasks} tasks at random, evenly"
    return (
        domains(name, train, test, rows, test_rows, validation, seed),
        (note,),
        "domain",
        DataSource({"train": train, "test": test}),
    )


def domains(
    name: str, train: Samples, test: Samples, rows: list[Tensor], test_rows: list[Tensor], validation: float, seed: int
) -> list[Task]:
    """Return a task of values for each group of rows."""
    built = []
    for number, (own, own_test) in enumerate(zip(rows, test_rows, strict=True)):
        kept, held = hold_back(own, validation, derive(seed, "samples", number), f"{name}: task {number}")
        back = None if held is None else Subset(train, held)
        built.append(Task(number, (), Subset(train, kept), Subset(test, own_test), back))
    return built


def _dealt(count: int, tasks: int, seed: int) -> list[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ends = [count * number // tasks for number in range(tasks + 1)]
    return [order[first:end].sort().values for first, end in pairwise(ends)]


def _both(name: str, x: Array, y: Array, x_test: Array, y_test: Array, target: str) -> tuple[Samples, Samples]:
    """Return training and test samples. Raises ValueError for targets of two widths."""
    train, test = with_targets(x, y, target, f"{name}: training"), with_targets(x_test, y_test, target, f"{name}: test")
    if train.y.shape[1] != test.y.shape[1]:
        raise ValueError(f"{name}: training targets have {train.y.shape[1]} columns, test targets {test.y.shape[1]}")
    return train, test
