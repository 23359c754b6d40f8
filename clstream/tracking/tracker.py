"""Tracking: a run's curves, params and pictures in MLflow.

The step of a metric is the number of sessions finished; for `anytime/...` it is the number of batches learned. What an
evaluation found is written at once, in one batch, or with what the next ones find where sessions are short; nothing is
written per batch of the stream.

All of it goes through an outbox: what the server doesn't take waits there, and the run goes on.
"""

from __future__ import annotations

import base64
import math
import os
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clstream import __version__, events
from clstream.bus import on
from clstream.engine.run_params import params_of
from clstream.figures import accuracy_matrix, forgetting_curves
from clstream.files import check_writable
from clstream.params import reason_of
from clstream.results import Evaluation, write_csv
from clstream.tracking.curves import Curve, Curves
from clstream.tracking.mlflow_store import connect, has_run, make_uploader, tracking_uri, without_password
from clstream.tracking.model_versions import ModelVersions
from clstream.tracking.outbox import FILE, Outbox
from clstream.tracking.parent_runs import ParentRun
from clstream.tracking.picture_timer import PictureTimer
from clstream.tracking.runs import PICTURE, _clean, _commit, _now, _seen_from, as_png, begin_run
from clstream.tracking.uploader import LONGEST_PAUSE, Uploader, default_journal


class MlflowTracker(Curves):
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
            loses nothing. None: nothing is on disk until something can't be sent, then it is in runs/<MLflow run id>; a killed
            process loses what its last short sessions found, but not what a checkpoint counts as done.
        files: become artifacts at the end, those that are there; of a folder all files in it, in a folder of its name. They have
            to stay where they are until they are sent.
        allow_offline: whether a server that is away at the start is no error: for a run that is resumed, or follows another one.
        log_model: "end": a run that came to its end logs its strategy as an MLflow model, and registers it as the next version of
            a name; "sessions": at each evaluation that follows a session. "": not.
        model_name: that name. None: the strategy and the stream, "Replay-split_mnist".

    Raises:
        ConnectionError, OSError: at once, if the server doesn't answer or the store or the folder can't be written.

    """

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
        allow_offline: bool = False,
        log_model: str = "",
        model_name: str | None = None,
    ) -> None:
        self.models = ModelVersions(log_model, model_name, None if folder is None else Path(folder).absolute())
        self.experiment, self.uri = experiment, tracking_uri(uri)
        self.uri_given = uri is not None or "MLFLOW_TRACKING_URI" in os.environ
        self.connection = None if allow_offline else connect(self.uri, experiment)
        self.name, self.config = name, config
        self.parent = parent if isinstance(parent, ParentRun) else None
        above = parent.run_id if isinstance(parent, ParentRun) else parent
        self.tags = dict(tags or {}) | ({"mlflow.parentRunId": above} if above else {})
        self.file = None if folder is None else check_writable(Path(folder)) / FILE
        self.files = [Path(file).absolute() for file in files]
        self.uploader: Uploader | None = None
        self._reset()

    def _reset(self) -> None:
        self._reset_curves()
        self.is_open = False
        self.picture_timer = PictureTimer()
        self.code_versions = 1

    @property
    def experiment_id(self) -> str | None:
        """The id of the MLflow experiment; None if the server was not asked for it, as where a run goes on."""
        return None if self.connection is None else self.connection[1]

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, of the last one if it is over; None while there is none."""
        return None if self.uploader is None else self.uploader.outbox.run_id

    @on(events.RunStarted)
    def open(self, event: events.RunStarted) -> None:
        """Open an MLflow run, with its params and tags; one that is resumed has its own, which `load_state_dict` takes up."""
        self._start_curves(event)
        if self.parent is not None:
            self.parent.check(event.seed)
        self.models.check(event)
        if not event.resumed:
            self._create()

    def _create(self) -> Outbox:
        if self.started is None:
            raise RuntimeError("a tracker has a state, and writes, only while a run goes on")
        stream = self.started.stream
        commit = _commit()
        tags = {
            "mlflow.source.name": "clstream",
            "clstream": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "data_fingerprint": stream.fingerprint,
            **({"git_commit": commit} if commit else {}),
            **self._lineage(),
            **self.tags,
        }
        self.uploader = begin_run(self.uri, self.experiment, self.connection, self.file, self.name or self.title, tags)
        outbox, self.is_open = self.uploader.outbox, True
        params = params_of(self.started)
        outbox.put("params", values={key: str(value)[:6000] for key, value in params.items()})
        outbox.put("artifact", name="stream.txt", text=str(stream))
        if self.config is not None:
            outbox.put("artifact", name="config.yaml", text=self.config)
        self._put_code()
        self.uploader.upload()
        if self.parent is not None:
            self.parent.describe(params, tags)
        return outbox

    def _lineage(self) -> dict[str, str]:
        """Return the tags that name the MLflow run of the run that this one continues, with a link as the run's description."""
        notes = None if self.started is None or self.started.run is None else self.started.run.continues
        run_id, experiment = (notes or {}).get("mlflow run"), (notes or {}).get("mlflow experiment")
        if run_id is None:
            return {}
        link = f"[{run_id}](#/experiments/{experiment}/runs/{run_id})" if experiment else run_id
        return {"continues": run_id, "mlflow.note.content": f"It continues the run {link}."}

    def _note(self) -> None:
        """Note which MLflow run it is, for a run that continues this one."""
        if self.started is not None and self.started.run is not None and self.run_id is not None:
            self.started.run.notes["mlflow run"] = self.run_id
            if self.experiment_id is not None:
                self.started.run.notes["mlflow experiment"] = self.experiment_id

    def _put_code(self, folder: str = "code") -> None:
        """Write the source of the user's own modules, so that the run can be repeated."""
        if self.uploader is not None and self.started is not None and self.started.run is not None:
            for name, text in self.started.run.source_files.items():
                self.uploader.outbox.put("artifact", name=f"{folder}/{name}", text=_clean(text))

    @property
    def outbox(self) -> Outbox:
        """The outbox to write to; a run that was resumed without the state of a tracker gets an MLflow run of its own."""
        return self.uploader.outbox if self.uploader is not None and self.is_open else self._create()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on in the same MLflow run: plain values and tensors."""
        outbox = self.outbox
        if outbox.journal is None and self.uploader is not None:
            self.uploader.upload()  # what waits would be lost with the process
        self._note()
        head = outbox.head | ({"run_id": outbox.run_id} if outbox.run_id else {})
        return {"outbox": head, **self._curves_state(), "code_versions": self.code_versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the MLflow run of a state. A server that is away is no error here.

        Raises:
            OSError: if the journal in the run's folder can't be read or written, or another process writes to it.
            ValueError: if the journal is that of another run, or this tracker's own server has no such run.

        """
        recorded = dict(state["outbox"])
        uri = self._same_server(recorded)
        file = self.file or default_journal(Path("runs").absolute(), recorded)
        if file.exists():
            outbox = Outbox.read(file)
            if outbox.head["key"] != recorded["key"]:
                outbox.close()
                raise ValueError(f"{file} is the journal of another run: resume each run in its own folder")
        else:
            outbox = Outbox(recorded)
            if self.file is not None:
                outbox.open_journal(self.file)
        if outbox.head["uri"] != without_password(uri):
            outbox.note(uri=without_password(uri))
        self.uploader, self.is_open = make_uploader(uri, outbox, check_steps=True), True
        self._load_curves(state)
        self.code_versions = state["code_versions"]
        outbox.put("resume")
        changed = [] if self.started is None or self.started.run is None else self.started.run.changed_code
        if changed:
            outbox.put("tags", values={"changed_code": _clean("; ".join(changed)[:5000])})
            self.code_versions += 1
            self._put_code(f"code.{self.code_versions}")
        self.uploader.upload()

    def _same_server(self, recorded: Mapping[str, str]) -> str:
        """Return where a recorded run goes on: where it was, or where this tracker writes to, if the run is there."""
        run_id, before = recorded.get("run_id"), recorded["uri"]
        if without_password(self.uri) == before or run_id is None:
            return self.uri
        if not self.uri_given:
            return before
        ours = without_password(self.uri)
        try:
            has_it = has_run(self.uri, run_id)
        except Exception as error:  # noqa: BLE001  # each kind of store has its own
            warnings.warn(
                f"{ours} doesn't say whether it has the MLflow run {run_id} ({reason_of(error)}): it goes on at {before}",
                RuntimeWarning,
                stacklevel=2,
            )
            return before
        if not has_it:
            raise ValueError(f"the MLflow run {run_id} is at {before}, not at {ours}: leave --tracking_uri out, or give that one")
        warnings.warn(f"the MLflow run {run_id} was at {before}, and goes on at {ours}", RuntimeWarning, stacklevel=2)
        return self.uri

    @on(events.BatchLearned)
    def count(self, event: events.BatchLearned) -> None:
        """Keep the loss, and count the samples; in a long session, send what the short ones before it left."""
        super().count(event)
        if self.uploader is not None and not self.uploader.offline and time.perf_counter() - self.began > LONGEST_PAUSE:
            self.uploader.upload_in_turn()

    @on(events.Evaluated)
    def write(self, event: events.Evaluated) -> None:
        """Write what the evaluation found; evaluations within a session go with the session's own."""
        self.evaluation = event.evaluation
        self._note()
        if event.evaluation.within_session:
            return
        self._log(self._of_session(event.evaluation))
        if self.picture_timer.due():
            self._picture(event.evaluation)
        if self.models.when == "sessions":
            self._put_model(event.evaluation)
        assert self.uploader is not None
        self.uploader.upload_in_turn()
        if self.parent is not None:
            assert self.started is not None
            assert self.tasks_by_row is not None
            self.parent.update(self.started.seed, event.evaluation, self.tasks_by_row)

    def _picture(self, evaluation: Evaluation) -> bytes:
        """Draw the forgetting curves, for MLflow's charts, and return the picture."""
        image = as_png(forgetting_curves(
            evaluation.main, evaluation.taught, self.title, self.tasks_by_row, evaluation.sessions, evaluation.main_name
        ))  # fmt: skip
        self.outbox.put("image", key=PICTURE, base64=base64.b64encode(image).decode(), at=_now())
        return image

    def _put_model(self, evaluation: Evaluation) -> None:
        self.models.put(self.outbox, evaluation.sessions_finished, lambda file: _seen_from(file, self.file))

    def _log(self, curves: Mapping[str, Curve]) -> None:
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
        if not self.is_open or self.uploader is None:  # it never began
            self._reset()
            return
        outbox, error, evaluation = self.uploader.outbox, event.error, self.evaluation
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            if error is not None:
                outbox.put("tags", values={"error": _clean(f"{type(error).__name__}: {error}"[:5000])})
                outbox.put("artifact", name="error.txt", text="".join(traceback.format_exception(error)))
            if evaluation is not None:
                self._log(self._probes())  # those since the last session that ended
            if evaluation is not None and len(evaluation.accuracy):
                if error is None:  # else it may be resumed, and these have one value
                    self._log(self._of_run(evaluation))
                    if self.models.when == "end":
                        self._put_model(evaluation)
                self._artifacts(evaluation)
        finally:
            for place in self.files:
                files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
                for file in files:
                    folder = {} if file == place else {"folder": file.parent.relative_to(place.parent).as_posix()}
                    outbox.put("file", path=_seen_from(file, self.file), **folder)
            outbox.put("end", status=status, at=_now())
            self._reset()
            self.uploader.upload(last=True)
            if not outbox.pending:
                self.models.clear()

    def _artifacts(self, evaluation: Evaluation) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tasks = len(evaluation.targets)
            for name, matrix in evaluation.measured.items():
                view = f"task_il_{name.removeprefix('task_')}" if name.startswith("task_") else name
                view = view.replace(":", "_")
                plain = name in ("accuracy", "task_accuracy") and tasks + 1 == len(evaluation.test_sets)
                written, names = (matrix[:, :tasks], ()) if plain else (matrix, evaluation.test_sets)
                write_csv(written, evaluation.taught, folder / f"{view}.csv", evaluation.sessions, names=names)
                if name in evaluation.main_names or (name in ("accuracy", "task_accuracy") and "label" in evaluation.targets):
                    picture = accuracy_matrix(matrix[:, :tasks], f"{self.title}: {view}", evaluation.sessions, name)
                    picture.savefig(folder / f"{view}.png", dpi=120)
            if len(evaluation.probes) > len(evaluation.accuracy):
                steps = evaluation.probe_steps
                write_csv(evaluation.probes, evaluation.probe_taught, folder / "anytime.csv", steps, "batches_learned")
            (folder / "forgetting_curves.png").write_bytes(self._picture(evaluation))
            for file in sorted(folder.iterdir()):
                self.outbox.put("artifact", name=file.name, base64=base64.b64encode(file.read_bytes()).decode())
