"""Recordings that are taken apart and put together again, with a hash that is right: what anyone could make."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clstream.recording import record
from clstream.recording.header import STREAM
from clstream.stream import Stream

Member = tuple[str, bytes]


def contents(stream: Stream) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what the recording of a stream says, and its arrays as members."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(record(stream, Path(folder) / "my.clstream")) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    return json.loads(members.pop(STREAM)), members


def sealed(body: bytes) -> bytes:
    """Return a zip file, whose comment is of the right length, with the hash that it needs."""
    return body[:-64] + hashlib.sha256(body[:-64]).hexdigest().encode()


def zipped(*members: Member, change: Callable[[zipfile.ZipInfo], None] | None = None) -> bytes:
    """Return a recording with any members, packed as small as can be."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        for name, content in members:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            if change is not None:
                change(entry)
            packed.writestr(entry, content, compresslevel=9)
        packed.comment = b"0" * 64
    return sealed(whole.getvalue())


def npy(numbers: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, numbers, **options)
    return out.getvalue()


def crafted(about: Any, arrays: dict[str, bytes], *more: Member) -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about, indent=1).encode()
    return zipped((STREAM, text), *arrays.items(), *more)
