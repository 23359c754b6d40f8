"""A search in MLflow: a run with its curve and Optuna's pictures, and below it a run for each trial."""

from __future__ import annotations

import base64
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from clstream.tracking.mlflow_store import connect, make_uploader, tracking_uri
from clstream.tracking.outbox import FILE, Outbox
from clstream.tracking.runs import _clean, _now, as_png, begin_run
from clstream.tuning.pictures import search_pictures
from clstream.tuning.search import Search
from clstream.tuning.trial import Outcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class SearchTracker:
    """Writes a search to MLflow, trial by trial; one that goes on does so in its own run.

    The step of a metric is the number of trials that are over: `held_out/average` of the trial, `held_out/best` so far.

    Args:
        search: what is written.
        folder: of the search; its journal, tracking.jsonl, outlives a server.
        name: of the MLflow run.
        experiment, uri: as for `MlflowTracker`.

    Raises:
        ConnectionError, OSError: if the server doesn't answer, or the store can't be written.

    """

    def __init__(self, search: Search, folder: Path, name: str, experiment: str, uri: str | None) -> None:
        self.search, self.experiment, self.uri = search, experiment, tracking_uri(uri)
        file = folder / FILE
        self.connection = connect(self.uri, experiment)
        if file.exists():
            outbox = Outbox.read(file)
            if uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
                self.uri = outbox.head["uri"]
            self.uploader = make_uploader(self.uri, outbox, check_steps=True)
            outbox.put("resume")
        else:
            self.uploader = begin_run(self.uri, experiment, self.connection, file, name, {"mlflow.source.name": "clstream"})
            space = {f"space.{option}": str(values) for option, values in search.space.items()}
            self.uploader.outbox.put("params", values={**space, "seed": str(search.seed)})
        self.uploader.upload()

    def write(self, trial: FrozenTrial, outcome: Outcome) -> None:
        """Write a trial that is over: as a run of its own, and as a point of the search's curves."""
        step, best, outbox = len(self.search.over), self.search.best, self.uploader.outbox
        points = [("held_out/average", step, outcome.value)]
        points += [] if best is None else [("held_out/best", step, float(best.value or 0.0))]
        new = [point for point in points if math.isfinite(point[2]) and point[:2] not in outbox.points]
        if new:
            outbox.put("metrics", at=_now(), points=new)
        self.uploader.upload()
        above = {"mlflow.parentRunId": outbox.run_id} if outbox.run_id else {}
        tags = {
            "mlflow.source.name": "clstream",
            "state": outcome.state,
            **above,
            **({"error": outcome.note} if outcome.note else {}),
        }
        began = None if trial.datetime_start is None else trial.datetime_start.timestamp()
        child = begin_run(self.uri, self.experiment, None, None, f"trial {trial.number}", tags, began)
        values = {option: _clean(str(value))[:6000] for option, value in self.search.values(trial).items()}
        child.outbox.put("params", values=values)
        curve = [("anytime/mean", number, value) for number, value in enumerate(outcome.curve, 1)]
        finite = [point for point in (*curve, ("held_out/average", 0, outcome.value)) if math.isfinite(point[2])]
        child.outbox.put("metrics", at=_now(), points=[*finite, ("seconds", 0, outcome.seconds)])
        status = {"complete": "FINISHED", "pruned": "KILLED"}.get(outcome.state, "FAILED")
        child.outbox.put("end", status=status, at=_now())
        child.upload(last=True)

    def end(self, status: str) -> None:
        """Write Optuna's pictures of the trials there are, and end the run: FINISHED, FAILED or KILLED."""
        outbox = self.uploader.outbox
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, figure in search_pictures(self.search.study).items():
                    outbox.put("artifact", name=f"{name}.png", base64=base64.b64encode(as_png(figure)).decode())
            best = self.search.best
            if best is not None:
                values = {f"best.{option}": str(value) for option, value in self.search.values(best).items()}
                outbox.put("tags", values={**values, "best": f"trial {best.number}"})
        finally:
            outbox.put("end", status=status, at=_now())
            self.uploader.upload(last=True)
