"""Evaluation: one pass over the union of the test sets gives the class-IL and the task-IL row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clstream.eval_mode import evaluating as evaluating
from clstream.measures.flops import same_flops
from clstream.strategy import Strategy
from clstream.stream import Samples, Stream
from clstream.stream.samples import pooled

CHUNK = 2048
"""Test samples that are scored together."""


def evaluate(strategy: Strategy, stream: Stream, questions: Questions | None = None) -> tuple[Tensor, Tensor]:
    """Return the accuracy on each task of the stream, without and with the task given: two (tasks,), float64, on the CPU.

    It is NaN for tasks that are not among the questions.

    A strategy that keeps the base's `scores` and `predict` answers both questions from one forward pass over the union of the
    test sets; one that overrides them is asked task by task, without and with the task, since its answer may depend on it. If the
    stream hides its boundaries, the strategy is never given the task: the answer with the task is then the highest of its scores
    among the task's classes, and the samples of all tasks come mixed.

    Args:
        strategy, stream: who is asked, and about what.
        questions: `Questions(strategy, stream)`, kept by who asks again and again. None: made for this once.

    Raises:
        ValueError, TypeError: if the answers have the wrong shape or type.
        FloatingPointError: if scores hold NaN.

    """
    questions = Questions(strategy, stream) if questions is None else questions
    once = strategy.scores_ignore_task
    hits = torch.zeros(len(stream.tasks), 2, dtype=torch.int64, device=stream.device)
    unknown = torch.zeros((), dtype=torch.bool, device=stream.device)
    asked: set[int | None] = set()
    with evaluating(strategy):
        for samples, number in questions:
            kind = None if once or not stream.boundaries else int(number[0])
            begun = kind in asked
            asked.add(kind)
            with same_flops((len(samples), kind, begun)):
                if once or not stream.boundaries:
                    scores = strategy.scores(samples.x)
                    check_scores(scores, samples, stream, strategy)
                    first = scores.argmax(1) if once else strategy.predict(samples.x)
                    answers = first, questions.best_of_task(scores, number)
                    unknown |= scores.amax().isnan()  # NaN is the greatest there is
                else:
                    task = stream.tasks[int(number[0])]
                    answers = strategy.predict(samples.x), strategy.predict(samples.x, task)
                check_labels(answers, samples, strategy)
                hits.index_add_(0, number, torch.stack([answer == samples.y for answer in answers], 1).long())
    if unknown:
        raise FloatingPointError(
            f"{type(strategy).__name__} answers test samples of {stream.name} with NaN: its weights are not finite"
        )
    rows = hits.cpu().double() / questions.sizes[:, None]  # NaN for a task that is not asked about
    return rows[:, 0].contiguous(), rows[:, 1].contiguous()


class Questions:
    """The test samples of tasks in chunks, laid out once: iterated, it gives samples, and the number of the task of each.

    Where boundaries show, a chunk holds task after task. Small tasks share one if the strategy's scores ignore the task: a hundred
    of them cost about what one large one does. Where boundaries are hidden, each chunk holds an equal share of every task, in a
    random order that is always the same, in tensors that are no views of the data: neither what a chunk holds nor where a sample
    stands in it tells of tasks.

    Args:
        strategy, stream: who is asked, and about what.
        asked: (tasks,), bool: which tasks are asked about, one at least. None: all.

    """

    def __init__(self, strategy: Strategy, stream: Stream, asked: Tensor | None = None) -> None:
        self.device = stream.device
        self.asked = torch.ones(len(stream.tasks), dtype=torch.bool) if asked is None else asked
        tasks = [task for task, ask in zip(stream.tasks, self.asked.tolist(), strict=True) if ask]
        self.tests = [task.test for task in tasks]
        self.pool = pooled(self.tests)
        sizes = torch.tensor([len(test) for test in self.tests])
        self.sizes = torch.zeros(len(stream.tasks), dtype=torch.int64).masked_scatter(self.asked, sizes)
        self.y = torch.cat([test.y for test in self.tests]).to(stream.device or "cpu")
        self.number = self.asked.nonzero().flatten().repeat_interleave(sizes).to(stream.device or "cpu")
        self.chunks = (
            _packed(sizes, together=strategy.scores_ignore_task)
            if stream.boundaries
            else _mixed(sizes, in_pieces=self.pool is None)
        )
        kinds = {tuple(sorted(task.classes)): 0 for task in stream.tasks}  # tasks that share their classes share a row
        kinds = {classes: place for place, classes in enumerate(kinds)}
        width = max(map(len, kinds))
        columns = torch.tensor([[*classes, *classes[-1:] * (width - len(classes))] for classes in kinds])
        self.columns = columns.to(stream.device or "cpu")
        self.kind = torch.tensor([kinds[tuple(sorted(task.classes))] for task in stream.tasks], device=stream.device)

    def __iter__(self) -> Iterator[tuple[Samples, Tensor]]:
        for chunk in self.chunks:
            rows = chunk.rows if isinstance(chunk.rows, slice) else chunk.rows.to(self.y.device)
            yield Samples(self._inputs(chunk), self.y[rows]), self.number[rows]

    def _inputs(self, chunk: Chunk) -> Tensor:
        """Return the inputs of a chunk, on the device."""
        if self.pool is not None:
            rows = chunk.rows if isinstance(chunk.rows, slice) else chunk.rows.to(self.pool.index.device)
            x = self.pool[rows].x
        else:
            parts = [self.tests[place][first:end].x for place, first, end in chunk.pieces]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            x = x if chunk.order is None else x[chunk.order.to(x.device)]
        return x if self.device is None else x.to(self.device)

    def best_of_task(self, scores: Tensor, number: Tensor) -> Tensor:
        """Return for each sample the class of its task with the highest score; 0 where none of them competes."""
        columns = self.columns[self.kind[number]]
        best, place = scores.gather(1, columns).max(1)
        return columns.gather(1, place[:, None])[:, 0].masked_fill(best == float("-inf"), 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The test samples of a chunk, among those of all tasks one after the other.

    Args:
        rows: their numbers.
        pieces: the same by task: its place, its first sample here, and the one after its last.
        order: of the samples, where they don't come piece by piece.

    """

    rows: Tensor | slice
    pieces: Sequence[Sequence[int]]
    order: Tensor | None = None


def _packed(sizes: Tensor, together: bool) -> list[Chunk]:
    """Return chunks of one task after the other; small tasks share one if `together`."""
    chunks: list[Chunk] = []
    begin, end = 0, 0
    pieces: list[Sequence[int]] = []
    for task, size in enumerate(sizes.tolist()):
        for first in range(0, size, CHUNK):
            piece = task, first, min(first + CHUNK, size)
            if pieces and (not together or end + piece[2] - first - begin > CHUNK):
                chunks.append(Chunk(slice(begin, end), pieces))
                begin, pieces = end, []
            pieces.append(piece)
            end += piece[2] - first
    return [*chunks, Chunk(slice(begin, end), pieces)]


def _mixed(sizes: Tensor, in_pieces: bool) -> list[Chunk]:
    """Return chunks of an equal share of every task, in a random order; their pieces only if asked for."""
    starts, count = sizes.cumsum(0) - sizes, -(-int(sizes.sum()) // CHUNK)
    draw = torch.Generator().manual_seed(0)
    chunks = []
    for number in range(count):
        first, end = sizes * number // count, sizes * (number + 1) // count
        share = end - first
        rows = torch.arange(int(share.sum())) + (starts + first - share.cumsum(0) + share).repeat_interleave(share)
        order = torch.randperm(len(rows), generator=draw)
        if not len(order):  # of many small tasks: the others hold a sample more of each
            continue
        pieces = torch.stack([torch.arange(len(sizes)), first, end], 1)[share > 0].tolist() if in_pieces else []
        chunks.append(Chunk(rows[order], pieces, order))
    return chunks


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
