"""The MLflow store, a server or a file, and how it is written. But for `mlflow_models`, the only file that imports mlflow."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from mlflow.entities import Metric, Param, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from clstream.measures import MAIN
from clstream.params import reason_of
from clstream.tracking.addresses import check_answers as check_answers
from clstream.tracking.addresses import tracking_uri as tracking_uri
from clstream.tracking.addresses import without_password as without_password
from clstream.tracking.mlflow_schema import check_schema
from clstream.tracking.outbox import MOST_POINTS, Item, Outbox, is_plain_name
from clstream.tracking.uploader import Uploader

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a user's runs are the user's business


os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # a server that hangs must not hold up a run: MLflow waits 2 minutes,


os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # 7 times; what it doesn't take in time waits in the outbox


Connection = tuple[MlflowClient, str]
"""What `connect` returns: a client, and the id of the experiment."""


def connect(uri: str | None = None, experiment: str = "clstream") -> Connection:
    """Return a client and the id of the experiment, which is made if it isn't there.

    Raises:
        ConnectionError: if a server doesn't answer within 5 seconds.
        OSError: if the store can't be opened or written, or has the tables of another version of MLflow.

    """
    where = tracking_uri(uri)
    check_answers(where)
    if where.startswith("sqlite:///"):
        folder = Path(where.removeprefix("sqlite:///")).absolute().parent
        if not os.access(folder, os.W_OK):
            raise OSError(f"the tracking store {where} can't be written: the folder {folder} is missing or read-only")
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    # two runs that start at once would make the tables of a new store at once, and one of them would fail
    with store_errors(where), FileLock(Path(tempfile.gettempdir()) / f"clstream-{name}.lock", timeout=120):
        check_schema(where, without_password(where))
        client = MlflowClient(where)
        existing = client.get_experiment_by_name(experiment)
        if existing is not None and existing.lifecycle_stage == "deleted":
            raise OSError(f"the MLflow experiment {experiment!r} was deleted: restore it, or choose another name")
        if existing is not None:
            return client, existing.experiment_id
        # the UI shows an experiment without this tag as one of language models, without its curves in the first place
        return client, client.create_experiment(experiment, tags={"mlflow.experimentKind": "custom_model_development"})


def open_to_read(uri: str | None = None) -> MlflowClient:
    """Return a client of a store that is there, to read it: nothing is made or altered.

    Raises:
        ConnectionError: if a server doesn't answer within 5 seconds.
        OSError: if there is no store, it can't be opened, or has the tables of another version of MLflow.

    """
    where = tracking_uri(uri)
    check_answers(where)
    place = where.removeprefix("sqlite:///")
    if (where.startswith("sqlite:///") or ":" not in where) and not os.path.exists(place):
        raise OSError(f"there is no tracking store {where}: give another --tracking-uri")
    with store_errors(where):
        check_schema(where, without_password(where))
        return MlflowClient(where)


@contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Raise OSError, in a sentence, for what goes wrong with a store."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new store's dozens of migrations are no news
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what fails is said in one sentence, by us
    try:
        yield
    except ModuleNotFoundError as error:  # SQLAlchemy asks for the driver that the scheme names
        raise OSError(f"the tracking store {without_password(where)} needs the Python package {error.name}: install it") from None
    except (MlflowException, SQLAlchemyError, Timeout) as error:
        raise OSError(f"the tracking store {without_password(where)} can't be used: {reason_of(error)}") from None


class Sender:
    """Sends the items of an outbox to MLflow: the only place where a run is written.

    Args:
        outbox: whose items.
        uri: where to, with the password if it takes one.
        connection: what `connect` returned, if it was called.
        check_steps: whether the store is asked which steps it has before metrics are sent: where a run was resumed.

    """

    def __init__(self, outbox: Outbox, uri: str, connection: Connection | None = None, check_steps: bool = False) -> None:
        self.outbox, self.uri, self.connection, self.check_steps = outbox, uri, connection, check_steps
        self.steps: dict[str, set[int]] = {}

    @property
    def client(self) -> MlflowClient:
        """The client, made when it is first needed: for a file of SQLite that alone may fail."""
        if self.connection is None:
            self.connection = connect(self.uri, self.outbox.head["experiment"])
        return self.connection[0]

    def __call__(self, items: Sequence[Item], maybe_sent: bool) -> str | None:
        """Send an item, or several of metrics, of which some `maybe_sent` already. Return the id of a run that was created."""
        item = items[0]
        if maybe_sent:
            self.steps.clear()  # what was known may be out of date
        if item["do"] == "create":
            return self.create(item, maybe_sent)
        run_id, client = self.outbox.run_id, self.client
        if run_id is None:
            raise LookupError("the MLflow run was never created")
        match item["do"]:
            case "metrics":
                self.metrics(run_id, items, maybe_sent or self.check_steps)
            case "params":
                client.log_batch(run_id, params=[Param(key, value) for key, value in item["values"].items()])
            case "tags":
                for key, value in item["values"].items():
                    client.set_tag(run_id, key, value)
            case "artifact":
                self.artifact(run_id, item)
            case "image":
                self.image(run_id, item)
            case "file":
                self.file(run_id, item)
            case "register":
                self.register(run_id, item)
            case "resume":
                client.update_run(run_id, "RUNNING")
                if "error" in client.get_run(run_id).data.tags:
                    client.delete_tag(run_id, "error")
            case "end":
                client.set_terminated(run_id, item["status"], item["at"])
            case other:
                raise LookupError(f"this version of clstream can't send {other!r}")
        return None

    def create(self, item: Item, maybe_sent: bool) -> str:
        """Create the run, unless it is there."""
        client, experiment = self.client, self.connection[1] if self.connection else ""
        if maybe_sent:
            for run in client.search_runs([experiment], f"tags.clstream_run = '{self.outbox.head['key']}'", ViewType.ALL):
                return str(run.info.run_id)
        tags = item["tags"] | {"clstream_run": self.outbox.head["key"]}
        return str(client.create_run(experiment, item["at"], tags, item["name"]).info.run_id)

    def metrics(self, run_id: str, items: Sequence[Item], check_steps: bool) -> None:
        """Write the points, each with the time of its item; if `check_steps`, those that the store doesn't have."""
        points = [
            Metric(name, value, item["at"], step)
            for item in items
            for name, step, value in item["points"]
            if not check_steps or self._takes(run_id, name, step)
        ]
        for first in range(0, len(points), MOST_POINTS):
            self.client.log_batch(run_id, metrics=points[first : first + MOST_POINTS])

    def _takes(self, run_id: str, name: str, step: int) -> bool:
        """Return whether the store has no point of a metric at a step yet, and note that it gets one: else it is asked again."""
        if name not in self.steps:
            self.steps[name] = {point.step for point in self.client.get_metric_history(run_id, name)}
        steps = self.steps[name]
        new = step not in steps
        steps.add(step)
        return new

    def artifact(self, run_id: str, item: Item) -> None:
        """Write an artifact whose content is in the item; a name with slashes has it in folders."""
        content = item["text"].encode("utf-8", "replace") if "text" in item else base64.b64decode(item["base64"])
        name = PurePosixPath(item["name"])
        if not is_plain_name(item["name"]):
            raise ValueError(f"an artifact can't be called {item['name']!r}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name.name
            file.write_bytes(content)
            self.client.log_artifact(run_id, str(file), str(name.parent) if name.parent.parts else None)

    def image(self, run_id: str, item: Item) -> None:
        """Write a picture that the UI shows among the charts. Of several with one name and step it shows the newest."""
        with Image.open(io.BytesIO(base64.b64decode(item["base64"]))) as picture:
            self.client.log_image(run_id, picture, key=item["key"], step=0, timestamp=item["at"])

    def register(self, run_id: str, item: Item) -> None:
        """Register a model among the run's artifacts as the next version of a name, unless its tags say that it is one."""
        name, tags = item["name"], item["tags"]
        versions = self.client.search_model_versions(f"run_id = '{run_id}'")
        if any(version.name == name and version.tags.items() >= tags.items() for version in versions):
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{item['path']}"
        self.client.create_model_version(name, source, run_id, tags=dict(tags))

    def file(self, run_id: str, item: Item) -> None:
        """Write an artifact that is a file, named from the journal's folder on, to a folder of artifacts if the item names one."""
        journal = self.outbox.journal
        file = Path(item["path"]) if journal is None else journal.file.parent / item["path"]
        if file.is_file():
            self.client.log_artifact(run_id, str(file), item.get("folder"))
        else:
            warnings.warn(f"the artifact {file} is gone, so MLflow doesn't get it", RuntimeWarning, stacklevel=2)


def make_uploader(uri: str, outbox: Outbox, connection: Connection | None = None, check_steps: bool = False) -> Uploader:
    """Return the uploader of an outbox to MLflow; see `Sender`."""
    send, server = Sender(outbox, uri, connection, check_steps), f"MLflow at {without_password(uri)}"
    return Uploader(outbox, send, server, Path("runs").absolute())


class SyncReport(NamedTuple):
    """What `sync` did: the run, the writes sent, those left, why, and whether the run had come to an end."""

    run_id: str | None
    sent: int
    left: int
    error: str
    ended: bool


def sync(file: Path, uri: str | None = None) -> SyncReport:
    """Send what a journal holds and the server doesn't have.

    Args:
        file: the journal, tracking.jsonl.
        uri: where to, in place of where the run was tracked.

    Raises:
        OSError: if the journal can't be read, or the run still writes to it.
        ValueError: if it is no journal of a tracker.

    """
    outbox = Outbox.read(file)
    try:
        own = tracking_uri(None)  # it may have the password
        where = tracking_uri(uri) if uri else own if without_password(own) == outbox.head["uri"] else outbox.head["uri"]
        before, error = len(outbox.pending), ""
        try:
            if before:
                connect(where, outbox.head["experiment"])  # says quickly, and clearly, what is wrong with the server
            outbox.flush(Sender(outbox, where))
        except Exception as raised:  # noqa: BLE001  # each kind of store has its own
            error = reason_of(raised)
        return SyncReport(outbox.run_id, before - len(outbox.pending), len(outbox.pending), error, outbox.ended)
    finally:
        outbox.close()


def has_run(uri: str, run_id: str) -> bool:
    """Return whether a store has a run; raises whatever the store does if it can't be asked."""
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        return False  # asking would make it
    try:
        MlflowClient(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def add_file(uri: str, run_id: str, file: Path) -> None:
    """Add a file to the artifacts of a run in a store, in place of one of that name.

    Raises OSError if the store can't be used, has no such run, or takes no file.
    """
    client = open_to_read(uri)
    with store_errors(uri):
        client.log_artifact(run_id, str(file))


def charts_page(uri: str, picture: str, experiment: str | None = None) -> str:
    """Return where the UI shows the charts of an experiment: the part of the address from the # on.

    MLflow draws them in sections by name, each chart on a scale of its own. The experiment gets a view, which is what its UI
    calls "shared", that begins with the runs' pictures and the main measures, accuracies from 0 to 1; all other charts follow.

    Args:
        uri: the store.
        picture: the name of the runs' pictures.
        experiment: its name; None: the one with the newest run.

    Raises:
        ConnectionError, OSError: as `connect`.
        LookupError: if there is no such experiment, or no run.

    """
    client = MlflowClient(uri) if experiment is None else connect(uri, experiment)[0]
    try:
        experiments = [item.experiment_id for item in client.search_experiments() if experiment in (None, item.name)]
        runs = client.search_runs(experiments, max_results=200)
        if not runs:
            raise LookupError(f"there is no run in {experiment or 'the store'}")
        number = runs[0].info.experiment_id
        names = {name for run in runs if run.info.experiment_id == number for name in run.data.metrics}
        client.set_experiment_tag(number, f"mlflow.sharedViewState.{_VIEW}", json.dumps(charts_view(names, picture)))
    except (MlflowException, SQLAlchemyError) as error:
        raise OSError(f"the tracking store {without_password(uri)} can't be used: {reason_of(error)}") from None
    return f"#/experiments/{number}/runs?compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey={_VIEW}"


_VIEW = "clstream"


def charts_view(metrics: Iterable[str], picture: str) -> dict[str, Any]:
    """Return the state of MLflow's page of charts, as it keeps it itself; what is not said has its defaults."""
    first = picture.rpartition("/")[0]
    images = {"type": "IMAGE", "uuid": picture, "metricSectionId": first, "imageKeys": [picture], "step": 0, "showRunParams": False}
    sections: list[dict[str, Any]] = [{"uuid": first, "name": first, "columns": 1, "cardHeight": 420}]
    charts: list[dict[str, Any]] = [images]
    names = sorted(metrics)
    others = any(name.removeprefix("task_il/").startswith(("map/", "r2/")) for name in names)
    if others:  # the page sorts sections by name, unless told that they are in order: accuracy comes first in any case
        names.sort(key=lambda name: name.startswith("anytime/"))
    unbounded = {"r2", *(["anytime"] if "r2/mean" in names or "task_il/r2/mean" in names else [])}
    for name in names:
        section, _, short = name.rpartition("/")
        measure = section.removeprefix("task_il/")
        if measure in MAIN.values() or section == "anytime":
            if section not in [drawn["name"] for drawn in sections]:
                sections.append({"uuid": section, "name": section})
            scale = {} if measure in unbounded else {"range": {"yMin": -0.02, "yMax": 1.02}}
            charts.append(scale | {
                "type": "LINE", "uuid": name, "metricSectionId": section, "metricKey": name, "displayName": short,
                "xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear",
                "lineSmoothness": 0, "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [],
                "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
            })  # fmt: skip
    sections += [{"uuid": name, "name": name} for name in ("Model metrics", "System metrics")]
    return {
        **({"isAccordionReordered": True} if others else {}),
        "compareRunCharts": [chart | {"runsCountToCompare": 10, "deleted": False, "isGenerated": True} for chart in charts],
        "compareRunSections": [
            section | {"display": True, "isReordered": False, "deleted": False, "isGenerated": True} for section in sections
        ],
    }


def read_curves(uri: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of each metric of the finished runs in a store, in the order in which it has them."""
    client, points_of = MlflowClient(uri), dict[str, list[tuple[int, float]]]()
    for run in client.search_runs([item.experiment_id for item in client.search_experiments()], "attributes.status = 'FINISHED'"):
        for name in run.data.metrics:
            points = client.get_metric_history(run.info.run_id, name)
            points_of[name] = points_of.get(name, []) + [(point.step, point.value) for point in points]
    return points_of
