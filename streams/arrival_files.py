"""Files of one session: Parquet, NPZ, and folders or zip archives with a folder of images for each class."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clstream.streams.arrays import as_inputs, as_tensor
from clstream.streams.image_files import decode, find_files, opened, pixels

from clstream.params import reason_of
from clstream.stream import Arrival

TABLES = (".npz", ".parquet")
"""What the names of files end in whose inputs may come before their labels."""

ENDINGS = (*TABLES, ".zip")

ARRAYS = ("x", "y", "x_test", "y_test")
"""The arrays of an NPZ file; "x" must be there, and "y" unless the labels come later."""


@dataclass(frozen=True)
class FileOptions:
    """How files are read: the column or columns of the targets, and the size and colours of images."""

    label: tuple[str, ...]
    size: tuple[int, int] | None
    mode: str
    target: str


def read_file(path: Path, name: str, options: FileOptions, columns: list[str]) -> Arrival:
    """Return the session of a file, or of a folder or archive of images.

    Args:
        path, name: where it is, and what it is called.
        options: how it is read.
        columns: of a table, that are inputs, in their order; filled by the first table that is read.

    Raises ValueError, TypeError or OSError, in one sentence, for what can't be read.
    """
    if path.is_dir() or path.suffix == ".zip":
        return _images(path, name, options)
    if path.suffix == ".npz":
        arrays = _arrays(path)
        if "x" not in arrays:
            raise ValueError(f"it has the arrays {', '.join(arrays) or 'none'}, and no x")
        return Arrival(inputs(arrays["x"]), arrays.get("y"), name, arrays.get("x_test"), arrays.get("y_test"))
    table = _table(path)
    if not columns:
        columns[:] = [column for column in table if column not in options.label]
    lacking = [column for column in columns if column not in table]
    more = [column for column in table if column not in (*columns, *options.label)]
    if lacking or more or not columns:
        what = (
            f"lacks the column {lacking[0]!r}" if lacking else f"has the column {more[0]!r}" if more else "has no columns of inputs"
        )
        raise ValueError(f"it {what}, and the columns of inputs are {', '.join(columns[:20])}")
    x = np.stack([_numbers(table[column], column) for column in columns], 1)
    return Arrival(inputs(x), _targets(table, options), name)


def read_labels(path: Path, options: FileOptions) -> Any:
    """Return the targets that a file of labels has. Raises ValueError, TypeError or OSError."""
    targets = _arrays(path).get("y") if path.suffix == ".npz" else _targets(_table(path), options)
    if targets is None:
        raise ValueError(f"{path.name} has no {'y' if path.suffix == '.npz' else options.label[0]}")
    return targets


def inputs(x: Any) -> torch.Tensor:
    """Return inputs as a tensor in a dtype that streams have."""
    return as_inputs(as_tensor(x, "its inputs"), "its inputs")


def _arrays(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it can't be read as NPZ (it is no zip archive)")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in ARRAYS if f"{name}.npy" in archive.namelist()]
            return {name: _array(archive, f"{name}.npy") for name in names}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it can't be read as NPZ ({reason_of(error)})") from None


def _array(archive: zipfile.ZipFile, member: str) -> Any:
    """Return an array of an archive: data alone, no pickled objects."""
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _table(path: Path) -> dict[str, Any]:
    """Return the columns of a Parquet file as arrays."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ImportError("Parquet files are read with the package pyarrow, which is not installed: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(path).read()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"it can't be read as Parquet ({reason_of(error)})") from None
    empty = [name for name in table.column_names if table.column(name).null_count]
    if empty:
        raise ValueError(f"its column {empty[0]!r} has empty fields: fill them, or leave these rows out")
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _numbers(column: Any, name: str) -> Any:
    if column.dtype.kind not in "biuf":
        raise ValueError(f"its column {name!r} has no numbers")
    return column.astype(np.float32)


def _targets(table: dict[str, Any], options: FileOptions) -> Any:
    """Return the targets in a table; None if it has no column of them."""
    own = [column for column in options.label if column in table]
    if not own:
        return None
    if len(own) < len(options.label):
        raise ValueError(f"it has the column {own[0]!r} of the targets, and not all of {', '.join(options.label)}")
    if options.target == "label":
        return table[own[0]]
    return np.stack([_numbers(table[column], column) for column in own], 1)


def _images(path: Path, name: str, options: FileOptions) -> Arrival:
    """Return the images in the folders of the classes."""
    files = [file for file in find_files(path) if not file.name.endswith("/")]
    classes = [file.name.split("/")[0] for file in files if file.name.count("/") == 1]
    if not files or len(classes) < len(files):
        stray = next((file.name for file in files if file.name.count("/") != 1), "nothing")
        raise ValueError(f"it has {stray}, and there must be a folder of images for each class, CLASS/IMAGE.png")
    with opened(path) as read:
        images = [decode(path, read, file, options.mode, options.size) for file in files]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"its images have {len(sizes)} sizes: give the stream a size, as size=[32, 32]")
    return Arrival(torch.from_numpy(pixels(images)), np.array(classes, dtype=np.str_), name)
