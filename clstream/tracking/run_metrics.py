"""The metrics of a run, by the names that they have in MLflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clstream import metrics
from clstream.results import Evaluation
from clstream.stream import Stream

MOST_CURVES = 100
"""Tasks that each have curves of their own."""


SAMPLED = 20
"""Tasks that have them where there are more."""


def session_metrics(evaluation: Evaluation, begun: Tensor) -> dict[str, float]:
    """Return the metrics of the last row, by MLflow name; NaN where one is not defined.

    Of more than 100 tasks, some have values of their own: see `tasks_with_curves`. A task's accuracy is left out until it has
    begun: a curve that rises from 0 where nothing was taught looks like learning.

    Args:
        evaluation: what was measured.
        begun: (tasks,), bool: the tasks of which a session has had samples.

    """
    taught = evaluation.taught
    width = _width(len(evaluation.baseline))
    values: dict[str, float] = {}
    for prefix, matrix, baseline in (
        ("", evaluation.accuracy, evaluation.baseline),
        ("task_il/", evaluation.task_accuracy, evaluation.task_baseline),
    ):
        lost = metrics.forgetting_max_earlier_minus_last(matrix, taught)
        for task in tasks_with_curves(len(baseline)):
            values[f"{prefix}accuracy/task_{task:0{width}d}"] = float(matrix[-1, task]) if begun[task] else math.nan
            values[f"{prefix}forgetting/task_{task:0{width}d}"] = float(lost[task])
        values[f"{prefix}accuracy/mean"] = metrics.average_accuracy(matrix, taught)
        values[f"{prefix}forgetting/mean"] = metrics.forgetting(matrix, taught)
        values[f"{prefix}transfer/backward"] = metrics.backward_transfer(matrix, taught)
        values[f"{prefix}transfer/forward"] = metrics.forward_transfer(matrix, baseline, taught)
    return values


def tasks_with_curves(tasks: int) -> list[int]:
    """Return the tasks that have curves of their own: all up to 100, of more 20 from the first to the last, evenly apart."""
    if tasks <= MOST_CURVES:
        return list(range(tasks))
    return [round(place * (tasks - 1) / (SAMPLED - 1)) for place in range(SAMPLED)]


def final_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics of the whole main matrix, by MLflow name."""
    matrix, taught = evaluation.main, evaluation.taught
    values = {
        "final/average_accuracy": metrics.average_accuracy(matrix, taught),
        "final/forgetting": metrics.forgetting(matrix, taught),
        "final/average_incremental_accuracy": metrics.average_incremental_accuracy(matrix, taught),
        "final/learning_accuracy": metrics.learning_accuracy(matrix, taught),
        "final/forgetting_first_minus_last": metrics.forgetting_first_minus_last(matrix, taught),
        "final/forgetting_max_minus_last": metrics.forgetting_max_minus_last(matrix, taught),
    }
    if len(evaluation.probes) > len(evaluation.accuracy):
        probes, marks = evaluation.probes, evaluation.probe_taught
        values["final/anytime_average_accuracy"] = metrics.anytime_average_accuracy(probes, marks)
        values["final/min_accuracy"] = metrics.min_accuracy(probes, marks)
        values["final/worst_case_accuracy"] = metrics.worst_case_accuracy(probes, marks)
    return values


def tasks_by_row(stream: Stream, sessions: Sequence[int], before: Tensor | None = None) -> Tensor:
    """Return which tasks had samples in the sessions between two evaluations: (evaluations, tasks), bool.

    Args:
        stream: the run's.
        sessions: for each evaluation, the sessions finished by then.
        before: the first rows, if they are known.

    """
    rows = [] if before is None else list(before)
    for row in range(len(rows), len(sessions)):
        first = sessions[row - 1] if row else 0
        rows.append(torch.stack([stream.mix(session) > 0 for session in range(first, sessions[row])]).any(0))
    return torch.stack(rows)


def _width(tasks: int) -> int:
    """Return the digits of a task's number in a metric's name: two, so that names sort, or as many as needed."""
    return max(2, len(str(tasks - 1)))
