"""Saving: a strategy in a folder, with all that it needs to answer and to go on.

There are two files. `card.json` says what it is, for people and programs: see `Strategy.save`. `state-HASH.pt` has the state, which
`torch.load(weights_only=True)` reads; no code is in it. The card is written last, so a folder holds a whole strategy, or the one
before.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clstream
from clstream.files import FolderError, check_writable, write_atomically
from clstream.serialization.references import lookup_loaded
from clstream.serialization.same_code import hashed_parts
from clstream.serialization.source_code import user_sources
from clstream.serialization.whole import capture_whole, classes_of

FORMAT = 1
"""Number of the format: raised when the paths of classes or the form of the state change, so that an older clstream refuses it."""

CARD = "card.json"

STATE = re.compile(r"state-[0-9a-f]{32}\.pt")


def save(strategy: Any, folder: str | Path) -> Path:
    """Save a strategy: see `Strategy.save`."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file():
        raise FolderError(f"{folder} holds other files, and no saved strategy: name a new folder")
    snapshot = capture_whole(strategy)
    folder = check_writable(folder, "the folder")
    beside = folder / f".state.{os.getpid()}"
    state = write_atomically(
        lambda: folder / f"state-{hash_of(beside)}.pt", lambda out: torch.save({"strategy": snapshot}, out), beside
    )
    model = getattr(strategy, "model", None)
    code = [name for name in classes_of(snapshot) if not name.startswith(("clstream.", "torch."))]
    card = {
        "format": FORMAT,
        "clstream": clstream.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "strategy": type(strategy).__name__,
        "model": type(model).__name__ if isinstance(model, nn.Module) else None,
        "scores_are": strategy.scores_are,
        "state": state.name,
        "bytes": state.stat().st_size,
        "code": code,
        "sources": sources_of(filter(None, map(lookup_loaded, code))),
        "run": strategy.about() if strategy.about is not None else {},
    }
    text = json.dumps(card, indent=1, ensure_ascii=False)
    write_atomically(folder / CARD, lambda out: out.write(text.encode()))
    for old in folder.iterdir():
        if STATE.fullmatch(old.name) and old.name != state.name:
            with suppress(OSError):
                old.unlink()
    return folder


def sources_of(code: Iterable[object]) -> dict[str, dict[str, str]]:
    """Return hashes of the classes and functions in the user's own modules that classes are of, by the names of both.

    Modules whose files are not what was loaded, or no text, are left out.
    """
    return {name: hashed_parts(source.text) for name, source in user_sources(code).items() if not source.compiled}


def hash_of(file: Path) -> str:
    """Return a hash of the content of a file."""
    hashing = hashlib.blake2b(digest_size=16)
    with file.open("rb") as source:
        while chunk := source.read(1 << 20):
            hashing.update(chunk)
    return hashing.hexdigest()
