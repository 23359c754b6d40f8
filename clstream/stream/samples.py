"""Samples: inputs and labels as whole tensors, and subsets of them that are gathered when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NOTHING: Mapping[str, Tensor] = {}  # the extra fields of samples that have none

_CHUNK = 8192  # samples looked at together when all of a data set is checked or hashed


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs and labels, held as whole tensors.

    `x` is (n, *input_shape), raw: integers where the data is, such as uint8 images and int64 tokens, else float32. `y` is
    (n,), int64.
    `extra` holds further tensors of n rows each, by name: logits, activations, task ids.
    """

    x: Tensor
    y: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=lambda: NOTHING)

    def __repr__(self) -> str:
        return f"Samples({len(self)} of {tuple(self.x.shape[1:])} {self.x.dtype}{''.join(f', {name}' for name in self.extra)})"

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        """Return some of the samples; `index` is a slice, (k,) int64 row numbers, or an (n,) bool mask."""
        extra = {name: rows_of(rows, index) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(rows_of(self.x, index), rows_of(self.y, index), extra)

    def __add__(self, other: Samples) -> Samples:
        """Join two sets of samples; their inputs must have one dtype, and they the same extra fields (TypeError, ValueError)."""
        if self.x.dtype != other.x.dtype:  # torch would turn raw bytes into floats from 0 to 255
            raise TypeError(f"inputs of {self.x.dtype} can't be joined to inputs of {other.x.dtype}")
        if self.extra.keys() != other.extra.keys():
            raise ValueError(
                f"samples with the extra fields {sorted(self.extra)} can't be joined to samples with {sorted(other.extra)}: "
                "join Samples(s.x, s.y) instead"
            )
        extra = {name: torch.cat([rows, other.extra[name]]) for name, rows in self.extra.items()} if self.extra else NOTHING
        return Samples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), extra)

    def to(self, device: torch.device | str) -> Samples:
        """Return these samples on `device`; themselves if they are there."""
        return Samples(self.x.to(device), self.y.to(device), {name: rows.to(device) for name, rows in self.extra.items()})


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
    gathered beforehand: see `cache`.
    """

    source: Samples
    index: Tensor
    transform: Callable[[Tensor], Tensor] | None = None
    cached: Samples | None = None

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {self.source}{'' if self.transform is None else f', {self.transform}'})"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        if self.cached is not None:
            return self.cached[index]
        rows = self.source[self.index[index]]
        return rows if self.transform is None else Samples(self.transform(rows.x), rows.y, rows.extra)

    @property
    def x(self) -> Tensor:
        """The inputs, gathered anew at each access."""
        return self[:].x

    @property
    def y(self) -> Tensor:
        """The labels, gathered anew at each access."""
        return rows_of(self.source.y, self.index)

    def take(self, index: Tensor | slice) -> Subset:
        """Return some of these samples, still ungathered."""
        cached = None if self.cached is None else self.cached[index]
        return Subset(self.source, self.index[index], self.transform, cached)

    def cache(self) -> Subset:
        """Return this subset with its samples gathered once, now: for a slow transform of what is asked for again and again."""
        return replace(self, cached=self[:])

    def to(self, device: torch.device | str) -> Subset:
        """Return this subset with its source on `device`."""
        cached = None if self.cached is None else self.cached.to(device)
        return Subset(self.source.to(device), self.index.to(device), self.transform, cached)


def pooled(parts: Sequence[Samples | Subset]) -> Subset | None:
    """Return the samples of all parts, one after the other, where these are plain rows of one source; else None."""
    first = parts[0]
    if not isinstance(first, Subset) or any(
        not isinstance(part, Subset)
        or part.source.x is not first.source.x
        or part.source.y is not first.source.y
        or part.transform is not None
        or part.cached is not None
        for part in parts
    ):
        return None
    return Subset(first.source, torch.cat([part.index for part in parts if isinstance(part, Subset)]))


def own_storage(samples: Samples) -> Samples:
    """Return samples in tensors of their own: a view would lead to all that it is a view of."""

    def own(rows: Tensor) -> Tensor:
        part = rows.untyped_storage().nbytes() > rows.nbytes  # as _is_view says, but for tensors made in inference mode
        return rows.clone() if part or rows._is_view() else rows

    return Samples(own(samples.x), own(samples.y), {name: own(rows) for name, rows in samples.extra.items()})


def content_hash(rows: Tensor) -> bytes:
    """Return the SHA-256 of a tensor of at least one dimension: of its dtype, shape and bytes, row by row.

    Recordings hold it, so it stays as it is.
    """
    found = hashlib.sha256(f"{rows.dtype} {tuple(rows.shape)}".encode())
    for chunk in rows.split(_CHUNK):
        found.update(chunk.cpu().contiguous().numpy().data)
    return found.digest()


def check_samples(part: Samples | Subset, what: str, classes: tuple[int, ...], checked: set[int]) -> None:
    """Refuse labels outside `classes`, a wrong dtype, and inputs that are not finite; look at each source once."""
    if not isinstance(part, (Samples, Subset)):
        raise TypeError(f"{what} must be Samples or a Subset, not a {type(part).__name__}")
    whole = part.source if isinstance(part, Subset) else part
    fields = (("inputs", whole.x), ("labels", whole.y), *whole.extra.items())
    for name, rows in fields:
        if not isinstance(rows, Tensor):
            raise TypeError(f"{what} need {name} as a tensor, not a {type(rows).__name__}: torch.as_tensor(...) makes one")
    for name, rows in fields:
        if rows.layout != torch.strided:
            raise TypeError(f"{what} need {name} as a dense tensor, not a sparse one: .to_dense() makes one")
        if not rows.dim() or not whole.y.dim():
            raise ValueError(f"{what} need {name} as a tensor of (samples, ...), not a single number")
        if len(rows) != len(whole.y):
            raise ValueError(f"{what} are {len(rows)} {name} with {len(whole.y)} labels")
        if rows.requires_grad:
            raise ValueError(f"{what} have {name} that require a gradient, which would be kept from batch to batch: .detach() them")
    if whole.x.is_complex() or whole.x.is_quantized or whole.x.dtype == torch.bool:
        raise TypeError(f"{what} need inputs of integers or real numbers, not {whole.x.dtype}")
    if isinstance(part, Subset) and (
        part.index.dtype != torch.int64 or part.index.dim() != 1 or not 0 <= part.index.min() <= part.index.max() < len(whole)
    ):
        raise ValueError(f"{what}: the index of a Subset must be (n,) int64 row numbers from 0 to {len(whole) - 1}")
    if whole.y.dtype != torch.int64 or whole.y.dim() != 1:
        raise TypeError(f"{what} need labels as a (samples,) tensor of int64, not {tuple(whole.y.shape)} of {whole.y.dtype}")
    labels = set(part.y.unique().tolist())
    if not labels <= set(classes):
        raise ValueError(f"{what} have labels {sorted(labels - set(classes))}, which are not among its classes {classes}")
    if id(whole.x) not in checked and whole.x.is_floating_point():
        for start, chunk in zip(range(0, len(whole.x), _CHUNK), whole.x.split(_CHUNK), strict=True):
            if not chunk.isfinite().all():
                row = start + int((~chunk.flatten(1).isfinite().all(1)).nonzero()[0])
                raise ValueError(f"{what}: input {row} of the data is NaN or infinite: clean it, or leave it out")
    checked.add(id(whole.x))
