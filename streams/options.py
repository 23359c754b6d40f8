"""Options that streams share: each name means the same everywhere, so it is checked in one place, before any data is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

from clstream.streams.data import NAMES

from clstream.params import check_bool, check_choice, check_integer, check_integers, check_number, check_positive, check_share
from clstream.stream import SCENARIOS, TARGETS

Tasks = int | list[int] | list[list[int]]
"""How classes are dealt to tasks: the number of tasks, the number of classes of each, or the labels of each."""

COUNTS = ("epochs", "batch_size", "sessions_per_task", "sessions", "session_size", "slots", "shots", "classes", "features",
          "train_per_class", "test_per_class")  # fmt: skip
"""Whole numbers of at least 1."""

NATURALS = ("seed", "pad", "after", "workers", "feature")
"""Whole numbers of at least 0."""

SWITCHES = ("boundaries", "resident", "shuffle", "drop_last", "relabel", "straddle", "shuffled", "bilinear", "lazy", "progress")
"""True or False."""

SHARES = ("blur", "disjoint", "softness")
"""Numbers from 0 to 1."""

CHOICES = {"scenario": SCENARIOS, "data": NAMES, "target": TARGETS}
"""Names of something."""


def check_options(options: Mapping[str, object], *optional: str) -> None:
    """Raise ValueError, in one sentence, for an option that is not what it must be; others than those of this file are left.

    Args:
        options: by name, as `locals()` has them at the begin of a function.
        optional: those that may be None.

    """
    for name, value in options.items():
        none = name in optional
        option: dict[str, Any] = {name: value}
        if name == "tasks":
            check_tasks(value, none)
        elif name in COUNTS:
            check_integer(1, none=none, **option)
        elif name in NATURALS:
            check_integer(0, none=none, **option)
        elif name in SWITCHES:
            check_bool(none=none, **option)
        elif name in SHARES:
            check_number(0, 1, **option)
        elif name in CHOICES:
            check_choice(CHOICES[name], none=none, **option)
        elif name == "class_order" and isinstance(value, (list, tuple)):
            check_integers(0, **option)
        elif name == "class_order":
            check_integer(0, none=True, **option)
        elif name == "validation":
            check_share(**option)
        elif name in ("delay", "spread"):
            check_number(0, **option)
        elif name == "ratio":
            check_number(1, **option)
        elif name == "new_class":
            check_positive(**option)


def check_tasks(tasks: object, none: bool = False) -> None:
    """Raise ValueError for what is neither a number of tasks, nor a list of sizes, nor one of groups of distinct labels."""
    if not isinstance(tasks, (list, tuple)):
        check_integer(1, none=none, tasks=tasks)
    elif not tasks:
        raise ValueError("tasks must be a number, a list of sizes such as [5, 1, 1], or one of groups of labels, not an empty list")
    elif not any(isinstance(part, (list, tuple)) for part in tasks):
        check_integers(1, tasks=tasks)
    else:
        for number, group in enumerate(tasks):
            if not isinstance(group, (list, tuple)) or not group or not all(map(_is_label, group)):
                raise ValueError(f"tasks[{number}] must be a list of labels, as the other groups are, not {group!r:.100}")
            if len(set(group)) < len(group):
                raise ValueError(f"tasks[{number}] must name distinct labels, not {group!r:.100}")


def _is_label(label: object) -> bool:
    try:
        return isinstance(label, str) or (not isinstance(label, bool) and index(label) is not None)  # type: ignore[arg-type]  # asked
    except TypeError:
        return False
