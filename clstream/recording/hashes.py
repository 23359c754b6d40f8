"""Hashes of what a recording refers to: tensors, the order of batches, the values of transforms."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from clstream.recording.header import PROBE_ROWS
from clstream.stream import Samples, Stream, Subset, content_hash


class ContentHashes:
    """Content hashes of tensors; each is read once."""

    def __init__(self) -> None:
        self.hashed: dict[int, tuple[Tensor, str]] = {}  # with the tensor, so that no other gets its id

    def of(self, rows: Tensor) -> str:
        """Return the hash of a tensor."""
        if id(rows) not in self.hashed:
            self.hashed[id(rows)] = rows, content_hash(rows).hex()
        return self.hashed[id(rows)][1]


def order_hash(stream: Stream) -> str:
    """Return a SHA-256 of the order of the first pass over each session: another version of torch may shuffle otherwise."""
    order = hashlib.sha256()
    for session in numbered(stream):  # a domain need not be made for it
        order.update(content_hash(next(iter(session)).order()))
    return order.hexdigest()


def probe_hash(part: Subset) -> str:
    """Return the hash of what a subset's transform makes of its first rows."""
    assert part.transform is not None
    return content_hash(part.transform(part.source[part.index[:PROBE_ROWS]].x.cpu())).hex()


def numbered(stream: Stream) -> Stream:
    """Return the stream with each training sample's position in its task as its input, which shows what sessions deliver."""
    tasks = []
    for task in stream.tasks:
        numbers = torch.arange(len(task.train), device=task.train[:1].y.device)
        rows = Samples(numbers, task.train.y)
        tasks.append(replace(task, train=rows if isinstance(task.train, Samples) else Subset(rows, numbers)))
    return stream._like(tasks=tasks)


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
