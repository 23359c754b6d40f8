"""Memory: the bytes that a strategy keeps beside what it answers with.

Counted is what a checkpoint would hold of it: tensors and arrays at any depth, each storage once, as far as it is used: a memory
counts with all the room that it took. Left out are the parameters and buffers that it answers with, gradients, and what it derives
from the rest and could make again (what its class names in `not_state`). Samples of the stream that it only refers to take no room
of their own. Where it learns them again, as joint training does, it says so by `kept_samples`, and they count as if it had a copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.attributes import walk
from clstream.stream import Samples, Session, Stream, Subset, Task

OF_THE_STREAM = (Stream, Session, Task, Subset)
"""What refers to the stream's own samples."""

_THROUGH = re.compile(r"\.(?:base|theirs|(?:parts|regularisers)\[\d+\])(?=[.\[])")
"""What a strategy is made of, in the path of what these hold."""


class Answering(Protocol):
    """What a strategy says of what it holds and sends: see `clstream.Strategy`."""

    @property
    def sent_bytes(self) -> tuple[int, int]:
        """The bytes that went up to a server and down to its clients, so far in the run."""

    def answering_weights(self) -> Iterable[Tensor]:
        """Return the parameters and buffers that it answers with."""

    def kept_samples(self) -> Iterable[Samples | Subset]:
        """Return samples of the stream that it learns again, though it only refers to them."""


def count_parameters(strategy: Answering) -> tuple[int, int]:
    """Return the numbers that a strategy answers with, buffers left out: all, and those that require a gradient."""
    weights = {id(weight): weight for weight in strategy.answering_weights() if isinstance(weight, nn.Parameter)}.values()
    return sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)


def storages_of_stream(stream: Stream) -> set[tuple[str, int]]:
    """Return where the stream's own samples are, each once: they lie there as long as it is."""
    tensors = {id(tensor): tensor for tensor in _tensors_of_stream(stream)}  # tasks share their data
    return {key for tensor in tensors.values() for key, _, _ in _extents(tensor)}


def memory_by_attribute(strategy: Answering, of_stream: Set[tuple[str, int]] = frozenset()) -> dict[str, int]:
    """Return the bytes that a strategy keeps beside what it answers with, by the attribute that holds them.

    What lies where the stream's samples are, as `storages_of_stream` says, is the stream's.
    """
    left_out = of_stream | {key for tensor in strategy.answering_weights() for key, _, _ in _extents(tensor)}
    stored: dict[tuple[str, int], tuple[str, int, int]] = {}  # where it is held first, and how far it is used
    for path, value in walk(strategy, leaves=OF_THE_STREAM):
        if isinstance(value, np.ndarray):
            stored["array", id(value)] = path, 0, value.nbytes
        for tensor in _tensors(value):
            for key, low, high in _extents(tensor):
                first, lowest, highest = stored.get(key, (path, low, high))
                stored[key] = first, min(low, lowest), max(high, highest)
    sizes: dict[str, int] = {}
    for key, (path, low, high) in stored.items():
        if key not in left_out and high > low:
            name = re.split(r"[.\[]", _THROUGH.sub("", path), maxsplit=2)[1]
            sizes[name] = sizes.get(name, 0) + high - low
    if kept := sum(map(_bytes_of_samples, strategy.kept_samples())):
        sizes["kept_samples"] = kept
    return sizes


def peak_bytes(device: torch.device) -> float:
    """Return the most memory that the process had so far, on a GPU the most that tensors had there; NaN if nothing says so."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return float("nan")
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return float("nan") if match is None else 1024.0 * int(match[1])


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a value that the walk takes for one; gradients are left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Optimizer):
        for state in value.state.values():
            yield from (item for item in state.values() if isinstance(item, Tensor))


def _tensors_of_stream(stream: Stream) -> Iterator[Tensor]:
    for task in stream.tasks:
        for part in (task.train, task.test, task.validation):
            if part is not None:
                sources = [part] if isinstance(part, Samples) else [part.source, *([] if part.cached is None else [part.cached])]
                for samples in sources:
                    yield from (samples.x, samples.y, *samples.extra.values())


def _extents(tensor: Tensor) -> Iterator[tuple[tuple[str, int], int, int]]:
    """Yield for each storage of a tensor, of which a sparse one has several, where that is, and its first and last byte there."""
    try:
        if tensor.layout == torch.sparse_coo:
            parts = [tensor._indices(), tensor._values()]
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        else:
            parts = [tensor]
        for part in parts:
            reach = sum((length - 1) * stride for length, stride in zip(part.shape, part.stride(), strict=True))
            low, size, span = int(part.storage_offset()), part.element_size(), int(reach) + 1 if part.numel() else 0
            yield (str(part.device), part.untyped_storage().data_ptr()), low * size, (low + span) * size
    except (NotImplementedError, RuntimeError):  # a layout that has no storage to show
        yield ("tensor", id(tensor)), 0, tensor.numel() * tensor.element_size()


def _bytes_of_samples(samples: Samples | Subset) -> int:
    row = samples[:1]
    return len(samples) * sum(tensor.nbytes for tensor in (row.x, row.y, *row.extra.values()))
