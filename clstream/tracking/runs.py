"""How MLflow runs begin and end, and what they need of the file system."""

from __future__ import annotations

import io
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clstream.params import reason_of
from clstream.tracking.journal import set_aside
from clstream.tracking.mlflow_store import Connection, make_uploader, tracking_uri, without_password
from clstream.tracking.outbox import Outbox
from clstream.tracking.uploader import Uploader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "a first look/forgetting curves"
"""The name of a run's picture among MLflow's charts. These are in sections by what is before the slash, in alphabetical order."""


def end_earlier(file: Path) -> None:
    """Set the journal of an earlier run aside, whose place a new one takes; a run that never ended is ended first."""
    if not file.exists():
        return
    try:
        old = Outbox.read(file)
    except ValueError:  # its first line was never written
        set_aside(file)
        return
    if not old.ended:
        old.put("end", status="KILLED", at=_now())
    make_uploader(tracking_uri(old.head["uri"]), old).upload(last=True)
    set_aside(file)


def begin_run(
    uri: str,
    experiment: str,
    connection: Connection | None,
    file: Path | None,
    name: str,
    tags: Mapping[str, str],
    began: float | None = None,
) -> Uploader:
    """Begin a new MLflow run, with a journal at `file`. With a connection it is created at once, or OSError raised; else later."""
    if file is not None:
        end_earlier(file)
    outbox = Outbox({"uri": without_password(uri), "experiment": experiment, "key": uuid.uuid4().hex})
    if file is not None:
        outbox.open_journal(file)
    uploader = make_uploader(uri, outbox, connection)
    outbox.put("create", name=name, tags=dict(tags), at=_now() if began is None else int(began * 1000))
    if connection is not None:
        try:
            outbox.flush(uploader.send)
        except Exception as error:
            outbox.close()
            if file is not None:
                file.unlink()
            raise OSError(f"{uploader.server} takes no new run: {reason_of(error)}") from error
    return uploader


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _now() -> int:
    """Return the time as MLflow counts it: milliseconds since 1970."""
    return int(time.time() * 1000)


def _clean(text: str) -> str:
    """Return text without the half characters that no database takes; names of files may have them."""
    return text.encode("utf-8", "replace").decode()


def _seen_from(file: Path, journal: Path | None) -> str:
    """Return the name of a file, from the journal's folder on if it is in it: the folder may be moved."""
    if journal is not None and file.is_relative_to(journal.parent):
        return str(file.relative_to(journal.parent))
    return str(file)


def _commit() -> str | None:
    """Return the git commit of the working folder, if it is in a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
