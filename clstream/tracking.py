"""Tracking: a run's curves, params and pictures in MLflow.

The step of a metric is the number of sessions finished; for `anytime/...` it is the number of batches learned. What an
evaluation found is written at once, in one batch; nothing is written per batch of the stream.

All of it goes through an outbox: what the server doesn't take waits there, and the run goes on.
"""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import subprocess
import tempfile
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clstream import __version__, events, metrics
from clstream.bus import on
from clstream.engine import described
from clstream.evaluation import Evaluation, write_csv
from clstream.figures import accuracy_matrix, compared_curves, forgetting_curves
from clstream.journal import entries, set_aside
from clstream.outbox import FILE, Delivery, Outbox, reason_of, spooled
from clstream.source_code import as_files
from clstream.store import Opened, connect, deliver_to, has_run, tracking_uri, without_password
from clstream.stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "a first look/forgetting curves"
"""The name of a run's picture among MLflow's charts. These are in sections by what is before the slash, in alphabetical order."""

_OWN = frozenset(kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event))


def end_earlier(file: Path) -> None:
    """Set the journal of an earlier run aside, whose place a new one takes; a run that never ended is ended first."""
    if not file.exists():
        return
    try:
        old = Outbox.read(file)
    except ValueError:  # its first line was never written
        set_aside(file)
        return
    if not old.ended:
        old.put("end", status="KILLED", at=_now())
    deliver_to(tracking_uri(old.head["uri"]), old).try_now(last=True)
    set_aside(file)


def begin_run(
    uri: str,
    experiment: str,
    opened: Opened | None,
    file: Path | None,
    name: str,
    tags: Mapping[str, str],
    began: float | None = None,
) -> Delivery:
    """Begin a new MLflow run, with a journal at `file`. If `opened`, it is created at once, or OSError raised; else when it can."""
    if file is not None:
        end_earlier(file)
    outbox = Outbox({"uri": without_password(uri), "experiment": experiment, "key": uuid.uuid4().hex})
    if file is not None:
        outbox.keep_in(file)
    going = deliver_to(uri, outbox, opened)
    outbox.put("create", name=name, tags=dict(tags), at=_now() if began is None else int(began * 1000))
    if opened is not None:
        try:
            outbox.flush(going.send)
        except Exception as error:
            outbox.close()
            if file is not None:
                file.unlink()
            raise OSError(f"{going.where} takes no new run: {reason_of(error)}") from error
    return going


class MlflowTracker:
    """Writes a run to MLflow: accuracy, forgetting and transfer by session, and pictures at the end.

    What the server doesn't take, since it is away or full, is kept and sent later, by itself or by `clstream sync`; the run
    goes on. A run that is resumed goes on in its MLflow run, where no step comes twice.

    Args:
        experiment: the MLflow experiment; made if it isn't there.
        uri: where; see `tracking_uri`. A resumed run goes on where it was, if neither this nor MLFLOW_TRACKING_URI is given.
        name: of the MLflow run. None: the strategy, the stream and the seed.
        parent: the run of several seeds that this one is shown under, and that gets the mean over them; see `parent_run`. Or the
            id of any MLflow run, to be shown under it.
        config: what was asked for, as text; kept as the artifact config.yaml.
        tags: more tags.
        folder: of the run. All that is written lies in its file tracking.jsonl before it is sent, so that a killed process
            loses nothing. None: nothing is on disk until something can't be sent, then it is in runs/<MLflow run id>.
        files: become artifacts at the end, those that are there; they have to stay where they are until they are sent.
        patient: whether a server that is away at the start is no error; for a run that goes on, or follows one that went well.

    Raises:
        ConnectionError, OSError: at once, if the server doesn't answer or the store or the folder can't be written.

    """

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(
        self,
        experiment: str = "clstream",
        uri: str | None = None,
        name: str | None = None,
        parent: ParentRun | str | None = None,
        config: str | None = None,
        tags: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
        files: Sequence[str | Path] = (),
        patient: bool = False,
    ) -> None:
        self.experiment, self.uri = experiment, tracking_uri(uri)
        self.chosen = uri is not None or "MLFLOW_TRACKING_URI" in os.environ
        self.opened = None if patient else connect(self.uri, experiment)
        self.name, self.config = name, config
        self.parent = parent if isinstance(parent, ParentRun) else None
        above = parent.run_id if isinstance(parent, ParentRun) else parent
        self.tags = dict(tags or {}) | ({"mlflow.parentRunId": above} if above else {})
        self.file = None if folder is None else writable(Path(folder)) / FILE
        self.files = [Path(file).absolute() for file in files]
        self.delivery: Delivery | None = None
        self._reset()

    def _reset(self) -> None:
        self.is_open = False
        self.started: events.RunStarted | None = None
        self.evaluation: Evaluation | None = None
        self.delivered: Tensor | None = None  # (sessions that ended, tasks), bool: which tasks had samples in which
        self.renewal = Renewal()
        self.probes_written, self.versions = 0, 1
        self.samples, self.losses = 0, list[Tensor]()
        self.earlier: Tensor | None = None  # losses of this session from before the run was resumed
        self.learning, self.began = 0.0, 0.0
        self.counts: dict[str, float] = {}

    @property
    def experiment_id(self) -> str | None:
        """The id of the MLflow experiment; None if the server was not asked for it, as where a run goes on."""
        return None if self.opened is None else self.opened[1]

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, of the last one if it is over; None while there is none."""
        return None if self.delivery is None else self.delivery.outbox.run_id

    @on(events.RunStarted)
    def open(self, event: events.RunStarted) -> None:
        """Open an MLflow run, with its params and tags; one that is resumed has its own, which `load_state_dict` takes up."""
        self.started = event
        if self.parent is not None:
            self.parent.check(event.seed)
        self.title = f"{type(event.strategy).__name__} on {event.stream.name}, seed {event.seed}"
        self.start = self.began = time.perf_counter()
        if not event.resumed:
            self._create()

    def _create(self) -> Outbox:
        if self.started is None:
            raise RuntimeError("a tracker has a state, and writes, only while a run goes on")
        stream, strategy, seed = self.started.stream, self.started.strategy, self.started.seed
        commit = _commit()
        tags = {
            "mlflow.source.name": "clstream",
            "clstream": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "data_fingerprint": stream.fingerprint,
            **({"git_commit": commit} if commit else {}),
            **self.tags,
        }
        self.delivery = begin_run(self.uri, self.experiment, self.opened, self.file, self.name or self.title, tags)
        outbox, self.is_open = self.delivery.outbox, True
        params = described(strategy, stream, seed, stream.device or "cpu")
        outbox.put("params", values={key: str(value)[:6000] for key, value in params.items()})
        outbox.put("artifact", name="stream.txt", text=str(stream))
        if self.config is not None:
            outbox.put("artifact", name="config.yaml", text=self.config)
        self._put_code()
        self.delivery.try_now()
        if self.parent is not None:
            self.parent.describe(params, tags)
        return outbox

    def _put_code(self, folder: str = "code") -> None:
        """Write the source of the user's own modules, so that the run can be repeated."""
        if self.delivery is not None and self.started is not None and self.started.run is not None:
            sources = self.started.run.sources
            for name, text in as_files({**sources["observers"], **sources["run"]}).items():
                self.delivery.outbox.put("artifact", name=f"{folder}/{name}", text=_clean(text))

    @property
    def outbox(self) -> Outbox:
        """Where to write to; a run that was resumed without the state of a tracker gets an MLflow run of its own."""
        return self.delivery.outbox if self.delivery is not None and self.is_open else self._create()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on in the same MLflow run: plain values and tensors."""
        now = time.perf_counter()
        outbox, found = self.outbox, self.evaluation
        return {
            "outbox": outbox.head | ({"run_id": outbox.run_id} if outbox.run_id else {}),
            "seconds": now - self.start,
            "session_seconds": now - self.began,
            "learning": self.learning,
            "samples": self.samples,
            "losses": self._losses(),
            "counts": dict(self.counts),
            "probes_written": self.probes_written,
            "delivered": self.delivered,
            "versions": self.versions,
            "evaluation": found and {each.name: getattr(found, each.name) for each in fields(Evaluation)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the MLflow run of a state, and go on in it. A server that is away is no error here.

        Raises:
            OSError: if the journal in the run's folder can't be read or written, or another process writes to it.
            ValueError: if the journal is that of another run, or this tracker's own server has no such run.

        """
        recorded, now = dict(state["outbox"]), time.perf_counter()
        uri = self._same_server(recorded)
        file = self.file or spooled(Path("runs").absolute(), recorded)
        if file.exists():
            outbox = Outbox.read(file)
            if outbox.head["key"] != recorded["key"]:
                outbox.close()
                raise ValueError(f"{file} is the journal of another run: resume each run in its own folder")
        else:
            outbox = Outbox(recorded)
            if self.file is not None:
                outbox.keep_in(self.file)
        if outbox.head["uri"] != without_password(uri):
            outbox.note(uri=without_password(uri))
        self.delivery, self.is_open = deliver_to(uri, outbox, ask=True), True
        self.start, self.began = now - state["seconds"], now - state["session_seconds"]
        self.learning, self.samples, self.earlier, self.losses = state["learning"], state["samples"], state["losses"], []
        self.delivered = state["delivered"]
        self.versions = state["versions"]
        self.counts, self.probes_written, found = dict(state["counts"]), state["probes_written"], state["evaluation"]
        self.evaluation = found and Evaluation(**dict(found) | {"probe_steps": tuple(found["probe_steps"])})
        outbox.put("resume")
        changed = [] if self.started is None or self.started.run is None else self.started.run.changed_code
        if changed:
            outbox.put("tags", values={"changed_code": _clean("; ".join(changed)[:5000])})
            self.versions += 1
            self._put_code(f"code.{self.versions}")
        self.delivery.try_now()

    def _same_server(self, recorded: Mapping[str, str]) -> str:
        """Return where a recorded run goes on: where it was, or where this tracker writes to, if the run is there."""
        run_id, before = recorded.get("run_id"), recorded["uri"]
        if without_password(self.uri) == before or run_id is None:
            return self.uri
        if not self.chosen:
            return before
        ours = without_password(self.uri)
        try:
            found = has_run(self.uri, run_id)
        except Exception as error:  # noqa: BLE001  # each kind of store has its own
            warnings.warn(
                f"{ours} doesn't say whether it has the MLflow run {run_id} ({reason_of(error)}): it goes on at {before}",
                RuntimeWarning,
                stacklevel=2,
            )
            return before
        if not found:
            raise ValueError(f"the MLflow run {run_id} is at {before}, not at {ours}: leave --tracking_uri out, or give that one")
        warnings.warn(f"the MLflow run {run_id} was at {before}, and goes on at {ours}", RuntimeWarning, stacklevel=2)
        return self.uri

    @on(events.SessionStarted)
    def begin(self, event: events.SessionStarted) -> None:
        """Start the clock of the session."""
        self.began, self.samples, self.losses, self.earlier = time.perf_counter(), 0, [], None

    @on(events.BatchLearned)
    def count(self, event: events.BatchLearned) -> None:
        """Keep the loss, on its device, and count the samples."""
        self.samples += len(event.batch.samples)
        self.losses.append(event.loss)

    @on(events.SessionEnded)
    def end(self, event: events.SessionEnded) -> None:
        """Stop the clock of the session."""
        self.learning = time.perf_counter() - self.began

    @on(events.Event)
    def count_others(self, event: events.Event) -> None:
        """Count the events that strategies and detectors emit, and keep the numbers that these want shown as curves."""
        if type(event) not in _OWN:
            name = f"events/{type(event).__name__}"
            self.counts[name] = self.counts.get(name, 0) + 1
            self.counts |= event.curves()

    @on(events.Evaluated)
    def write(self, event: events.Evaluated) -> None:
        """Write what the evaluation found, in one batch; evaluations within a session go with the session's own."""
        self.evaluation = event.evaluation
        if event.evaluation.within_session:
            return
        assert self.started is not None
        self.delivered = delivered(self.started.stream, len(event.evaluation.accuracy), self.delivered)
        found = session_metrics(event.evaluation, self.delivered.any(0))
        found["seconds"] = time.perf_counter() - self.start
        losses = self._losses()
        if losses is not None:
            found["loss"] = float(losses.mean())
            found["samples_per_second"] = self.samples / self.learning if self.learning else math.nan
        self._log(
            {name: [(len(event.evaluation.accuracy), value)] for name, value in (found | self.counts).items()} | self._probes()
        )
        if self.renewal.due():
            self._picture(event.evaluation)
        assert self.delivery is not None
        self.delivery.try_now()
        if self.parent is not None:
            self.parent.see(self.started.seed, event.evaluation, self.delivered)

    def _picture(self, found: Evaluation) -> bytes:
        """Draw the forgetting curves, for MLflow's charts, and return the picture."""
        image = as_png(forgetting_curves(found.main, found.taught, self.title, self.delivered))
        self.outbox.put("image", key=PICTURE, base64=base64.b64encode(image).decode(), at=_now())
        return image

    def _losses(self) -> Tensor | None:
        """Return the losses of the session so far, (batches,), or None."""
        parts = [] if self.earlier is None else [self.earlier]
        if self.losses:
            new = torch.stack(self.losses)
            parts = [*(part.to(new.device) for part in parts), new]
        return torch.cat(parts) if parts else None

    def _probes(self) -> dict[str, list[tuple[int, float]]]:
        """Return the evaluations that were not written yet, by batches learned, if there are any within sessions."""
        found = self.evaluation
        assert found is not None
        new = range(self.probes_written, len(found.probes))
        if len(found.probes) <= len(found.accuracy) and not self.probes_written:
            return {}
        self.probes_written = len(found.probes)
        width = _width(len(found.baseline))
        return {
            f"anytime/task_{task:0{width}d}": [(found.probe_steps[index], float(found.probes[index][task])) for index in new]
            for task in range(len(found.baseline))
        }

    def _log(self, curves: Mapping[str, list[tuple[int, float]]]) -> None:
        """Write (step, value) points of metrics; what is not defined, and steps that were written before, are left out."""
        outbox = self.outbox
        points = [(name, step, value) for name, curve in curves.items() for step, value in curve if math.isfinite(value)]
        new = [point for point in points if point[:2] not in outbox.points]
        if new:
            outbox.put("metrics", at=_now(), points=new)
        if self.parent is not None:
            assert self.started is not None
            self.parent.add(self.started.seed, points)

    @on(events.RunEnded)
    def close(self, event: events.RunEnded) -> None:
        """Write the pictures and the matrix of what there is, and end the run: FINISHED, FAILED or KILLED."""
        if not self.is_open or self.delivery is None:  # it never began
            self._reset()
            return
        outbox, error, found = self.delivery.outbox, event.error, self.evaluation
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            if error is not None:
                outbox.put("tags", values={"error": _clean(f"{type(error).__name__}: {error}"[:5000])})
                outbox.put("artifact", name="error.txt", text="".join(traceback.format_exception(error)))
            if found is not None:
                self._log(self._probes())  # those since the last session that ended
            if found is not None and len(found.accuracy):
                if error is None:  # else it may be resumed, and these have one value
                    self._log({name: [(0, value)] for name, value in final_metrics(found).items()})  # step 0: MLflow draws bars
                self._artifacts(found)
        finally:
            for file in self.files:
                if file.is_file():
                    outbox.put("file", path=_seen_from(file, self.file))
            outbox.put("end", status=status, at=_now())
            self._reset()
            self.delivery.try_now(last=True)

    def _artifacts(self, found: Evaluation) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            views = [("accuracy", found.accuracy), ("task_il_accuracy", found.task_accuracy)]
            for view, matrix in views:
                write_csv(matrix, found.taught, folder / f"{view}.csv")
                accuracy_matrix(matrix, f"{self.title}: {view}").savefig(folder / f"{view}.png", dpi=120)
            (folder / "forgetting_curves.png").write_bytes(self._picture(found))
            for file in sorted(folder.iterdir()):
                self.outbox.put("artifact", name=file.name, base64=base64.b64encode(file.read_bytes()).decode())


def session_metrics(found: Evaluation, begun: Tensor) -> dict[str, float]:
    """Return the metrics of the last row, by MLflow name; NaN where one is not defined.

    A task's accuracy is left out until it has begun: a curve that rises from 0 where nothing was taught looks like learning.

    Args:
        found: what was measured.
        begun: (tasks,), bool: the tasks of which a session has had samples.

    """
    taught = found.taught
    width = _width(len(found.baseline))
    values: dict[str, float] = {}
    for prefix, matrix, baseline in (("", found.accuracy, found.baseline), ("task_il/", found.task_accuracy, found.task_baseline)):
        lost = metrics.forgetting_max_earlier_minus_last(matrix, taught)
        for task in range(len(baseline)):
            values[f"{prefix}accuracy/task_{task:0{width}d}"] = float(matrix[-1, task]) if begun[task] else math.nan
            values[f"{prefix}forgetting/task_{task:0{width}d}"] = float(lost[task])
        values[f"{prefix}accuracy/mean"] = metrics.average_accuracy(matrix, taught)
        values[f"{prefix}forgetting/mean"] = metrics.forgetting(matrix, taught)
        values[f"{prefix}transfer/backward"] = metrics.backward_transfer(matrix, taught)
        values[f"{prefix}transfer/forward"] = metrics.forward_transfer(matrix, baseline, taught)
    return values


def final_metrics(found: Evaluation) -> dict[str, float]:
    """Return the metrics of the whole main matrix, by MLflow name."""
    matrix, taught = found.main, found.taught
    values = {
        "final/average_accuracy": metrics.average_accuracy(matrix, taught),
        "final/forgetting": metrics.forgetting(matrix, taught),
        "final/average_incremental_accuracy": metrics.average_incremental_accuracy(matrix, taught),
        "final/learning_accuracy": metrics.learning_accuracy(matrix, taught),
        "final/forgetting_first_minus_last": metrics.forgetting_first_minus_last(matrix, taught),
        "final/forgetting_max_minus_last": metrics.forgetting_max_minus_last(matrix, taught),
    }
    if len(found.probes) > len(found.accuracy):
        probes, marks = found.probes, found.probe_taught
        values["final/anytime_average_accuracy"] = metrics.anytime_average_accuracy(probes, marks)
        values["final/min_accuracy"] = metrics.min_accuracy(probes, marks)
        values["final/worst_case_accuracy"] = metrics.worst_case_accuracy(probes, marks)
    return values


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
    """Open the MLflow run that the runs of several seeds are shown under, and that has their mean; it ends as they do.

    Args:
        name: of the MLflow run.
        seeds: of the runs; each has a tracker with `parent=` what this returns.
        experiment, uri, tags, folder: as for `MlflowTracker`; the folder is another one than theirs.
        resumed: go on in the MLflow run whose journal is in the folder; if there is none, a new one is created.

    Raises:
        ConnectionError, OSError: if the server doesn't answer, unless `resumed`, or the store or the folder can't be written.
        ValueError: if there are no seeds, or one comes twice.

    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a parent run needs its seeds, each once, not {list(seeds)}")
    file = None if folder is None else writable(Path(folder)) / FILE
    where = tracking_uri(uri)
    if resumed and file is not None and file.exists():
        outbox = Outbox.read(file)
        if uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
            where = outbox.head["uri"]
        going = deliver_to(where, outbox, ask=True)
        outbox.put("resume")
    else:
        opened = None if resumed else connect(where, experiment)
        going = begin_run(where, experiment, opened, file, name, {"mlflow.source.name": "clstream", **(tags or {})})
        outbox = going.outbox
    going.try_now()
    parent, status = ParentRun(going, name, seeds), "FAILED"
    try:
        yield parent
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        outbox.put("tags", values={"error": _clean(f"{type(error).__name__}: {error}"[:5000])})
        raise
    finally:
        parent.draw(last=True)
        outbox.put("end", status=status, at=_now())
        going.try_now(last=True)
        if status == "FINISHED":
            parent.say_what_is_missing()


class Renewal:
    """When a picture is drawn anew: at most every 30 seconds, and not before a twentieth of the time since the start has passed.

    So a run of a day has 130 of them, not 2,880.
    """

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time; then it is not again for a while."""
        now = time.monotonic()
        if now - self.last < max(30.0, (now - self.start) / 20):
            return False
        self.last = now
        return True


class ParentRun:
    """The MLflow run above those of several seeds: their mean and standard deviation, under the names and steps of theirs.

    A step is written once, when the last of the seeds has passed it. Until then what the others had there is kept, in the
    journal too.
    """

    def __init__(self, going: Delivery, name: str, seeds: Sequence[int]) -> None:
        self.delivery, self.name, self.seeds = going, name, tuple(seeds)
        self.waiting: dict[tuple[str, int], dict[int, float]] = {}
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.drawn: tuple[int, ...] = ()
        self.picture = ""
        self.renewal = Renewal()
        self.described = False
        journal = going.outbox.journal
        for entry in entries(journal.file) if journal is not None else ():
            self.described |= entry.get("do") == "params"
            if "seed" in entry:
                self._take(entry["seed"], entry["points"])
        self._write()

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None if a resumed run was never created, and the server is away."""
        return self.delivery.outbox.run_id

    def check(self, seed: int) -> None:
        """Refuse the run of another seed, and one that begins when the parent is over."""
        if self.delivery.outbox.ended:
            raise ValueError(f"the parent run {self.name!r} is over: run its seeds within `with parent_run(...)`")
        if seed not in self.seeds:
            raise ValueError(f"the parent run {self.name!r} is of the seeds {self.listed}, not of {seed}")

    @property
    def listed(self) -> str:
        """The seeds, as text."""
        return ",".join(map(str, self.seeds))

    def describe(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Write what the first seed says of itself, but for the seed: the others share it."""
        if self.described:
            return
        self.described = True
        shared = {key: str(value)[:6000] for key, value in params.items() if key != "seed"} | {"seeds": self.listed}
        self.delivery.outbox.put("params", values=shared)
        self.delivery.outbox.put("tags", values={key: tags[key] for key in tags if not key.startswith("mlflow.")})
        self.delivery.try_now()

    def add(self, seed: int, points: Sequence[tuple[str, int, float]]) -> None:
        """Take (name, step, value) points of a seed, again if need be, and write the mean where all seeds have a value."""
        written = self.delivery.outbox.points
        new = [
            (name, step, value)
            for name, step, value in points
            if (name, step) not in written and seed not in self.waiting.get((name, step), {})
        ]
        if new:
            self.delivery.outbox.keep(seed=seed, points=new)
            self._take(seed, new)
            self._write()

    def _take(self, seed: int, points: Sequence[Sequence[Any]]) -> None:
        for name, step, value in points:
            self.waiting.setdefault((name, step), {})[seed] = value

    def _write(self) -> None:
        written, found = self.delivery.outbox.points, list[tuple[str, int, float]]()
        for (name, step), values in list(self.waiting.items()):
            if len(values) < len(self.seeds):
                continue
            del self.waiting[name, step]
            each = np.array([values[seed] for seed in self.seeds])
            found.append((name, step, float(each.mean())))
            if len(each) > 1:
                found.append((f"std/{name}", step, float(each.std(ddof=1))))
        new = [point for point in found if point[:2] not in written]
        if new:
            self.delivery.outbox.put("metrics", at=_now(), points=new)
            self.delivery.try_now()

    def see(self, seed: int, found: Evaluation, sessions: Tensor) -> None:
        """Take what a seed measured so far, for the picture; see `delivered` for `sessions`."""
        self.seen[seed] = found.main, found.taught, sessions
        self.draw()

    def draw(self, last: bool = False) -> None:
        """Draw the mean over the seeds that came farthest, if there is something new, and time for it, or it is the last time."""
        rows = max((len(main) for main, _, _ in self.seen.values()), default=0)
        there = [seed for seed in self.seeds if seed in self.seen and len(self.seen[seed][0]) == rows]
        new = (rows, *there)
        if new != self.drawn and rows and (last or self.renewal.due()):
            self.drawn = new
            self._draw(there)
        if last and self.picture:
            self.delivery.outbox.put("artifact", name="forgetting_curves.png", base64=self.picture)
        self.delivery.try_now()

    def _draw(self, there: Sequence[int]) -> None:
        title = self.name if len(there) == len(self.seeds) else f"{self.name}: {len(there)} so far"
        accuracy, taught, begun = (torch.stack([self.seen[seed][part] for seed in there]) for part in range(3))
        self.picture = base64.b64encode(as_png(forgetting_curves(accuracy, taught, title, begun))).decode()
        self.delivery.outbox.put("image", key=PICTURE, base64=self.picture, at=_now())

    def say_what_is_missing(self) -> None:
        """Warn if the parent ended well, but not all of its seeds did."""
        absent = [seed for (name, _), values in self.waiting.items() if name == "accuracy/mean" for seed in self.seeds
                  if seed not in values]  # fmt: skip
        if absent:
            warnings.warn(
                f"the curves of {self.name!r} end before those of some of its seeds: a mean needs all of {self.listed}, and "
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
    """Write an MLflow run with a picture of some runs against each other, and return its id; None if the server is away.

    Args:
        results: by name, what each seed of a run measured.
        experiment, uri: as for `MlflowTracker`.
        began: when, in seconds since 1970; MLflow shows the pictures of earlier runs first. None: now.

    """
    name = f"comparison of {', '.join(results)}"
    pairs = {
        each: (torch.stack([one.main for one in seeds]), torch.stack([one.taught for one in seeds]))
        for each, seeds in results.items()
    }
    picture = base64.b64encode(as_png(compared_curves(pairs))).decode()
    going = begin_run(tracking_uri(uri), experiment, None, None, name, {"mlflow.source.name": "clstream"}, began)
    going.outbox.put("image", key=PICTURE, base64=picture, at=_now())
    going.outbox.put("artifact", name="comparison.png", base64=picture)
    going.outbox.put("end", status="FINISHED", at=_now())
    going.try_now(last=True)
    return going.outbox.run_id


def delivered(stream: Stream, sessions: int, before: Tensor | None = None) -> Tensor:
    """Return which tasks the first sessions had samples of: (sessions, tasks), bool; `before` has the first rows of it."""
    rows = [] if before is None else list(before)
    return torch.stack([*rows, *(stream.mix(session) > 0 for session in range(len(rows), sessions))])


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def writable(folder: Path) -> Path:
    """Return a folder, absolute, made if it isn't there; OSError if it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the run folder {folder} can't be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise OSError(f"the run folder {folder} can't be written: choose another")
    return folder.absolute()


def _now() -> int:
    """Return the time as MLflow counts it: milliseconds since 1970."""
    return int(time.time() * 1000)


def _clean(text: str) -> str:
    """Return text without the half characters that no database takes; names of files may have them."""
    return text.encode("utf-8", "replace").decode()


def _seen_from(file: Path, journal: Path | None) -> str:
    """Return the name of a file, from the journal's folder on if it is in it: the folder may be moved."""
    if journal is not None and file.is_relative_to(journal.parent):
        return str(file.relative_to(journal.parent))
    return str(file)


def _width(tasks: int) -> int:
    """Return the digits of a task's number in a metric's name: two, so that names sort, or as many as needed."""
    return max(2, len(str(tasks - 1)))


def _commit() -> str | None:
    """Return the git commit of the working folder, if it is in a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
