"""Databases of MLflow whose tables are those of another version: MLflow alters them unasked, in some cases, so they are refused."""

from __future__ import annotations

import importlib.util
import re
import time
from functools import cache
from pathlib import Path

ALTERING = 5.0
"""Seconds without a change after which nobody is at work on a database that has older tables."""

CREATING = 60.0
"""The same where the tables are there, and it is not noted of which version: so it is while they are made."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def check_schema(uri: str, shown: str) -> None:
    """Refuse a database that has tables of another version of MLflow than the one that is installed; a new one is none.

    One that another process is making just now is waited for.

    Args:
        uri: the store; one that is no database, or whose file doesn't exist, is not looked at.
        shown: what errors call it: the same, without a password.

    Raises:
        OSError: if the tables are of another version; the message says what to do.
        SQLAlchemyError: if the database can't be opened.

    """
    if not uri.startswith(_DATABASES):
        return
    if uri.startswith("sqlite:///") and (":memory:" in uri or not Path(uri.removeprefix("sqlite:///")).exists()):
        return
    needed, before, since = _newest(), "", time.monotonic()
    while (revision := _revision(uri)) not in (None, needed):
        if revision != before:
            before, since = str(revision), time.monotonic()
        if time.monotonic() - since > (ALTERING if revision else CREATING):
            known = revision in _known() or not revision
            raise OSError(
                f"the tracking store {shown} has tables of {'an older' if known else 'a newer'} version of MLflow (schema "
                f"{revision or 'unknown'}, here it is {needed}), and is left as it is: "
                + (f"copy it, then run: mlflow db upgrade {shown}" if known else "install that version of MLflow")
            )
        time.sleep(0.2)


def _revision(uri: str) -> str | None:
    """Return the version of MLflow's tables in a database: "" if it isn't noted, None if there are none."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.pool import NullPool

    with create_engine(uri, poolclass=NullPool).connect() as connection:
        tables = inspect(connection).get_table_names()
        if "alembic_version" in tables:
            return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or "")
        return "" if "experiments" in tables else None


@cache
def _known() -> tuple[str, ...]:
    """Return the versions of the tables that the installed MLflow knows of; the newest one is the first.

    They are read from the text of its scripts: to run them would import MLflow, which takes seconds.
    """
    spec = importlib.util.find_spec("mlflow")
    folder = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "store" / "db_migrations"
    texts = [file.read_text(encoding="utf-8") for file in (folder / "versions").glob("*.py")]
    older = {match[1] for text in texts if (match := re.search(r"^down_revision = [\"'](\w+)", text, re.MULTILINE))}
    versions = [match[1] for text in texts if (match := re.search(r"^revision = [\"'](\w+)", text, re.MULTILINE))]
    if len(set(versions) - older) != 1:  # they are written otherwise
        from alembic.script import ScriptDirectory

        versions = [script.revision for script in ScriptDirectory(str(folder)).walk_revisions()]
        return tuple(versions)
    return tuple(sorted(versions, key=lambda version: version in older))


def _newest() -> str:
    return _known()[0]
