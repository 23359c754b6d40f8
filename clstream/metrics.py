"""Metrics: pure functions of the accuracy matrix, each named for its definition.

`accuracy` is (rows, tasks): row i holds the accuracy on each task at evaluation i, in the order of the run. `taught` is
(rows, tasks), bool: whether a task was taught between the evaluation before row i and row i. None stands for the textbook
case: row i comes after task i, and the matrix is square. With it, the same functions serve tasks that come in many sessions,
tasks that recur, runs that were cut short, and evaluations within a session.

A task is *seen* from the first row in which it is taught on. Each function returns a float. What isn't defined (the
forgetting of a single task) is NaN, and a NaN among the values that a metric uses makes the metric NaN: nothing is averaged away.
But a NaN before a task is seen says that nobody asked (`run(evaluate_on="seen")`): metrics leave it out.

Any other measure makes such a matrix too. Where less is better (an error), say `higher_is_better=False` to what compares values:
forgetting is then how much a measure rose, and a transfer below 0 is a harm, as with accuracies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _checked(accuracy: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the matrix in float64, `taught`, and for each task the first and the last row that taught it (-1: never)."""
    accuracy = torch.as_tensor(accuracy, dtype=torch.float64).cpu()
    if accuracy.dim() != 2 or 0 in accuracy.shape:
        raise ValueError(f"accuracy must be a matrix of evaluations x tasks, not of shape {tuple(accuracy.shape)}")
    rows, tasks = accuracy.shape
    if taught is None:
        if rows != tasks:
            raise ValueError(f"say which rows taught which tasks: {rows} evaluations of {tasks} tasks are not one after each task")
        taught = torch.eye(rows, dtype=torch.bool)
    taught = torch.as_tensor(taught, dtype=torch.bool).cpu()
    if taught.shape != accuracy.shape:
        raise ValueError(f"taught must have the shape of accuracy, {tuple(accuracy.shape)}, not {tuple(taught.shape)}")
    row, task = taught.nonzero(as_tuple=True)
    first = torch.full((tasks,), rows).scatter_reduce(0, task, row, "amin")
    last = torch.full((tasks,), -1).scatter_reduce(0, task, row, "amax")
    return accuracy, taught, torch.where(last < 0, -1, first), last


def _oriented(matrix: Tensor, higher_is_better: bool) -> Tensor:
    return matrix if higher_is_better else -matrix


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def seen_averages(accuracy: Tensor, taught: Tensor | None = None) -> Tensor:
    """Return for each row the mean accuracy over the tasks seen by then: (rows,), float64; NaN where none was."""
    accuracy, _, first, _ = _checked(accuracy, taught)
    seen = (first >= 0) & (first <= torch.arange(len(accuracy))[:, None])
    return torch.where(seen, accuracy, 0.0).sum(1) / seen.sum(1)


def average_accuracy(accuracy: Tensor, taught: Tensor | None = None) -> float:
    """Return the mean of the last row over the tasks seen (ACC; Lopez-Paz & Ranzato 2017)."""
    matrix, _, first, _ = _checked(accuracy, taught)
    seen = first >= 0
    return float(torch.where(seen, matrix[-1:], 0.0).sum() / seen.sum())


def average_incremental_accuracy(accuracy: Tensor, taught: Tensor | None = None) -> float:
    """Return the mean over the rows of the average accuracy at each (Rebuffi et al. 2017)."""
    return _mean(seen_averages(accuracy, taught))


def anytime_average_accuracy(accuracy: Tensor, taught: Tensor | None = None) -> float:
    """Return the mean of the average accuracy over evaluations at regular steps (AAA; Caccia et al. 2022).

    The same arithmetic as `average_incremental_accuracy`, on the rows of `evaluate_every`. Rows before any task was seen
    don't count.
    """
    _, marks, _, _ = _checked(accuracy, taught)
    seen = marks.int().cummax(0).values.any(1)
    return _mean(seen_averages(accuracy, taught)[seen])


def _forgettable(first: Tensor, last: Tensor, rows: int) -> Tensor:
    """Return the tasks that had time to be forgotten: seen, and not taught in the last row."""
    return ((first >= 0) & (last < rows - 1)).nonzero().flatten()


def forgetting_max_earlier_minus_last(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> Tensor:
    """Return each task's best accuracy in any row before the last, minus its last: (tasks,), NaN where it is not defined.

    Chaudhry et al. 2018: negative where a task is best at the end. Tasks not seen, or taught in the last row, have none.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    lost = torch.full((matrix.shape[1],), math.nan, dtype=torch.float64)
    tasks = _forgettable(first, last, len(matrix))
    if len(tasks):
        lost[tasks] = _highest(matrix[:-1, tasks], first[tasks]) - matrix[-1, tasks]
    return lost


def _highest(matrix: Tensor, first: Tensor) -> Tensor:
    """Return the highest value of each column; one that is NaN before the column's first row was not asked for."""
    unseen = torch.arange(len(matrix))[:, None] < first
    return matrix.masked_fill(unseen & matrix.isnan(), -math.inf).amax(0)


def _mean_of_defined(lost: Tensor, accuracy: Tensor, taught: Tensor | None) -> float:
    matrix, _, first, last = _checked(accuracy, taught)
    return _mean(lost[_forgettable(first, last, len(matrix))])


def forgetting(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the last of max-earlier minus last (F; Chaudhry et al. 2018)."""
    return _mean_of_defined(forgetting_max_earlier_minus_last(accuracy, taught, higher_is_better), accuracy, taught)


def forgetting_first_minus_last(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the last of the accuracy when just taught, minus the last: Avalanche's definition."""
    return -backward_transfer(accuracy, taught, higher_is_better)


def forgetting_max_minus_last(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the last of the maximum over *all* rows, minus the last; never negative.

    The definition of PyCIL and, up to padding, of Mammoth.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    tasks = _forgettable(first, last, len(matrix))
    return _mean(_highest(matrix[:, tasks], first[tasks]) - matrix[-1, tasks]) if len(tasks) else math.nan


def forgetting_first_minus_later(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over rows of what past tasks lost since just taught, summed and divided by the tasks seen by then.

    The global forgetting F^G of Smith et al. 2023, as their code has it, for tasks of one size.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    values = []
    for row in range(1, len(matrix)):
        seen = (first >= 0) & (first <= row)
        past = (seen & (last < row)).nonzero().flatten()
        if len(past):
            values.append((matrix[last[past], past] - matrix[row, past]).sum() / seen.sum())
    return _mean(torch.stack(values)) if values else math.nan


def forgetting_step_to_step(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over rows of the mean over past tasks of the accuracy in the row before, minus that in this one.

    The definition of CODA-Prompt's code. Rows without past tasks don't count.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    values = []
    for row in range(1, len(matrix)):
        past = ((first >= 0) & (last < row)).nonzero().flatten()
        if len(past):
            values.append((matrix[row - 1, past] - matrix[row, past]).mean())
    return _mean(torch.stack(values)) if values else math.nan


def backward_transfer(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the last of the last accuracy minus that when just taught (BWT; Lopez-Paz & Ranzato 2017).

    "Just taught" is the row after the last session that taught the task.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    tasks = _forgettable(first, last, len(matrix))
    return _mean(matrix[-1, tasks] - matrix[last[tasks], tasks])


def forward_transfer(accuracy: Tensor, baseline: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the first of the accuracy just before it is taught, minus the untrained model's.

    FWT with the random-initialisation baseline of Lopez-Paz & Ranzato (2017). `baseline` is (tasks,). Tasks that are taught
    in the first row have nothing before them and don't count, nor do those that nobody asked about there.
    """
    matrix, _, first, _ = _checked(accuracy, taught)
    start = torch.as_tensor(baseline, dtype=torch.float64).cpu()
    if start.shape != matrix.shape[1:]:
        raise ValueError(f"baseline must hold the accuracy of the untrained model on each of {matrix.shape[1]} tasks")
    matrix, start = _oriented(matrix, higher_is_better), _oriented(start, higher_is_better)
    tasks = (first > 0).nonzero().flatten()
    before = matrix[first[tasks] - 1, tasks]
    asked = ~before.isnan()
    return _mean(before[asked] - start[tasks[asked]])


def learning_accuracy(accuracy: Tensor, taught: Tensor | None = None) -> float:
    """Return the mean over the tasks seen of the accuracy when just taught (LA; Riemer et al. 2019)."""
    matrix, _, first, last = _checked(accuracy, taught)
    tasks = (first >= 0).nonzero().flatten()
    return _mean(matrix[last[tasks], tasks])


def intransigence(accuracy: Tensor, joint: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over the tasks seen of the joint model's accuracy minus that when just taught (I; Chaudhry et al. 2018).

    `joint` is (tasks,): for each task, the accuracy of a model trained on all data up to that task.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    upper = torch.as_tensor(joint, dtype=torch.float64).cpu()
    if upper.shape != matrix.shape[1:]:
        raise ValueError(f"joint must hold the accuracy of the joint model on each of {matrix.shape[1]} tasks")
    matrix, upper = _oriented(matrix, higher_is_better), _oriented(upper, higher_is_better)
    tasks = (first >= 0).nonzero().flatten()
    return _mean(upper[tasks] - matrix[last[tasks], tasks])


def min_accuracy(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the mean over tasks but the last of the worst accuracy since just taught (min-ACC; De Lange et al. 2023).

    Use it on the rows of `evaluate_every`, where the stability gap shows.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    matrix = _oriented(matrix, higher_is_better)
    tasks = _forgettable(first, last, len(matrix))
    since = torch.arange(len(matrix))[:, None] > last[tasks]
    worst = torch.where(since, matrix[:, tasks], math.inf).amin(0)
    return _mean(_oriented(worst, higher_is_better)) if len(tasks) else math.nan


def worst_case_accuracy(accuracy: Tensor, taught: Tensor | None = None, higher_is_better: bool = True) -> float:
    """Return the last task's accuracy and the others' `min_accuracy`, weighted by tasks (WC-ACC; De Lange et al. 2023).

    With k tasks seen: 1/k times the current task's accuracy in the last row, plus (1 - 1/k) times min-ACC.
    """
    matrix, _, first, last = _checked(accuracy, taught)
    seen = int((first >= 0).sum())
    current = matrix[-1, last == len(matrix) - 1]
    if seen == len(current):
        return _mean(current)
    share = len(current) / seen
    return (share * _mean(current) if len(current) else 0.0) + (1 - share) * min_accuracy(accuracy, taught, higher_is_better)


def base(accuracy: Tensor, taught: Tensor | None = None, tasks: int = 1) -> float:
    """Return the mean of the last row over the first tasks: the base session of few-shot class-incremental streams.

    `tasks` is how many count as the base.
    """
    matrix, first = _few_shot(accuracy, taught, tasks)
    return _mean(matrix[-1, :tasks][first[:tasks] >= 0])


def novel(accuracy: Tensor, taught: Tensor | None = None, tasks: int = 1) -> float:
    """Return the mean of the last row over the tasks seen after the first ones: the novel classes. NaN if there are none."""
    matrix, first = _few_shot(accuracy, taught, tasks)
    return _mean(matrix[-1, tasks:][first[tasks:] >= 0])


def harmonic(accuracy: Tensor, taught: Tensor | None = None, tasks: int = 1) -> float:
    """Return the harmonic mean of `base` and `novel`, which is low if either is; 0 if either is 0."""
    old, new = base(accuracy, taught, tasks), novel(accuracy, taught, tasks)
    return 0.0 if old == 0 or new == 0 else 2 * old * new / (old + new)


def few_shot_curves(accuracy: Tensor, taught: Tensor | None = None, tasks: int = 1) -> dict[str, Tensor]:
    """Return `base`, `novel` and `harmonic` after each row, by these names: each (rows,), float64; NaN where one is not defined."""
    matrix, marks, _, _ = _checked(accuracy, taught)
    rows = range(1, len(matrix) + 1)
    measures = {"base": base, "novel": novel, "harmonic": harmonic}
    return {
        name: torch.tensor([measure(matrix[:row], marks[:row], tasks) for row in rows], dtype=torch.float64)
        for name, measure in measures.items()
    }


def performance_drop(seen: Tensor, higher_is_better: bool = True) -> float:
    """Return how much lower the last value is than the first (PD): of the accuracies over all classes seen after each session.

    `seen` is (rows,): the column "seen" of `Result.measured["accuracy"]`.
    """
    values = torch.as_tensor(seen, dtype=torch.float64).cpu()
    if values.dim() != 1 or not len(values):
        raise ValueError(f"seen must be a value for each evaluation, (rows,), not of shape {tuple(values.shape)}")
    values = _oriented(values, higher_is_better)
    return float(values[0] - values[-1])


def _few_shot(accuracy: Tensor, taught: Tensor | None, tasks: int) -> tuple[Tensor, Tensor]:
    matrix, _, first, _ = _checked(accuracy, taught)
    if isinstance(tasks, bool) or not isinstance(tasks, int) or not 1 <= tasks <= matrix.shape[1]:
        raise ValueError(f"tasks must be how many of the {matrix.shape[1]} tasks are the base, from 1 up, not {tasks!r}")
    return matrix, first
