"""What a run is known by: its config, the code that it is built from, and its data. Two runs of one identity end alike."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import clstream
from clstream.engine.run_params import built_from
from clstream.serialization.loaded_code import read_source
from clstream.serialization.same_code import stripped
from clstream.serialization.source_code import definitions, user_sources
from clstream.strategy import Strategy
from clstream.stream import Stream


class Identity(NamedTuple):
    """The identity of a run, in three parts of hexadecimal digits.

    Args:
        config: what was asked for, the seed among it, without what changes nothing of the run.
        code: the version of clstream, and the source of the strategy and the model and of all modules of the user's own; comments
            and docstrings are no part of it.
        data: the fingerprint of the stream.

    """

    config: str
    code: str
    data: str

    def __str__(self) -> str:
        """Return the parts with hyphens between them."""
        return "-".join(self)


def text_hash(text: str) -> str:
    """Return twelve hexadecimal digits that change with a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_hash(strategy: Strategy, stream: Stream, packages: Sequence[str], others: Sequence[object] = ()) -> str:
    """Return twelve hexadecimal digits that change with the code that a run is built from.

    Args:
        strategy, stream: of the run.
        packages: the packages of clstream whose modules count, those of strategies and of models: the rest of it has a version.
        others: further classes and functions that it is built from, if they are the user's own.

    """
    parts = list(definitions(*built_from(strategy, stream), *others))
    sources = {name: (_plain(source.text), source.compiled) for name, source in user_sources(parts).items()}
    for name in {str(getattr(part, "__module__", "")) for part in parts}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name.startswith(tuple(f"{package}." for package in packages)) and file:
            sources[name] = (_plain_file(name, file), "")
    return text_hash(repr((clstream.__version__, sorted(sources.items()))))


@cache
def _plain_file(name: str, file: str) -> str:  # once in a process: later, it may be other than what was loaded
    return _plain(read_source(file, None, name).text)


def _plain(text: str) -> str:
    """Return a source without comments and docstrings, in one layout; as it is, if it is no Python."""
    try:
        return ast.unparse(stripped(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


@cache
def code_version() -> str:
    """Return the git commit of clstream's checkout, with + after it if its code differs from that; else clstream's version."""
    package = Path(str(clstream.__file__)).resolve().parent
    git = ["git", "-C", str(package.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        tracked = subprocess.run([*git, "ls-files", "clstream/__init__.py"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "clstream", "strategies", "streams"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return clstream.__version__
    return f"{commit.stdout.strip()}{'+' * bool(changed.stdout.strip())}" if tracked.stdout.strip() else clstream.__version__
