"""Files that `torch.save` wrote: read without running code, and without taking more memory than the file has bytes.

What torch's own reader leaves open is refused before it: members that are packed; a directory that another reader finds at another
place, so that each sees other members; a pickle that asks for memory by a number, as `bytearray(10**11)`.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_NAMED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|torch\.storage UntypedStorage|"
                    r"torch (?!Tensor$)\w+")  # fmt: skip
"""What the pickle of tensors and plain values names, modules and their dtypes and storages."""


def load(file: Path) -> Any:
    """Return what a file of tensors and plain values holds, its tensors on the CPU.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no zip file as torch writes them: its members as they are, none packed, none over another.
        RuntimeError, pickle.UnpicklingError, EOFError: of torch, for what else it doesn't take.

    """
    with file.open("rb") as opened:
        _check_directory(opened)
        try:
            with zipfile.ZipFile(opened) as whole:
                members = whole.infolist()
                packed = [member.filename for member in members if member.compress_type or member.compress_size != member.file_size]
                if packed or sum(member.file_size for member in members) > file.stat().st_size:
                    raise ValueError(f"its members are packed, or overlap: {packed[:1]}")
                for member in members:
                    if member.filename.lower().endswith("data.pkl"):  # torch finds it in capitals too
                        _check_pickle(whole.read(member))
        except (zipfile.BadZipFile, RuntimeError) as error:  # the latter for encryption, or a compression that zipfile doesn't know
            raise ValueError(f"it is no file of torch's: {error}") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of the file, for which there is a sentence of ours
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)


def load_any(file: Path) -> Any:
    """Return what a file of tensors and plain values holds, also one in the format that torch wrote before version 1.6.

    Raises as `load` does.
    """
    with file.open("rb") as opened:
        if opened.read(2) == b"PK":
            return load(file)
        opened.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_pickle(opened)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)


def check_no_larger(content: object, file: Path) -> None:
    """Refuse, with ValueError, plain values with tensors that are larger than the file that they are from."""
    if sum(_storages(content).values()) > file.stat().st_size:
        raise ValueError("it has tensors larger than itself")


def _storages(part: object) -> dict[int, int]:
    """Return the bytes of each storage of the tensors among plain values."""
    if isinstance(part, torch.Tensor):
        return {part.untyped_storage()._cdata: part.untyped_storage().nbytes()}
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return {key: size for item in inner for key, size in _storages(item).items()}


LEGACY_PICKLES = 5
"""What stands before the numbers in the old format: a magic number, a version, the system, the content, the keys of storages."""


def _check_directory(opened: IO[bytes]) -> None:
    """Refuse what is not a zip file from its first byte on, with its directory right before what says where that is.

    Python's reader takes the directory from before its end, torch's from where it is said to be.
    """
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    begin = opened.read(4)
    opened.seek(max(0, size - 98))
    tail = opened.read().rjust(98, b"\0")
    large = tail[56:60] == b"PK\6\7"
    length, offset = struct.unpack("<QQ", tail[40:56]) if large else struct.unpack("<II", tail[88:96])
    until = size - 98 if large else size - 22
    if (
        (begin, tail[76:80], tail[96:]) != (b"PK\3\4", b"PK\5\6", b"\0\0")
        or (large and (tail[:12], tail[64:72]) != (b"PK\6\6" + struct.pack("<Q", 44), struct.pack("<Q", until)))
        or offset + length != until
    ):
        raise ValueError("it is no file of torch's: its directory is not where torch writes it")


def _check_pickle(content: bytes | IO[bytes]) -> None:
    """Refuse a pickle that names what no tensor needs; a file is read to the pickle's end."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("STACK_GLOBAL", "INST") or (operation.name == "GLOBAL" and not _NAMED.fullmatch(str(argument))):
            raise ValueError(f"it names {str(argument)[:60]!r}, which no tensor needs")
