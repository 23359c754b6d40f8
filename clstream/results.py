"""Results: what a run has measured, the rows of its accuracy matrices."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clstream import metrics
from clstream.measures import MAIN, Cost
from clstream.metrics import seen_averages

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """An evaluation: what was measured, and when.

    Args:
        values: by measure (test sets + 1,), float64, on the CPU: of each test set, and last of all test samples of the tasks seen.
            NaN: not asked, or not defined.
        taught: (tasks,), bool: which tasks were taught since the evaluation before.
        sessions, batches: how many were finished, and learned, by then.
        within_session: whether a session was going on.
        seen: (tasks,), bool: which tasks were taught by then.

    """

    values: Mapping[str, Tensor]
    taught: Tensor
    sessions: int
    batches: int
    within_session: bool
    seen: Tensor


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a run has measured so far. Matrices are float64 on the CPU; the newest evaluation is the last row.

    Args:
        test_sets: the names of the columns of `measured`: first the tasks' own test sets, then the stream's probes, and last
            "seen", all test samples of the tasks seen so far, each once.
        targets: for each task the kind of its targets.
        scenario: of the stream.
        start: by measure (test sets + 1,): the values of the untrained strategy.
        rows: the evaluations there were, those of `evaluate_every` within sessions too.
        taught_since: (tasks,), bool: the tasks that were taught after the last one. None: none was.
        lower_is_better: the measures for which less is more.

    """

    test_sets: tuple[str, ...]
    targets: tuple[str, ...]
    scenario: str
    start: Mapping[str, Tensor]
    rows: tuple[Row, ...] = ()
    taught_since: Tensor | None = None
    lower_is_better: tuple[str, ...] = ()

    def after(self, values: Mapping[str, Tensor], task: int, step: int, within_session: bool, sessions_finished: int) -> Evaluation:
        """Return this with one more evaluation, after `step` batches, while `task` was being taught."""
        taught = torch.arange(len(self.targets)) == task
        if self.taught_since is not None:
            taught = taught | self.taught_since
        rows, seen = self.rows, self.seen(task)
        if rows and rows[-1].batches == step and rows[-1].within_session:  # the session ended at the step of one within it
            taught, rows = taught | rows[-1].taught, rows[:-1]
        return replace(self, rows=(*rows, Row(values, taught, sessions_finished, step, within_session, seen)), taught_since=None)

    def after_session(self, task: int, step: int) -> Evaluation:
        """Return this, with a note that a session of a task ended after `step` batches, and no evaluation follows."""
        if self.rows and self.rows[-1].batches == step:
            return self
        taught = torch.arange(len(self.targets)) == task
        return replace(self, taught_since=taught if self.taught_since is None else self.taught_since | taught)

    def with_task(self, name: str, target: str) -> Evaluation:
        """Return this with one more task, after the others, about which nothing was asked so far."""
        place = len(self.targets)

        def longer(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            nan = torch.full((1,), torch.nan, dtype=torch.float64)
            return {measure: torch.cat([row[:place], nan, row[place:]]) for measure, row in values.items()}

        def marked(tasks: Tensor) -> Tensor:
            return torch.cat([tasks, torch.zeros(1, dtype=torch.bool)])

        rows = tuple(replace(row, values=longer(row.values), taught=marked(row.taught), seen=marked(row.seen)) for row in self.rows)
        return replace(
            self,
            test_sets=(*self.test_sets[:place], name, *self.test_sets[place:]),
            targets=(*self.targets, target),
            start=longer(self.start),
            rows=rows,
            taught_since=None if self.taught_since is None else marked(self.taught_since),
        )

    def seen(self, task: int) -> Tensor:
        """Return the tasks that were taught so far, with one that is being taught: (tasks,), bool."""
        seen = torch.arange(len(self.targets)) == task
        seen = seen if self.taught_since is None else seen | self.taught_since
        return seen | self.rows[-1].seen if self.rows else seen

    @cached_property
    def after_sessions(self) -> tuple[Row, ...]:
        """The evaluations at the end of sessions; each has the tasks taught since the one before of these."""
        if not any(row.within_session for row in self.rows):
            return self.rows
        rows, marks = [], torch.zeros(len(self.targets), dtype=torch.bool)
        for row in self.rows:
            marks = marks | row.taught
            if not row.within_session:
                rows.append(replace(row, taught=marks))
                marks = torch.zeros_like(marks)
        return tuple(rows)

    @cached_property
    def measured(self) -> Mapping[str, Tensor]:
        """By measure (evaluations, test sets): a row for each evaluation at the end of a session, columns as in `test_sets`."""
        return {name: self._stacked(name, self.after_sessions) for name in self.start}

    def _stacked(self, name: str, rows: Sequence[Row]) -> Tensor:
        stacked = [row.values[name] for row in rows]
        return torch.stack(stacked) if stacked else torch.empty(0, len(self.test_sets), dtype=torch.float64)

    def _of_tasks(self, name: str, rows: Sequence[Row] | None = None) -> Tensor:
        """Return the columns of the tasks of a measure; NaN of one that was not taken."""
        rows = self.after_sessions if rows is None else rows
        if name in self.start:
            return self._stacked(name, rows)[:, : len(self.targets)]
        return torch.full((len(rows), len(self.targets)), torch.nan, dtype=torch.float64)

    @cached_property
    def accuracy(self) -> Tensor:
        """(evaluations, tasks), class-IL, or domain-IL where tasks share classes.

        There is a row for each session, unless `evaluate_at` says else. NaN: the task was not asked about (see `evaluate_on`), or
        has no labels.
        """
        return self._of_tasks("accuracy")

    @cached_property
    def task_accuracy(self) -> Tensor:
        """(evaluations, tasks), the accuracy with the task given at test."""
        return self._of_tasks("task_accuracy")

    @cached_property
    def taught(self) -> Tensor:
        """(evaluations, tasks), bool: which tasks were taught since the row before; for `metrics`."""
        return _marks(self.after_sessions, len(self.targets))

    @cached_property
    def probes(self) -> Tensor:
        """(probes, tasks), as `main`, at each evaluation there was: also those of `evaluate_every`, within sessions."""
        return self._main(self.rows)

    @cached_property
    def probe_taught(self) -> Tensor:
        """(probes, tasks), bool: which tasks were taught since the probe before."""
        return _marks(self.rows, len(self.targets))

    @property
    def probe_steps(self) -> tuple[int, ...]:
        """For each probe, the batches learned by then."""
        return tuple(row.batches for row in self.rows)

    @property
    def sessions(self) -> tuple[int, ...]:
        """For each row of the matrices, the sessions finished by then."""
        return tuple(row.sessions for row in self.after_sessions)

    @property
    def sessions_finished(self) -> int:
        """Sessions finished by the newest evaluation."""
        return self.rows[-1].sessions if self.rows else 0

    @property
    def within_session(self) -> bool:
        """Whether the newest evaluation came within a session; then it is a probe only."""
        return bool(self.rows) and self.rows[-1].within_session

    @property
    def baseline(self) -> Tensor:
        """(tasks,), the accuracy of the untrained strategy; NaN where it was not asked."""
        return self._start("accuracy")

    @property
    def task_baseline(self) -> Tensor:
        """(tasks,), the accuracy of the untrained strategy with the task given."""
        return self._start("task_accuracy")

    def _start(self, name: str) -> Tensor:
        tasks = len(self.targets)
        return self.start[name][:tasks] if name in self.start else torch.full((tasks,), torch.nan, dtype=torch.float64)

    @property
    def main_names(self) -> tuple[str, ...]:
        """For each task its main measure: "accuracy", "map" or "r2", with task_ before it on a task-incremental stream."""
        return tuple(f"{'task_' * (self.scenario == 'task')}{MAIN[target]}" for target in self.targets)

    @property
    def main_name(self) -> str:
        """What reports call the main measure: "accuracy", "map", "r2"; several joined by a slash."""
        return "/".join(dict.fromkeys(MAIN[target] for target in self.targets))

    def _main(self, rows: Sequence[Row]) -> Tensor:
        names = self.main_names
        if len(set(names)) == 1:
            return self._of_tasks(names[0], rows)
        matrices = {name: self._of_tasks(name, rows) for name in set(names)}
        return torch.stack([matrices[name][:, task] for task, name in enumerate(names)], 1)

    @cached_property
    def main(self) -> Tensor:
        """(evaluations, tasks), the measure that tables and curves are of, for each task by its targets: see `main_names`."""
        return self._main(self.after_sessions)

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, as checkpoints hold them, that `from_dict` takes."""
        return {
            "test_sets": list(self.test_sets),
            "targets": list(self.targets),
            "scenario": self.scenario,
            "start": dict(self.start),
            "measured": {name: self._stacked(name, self.rows) for name in self.start},
            "taught": _marks(self.rows, len(self.targets)),
            "sessions": [row.sessions for row in self.rows],
            "batches": [row.batches for row in self.rows],
            "within_session": [row.within_session for row in self.rows],
            "taught_since": self.taught_since,
            "lower_is_better": list(self.lower_is_better),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation whose `to_dict` gave these values. Raises ValueError for values that no evaluation gives."""
        try:
            sets, tasks, rows = len(values["test_sets"]), len(values["targets"]), len(values["sessions"])
            right = all(_is(tensor, (sets,), torch.float64) for tensor in values["start"].values())
            right &= all(_is(tensor, (rows, sets), torch.float64) for tensor in values["measured"].values())
            right &= values["start"].keys() == values["measured"].keys() and 0 < tasks < sets
            right &= _is(values["taught"], (rows, tasks), torch.bool)
            right &= values["taught_since"] is None or _is(values["taught_since"], (tasks,), torch.bool)
            right &= all(type(number) is int for name in ("sessions", "batches") for number in values[name])
            right &= all(type(within) is bool for within in values["within_session"]) and type(values["scenario"]) is str
            right &= all(type(name) is str for names in ("test_sets", "lower_is_better") for name in values[names])
            right &= set(values["targets"]) <= set(MAIN) and len(values["batches"]) == len(values["within_session"]) == rows
            right &= len(values) == 11
        except (KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise ValueError("these can't be the values of an Evaluation")
        seen = values["taught"].int().cummax(0).values.bool() if rows else values["taught"]
        columns = values["taught"].unbind(), values["sessions"], values["batches"], values["within_session"], seen.unbind()
        whole = zip(*columns, strict=True)
        evaluations = [
            Row({name: matrix[place] for name, matrix in values["measured"].items()}, *row) for place, row in enumerate(whole)
        ]
        return Evaluation(
            tuple(values["test_sets"]), tuple(values["targets"]), values["scenario"], values["start"], tuple(evaluations),
            values["taught_since"], tuple(values["lower_is_better"]),
        )  # fmt: skip


def _marks(rows: Sequence[Row], tasks: int) -> Tensor:
    return torch.stack([row.taught for row in rows]) if rows else torch.zeros(0, tasks, dtype=torch.bool)


def _is(value: object, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype


def table(
    matrix: Tensor,
    taught: Tensor,
    steps: Sequence[int] | None = None,
    unit: str = "sessions_finished",
    names: Sequence[str] = (),
) -> dict[str, list[float]]:
    """Return an accuracy matrix as columns: when each row was, each task, and the mean over the tasks seen by then.

    Args:
        matrix: (rows, tasks); of other measures (rows, test sets), the tasks' own first.
        taught: (rows, tasks), bool.
        steps: for each row how many of the unit there were by then. None: one a row.
        unit: what is counted.
        names: of the columns of the matrix. (): task_0, task_1, ...

    """
    tasks = taught.shape[1]
    columns: dict[str, list[float]] = {unit: list(steps or range(1, len(matrix) + 1))}
    columns |= {
        name: matrix[:, place].tolist() for place, name in enumerate(names or [f"task_{task}" for task in range(matrix.shape[1])])
    }
    return columns | {"mean": seen_averages(matrix[:, :tasks], taught).tolist() if len(matrix) else []}


def write_csv(
    matrix: Tensor,
    taught: Tensor,
    file: str | Path,
    steps: Sequence[int] | None = None,
    unit: str = "sessions_finished",
    names: Sequence[str] = (),
) -> None:
    """Write the columns of `table`, with all digits; nan where there is no value."""
    columns = table(matrix, taught, steps, unit, names)
    rows = [",".join(columns), *(",".join(map(repr, row)) for row in zip(*columns.values(), strict=True))]
    Path(file).write_text("\n".join(rows) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Result(Evaluation):
    """What a run measured: its last evaluation, and what was run.

    Args:
        params: what was run, by name, in plain values.
        seconds: how long it took, evaluation and observers included.
        cost: what it took, session by session: FLOPs, seconds, parameters, memory.

    """

    params: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    seconds: float = 0.0
    cost: Cost = field(default_factory=Cost)

    @property
    def average(self) -> float:
        """Mean of the last row of the main matrix over the tasks seen."""
        return metrics.average_accuracy(self.main, self.taught)

    @property
    def average_accuracy(self) -> float:
        """The same, as it is called where the main measure is the accuracy."""
        return self.average

    @property
    def forgetting(self) -> float:
        """Mean over tasks but the last of (best earlier - last), in the main matrix; NaN for a single task."""
        return metrics.forgetting(self.main, self.taught)

    def __repr__(self) -> str:
        """Return what was run, and the main matrix; "-" stands for tasks not taught yet, whose accuracy is in `to_frame()`."""
        columns = table(self.main, self.taught, self.sessions)
        seen = self.taught.int().cummax(0).values.bool() if len(self.taught) else self.taught
        for task in range(seen.shape[1]):
            columns[f"task_{task}"] = [
                value if shown else math.nan for value, shown in zip(columns[f"task_{task}"], seen[:, task].tolist(), strict=True)
            ]
        names, rows = list(columns), list(zip(*columns.values(), strict=True))
        picked = names if len(names) <= 14 else [*names[:6], "...", *names[-6:]]
        shown_rows: list[Any] = rows if len(rows) <= 12 else [*rows[:5], None, *rows[-6:]]
        lines = [[{"sessions_finished": "sessions"}.get(name, name) for name in picked]]
        for row in shown_rows:
            cells = {} if row is None else dict(zip(names, row, strict=True))
            lines.append([_cell(cells.get(name, "...")) for name in picked])
        width = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.rjust(space) for cell, space in zip(line, width, strict=True)) for line in lines]
        return "\n".join([self.headline, *text])

    @property
    def headline(self) -> str:
        """What was run, and how it ended, in a line."""
        what = "{strategy} on {stream}, seed {seed}: ".format_map({"strategy": "?", "stream": "?", "seed": "?"} | self.params)
        end = f"{self.main_name} {self.average:.3f}, forgetting {self.forgetting:.3f}, " if len(self.main) else ""
        return f"{what}{end}{self.seconds:.1f} s"

    def to_frame(self, measure: str | None = None) -> DataFrame:
        """Return a measure as a pandas DataFrame: a row by sessions finished, a column for each test set, and the mean over tasks.

        The columns of tasks have values before they were taught, too; "mean" is over the tasks seen by then.

        Args:
            measure: a name in `measured`. None: the main matrix, with a column for each task.

        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError:
            raise ImportError("a DataFrame needs the package pandas, which is not installed: pip install pandas") from None
        return DataFrame(self._columns(measure)).set_index("sessions_finished")

    def to_csv(self, file: str | Path, measure: str | None = None) -> None:
        """Write what `to_frame` has, with all digits."""
        matrix, names = (self.main, ()) if measure is None else (self._measured(measure), self.test_sets)
        write_csv(matrix, self.taught, file, self.sessions, names=names)

    def _columns(self, measure: str | None) -> dict[str, list[float]]:
        if measure is None:
            return table(self.main, self.taught, self.sessions)
        return table(self._measured(measure), self.taught, self.sessions, names=self.test_sets)

    def _measured(self, measure: str) -> Tensor:
        if measure not in self.measured:
            raise ValueError(f"{measure!r} was not measured: there are {', '.join(self.measured)}")
        return self.measured[measure]

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        return f"<p>{html.escape(self.headline)}</p>{self.to_frame().round(3).to_html()}"


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def result_of(state: Mapping[str, Any]) -> Result:
    """Return what a checkpoint has of a run's result: all of it, if the run was over."""
    evaluation, cost = Evaluation.from_dict(state["evaluation"]), Cost.from_dict(state["cost"])
    rest = {attribute.name: getattr(evaluation, attribute.name) for attribute in fields(Evaluation)}
    return Result(**rest, params=dict(state["params"]), seconds=state["seconds"], cost=cost)
