"""Tracking: a run's curves, params and pictures in MLflow.

The step of a metric is the number of sessions finished; for `anytime/...` it is the number of batches learned. What an
evaluation found is written at once, in one batch; nothing is written per batch of the stream.

All of it goes through an outbox: what the server doesn't take waits there, and the run goes on.
"""

from __future__ import annotations

import base64
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clstream import __version__, events, metrics
from clstream.bus import on
from clstream.engine import described
from clstream.evaluation import Evaluation
from clstream.figures import accuracy_matrix, forgetting_curves
from clstream.journal import set_aside
from clstream.outbox import FILE, Delivery, Outbox, reason_of, spooled
from clstream.store import Opened, connect, deliver_to, has_run, tracking_uri, without_password

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


def begin_run(uri: str, experiment: str, opened: Opened | None, file: Path | None, name: str, tags: Mapping[str, str]) -> Delivery:
    """Begin a new MLflow run, with a journal at `file`. If `opened`, it is created at once, or OSError raised; else when it can."""
    if file is not None:
        end_earlier(file)
    outbox = Outbox({"uri": without_password(uri), "experiment": experiment, "key": uuid.uuid4().hex})
    if file is not None:
        outbox.keep_in(file)
    going = deliver_to(uri, outbox, opened)
    outbox.put("create", name=name, tags=dict(tags), at=_now())
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
        parent: id of the MLflow run that this one is shown under.
        config: what was asked for, as text; kept as the artifact config.yaml.
        tags: more tags.
        folder: of the run. All that is written lies in its file tracking.jsonl before it is sent, so that a killed process
            loses nothing. None: nothing is on disk until something can't be sent, then it is in runs/<MLflow run id>.
        files: become artifacts at the end, those that are there; they have to stay where they are until they are sent.
        patient: whether a server that is away at the start is no error; for a run that goes on, or follows one that went well.

    Raises:
        ConnectionError, OSError: at once, if the server doesn't answer or the store or the folder can't be written.

    """

    def __init__(
        self,
        experiment: str = "clstream",
        uri: str | None = None,
        name: str | None = None,
        parent: str | None = None,
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
        self.tags = dict(tags or {}) | ({"mlflow.parentRunId": parent} if parent else {})
        self.file = None if folder is None else writable(Path(folder)) / FILE
        self.files = [Path(file).absolute() for file in files]
        self.delivery: Delivery | None = None
        self._reset()

    def _reset(self) -> None:
        self.is_open = False
        self.started: events.RunStarted | None = None
        self.evaluation: Evaluation | None = None
        self.probes_written = 0
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
        self.delivery.try_now()
        return outbox

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
        self.counts, self.probes_written, found = dict(state["counts"]), state["probes_written"], state["evaluation"]
        self.evaluation = found and Evaluation(**dict(found) | {"probe_steps": tuple(found["probe_steps"])})
        outbox.put("resume")
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
        found = session_metrics(event.evaluation)
        found["seconds"] = time.perf_counter() - self.start
        losses = self._losses()
        if losses is not None:
            found["loss"] = float(losses.mean())
            found["samples_per_second"] = self.samples / self.learning if self.learning else math.nan
        self._log(
            {name: [(len(event.evaluation.accuracy), value)] for name, value in (found | self.counts).items()} | self._probes()
        )
        assert self.delivery is not None
        self.delivery.try_now()

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
        points = [
            [name, step, value]
            for name, curve in curves.items()
            for step, value in curve
            if math.isfinite(value) and (name, step) not in outbox.points
        ]
        if points:
            outbox.put("metrics", at=_now(), points=points)

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
                    self._log({name: [(len(found.accuracy), value)] for name, value in final_metrics(found).items()})
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
                write_csv(matrix, folder / f"{view}.csv")
                accuracy_matrix(matrix, f"{self.title}: {view}").savefig(folder / f"{view}.png", dpi=120)
            forgetting_curves(found.main, found.taught, self.title).savefig(folder / "forgetting_curves.png", dpi=120)
            for file in sorted(folder.iterdir()):
                self.outbox.put("artifact", name=file.name, base64=base64.b64encode(file.read_bytes()).decode())


def session_metrics(found: Evaluation) -> dict[str, float]:
    """Return the metrics of the last row, by MLflow name; NaN where one is not defined."""
    taught = found.taught
    width = _width(len(found.baseline))
    values: dict[str, float] = {}
    for prefix, matrix, baseline in (("", found.accuracy, found.baseline), ("task_il/", found.task_accuracy, found.task_baseline)):
        lost = metrics.forgetting_max_earlier_minus_last(matrix, taught)
        for task in range(len(baseline)):
            values[f"{prefix}accuracy/task_{task:0{width}d}"] = float(matrix[-1, task])
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
    experiment: str = "clstream",
    uri: str | None = None,
    tags: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    resumed: bool = False,
) -> Iterator[ParentRun]:
    """Open the MLflow run that the runs of several seeds are shown under; it ends as they do.

    Args:
        name: of the MLflow run.
        experiment, uri, tags, folder: as for `MlflowTracker`; the folder is another one than theirs.
        resumed: go on in the MLflow run whose journal is in the folder; if there is none, a new one is created.

    Raises:
        ConnectionError, OSError: if the server doesn't answer, unless `resumed`, or the store or the folder can't be written.

    """
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
    status = "FAILED"
    try:
        yield ParentRun(going)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        outbox.put("end", status=status, at=_now())
        going.try_now(last=True)


class ParentRun:
    """The MLflow run above those of several seeds."""

    def __init__(self, going: Delivery) -> None:
        self.delivery = going

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None if a resumed run was never created, and the server is away."""
        return self.delivery.outbox.run_id

    def summarise(self, params: Mapping[str, object], values: Mapping[str, list[float]]) -> None:
        """Write what the seeds share as params, and the mean and sample standard deviation of their values as metrics."""
        outbox = self.delivery.outbox
        points: dict[str, float] = {}
        for name, each in values.items():
            if all(map(math.isfinite, each)):
                points[f"{name}/mean"] = float(np.mean(each))
                if len(each) > 1:
                    points[f"{name}/spread"] = float(np.std(each, ddof=1))
        new = [[name, 0, value] for name, value in points.items() if (name, 0) not in outbox.points]
        if new:
            outbox.put("metrics", at=_now(), points=new)
        outbox.put("params", values={key: str(value)[:6000] for key, value in params.items()})
        self.delivery.try_now()


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


def write_csv(matrix: Tensor, file: Path) -> None:
    """Write an accuracy matrix: a row for each session, a column for each task, all digits."""
    rows = [",".join(["session", *(f"task_{task}" for task in range(matrix.shape[1]))])]
    rows += [",".join([str(index), *(repr(float(value)) for value in row)]) for index, row in enumerate(matrix)]
    file.write_text("\n".join(rows) + "\n")


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
