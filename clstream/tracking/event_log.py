"""The event log: what happens in a run, a line of JSON for each event, and how to read it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clstream import __version__, events, metrics
from clstream.bus import Event, on
from clstream.engine.run_params import params_of
from clstream.files import check_writable
from clstream.params import check_bool
from clstream.results import Evaluation
from clstream.tracking.journal import Journal, describe_damage, read_lines, set_aside

FILE = "events.jsonl"

FORMAT = 1

CHUNK = 256
"""Batches whose losses are read from the device, and written, together."""

LARGEST = 64
"""Elements of the largest tensor that is logged whole; of a larger one, the shape and dtype are."""

Entry = dict[str, Any]


class EventLog:
    """Writes each event to the file events.jsonl, as a line of JSON: when it was, and what it says, in plain values.

    A run that is resumed goes on in the same file: what was logged beyond the checkpoint is cut off, since it happens again,
    and a line says so. The log of an earlier run in the same folder is renamed to events-1.jsonl, events-2.jsonl, ...
    If the file can't be written (a full disk), a warning says so once, the run goes on, and the lines are kept in memory until
    they can be written. They are lost only if the process ends before.

    Args:
        folder: of the run; made if it isn't there.
        batches: whether each batch that was learned is logged too, with its loss. These lines are written 256 at a time, and
            before any other line.

    Raises:
        OSError: if the folder can't be written.

    """

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self, folder: str | Path, batches: bool = False) -> None:
        check_bool(batches=batches)
        self.file, self.batches = check_writable(Path(folder), "the folder of the event log") / FILE, batches
        self._reset()

    def _reset(self) -> None:
        self.journal: Journal | None = None
        self.resuming = False
        self.changed_code: list[str] = []
        self.start = time.perf_counter()
        self.session: int | None = None
        self.learned = 0
        self.held: list[Entry] = []
        self.losses: list[Tensor] = []

    @on(Event)
    def log(self, event: Event) -> None:
        """Log an event; what a strategy emits before the run is known to be a new one is held back until then."""
        kind = type(event)
        if kind in (events.BatchReady, events.Answered):
            return
        if isinstance(event, events.RunStarted):
            self._begin(event)
            return
        if self.resuming:
            if kind not in CONTENT and kind is not events.BatchLearned:
                return  # emitted as the run is set up: the log has it
            self._take_up(None)  # the run was not logged before, so no state was given
        if isinstance(event, events.BatchLearned):
            self._learn(event)
            return
        if self.journal is None and kind is events.RunEnded:  # it never began
            self._reset()
            return
        if isinstance(event, events.SessionStarted):
            self.session = event.session.index
        self.held.append(self._entry(event))
        if self.journal is not None:
            self._write()
            if kind is events.RunEnded:
                self.journal.close()
                self._reset()

    def _begin(self, event: events.RunStarted) -> None:
        self.start = time.perf_counter()
        if event.resumed:
            self.resuming = True
            self.changed_code = [] if event.run is None else event.run.changed_code
            return
        set_aside(self.file)
        self.journal = Journal(self.file)
        self.held.insert(0, self._entry(event))
        self._write()

    def _learn(self, event: events.BatchLearned) -> None:
        """Count a batch, and hold its line, with the loss on its device."""
        self.learned += 1
        if self.batches:
            batch = event.batch
            place = {"session": self.session, "epoch": batch.epoch, "batch": batch.index, "samples": len(batch.samples)}
            self.held.append(self._now("BatchLearned") | place)
            self.losses.append(event.loss)
            if len(self.losses) >= CHUNK:
                self._write()

    def _now(self, name: str) -> Entry:
        when = datetime.now().astimezone().isoformat(timespec="milliseconds")
        return {"event": name, "time": when, "seconds": round(time.perf_counter() - self.start, 4)}

    def _entry(self, event: Event) -> Entry:
        kind = type(event)
        if kind in CONTENT:
            return self._now(kind.__name__) | CONTENT[kind](event)
        return self._now(kind.__name__) | {
            "session": self.session,
            "batches": self.learned,
            "fields": to_plain(public_fields(event)),
        }

    def _write(self) -> None:
        """Write what is held."""
        assert self.journal is not None
        if self.losses:
            losses = iter(torch.stack(self.losses).tolist())
            for entry in self.held:
                if entry["event"] == "BatchLearned":
                    entry["loss"] = to_plain(next(losses))
        self.journal.append(*self.held)
        self.held, self.losses = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return where the log is, as plain values: a resumed run cuts it there, and goes on."""
        if self.resuming:
            self._take_up(None)
        if self.journal is None:
            raise RuntimeError("an event log has a state only while a run goes on")
        self._write()
        seconds = time.perf_counter() - self.start
        return {"offset": self.journal.size, "seconds": seconds, "session": self.session, "batches": self.learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the log of a run that is resumed; raises OSError if it can't be opened."""
        self._take_up(state)

    def _take_up(self, state: Mapping[str, Any] | None) -> None:
        changed = {"changed_code": self.changed_code} if self.changed_code else {}
        self._reset()
        self.journal = Journal(self.file)
        again = 0
        if state is not None:
            self.start -= state["seconds"]
            self.session, self.learned = state["session"], state["batches"]
            with self.file.open("rb") as file:
                file.seek(min(state["offset"], self.journal.size))
                again = sum(1 for _ in file)
            self.journal.cut(state["offset"])
        self.journal.append(self._now("Resumed") | {"again": again} | changed)


def _of_run(event: events.RunStarted) -> Entry:
    stream, strategy = event.stream, event.strategy
    return {
        "log": FORMAT,
        "clstream": __version__,
        "title": f"{type(strategy).__name__} on {stream.name}, seed {event.seed}",
        "params": to_plain(params_of(event)),
        "data_fingerprint": stream.fingerprint,
        **({"class_names": list(stream.class_names)} if stream.class_names else {}),
    }


def _of_task(event: events.TaskStarted) -> Entry:
    task = event.task
    return {"task": task.id, "classes": list(task.classes), "train": len(task.train), "test": len(task.test)}


def _of_session(event: events.SessionStarted) -> Entry:
    session = event.session
    task = None if session.task_hidden else session.task.id
    return {"session": session.index, "task": task, "samples": len(session.samples), "classes": session.classes}


def _of_epoch(event: events.EpochStarted) -> Entry:
    return {"session": event.epoch.session.index, "epoch": event.epoch.index, "batches": len(event.epoch)}


def _of_evaluation(event: events.Evaluated) -> Entry:
    evaluation: Evaluation = event.evaluation
    about: Entry = {
        "sessions": evaluation.sessions_finished,
        "batches": evaluation.probe_steps[-1],
        "within_session": evaluation.within_session,
    }
    if evaluation.main_name != "accuracy":
        newest = evaluation.probes[-1] if evaluation.within_session else evaluation.main[-1]
        about |= {"main": evaluation.main_name, "values": to_plain(newest.tolist())}
    if evaluation.within_session:
        mean = metrics.average_accuracy(evaluation.probes, evaluation.probe_taught)
        return about | {"mean": to_plain(mean), "accuracy": to_plain(evaluation.probes[-1].tolist())}
    values: Entry = {
        "mean": metrics.average_accuracy(evaluation.main, evaluation.taught),
        "forgetting": metrics.forgetting(evaluation.main, evaluation.taught),
    }
    tasks, plain = len(evaluation.targets), ("accuracy", "task_accuracy")
    values |= {name: evaluation.measured[name][-1, :tasks].tolist() for name in plain if name in evaluation.measured}
    others = {name: matrix[-1] for name, matrix in evaluation.measured.items() if name not in plain}
    if others or tasks + 1 < len(evaluation.test_sets):
        others |= {name: evaluation.measured[name][-1] for name in plain if name in evaluation.measured}
        values["measured"] = {name: dict(zip(evaluation.test_sets, row.tolist(), strict=True)) for name, row in others.items()}
    return about | {name: to_plain(value) for name, value in values.items()}


def _of_end(event: events.RunEnded) -> Entry:
    return {"error": None if event.error is None else f"{type(event.error).__name__}: {event.error}"}


CONTENT: dict[type, Callable[[Any], Entry]] = {
    events.RunStarted: _of_run,
    events.TaskStarted: _of_task,
    events.SessionStarted: _of_session,
    events.EpochStarted: _of_epoch,
    events.EpochEnded: lambda event: {"session": event.epoch.session.index, "epoch": event.epoch.index},
    events.SessionEnded: lambda event: {"session": event.session.index},
    events.TaskEnded: lambda event: {"task": event.task.id},
    events.Evaluated: _of_evaluation,
    events.RunEnded: _of_end,
}
"""What the line of each of clstream's own events says, beside when it was."""


def public_fields(thing: object) -> dict[str, object]:
    """Return what an object holds: the fields of a dataclass, and other attributes whose names are not private."""
    declared = {field.name: getattr(thing, field.name) for field in fields(thing)} if is_dataclass(thing) else {}
    return declared | {name: value for name, value in getattr(thing, "__dict__", {}).items() if not name.startswith("_")}


def to_plain(value: object) -> Any:
    """Return a value as JSON has it.

    NaN and the infinities, which it has not, are the strings "nan", "inf" and "-inf": `float` reads them as it reads numbers.
    A tensor or array of at most 64 elements is a list, a larger one its shape and dtype. What is none of these is a text.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (Tensor, np.ndarray)):
        count = value.numel() if isinstance(value, Tensor) else value.size
        return to_plain(value.tolist()) if count <= LARGEST else {"shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if type(value).__repr__ is object.__repr__:  # that has an address in it, which means nothing later
        return type(value).__name__
    return repr(value)[:200]


def read(file: str | Path, damaged: list[int] | None = None) -> Iterator[Entry]:
    """Yield the events of a log, as dicts; a last line that is not whole, which a killed process may leave, is left out.

    Args:
        file: events.jsonl, or the folder that it is in.
        damaged: takes the numbers of lines that are no events. None: a warning names them.

    Raises:
        FileNotFoundError: if it isn't there.
        ValueError: after the last line, if there is no event in it; or if it is of a later version.

    """
    path = Path(file)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no event log at {path}: pass EventLog(folder) to `run` as an observer")
    return _read(path, damaged)


def _read(path: Path, damaged: list[int] | None) -> Iterator[Entry]:
    spoilt: list[int] = [] if damaged is None else damaged
    empty = True
    for number, entry in read_lines(path):
        if entry is None or not isinstance(entry.get("event"), str):
            spoilt.append(number)
            continue
        if entry["event"] == "RunStarted" and isinstance(entry.get("log"), int) and entry["log"] > FORMAT:
            raise ValueError(f"{path} is an event log of clstream {entry.get('clstream')}, which this version can't read")
        empty = False
        yield entry
    if empty:
        what = "is empty, or its first line is not whole" if not spoilt else "is no event log: no line of it is an event"
        raise ValueError(f"{path} {what}")
    if spoilt and damaged is None:
        warnings.warn(f"{path}: {describe_damage(spoilt)}, and left out", RuntimeWarning, stacklevel=2)
