"""The record of episodes that are over: a file of JSON lines, of which the first says what was run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from clstream.engine import OtherRunError
from clstream.episodes.outcomes import EpisodeOutcome
from clstream.files import check_writable

FILE = "episodes.jsonl"
FORMAT = "clstream episodes 1"


class EpisodesRecord:
    """Writes the outcome of each episode when it is over; a line that was cut off is left out when the file is read again.

    It reads, and refuses what it can't go on with, when it is made; and writes within `with`.

    Args:
        folder: where the file is; None: nothing is written.
        identity: what is run, in plain values.
        resume: whether to go on with what is in the file. If not, there must be none.

    Raises:
        FileExistsError: if there is a file, and it is not to be gone on with.
        OtherRunError: if it is of other episodes, or another learner; a ValueError.
        ValueError: if it is no such file.

    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], resume: bool) -> None:
        self.outcomes: dict[int, EpisodeOutcome] = {}
        self.header = {"format": FORMAT, **identity}
        self.file = None if folder is None else check_writable(Path(folder), "the folder of the episodes") / FILE
        if self.file is None:
            return
        if self.file.exists():
            if not resume:
                raise FileExistsError(f"{self.file} has episodes already: resume=True goes on with them, or name another folder")
            self.read(self.header)

    def read(self, header: Mapping[str, Any]) -> None:
        """Take what is in the file, and cut off a line that is not whole."""
        assert self.file is not None
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.file.open("r+b") as opened:
                opened.truncate(len(whole))
        if not whole:
            return
        known, outcomes = read_record(self.file)
        if known != json.loads(json.dumps(header)):
            differing = sorted(name for name in {*header, *known} if header.get(name) != known.get(name))
            shown = "; ".join(f"{name} was {known.get(name)}, and is {header.get(name)}" for name in differing[:3])
            raise OtherRunError(f"{self.file} is of another run: {shown[:600]}")
        self.outcomes = {outcome.index: outcome for outcome in outcomes}

    def add(self, *outcomes: EpisodeOutcome) -> None:
        """Write what came of some episodes."""
        self.outcomes |= {outcome.index: outcome for outcome in outcomes}
        if self.file is not None:
            self._write(*map(asdict, outcomes))

    def _write(self, *lines: Mapping[str, Any]) -> None:
        self.opened.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.opened.flush()

    def __enter__(self) -> EpisodesRecord:
        if self.file is not None:
            self.opened = self.file.open("ab")
            if not self.opened.tell():
                self._write(self.header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.opened.flush()
            os.fsync(self.opened.fileno())
            self.opened.close()


def read_record(file: Path) -> tuple[dict[str, Any], list[EpisodeOutcome]]:
    """Return what a record says was run, and what came of the episodes that are over. Raises ValueError if it is none, OSError."""
    content = file.read_bytes()
    try:
        header, *lines = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        if header["format"] != FORMAT:
            raise ValueError
        return header, [outcome_of(line) for line in lines]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{file} is no record of episodes: name another folder") from None


def outcome_of(line: Mapping[str, Any]) -> EpisodeOutcome:
    """Return the outcome that a line says. Raises ValueError, TypeError or KeyError for what is none."""
    counts = line["index"], line["steps"]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{counts} are no counts")
    corrupted, nearest = ({str(key): float(value) for key, value in line[name].items()} for name in ("corrupted", "nearest"))
    return EpisodeOutcome(
        index=counts[0], accuracy=float(line["accuracy"]), by_set=tuple(map(float, line["by_set"])), corrupted=corrupted,
        nearest=nearest, steps=counts[1], memory_bytes=float(line["memory_bytes"]), seconds=float(line["seconds"]),
    )  # fmt: skip
