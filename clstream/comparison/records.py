"""Records: what one finished, or failed, run says of itself. Tables, pictures and reports read records, never runs."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clstream.results import Evaluation, Result
from clstream.tracking.run_metrics import cost_metrics, final_metrics, session_metrics

if sys.platform != "win32":
    import fcntl

FILE = "records.jsonl"
"""The records in the folder of a sweep."""


class RowOfMatrix(NamedTuple):
    """When a row of a matrix was: sessions finished and batches learned by then, and the tasks taught since the row before."""

    sessions: int
    batches: int
    taught: list[int]


@dataclass(frozen=True)
class Record:
    """What one run says of itself.

    Args:
        strategy: the name of its class.
        label: what tables call it: "Replay", or with the options that tell it from its neighbours "Replay, capacity 500".
        stream: its name.
        scenario: "class", "task" or "domain".
        seed: of the run.
        params: what was run, by name, as in `Result.params`: "strategy.capacity", "stream.batch_size".
        main: the name of the main measure, as "accuracy".
        metrics: final metrics by their names in MLflow, without final/ before them: "average_accuracy", "forgetting", "top5/mean".
            NaN: not defined.
        higher_is_better: by the name of a metric, where it is known.
        matrix: (evaluations, tasks), the main measure; None: not asked, or not defined.
        rows: for each row of the matrix, when it was.
        cost: what it took: FLOPs and seconds by what they were spent on, "memory_bytes" (kept in the end), "peak_bytes",
            "parameters". NaN: unknown.
        seconds: how long it took.
        identity: of config, code and data, by which a sweep knows that a run is finished; "" where it is unknown.
        fingerprint: of the stream's data.
        code: the git commit of the checkout of clstream, with a + if files differ from it, or clstream's version.
        tuned: "" or how its options were chosen, as "12 trials on held-out samples".
        source: its folder, or the id of its MLflow run.
        error: "" or, in a sentence, why it failed; then there may be no metrics.

    """

    strategy: str
    label: str
    stream: str
    scenario: str
    seed: int
    params: dict[str, str] = field(default_factory=dict)
    main: str = "accuracy"
    metrics: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    matrix: list[list[float | None]] = field(default_factory=list)
    rows: list[RowOfMatrix] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    identity: str = ""
    fingerprint: str = ""
    code: str = ""
    tuned: str = ""
    source: str = ""
    error: str = ""

    @property
    def main_matrix(self) -> Tensor:
        """The matrix as (evaluations, tasks), float64; NaN: not asked, or not defined."""
        rows = [[math.nan if value is None else value for value in row] for row in self.matrix]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(rows[0]) if rows else 0)

    @property
    def taught(self) -> Tensor:
        """(evaluations, tasks), bool: which tasks were taught since the row before; for `clstream.metrics`."""
        marks = torch.zeros(self.main_matrix.shape, dtype=torch.bool)
        for place, row in enumerate(self.rows):
            marks[place, row.taught] = True
        return marks

    @property
    def sessions(self) -> tuple[int, ...]:
        """For each row of the matrix, the sessions finished by then."""
        return tuple(row.sessions for row in self.rows)


def record_of(result: Result, **context: Any) -> Record:
    """Return the record of a result.

    Args:
        result: what a run returned.
        context: what the result doesn't know, by the name in `Record`: identity, fingerprint, code, tuned, source, error; or what
            is to be called otherwise, as label.

    """
    params = {name: str(value) for name, value in result.params.items()}
    strategy = params.get("strategy", "?")
    whole = bool(len(result.main))
    metrics = _final(result) if whole else {}
    spent = cost_metrics(result.cost) if len(result.cost) else {}
    cost = {name.removeprefix("cost/"): value for name, value in spent.items()}
    values: dict[str, Any] = {
        "strategy": strategy,
        "label": strategy,
        "stream": params.get("stream", "?"),
        "scenario": result.scenario,
        "seed": int(params.get("seed", 0)),
        "params": params,
        "main": result.main_name,
        "metrics": metrics,
        "higher_is_better": {name: _is_higher_better(name, result) for name in metrics},
        "matrix": [[None if math.isnan(value) else value for value in row] for row in result.main.tolist()],
        "rows": [RowOfMatrix(row.sessions, row.batches, row.taught.nonzero().flatten().tolist()) for row in result.after_sessions],
        "cost": cost,
        "seconds": float(result.seconds),
    }
    return Record(**(values | context))


def _final(result: Evaluation) -> dict[str, float]:
    """Return the final metrics of the main measure, and of all measures what is no task's own."""
    last = session_metrics(result, torch.ones(len(result.targets), dtype=torch.bool))
    own = {*result.test_sets[: len(result.targets)]}
    last = {name: value for name, value in last.items() if not own & {*name.split("/")}}
    return {name.removeprefix("final/"): value for name, value in final_metrics(result).items()} | last


def _is_higher_better(metric: str, result: Evaluation) -> bool:
    """Return whether more of a metric is better: not of forgetting, nor of measures of errors."""
    measure = metric.removeprefix("task_il/").partition("/")[0]
    lower = {name.removeprefix("task_") for name in result.lower_is_better}
    return "forgetting" not in metric and measure not in lower


def to_json(record: Record) -> str:
    """Return a record as a line of JSON; NaN is null, infinity a string, and what no UTF-8 can hold a question mark."""
    return json.dumps(_plain(asdict(record)), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_plain(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(line: str) -> Record:
    """Return the record that `to_json` made a line of. Raises ValueError, in a sentence, for any other line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("this is no record of a run: it is not a line of JSON") from None
    if not isinstance(values, dict):
        raise ValueError("this is no record of a run: it is not a JSON object")
    names = {attribute.name for attribute in fields(Record)}
    if unknown := values.keys() - names:
        raise ValueError(f"this is no record of this version of clstream: it has no {min(unknown)!r}")
    if absent := {"strategy", "label", "stream", "scenario", "seed"} - values.keys():
        raise ValueError(f"this is no record of a run: {min(absent)!r} is missing")
    read = {name: _checked(name, value) for name, value in values.items()}
    record = Record(**read)
    width = len(record.matrix[0]) if record.matrix else 0
    if {len(row) for row in record.matrix} - {width} or len(record.rows) != len(record.matrix) or (record.rows and not width):
        raise ValueError("this record of a run is damaged: its matrix is not whole")
    if any(not 0 <= task < width for row in record.rows for task in row.taught):
        raise ValueError("this record of a run is damaged: it taught tasks that its matrix doesn't have")
    return record


def _checked(name: str, value: Any) -> Any:
    """Return the value of an attribute as JSON has it as a record has it. Raises ValueError for one that is of another type."""
    try:
        match name:
            case "seed":
                return _count(value)
            case "seconds":
                return _number(value)
            case "metrics" | "cost":
                return {_as(str, key): _number(item) for key, item in _as(dict, value).items()}
            case "params":
                return {key: _as(str, item) for key, item in _as(dict, value).items()}
            case "higher_is_better":
                return {key: _as(bool, item) for key, item in _as(dict, value).items()}
            case "matrix":
                return [[item if item is None else _number(item) for item in _as(list, row)] for row in _as(list, value)]
            case "rows":
                rows = [_as(list, row) for row in _as(list, value)]
                return [
                    RowOfMatrix(_count(sessions), _count(batches), [_count(task) for task in _as(list, taught)])
                    for sessions, batches, taught in rows
                ]
            case _:
                return _as(str, value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"this record of a run is damaged: its {name!r} is not what it should be") from None


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _count(value: Any) -> int:
    if not 0 <= _as(int, value) < 2**63:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if value in ("inf", "-inf") or type(value) in (int, float):
        return float(value)
    raise TypeError


def append_record(file: str | Path, record: Record) -> None:
    """Append a record to a file, and sync it to the disk; a line that a crash left half written is cut off before.

    Several processes may append: each waits for the others, but for Windows, which has no such locks. Raises OSError if the file
    can't be written.
    """
    with Path(file).open("a+b") as out:
        if sys.platform != "win32":
            fcntl.flock(out, fcntl.LOCK_EX)  # until it is closed
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        text = out.read()
        tail = text.rpartition(b"\n")[2]
        begin = b""
        if tail:
            try:
                from_json(tail.decode())
                begin = b"\n"
            except ValueError:
                out.truncate(size - len(tail))
        out.write(begin + to_json(record).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read_file(file: str | Path) -> list[Record]:
    """Return the records in a file, of which there may be none.

    Raises:
        OSError: if it can't be read.
        ValueError: if a line is damaged; the message names it. A last line that was half written when its writer died is left out,
            with a RuntimeWarning.

    """
    try:
        lines = Path(file).read_bytes().decode().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no file of records: it is not text") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(from_json(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {file}: {error}") from None
            warnings.warn(f"line {number} of {file} was not written to its end: it is left out", RuntimeWarning, stacklevel=2)
    return records
