"""Where records are read from: sweeps, files, run folders, and experiments of MLflow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clstream.checkpoint import newest
from clstream.comparison.mlflow_records import read_experiment
from clstream.comparison.records import FILE, Record, read_file, record_of
from clstream.results import result_of

MLFLOW = "mlflow:"
"""What the name of an experiment has before it."""


def read_records(source: str | Path, uri: str | None = None, matrices: bool = True) -> list[Record]:
    """Return the records of runs.

    Args:
        source: the folder of a sweep, a file of records (.jsonl), a run folder, a folder of run folders, or `mlflow:NAME`, an
            MLflow experiment by name or number.
        uri: the tracking store of an experiment; None: as for `MlflowTracker`.
        matrices: whether the matrices of an experiment are read, which takes a question to the store for each task.

    Raises:
        OSError: if it can't be read.
        ValueError: if there are no records in it, or one is damaged; the message says which.

    """
    if str(source).startswith(MLFLOW):
        return read_experiment(str(source).removeprefix(MLFLOW), uri, matrices)
    place = Path(source)
    if place.is_dir() and not (place / FILE).is_file():
        return _of_run_folders(place)
    file = place / FILE if place.is_dir() else place
    if not file.exists():
        raise OSError(f"there is no {source}: give a sweep's folder, a file of records, a run folder, or mlflow:EXPERIMENT")
    if not file.is_file():
        raise OSError(f"{source} is no regular file, and so no file of records")
    records = read_file(file)
    if not records:
        raise ValueError(f"there are no records in {file}")
    return records


def _of_run_folders(place: Path) -> list[Record]:
    """Return the records of the runs in a run folder, or in the run folders in a folder; of one not finished, that it isn't."""
    runs = [place] if (place / "config.yaml").is_file() else sorted(file.parent for file in place.glob("*/config.yaml"))
    seeds = [folder for run in runs for folder in sorted(run.glob("seed_*")) if folder.is_dir()]
    if not seeds:
        raise ValueError(f"there are no records in {place}: it has no {FILE}, and no run folders")
    records = []
    for folder in seeds:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was made with ", category=RuntimeWarning)  # nothing is resumed here
            state = newest(folder)
        if state is None:
            continue  # nothing was learned
        error = "" if (folder / "finished").exists() else "the run is not finished: clstream resume goes on with it"
        identity: Mapping[str, Any] = state["identity"]
        fingerprint = str(identity.get("data fingerprint", ""))
        known = {"fingerprint": fingerprint, "source": str(folder), "error": error, "tuned": _tuned(folder.parent)}
        records.append(record_of(result_of(state), **known))
    if not records:
        raise ValueError(f"there are no records in {place}: none of its runs has a checkpoint")
    return records


def _tuned(run: Path) -> str:
    """Return what the config in a run folder says of how its options were chosen; "" if it says nothing."""
    with suppress(OSError, ValueError):
        for line in (run / "config.yaml").read_text(encoding="utf-8").splitlines():
            if line.startswith("tuned: ") and line != "tuned: null":
                text = line.removeprefix("tuned: ").strip()
                return text[1:-1].replace("''", "'") if text.startswith("'") else text
    return ""
