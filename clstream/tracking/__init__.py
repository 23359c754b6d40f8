"""Tracking: MLflow, the journal that outlives a server, the event log, and other trackers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clstream.tracking.csv_tracker import CsvTracker as CsvTracker
    from clstream.tracking.details import Details as Details
    from clstream.tracking.event_log import EventLog as EventLog
    from clstream.tracking.parent_runs import ParentRun as ParentRun
    from clstream.tracking.parent_runs import parent_run as parent_run
    from clstream.tracking.tensorboard_tracker import TensorBoardTracker as TensorBoardTracker
    from clstream.tracking.tracker import MlflowTracker as MlflowTracker
    from clstream.tracking.wandb_tracker import WandbTracker as WandbTracker

_PLACES = {
    "CsvTracker": "clstream.tracking.csv_tracker",
    "Details": "clstream.tracking.details",
    "EventLog": "clstream.tracking.event_log",
    "ParentRun": "clstream.tracking.parent_runs",
    "parent_run": "clstream.tracking.parent_runs",
    "MlflowTracker": "clstream.tracking.tracker",
    "TensorBoardTracker": "clstream.tracking.tensorboard_tracker",
    "WandbTracker": "clstream.tracking.wandb_tracker",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("mlflow", "pandas"):
            raise
        raise ImportError(f"{name} needs the package {error.name}, which is not installed: pip install mlflow") from None
