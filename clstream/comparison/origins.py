"""Origins: where the runs behind records are kept: their folders, configs, and runs in MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clstream.comparison.records import Record
from clstream.comparison.sources import MLFLOW, read_records
from clstream.tracking.journal import entries
from clstream.tracking.outbox import FILE

CONFIG = "config.yaml"
GRID = "grid.yaml"
LONGEST = 100_000
"""Characters of a config that are read."""

PARENT = "mlflow.parentRunId"
VERSIONS = ("clstream", "git_commit", "torch", "numpy", "python", "data_fingerprint")
"""Tags of an MLflow run that say what made it."""


@dataclass(frozen=True)
class Origin:
    """Where a run is kept, as far as it is known.

    Args:
        folder: its run folder; None: it is not on this machine.
        config: the text of its config.
        uri, run_id: the MLflow store that it was tracked in, without a password, and its run there.
        parent: the MLflow run that it is shown under.
        versions: by name, as `VERSIONS`, of the code that made it.

    """

    folder: Path | None = None
    config: str = ""
    uri: str = ""
    run_id: str = ""
    parent: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The page of the run in MLflow, if that is on a server that a browser can ask; else ""."""
        served = bool(self.run_id) and self.uri.startswith(("http://", "https://"))
        return f"{self.uri.rstrip('/')}/#/runs/{quote(self.run_id)}" if served else ""


@dataclass(frozen=True)
class Source:
    """Records that came from one place.

    Args:
        name: what reports call it.
        records: of the runs.
        origins: for each record, where its run is kept.
        grid: the text of the grid of the sweep; "": they are of no sweep.

    """

    name: str
    records: Sequence[Record]
    origins: Sequence[Origin]
    grid: str = ""

    @property
    def parents(self) -> set[tuple[str, str]]:
        """The stores and ids of the MLflow runs that the runs are shown under."""
        return {(origin.uri, origin.parent) for origin in self.origins if origin.uri and origin.parent}


def read_source(place: str, uri: str | None = None) -> Source:
    """Return the records in a place, which is as in `read_records`, and where their runs are kept.

    Args:
        place: as in `read_records`.
        uri: the tracking store of an MLflow experiment; None: as for `MlflowTracker`.

    Raises OSError and ValueError as `read_records`.
    """
    records = read_records(place, uri)
    if place.startswith(MLFLOW):
        return Source(place, records, _of_experiment(records, uri))
    path = Path(place)
    folder = path if path.is_dir() else path.parent
    grid = _text_of(folder / GRID) if path.is_dir() else ""
    return Source(path.resolve().stem, records, [origin_of(record, folder) for record in records], grid)


def _of_experiment(records: Sequence[Record], uri: str | None) -> list[Origin]:
    """Return where the runs of an MLflow experiment are kept, whose ids the records have."""
    from clstream.tracking.mlflow_store import open_to_read, store_errors, tracking_uri, without_password

    client, where = open_to_read(uri), tracking_uri(uri)
    with store_errors(where):
        tags = [client.get_run(record.source).data.tags for record in records]
    return [
        Origin(uri=without_password(where), run_id=record.source, parent=own.get(PARENT, ""), versions=_versions(own))
        for record, own in zip(records, tags, strict=True)
    ]


def _versions(tags: Mapping[str, object]) -> dict[str, str]:
    return {name: str(tags[name]) for name in VERSIONS if name in tags}


def origin_of(record: Record, beside: Path | None = None) -> Origin:
    """Return where the run of a record is kept: its source is the path of a run folder, or of a seed's in it.

    Args:
        record: of the run.
        beside: the folder of the records, which the runs may lie in.

    """
    parts = Path(record.source).parts
    ends = [] if beside is None else [beside.joinpath(*parts[start:]) for start in range(len(parts))]
    places = [Path(record.source), *ends]  # the folder of the records may have been moved, with what is in it
    folder = next((place for place in places if record.source and _is_folder(place)), None)
    if folder is None:
        return Origin()
    seed = folder / f"seed_{record.seed}"
    of_run = seed if seed.is_dir() else folder
    config = next((text for place in (of_run, of_run.parent) if (text := _text_of(place / CONFIG))), "")
    head, tags, run_id = _tracked(of_run / FILE)
    return Origin(folder, config, str(head.get("uri", "")), run_id, str(tags.get(PARENT, "")), _versions(tags))


def _is_folder(place: Path) -> bool:
    with suppress(OSError):  # it may be in a folder that is not for us, or no name that a file can have
        return place.is_dir()
    return False


def _text_of(file: Path) -> str:
    """Return a text file, up to 100,000 characters; "" if it is none, or a link: a config is no other file's content."""
    with suppress(OSError, UnicodeDecodeError):
        if file.is_file() and not file.is_symlink():
            with file.open(encoding="utf-8") as source:
                return source.read(LONGEST)
    return ""


def _tracked(journal: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the head of the journal of a tracker, the tags that its run began with, and the run's id; all empty: there is none."""
    head, tags, run_id = dict[str, Any](), dict[str, Any](), ""
    for entry in _entries(journal):
        head = head or entry
        if entry.get("do") == "create" and isinstance(entry.get("tags"), dict):
            tags = entry["tags"]
        run_id = run_id or (entry["run_id"] if isinstance(entry.get("run_id"), str) else "")
        if tags and run_id:
            break
    return head, tags, run_id


def _entries(journal: Path) -> Iterator[dict[str, Any]]:
    with suppress(OSError):
        if journal.is_file() and not journal.is_symlink():
            yield from entries(journal)


def link_to(folder: Path, page: Path) -> str:
    """Return the address of a folder as a link in a page has it: from the page on, so that both can be moved together."""
    return quote(Path(os.path.relpath(folder.absolute(), page.absolute().parent)).as_posix())
