"""Results by the names that Avalanche's evaluation gives its metrics, for what reads those: plots, tables, loggers.

    as_avalanche(result, stream)["StreamForgetting/eval_phase/test_stream"]       ([1200, 2400, ...], [0.0, 0.98, ...])

The values are computed from our accuracy matrices by Avalanche's definitions: the accuracy of a stream is over its samples, not
over its tasks; forgetting is the accuracy when an experience was first trained minus the newest one, and backward transfer its
negative. Avalanche is not needed for it.
"""

from __future__ import annotations

import torch

from clstream.results import Evaluation
from clstream.stream import Stream

Curves = dict[str, tuple[list[int], list[float]]]
"""By name: where each value belongs on the x-axis, and the values, as `EvaluationPlugin.get_all_metrics` of Avalanche has them."""


def as_avalanche(result: Evaluation, stream: Stream, name: str = "test_stream") -> Curves:
    """Return what a run measured, evaluated after each session, as the curves that Avalanche would have.

    Args:
        result: what `run` returned.
        stream: what was learned: its scenario tells the task labels, its tasks how many samples each has to test.
        name: of the stream that was tested, in Avalanche's names.

    Returns:
        `Top1_Acc_Exp`, `Top1_Acc_Stream`, `ExperienceForgetting`, `StreamForgetting`, `ExperienceBWT` and `StreamBWT`, each with
        the phase, the stream and, where theirs have it, the task and the experience. The x-axis counts training steps, or, with
        evaluations within sessions, sessions.

    Raises:
        ValueError: if the result is not of that stream.

    """
    main = result.main
    if main.shape[1] != len(stream.tasks):
        raise ValueError(
            f"the result is on {main.shape[1]} tasks, and {stream.name} has {len(stream.tasks)}: give the stream of the run"
        )
    steps = [int(step) for step in result.probe_steps]
    at = steps if len(steps) == len(main) else list(range(1, len(main) + 1))
    sizes = torch.tensor([len(task.test) for task in stream.tasks], dtype=torch.float64)
    labels = [task.id if stream.scenario == "task" else 0 for task in stream.tasks]
    curves: Curves = {}

    def add(metric: str, ending: str, x: int, value: float) -> None:
        xs, values = curves.setdefault(f"{metric}/eval_phase/{name}{ending}", ([], []))
        xs.append(x)
        values.append(value)

    first: dict[int, float] = {}  # the accuracy on each task when it was first trained
    for row, x in enumerate(at):
        for label in sorted(set(labels)):
            mine = torch.tensor([each == label for each in labels])
            add("Top1_Acc_Stream", f"/Task{label:03}", x, float((main[row] * sizes)[mine].sum() / sizes[mine].sum()))
        lost = []
        for task, label in enumerate(labels):
            where, now = f"/Task{label:03}/Exp{task:03}", float(main[row, task])
            add("Top1_Acc_Exp", where, x, now)
            if task in first:
                lost.append(first[task] - now)
                add("ExperienceForgetting", where, x, lost[-1])
                add("ExperienceBWT", where, x, -lost[-1])
        first |= {task: float(main[row, task]) for task in result.taught[row].nonzero().flatten().tolist() if task not in first}
        mean = sum(lost) / len(lost) if lost else 0.0
        add("StreamForgetting", "", x, mean)
        add("StreamBWT", "", x, 0.0 - mean)
    return curves
