"""Files that `torch.save` wrote: read without running code, and without taking more memory than the file has bytes."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def load(file: Path) -> Any:
    """Return what a file of tensors and plain values holds, its tensors on the CPU.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no zip file as torch writes them: its members as they are, none packed, none over another.
        RuntimeError, pickle.UnpicklingError, EOFError: of torch, for what else it doesn't take.

    """
    try:
        with zipfile.ZipFile(file) as whole:
            members = whole.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"it is no file of torch's: {error}") from None
    packed = [member.filename for member in members if member.compress_type or member.compress_size != member.file_size]
    if packed or sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError(f"its members are packed, or overlap: {packed[:1]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of the file, for which there is a sentence of ours
        return torch.load(file, map_location="cpu", weights_only=True)
