"""Samples: inputs and targets as whole tensors, and subsets of them that are gathered when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NOTHING: Mapping[str, Tensor] = {}  # the extra fields of samples that have none

TARGETS: tuple[str, ...] = ("label", "multilabel", "value")
"""Kinds of targets: a class for each sample, any number of classes for each, real numbers."""

_CHUNK = 8192  # samples looked at together when all of a data set is checked or hashed


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs and targets, held as whole tensors.

    Args:
        x: (n, *input_shape), raw: integers where the data is, such as uint8 images and int64 tokens, else float32.
        y: the targets. Labels are (n,), int64; multi-label targets (n, classes), float32, 1 for the classes that a sample has and 0
            for others; values (n, outputs), float32.
        extra: further tensors of n rows each, by name: logits, activations, task ids.
        target: the kind of targets: "label", "multilabel" or "value".

    """

    x: Tensor
    y: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)
    target: str = "label"

    def __repr__(self) -> str:
        kind = "" if self.target == "label" else f", {self.target}"
        return (
            f"Samples({len(self)} of {tuple(self.x.shape[1:])} {self.x.dtype}{kind}{''.join(f', {name}' for name in self.extra)})"
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        """Return some of the samples; `index` is a slice, (k,) int64 row numbers, or an (n,) bool mask."""
        extra = {name: rows_of(rows, index) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(rows_of(self.x, index), rows_of(self.y, index), extra, self.target)

    def __add__(self, other: Samples) -> Samples:
        """Join two sets of samples; they must have inputs of one dtype, one kind of targets, and the same extra fields.

        Raises TypeError or ValueError for others.
        """
        if self.target != other.target:
            raise TypeError(f"samples with {self.target} targets can't be joined to samples with {other.target} targets")
        if self.x.dtype != other.x.dtype:  # torch would turn raw bytes into floats from 0 to 255
            raise TypeError(f"inputs of {self.x.dtype} can't be joined to inputs of {other.x.dtype}")
        if self.extra.keys() != other.extra.keys():
            raise ValueError(
                f"samples with the extra fields {sorted(self.extra)} can't be joined to samples with {sorted(other.extra)}: "
                "join Samples(s.x, s.y) instead"
            )
        extra = {name: torch.cat([rows, other.extra[name]]) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), extra, self.target)

    def to(self, device: torch.device | str) -> Samples:
        """Return these samples on `device`; themselves if they are there."""
        extra = {name: rows.to(device) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(self.x.to(device), self.y.to(device), extra, self.target)

    def sent_to(self, device: torch.device) -> Samples:
        """Return these samples on a device, as `to` does; a GPU is not waited for: see `sent`."""
        extra = {name: sent(rows, device) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(sent(self.x, device), sent(self.y, device), extra, self.target)


_SMALL = 2**16  # bytes that the driver takes up at once, pinned or not: 6 us, where pinning them makes it 14 to 22 (H200)


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A GPU is not waited for until it has come so far: what is large is pinned for that."""
    if device.type != "cuda" or rows.is_cuda:
        return rows.to(device)
    return (rows if rows.nbytes <= _SMALL else rows.pin_memory()).to(device, non_blocking=True)


def rows_of(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """Return some rows: `index` is a slice, (k,) int64 row numbers, or an (n,) bool mask."""
    if isinstance(index, slice) or index.dtype == torch.bool:
        return tensor[index]
    return tensor.index_select(0, index)  # eight times as fast as tensor[index]


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Samples of a source, gathered when they are asked for; the source is never copied whole.

    `index` is (n,), int64: the rows of the source. `transform` is a deterministic function of a whole tensor of inputs
    whose `repr` names it fully (a frozen dataclass does): it makes a domain. `cached`, if there, is what the subset gives,
    gathered beforehand: see `cache`. `class_mask`, (classes,) bool, is for multi-label targets: those of the classes where it is
    False are 0. None: all targets are as in the source.
    """

    source: Samples
    index: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    cached: Samples | None = None
    class_mask: Tensor | None = None

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {self.source}{'' if self.transform is None else f', {self.transform}'})"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        if self.cached is not None:
            return self.cached[index]
        rows = self.source[self.index[index]]
        if self.transform is None and self.class_mask is None:
            return rows
        x = rows.x if self.transform is None else self.transform(rows.x)
        return Samples(x, self._masked(rows.y), rows.extra, rows.target)

    def _masked(self, y: Tensor) -> Tensor:
        return y if self.class_mask is None else y * self.class_mask

    @property
    def x(self) -> Tensor:
        """The inputs, gathered anew at each access."""
        return self[:].x

    @property
    def y(self) -> Tensor:
        """The targets, gathered anew at each access."""
        return self._masked(rows_of(self.source.y, self.index))

    @property
    def target(self) -> str:
        """The kind of targets: see `Samples`."""
        return self.source.target

    def take(self, index: Tensor | slice) -> Subset:
        """Return some of these samples, still ungathered."""
        cached = None if self.cached is None else self.cached[index]
        return replace(self, index=self.index[index], cached=cached)

    def cache(self) -> Subset:
        """Return this subset with its samples gathered once, now: for a slow transform of what is asked for again and again."""
        return replace(self, cached=self[:])

    def to(self, device: torch.device | str) -> Subset:
        """Return this subset with its source on `device`."""
        cached = None if self.cached is None else self.cached.to(device)
        mask = None if self.class_mask is None else self.class_mask.to(device)
        return Subset(self.source.to(device), self.index.to(device), self.transform, cached, mask)


def pooled(parts: Sequence[Samples | Subset]) -> Subset | None:
    """Return the samples of all parts, one after the other, where these are plain rows of one source; else None."""
    first = parts[0]
    if not isinstance(first, Subset) or any(
        not isinstance(part, Subset)
        or part.source.x is not first.source.x
        or part.source.y is not first.source.y
        or part.transform is not None
        or part.cached is not None
        or part.class_mask is not None
        for part in parts
    ):
        return None
    return Subset(first.source, torch.cat([part.index for part in parts if isinstance(part, Subset)]))


def repeated_samples(parts: Sequence[Samples | Subset]) -> Tensor | None:
    """Return numbers of the samples of all parts, equal for the same one in several: (samples,), int64; None if there is none."""
    pool = pooled(parts) if parts else None
    if pool is None or len(pool.index.unique()) == len(pool):
        return None
    numbers: Tensor = pool.index.unique(return_inverse=True)[1]
    return numbers


def own_storage(samples: Samples) -> Samples:
    """Return samples in tensors of their own: a view would lead to all that it is a view of."""

    def own(rows: Tensor) -> Tensor:
        part = rows.untyped_storage().nbytes() > rows.nbytes  # as _is_view says, but for tensors made in inference mode
        return rows.clone() if part or rows._is_view() else rows

    return Samples(own(samples.x), own(samples.y), {name: own(rows) for name, rows in samples.extra.items()}, samples.target)


def with_target(part: Samples | Subset, target: str) -> Samples | Subset:
    """Return samples with their targets taken for another kind; the same object if they are of that kind already."""
    if part.target == target:
        return part
    if isinstance(part, Samples):
        return replace(part, target=target)
    cached = None if part.cached is None else replace(part.cached, target=target)
    return replace(part, source=replace(part.source, target=target), cached=cached)


def content_hash(rows: Tensor) -> bytes:
    """Return the SHA-256 of a tensor of at least one dimension: of its dtype, shape and bytes, row by row.

    Recordings hold it, so it stays as it is.
    """
    found = hashlib.sha256(f"{rows.dtype} {tuple(rows.shape)}".encode())
    for chunk in rows.split(_CHUNK):
        found.update(chunk.cpu().contiguous().numpy().data)
    return found.digest()


def check_samples(part: Samples | Subset, what: str, classes: tuple[int, ...] | None, checked: set[int]) -> None:
    """Refuse targets outside `classes` (None: any), a wrong dtype, and numbers that are not finite; look at each source once."""
    if not isinstance(part, (Samples, Subset)):
        raise TypeError(f"{what} must be Samples or a Subset, not a {type(part).__name__}")
    whole = part.source if isinstance(part, Subset) else part
    targets = "labels" if whole.target == "label" else "targets"
    fields = (("inputs", whole.x), (targets, whole.y), *whole.extra.items())
    for name, rows in fields:
        if not isinstance(rows, Tensor):
            raise TypeError(f"{what} need {name} as a tensor, not a {type(rows).__name__}: torch.as_tensor(...) makes one")
    for name, rows in fields:
        if rows.layout != torch.strided:
            raise TypeError(f"{what} need {name} as a dense tensor, not a sparse one: .to_dense() makes one")
        if not rows.dim() or not whole.y.dim():
            raise ValueError(f"{what} need {name} as a tensor of (samples, ...), not a single number")
        if len(rows) != len(whole.y):
            raise ValueError(f"{what} are {len(rows)} {name} with {len(whole.y)} {targets}")
        if rows.requires_grad:
            raise ValueError(f"{what} have {name} that require a gradient, which would be kept from batch to batch: .detach() them")
    if whole.x.is_complex() or whole.x.is_quantized or whole.x.dtype == torch.bool:
        raise TypeError(f"{what} need inputs of integers or real numbers, not {whole.x.dtype}")
    if isinstance(part, Subset) and (
        part.index.dtype != torch.int64 or part.index.dim() != 1 or not 0 <= part.index.min() <= part.index.max() < len(whole)
    ):
        raise ValueError(f"{what}: the index of a Subset must be (n,) int64 row numbers from 0 to {len(whole) - 1}")
    mask = part.class_mask if isinstance(part, Subset) else None
    if mask is not None and (
        part.target != "multilabel" or not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != whole.y.shape[1:]
    ):
        raise ValueError(f"{what}: the class_mask of a Subset must be (classes,) bool, for multi-label targets")
    check_targets(part, what, classes, checked)
    if id(whole.x) not in checked and whole.x.is_floating_point():
        _check_finite(whole.x, what, "input")
    checked.add(id(whole.x))


def check_targets(part: Samples | Subset, what: str, classes: tuple[int, ...] | None, checked: set[int]) -> None:
    """Refuse targets that are not what their kind says, and classes outside of `classes` (None: any)."""
    y = part.source.y if isinstance(part, Subset) else part.y
    if part.target not in TARGETS:
        raise ValueError(f"{what} have targets of the kind {part.target!r}, which there isn't: it is label, multilabel or value")
    if part.target == "label":
        if y.dtype != torch.int64 or y.dim() != 1:
            hint = ": multi-label targets and values need target='multilabel', target='value'" if y.dim() == 2 else ""
            raise TypeError(f"{what} need labels as a (samples,) tensor of int64, not {tuple(y.shape)} of {y.dtype}{hint}")
        labels = set(part.y.unique().tolist())
        if classes is not None and not labels <= set(classes):
            raise ValueError(f"{what} have labels {sorted(labels - set(classes))}, which are not among its classes {classes}")
        return
    columns = "classes" if part.target == "multilabel" else "outputs"
    if y.dtype != torch.float32 or y.dim() != 2 or not y.shape[1]:
        raise TypeError(
            f"{what} need {part.target} targets as a (samples, {columns}) tensor of float32, not {tuple(y.shape)} of {y.dtype}"
        )
    if id(y) not in checked:
        if part.target == "value":
            _check_finite(y, what, "the value")
        elif not ((y == 0) | (y == 1)).all():
            row, column = ((y != 0) & (y != 1)).nonzero()[0].tolist()
            raise ValueError(
                f"{what}: multi-label targets are 0 or 1 for each class, and row {row} has {float(y[row, column]):g} for class "
                f"{column}"
            )
        checked.add(id(y))
    if part.target == "multilabel" and classes is not None:
        others = sorted(set(positives(part.y)) - set(classes))
        if others:
            raise ValueError(
                f"{what} have positives of the classes {others}, which are not among its classes {classes}: training targets of "
                "other tasks' classes must be 0"
            )


def positives(y: Tensor) -> list[int]:
    """Return the classes that any of (n, classes) multi-label targets has, sorted."""
    return [int(label) for label in y.any(0).nonzero().flatten()]


def _check_finite(rows: Tensor, what: str, name: str) -> None:
    for start, chunk in zip(range(0, len(rows), _CHUNK), rows.split(_CHUNK), strict=True):
        if not chunk.isfinite().all():
            row = start + int((~chunk.flatten(1).isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{what}: {name} {row} of the data is NaN or infinite: clean it, or leave it out")
