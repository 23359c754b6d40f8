"""A stream's samples as the features of a frozen backbone, computed once and kept in a cache.

    backbone = Pretrained((3, 32, 32), 10, size=128)
    run(NCM(Linear(1280, 10)), features(split_cifar10(), backbone))

What is computed is kept in a file of 4 bytes for each number, which is mapped into memory: by the content of the inputs, the
backbone and its weights, so no other's features are ever taken for these. A computation that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from time import monotonic

import torch
from clstream.streams.data import cache_folder
from clstream.streams.progress import progress_bar
from filelock import FileLock
from torch import Tensor, nn

from clstream.files import check_writable, write_atomically
from clstream.params import HasParams, check_bool, check_integer, describe
from clstream.seeds import isolated
from clstream.stream import MixedSchedule, Samples, Stream, Subset, content_hash

FORMAT = 1

PROBED = 4
"""Rows at the begin of a cache that are computed again before it is used."""

TOLERANCE = 0.01
"""How far they may be from what is there, as a share."""

SAVE_EVERY = 5.0
"""Seconds between two notes of how far a computation is."""


def features(
    stream: Stream,
    backbone: nn.Module,
    views: int = 0,
    cache: str | Path | None = None,
    chunk_size: int = 256,
    progress: bool = True,
) -> Stream:
    """Return a stream with each sample as a backbone's features: float32 (features,), with its labels, tasks and schedule.

    The backbone is asked in evaluation mode, without gradients, on the device that it is on, and stays as it is. A model for the
    new stream takes features as they are: `clstream.models.Linear` has no more than a head.

    Args:
        stream: any stream; its transforms and probes are computed too. Its augmentation is left out, since it is of raw inputs.
        backbone: has `features`: (n, *input_shape) raw inputs to (n, features).
        views: so many augmented views of each training sample, made by the stream's augmentation, that come as samples beside it.
        cache: the folder for the cache. None: clstream's cache folder.
        chunk_size: samples that are computed together.
        progress: whether to show a bar, in a terminal.

    Raises:
        TypeError, ValueError: for a backbone without `features`, or whose features are no rows of numbers; views without an
            augmentation, or of a stream whose sessions mix tasks.
        OSError: if the cache can't be written, or the disk is too small for it: said before anything is computed.

    """
    check_integer(0, views=views)
    check_integer(1, chunk_size=chunk_size)
    check_bool(progress=progress)
    if not isinstance(backbone, nn.Module) or not callable(getattr(backbone, "features", None)):
        raise TypeError(f"features needs a model with a method `features`, not {type(backbone).__name__}")
    if views and stream.augment is None:
        raise ValueError(f"{stream.name} has no augmentation that could make views: views=0, or a stream with augment=...")
    if views and isinstance(stream.schedule, MixedSchedule):
        raise ValueError(f"the sessions of {stream.name} draw samples by their numbers, and have no places for views: views=0")
    folder = check_writable(Path(cache or cache_folder() / "features").expanduser(), "the folder for the cache of features")
    with asked(backbone):
        maker = _Maker(stream, backbone, views, folder, chunk_size, progress)
        tasks = [
            replace(
                task,
                train=maker.part(task.train, views),
                test=maker.part(task.test, 0),
                validation=task.validation and maker.part(task.validation, 0),
            )
            for task in stream.tasks
        ]
        probes = [replace(probe, samples=maker.part(probe.samples, 0)) for probe in stream.probes]
    note = f"features of {maker.whose}, {maker.width:,} numbers a sample"
    note += f"; each training sample with {views} augmented views" if views else ""
    name = f"{stream.name}, features of {type(backbone).__name__}"
    return replace(stream, name=name, tasks=tasks, probes=probes, augment=None, data=None, notes=(*stream.notes, note))


@contextmanager
def asked(backbone: nn.Module) -> Iterator[None]:
    """Put a backbone in evaluation mode, without gradients, and give each module its mode back afterwards."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), isolated(0, "features"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def fingerprint_of(backbone: nn.Module) -> str:
    """Return sixteen hexadecimal digits that change with a backbone's class, structure, arguments and weights."""
    params = {name: describe(value) for name, value in backbone.params.items()} if isinstance(backbone, HasParams) else {}
    digest = hashlib.sha256(repr((type(backbone).__qualname__, params, str(backbone))).encode())
    for name, tensor in backbone.state_dict().items():
        if not name.startswith("head."):
            digest.update(name.encode() + content_hash(tensor if tensor.dim() else tensor[None]))
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Inputs of which features are computed: `rows` of a source, transformed, and then `views` times augmented."""

    source: Samples
    rows: Tensor
    transform: Callable[[Tensor], Tensor] | None
    augment: Callable[[Tensor], Tensor] | None
    views: int

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.views)

    def chunks(self, first: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield, from number `first` on, the number of the first of some inputs, and these; a chunk has one view."""
        n = len(self.rows)
        for view in range(1 + self.views):
            for begin in range(0, n, size):
                if view * n + min(begin + size, n) > first:  # also one that was begun, in chunks of another size
                    x = self.source.x[self.rows[begin : begin + size]]
                    x = x if self.transform is None else self.transform(x)
                    if view and self.augment is not None:
                        with isolated(view, f"view {begin}"):
                            x = self.augment(x)
                    yield view * n + begin, x


class _Maker:
    """Makes the parts of the new stream; parts of one source share one cache."""

    def __init__(self, stream: Stream, backbone: nn.Module, views: int, folder: Path, chunk_size: int, progress: bool) -> None:
        self.stream, self.backbone, self.folder, self.chunk_size, self.progress = stream, backbone, folder, chunk_size, progress
        self.device = next((weight.device for weight in backbone.parameters()), torch.device("cpu"))
        self.print = fingerprint_of(backbone)
        told = getattr(backbone, "params", {}).get("pretrained")
        self.whose = f"{type(backbone).__name__} ({told or f'weights {self.print}'})"
        self.width = self.compute(stream.tasks[0].test[:1].x).shape[1]
        parts = [
            (part, count) for task in stream.tasks for part, count in ((task.train, views), (task.test, 0), (task.validation, 0))
        ]
        parts += [(probe.samples, 0) for probe in stream.probes]
        used: dict[tuple[int, str, int], list[Tensor]] = {}
        for part, count in parts:
            if part is not None:
                used.setdefault(_key(part, count), []).append(_rows(part))
        self.rows = {key: torch.cat(rows).unique() for key, rows in used.items()}
        self.made: dict[tuple[int, str, int], Tensor] = {}
        needed = 4 * self.width * sum(len(rows) * (1 + key[2]) for key, rows in self.rows.items())
        free = disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"the features take {needed / 1e9:,.2f} GB, and {folder} has {free / 1e9:,.2f} GB left: name another one, cache=..."
            )

    def compute(self, x: Tensor) -> Tensor:
        """Return (n, features), float32, on the CPU."""
        features: Tensor = self.backbone.features(x.to(self.device))  # type: ignore[operator]  # `features` has asked for it
        if features.dim() != 2:
            raise ValueError(f"{type(self.backbone).__name__}.features must return (n, features), not {tuple(features.shape)}")
        return features.detach().float().cpu()

    def part(self, part: Samples | Subset, views: int) -> Subset:
        """Return samples with features in place of their inputs."""
        key, whole = _key(part, views), part.source if isinstance(part, Subset) else part
        used = self.rows[key]
        if key not in self.made:
            transform = part.transform if isinstance(part, Subset) else None
            self.made[key] = self.cached(_Inputs(whole, used, transform, self.stream.augment, views))
        times = 1 + views
        extra = {name: rows[used].repeat(times, *[1] * (rows.dim() - 1)) for name, rows in whole.extra.items()}
        y = whole.y[used]
        source = Samples(self.made[key], y.repeat(times, *[1] * (y.dim() - 1)), extra, part.target)
        own = torch.searchsorted(used, _rows(part))
        index = torch.cat([own + view * len(used) for view in range(times)])
        return Subset(source, index, class_mask=part.class_mask if isinstance(part, Subset) else None)

    def cached(self, inputs: _Inputs) -> Tensor:
        """Return the features of inputs, (n, features), from the cache, or computed into it."""
        shown = hashlib.sha256()
        for _, x in _Inputs(inputs.source, inputs.rows, inputs.transform, None, 0).chunks(0, 8192):
            shown.update(content_hash(x))
        facts: tuple[object, ...] = (FORMAT, self.print, shown.hexdigest(), len(inputs), self.width)
        facts += (inputs.views, describe(inputs.augment), self.chunk_size) if inputs.views else ()
        file = self.folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.f32"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                self._fill(file, inputs)
            if not self._agrees(file, inputs):  # the backbone's code, or the file, is another one
                file.unlink()
                self._fill(file, inputs)
            return _mapped(file, len(inputs), self.width)

    def _agrees(self, file: Path, inputs: _Inputs) -> bool:
        """Return whether a cache has the right size, and its first rows are what the backbone gives now."""
        if file.stat().st_size != 4 * len(inputs) * self.width:
            return False
        mapped = _mapped(file, len(inputs), self.width)
        _, x = next(inputs.chunks(0, min(self.chunk_size, len(inputs.rows))))
        now, then = self.compute(x[:PROBED]), mapped[:PROBED]  # another batch size, device or number of threads rounds otherwise
        return bool((now - then).norm() <= TOLERANCE * then.norm())

    def _fill(self, file: Path, inputs: _Inputs) -> None:
        """Compute features into a file, from where an earlier attempt was cut off."""
        part, note = file.with_suffix(".part"), file.with_suffix(".json")
        size = 4 * len(inputs) * self.width
        done = _done(part, note, size, len(inputs))
        room = torch.from_file(str(part), shared=True, size=len(inputs) * self.width, dtype=torch.float32).view(-1, self.width)
        saved = monotonic()
        with progress_bar(f"features of {self.stream.name}", len(inputs), self.progress, done) as advance:
            for begin, x in inputs.chunks(done, self.chunk_size):
                room[begin : begin + len(x)] = self.compute(x)
                advance(len(x))
                if monotonic() - saved > SAVE_EVERY:
                    saved, content = monotonic(), json.dumps({"done": begin + len(x)}).encode()
                    write_atomically(note, lambda out, content=content: out.write(content))  # type: ignore[misc]
        del room
        part.replace(file)
        note.unlink(missing_ok=True)


def _done(part: Path, note: Path, size: int, rows: int) -> int:
    """Return how many rows an earlier attempt had computed."""
    try:
        done = json.loads(note.read_bytes())["done"]
        return done if type(done) is int and 0 <= done <= rows and part.stat().st_size == size else 0
    except (OSError, ValueError, KeyError, TypeError):
        part.unlink(missing_ok=True)
        return 0


def _mapped(file: Path, rows: int, width: int) -> Tensor:
    return torch.from_file(str(file), shared=False, size=rows * width, dtype=torch.float32).view(rows, width)


def _key(part: Samples | Subset, views: int) -> tuple[int, str, int]:
    """Return what parts have in common whose features are computed together."""
    whole = part.source if isinstance(part, Subset) else part
    return id(whole.x), repr(part.transform) if isinstance(part, Subset) else "None", views


def _rows(part: Samples | Subset) -> Tensor:
    return part.index if isinstance(part, Subset) else torch.arange(len(part))
