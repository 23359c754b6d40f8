"""Journals: files of JSON lines that are only appended to, and that outlive a killed process and a full disk."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Journal:
    """Appends entries to a file, a line of JSON for each, written whole.

    A last line that a killed process left unfinished is cut off when the file is opened. What can't be written, as on a full
    disk, is said once, kept in memory, and written before the next entry; without a next one it is lost.

    Args:
        file: made if it isn't there, with its folder; what is in it stays.
        synced: whether a line is on the disk itself when `append` returns, and so outlives the machine and not just the process.

    Raises:
        OSError: if it can't be opened, or is a link.

    """

    def __init__(self, file: Path, synced: bool = False) -> None:
        self.file, self.synced = file, synced
        file.parent.mkdir(parents=True, exist_ok=True)
        self.number = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _PLAINLY, 0o666)
        self.size = _whole(file)
        self.unwritten = bytearray()
        self.failing = False
        self._mend()

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Write entries of plain values that are valid JSON: no NaN, no infinity."""
        for entry in entries:
            self.unwritten += json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self.failing:
                self.failing = True
                warnings.warn(
                    f"{self.file} can't be written ({error.strerror}): the run goes on, and it is tried again later",
                    RuntimeWarning,
                    stacklevel=2,
                )
        else:
            self.failing = False

    def _mend(self) -> None:
        if os.fstat(self.number).st_size != self.size:  # part of a line, from a write that failed or was interrupted
            os.ftruncate(self.number, self.size)

    def _write(self) -> None:
        self._mend()
        done = 0
        while done < len(self.unwritten):
            done += os.write(self.number, bytes(self.unwritten[done:]))
        if self.synced:
            os.fsync(self.number)
        self.size, self.unwritten = self.size + done, bytearray()

    def cut(self, size: int) -> None:
        """Cut the file to its first `size` bytes."""
        self.unwritten = bytearray()
        self.size = min(size, self.size)
        os.ftruncate(self.number, self.size)

    def close(self) -> None:
        """Close the file, with a last try to write what could not be written."""
        if self.number >= 0:
            if self.unwritten:
                self.append()
            os.close(self.number)
            self.number = -1


def _whole(file: Path) -> int:
    """Return the bytes of a file up to the end of its last whole line."""
    with file.open("rb") as source:
        end = source.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            source.seek(start)
            newline = source.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


_PLAINLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""No other file by way of a link, and no waiting for who reads a pipe."""

LONGEST = 1 << 26
"""Bytes of the longest line that is read: pictures are in some."""

_CHUNK = 1 << 20


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the number of each line of a journal, from 1, and its entry: None if it is damaged, no entry, or too long.

    A last line that is not whole, as a killed process leaves it, is left out. Raises OSError if it can't be read.
    """
    with file.open("rb") as source:
        number = 0
        while line := source.readline(LONGEST):
            number += 1
            whole, last = line.endswith(b"\n"), len(line) < LONGEST
            while not whole and not last:  # the rest of a line that is too long
                line = source.readline(_CHUNK)
                whole, last = line.endswith(b"\n"), len(line) < _CHUNK
                line = b""
            if whole:
                yield number, _entry(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal; a line that is not whole, or is damaged, is skipped.

    Raises OSError if it can't be read.
    """
    return (entry for _, entry in read_lines(file) if entry is not None)


def describe_damage(numbers: Sequence[int]) -> str:
    """Return which lines are damaged, in words."""
    if len(numbers) == 1:
        return f"line {numbers[0]} is damaged"
    shown = ", ".join(map(str, numbers[:3]))
    return f"{len(numbers)} lines are damaged: {shown}{', ...' if len(numbers) > 3 else ''}"


def set_aside(file: Path) -> None:
    """Rename a file, if it is there, to name-1, name-2, ...: it is from an earlier run."""
    if file.exists():
        count = 1
        while (other := file.with_name(f"{file.stem}-{count}{file.suffix}")).exists():
            count += 1
        file.rename(other)
