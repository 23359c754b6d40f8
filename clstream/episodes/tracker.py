"""Episodes in MLflow: one run, with curves over the episodes, a curve over the support sets, and a histogram."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clstream.bus import on
from clstream.episodes.outcomes import CLEAN, EpisodeEnded, EpisodeOutcome, EpisodesResult
from clstream.episodes.record import FILE
from clstream.figures import episodes_figure

if TYPE_CHECKING:
    from clstream.tracking.uploader import Uploader

WRITE_EVERY = 5.0
"""Seconds between two writes of episodes that are over."""

PICTURE = "a first look/accuracy of episodes"


@contextmanager
def tracked_episodes(
    name: str,
    params: Mapping[str, object],
    experiment: str = "clstream",
    uri: str | None = None,
    folder: str | Path | None = None,
    resumed: bool = False,
) -> Iterator[EpisodesTracker]:
    """Open an MLflow run for episodes; it ends as what is done within does: FINISHED, FAILED or KILLED.

    Args:
        name: of the MLflow run.
        params: what is run.
        experiment, uri: as for `MlflowTracker`.
        folder: of the episodes; the journal, with which a resumed run goes on in the same MLflow run, is in it too.
        resumed: whether to go on in the MLflow run whose journal is in the folder, if there is one.

    Raises OSError if the server doesn't answer, unless `resumed`, or the store or the folder can't be written.
    """
    from clstream.tracking.parent_runs import group_run

    with group_run(name, experiment, uri, folder=folder, resumed=resumed) as uploader:
        tracker = EpisodesTracker(uploader, None if folder is None else Path(folder))
        uploader.outbox.put("params", values={key: str(value)[:6000] for key, value in params.items()})
        try:
            yield tracker
        finally:
            tracker.write()


class EpisodesTracker:
    """Writes what comes of episodes to an MLflow run; step n is the n-th episode.

    Curves: `accuracy`, `corrupted/NAME`, `nearest/accuracy` and `nearest/NAME` of 1-NN, `seconds`. At the end `accuracy/mean` and
    `accuracy/half_width` (of the 95 % interval), and `by_set/accuracy`, whose step n is the n-th support set.
    """

    def __init__(self, uploader: Uploader, folder: Path | None = None) -> None:
        self.uploader, self.folder = uploader, folder
        self.waiting: list[EpisodeOutcome] = []
        self.written = time.monotonic()

    @on(EpisodeEnded)
    def take(self, event: EpisodeEnded) -> None:
        """Take what came of an episode; it is written now and then."""
        self.waiting.append(event.outcome)
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        self._put([point for outcome in self.waiting for point in points_of(outcome)])
        self.waiting, self.written = [], time.monotonic()

    def finish(self, result: EpisodesResult) -> None:
        """Write what came of all episodes, those that were over before a resumed run began too, and the pictures."""
        from clstream.tracking.runs import as_png

        points = [point for outcome in result.outcomes for point in points_of(outcome)]
        mean = result.mean
        points += [("accuracy/mean", mean.size, mean.mean)]
        points += [("accuracy/half_width", mean.size, mean.half_width)] if mean.size > 1 else []
        points += [("by_set/accuracy", number, value) for number, value in enumerate(result.by_set.mean(0).tolist(), 1)]
        self._put(points)
        figure = episodes_figure(result.accuracy, result.by_set, result.chance, result.nearest[CLEAN], result.name)
        picture = base64.b64encode(as_png(figure)).decode()
        outbox = self.uploader.outbox
        outbox.put("image", key=PICTURE, base64=picture, at=_now())
        outbox.put("artifact", name="episodes.png", base64=picture)
        outbox.put("artifact", name="results.txt", text=f"{result}\n")
        if self.folder is not None:
            outbox.put("file", path=FILE)
        self.uploader.upload()

    def _put(self, points: Sequence[tuple[str, int, float]]) -> None:
        outbox = self.uploader.outbox
        new = [point for point in points if point[:2] not in outbox.points]
        if new:
            outbox.put("metrics", at=_now(), points=new)
            self.uploader.upload()


def points_of(outcome: EpisodeOutcome) -> list[tuple[str, int, float]]:
    """Return the points of an episode: name, step and value."""
    values = {"accuracy": outcome.accuracy, "seconds": outcome.seconds}
    values |= {f"corrupted/{name}": value for name, value in outcome.corrupted.items()}
    values |= {f"nearest/{name}": value for name, value in outcome.nearest.items()}
    return [(name, outcome.index + 1, value) for name, value in values.items()]


def _now() -> int:
    return int(time.time() * 1000)
