"""The event log as text for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator

from clstream.tracking.event_log import Entry


def format_log(log: Iterable[Entry], batches: bool = False) -> Iterator[str]:
    """Yield a line of text for each event of a log, indented by run, task, session and epoch; batches only if asked for."""
    depth = 0
    for entry in log:
        name = entry["event"]
        if name == "BatchLearned" and not batches:
            continue
        depth = 0 if name == "RunEnded" else max(0, depth - (name in ("TaskEnded", "SessionEnded", "EpochEnded")))
        try:
            text = TEXT[name](entry) if name in TEXT else _own(entry)
        except (KeyError, TypeError, ValueError, AttributeError, LookupError):  # of another version
            text = json.dumps(entry)
        seconds = entry.get("seconds")
        seconds = seconds if isinstance(seconds, (int, float)) else math.nan
        yield f"{str(entry.get('time', ''))[11:19]:8} {seconds:9.2f} s  {'  ' * depth}{text}".replace("\n", " ")
        depth += name in ("RunStarted", "TaskStarted", "SessionStarted", "EpochStarted")


def _own(entry: Entry) -> str:
    said = ", ".join(f"{name} {_digits(value)}" for name, value in entry.get("fields", {}).items())
    return f"{entry['event']}: {said}" if said else str(entry["event"])


def _digits(value: object) -> str:
    """Return a value in few characters: numbers with 4 digits."""
    if isinstance(value, list):
        return f"[{', '.join(map(_digits, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _evaluation(entry: Entry) -> str:
    name, values = (entry["main"], entry["values"]) if "main" in entry else ("accuracy", entry["accuracy"])
    each = " ".join(f"{float(value):.3f}" for value in values)
    if entry["within_session"]:
        return f"{name} {float(entry['mean']):.3f} after {entry['batches']} batches: {each}"
    lost = float(entry["forgetting"])
    return f"{name} {float(entry['mean']):.3f}{'' if math.isnan(lost) else f', forgetting {lost:.3f}'}: {each}"


TEXT: dict[str, Callable[[Entry], str]] = {
    "RunStarted": lambda entry: f"{entry['title']}: {entry['params']['stream.sessions']} sessions",
    "TaskStarted": lambda entry: f"task {entry['task']}: classes {_list(entry['classes'])}",
    "SessionStarted": lambda entry: f"session {entry['session']}: {entry['samples']} samples of classes {_list(entry['classes'])}",
    "EpochStarted": lambda entry: f"epoch {entry['epoch']}: {entry['batches']} batches",
    "BatchLearned": lambda entry: f"batch {entry['batch']}: {entry['samples']} samples, loss {float(entry['loss']):.4f}",
    "EpochEnded": lambda entry: f"epoch {entry['epoch']} ended",
    "SessionEnded": lambda entry: f"session {entry['session']} ended",
    "TaskEnded": lambda entry: f"task {entry['task']} ended",
    "Evaluated": _evaluation,
    "Resumed": lambda entry: (
        f"resumed from a checkpoint; lines after it, which come again, were cut: {entry['again']}"
        + (f"; with changed code: {'; '.join(entry['changed_code'])}" if "changed_code" in entry else "")
    ),
    "RunEnded": lambda entry: "the run ended" if entry["error"] is None else f"the run ended: {entry['error']}",
}
"""How the line of each event reads."""


def _list(classes: list[int]) -> str:
    """Return classes as text; many as their number."""
    return ", ".join(map(str, classes)) if len(classes) <= 20 else f"{classes[0]} to {classes[-1]} ({len(classes)} of them)"
