"""Results: what a run has measured, the rows of its accuracy matrices."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clstream import metrics
from clstream.measures.cost import Cost
from clstream.metrics import seen_averages

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a run has measured so far; the newest evaluation is the last row. Matrices are float64 on the CPU.

    Args:
        accuracy: (evaluations, tasks), class-IL, or domain-IL where tasks share classes: a row for each evaluation at the end of a
            session: of each, unless `evaluate_at` says else. NaN: the task was not asked about, see `evaluate_on`.
        task_accuracy: the same with the task given at test.
        taught: (evaluations, tasks), bool: which tasks were taught since the row before; for `metrics`.
        probes: (probes, tasks), as `main`, at each evaluation there was: also those of `evaluate_every`, within sessions.
        probe_taught: (probes, tasks), bool: which tasks were taught since the probe before.
        probe_steps: for each probe, the batches learned by then.
        baseline, task_baseline: (tasks,), the accuracy of the untrained strategy; NaN where it was not asked.
        scenario: of the stream; it says which of both matrices is the main one.
        within_session: whether the newest evaluation came within a session; then it is a probe only.
        sessions: for each row, the sessions finished by then. (): there is one for each session.
        sessions_finished: by the newest evaluation.
        taught_since: (2, tasks), bool: the tasks of sessions that ended after the last row, and of those that were learned after
            the last probe. None: there are none.

    """

    accuracy: Tensor
    task_accuracy: Tensor
    taught: Tensor
    probes: Tensor
    probe_taught: Tensor
    probe_steps: tuple[int, ...]
    baseline: Tensor
    task_baseline: Tensor
    scenario: str
    within_session: bool = False
    sessions: tuple[int, ...] = ()
    sessions_finished: int = 0
    taught_since: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.sessions:
            object.__setattr__(self, "sessions", tuple(range(1, len(self.accuracy) + 1)))

    @classmethod
    def of_untrained(cls, row: Tensor, task_row: Tensor, scenario: str) -> Evaluation:
        """Return the evaluation at the start of a run, from the rows of the untrained strategy."""
        none, never = row.new_empty(0, len(row)), torch.zeros(0, len(row), dtype=torch.bool)
        return cls(none, none, never, none, never, (), row, task_row, scenario)

    def after(
        self, row: Tensor, task_row: Tensor, task: int, step: int, within_session: bool, sessions_finished: int
    ) -> Evaluation:
        """Return this with the rows of one more evaluation, after `step` batches, while `task` was being taught."""
        marks = (torch.arange(len(row)) == task)[None]
        since = torch.zeros(2, len(row), dtype=torch.bool) if self.taught_since is None else self.taught_since
        probe, probe_marks = (task_row if self.scenario == "task" else row)[None], marks | since[1]
        # where a session ends at the step of a probe within it, that is the same probe
        old = slice(0, -1 if self.probe_steps[-1:] == (step,) else None)
        if old.stop:
            probe_marks = probe_marks | self.probe_taught[-1]
        probed = replace(
            self,
            probes=torch.cat([self.probes[old], probe]),
            probe_taught=torch.cat([self.probe_taught[old], probe_marks]),
            probe_steps=(*self.probe_steps[old], step),
            within_session=within_session,
            sessions_finished=sessions_finished,
            taught_since=torch.stack([since[0], torch.zeros_like(since[1])]) if since[0].any() else None,
        )
        if within_session:
            return probed
        return replace(
            probed,
            accuracy=torch.cat([self.accuracy, row[None]]),
            task_accuracy=torch.cat([self.task_accuracy, task_row[None]]),
            taught=torch.cat([self.taught, marks | since[0]]),
            sessions=(*self.sessions, sessions_finished),
            taught_since=None,
        )

    def after_session(self, task: int, step: int) -> Evaluation:
        """Return this, with a note that a session of a task ended after `step` batches, and no evaluation follows."""
        since = torch.zeros(2, len(self.baseline), dtype=torch.bool) if self.taught_since is None else self.taught_since.clone()
        since[0, task] = True
        since[1, task] |= step not in self.probe_steps[-1:]
        return replace(self, taught_since=since)

    def seen(self, task: int) -> Tensor:
        """Return the tasks that were taught so far, with one that is being taught: (tasks,), bool."""
        seen = self.taught.any(0) | (torch.arange(len(self.baseline)) == task)
        return seen if self.taught_since is None else seen | self.taught_since[0]

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, as checkpoints hold them, that `from_dict` takes."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(Evaluation)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation whose `to_dict` gave these values. Raises ValueError for values that no evaluation gives."""
        kinds: dict[str, Any] = {"probe_steps": (list, tuple), "scenario": str, "within_session": bool, "sessions": (list, tuple),
                                 "sessions_finished": int, "taught_since": (Tensor, type(None))}  # fmt: skip
        right = values.keys() == {attribute.name for attribute in fields(Evaluation)}
        right = right and all(isinstance(value, kinds.get(name, Tensor)) for name, value in values.items())
        if right:
            tasks, rows, probes = (values[name].shape[:1] for name in ("baseline", "accuracy", "probes"))
            shapes = {"accuracy": rows + tasks, "task_accuracy": rows + tasks, "taught": rows + tasks, "probes": probes + tasks,
                      "probe_taught": probes + tasks, "baseline": tasks, "task_baseline": tasks}  # fmt: skip
            right = len(tasks) == 1 and (len(values["probe_steps"]),) == probes
            right &= all(values[name].shape == shape for name, shape in shapes.items())
            right &= (len(values["sessions"]),) == rows and all(type(number) is int for number in values["sessions"])
            right &= values["taught_since"] is None or values["taught_since"].shape == (2, *tasks)
        if not right:
            raise ValueError("these can't be the values of an Evaluation")
        return Evaluation(**{**values, **{name: tuple(values[name]) for name in ("probe_steps", "sessions")}})

    @property
    def main(self) -> Tensor:
        """The accuracy matrix that the scenario asks for: `task_accuracy` if it is task-incremental, else `accuracy`."""
        return self.task_accuracy if self.scenario == "task" else self.accuracy


def table(
    accuracy: Tensor, taught: Tensor, steps: Sequence[int] | None = None, unit: str = "sessions_finished"
) -> dict[str, list[float]]:
    """Return an accuracy matrix as columns: when each row was, each task, and the mean over the tasks seen by then.

    `steps` is for each row how many of the unit there were by then; None: one a row.
    """
    columns: dict[str, list[float]] = {unit: list(steps or range(1, len(accuracy) + 1))}
    columns |= {f"task_{task}": accuracy[:, task].tolist() for task in range(accuracy.shape[1])}
    return columns | {"mean": seen_averages(accuracy, taught).tolist() if len(accuracy) else []}


def write_csv(
    accuracy: Tensor, taught: Tensor, file: str | Path, steps: Sequence[int] | None = None, unit: str = "sessions_finished"
) -> None:
    """Write the columns of `table`, with all digits; nan where there is no value."""
    columns = table(accuracy, taught, steps, unit)
    rows = [",".join(columns), *(",".join(map(repr, row)) for row in zip(*columns.values(), strict=True))]
    Path(file).write_text("\n".join(rows) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, eq=False)
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
    def average_accuracy(self) -> float:
        """Mean of the last row of the main matrix over the tasks seen."""
        return metrics.average_accuracy(self.main, self.taught)

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
        end = f"accuracy {self.average_accuracy:.3f}, forgetting {self.forgetting:.3f}, " if len(self.main) else ""
        return f"{what}{end}{self.seconds:.1f} s"

    def to_frame(self) -> DataFrame:
        """Return the main matrix as a pandas DataFrame: a row by sessions finished, a column for each task, and their mean.

        The columns of tasks have accuracies before they were taught, too; "mean" is over the tasks seen by then.
        """
        from pandas import DataFrame

        return DataFrame(table(self.main, self.taught, self.sessions)).set_index("sessions_finished")

    def to_csv(self, file: str | Path) -> None:
        """Write the main matrix as `to_frame` has it, with all digits."""
        write_csv(self.main, self.taught, file, self.sessions)

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
    return Result(**evaluation.to_dict(), params=dict(state["params"]), seconds=state["seconds"], cost=cost)
