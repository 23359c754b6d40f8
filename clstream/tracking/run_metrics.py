"""The metrics of a run, by the names that they have in MLflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream import metrics
from clstream.measures import MAIN
from clstream.measures.cost import Cost
from clstream.results import Evaluation
from clstream.stream import Stream

MOST_CURVES = 100
"""Tasks that each have curves of their own."""


SAMPLED = 20
"""Tasks that have them where there are more."""


def session_metrics(evaluation: Evaluation, begun: Tensor) -> dict[str, float]:
    """Return the metrics of the last row, by MLflow name; NaN where one is not defined.

    Names begin with that of the measure, with the task given at test with task_il/ before it: accuracy/task_00, map/seen. What
    compares rows (forgetting/..., transfer/...) is of the main measure; of others there is the mean forgetting, top5/forgetting.

    Of more than 100 tasks, some have values of their own: see `tasks_with_curves`. A task's accuracy is left out until it has
    begun: a curve that rises from 0 where nothing was taught looks like learning. So it is with copies of a task's test set.

    Args:
        evaluation: what was measured.
        begun: (tasks,), bool: the tasks of which a session has had samples.

    """
    values: dict[str, float] = {}
    curves = tasks_with_curves(len(evaluation.targets))
    own_tasks = {name: task for task, name in enumerate(evaluation.test_sets[: len(evaluation.targets)])}
    for name, whole in evaluation.measured.items():
        prefix, label = ("task_il/", name.removeprefix("task_")) if name.startswith("task_") else ("", name)
        tasks = _tasks_measured(evaluation, label)
        columns = slice(len(tasks)) if tasks[-1:] == [len(tasks) - 1] else tasks  # of all tasks without a copy
        matrix, taught, baseline = whole[:, columns], evaluation.taught[:, columns], evaluation.start[name][columns]
        higher = name not in evaluation.lower_is_better
        main = label in MAIN.values()
        lost = metrics.forgetting_max_earlier_minus_last(matrix, taught, higher)
        for place, task in enumerate(tasks):
            if task in curves:
                column = evaluation.test_sets[task]
                values[f"{prefix}{label}/{column}"] = float(matrix[-1, place]) if begun[task] else math.nan
                if main:
                    values[f"{prefix}forgetting/{column}"] = float(lost[place])
        for place, column in enumerate(evaluation.test_sets[len(evaluation.targets) :], len(evaluation.targets)):
            own = own_tasks.get(column.rpartition("/")[2])  # a copy of a task's test set has its name at the end
            if own is None or own in curves:
                values[f"{prefix}{label}/{column}"] = float(whole[-1, place]) if own is None or begun[own] else math.nan
        values[f"{prefix}{label}/mean"] = metrics.average_accuracy(matrix, taught)
        if not main:
            values[f"{prefix}{label}/forgetting"] = metrics.forgetting(matrix, taught, higher)
        else:
            values |= _compared(matrix, taught, baseline, prefix)
    if len(set(evaluation.main_names)) > 1:  # tasks with targets of several kinds
        start = [evaluation.start[name][task] for task, name in enumerate(evaluation.main_names)]
        values |= _compared(
            evaluation.main, evaluation.taught, torch.stack(start), prefix="task_il/" * (evaluation.scenario == "task")
        )
    return values


def _compared(matrix: Tensor, taught: Tensor, baseline: Tensor, prefix: str) -> dict[str, float]:
    """Return what compares the rows of a matrix of a main measure, of which all are better the higher they are."""
    return {
        f"{prefix}forgetting/mean": metrics.forgetting(matrix, taught),
        f"{prefix}transfer/backward": metrics.backward_transfer(matrix, taught),
        f"{prefix}transfer/forward": metrics.forward_transfer(matrix, baseline, taught),
    }


def _tasks_measured(evaluation: Evaluation, label: str) -> list[int]:
    """Return the tasks that a measure is of: of a main measure those with its kind of targets."""
    kinds = [target for target, name in MAIN.items() if name == label]
    return [task for task, target in enumerate(evaluation.targets) if not kinds or target in kinds]


def cost_metrics(cost: Cost) -> dict[str, float]:
    """Return what a run took so far, by MLflow name: sums over the sessions; parameters, memory and peak as they are now."""
    values = cost.total | {"memory_bytes": float(cost.memory_bytes[-1])}
    return {f"cost/{name}": value for name, value in values.items()}


def tasks_with_curves(tasks: int) -> list[int]:
    """Return the tasks that have curves of their own: all up to 100, of more 20 from the first to the last, evenly apart."""
    if tasks <= MOST_CURVES:
        return list(range(tasks))
    return [round(place * (tasks - 1) / (SAMPLED - 1)) for place in range(SAMPLED)]


def final_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics of the whole main matrix, by MLflow name."""
    matrix, taught, name = evaluation.main, evaluation.taught, evaluation.main_name.replace("/", "_")
    values = {
        f"final/average_{name}": metrics.average_accuracy(matrix, taught),
        "final/forgetting": metrics.forgetting(matrix, taught),
        f"final/average_incremental_{name}": metrics.average_incremental_accuracy(matrix, taught),
        f"final/learning_{name}": metrics.learning_accuracy(matrix, taught),
        "final/forgetting_first_minus_last": metrics.forgetting_first_minus_last(matrix, taught),
        "final/forgetting_max_minus_last": metrics.forgetting_max_minus_last(matrix, taught),
    }
    if len(evaluation.probes) > len(matrix):
        probes, marks = evaluation.probes, evaluation.probe_taught
        values[f"final/anytime_average_{name}"] = metrics.anytime_average_accuracy(probes, marks)
        values[f"final/min_{name}"] = metrics.min_accuracy(probes, marks)
        values[f"final/worst_case_{name}"] = metrics.worst_case_accuracy(probes, marks)
    return values


def tasks_by_row(stream: Stream, sessions: Sequence[int], before: Tensor | None = None) -> Tensor:
    """Return which tasks had samples in the sessions between two evaluations: (evaluations, tasks), bool.

    Args:
        stream: the run's.
        sessions: for each evaluation, the sessions finished by then.
        before: the first rows, if they are known.

    """
    tasks = len(stream.tasks)
    rows = (
        [] if before is None else list(F.pad(before, (0, tasks - before.shape[1])))
    )  # of a stream that arrives there are more now
    for row in range(len(rows), len(sessions)):
        first = sessions[row - 1] if row else 0
        rows.append(torch.stack([stream.mix(session) > 0 for session in range(first, sessions[row])]).any(0))
    return torch.stack(rows)


def _width(tasks: int) -> int:
    """Return the digits of a task's number in a metric's name: two, so that names sort, or as many as needed."""
    return max(2, len(str(tasks - 1)))
