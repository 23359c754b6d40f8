"""Evaluation: one pass over the union of the test sets gives the class-IL and the task-IL row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clstream.eval_mode import evaluating as evaluating
from clstream.strategy import Strategy
from clstream.strategy.strategy import allowed
from clstream.stream import Samples, Stream

CHUNK = 2048
"""Test samples that are scored together."""


def evaluate(strategy: Strategy, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return the accuracy on each task of the stream, without and with the task given: two (tasks,), float64, on the CPU.

    A strategy that keeps the base's `scores` and `predict` answers both questions from one forward pass over the union of the
    test sets; one that overrides them is asked task by task, without and with the task, since its answer may depend on it. If the
    stream hides its boundaries, the strategy is never given the task: the answer with the task is then the highest of its scores
    among the task's classes, and the samples of all tasks come mixed.

    Raises:
        ValueError, TypeError: if the answers have the wrong shape or type.
        FloatingPointError: if scores hold NaN.

    """
    once = strategy.scores_ignore_task
    hits = torch.zeros(len(stream.tasks), 2, dtype=torch.int64, device=stream.device)
    unknown = torch.zeros((), dtype=torch.bool, device=stream.device)
    with evaluating(strategy):
        for samples, number in chunks(stream, together=once) if stream.boundaries else mixed(stream):
            if once or not stream.boundaries:
                scores = strategy.scores(samples.x)
                check_scores(scores, samples, stream, strategy)
                table = torch.stack([allowed(task, scores) for task in stream.tasks])
                first = scores.argmax(1) if once else strategy.predict(samples.x)
                answers = first, scores.masked_fill(~table[number], float("-inf")).argmax(1)
                unknown |= scores.isnan().any()
            else:
                task = stream.tasks[int(number[0])]
                answers = strategy.predict(samples.x), strategy.predict(samples.x, task)
            check_labels(answers, samples, strategy)
            hits.index_add_(0, number, torch.stack([answer == samples.y for answer in answers], 1).long())
    if unknown:
        raise FloatingPointError(
            f"{type(strategy).__name__} answers test samples of {stream.name} with NaN: its weights are not finite"
        )
    rows = hits.cpu().double() / torch.tensor([len(task.test) for task in stream.tasks])[:, None]
    return rows[:, 0].contiguous(), rows[:, 1].contiguous()


def chunks(stream: Stream, together: bool) -> Iterator[tuple[Samples, Tensor]]:
    """Yield the test samples on the stream's device, a chunk at a time, with the number of the task that each is of.

    Small tasks share a chunk if `together`: a hundred of them cost about what one large one does.
    """
    parts: list[Samples] = []
    numbers: list[Tensor] = []
    for task in stream.tasks:
        for start in range(0, len(task.test), CHUNK):
            part = task.test[start : start + CHUNK]
            part = part if stream.device is None else part.to(stream.device)
            number = torch.full((len(part),), task.id, device=stream.device)
            if not together:
                yield part, number
                continue
            if parts and sum(map(len, parts)) + len(part) > CHUNK:
                yield _joined(parts), torch.cat(numbers)
                parts, numbers = [], []
            parts.append(part)
            numbers.append(number)
    if parts:
        yield _joined(parts), torch.cat(numbers)


def mixed(stream: Stream) -> Iterator[tuple[Samples, Tensor]]:
    """Yield the same as `chunks`, with an equal share of every task in each chunk, in a random order that is always the same.

    So neither what a chunk holds nor where a sample stands in it tells of tasks. The tensors are no views of the data.
    """
    count = -(-sum(len(task.test) for task in stream.tasks) // CHUNK)
    draw = torch.Generator().manual_seed(0)
    for chunk in range(count):
        ends = [[len(task.test) * (chunk + more) // count for more in (0, 1)] for task in stream.tasks]
        parts = [task.test[first:end] for task, (first, end) in zip(stream.tasks, ends, strict=True)]
        number = torch.cat([torch.full((len(part),), task.id) for task, part in zip(stream.tasks, parts, strict=True)])
        order = torch.randperm(len(number), generator=draw)
        samples = Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        samples = samples[order.to(samples.y.device)]
        yield samples if stream.device is None else samples.to(stream.device), number[order].to(stream.device or "cpu")


def _joined(parts: list[Samples]) -> Samples:
    return parts[0] if len(parts) == 1 else Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def check_scores(scores: Tensor, samples: Samples, stream: Stream, strategy: Strategy) -> None:
    """Refuse scores that are not (samples, classes)."""
    if scores.dim() != 2 or len(scores) != len(samples) or scores.shape[1] < stream.classes:
        model = getattr(strategy, "model", strategy)
        raise ValueError(
            f"{type(model).__name__} answers {len(samples)} samples with {tuple(scores.shape)}, but {stream.name} asks for "
            f"{(len(samples), stream.classes)}: build it with classes={stream.classes}"
        )


def check_labels(answers: tuple[object, ...], samples: Samples, strategy: Strategy) -> None:
    """Refuse answers of `predict` that are not one label a sample."""
    for answer in answers:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        if not isinstance(answer, Tensor) or answer.shape != samples.y.shape:
            raise ValueError(
                f"{type(strategy).__name__}.predict answers {len(samples)} samples with {shape}, not a tensor of one label each"
            )
