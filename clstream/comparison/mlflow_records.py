"""Records of the runs in an MLflow experiment: final metrics, and the matrix from the histories of its tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clstream.comparison.records import Record, RowOfMatrix
from clstream.measures import MAIN, MEASURES

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_NO_METRICS = {"anytime", "cost", "events", "final", "loss", "std"}
"""What names of curves begin with that are no metrics of a whole run."""

_OF_A_TASK = re.compile(r"task_\d+")


def read_experiment(name: str, uri: str | None = None, matrices: bool = True) -> list[Record]:
    """Return the records of the runs in an experiment, oldest first; parents of several seeds are not runs, nor are comparisons.

    What MLflow doesn't have is left open: of a row of a matrix the batches (0), and of a task that was taught again that it was;
    a task counts as taught in the row that has its first value. A run that didn't end well is a record with its error.

    Args:
        name: of the experiment, or its number.
        uri: the tracking store. None: as for `MlflowTracker`.
        matrices: whether the histories are read, which takes a question to the store for each task.

    Raises:
        ConnectionError, OSError: if the store doesn't answer, isn't there, or has the tables of another version of MLflow.
        ValueError: if there is no such experiment, or no run of clstream in it.

    """
    from clstream.tracking.mlflow_store import open_to_read, store_errors, tracking_uri

    client = open_to_read(uri)
    with store_errors(tracking_uri(uri)):
        number = _experiment(client, name)
        records = [_record(client, run, matrices) for run in _runs(client, number) if _is_run(run.data.params)]
    if not records:
        raise ValueError(f"the MLflow experiment {name!r} has no run of a strategy on a stream")
    return records


def _experiment(client: MlflowClient, name: str) -> str:
    """Return the number of an experiment. Raises ValueError if there is none, or it was deleted."""
    experiments = client.search_experiments()
    for experiment in experiments:
        if name in (experiment.name, experiment.experiment_id):
            return str(experiment.experiment_id)
    names = ", ".join(sorted(experiment.name for experiment in experiments))
    raise ValueError(f"there is no MLflow experiment {name!r}: there are {names or 'none'}")


def _runs(client: MlflowClient, number: str) -> Iterator[Run]:
    token: str | None = None
    while True:
        page = client.search_runs([number], order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _is_run(params: Mapping[str, str]) -> bool:
    """Return whether params are those of one run: a parent has seeds in place of a seed, a comparison nothing."""
    return {"strategy", "stream", "seed"} <= params.keys() and params["seed"].lstrip("-").isdigit()


def _record(client: MlflowClient, run: Run, matrices: bool) -> Record:
    params, values, tags = run.data.params, run.data.metrics, run.data.tags
    scenario = params.get("stream.scenario", "class")
    metrics = {
        name.removeprefix("final/"): value
        for name, value in values.items()
        if name.startswith("final/") and name not in ("final/flops", "final/memory_bytes")
    }
    metrics |= {
        name: value
        for name, value in values.items()
        if "/" in name and name.partition("/")[0] not in _NO_METRICS and not _OF_A_TASK.search(name)
    }
    main = next((name for name in map(_main_of, metrics) if name), "accuracy")
    cost = {name.removeprefix("cost/"): value for name, value in values.items() if name.startswith("cost/")}
    spent = [value for name, value in cost.items() if name.endswith("_seconds")]
    version = f"clstream {tags['clstream']}" if "clstream" in tags else ""
    prefix = "task_il/" * (scenario == "task")
    matrix, rows = _matrix(client, run.info.run_id, values, prefix) if matrices else ([], [])
    return Record(
        params["strategy"], params["strategy"], params["stream"], scenario, int(params["seed"]), dict(params), main, metrics,
        {name: better for name in metrics if (better := _is_higher_better(name)) is not None}, matrix, rows, cost,
        seconds=sum(spent) if spent else values.get("seconds", math.nan),
        fingerprint=tags.get("data_fingerprint", ""), code=tags.get("git_commit", "")[:12] or version, tuned=tags.get("tuned", ""),
        source=run.info.run_id, error=_error(run),
    )  # fmt: skip


def _error(run: Run) -> str:
    """Return why a run didn't end well: "" if it did."""
    ends = {"FINISHED": "", "FAILED": "it failed", "KILLED": "it was stopped"}
    error = ends.get(run.info.status, "it is not finished")
    return " ".join(run.data.tags.get("error", error).split()) if error else ""


def _main_of(metric: str) -> str:
    """Return the main measure that a metric is the average of, as "accuracy" or "accuracy/r2"; "" if it is none."""
    names = metric.removeprefix("average_").split("_")
    return "/".join(names) if metric.startswith("average_") and {*names} <= {*MAIN.values()} else ""


def _is_higher_better(metric: str) -> bool | None:
    """Return whether more of a metric is better; None of a measure of the user's own, of which MLflow doesn't say it."""
    if "forgetting" in metric:
        return False
    measure = metric.removeprefix("task_il/").partition("/")[0].partition(":")[0]
    if "/" not in metric or measure in (*MAIN.values(), "transfer"):
        return True
    known: Any = MEASURES.get(measure)
    return None if known is None else bool(known.higher_is_better)


def _matrix(
    client: MlflowClient, run_id: str, metrics: Mapping[str, float], prefix: str
) -> tuple[list[list[float | None]], list[RowOfMatrix]]:
    """Return the main matrix of a run and when its rows were; nothing if MLflow has not all tasks."""
    columns: dict[int, dict[int, float]] = {}
    for measure in MAIN.values():
        for name in metrics:
            if match := re.fullmatch(rf"{prefix}{measure}/task_(\d+)", name):
                points = client.get_metric_history(run_id, name)
                columns[int(match[1])] = {point.step: point.value for point in points}
    if not columns or sorted(columns) != list(range(len(columns))):
        return [], []
    sessions = sorted({step for column in columns.values() for step in column})
    matrix: list[list[float | None]] = [[columns[task].get(step) for task in range(len(columns))] for step in sessions]
    rows = [RowOfMatrix(step, 0, [task for task in range(len(columns)) if min(columns[task]) == step]) for step in sessions]
    return matrix, rows
