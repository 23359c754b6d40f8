"""Tracking: MLflow, the journal that outlives a server, and the event log."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clstream.tracking.details import Details as Details
    from clstream.tracking.event_log import EventLog as EventLog
    from clstream.tracking.parent_runs import ParentRun as ParentRun
    from clstream.tracking.parent_runs import parent_run as parent_run
    from clstream.tracking.tracker import MlflowTracker as MlflowTracker

_PLACES = {
    "Details": "clstream.tracking.details",
    "EventLog": "clstream.tracking.event_log",
    "ParentRun": "clstream.tracking.parent_runs",
    "parent_run": "clstream.tracking.parent_runs",
    "MlflowTracker": "clstream.tracking.tracker",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
