"""Recordings: the description of a stream in one small file, from which it can be replayed elsewhere and by later versions.

A recording is a zip file. `stream.json`, its first member, says what the stream is, and names the `.npy` members beside it: row
numbers, and labels where they are others than the data's own. It holds no samples, and no code: it names the data by its
content. The comment of the zip file is the SHA-256 of all that comes before.

A recording may come from anyone, so nothing of it is taken on trust: it is no larger in memory than a small multiple of the file
(`MAX_RATIO`), only members that `stream.json` names are read, and what that says is checked against `HEADER` before it is used, and
against the data that is at hand before anything is made of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from operator import index
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clstream.files import write_atomically
from clstream.recording.header import ALWAYS_ALLOWED, HASH_LENGTH, MAX_MEMBERS, MAX_RATIO, MAX_TEXT, PROBE_ROWS, STREAM
from clstream.stream import DataSource, MixedSchedule, Samples, Session, Stream, Subset, Task, content_hash

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
        if isinstance(self.schedule, MixedSchedule):
            return self._mixed(self.schedule.draw(index))
        train, dealt = self.tasks[self.task_of(index)].train, self.dealt[index]
        if isinstance(dealt, Tensor):
            dealt = dealt.to(train[:1].y.device)
        return train.take(dealt) if isinstance(train, Subset) else train[dealt]


@dataclass(frozen=True, eq=False)
class RecordedMixture:
    """What the sessions of a stream drew that mixes its tasks; see `MixedSchedule`.

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
        """Return what a session draws: see `MixedSchedule`."""
        drawn = self.drawn[session]
        return drawn if isinstance(drawn, Tensor) else torch.arange(drawn.start, drawn.stop, drawn.step)


def record(stream: Stream, file: str | Path, force: bool = False) -> Path:
    """Write what a stream is to a file, and return its path. The same stream gives the same bytes.

    Args:
        stream: any stream; its transforms must be frozen dataclasses of plain numbers and strings, its augmentation one too, or
            a function with a name. Both are recorded by name.
        file: where; by custom it ends in `.clstream`. It is written atomically.
        force: overwrite a file that holds something else.

    Raises:
        TypeError, ValueError: if the stream can't be recorded; nothing is written then.
        FileExistsError: if the file holds something else.
        OSError: if it can't be written.

    """
    if not isinstance(stream, Stream):
        raise TypeError(f"record takes a Stream, not a {type(stream).__name__}")
    file = Path(file)
    content = pack(*contents(stream))
    try:
        if file.exists():
            if file.read_bytes() == content:
                return file
            if not force:
                raise FileExistsError(f"{file} holds something else: choose another file, or overwrite it with force=True, --force")
        write_atomically(file, lambda out: out.write(content))
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{file} can't be written: {os.strerror(error.errno) if error.errno else error}") from None
    return file


def pack(about: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the bytes of a recording."""
    members = {STREAM: (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()}
    for name, array in arrays.items():
        out = io.BytesIO()
        np.lib.format.write_array(out, array, allow_pickle=False)
        members[name] = out.getvalue()
    if len(members[STREAM]) > MAX_TEXT or len(members) > MAX_MEMBERS:
        raise ValueError(
            f"{about['name']} can't be recorded: it has too many sessions that are not rows in order ({len(arrays):,} arrays of "
            f"{MAX_MEMBERS:,}, {len(members[STREAM]):,} bytes of text of {MAX_TEXT:,})"
        )
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        for name, member in members.items():
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # on every system
            small = len(zlib.compress(member, 9))
            packed.writestr(entry, member, zipfile.ZIP_DEFLATED if is_possible_size(len(member), small) else zipfile.ZIP_STORED, 9)
        packed.comment = b"0" * HASH_LENGTH
    body = whole.getvalue()[:-HASH_LENGTH]
    return body + hashlib.sha256(body).hexdigest().encode()


def is_possible_size(size: int, packed: int) -> bool:
    """Return whether a member may be so large, given its size in the file."""
    return size <= max(ALWAYS_ALLOWED, MAX_RATIO * packed)


def contents(stream: Stream) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the text of a recording and its arrays by name."""
    description = _Description(stream)
    tasks = [
        {"classes": list(task.classes)}
        | {kind: description.samples(getattr(task, kind), kind, task) for kind in ("train", "test", "validation")}
        for task in stream.tasks
    ]
    sessions = [
        {"task": int(stream.task_of(number)), **description.dealt(positions, f"session_{number}")}
        for number, positions in enumerate(_positions(stream))
    ]
    data = stream.data or DataSource({})
    mixture = stream.schedule if isinstance(stream.schedule, MixedSchedule) else None
    drift = {"drift": {"what": repr(mixture), "once": mixture.once}} if mixture else {}
    about = {
        "format": 3 if stream.drop_last or stream.class_names else 2 if drift or not stream.shuffle else 1,
        "clstream": package_version("clstream"),
        "torch": package_version("torch"),
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
        "order": order_hash(stream),
        "augment": None if stream.augment is None else _named(stream, stream.augment, "augmentation"),
        "loader": data.loader if set(description.used) <= set(data.parts) else None,
        "options": dict(data.options),
        "parts": {name: description.described(description.parts[name]) for name in description.parts if name in description.used},
        "sources": description.sources,
        "tasks": tasks,
        "sessions": sessions,
    }
    return about, description.arrays


class _Description:
    """What a recording of a stream needs, taken up piece by piece: the data, the sources made of it, and arrays."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.parts: dict[str, Samples] = {} if stream.data is None else dict(stream.data.parts)
        self.used: set[str] = set()
        self.sources: list[dict[str, Any]] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.numbers_of_sources: dict[str, int] = {}
        self.names_of_arrays: dict[bytes, str] = {}
        self.hashes = ContentHashes()

    def described(self, samples: Samples) -> dict[str, Any]:
        """Return shape, dtype and hash of the tensors of samples, by name."""
        return {
            name: {"shape": list(rows.shape), "dtype": dtype_name(rows), "sha256": self.hashes.of(rows)}
            for name, rows in tensors_of(samples).items()
        }

    def samples(self, part: Samples | Subset | None, kind: str, task: Task) -> dict[str, Any] | None:
        """Return the samples of a task as rows of a source; "all" is a subset of every row, and None the source itself."""
        if part is None:
            return None
        if isinstance(part, Samples):
            return {"source": self.source(part), "rows": None}
        number, rows = self.source(part.source), part.index.cpu()
        every = torch.equal(rows, torch.arange(len(part.source)))
        rows_of: dict[str, Any] = {"source": number, "rows": "all" if every else self.array(f"task_{task.id}_{kind}", rows)}
        if part.transform is not None:
            what = f"transform of the {'training' if kind == 'train' else kind} samples of task {task.id}"
            rows_of["transform"] = _named(self.stream, part.transform, what)
            rows_of["probe"] = probe_hash(part)
        if part.cached is not None:
            rows_of["made"] = True
        return rows_of

    def source(self, whole: Samples) -> int:
        """Return the number of the source that has the tensors of some samples."""
        tensors = {name: self.hashes.of(rows) for name, rows in tensors_of(whole).items()}
        key = repr(tensors)
        if key not in self.numbers_of_sources:
            same = {}
            for name, part in self.parts.items():
                others = {field: self.hashes.of(rows) for field, rows in tensors_of(part).items()}
                if {**others, "y": ""} == {**tensors, "y": ""}:
                    same[name] = others["y"] == tensors["y"]
            if not same:
                name = f"source_{len(self.sources)}"
                self.parts[name], same[name] = whole, True
            chosen = max(same, key=lambda name: same[name])  # the first with the same labels, if there is one
            self.used.add(chosen)
            labels = None if same[chosen] else self.labels(self.parts[chosen].y.cpu(), whole.y.cpu())
            self.numbers_of_sources[key] = len(self.sources)
            self.sources.append({"part": chosen, "labels": labels})
        return self.numbers_of_sources[key]

    def labels(self, old: Tensor, new: Tensor) -> list[list[int]] | str:
        """Return how labels come from those of the data: pairs (old, new), or, if they don't, all of them."""
        classes, place = old.unique(return_inverse=True)
        table = torch.zeros_like(classes)
        table[place] = new
        if torch.equal(table[place], new):
            return [[int(label), int(new_label)] for label, new_label in zip(classes, table, strict=True)]
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
        member = self.names_of_arrays.setdefault(str(array.dtype).encode() + array.tobytes(), f"{name}.npy")
        self.arrays.setdefault(member, array)
        return member


class ContentHashes:
    """Content hashes of tensors; each is read once."""

    def __init__(self) -> None:
        self.hashed: dict[int, tuple[Tensor, str]] = {}  # with the tensor, so that no other gets its id

    def of(self, rows: Tensor) -> str:
        """Return the hash of a tensor."""
        if id(rows) not in self.hashed:
            self.hashed[id(rows)] = rows, content_hash(rows).hex()
        return self.hashed[id(rows)][1]


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
    if plain and isinstance(stream.schedule, MixedSchedule):
        return [stream.schedule.draw(number) for number in range(len(stream))]
    if plain:
        return [session.samples.x.cpu() for session in numbered]
    delivered = []
    for number in range(len(stream)):
        try:
            session, positions = stream.session(number), numbered.session(number).samples.x
            samples = stream.tasks[stream.task_of(number)].train[positions]
            same = torch.equal(session.samples.y, samples.y) and torch.equal(session.samples.x, samples.x)
            same &= not isinstance(stream.schedule, MixedSchedule)  # its positions are over all tasks
            same &= all(getattr(session, name) == getattr(stream, name) for name in ("epochs", "batch_size", "seed", "drop_last"))
        except Exception:  # noqa: BLE001  # whatever the user's class does with samples that are not its own
            same = False
        if not same:
            raise ValueError(
                f"{stream.name} can't be recorded: {type(stream).__name__}.session gives in session {number} something other than "
                "rows of its task's training samples, with the epochs, batch size and seed of the stream"
            )
        delivered.append(positions.cpu())
    return delivered


def order_hash(stream: Stream) -> str:
    """Return a SHA-256 of the order of the first pass over each session: another torch may deal otherwise."""
    order = hashlib.sha256()
    for session in _numbered(stream):  # a domain need not be made for it
        order.update(content_hash(next(iter(session)).order()))
    return order.hexdigest()


def probe_hash(part: Subset) -> str:
    """Return the hash of what a subset's transform makes of its first rows."""
    assert part.transform is not None
    return content_hash(part.transform(part.source[part.index[:PROBE_ROWS]].x.cpu())).hex()


def _named(stream: Stream, function: object, what: str) -> dict[str, Any]:
    """Return a function by name, with the fields of a dataclass; a transform must be one, since its `repr` has to name it."""
    kind = "a frozen dataclass of plain numbers and strings"
    if isinstance(function, FunctionType) and what == "augmentation":
        kind += ", or a function defined in a module"
        if "<" not in function.__qualname__:
            return {"name": function.__name__}
    elif is_dataclass(function) and not isinstance(function, type):
        values = {field.name: getattr(function, field.name) for field in fields(function) if field.init}
        if all(_is_plain(value) for value in values.values()):
            return {"name": type(function).__name__, "fields": values}
    raise ValueError(f"{stream.name} can't be recorded: the {what} must be {kind}, so that it can be named, not {function!r}")


def _is_plain(value: object) -> bool:
    return type(value) in (int, bool, str, type(None)) or (type(value) is float and math.isfinite(value))


def package_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def tensors_of(samples: Samples) -> dict[str, Tensor]:
    """Return the tensors of samples by name."""
    return {"x": samples.x, "y": samples.y, **{f"extra.{name}": samples.extra[name] for name in sorted(samples.extra)}}


def dtype_name(rows: Tensor) -> str:
    """Return the name of a tensor's dtype without "torch."."""
    return str(rows.dtype).removeprefix("torch.")
