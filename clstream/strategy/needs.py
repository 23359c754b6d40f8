"""Needs: what a strategy needs a stream to show."""

from __future__ import annotations

from clstream.bus import handlers_of
from clstream.events import Evaluated, TaskEnded, TaskStarted
from clstream.strategy.strategy import Strategy


def needs(strategy: Strategy | type[Strategy]) -> dict[str, str]:
    """Return what a strategy needs a stream to show, each with the reason: "boundaries", "task ids".

    It needs boundaries if it, or one of its parts, handles TaskStarted, TaskEnded or Evaluated (which says what was taught), and
    task ids if its class says `needs_task = True`. An object also needs boundaries if its `active_classes` are those of the task.
    """
    reasons: dict[str, str] = {}
    cls = strategy if isinstance(strategy, type) else type(strategy)
    if getattr(strategy, "active_classes", "all") == "task":
        reasons["boundaries"] = "active_classes='task' is about the classes of a task"
    for name, event in handlers_of(cls):
        if issubclass(event, (TaskStarted, TaskEnded, Evaluated)):
            reasons.setdefault("boundaries", f"{cls.__name__}.{name} handles {event.__name__}")
    if getattr(strategy, "needs_task", False):
        reasons["task ids"] = f"{cls.__name__}.needs_task is True: it reads the task of batches or sessions"
    for part in () if isinstance(strategy, type) else getattr(strategy, "parts", ()):
        for need, reason in needs(part).items():
            reasons.setdefault(need, reason)
    return reasons
