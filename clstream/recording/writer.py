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
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from operator import index
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clstream.files import write_atomically
from clstream.recording.extension import check_extends
from clstream.recording.hashes import ContentHashes, dtype_name, numbered, order_hash, package_version, probe_hash, tensors_of
from clstream.recording.header import HASH_LENGTH, MAX_MEMBERS, MAX_TEXT, STREAM, is_possible_size
from clstream.recording.streams import RecordedStream
from clstream.stream import DataSource, MixedSchedule, PoolSchedule, Samples, Stream, Subset, Task, TestSet

_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # no time is recorded: the same stream gives the same bytes


def record(stream: Stream, file: str | Path, force: bool = False, extend: bool = False) -> Path:
    """Write what a stream is to a file, and return its path. The same stream gives the same bytes.

    Args:
        stream: any stream; its transforms must be frozen dataclasses of plain numbers and strings, its augmentation one too, or
            a function with a name. Both are recorded by name.
        file: where; by custom it ends in `.clstream`. It is written atomically.
        force: overwrite a file that holds something else.
        extend: replace the recording in the file, which must be the begin of this one: the stream begins with its tasks and
            sessions, sample by sample, and has its options.

    Raises:
        TypeError, ValueError: if the stream can't be recorded, or doesn't begin with what is to be extended; nothing is written.
        FileExistsError: if the file holds something else.
        OSError: if it can't be written.

    """
    if not isinstance(stream, Stream):
        raise TypeError(f"record takes a Stream, not a {type(stream).__name__}")
    if stream.arrives:
        raise ValueError(f"{stream.name} arrives while it is learned, so no recording can say what it delivers")
    if isinstance(stream.schedule, PoolSchedule):
        raise ValueError(f"{stream.name} asks the strategy which labels it buys, so no recording can say what it delivers")
    if any(not len(task.train) for task in stream.tasks):
        raise ValueError(
            f"{stream.name} can't be recorded: its first tasks are of a run that it continues, and have no samples here; give a "
            "stream of both, january.followed_by(february)"
        )
    file = Path(file)
    if extend:
        check_extends(stream, file)
    content = pack(*contents(stream))
    try:
        if file.exists():
            if file.read_bytes() == content:
                return file
            if not (force or extend):
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


def contents(stream: Stream) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the text of a recording and its arrays by name."""
    description = _Description(stream)
    tasks = [
        {"classes": list(task.classes)}
        | ({} if task.target == "label" else {"target": task.target})
        | {kind: description.task_samples(getattr(task, kind), kind, task) for kind in ("train", "test", "validation")}
        for task in stream.tasks
    ]
    used_by_tasks = set(description.used)
    probes = [description.probe(number, probe) for number, probe in enumerate(stream.probes)]
    of_format_4 = probes or stream.targets != ("label",)
    sessions = [
        {"task": int(stream.task_of(number)), **description.dealt(positions, f"session_{number}")}
        for number, positions in enumerate(_positions(stream))
    ]
    data = stream.data or DataSource({})
    mixture = stream.schedule if isinstance(stream.schedule, MixedSchedule) else None
    drift = {"drift": {"what": repr(mixture), "once": mixture.once}} if mixture else {}
    about = {
        "format": 4 if of_format_4 else 3 if stream.drop_last or stream.class_names else 2 if drift or not stream.shuffle else 1,
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
        "loader": data.loader if used_by_tasks <= set(data.parts) else None,
        "options": dict(data.options),
        "parts": {name: description.described(description.parts[name]) for name in description.parts if name in description.used},
        "sources": description.sources,
        "tasks": tasks,
        **({"probes": probes} if probes else {}),
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

    def task_samples(self, part: Samples | Subset | None, kind: str, task: Task) -> dict[str, Any] | None:
        """Return samples of a task: see `samples`."""
        what = f"the {'training' if kind == 'train' else kind} samples of task {task.id}"
        return None if part is None else self.samples(part, f"task_{task.id}_{kind}", what)

    def probe(self, number: int, probe: TestSet) -> dict[str, Any]:
        """Return what a probe is; data that is of no task is called as the probe is."""
        target = {} if probe.samples.target == "label" else {"target": probe.samples.target}
        samples = self.samples(probe.samples, f"probe_{number}", f"the probe {probe.name}", probe.name)
        return {"name": probe.name, "task": probe.task, "known": probe.known, **target, "note": probe.note, "samples": samples}

    def samples(self, part: Samples | Subset, name: str, what: str, data: str | None = None) -> dict[str, Any]:
        """Return samples as rows of a source; "all" is a subset of every row, and None the source itself.

        Args:
            part: the samples.
            name: of the array of rows, if one is needed.
            what: to call them in errors.
            data: the name of their data, where it is not among the parts. None: by number.

        """
        if isinstance(part, Samples):
            return {"source": self.source(part, data), "rows": None}
        number, rows = self.source(part.source, data), part.index.cpu()
        every = torch.equal(rows, torch.arange(len(part.source)))
        rows_of: dict[str, Any] = {"source": number, "rows": "all" if every else self.array(name, rows)}
        if part.class_mask is not None:
            rows_of["columns"] = part.class_mask.cpu().nonzero().flatten().tolist()
        if part.transform is not None:
            rows_of["transform"] = _named(self.stream, part.transform, f"transform of {what}")
            rows_of["probe"] = probe_hash(part)
        if part.cached is not None:
            rows_of["made"] = True
        return rows_of

    def source(self, whole: Samples, data: str | None = None) -> int:
        """Return the number of the source that has the tensors of some samples; `data` is what to call them as a new part."""
        tensors = {name: self.hashes.of(rows) for name, rows in tensors_of(whole).items()}
        key = repr(tensors)
        if key not in self.numbers_of_sources:
            same = {}
            for name, part in self.parts.items():
                others = {field: self.hashes.of(rows) for field, rows in tensors_of(part).items()}
                mapped = part.y.dim() == whole.y.dim() == 1  # other targets are no function of what the data has
                if {**others, "y": ""} == {**tensors, "y": ""} and (mapped or others["y"] == tensors["y"]):
                    same[name] = others["y"] == tensors["y"]
            if not same:
                name = f"source_{len(self.sources)}" if data is None or data in self.parts else data
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


def _positions(stream: Stream) -> list[Tensor]:
    """Return for each session the positions of its samples among its task's, as it delivers them."""
    by_number = numbered(stream)
    plain = type(stream).session in (Stream.session, RecordedStream.session)
    if plain and isinstance(stream.schedule, MixedSchedule):
        return [stream.schedule.draw(number) for number in range(len(stream))]
    if plain:
        return [session.samples.x.cpu() for session in by_number]
    delivered = []
    for number in range(len(stream)):
        try:
            session, positions = stream.session(number), by_number.session(number).samples.x
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
