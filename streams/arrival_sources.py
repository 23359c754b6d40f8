"""Where sessions come from: an iterator or a generator, and a folder that files are put into."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from clstream.streams.arrays import as_labels, as_targets
from clstream.streams.arrival_files import ENDINGS, TABLES, FileOptions, inputs, read_file, read_labels

from clstream.files import FolderError
from clstream.params import reason_of
from clstream.stream import Arrival, Refusal, Samples, Subset

Item = Arrival | Samples | Subset | tuple[Any, ...] | None
"""What an iterator delivers: a session, as inputs and targets or an `Arrival`; None: nothing has arrived yet."""


def converted(arrival: Arrival, target: str) -> Arrival:
    """Return a session with inputs and targets as samples have them; labels that are strings stay such.

    Raises TypeError or ValueError, in one sentence.
    """
    x = inputs(arrival.x)
    y = None if arrival.y is None else _targets(arrival.y, len(x), target)
    if (arrival.x_test is None) != (arrival.y_test is None):
        raise ValueError("it has test inputs without targets, or the other way round")
    x_test = None if arrival.x_test is None else inputs(arrival.x_test)
    y_test = None if x_test is None else _targets(arrival.y_test, len(x_test), target)
    return Arrival(x, y, arrival.name, x_test, y_test)


def _targets(y: Any, count: int, target: str) -> Any:
    values = y if isinstance(y, (torch.Tensor, np.ndarray)) else np.asarray(y)
    strings = isinstance(values, np.ndarray) and (values.dtype.kind in "US" or (values.dtype == object and _are_strings(values)))
    if target == "label" and strings:
        values = np.asarray(values, dtype=np.str_)
    else:
        values = as_labels(values, "its") if target == "label" else as_targets(values, target, "its")
    if len(values) != count:
        raise ValueError(f"its inputs are {count}, and its targets {len(values)}: there must be one for each")
    return values


def _are_strings(values: Any) -> bool:
    return values.ndim == 1 and all(isinstance(value, str) for value in values)


@dataclass(eq=False)
class Iterated:
    """Sessions from an iterator, or from a function that returns one anew at each call.

    Args:
        make: the function; None: there is an iterator, which can be played once.
        once: the iterator.
        target: the kind of targets.

    """

    make: Callable[[], Iterable[Item]] | None
    once: Iterator[Item] | None
    target: str

    def open(self) -> IteratedReader:
        """Return what reads it from its begin on. Raises ValueError for an iterator that was read."""
        if self.make is not None:
            return IteratedReader(iter(self.make()), self.target)
        if self.once is None:
            raise ValueError(
                "the source is an iterator that was played already: pass a function that returns it anew, so that it can be played "
                "again, and resumed"
            )
        items, self.once = self.once, None
        return IteratedReader(items, self.target)

    def put_back(self, items: list[Item]) -> None:
        """Have an iterator begin with items that were taken from it."""
        if self.once is not None:
            self.once = chain(items, self.once)


class IteratedReader:
    """Reads the items of an iterator; see `Reader`."""

    def __init__(self, items: Iterator[Item], target: str) -> None:
        self.items, self.target, self.ended = items, target, False
        self.count = 0
        self.waiting: dict[str, Arrival] = {}  # inputs without labels, by name

    def next(self) -> Arrival | Refusal | None:
        """Return what the iterator has next."""
        try:
            item = next(self.items)
        except StopIteration:
            self.ended = True
            return None
        if item is None:
            return None
        name = getattr(item, "name", "") or f"session_{self.count:05d}"
        self.count += 1
        try:
            return self._session(item, name)
        except (TypeError, ValueError) as error:
            return Refusal(str(name), reason_of(error))

    def _session(self, item: Item, name: str) -> Arrival:
        if isinstance(item, Arrival):
            arrival = replace(item, name=name)
        elif isinstance(item, (Samples, Subset)):
            arrival = Arrival(item.x, item.y, name)
        elif isinstance(item, tuple) and len(item) in (2, 4):
            x, y, *test = item
            arrival = Arrival(x, y, name, *test)
        else:
            raise TypeError(
                f"a source delivers pairs of inputs and targets, Samples or Arrival objects, not a {type(item).__name__}"
            )
        if not isinstance(name, str):
            raise TypeError(f"the name of a session must be a string, not {name!r}")
        if arrival.x is None:
            if name not in self.waiting:
                raise ValueError("these are labels of inputs that did not come, or had labels")
            arrival = converted(replace(self.waiting[name], y=arrival.y), self.target)
            del self.waiting[name]
            return arrival
        arrival = converted(arrival, self.target)
        if arrival.y is None:
            self.waiting[name] = arrival
        return arrival

    def again(self, names: Sequence[str]) -> Iterator[Arrival | None]:
        """Yield the sessions that were delivered before: the iterator comes to them again. Raises ValueError where it does not."""
        for name in names:
            while True:
                came = self.next()
                if self.ended:
                    raise ValueError(
                        f"the source no longer has the session {name}, which was learned: it must deliver the same again"
                    )
                if isinstance(came, Arrival) and came.y is not None and came.name == name:
                    yield came
                    break

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the iterator comes to the same again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""


class Seen(NamedTuple):
    """What a look at a folder sees of a file, or of a folder in it.

    Args:
        stamp: what changes when it does: how many files it is, their bytes, and when one was written last.
        changed: when it was put there, or changed, in nanoseconds.

    """

    stamp: tuple[int, int, int]
    changed: int


@dataclass(frozen=True)
class WatchedFolder:
    """Sessions from the files in a folder, by name; with `watch`, from those that are put there later, too.

    Args:
        root: the folder.
        watch: whether to wait for more.
        pause: seconds for which a file that is watched for was not changed when it is read.
        options: how files are read.

    """

    root: Path
    watch: bool
    pause: float
    options: FileOptions

    def open(self) -> FolderReader:
        """Return what reads it from its begin on."""
        return FolderReader(self)


class FolderReader:
    """Reads the files in a folder; see `Reader`.

    What can't be read is looked at again when it changes.
    """

    def __init__(self, source: WatchedFolder) -> None:
        self.source, self.ended = source, False
        self.taken: dict[str, list[tuple[int, int, int]]] = {}  # what was delivered or refused, as it was then, with its labels
        self.ready: list[str] = []
        self.columns: list[str] = []

    def next(self) -> Arrival | Refusal | None:
        """Return the first file by name that is new, or has changed."""
        now, latest = scan(self.source.root), time.time_ns() - int(1e9 * self.source.pause)
        for name in sorted(now):
            labels = labels_of(name, now)
            parts = [now[name], *([now[labels]] if labels else [])]
            settled = not self.source.watch or all(part.changed <= latest for part in parts)
            if settled and not _is_labels(name) and self.taken.get(name) != [part.stamp for part in parts]:
                self.taken[name] = [part.stamp for part in parts]
                return self._read(name, labels)
        self.ended = not self.source.watch
        return None

    def _read(self, name: str, labels: str | None) -> Arrival | Refusal:
        path = self.source.root / name
        try:
            if not path.is_dir() and path.suffix not in ENDINGS:
                raise ValueError(f"it is no folder of images, and its name ends in none of {', '.join(ENDINGS)}")
            arrival = read_file(path, name, self.source.options, self.columns)
            if labels:
                if arrival.y is not None:
                    raise ValueError(f"it has labels, and {labels} has others")
                arrival = replace(arrival, y=read_labels(self.source.root / labels, self.source.options))
            return converted(arrival, self.source.options.target)
        except (TypeError, ValueError, OSError) as error:
            return Refusal(name, reason_of(error))

    def again(self, names: Sequence[str]) -> Iterator[Arrival | None]:
        """Yield the sessions that were delivered before; None for one whose file is gone, or can't be read now."""
        now = scan(self.source.root)
        for name in names:
            labels = labels_of(name, now)
            if name not in now:
                yield None
                continue
            self.taken[name] = [now[part].stamp for part in (name, labels) if part]
            came = self._read(name, labels)
            yield came if isinstance(came, Arrival) and came.y is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Return the columns of inputs, in their order."""
        return {"columns": list(self.columns)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them. Raises ValueError for what are none."""
        columns = state.get("columns")
        if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
            raise ValueError("the checkpoint is no good: it doesn't name the columns of inputs")
        self.columns[:] = columns


def scan(root: Path) -> dict[str, Seen]:
    """Return what is in a folder, without what is hidden or being written (.tmp, .part).

    Raises FolderError if the folder can't be read.
    """
    seen: dict[str, Seen] = {}
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        raise FolderError(f"the folder {root} can't be read: {error.strerror or error}") from None
    for entry in entries:
        if entry.name.startswith((".", "_")) or entry.name.endswith((".tmp", ".part")):
            continue
        with suppress(FileNotFoundError):  # it was taken away just now
            own = [entry.stat()]
            if entry.is_dir():
                own += [path.stat() for path in Path(entry.path).rglob("*")]
            size, modified = sum(status.st_size for status in own), max(status.st_mtime_ns for status in own)
            seen[entry.name] = Seen((len(own), size, modified), max(status.st_ctime_ns for status in own))
    return seen


def _is_labels(name: str) -> bool:
    return Path(name).suffix in TABLES and Path(name).stem.endswith(".labels")


def labels_of(name: str, names: Collection[str]) -> str | None:
    """Return the file of the labels of a file of inputs, if it is there: of 2026-01.npz it is 2026-01.labels.npz, or .parquet."""
    if Path(name).suffix not in TABLES:
        return None
    candidates = [f"{Path(name).stem}.labels{ending}" for ending in TABLES]
    return next((candidate for candidate in candidates if candidate in names), None)
