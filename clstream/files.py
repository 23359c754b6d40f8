"""Files: written whole or not at all, in folders that one process at a time may write to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout


class FolderError(OSError):
    """A run folder can't be used; the message says why, and what to do."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, which is made if it doesn't exist, against other processes; a process that dies releases it.

    Raises FolderError if it can't be written, another process has it, or its lock is a link.
    """
    lock = FileLock(folder / "lock", timeout=0)
    if (folder / "lock").is_symlink():  # some versions of filelock empty what it leads to
        raise FolderError(f"the lock of the run folder {folder} is a link: remove it")
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


def check_writable(folder: Path, what: str = "the run folder") -> Path:
    """Return a folder, absolute, which is made if it doesn't exist; OSError, naming what it is, if it can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{what} {folder} can't be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise OSError(f"{what} {folder} can't be written: choose another")
    return folder.absolute()


def write_atomically(file: Path | Callable[[], Path], write: Callable[[IO[bytes]], object], beside: Path | None = None) -> Path:
    """Write a file under another name, sync it to the disk, and rename it: it is whole, or what was there before is.

    Args:
        file: its path; what gives it once the content is written, if the name depends on that.
        write: writes the content.
        beside: the other name, in the same folder; by default a hidden one. It is removed if anything is raised.

    Raises OSError if it can't be written.
    """
    if beside is None:
        assert isinstance(file, Path)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        path = beside.replace(file if isinstance(file, Path) else file())
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and isinstance(file, Path):  # the user knows no other name
            error.filename, error.filename2 = str(file), None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on the disk
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing for folders
            raise
    finally:
        os.close(folder)
    return path


def check_plain_files(folder: Path) -> None:
    """Raise FolderError if there is anything but files and folders in a folder that comes from somebody else, at any depth.

    What is written to a link is written elsewhere, and who reads a pipe or a device waits for ever.
    """
    for place, names, files in os.walk(folder):
        for name in (*names, *files):
            with suppress(FileNotFoundError):  # a process that is at work there has just replaced it
                mode = os.lstat(os.path.join(place, name)).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    what = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                    raise FolderError(f"{os.path.join(place, name)} is {what}, and a run folder has plain files only: remove it")
