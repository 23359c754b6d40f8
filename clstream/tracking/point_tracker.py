"""The base of trackers beside MLflow's: the same points by the same names, written to a folder."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clstream import events
from clstream.bus import on
from clstream.engine.run_params import params_of
from clstream.files import check_writable
from clstream.tracking.curves import Curve, Curves

Point = tuple[str, int, float]
"""Name, step and value."""


class PointTracker(Curves):
    """Writes the points of a run, as `MlflowTracker` does, somewhere else. What is not defined (NaN) is left out.

    A run that is resumed goes on where its checkpoint was: no point comes twice.

    Args:
        folder: where files are written; made if it isn't there. Each run has one of its own.
        name: of the run. None: the strategy, the stream and the seed.

    Raises:
        OSError: if the folder can't be made or written.

    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        super().__init__()
        self.folder, self.name, self.is_open = check_writable(Path(folder)), name, False

    @classmethod
    def of_run(cls, folder: Path, experiment: str) -> PointTracker:  # noqa: ARG003  # some have a use for it
        """Return the tracker of a run on the command line, told its folder and the name of the experiment."""
        return cls(folder)

    @abstractmethod
    def create(self, title: str, params: Mapping[str, object]) -> None:
        """Begin a new run, in the place of one that was in the folder before."""

    @abstractmethod
    def go_on(self, state: Any) -> None:
        """Go on with the run of the folder, from what `position` returned; what was written later is taken back."""

    @abstractmethod
    def put(self, points: Sequence[Point]) -> None:
        """Write points: what came at one evaluation, or at the end."""

    @abstractmethod
    def position(self) -> Any:
        """Return how far the run is written, in plain values."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""

    @on(events.RunStarted)
    def open(self, event: events.RunStarted) -> None:
        """Begin a run; one that is resumed goes on when its state is known."""
        self._start_curves(event)
        if not event.resumed:
            self._create()

    def _create(self) -> None:
        if self.started is None:
            raise RuntimeError("a tracker has a state, and writes, only while a run goes on")
        self.create(self.name or self.title, params_of(self.started))
        self.is_open = True

    @on(events.Evaluated)
    def write(self, event: events.Evaluated) -> None:
        """Write what the evaluation found; evaluations within a session go with the session's own."""
        self.evaluation = event.evaluation
        if not event.evaluation.within_session:
            self._put(self._of_session(event.evaluation))

    @on(events.RunEnded)
    def close(self, event: events.RunEnded) -> None:
        """Write what is left, and the values at the end, if the run came to it; then end the run."""
        if not self.is_open:  # it never began
            self._reset_curves()
            return
        error = event.error
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            if self.evaluation is not None:
                final = self._of_run(self.evaluation) if error is None and len(self.evaluation.accuracy) else {}
                self._put(self._probes() | final)
        finally:
            self.finish(status)
            self.is_open = False
            self._reset_curves()

    def _put(self, curves: Mapping[str, Curve]) -> None:
        if not self.is_open:  # a run that is resumed, and was not tracked here before
            self._create()
        points = [(name, step, value) for name, curve in curves.items() for step, value in curve if math.isfinite(value)]
        if points:
            self.put(points)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with its points."""
        if not self.is_open:
            self._create()
        return {"position": self.position(), **self._curves_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises OSError if the files can't be written."""
        self._load_curves(state)
        self.go_on(state["position"])
        self.is_open = True


def cut(file: Path, size: int) -> None:
    """Cut off what a file has beyond a size; one that is not there, or shorter, stays as it is."""
    if file.is_file() and file.stat().st_size > size:
        with file.open("r+b") as opened:
            opened.truncate(size)
