"""Run folders: what a run leaves on disk lies in one folder, and one process at a time writes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class FolderError(OSError):
    """A run folder can't be used; the message says why, and what to do."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder if it isn't there, and keep other processes out of it; a process that dies lets go of it.

    Raises FolderError if it can't be written, or another process has it.
    """
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise FolderError(
            f"the run folder {folder} is in use by another process: wait for it to end, or use another folder"
        ) from None
    except OSError as error:
        raise FolderError(f"the run folder {folder} can't be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
