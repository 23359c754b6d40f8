"""Tracking: a run's curves, params and pictures in MLflow. The only file that imports mlflow.

The step of a metric is the number of sessions finished; for `anytime/...` it is the number of batches learned. What an
evaluation found is written at once, in one batch; nothing is written per batch of the stream.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import subprocess
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from torch import Tensor

from clstream import __version__, events, metrics
from clstream.bus import on
from clstream.engine import described
from clstream.evaluation import Evaluation
from clstream.figures import accuracy_matrix, forgetting_curves

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a user's runs are the user's business

from filelock import FileLock, Timeout
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

_PER_WRITE = 1000  # metrics that MLflow takes in one batch
_OWN = frozenset(kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event))


def tracking_uri(uri: str | None = None) -> str:
    """Return where runs are tracked: `uri`, else MLFLOW_TRACKING_URI, else the file mlflow.db in the working folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def connect(uri: str | None = None, experiment: str = "clstream") -> tuple[MlflowClient, str]:
    """Return a client and the id of the experiment, which is made if it isn't there.

    Raises:
        ConnectionError: if a server doesn't answer within 5 seconds.
        OSError: if the store can't be opened or written.

    """
    where = tracking_uri(uri)
    if where.startswith(("http://", "https://")):
        address = urlsplit(where)
        plain = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
        try:
            urllib.request.urlopen(f"{plain.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers; whether it lets us in, the next call says
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"the tracking server {where} does not answer ({error}): start it, or choose another --tracking-uri"
            ) from None
    elif where.startswith("sqlite:///"):
        folder = Path(where.removeprefix("sqlite:///")).absolute().parent
        if not os.access(folder, os.W_OK):
            raise OSError(f"the tracking store {where} can't be written: the folder {folder} is missing or read-only")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new store's dozens of migrations are no news
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    try:
        # two runs that start at once would make the tables of a new store at once, and one of them would fail
        with FileLock(Path(tempfile.gettempdir()) / f"clstream-{name}.lock", timeout=120):
            client = MlflowClient(where)
            found = client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                raise OSError(f"the MLflow experiment {experiment!r} was deleted: restore it, or choose another name")
            if found is not None:
                return client, found.experiment_id
            # the UI shows an experiment without this tag as one of language models, without its curves in the first place
            return client, client.create_experiment(experiment, tags={"mlflow.experimentKind": "custom_model_development"})
    except (MlflowException, SQLAlchemyError, Timeout) as error:
        raise OSError(f"the tracking store {where} can't be used: {str(error).splitlines()[0]}") from None


class MlflowTracker:
    """Writes a run to MLflow: accuracy, forgetting and transfer by session, and pictures at the end.

    Args:
        experiment: the MLflow experiment; made if it isn't there.
        uri: where; see `tracking_uri`.
        name: of the MLflow run. None: the strategy, the stream and the seed.
        parent: id of the MLflow run that this one is shown under.
        config: what was asked for, as text; kept as the artifact config.yaml.
        tags: more tags.

    Raises:
        ConnectionError, OSError: at once, if the server doesn't answer or the store can't be written.

    """

    def __init__(
        self,
        experiment: str = "clstream",
        uri: str | None = None,
        name: str | None = None,
        parent: str | None = None,
        config: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.client, self.experiment_id = connect(uri, experiment)
        self.name, self.config = name, config
        self.tags = dict(tags or {}) | ({"mlflow.parentRunId": parent} if parent else {})
        self._reset()

        self.run_id: str | None = None

    def _reset(self) -> None:
        self.is_open = False
        self.evaluation: Evaluation | None = None
        self.probes_written = 0
        self.samples, self.losses = 0, list[Tensor]()
        self.learning, self.began = 0.0, 0.0
        self.counts: dict[str, float] = {}

    @on(events.RunStarted)
    def open(self, event: events.RunStarted) -> None:
        """Open an MLflow run, with its params and tags."""
        stream, strategy = event.stream, event.strategy
        self.stream = stream
        self.title = f"{type(strategy).__name__} on {stream.name}, seed {event.seed}"
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
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.name or self.title)
        self.run_id, self.is_open = run.info.run_id, True
        params = described(strategy, stream, event.seed, stream.device or "cpu")
        self.client.log_batch(self.run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
        self.client.log_text(self.run_id, str(stream), "stream.txt")
        if self.config is not None:
            self.client.log_text(self.run_id, self.config, "config.yaml")
        self.start = time.perf_counter()

    @on(events.SessionStarted)
    def begin(self, event: events.SessionStarted) -> None:
        """Start the clock of the session."""
        self.began, self.samples, self.losses = time.perf_counter(), 0, []

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
        """Count the events that strategies and detectors emit."""
        if type(event) not in _OWN:
            name = f"events/{type(event).__name__}"
            self.counts[name] = self.counts.get(name, 0) + 1

    @on(events.Evaluated)
    def write(self, event: events.Evaluated) -> None:
        """Write what the evaluation found, in one batch; evaluations within a session go with the session's own."""
        self.evaluation = event.evaluation
        if event.evaluation.within_session:
            return
        found = session_metrics(event.evaluation)
        found["seconds"] = time.perf_counter() - self.start
        if self.losses:
            found["loss"] = float(torch.stack(self.losses).mean())
            found["samples_per_second"] = self.samples / self.learning if self.learning else math.nan
        self._log(
            {name: [(len(event.evaluation.accuracy), value)] for name, value in (found | self.counts).items()} | self._probes()
        )

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
        """Write (step, value) points of metrics; what is not defined is left out."""
        now = int(time.time() * 1000)
        points = [
            Metric(name, value, now, step) for name, curve in curves.items() for step, value in curve if not math.isnan(value)
        ]
        assert self.run_id is not None
        for first in range(0, len(points), _PER_WRITE):
            self.client.log_batch(self.run_id, metrics=points[first : first + _PER_WRITE])

    @on(events.RunEnded)
    def close(self, event: events.RunEnded) -> None:
        """Write the pictures and the matrix of what there is, and end the run: FINISHED, FAILED or KILLED."""
        if not self.is_open or self.run_id is None:  # it never began
            self._reset()
            return
        status = "FINISHED" if event.error is None else "KILLED" if isinstance(event.error, KeyboardInterrupt) else "FAILED"
        try:
            if event.error is not None:
                self.client.set_tag(self.run_id, "error", f"{type(event.error).__name__}: {event.error}"[:5000])
                self.client.log_text(self.run_id, "".join(traceback.format_exception(event.error)), "error.txt")
            if self.evaluation is not None:
                self._log(self._probes())  # those since the last session that ended
            if self.evaluation is not None and len(self.evaluation.accuracy):
                self._log(
                    {name: [(len(self.evaluation.accuracy), value)] for name, value in final_metrics(self.evaluation).items()}
                )
                self._artifacts(self.evaluation)
        finally:
            self._reset()
            self.client.set_terminated(self.run_id, status)

    def _artifacts(self, found: Evaluation) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            views = [("accuracy", found.accuracy), ("task_il_accuracy", found.task_accuracy)]
            for view, matrix in views:
                write_csv(matrix, folder / f"{view}.csv")
                accuracy_matrix(matrix, f"{self.title}: {view}").savefig(folder / f"{view}.png", dpi=120)
            forgetting_curves(found.main, found.taught, self.title).savefig(folder / "forgetting_curves.png", dpi=120)
            assert self.run_id is not None
            self.client.log_artifacts(self.run_id, name)


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
    name: str, experiment: str = "clstream", uri: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[ParentRun]:
    """Open the MLflow run that the runs of several seeds are shown under; it ends as they do."""
    client, experiment_id = connect(uri, experiment)
    run = client.create_run(experiment_id, tags={"mlflow.source.name": "clstream", **(tags or {})}, run_name=name)
    status = "FAILED"
    try:
        yield ParentRun(client, run.info.run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run.info.run_id, status)


class ParentRun:
    """The MLflow run above those of several seeds."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def summarise(self, params: Mapping[str, object], values: Mapping[str, list[float]]) -> None:
        """Write what the seeds share as params, and the mean and sample standard deviation of their values as metrics."""
        now = int(time.time() * 1000)
        points = []
        for name, each in values.items():
            defined = [value for value in each if not math.isnan(value)]
            if len(defined) == len(each):
                points.append(Metric(f"{name}/mean", float(np.mean(each)), now, 0))
            if len(defined) == len(each) > 1:
                points.append(Metric(f"{name}/spread", float(np.std(each, ddof=1)), now, 0))
        self.client.log_batch(self.run_id, metrics=points, params=[Param(key, str(value)[:6000]) for key, value in params.items()])


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
