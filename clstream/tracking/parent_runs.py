"""The MLflow run above the runs of several seeds."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clstream.figures import accuracy_against_cost, compared_curves, forgetting_curves
from clstream.files import check_writable
from clstream.measures import MAIN
from clstream.results import Evaluation, Result
from clstream.tracking.journal import entries
from clstream.tracking.mlflow_store import connect, make_uploader, tracking_uri
from clstream.tracking.outbox import FILE, Outbox
from clstream.tracking.picture_timer import PictureTimer
from clstream.tracking.runs import PICTURE, _clean, _now, as_png, begin_run
from clstream.tracking.uploader import Uploader


@contextmanager
def group_run(
    name: str,
    experiment: str = "clstream",
    uri: str | None = None,
    tags: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    resumed: bool = False,
) -> Iterator[Uploader]:
    """Open an MLflow run that other runs are shown under; it ends as what is done within does: FINISHED, FAILED or KILLED.

    Args:
        name: of the MLflow run.
        experiment, uri, tags, folder: as for `MlflowTracker`; the folder is another one than those of the runs.
        resumed: go on in the MLflow run whose journal is in the folder; if there is none, a new one is created.

    Raises:
        ConnectionError, OSError: if the server doesn't answer, unless `resumed`, or the store or the folder can't be written.

    """
    file = None if folder is None else check_writable(Path(folder)) / FILE
    where = tracking_uri(uri)
    if resumed and file is not None and file.exists():
        outbox = Outbox.read(file)
        if uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
            where = outbox.head["uri"]
        uploader = make_uploader(where, outbox, check_steps=True)
        outbox.put("resume")
    else:
        connection = None if resumed else connect(where, experiment)
        uploader = begin_run(where, experiment, connection, file, name, {"mlflow.source.name": "clstream", **(tags or {})})
        outbox = uploader.outbox
    uploader.upload()
    status = "FAILED"
    try:
        yield uploader
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        outbox.put("tags", values={"error": _clean(f"{type(error).__name__}: {error}"[:5000])})
        raise
    finally:
        outbox.put("end", status=status, at=_now())
        uploader.upload(last=True)


@contextmanager
def parent_run(
    name: str,
    seeds: Sequence[int],
    experiment: str = "clstream",
    uri: str | None = None,
    tags: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    resumed: bool = False,
) -> Iterator[ParentRun]:
    """Open the MLflow run that the runs of several seeds are shown under, and that has their mean; see `group_run`.

    Args:
        name, experiment, uri, tags, folder, resumed: see `group_run`.
        seeds: of the runs; each has a tracker with `parent=` what this returns.

    Raises:
        ConnectionError, OSError: see `group_run`.
        ValueError: if there are no seeds, or one comes twice.

    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a parent run needs its seeds, each once, not {list(seeds)}")
    with group_run(name, experiment, uri, tags, folder, resumed) as uploader:
        parent = ParentRun(uploader, name, seeds)
        try:
            yield parent
        finally:
            parent.draw(last=True)
    parent.warn_of_missing_seeds()


class ParentRun:
    """The MLflow run above those of several seeds: their mean and standard deviation, under the names and steps of theirs.

    A step is written once, when the last of the seeds has passed it. Until then what the others had there is kept, in the
    journal too.
    """

    def __init__(self, uploader: Uploader, name: str, seeds: Sequence[int]) -> None:
        self.uploader, self.name, self.seeds = uploader, name, tuple(seeds)
        self.incomplete: dict[tuple[str, int], dict[int, float]] = {}
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.measure = "accuracy"  # the main one
        self.sessions: tuple[int, ...] = ()  # finished by each evaluation of the seed that came farthest
        self.drawn: tuple[int, ...] = ()
        self.picture = ""
        self.picture_timer = PictureTimer()
        self.described = False
        journal = uploader.outbox.journal
        for entry in entries(journal.file) if journal is not None else ():
            self.described |= entry.get("do") == "params"
            if "seed" in entry:
                self._take(entry["seed"], entry["points"])
        self._write()

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None if a resumed run was never created, and the server is away."""
        return self.uploader.outbox.run_id

    def check(self, seed: int) -> None:
        """Refuse the run of another seed, and one that begins when the parent is over."""
        if self.uploader.outbox.ended:
            raise ValueError(f"the parent run {self.name!r} is over: run its seeds within `with parent_run(...)`")
        if seed not in self.seeds:
            raise ValueError(f"the parent run {self.name!r} is of the seeds {self.seed_list}, not of {seed}")

    @property
    def seed_list(self) -> str:
        """The seeds, as text."""
        return ",".join(map(str, self.seeds))

    def describe(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Write the params and tags of the first seed, but for the seed itself: the other seeds share them."""
        if self.described:
            return
        self.described = True
        shared = {key: str(value)[:6000] for key, value in params.items() if key != "seed"} | {"seeds": self.seed_list}
        self.uploader.outbox.put("params", values=shared)
        self.uploader.outbox.put("tags", values={key: tags[key] for key in tags if not key.startswith("mlflow.")})
        self.uploader.upload()

    def add(self, seed: int, points: Sequence[tuple[str, int, float]]) -> None:
        """Add (name, step, value) points of a seed, again if need be, and write the mean where all seeds have a value."""
        written = self.uploader.outbox.points
        new = [
            (name, step, value)
            for name, step, value in points
            if (name, step) not in written and seed not in self.incomplete.get((name, step), {})
        ]
        if new:
            self.uploader.outbox.keep(seed=seed, points=new)
            self._take(seed, new)
            self._write()

    def _take(self, seed: int, points: Sequence[Sequence[Any]]) -> None:
        for name, step, value in points:
            self.incomplete.setdefault((name, step), {})[seed] = value

    def _write(self) -> None:
        written, points = self.uploader.outbox.points, list[tuple[str, int, float]]()
        for (name, step), values in list(self.incomplete.items()):
            if len(values) < len(self.seeds):
                continue
            del self.incomplete[name, step]
            of_seeds = np.array([values[seed] for seed in self.seeds])
            points.append((name, step, float(of_seeds.mean())))
            if len(of_seeds) > 1:
                points.append((f"std/{name}", step, float(of_seeds.std(ddof=1))))
        new = [point for point in points if point[:2] not in written]
        if new:
            self.uploader.outbox.put("metrics", at=_now(), points=new)
            self.uploader.upload_in_turn()

    def read_journal(self, seed: int, folder: Path) -> None:
        """Take, from the folder of a seed that ran in another process, what its tracker would have given in this one."""
        tags: dict[str, str] = {}
        for entry in entries(folder / FILE) if (folder / FILE).exists() else ():
            match entry.get("do"):
                case "create":
                    tags = entry["tags"]
                case "params":
                    self.describe(entry["values"], tags)
                case "metrics":
                    self.add(seed, [(name, step, value) for name, step, value in entry["points"]])

    def update(self, seed: int, evaluation: Evaluation, begun: Tensor) -> None:
        """Keep what a seed has measured so far, for the picture; see `tasks_by_row` for `begun`."""
        self.seen[seed], self.measure = (evaluation.main, evaluation.taught, begun), evaluation.main_name
        self.sessions = evaluation.sessions if len(evaluation.sessions) >= len(self.sessions) else self.sessions
        self.draw()

    def draw(self, last: bool = False) -> None:
        """Draw the mean over the seeds that came farthest, if there is something new, and time for it, or it is the last time."""
        rows = max((len(main) for main, _, _ in self.seen.values()), default=0)
        latest = [seed for seed in self.seeds if seed in self.seen and len(self.seen[seed][0]) == rows]
        new = (rows, *latest)
        if new != self.drawn and rows and (last or self.picture_timer.due()):
            self.drawn = new
            self._draw(latest)
        if last and self.picture:
            self.uploader.outbox.put("artifact", name="forgetting_curves.png", base64=self.picture)
        self.uploader.upload_in_turn()

    def _draw(self, latest: Sequence[int]) -> None:
        title = self.name if len(latest) == len(self.seeds) else f"{self.name}: {len(latest)} so far"
        accuracy, taught, begun = (torch.stack([self.seen[seed][part] for seed in latest]) for part in range(3))
        figure = forgetting_curves(accuracy, taught, title, begun, self.sessions, self.measure)
        self.picture = base64.b64encode(as_png(figure)).decode()
        self.uploader.outbox.put("image", key=PICTURE, base64=self.picture, at=_now())

    def warn_of_missing_seeds(self) -> None:
        """Warn if the parent ended well, but not all of its seeds did."""
        means = {f"{measure}/mean" for measure in MAIN.values()}
        absent = [
            seed for (name, _), values in self.incomplete.items() if name in means for seed in self.seeds if seed not in values
        ]
        if absent:
            warnings.warn(
                f"the curves of {self.name!r} end before those of some of its seeds: a mean needs all of {self.seed_list}, and "
                f"{', '.join(map(str, sorted(set(absent))))} did not come as far",
                RuntimeWarning,
                stacklevel=3,
            )


def track_comparison(
    results: Mapping[str, Sequence[Evaluation]],
    experiment: str = "clstream",
    uri: str | None = None,
    began: float | None = None,
) -> str | None:
    """Write an MLflow run with pictures of some runs against each other, and return its id; None if the server is away.

    One shows their main measure over the sessions, the other one, where costs are known, it against cost.

    Args:
        results: by name, what each seed of a run measured; all have the same main measure.
        experiment, uri: as for `MlflowTracker`.
        began: when, in seconds since 1970; MLflow shows the pictures of earlier runs first. None: now.

    """
    name = f"comparison of {', '.join(results)}"
    pairs = {
        run_name: (torch.stack([evaluation.main for evaluation in seeds]), torch.stack([evaluation.taught for evaluation in seeds]))
        for run_name, seeds in results.items()
    }
    finished = {run_name: seeds[0].sessions for run_name, seeds in results.items()}
    measure = next(iter(results.values()))[0].main_name
    picture = base64.b64encode(as_png(compared_curves(pairs, sessions=finished, measure=measure))).decode()
    uploader = begin_run(tracking_uri(uri), experiment, None, None, name, {"mlflow.source.name": "clstream"}, began)
    uploader.outbox.put("image", key=PICTURE, base64=picture, at=_now())
    uploader.outbox.put("artifact", name="comparison.png", base64=picture)
    spent = {
        run_name: [
            (seed.average_accuracy, float(seed.cost.training_flops.sum()))
            for seed in seeds
            if isinstance(seed, Result) and len(seed.cost) and len(seed.main)
        ]
        for run_name, seeds in results.items()
    }
    if all(spent.values()):
        points = {run_name: tuple(torch.tensor(pairs, dtype=torch.float64).T) for run_name, pairs in spent.items()}
        figure = accuracy_against_cost({name: (pair[0], pair[1]) for name, pair in points.items()}, measure=measure)
        picture = base64.b64encode(as_png(figure)).decode()
        uploader.outbox.put("artifact", name=f"{measure.replace('/', '_')}_against_cost.png", base64=picture)
    uploader.outbox.put("end", status="FINISHED", at=_now())
    uploader.upload(last=True)
    return uploader.outbox.run_id
