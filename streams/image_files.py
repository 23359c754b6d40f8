"""Image files in a folder for each class: found in a folder or a zip archive, decoded to bytes.

Folders and archives may come from anyone. Nothing is unpacked, so no member is written anywhere; a member's bytes are bounded by
what the archive promises (`MOST_BYTES`), an image's pixels by what its header does (`MOST_PIXELS`), and only formats that PIL
decodes by itself are opened.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What the names of image files end in, in small letters or capitals."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened; of others, some have PIL start a program."""

MOST_BYTES = 1 << 26
"""Bytes of an image file at most."""

MOST_PIXELS = 1 << 26
"""Pixels of an image at most, as its header has them."""


_DAMAGED = (
    OSError, EOFError, SyntaxError, LookupError, TypeError, OverflowError, RuntimeError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
"""What PIL and zipfile raise for damaged files; for a compression that zipfile doesn't know, a kind of RuntimeError."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of an image, or a folder.

    Args:
        name: its path within the root, with slashes; of a folder it ends in one.
        size: its bytes.
        changed: when it was changed, in nanoseconds; of a member of an archive its checksum.

    """

    name: str
    size: int
    changed: int = 0


def find_files(root: Path) -> list[ImageFile]:
    """Return the files and folders in a folder or zip archive, without hidden ones, sorted by name.

    Raises FileNotFoundError or ValueError, in one sentence, if there is no such folder or archive, or it has what can't be read.
    """
    if root.is_dir():
        return sorted(_walk(root, ""), key=lambda file: file.name)
    if not root.exists():
        raise FileNotFoundError(f"there is no folder or zip archive {root}: name one that has a folder of images for each class")
    if not zipfile.is_zipfile(root):
        raise ValueError(f"{root} is neither a folder nor a zip archive")
    with _as_sentence(root), zipfile.ZipFile(root) as archive:
        return sorted(_members(root, archive), key=lambda file: file.name)


def _walk(folder: Path, within: str) -> Iterator[ImageFile]:
    """Yield what is in a folder, at any depth. Links to folders are followed in the first two levels only: there are no loops."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{within}{entry.name}"
                if _is_hidden(name):
                    continue
                if entry.is_dir():
                    if entry.is_symlink() and name.count("/") > 1:
                        raise ValueError(f"{entry.path} is a link to a folder: only a class, or a part such as train, may be one")
                    yield ImageFile(f"{name}/", 0)
                    yield from _walk(Path(entry.path), f"{name}/")
                elif entry.is_file():
                    status = entry.stat()
                    yield ImageFile(name, status.st_size, status.st_mtime_ns)
                else:
                    raise ValueError(f"{entry.path} is neither a file nor a folder: remove it")
    except OSError as error:
        raise OSError(f"the folder {folder} can't be read: {error.strerror or error}") from None


def _members(root: Path, archive: zipfile.ZipFile) -> Iterator[ImageFile]:
    """Yield the files of an archive. Raises ValueError for a member that no honest archive of images has."""
    names: set[str] = set()
    for member in archive.infolist():
        name = member.filename
        if _is_hidden(name):
            continue
        mode = member.external_attr >> 16
        steps = name.removesuffix("/").split("/")
        wrong = ""
        if "\\" in name or ":" in steps[0] or {"", ".", ".."} & set(steps):
            wrong = "has a path that leads out of the archive"
        elif name in names:
            wrong = "comes twice"
        elif member.flag_bits & 1:
            wrong = "is encrypted"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
            wrong = "is no plain file"
        if wrong:
            raise ValueError(f"{root}: its member {name!r:.200} {wrong}")
        names.add(name)
        yield ImageFile(name, member.file_size, member.CRC)


def _is_hidden(name: str) -> bool:
    """Return whether systems left the file: `.DS_Store`, `Thumbs.db`, `__MACOSX`, and whatever begins with a dot."""
    parts = name.split("/")
    dotted = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return dotted or parts[0] == "__MACOSX" or parts[-1] == "Thumbs.db"


@contextmanager
def _as_sentence(root: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:  # the second for a compression that zipfile doesn't know
        raise ValueError(f"{root} is a damaged zip archive: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def opened(root: Path) -> Iterator[Callable[[ImageFile], bytes]]:
    """Give a function that reads a file of a folder or archive, from several threads at once."""
    if root.is_dir():

        def read(file: ImageFile) -> bytes:
            with (root / file.name).open("rb") as content:
                return content.read(MOST_BYTES + 1)

        yield read
        return
    lock = Lock()  # an archive counts its readers, in a way that threads may disturb
    with _as_sentence(root), zipfile.ZipFile(root) as archive:

        def read_member(file: ImageFile) -> bytes:
            with lock, archive.open(file.name) as content:
                return content.read(file.size)  # never more than the archive promises

        yield read_member


def decode(root: Path, read: Callable[[ImageFile], bytes], file: ImageFile, mode: str, size: tuple[int, int] | None) -> Image:
    """Return an image in a mode; one of another size is resized, and cut to it about its middle, by PIL's `ImageOps.fit`.

    Args:
        root: what errors call the place.
        read: as `opened` gives it.
        file: which one.
        mode: "RGB" or "L". Palettes and other colours are converted, and alpha is dropped, as torchvision's ImageFolder does.
        size: height and width. None: as the image is.

    Raises ValueError, naming the file, for what is no image that can be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = root / file.name
    if not file.name.lower().endswith(ENDINGS):
        raise ValueError(f"{name} is no image, by its name: images end in {', '.join(ENDINGS)}; remove it")
    if file.size > MOST_BYTES:
        raise ValueError(f"{name} has {file.size:,} bytes, and an image may have {MOST_BYTES:,}")
    try:
        with Image.open(io.BytesIO(read(file)), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{name} has {width:,} x {height:,} pixels, and an image may have {MOST_PIXELS:,}")
            if image.mode[0] in "IF":
                raise ValueError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
            image.load()
            plain = image.convert(mode)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no image that can be read ({', '.join(FORMATS)}), or is damaged: remove it") from None
    except ValueError as error:
        raise error if str(name) in str(error) else _unreadable(name, error) from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from None
    if size is None or plain.size == size[::-1]:
        return plain
    return ImageOps.fit(plain, size[::-1], Image.Resampling.BILINEAR)


def _unreadable(name: Path, error: Exception) -> ValueError:
    return ValueError(f"{name} can't be read as an image: {' '.join(str(error).split())[:200] or type(error).__name__}")


def pixels(images: Sequence[Image]) -> npt.NDArray[np.uint8]:
    """Return images of one size as bytes: (n, channels, height, width)."""
    whole = np.stack([np.asarray(image) for image in images])
    return np.ascontiguousarray(whole[:, None] if whole.ndim == 3 else whole.transpose(0, 3, 1, 2))
