"""Recordings: what a stream is, in one small file, so that it can be replayed elsewhere, and after its code has changed.

A recording is a zip file. `stream.json`, its first member, says what the stream is, and names the `.npy` members beside it: row
numbers, and labels where they are others than the data's own. It holds no samples, and no code: it names the data by its
content. The comment of the zip file is the SHA-256 of all that comes before.

A recording may come from anyone, so nothing of it is taken on trust: it is no larger in memory than a small multiple of the file
(`RATIO`), only members that `stream.json` names are read, and what that says is checked against `HEADER` before it is used, and
against the data that is at hand before anything is made of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from operator import index
from pathlib import Path
from types import FunctionType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clstream.stream import Data, Mixture, Samples, Session, Stream, Subset, Task, content_hash

FORMAT = 3
"""Number of the newest format; files of a greater one are refused. What an older one can say is written in that."""

STREAM = "stream.json"
RATIO = 16
"""How many times as large as in the file a member may be once unpacked; what would be more is stored as it is."""
LEAST = 1 << 16
"""Bytes that a member may have in any case."""
MOST_TEXT = 1 << 23
"""Bytes of `stream.json` at most."""
MOST_MEMBERS = 65_000
PROBE = 8  # rows of a transform that are compared at replay
_HASH = 64  # hexadecimal digits of a SHA-256
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # no time is recorded: the same stream gives the same bytes


@dataclass(frozen=True, eq=False, repr=False)
class RecordedStream(Stream):
    """A stream whose sessions deliver what was recorded, whatever the rule is today.

    Args:
        dealt: for each session, the positions of its samples among its task's training samples: a slice, or (n,) int64.

    """

    dealt: Sequence[slice | Tensor] = ()

    def session(self, index: int) -> Session:
        """Return a session by number, as `Stream.session` does."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has the sessions 0 to {len(self) - 1}, not {index}")
        return self._session(index, self._delivered(index))

    def _delivered(self, index: int) -> Samples | Subset:
        if isinstance(self.schedule, Mixture):
            return self._mixed(self.schedule.draw(index))
        train, dealt = self.tasks[self.task_of(index)].train, self.dealt[index]
        if isinstance(dealt, Tensor):
            dealt = dealt.to(train[:1].y.device)
        return train.take(dealt) if isinstance(train, Subset) else train[dealt]


@dataclass(frozen=True, eq=False)
class RecordedMixture:
    """What the sessions of a stream drew that mixes its tasks; see `Mixture`.

    Args:
        what: its rule in words.
        once: whether each sample comes once.
        drawn: for each session, a slice of the training samples of all tasks, or (n,) int64 numbers of them.

    """

    what: str
    once: bool
    drawn: Sequence[slice | Tensor]

    def __repr__(self) -> str:
        return self.what

    def __len__(self) -> int:
        return len(self.drawn)

    def draw(self, session: int) -> Tensor:
        """Return what a session draws: see `Mixture`."""
        drawn = self.drawn[session]
        return drawn if isinstance(drawn, Tensor) else torch.arange(drawn.start, drawn.stop, drawn.step)


def record(stream: Stream, file: str | Path, force: bool = False) -> Path:
    """Write what a stream is to a file, and return its path. The same stream gives the same bytes.

    Args:
        stream: any stream; its transforms must be frozen dataclasses of plain numbers and strings, its augmentation one too, or
            a function with a name. Both are recorded by name.
        file: where; by custom it ends in `.clstream`. It is written beside, and renamed when it is whole.
        force: overwrite a file that holds something else.

    Raises:
        TypeError, ValueError: if the stream can't be recorded; nothing is written then.
        FileExistsError: if the file holds something else.
        OSError: if it can't be written.

    """
    if not isinstance(stream, Stream):
        raise TypeError(f"record takes a Stream, not a {type(stream).__name__}")
    file = Path(file)
    content = _packed(*_contents(stream))
    try:
        if file.exists():
            if file.read_bytes() == content:
                return file
            if not force:
                raise FileExistsError(f"{file} holds something else: choose another file, or overwrite it with force=True, --force")
        _write(file, content)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{file} can't be written: {os.strerror(error.errno) if error.errno else error}") from None
    return file


def _write(file: Path, content: bytes) -> None:
    """Write a file beside its place, and move it there when it is whole and on the disk."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _packed(about: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the bytes of a recording."""
    members = {STREAM: (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()}
    for name, array in arrays.items():
        out = io.BytesIO()
        np.lib.format.write_array(out, array, allow_pickle=False)
        members[name] = out.getvalue()
    if len(members[STREAM]) > MOST_TEXT or len(members) > MOST_MEMBERS:
        raise ValueError(
            f"{about['name']} can't be recorded: it has too many sessions that are not rows in order ({len(arrays):,} arrays of "
            f"{MOST_MEMBERS:,}, {len(members[STREAM]):,} bytes of text of {MOST_TEXT:,})"
        )
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        for name, member in members.items():
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # on every system
            small = len(zlib.compress(member, 9))
            packed.writestr(entry, member, zipfile.ZIP_DEFLATED if _may_be(len(member), small) else zipfile.ZIP_STORED, 9)
        packed.comment = b"0" * _HASH
    body = whole.getvalue()[:-_HASH]
    return body + hashlib.sha256(body).hexdigest().encode()


def _may_be(size: int, packed: int) -> bool:
    """Return whether a member may be so large, given its size in the file."""
    return size <= max(LEAST, RATIO * packed)


def _contents(stream: Stream) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the text of a recording and its arrays by name."""
    found = _Contents(stream)
    tasks = [
        {"classes": list(task.classes)}
        | {kind: found.samples(getattr(task, kind), kind, task) for kind in ("train", "test", "validation")}
        for task in stream.tasks
    ]
    sessions = [
        {"task": int(stream.task_of(number)), **found.dealt(positions, f"session_{number}")}
        for number, positions in enumerate(_positions(stream))
    ]
    data = stream.data or Data({})
    mixture = stream.schedule if isinstance(stream.schedule, Mixture) else None
    drift = {"drift": {"what": repr(mixture), "once": mixture.once}} if mixture else {}
    about = {
        "format": 3 if stream.drop_last or stream.class_names else 2 if drift or not stream.shuffle else 1,
        "clstream": _version("clstream"),
        "torch": _version("torch"),
        "name": stream.name,
        "scenario": stream.scenario,
        "epochs": index(stream.epochs),
        "batch_size": index(stream.batch_size),
        "seed": index(stream.seed),
        "boundaries": bool(stream.boundaries),
        "resident": bool(stream.resident),
        **({} if stream.shuffle else {"shuffle": False}),
        **({"drop_last": True} if stream.drop_last else {}),
        **({"class_names": list(stream.class_names)} if stream.class_names else {}),
        **drift,
        "notes": list(stream.notes),
        "fingerprint": stream.fingerprint,
        "order": _order(stream),
        "augment": None if stream.augment is None else _named(stream, stream.augment, "augmentation"),
        "loader": data.loader if set(found.used) <= set(data.parts) else None,
        "options": dict(data.options),
        "parts": {name: found.described(found.parts[name]) for name in found.parts if name in found.used},
        "sources": found.sources,
        "tasks": tasks,
        "sessions": sessions,
    }
    return about, found.arrays


class _Contents:
    """What a recording of a stream needs, taken up piece by piece: the data, the sources made of it, and arrays."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.parts: dict[str, Samples] = {} if stream.data is None else dict(stream.data.parts)
        self.used: set[str] = set()
        self.sources: list[dict[str, Any]] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.known_sources: dict[str, int] = {}
        self.known_arrays: dict[bytes, str] = {}
        self.hashes = _Hashes()

    def described(self, samples: Samples) -> dict[str, Any]:
        """Return shape, dtype and hash of the tensors of samples, by name."""
        return {
            name: {"shape": list(rows.shape), "dtype": _dtype(rows), "sha256": self.hashes.of(rows)}
            for name, rows in _tensors(samples).items()
        }

    def samples(self, part: Samples | Subset | None, kind: str, task: Task) -> dict[str, Any] | None:
        """Return the samples of a task as rows of a source; "all" is a subset of every row, and None the source itself."""
        if part is None:
            return None
        if isinstance(part, Samples):
            return {"source": self.source(part), "rows": None}
        number, rows = self.source(part.source), part.index.cpu()
        every = torch.equal(rows, torch.arange(len(part.source)))
        found: dict[str, Any] = {"source": number, "rows": "all" if every else self.array(f"task_{task.id}_{kind}", rows)}
        if part.transform is not None:
            what = f"transform of the {'training' if kind == 'train' else kind} samples of task {task.id}"
            found["transform"] = _named(self.stream, part.transform, what)
            found["probe"] = _probe(part)
        if part.made is not None:
            found["made"] = True
        return found

    def source(self, whole: Samples) -> int:
        """Return the number of the source that has the tensors of some samples."""
        tensors = {name: self.hashes.of(rows) for name, rows in _tensors(whole).items()}
        key = repr(tensors)
        if key not in self.known_sources:
            same = {}
            for name, part in self.parts.items():
                others = {each: self.hashes.of(rows) for each, rows in _tensors(part).items()}
                if {**others, "y": ""} == {**tensors, "y": ""}:
                    same[name] = others["y"] == tensors["y"]
            if not same:
                name = f"source_{len(self.sources)}"
                self.parts[name], same[name] = whole, True
            chosen = max(same, key=lambda name: same[name])  # the first with the same labels, if there is one
            self.used.add(chosen)
            labels = None if same[chosen] else self.labels(self.parts[chosen].y.cpu(), whole.y.cpu())
            self.known_sources[key] = len(self.sources)
            self.sources.append({"part": chosen, "labels": labels})
        return self.known_sources[key]

    def labels(self, old: Tensor, new: Tensor) -> list[list[int]] | str:
        """Return how labels come from those of the data: pairs (old, new), or, if they don't, all of them."""
        classes, place = old.unique(return_inverse=True)
        table = torch.zeros_like(classes)
        table[place] = new
        if torch.equal(table[place], new):
            return [[int(one), int(two)] for one, two in zip(classes, table, strict=True)]
        return self.array(f"labels_{len(self.sources)}", new)

    def dealt(self, positions: Tensor, name: str) -> dict[str, Any]:
        """Return the positions of a session: start, step and count where that says it all."""
        start, count = int(positions[0]), len(positions)
        step = int(positions[1]) - start if count > 1 else 1
        if step > 0 and torch.equal(positions, start + step * torch.arange(count)):
            return {"start": start, "step": step, "count": count}
        return {"positions": self.array(name, positions)}

    def array(self, name: str, numbers: Tensor) -> str:
        """Keep whole numbers from 0 up in the smallest dtype; return the name of the array, or of an equal one that is there."""
        array = numbers.numpy().astype(np.min_scalar_type(int(numbers.max())).newbyteorder("<"))
        known = self.known_arrays.setdefault(str(array.dtype).encode() + array.tobytes(), f"{name}.npy")
        self.arrays.setdefault(known, array)
        return known


class _Hashes:
    """Content hashes of tensors; each is read once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, str]] = {}  # with the tensor, so that no other gets its id

    def of(self, rows: Tensor) -> str:
        """Return the hash of a tensor."""
        if id(rows) not in self.known:
            self.known[id(rows)] = rows, content_hash(rows).hex()
        return self.known[id(rows)][1]


def _numbered(stream: Stream) -> Stream:
    """Return the stream with each training sample's position in its task for its input: so sessions show what they deal."""
    tasks = []
    for task in stream.tasks:
        numbers = torch.arange(len(task.train), device=task.train[:1].y.device)
        rows = Samples(numbers, task.train.y)
        tasks.append(replace(task, train=rows if isinstance(task.train, Samples) else Subset(rows, numbers)))
    return stream._like(tasks=tasks)


def _positions(stream: Stream) -> list[Tensor]:
    """Return for each session the positions of its samples among its task's, as it delivers them."""
    numbered = _numbered(stream)
    plain = type(stream).session in (Stream.session, RecordedStream.session)
    if plain and isinstance(stream.schedule, Mixture):
        return [stream.schedule.draw(number) for number in range(len(stream))]
    if plain:
        return [session.samples.x.cpu() for session in numbered]
    found = []
    for number in range(len(stream)):
        try:
            session, positions = stream.session(number), numbered.session(number).samples.x
            samples = stream.tasks[stream.task_of(number)].train[positions]
            same = torch.equal(session.samples.y, samples.y) and torch.equal(session.samples.x, samples.x)
            same &= not isinstance(stream.schedule, Mixture)  # its positions are over all tasks
            same &= all(getattr(session, name) == getattr(stream, name) for name in ("epochs", "batch_size", "seed", "drop_last"))
        except Exception:  # noqa: BLE001  # whatever the user's class does with samples that are not its own
            same = False
        if not same:
            raise ValueError(
                f"{stream.name} can't be recorded: {type(stream).__name__}.session gives in session {number} something other than "
                "rows of its task's training samples, with the epochs, batch size and seed of the stream"
            )
        found.append(positions.cpu())
    return found


def _order(stream: Stream) -> str:
    """Return a SHA-256 of the order of the first pass over each session: another torch may deal otherwise."""
    found = hashlib.sha256()
    for session in _numbered(stream):  # a domain need not be made for it
        found.update(content_hash(next(iter(session)).order()))
    return found.hexdigest()


def _probe(part: Subset) -> str:
    """Return the hash of what a subset's transform makes of its first rows."""
    assert part.transform is not None
    return content_hash(part.transform(part.source[part.index[:PROBE]].x.cpu())).hex()


def _named(stream: Stream, function: object, what: str) -> dict[str, Any]:
    """Return a function by name, with the fields of a dataclass; a transform must be one, since its `repr` has to name it."""
    kind = "a frozen dataclass of plain numbers and strings"
    if isinstance(function, FunctionType) and what == "augmentation":
        kind += ", or a function defined in a module"
        if "<" not in function.__qualname__:
            return {"name": function.__name__}
    elif is_dataclass(function) and not isinstance(function, type):
        values = {each.name: getattr(function, each.name) for each in fields(function) if each.init}
        if all(_is_plain(value) for value in values.values()):
            return {"name": type(function).__name__, "fields": values}
    raise ValueError(f"{stream.name} can't be recorded: the {what} must be {kind}, so that it can be named, not {function!r}")


def _is_plain(value: object) -> bool:
    return type(value) in (int, bool, str, type(None)) or (type(value) is float and math.isfinite(value))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _tensors(samples: Samples) -> dict[str, Tensor]:
    return {"x": samples.x, "y": samples.y, **{f"extra.{name}": samples.extra[name] for name in sorted(samples.extra)}}


def _dtype(rows: Tensor) -> str:
    return str(rows.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recording that was read.

    Args:
        file: where it was.
        about: what `stream.json` says.
        arrays: the arrays beside it, int64, by name.

    """

    file: Path
    about: Mapping[str, Any]
    arrays: Mapping[str, Tensor]

    def found_in(self, stream: Stream) -> dict[str, Samples]:
        """Return the parts of the recorded data as they are in another stream; where they are not, what is nearest."""
        hashes = _Hashes()
        candidates = [] if stream.data is None else list(stream.data.parts.items())
        for task in stream.tasks:
            for part in (task.train, task.test, task.validation):
                if part is not None:
                    candidates.append(("", part.source if isinstance(part, Subset) else part))

        def nearest(name: str, wanted: Mapping[str, Any]) -> Samples:
            def likeness(candidate: tuple[str, Samples]) -> tuple[bool, bool, bool]:
                found = {each: hashes.of(rows) for each, rows in _tensors(candidate[1]).items()}
                same = {each: found.get(each) == tensor["sha256"] for each, tensor in wanted.items()}
                return all(same.values()), same["x"], candidate[0] == name

            return max(candidates, key=likeness)[1]

        return {name: nearest(name, wanted) for name, wanted in self.about["parts"].items()}

    def replay(
        self, parts: Mapping[str, Samples], where: str = "the data", functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> RecordedStream:
        """Return the recorded stream over data that is at hand.

        Args:
            parts: the recorded data sets, by their names in the recording; others are ignored.
            where: what to call this data in errors.
            functions: the transforms (classes or functions of the recorded fields) and augmentations that may be named.

        Raises:
            ValueError: if the data is other than the recorded, a function is not there or has changed, or this torch deals the
                batches in another order.

        """
        about, functions = self.about, functions or {}
        self._compare(parts, where)
        if strange := [source["part"] for source in about["sources"] if source["part"] not in about["parts"]]:
            raise self._wrong(f"it has no part {strange[0]!r}")
        sources = [self._source(source, parts[source["part"]]) for source in about["sources"]]
        tasks = []
        for number, task in enumerate(about["tasks"]):
            train, test = (self._samples(task[kind], sources, functions) for kind in ("train", "test"))
            held = self._samples(task["validation"], sources, functions) if task["validation"] else None
            tasks.append(Task(number, tuple(task["classes"]), train, test, held))
        dealt = [self._dealt(session, tasks) for session in about["sessions"]]
        mixture = RecordedMixture(**about["drift"], drawn=dealt) if "drift" in about else None
        stream = RecordedStream(
            **{name: about[name] for name in ("name", "epochs", "batch_size", "scenario", "seed", "boundaries", "resident")},
            tasks=tasks,
            schedule=mixture or [session["task"] for session in about["sessions"]],
            augment=about["augment"] and self._function(about["augment"], functions),
            notes=tuple(about["notes"]),
            data=Data({name: parts[name] for name in about["parts"]}, about["loader"], about["options"]),
            shuffle=about.get("shuffle", True),
            drop_last=about.get("drop_last", False),
            class_names=tuple(about.get("class_names", ())),
            dealt=dealt,
        )
        if _order(stream) != about["order"]:
            raise ValueError(
                f"{self.file} can't be replayed here: torch {_version('torch')} deals the batches in another order than torch "
                f"{about['torch']}, with which it was recorded; install that one"
            )
        # all that it is made of was compared: it is the recorded stream, also for a version that would count otherwise
        object.__setattr__(stream, "fingerprint", about["fingerprint"])
        return stream

    def _compare(self, parts: Mapping[str, Samples], where: str) -> None:
        """Refuse data that is not what was recorded, naming what differs."""
        hashes = _Hashes()
        for part, wanted in self.about["parts"].items():
            there = _tensors(parts[part]) if part in parts else {}
            for name, tensor in wanted.items():
                kind = {"x": "the inputs", "y": "the labels"}.get(name, name)
                what = f"{kind} of its part {part!r}"
                if name not in there:
                    difference = f"it lacks {what}"
                elif list(there[name].shape) != tensor["shape"] or _dtype(there[name]) != tensor["dtype"]:
                    recorded = f"{tuple(tensor['shape'])} of {tensor['dtype']}"
                    difference = f"{what} are {tuple(there[name].shape)} of {_dtype(there[name])}, not {recorded}"
                elif hashes.of(there[name]) != tensor["sha256"]:
                    difference = f"{what} have other values"
                else:
                    continue
                raise ValueError(
                    f"{where} is not the data that {self.file} was recorded from: {difference}. "
                    "Name the folder that has it (--data_root, root=...), or a stream over it (--stream.data, data=...)"
                )

    def _source(self, source: Mapping[str, Any], part: Samples) -> Samples:
        """Return a source: a part of the data, with its own labels or with recorded ones."""
        labels = source["labels"]
        if labels is None:
            return part
        if isinstance(labels, str):
            if len(self.arrays[labels]) != len(part):
                raise self._wrong(f"{labels} has {len(self.arrays[labels]):,} labels for {len(part):,} samples")
            return Samples(part.x, self.arrays[labels], part.extra)
        if not all(len(pair) == 2 and -(1 << 62) < pair[1] < 1 << 62 for pair in labels):
            raise self._wrong("its labels are no pairs")
        old, new = torch.tensor(labels).T.contiguous()
        if not torch.equal(old, part.y.cpu().unique()):
            raise self._wrong("its labels are not those of the data")
        return Samples(part.x, new[torch.searchsorted(old, part.y)], part.extra)

    def _samples(
        self, part: Mapping[str, Any], sources: Sequence[Samples], functions: Mapping[str, Callable[..., Any]]
    ) -> Samples | Subset:
        """Return the samples of a task."""
        if not 0 <= part["source"] < len(sources):
            raise self._wrong(f"it has no source {part['source']}")
        source: Samples = sources[part["source"]]
        if part["rows"] is None:
            return source
        rows = torch.arange(len(source)) if part["rows"] == "all" else self.arrays[part["rows"]]
        if int(rows.max()) >= len(source):
            raise self._wrong(f"{part['rows']} names row {int(rows.max()):,} of {len(source):,}")
        if "transform" not in part:
            subset = Subset(source, rows)
        else:
            subset = Subset(source, rows, self._function(part["transform"], functions))
            if _probe(subset) != part.get("probe"):
                raise ValueError(
                    f"{self.file} can't be replayed here: its transform {part['transform']['name']} gives other values than "
                    f"when it was recorded, with torch {self.about['torch']} and clstream {self.about['clstream']}"
                )
        return subset.make() if part.get("made") else subset

    def _dealt(self, session: Mapping[str, Any], tasks: Sequence[Task]) -> slice | Tensor:
        """Return the positions of a session's samples among its task's, or among those of all tasks where it mixes them."""
        if not 0 <= session["task"] < len(tasks):
            raise self._wrong(f"it has no task {session['task']}")
        among = sum(len(task.train) for task in tasks) if "drift" in self.about else len(tasks[session["task"]].train)
        positions: slice | Tensor
        if "positions" in session:
            positions = self.arrays[session["positions"]]
            last = int(positions.max())
        else:
            start, step, count = (session.get(name, -1) for name in ("start", "step", "count"))
            last = start + step * (count - 1) if start >= 0 and step > 0 and count > 0 else among
            positions = slice(start, start + step * count, step)
        if last >= among:
            raise self._wrong(f"a session names sample {last:,} of {among:,}")
        return positions

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.file} is no recording that clstream {_version('clstream')} can read: {what}")

    def _function(self, named: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Callable[[Tensor], Tensor]:
        """Return a function by its recorded name and fields; the recording itself can name nothing else."""
        name = named["name"]
        if name not in functions:
            raise ValueError(
                f"{self.file} uses {name!r}, which does not come with clstream: supply it, "
                f"recorded(..., functions={{{name!r}: {name}}})"
            )
        if isinstance(functions[name], type) != ("fields" in named):
            raise self._wrong(f"it uses {name!r} as something else than it is")
        if "fields" not in named:
            return functions[name]
        try:
            made: Callable[[Tensor], Tensor] = functions[name](**named["fields"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: {name} does not take the recorded {named['fields']}: {error}") from None
        return made


def read(file: str | Path) -> Recording:
    """Read a recording. Nothing in it is run, and it takes no more than a multiple of the file's size in memory: see `RATIO`.

    Raises:
        FileNotFoundError, OSError: if there is no such file, or it can't be read.
        ValueError: if it is empty, damaged, not a recording, or of a newer format.

    """
    file = Path(file)
    try:
        with file.open("rb") as content:
            return _read(file, content)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no recording {file}: clstream record --stream ... --out {file} makes one") from None
    except OSError as error:
        raise OSError(f"the recording {file} can't be read: {os.strerror(error.errno) if error.errno else error}") from None


def _read(file: Path, content: IO[bytes]) -> Recording:
    head = content.read(30 + len(STREAM))
    if not head:
        raise ValueError(f"{file} is empty: record the stream again, or copy the recording again")
    if not head.startswith(b"PK") or not head.endswith(STREAM.encode()):
        raise ValueError(f"{file} is no recording of clstream: clstream record makes them")
    if not _is_whole(content):
        raise ValueError(f"{file} is damaged or was changed: its content is not what was recorded; copy it again, or record again")
    try:
        _check_end(content)
        with zipfile.ZipFile(content) as packed:
            members = _members(packed)
            text = _unpacked(packed, members.pop(STREAM))
            if text.count(b"[") + text.count(b"{") > 1000 + len(text) / 16:
                raise ValueError("stream.json has more lists than it can need")  # each takes dozens of bytes in memory
            about = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(about, dict) or not isinstance(about.get("format"), int):
                raise ValueError("stream.json has no format")
            newer = about["format"] > FORMAT
            if not newer:
                _check_form(about, HEADER, STREAM)
                if lacking := [name for name, part in about["parts"].items() if not {"x", "y"} <= part.keys()]:
                    raise ValueError(f"its part {lacking[0]!r} has no inputs, or no labels")
                named = set(_arrays_of(about))
                if named != set(members):
                    raise ValueError(f"stream.json doesn't name the members that there are: {sorted(named ^ set(members))[0]}")
            arrays = {} if newer else {name: _array(name, _unpacked(packed, member)) for name, member in members.items()}
    except _NOT_READABLE as error:
        raise ValueError(f"{file} is no recording that clstream {_version('clstream')} can read: {error}") from None
    if newer:
        raise ValueError(
            f"{file} has format {about['format']}, of clstream {about.get('clstream')}; clstream {_version('clstream')} reads up "
            f"to format {FORMAT}: install the newer one"
        )
    return Recording(file, about, arrays)


_NOT_READABLE = (
    ValueError, KeyError, TypeError, IndexError, EOFError, RecursionError, NotImplementedError, RuntimeError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def _is_whole(content: IO[bytes]) -> bool:
    """Return whether the end of a file is the hash of all before."""
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    digest, left = hashlib.sha256(), max(0, size - _HASH)
    while chunk := content.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return content.read() == digest.hexdigest().encode()


def _check_end(content: IO[bytes]) -> None:
    """Check that a zip file ends as ours do, with a short directory, before it is read."""
    end = 22 + _HASH  # of the record at the end: its comment is our hash
    if content.seek(0, os.SEEK_END) < end + 20:
        raise ValueError("it is too short")
    content.seek(-end - 20, os.SEEK_END)
    locator, record = content.read(20), content.read(22)
    signature, *_, members, directory, _, comment = struct.unpack("<4s4H2IH", record)
    if signature != b"PK\5\6" or comment != _HASH or locator.startswith(b"PK\6\7"):
        raise ValueError("its directory is not where it should be")
    if members > MOST_MEMBERS or directory > MOST_MEMBERS * 200:
        raise ValueError("its directory is too large")


def _members(packed: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name; ValueError if there is one of a kind that is never written, or that is too large."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in packed.infolist():
        name = member.filename
        if name in members or member.orig_filename != name:
            raise ValueError(f"it has two members {name!r}")
        if name != STREAM and not re.fullmatch(r"[A-Za-z0-9_]{1,100}\.npy", name):
            raise ValueError(f"it has a member {name[:100]!r}")
        if member.flag_bits & ~0x800 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is encrypted, or packed in an unusual way")
        if not _may_be(member.file_size, member.compress_size) or (name == STREAM and member.file_size > MOST_TEXT):
            raise ValueError(f"{name} is said to be {member.file_size:,} bytes, of {member.compress_size:,} in the file: too many")
        members[name] = member
    if sum(member.compress_size for member in members.values()) > packed.start_dir:
        raise ValueError("its members overlap")
    return members


def _unpacked(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return what a member holds; no more is unpacked than it is said to have."""
    with packed.open(member) as source:
        content = source.read(member.file_size)
        if len(content) != member.file_size or source.read(1):
            raise ValueError(f"{member.filename} has another size than it is said to have")
    return content


_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([|<]u[1248])', 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n", re.DOTALL
)


def _array(name: str, content: bytes) -> Tensor:
    """Return the whole numbers of a `.npy` member, int64; ValueError if it is not as `numpy.save` writes a row of them."""
    head = _NPY.match(content)
    if head is None or int.from_bytes(head[1], "little") != head.end() - 10:
        raise ValueError(f"{name} is no row of whole numbers")
    dtype, count = np.dtype(head[2].decode()), int(head[3])
    if count < 1 or head.end() + count * dtype.itemsize != len(content):
        raise ValueError(f"{name} is said to have {count:,} numbers, and has others")
    numbers = np.frombuffer(content, dtype, offset=head.end())
    if int(numbers.max()) >= 1 << 62:
        raise ValueError(f"{name} has numbers that are too large")
    return torch.from_numpy(numbers.astype(np.int64))


# What `stream.json` may say ------------------------------------------------------------------------------------------------

_SCALAR = (int, float, bool, str, None)
_NAMED = {"name": str, "fields?": {str: _SCALAR}}
_SAMPLES = {"source": int, "rows": (str, None), "transform?": _NAMED, "probe?": str, "made?": bool}
HEADER: dict[Any, Any] = {
    "format": int, "clstream": str, "torch": str, "name": str, "scenario": str, "epochs": int, "batch_size": int, "seed": int,
    "boundaries": bool, "resident": bool, "shuffle?": bool, "drop_last?": bool, "class_names?": [str],
    "drift?": {"what": str, "once": bool},
    "notes": [str], "fingerprint": str, "order": str, "augment": (_NAMED, None), "loader": (str, None),
    "options": {str: _SCALAR}, "parts": {str: {str: {"shape": [int], "dtype": str, "sha256": str}}},
    "sources": [{"part": str, "labels": ([[int]], str, None)}],
    "tasks": [{"classes": [int], "train": _SAMPLES, "test": _SAMPLES, "validation": (_SAMPLES, None)}],
    "sessions": [{"task": int, "start?": int, "step?": int, "count?": int, "positions?": str}],
}  # fmt: skip
"""What stands in `stream.json`: a type for a value, a list or dict for what is in one, a tuple for a choice, ? for an option."""


def _check_form(value: object, form: Any, place: str) -> None:
    """Raise ValueError for what is not of a form, as `HEADER` writes it."""
    if isinstance(form, tuple):
        for choice in form:
            try:
                return _check_form(value, choice, place)
            except ValueError:
                continue
        raise ValueError(f"{place} is not what it should be")
    if isinstance(form, list) and isinstance(value, list):
        for item in value:
            _check_form(item, form[0], place)
    elif isinstance(form, dict) and isinstance(value, dict) and str in form:
        for key, item in value.items():
            _check_form(item, form[str], f"{place}: {key[:50]}")
    elif isinstance(form, dict) and isinstance(value, dict):
        forms = {name.removesuffix("?"): part for name, part in form.items()}
        if strange := [name for name in value if name not in forms]:
            raise ValueError(f"{place} has {strange[0][:50]!r}, which doesn't belong there")
        for name in form:
            if not name.endswith("?") and name not in value:
                raise ValueError(f"{place} lacks {name!r}")
        for name, item in value.items():
            _check_form(item, forms[name], f"{place}: {name}")
    elif not (value is None if form is None else isinstance(form, type) and type(value) is form):
        raise ValueError(f"{place} is not what it should be")
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"stream.json has {name}, which is no number")


def _arrays_of(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the arrays that `stream.json` names."""
    yield from (source["labels"] for source in about["sources"] if isinstance(source["labels"], str))
    yield from (session["positions"] for session in about["sessions"] if "positions" in session)
    for task in about["tasks"]:
        parts = [task[kind] for kind in ("train", "test", "validation") if task[kind] is not None]
        yield from (part["rows"] for part in parts if part["rows"] not in (None, "all"))
