"""Where runs are tracked: addresses of stores and servers, without MLflow, whose import takes seconds."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


def tracking_uri(uri: str | None = None) -> str:
    """Return where runs are tracked: `uri`, else MLFLOW_TRACKING_URI, else the file mlflow.db in the working folder.

    A file's name is made absolute.
    """
    where = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if where.startswith("sqlite:///") and ":memory:" not in where:
        return f"sqlite:///{Path(where.removeprefix('sqlite:///')).absolute()}"
    return where if ":" in where else str(Path(where).absolute())


def without_password(uri: str) -> str:
    """Return a URI without the user's name and password: these belong into no file and no message."""
    address = urlsplit(uri)
    return urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2])) if "@" in address.netloc else uri


def check_answers(where: str) -> None:
    """Raise ConnectionError if a store is a server, and doesn't answer within 5 seconds."""
    if where.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{without_password(where).rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers; whether it lets us in, the next call says
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"the tracking server {without_password(where)} does not answer ({error}): start it, "
                "or choose another --tracking-uri"
            ) from None
