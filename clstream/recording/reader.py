"""Recordings read back: every value is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from clstream.recording.hashes import ContentHashes, dtype_name, order_hash, package_version, probe_hash, tensors_of
from clstream.recording.header import (
    FORMAT,
    HASH_LENGTH,
    HEADER,
    MAX_MEMBERS,
    MAX_TEXT,
    STREAM,
    check_form,
    is_possible_size,
    refuse_constant,
)
from clstream.recording.streams import RecordedMixture, RecordedStream
from clstream.stream import TARGETS, DataSource, Samples, Stream, Subset, Task, TestSet
from clstream.stream.samples import with_target


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

    def find_parts(self, stream: Stream) -> dict[str, Samples]:
        """Return the parts of the recorded data as they are in another stream; where they are not, what is nearest."""
        hashes = ContentHashes()
        candidates = [] if stream.data is None else list(stream.data.parts.items())
        for task in stream.tasks:
            for part in (task.train, task.test, task.validation):
                if part is not None:
                    candidates.append(("", part.source if isinstance(part, Subset) else part))
        for probe in stream.probes:
            candidates.append((probe.name, probe.samples.source if isinstance(probe.samples, Subset) else probe.samples))

        def nearest(name: str, wanted: Mapping[str, Any]) -> Samples:
            def likeness(candidate: tuple[str, Samples]) -> tuple[bool, bool, bool]:
                ours = {field: hashes.of(rows) for field, rows in tensors_of(candidate[1]).items()}
                same = {field: ours.get(field) == tensor["sha256"] for field, tensor in wanted.items()}
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
        self._compare(parts, where)
        try:
            stream = self._stream(parts, functions or {})
        except TypeError as error:  # its tasks or probes are not of the data that is at hand
            raise self._wrong(str(error)) from None
        if order_hash(stream) != self.about["order"]:
            raise ValueError(
                f"{self.file} can't be replayed here: torch {package_version('torch')} deals the batches in another order than "
                f"torch {self.about['torch']}, with which it was recorded; install that one"
            )
        # all that it is made of was compared: it is the recorded stream, also for a version that would count otherwise
        object.__setattr__(stream, "fingerprint", self.about["fingerprint"])
        return stream

    def _stream(self, parts: Mapping[str, Samples], functions: Mapping[str, Callable[..., Any]]) -> RecordedStream:
        """Return the recorded stream over data that was compared."""
        about = self.about
        if strange := [source["part"] for source in about["sources"] if source["part"] not in about["parts"]]:
            raise self._wrong(f"it has no part {strange[0]!r}")
        sources = [self._source(source, parts[source["part"]]) for source in about["sources"]]
        tasks = []
        for number, task in enumerate(about["tasks"]):
            train, test = (self._samples(task[kind], sources, functions) for kind in ("train", "test"))
            held = self._samples(task["validation"], sources, functions) if task["validation"] else None
            tasks.append(Task(number, tuple(task["classes"]), train, test, held, self._target(task)))
        probes = [
            TestSet(
                probe["name"], with_target(self._samples(probe["samples"], sources, functions), self._target(probe)),
                probe["task"], probe["known"], probe["note"],
            )
            for probe in about.get("probes", ())
        ]  # fmt: skip
        dealt = [self._dealt(session, tasks) for session in about["sessions"]]
        mixture = RecordedMixture(**about["drift"], drawn=dealt) if "drift" in about else None
        return RecordedStream(
            **{name: about[name] for name in ("name", "epochs", "batch_size", "scenario", "seed", "boundaries", "resident")},
            tasks=tasks,
            schedule=mixture or [session["task"] for session in about["sessions"]],
            augment=about["augment"] and self._function(about["augment"], functions),
            notes=tuple(about["notes"]),
            data=DataSource({name: parts[name] for name in about["parts"]}, about["loader"], about["options"]),
            shuffle=about.get("shuffle", True),
            drop_last=about.get("drop_last", False),
            class_names=tuple(about.get("class_names", ())),
            probes=probes,
            dealt=dealt,
        )

    def _compare(self, parts: Mapping[str, Samples], where: str) -> None:
        """Refuse data that is not what was recorded, naming what differs."""
        hashes = ContentHashes()
        for part, wanted in self.about["parts"].items():
            at_hand = tensors_of(parts[part]) if part in parts else {}
            for name, tensor in wanted.items():
                kind = {"x": "the inputs", "y": "the labels"}.get(name, name)
                what = f"{kind} of its part {part!r}"
                if name not in at_hand:
                    difference = f"it lacks {what}"
                elif list(at_hand[name].shape) != tensor["shape"] or dtype_name(at_hand[name]) != tensor["dtype"]:
                    recorded = f"{tuple(tensor['shape'])} of {tensor['dtype']}"
                    difference = f"{what} are {tuple(at_hand[name].shape)} of {dtype_name(at_hand[name])}, not {recorded}"
                elif hashes.of(at_hand[name]) != tensor["sha256"]:
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
        mask = None if "columns" not in part else self._class_mask(part["columns"], source)
        if "transform" not in part:
            subset = Subset(source, rows, class_mask=mask)
        else:
            subset = Subset(source, rows, self._function(part["transform"], functions), None, mask)
            if probe_hash(subset) != part.get("probe"):
                raise ValueError(
                    f"{self.file} can't be replayed here: its transform {part['transform']['name']} gives other values than "
                    f"when it was recorded, with torch {self.about['torch']} and clstream {self.about['clstream']}"
                )
        return subset.cache() if part.get("made") else subset

    def _class_mask(self, columns: Sequence[int], source: Samples) -> Tensor:
        """Return which columns of multi-label targets are kept."""
        if source.target != "multilabel" or source.y.dim() != 2:
            raise self._wrong("it names columns of targets that have none")
        if len(set(columns)) < len(columns) or not all(0 <= column < source.y.shape[1] for column in columns):
            raise self._wrong(f"it names columns that are not distinct ones from 0 to {source.y.shape[1] - 1}")
        mask = torch.zeros(source.y.shape[1], dtype=torch.bool)
        mask[list(columns)] = True
        return mask

    def _target(self, named: Mapping[str, Any]) -> str:
        """Return the kind of targets of a task or probe."""
        target: str = named.get("target", "label")
        if target not in TARGETS:
            raise self._wrong(f"it has targets of the kind {target[:50]!r}")
        return target

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
        return ValueError(f"{self.file} is no recording that clstream {package_version('clstream')} can read: {what}")

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
            function: Callable[[Tensor], Tensor] = functions[name](**named["fields"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.file}: {name} does not take the recorded {named['fields']}: {error}") from None
        return function


def read(file: str | Path) -> Recording:
    """Read a recording. Nothing in it is run, and it takes no more than a multiple of the file's size in memory: see `MAX_RATIO`.

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
            about = json.loads(text, parse_constant=refuse_constant)
            if not isinstance(about, dict) or not isinstance(about.get("format"), int):
                raise ValueError("stream.json has no format")
            newer = about["format"] > FORMAT
            if not newer:
                check_form(about, HEADER, STREAM)
                if lacking := [name for name, part in about["parts"].items() if not {"x", "y"} <= part.keys()]:
                    raise ValueError(f"its part {lacking[0]!r} has no inputs, or no labels")
                named = set(_arrays_of(about))
                if named != set(members):
                    raise ValueError(f"stream.json doesn't name the members that there are: {sorted(named ^ set(members))[0]}")
            arrays = {} if newer else {name: _array(name, _unpacked(packed, member)) for name, member in members.items()}
    except _NOT_READABLE as error:
        raise ValueError(f"{file} is no recording that clstream {package_version('clstream')} can read: {error}") from None
    if newer:
        raise ValueError(
            f"{file} has format {about['format']}, of clstream {about.get('clstream')}; "
            f"clstream {package_version('clstream')} reads up to format {FORMAT}: install the newer one"
        )
    return Recording(file, about, arrays)


_NOT_READABLE = (
    ValueError, KeyError, TypeError, IndexError, EOFError, RecursionError, RuntimeError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile, json and numpy raise for damaged files; for a compression that zipfile doesn't know, a kind of RuntimeError."""


def _is_whole(content: IO[bytes]) -> bool:
    """Return whether the end of a file is the hash of all before."""
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    digest, left = hashlib.sha256(), max(0, size - HASH_LENGTH)
    while chunk := content.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return content.read() == digest.hexdigest().encode()


def _check_end(content: IO[bytes]) -> None:
    """Check that a zip file ends as ours do, with a short directory, before it is read."""
    end = 22 + HASH_LENGTH  # of the record at the end: its comment is our hash
    if content.seek(0, os.SEEK_END) < end + 20:
        raise ValueError("it is too short")
    content.seek(-end - 20, os.SEEK_END)
    locator, record = content.read(20), content.read(22)
    signature, *_, members, directory, _, comment = struct.unpack("<4s4H2IH", record)
    if signature != b"PK\5\6" or comment != HASH_LENGTH or locator.startswith(b"PK\6\7"):
        raise ValueError("its directory is not where it should be")
    if members > MAX_MEMBERS or directory > MAX_MEMBERS * 200:
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
        if not is_possible_size(member.file_size, member.compress_size) or (name == STREAM and member.file_size > MAX_TEXT):
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


def _arrays_of(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the arrays that `stream.json` names."""
    yield from (source["labels"] for source in about["sources"] if isinstance(source["labels"], str))
    yield from (session["positions"] for session in about["sessions"] if "positions" in session)
    probes = [probe["samples"] for probe in about.get("probes", ())]
    tasks = [task[kind] for task in about["tasks"] for kind in ("train", "test", "validation") if task[kind] is not None]
    for parts in (tasks, probes):
        yield from (part["rows"] for part in parts if part["rows"] not in (None, "all"))
