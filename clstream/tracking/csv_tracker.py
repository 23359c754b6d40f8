"""Runs as CSV: a line for each point, for pandas, spreadsheets and shells."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from clstream.tracking.point_tracker import Point, PointTracker, cut

POINTS, PARAMS = "metrics.csv", "params.csv"


class CsvTracker(PointTracker):
    """Writes the points of a run to metrics.csv, with the columns metric, step and value, and its params to params.csv.

    Args:
        folder, name: see `PointTracker`; the name is among the params.

    """

    file: TextIO | None = None

    @property
    def path(self) -> Path:
        """The file with the points."""
        return self.folder / POINTS

    def create(self, title: str, params: Mapping[str, object]) -> None:
        """Begin both files anew."""
        with (self.folder / PARAMS).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("param", "value"), ("name", title), *params.items()])
        self.file = self.path.open("w", newline="", encoding="utf-8")
        csv.writer(self.file).writerow(("metric", "step", "value"))

    def go_on(self, state: int) -> None:
        """Cut the file where the checkpoint was."""
        cut(self.path, state)
        self.file = self.path.open("a", newline="", encoding="utf-8")

    def put(self, points: Sequence[Point]) -> None:
        """Write a line for each point, with all digits of its value."""
        assert self.file is not None
        csv.writer(self.file).writerows((name, step, repr(float(value))) for name, step, value in points)
        self.file.flush()

    def position(self) -> int:
        """Return the bytes of the file so far."""
        assert self.file is not None
        self.file.flush()
        return self.path.stat().st_size

    def finish(self, status: str) -> None:  # the event log has it
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None
