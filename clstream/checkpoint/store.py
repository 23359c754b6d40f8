"""Checkpoint files: written atomically, checked by their hash, and loaded without running code."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

import clstream
from clstream.checkpoint.saved_state import check_state
from clstream.files import FolderError, write_atomically
from clstream.serialization import torch_files

FORMAT = 5
"""Number of the format: raised when paths of classes or the form of the state change. Others are refused."""

WHOLE = re.compile(r"(\d{6,})-([0-9a-f]{16})\.pt")

TORN = re.compile(r"\d{6,}\.writing")
"""Names of checkpoints, and of what a process that was killed left of one; nothing else in a folder is ours."""


def newest(folder: str | Path) -> Mapping[str, Any] | None:
    """Return the newest whole checkpoint of a folder, for `run(resume=...)`; None if there is none yet.

    Warns of damaged ones, and of another version of torch or number of threads, with which bits may differ.

    Raises:
        FolderError: if there are checkpoints, and all are damaged.
        ValueError: if it is of another version of clstream.

    """
    checkpoints = files(Path(folder))
    for file in checkpoints:
        try:
            state = load(file)
        except FileNotFoundError:  # the run goes on in another process, and has just replaced it
            return newest(folder)
        except OSError as error:
            raise FolderError(f"the checkpoint {file} can't be read: {error.strerror or error}") from None
        if state is None:
            warnings.warn(f"the checkpoint {file} is damaged: the one before it is used", RuntimeWarning, stacklevel=2)
            continue
        for name, here in (("torch", str(torch.__version__)), ("threads", torch.get_num_threads())):
            if state[name] != here:
                warnings.warn(
                    f"the checkpoint {file} was made with {name} {state[name]}, here it is {here}: the last bits may differ",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return state
    if checkpoints:
        raise FolderError(f"every checkpoint in {folder} is damaged, so the run can't go on: start it anew in another folder")
    return None


def files(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if WHOLE.fullmatch(path.name) and path.is_file()), key=number_of, reverse=True)


def number_of(file: Path) -> int:
    """Return the number of a checkpoint, which its name begins with."""
    return int(file.name.partition("-")[0])


def save(state: Mapping[str, Any], folder: Path, number: int) -> Path:
    """Write a checkpoint atomically; its name has a hash of its content. Raises OSError if it can't be written."""
    digest = ""

    def write(file: IO[bytes]) -> None:
        nonlocal digest
        hashing = _Hashing(file)
        try:
            torch.save(dict(state), hashing)  # type: ignore[arg-type]  # all that it asks for is `write`
        except RuntimeError as error:  # torch's own, when a write has failed, or was interrupted
            raise hashing.error or error from None
        digest = hashing.hash.hexdigest()

    return write_atomically(lambda: folder / f"{number:06d}-{digest}.pt", write, folder / f"{number:06d}.writing")


def load(file: Path) -> Mapping[str, Any] | None:
    """Return what a checkpoint holds, its tensors on the CPU; None if it is not as it was written.

    Raises ValueError for one of another version of clstream, or of something else, and OSError if it can't be read.
    """
    hashing = hashlib.blake2b(digest_size=8)
    with file.open("rb") as source:
        while chunk := source.read(1 << 20):
            hashing.update(chunk)
    if hashing.hexdigest() != file.stem.partition("-")[2]:
        return None
    try:
        state: dict[str, Any] = torch_files.load(file)
        made_by, version, threads = (state["format"], state["clstream"]), state["torch"], state["threads"]
        if not (type(made_by[0]) is type(threads) is int and type(made_by[1]) is type(version) is str):
            raise ValueError("it doesn't say what made it")
        if made_by == (FORMAT, clstream.__version__):
            check_state(state)
            torch_files.check_no_larger(state, file)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  # a file may hold anything
        raise ValueError(f"{file} is no checkpoint of clstream ({(str(error).splitlines() or [''])[0][:100]})") from None
    if made_by != (FORMAT, clstream.__version__):
        raise ValueError(
            f"the checkpoint {file} was made by clstream {made_by[1]} (format {made_by[0]}), and this is "
            f"{clstream.__version__} (format {FORMAT}): finish the run with that version, or start anew"
        )
    return state


class _Hashing:
    """A file that is written through a hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.blake2b(digest_size=8)
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """Write, and keep the error, for which torch raises one of its own."""
        try:
            self.file.write(data)
        except BaseException as error:
            self.error = error
            raise
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: it is flushed when it is whole."""
