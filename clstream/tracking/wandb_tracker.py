"""Runs in Weights & Biases."""

from __future__ import annotations

import json
import os
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clstream.bus import ObserverError
from clstream.files import write_atomically
from clstream.tracking.point_tracker import Point, PointTracker

FILE = "wandb.json"
"""The id of the run, and the rows that were written, in the run's folder."""


class WandbTracker(PointTracker):
    """Writes the points of a run to Weights & Biases: rows by sessions finished, and rows by batches learned for `anytime/...`.

    Params are the run's config, and `final/...` its summary. Without a network set WANDB_MODE=offline, and send it later with
    `wandb sync`. A run that is resumed goes on in its own, by its id; rows that were written beyond the checkpoint are not
    written again, since the run comes to the same ones.

    Args:
        folder, name: see `PointTracker`; of what wandb itself writes the place is its own: WANDB_DIR, or ./wandb.
        project: of Weights & Biases.

    Raises:
        ImportError: if wandb is not installed.

    """

    run: Any = None

    def __init__(self, folder: str | Path, name: str | None = None, project: str = "clstream") -> None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ImportError("Weights & Biases is not installed: pip install 'clstream[wandb]'") from None
        super().__init__(folder, name)
        self.project, self.id, self.rows, self.rows_there = project, "", 0, 0

    @classmethod
    def of_run(cls, folder: Path, experiment: str) -> WandbTracker:
        """Return the tracker of a run on the command line; the project is called as the experiment."""
        return cls(folder, project=experiment)

    def create(self, title: str, params: Mapping[str, object]) -> None:
        """Begin a new run. Raises ObserverError if Weights & Biases takes none."""
        self.id, self.rows, self.rows_there = uuid.uuid4().hex[:8], 0, 0
        self._open(title, params)
        self._note()

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Go on in the run of the state. Raises ObserverError if Weights & Biases doesn't take it."""
        self.id, self.rows = str(state["id"]), int(state["rows"])
        self.rows_there = self.rows
        if (self.folder / FILE).is_file():
            noted = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            self.rows_there = int(noted["rows"]) if noted["id"] == self.id else self.rows
        self._open(None, {})

    def _open(self, title: str | None, params: Mapping[str, object]) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        place = os.environ.get("WANDB_DIR") or os.getcwd()  # wandb itself stays where a process first used it
        try:
            self.run = wandb.init(
                project=self.project,
                id=self.id,
                resume="allow",
                name=title,
                config=dict(params) or None,
                dir=place,
                settings=settings,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ObserverError(
                f"Weights & Biases takes no run ({reason}): give `wandb login`, or set the environment variable WANDB_MODE=offline"
            ) from error
        self.run.define_metric("*", step_metric="sessions")
        self.run.define_metric("anytime/*", step_metric="batches")

    def put(self, points: Sequence[Point]) -> None:
        """Write a row for each number of batches, then one for the sessions; final values go to the summary."""
        rows: dict[tuple[bool, int], dict[str, float]] = defaultdict(dict)
        for name, step, value in points:
            if name.startswith("final/"):
                self.run.summary[name] = value
            else:
                within = name.startswith("anytime/")
                rows[not within, step] |= {"batches" if within else "sessions": step, name: value}
        for _, row in sorted(rows.items(), key=lambda item: item[0]):
            if self.rows >= self.rows_there:
                self.run.log(row, step=self.rows, commit=True)
            self.rows += 1
        if self.rows > self.rows_there:
            self.rows_there = self.rows
            self._note()

    def _note(self) -> None:
        """Note on the disk which run it is, and how many rows it has."""
        text = json.dumps({"id": self.id, "rows": self.rows_there})
        write_atomically(self.folder / FILE, lambda out: out.write(text.encode()))

    def position(self) -> dict[str, Any]:
        """Return the id of the run, and the rows so far."""
        return {"id": self.id, "rows": self.rows}

    def finish(self, status: str) -> None:
        """End the run; one that did not finish may be resumed."""
        if self.run is not None:
            self.run.finish(exit_code=0 if status == "FINISHED" else 1)
            self.run = None
