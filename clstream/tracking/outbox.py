"""The outbox: what a run writes to its tracking server, in order, until it has arrived. Knows nothing of MLflow.

Its journal is the file tracking.jsonl in the run's folder. The first line says where the run is tracked. Then comes a numbered
line for each thing to write, on the disk before it is sent, and a line that marks it once it has arrived. What has no mark may
have arrived all the same: the process may have died in between. A line with a "seed" has the points that the run of a seed gave to
its parent run; it is never sent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from clstream.tracking.journal import Journal, entries, read_lines

FILE = "tracking.jsonl"
FORMAT = 1

MOST_POINTS = 1000
"""Points of metrics that are sent together: as many as MLflow takes."""

Item = dict[str, Any]
Send = Callable[[Sequence[Item], bool], "str | None"]


class Outbox:
    """What is to be written to the tracking server, in order: in memory, and in a journal too from `open_journal` on.

    Args:
        head: where the run is tracked: "uri", "experiment", and a "key" of the run's own; "run_id" once MLflow has given one.

    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        self.head = dict(head)
        self.run_id: str | None = self.head.get("run_id")
        self.pending: deque[Item] = deque()
        self.maybe_sent: set[int] = set()
        """Numbers of the items that may have arrived."""
        self.points: set[tuple[str, int]] = set()
        """(name, step) of every point of a metric so far, sent or not."""
        self.last_number = 0
        self.ended = False
        self.damaged: list[int] = []
        """Numbers of the lines of its journal that could not be read, or are not to be followed."""
        self.journal: Journal | None = None
        self.lock: FileLock | None = None

    @classmethod
    def read(cls, file: Path) -> Outbox:
        """Resume a journal where it stopped.

        Raises:
            OSError: if it can't be read, or another process writes to it.
            ValueError: if it is no journal of a tracker, or of a later version of clstream.

        """
        outbox = cls({})
        outbox._lock(file)
        try:
            outbox._take(file)
            outbox.journal = Journal(file, synced=True)
        except BaseException:
            outbox.close()
            raise
        return outbox

    def _take(self, file: Path) -> None:
        pending: dict[int, Item] = {}
        for number, entry in read_lines(file):
            if entry is None or not _is_sound(entry, file.parent):
                self.damaged.append(number)
            elif "item" in entry:
                self._add(entry)
                pending[entry["item"]] = entry
            elif "sent" in entry:
                pending.pop(entry["sent"], None)
                self.run_id = entry.get("run_id", self.run_id)
            elif "seed" not in entry:
                self.head |= entry
                self.points |= {(name, step) for name, step in entry.get("points", ())}
        if self.head.get("clstream") != "tracking" or self.head.get("format") != FORMAT:
            raise ValueError(f"{file} is not the journal of a tracker, or not of this version of clstream")
        if not all(isinstance(self.head.get(name), str) for name in ("uri", "experiment", "key")):
            raise ValueError(f"{file} is a damaged journal of a tracker: it doesn't say where the run is tracked")
        self.head.pop("points", None)
        self.run_id = self.run_id or self.head.get("run_id")
        self.pending = deque(pending.values())
        self.maybe_sent = set(pending)

    def _add(self, item: Item) -> None:
        self.last_number = item["item"]
        self.ended = item["do"] == "end"
        if item["do"] == "metrics":
            self.points |= {(name, step) for name, step, _ in item["points"]}

    def _lock(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(f"{file}.lock"):  # some versions of filelock empty what it leads to
            raise OSError(f"{file}.lock is a link: remove it")
        self.lock = FileLock(f"{file}.lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise OSError(f"{file} is in use: wait for the run, or the `clstream sync`, that writes to it") from None

    def open_journal(self, file: Path) -> None:
        """Keep what is pending, and all that follows, in a journal at `file`, where there is none.

        Raises OSError if it can't be written.
        """
        if self.journal is not None:
            return
        sent = self.points - {(name, step) for item in self.pending for name, step, _ in item.get("points", ())}
        head = {"clstream": "tracking", "format": FORMAT, **self.head, **({"run_id": self.run_id} if self.run_id else {})}
        self._lock(file)
        try:
            self.journal = Journal(file, synced=True)
        except OSError:
            self.close()
            raise
        self.journal.append(head | ({"points": sorted(sent)} if sent else {}), *self.pending)

    def put(self, do: str, **content: Any) -> None:
        """Add an item to write: what to do, and with what, in plain values that are valid JSON."""
        item: Item = {"item": self.last_number + 1, "do": do, **content}
        self._add(item)
        self.pending.append(item)
        if self.journal is not None:
            self.journal.append(item)

    def keep(self, **content: Any) -> None:
        """Keep an entry in the journal that is not to be sent: the points of a seed."""
        if self.journal is not None:
            self.journal.append(content)

    def note(self, **content: str) -> None:
        """Change entries of the head, in the journal too."""
        self.head |= content
        if self.journal is not None:
            self.journal.append(content)

    def flush(self, send: Send) -> None:
        """Send what is pending, in order, until `send` raises.

        `send` is called with an item, or with several of metrics that follow each other, and whether any may have arrived
        already. It may return the run's id.
        """
        while self.pending:
            batch = self._next_batch()
            numbers = [item["item"] for item in batch]
            maybe_sent = not self.maybe_sent.isdisjoint(numbers)
            self.maybe_sent.update(numbers)
            run_id = send(batch, maybe_sent)
            self.run_id = run_id or self.run_id
            if self.journal is not None:
                self.journal.append(*({"sent": number} | ({"run_id": run_id} if run_id else {}) for number in numbers))
            for number in numbers:
                self.pending.popleft()
                self.maybe_sent.discard(number)

    def _next_batch(self) -> list[Item]:
        """Return the first pending item; with metrics, those that follow and are metrics too, up to `MOST_POINTS`."""
        batch, points = [self.pending[0]], len(self.pending[0].get("points", ()))
        for item in islice(self.pending, 1, None):
            points += len(item.get("points", ()))
            if {batch[0]["do"], item["do"]} != {"metrics"} or points > MOST_POINTS:
                break
            batch.append(item)
        return batch

    def close(self) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self.lock is not None:
            self.lock.release()
            self.lock = None


def journals(folder: Path) -> list[Path]:
    """Return the journals of trackers in a folder and below."""
    return sorted(file for file in folder.rglob(f"{FILE.removesuffix('.jsonl')}*.jsonl") if file.is_file())


def peek(file: Path) -> Outbox:
    """Return what a journal holds, without resuming it.

    Raises OSError if it can't be read, and ValueError if it is no journal of a tracker.
    """
    outbox = Outbox({})
    outbox._take(file)
    return outbox


def count_pending(file: Path) -> int:
    """Return how many items of a journal are not marked as sent: see `peek`."""
    return len(peek(file).pending)


_NUMBER = (int, float)

_CONTENTS: dict[str, Callable[[Item], bool]] = {
    "create": lambda item: isinstance(item["name"], str) and isinstance(item["at"], int) and _are_plain(item["tags"]),
    "metrics": lambda item: isinstance(item["at"], int) and all(_is_point(point) for point in item["points"]),
    "params": lambda item: _are_plain(item["values"]),
    "tags": lambda item: _are_plain(item["values"]),
    "artifact": lambda item: is_plain_name(item["name"]) and isinstance(item.get("text", item.get("base64")), str),
    "image": lambda item: all(isinstance(item[name], str) for name in ("key", "base64")) and isinstance(item["at"], int),
    "file": lambda item: isinstance(item["path"], str) and is_plain_name(item.get("folder", "none")),
    "register": lambda item: isinstance(item["name"], str) and is_plain_name(item["path"]) and _are_plain(item["tags"]),
    "resume": lambda item: True,  # noqa: ARG005
    "end": lambda item: item["status"] in ("FINISHED", "FAILED", "KILLED") and isinstance(item["at"], int),
}
"""Whether an item has what is needed to do it."""


def _is_sound(entry: Item, folder: Path) -> bool:
    """Return whether an entry of a journal is what it seems to be, and names no file outside of the run's folder."""
    try:
        if "seed" in entry:
            return isinstance(entry["seed"], int) and all(map(_is_point, entry["points"]))
        if "item" not in entry:
            named = all(isinstance(entry[name], str) for name in ("run_id", "uri", "experiment", "key") if name in entry)
            points = all(isinstance(name, str) and isinstance(step, int) for name, step in entry.get("points", ()))
            return named and points and isinstance(entry.get("sent", 0), int)
        if not isinstance(entry["item"], int) or not isinstance(entry["do"], str):
            return False
        if entry["do"] == "file" and not (folder / entry["path"]).resolve().is_relative_to(folder.resolve()):
            return False
        return entry["do"] not in _CONTENTS or _CONTENTS[entry["do"]](entry)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _are_plain(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, (str, int, float)) or value is None for value in values.values())


def _is_point(point: object) -> bool:
    """Return whether something is the name, step and value of a point of a metric."""
    if not isinstance(point, list) or len(point) < 3:
        return False
    return isinstance(point[0], str) and isinstance(point[1], int) and isinstance(point[2], _NUMBER)


def is_plain_name(name: object) -> bool:
    """Return whether an artifact may be called so: a path that stays in its folder."""
    path = PurePosixPath(name) if isinstance(name, str) and "\\" not in name and "\0" not in name else PurePosixPath("..")
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def find_run(run_id: str, folder: Path) -> Path | None:
    """Return the folder, in `folder` or below, whose journal is that of an MLflow run; None if there is none."""
    return next((file.parent for file in journals(folder) if run_id in _ids(file)), None)


def _ids(file: Path) -> Iterator[str]:
    try:
        for entry in entries(file):
            if isinstance(entry.get("run_id"), str):
                yield entry["run_id"]
                return
    except OSError:
        return
