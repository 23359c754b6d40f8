"""A cache of decoded images: one file of a header and raw bytes, written once, then memory-mapped.

The file is named after a fingerprint of what it was made from, so that other files or options never find it. It is data, and may
be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from clstream.streams.data import cache_folder
from clstream.streams.image_files import ImageFile, decode, opened, pixels
from clstream.streams.progress import progress_bar

from clstream.files import check_writable, write_atomically
from clstream.stream import Samples

FORMAT = 1
"""Number of the format of the files, and of the way in which images are decoded: another one makes other names."""

PAGE = 4096
"""The header takes a multiple of so many bytes."""

MOST_HEADER = 1 << 24
"""Bytes of a header at most."""

CHUNK_BYTES, CHUNK_IMAGES = 1 << 23, 256
"""How much a thread decodes before it writes."""


@dataclass(frozen=True)
class ImageSet:
    """Images by class, to train and to test on.

    Args:
        names: of the classes.
        train, test: for each class, its files.

    """

    names: tuple[str, ...]
    train: Sequence[Sequence[ImageFile]]
    test: Sequence[Sequence[ImageFile]]

    @property
    def files(self) -> list[ImageFile]:
        """All files, in the order in which they are kept: those to train first, class by class."""
        return [file for part in (self.train, self.test) for own in part for file in own]


def key_of(*facts: object) -> str:
    """Return the fingerprint of what a cache file is made from."""
    return hashlib.sha256(repr((FORMAT, *facts)).encode()).hexdigest()[:20]


def cache_files(root: Path, cache: str | Path | None, name: str) -> list[Path]:
    """Return where a cache file may lie: in the user's folder, or else beside the data or in the cache folder."""
    if cache is not None:
        return [Path(cache).expanduser() / name]
    beside, other = root.absolute().parent / f"{root.name}.cache" / name, cache_folder() / "images" / name
    if beside.parent.parent.is_dir() and not beside.parent.parent.stat().st_mode & 0o222:  # it is to stay as it is, for root too
        return [other, beside]
    return [beside, other]


def load_cached(files: Iterable[Path]) -> tuple[tuple[str, ...], Samples, Samples] | None:
    """Return class names and images of the first cache file that is there and whole; None if there is none."""
    for file in files:
        with suppress(OSError, ValueError, RuntimeError, TypeError, LookupError):
            return _load(file)
    return None


def _load(file: Path) -> tuple[tuple[str, ...], Samples, Samples]:
    """Return what a cache file holds. Raises ValueError for one that is not what it says."""
    with file.open("rb") as content:
        length = int(content.read(8))
        if not 0 < length <= MOST_HEADER or length % PAGE:
            raise ValueError("no header")
        header = json.loads(content.read(length - 8))
    names, shape, counts = header["names"], header["shape"], header["counts"]
    numbers = [*shape, *counts[0], *counts[1]]
    if not all(type(number) is int and number > 0 for number in numbers) or not all(type(name) is str for name in names):
        raise ValueError("no numbers")
    total = sum(counts[0]) + sum(counts[1])
    if len(shape) != 3 or not len(names) == len(counts[0]) == len(counts[1]):
        raise ValueError("no shape")
    if file.stat().st_size != length + total * math.prod(shape):
        raise ValueError("no such size")
    whole = torch.from_file(str(file), shared=False, size=length + total * math.prod(shape), dtype=torch.uint8)
    x = whole[length:].view(total, *shape)
    labels = [torch.arange(len(names)).repeat_interleave(torch.tensor(count)) for count in counts]
    first = len(labels[0])
    return tuple(names), Samples(x[:first], labels[0]), Samples(x[first:], labels[1])


def decode_all(
    root: Path, images: ImageSet, mode: str, size: tuple[int, int] | None, where: Iterable[Path], what: str, progress: bool
) -> Path:
    """Decode all images into a cache file, at the first place that can be written; return its path.

    Threads decode: PIL's decoders and its resizing release Python's lock, and threads need no start, no second torch in memory, and
    write to one file. There are as many as torch uses.

    Raises ValueError, naming the file, for an image that can't be read, or is of another size where none is asked for.
    """
    file = _writable(where)
    files = images.files
    with warnings.catch_warnings(), opened(root) as read:
        warnings.simplefilter("ignore")  # PIL's, of palettes with transparency, and of images that are refused here if too large
        first = pixels([decode(root, read, files[0], mode, size)])
        shape = first.shape[1:]
        bytes_each = math.prod(shape)
        counts = [[len(own) for own in part] for part in (images.train, images.test)]
        header = json.dumps({"names": images.names, "shape": shape, "counts": counts}).encode()
        length = -(-(8 + len(header)) // PAGE) * PAGE
        if length > MOST_HEADER:
            raise ValueError(f"{root} has {len(images.names):,} classes, whose names are too long for a cache")
        _check_room(file.parent, length + len(files) * bytes_each)
        step = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // bytes_each))

        def write(out: IO[bytes]) -> None:
            def convert(begin: int) -> int:
                chunk = [decode(root, read, file, mode, size) for file in files[begin : begin + step]]
                for file, image in zip(files[begin:], chunk, strict=False):
                    if image.size != shape[:0:-1]:
                        raise ValueError(
                            f"{root / file.name} has {image.height} x {image.width} pixels, and {root / files[0].name} has "
                            f"{shape[1]} x {shape[2]}: give a size for all, as size=32"
                        )
                _write_at(out.fileno(), pixels(chunk).tobytes(), length + begin * bytes_each)
                return len(chunk)

            out.write((b"%08d" % length + header).ljust(length))
            out.flush()
            _in_threads(convert, range(0, len(files), step), len(files), what, progress)

        return write_atomically(file, write)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the decoded images take {needed / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB left: name another folder, "
            "cache=..., or a smaller size"
        )


def _write_at(descriptor: int, content: bytes, position: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _in_threads(convert: Callable[[int], int], begins: Sequence[int], total: int, what: str, progress: bool) -> None:
    """Call a function of each begin in as many threads as torch uses, and show how far it is, in a terminal."""
    executor = ThreadPoolExecutor(torch.get_num_threads())
    try:
        with progress_bar(what, total, progress) as advance:
            for done in executor.map(convert, begins):
                advance(done)
    finally:
        executor.shutdown(cancel_futures=True)


def _writable(files: Iterable[Path]) -> Path:
    """Return the first of some files whose folder can be written; it is made."""
    error: OSError | None = None
    for file in files:
        try:
            return check_writable(file.parent, "the folder for the cache of images") / file.name
        except OSError as refused:
            error = refused
    assert error is not None
    raise error
