"""Needs: what a strategy needs a stream to show."""

from __future__ import annotations

import dis
import inspect
from types import CodeType
from typing import Any

from clstream.bus import handlers_of
from clstream.events import Evaluated, TaskEnded, TaskStarted
from clstream.strategy.strategy import Strategy


def needs(strategy: Strategy | type[Strategy]) -> dict[str, str]:
    """Return what a strategy needs a stream to show, each with the reason: "boundaries", "task ids".

    Read from its code: it needs boundaries if it, or one of its parts, handles TaskStarted, TaskEnded or Evaluated (which says
    what was taught), and task ids if it reads `batch.task` or `session.task`, by these names. An object also needs boundaries if
    its `active_classes` are those of the task.
    """
    found: dict[str, str] = {}
    if getattr(strategy, "active_classes", "all") == "task":
        found["boundaries"] = "active_classes='task' is about the classes of a task"
    cls = strategy if isinstance(strategy, type) else type(strategy)
    for name, event in handlers_of(cls):
        if issubclass(event, (TaskStarted, TaskEnded, Evaluated)):
            found.setdefault("boundaries", f"{cls.__name__}.{name} handles {event.__name__}")
    for each in cls.__mro__:
        for name, method in vars(each).items():
            code = getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)
            if code is not None and _reads_task(code):
                found.setdefault("task ids", f"{each.__name__}.{name} reads the task of a batch or session")
    for part in () if isinstance(strategy, type) else getattr(strategy, "parts", ()):
        for need, reason in needs(part).items():
            found.setdefault(need, reason)
    return found


def _reads_task(code: CodeType) -> bool:
    """Return whether an attribute `task` is loaded straight after something called `batch` or `session`."""
    before: Any = None
    for step in dis.get_instructions(code):
        last = before[-1] if isinstance(before, tuple) and before else before
        if step.opname == "LOAD_ATTR" and step.argval == "task" and last in ("batch", "session"):
            return True
        before = step.argval
    return any(_reads_task(inner) for inner in code.co_consts if isinstance(inner, CodeType))
