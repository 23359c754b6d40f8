"""The tally of an evaluation: hits and what measures take up, chunk by chunk, until the values are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property, partial

import torch
from torch import Tensor

from clstream.evaluation.answers import ChunkAnswers
from clstream.evaluation.questions import BUILT_IN, Chunk, Questions
from clstream.measures import Answers, Measure
from clstream.stream import TestSet

Listener = Callable[[TestSet, Answers, Tensor, Tensor], None]
"""What is told of answers: the test set, the answers about some of its samples, their targets, and their numbers in it."""


class Tally:
    """What is counted and kept of the answers of one evaluation, until the values are taken.

    Args:
        questions: that are asked.
        seen: (tasks,), bool: the tasks taught so far.

    """

    def __init__(self, questions: Questions, seen: Tensor) -> None:
        self.questions, self.seen = questions, seen
        stream, device = questions.stream, questions.device
        self.sets = len(stream.test_sets)
        self.hits = torch.zeros(self.sets, 2, dtype=torch.int64, device=device)
        self.hits_seen = torch.zeros(2, dtype=torch.int64, device=device)
        self.measures = [measure for measure in questions.measures if measure.name not in BUILT_IN]
        self.columns_seen = torch.zeros(stream.outputs, dtype=torch.bool, device=device)
        self.columns_seen[: stream.classes] = stream.task_heads[seen].any(0).to(device or "cpu")
        self.own = torch.zeros(self.sets, dtype=torch.bool)  # test sets of tasks that were taught
        self.own[: len(stream.tasks)] = seen & questions.asked
        self.taught = {
            place: self.columns_seen[questions.targets[place]]  # samples of classes that were taught
            for place in questions.places
            if stream.test_sets[place].known == "taught"
        }
        self.labels = questions.labels
        for place, taught in self.taught.items() if questions.labelled else ():
            self.labels = self.labels.clone()  # those of classes that were not taught are never right
            self.labels[int(questions.starts[place]) :][: len(taught)].masked_fill_(~taught, -1)
        self.parts: dict[tuple[int, str], Measure] = {}  # by test set and name, of those that were given something
        self.novelty: dict[int, list[tuple[Tensor, Tensor]]] = {}  # with the places of the samples in the test set

    @cached_property
    def counted(self) -> Tensor:
        """(samples,), bool: the test samples of the tasks seen, each of several test sets once."""
        counted = self.own.to(self.questions.number.device)[self.questions.number]
        if self.questions.repeated is not None:
            rows, same = counted.nonzero().flatten(), self.questions.repeated[counted]
            first = torch.full_like(self.questions.repeated, len(counted)).scatter_reduce(0, same, rows, "amin")
            counted = torch.zeros_like(counted).index_fill_(0, first[same], True)
        return counted

    def part(self, place: int, measure: Measure) -> Measure:
        """Return the copy of a measure that takes up the answers about a test set."""
        key = place, measure.name
        if key not in self.parts:
            self.parts[key] = deepcopy(measure)
        return self.parts[key]

    def count_hits(self, chunk: Chunk, answered: ChunkAnswers) -> None:
        """Count the right labels of each test set, without and with the task given."""
        y = self.labels[chunk.rows]
        hits = torch.stack([answer == y for answer in (answered.labels, answered.labels_with_task)], 1).long()
        self.hits.index_add_(0, chunk.number, hits)
        if self.questions.repeated is not None:
            self.hits_seen += hits[self.counted[chunk.rows]].sum(0)

    def update(self, chunk: Chunk, answered: ChunkAnswers, place: int, listener: Listener | None) -> None:
        """Give the measures, then the listener, what was answered about the samples of a test set."""
        stream, test_set = self.questions.stream, self.questions.stream.test_sets[place]
        rows = (chunk.number == place).nonzero().flatten()
        numbers = (
            torch.arange(chunk.rows.start, chunk.rows.stop, device=rows.device) if isinstance(chunk.rows, slice) else chunk.rows
        )
        numbers = numbers[rows]
        local = numbers - int(self.questions.starts[place])
        y = self.questions.targets[place][local]
        task = None if test_set.task is None else stream.tasks[test_set.task]
        columns = None
        if test_set.samples.target == "multilabel":
            columns = self.columns_seen if task is None else _columns(task.classes, stream.outputs, self.columns_seen)
        if self.questions.asks_novelty:
            self.novelty.setdefault(place, []).append((local, answered.novelty[rows]))
        if test_set.known is not False:
            self._update_measures(answered, place, rows, numbers, columns)
        if listener is not None:  # last: what an observer asks for first is nobody's cost
            given = stream.scenario == "task" and task is not None
            listener(test_set, answered.of(rows, test_set, columns, with_task=given), y, local)

    def _update_measures(self, answered: ChunkAnswers, place: int, rows: Tensor, numbers: Tensor, columns: Tensor | None) -> None:
        """Give the measures what was answered about known samples: by their rows in the chunk, their numbers among all."""
        test_set = self.questions.stream.test_sets[place]
        local = numbers - int(self.questions.starts[place])
        y = self.questions.targets[place][local]
        counted = self.counted[numbers] if bool(self.own[place]) else None
        taught = self.taught[place][local] if place in self.taught else None
        for measure in self.measures:
            with_task = measure.asks == "task"
            if measure.asks == "novelty" or test_set.samples.target not in measure.targets or (with_task and test_set.task is None):
                continue
            kept = rows if taught is None else rows[taught]
            if len(kept):
                answers = answered.of(kept, test_set, columns, with_task)
                self.part(place, measure).update(answers, y if taught is None else y[taught])
            if counted is not None and counted.any():
                asked = None if columns is None else self.columns_seen
                self.part(self.sets, measure).update(answered.of(rows[counted], test_set, asked, with_task), y[counted])

    def values(self) -> dict[str, Tensor]:
        """Return the values by measure: (test sets + 1,), float64, on the CPU."""
        values = {
            measure.name: self._accuracies(measure.asks == "task")
            if measure.name in BUILT_IN
            else torch.full((self.sets + 1,), torch.nan, dtype=torch.float64)
            for measure in self.questions.measures
        }
        for measure in self.measures:
            if measure.asks == "novelty":
                self._compare_with_known(measure)
        for (place, name), part in self.parts.items():
            values[name][place] = _number(part)
        return values

    def _accuracies(self, with_task: bool) -> Tensor:
        questions, column = self.questions, int(with_task)
        hits, sizes = self.hits.cpu()[:, column].double(), questions.labelled_sizes[:, column].clone()
        for place, taught in self.taught.items():
            sizes[place] = int(taught.sum()) if sizes[place] else 0
        own = self.own & (sizes > 0)
        if questions.repeated is None:
            seen = hits[own].sum() / sizes[own].sum()
        else:
            labels = own.to(questions.number.device)[questions.number] & self.counted
            seen = self.hits_seen[column].cpu().double() / labels.sum().cpu()
        return torch.cat([torch.where(sizes > 0, hits / sizes, torch.nan), seen[None]])

    def _compare_with_known(self, measure: Measure) -> None:
        """Give a measure of novelty, for each test set with strange samples, these and all known samples seen so far."""
        questions = self.questions
        novelty = {}
        for place, parts in self.novelty.items():
            local, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            novelty[place] = torch.empty_like(values).index_copy_(0, local, values)
        known = []
        for place in questions.places:
            if bool(self.own[place]):
                first = int(questions.starts[place])
                known.append(novelty[place][self.counted[first : first + len(novelty[place])]])
        for place in questions.places if known else ():
            kind = questions.stream.test_sets[place].known
            if kind is not True:
                strange = novelty[place] if kind is False else novelty[place][~self.taught[place]]
                together = torch.cat([*known, strange])
                y = torch.ones(len(together), dtype=torch.int64, device=together.device)
                y[: len(together) - len(strange)] = 0
                self.part(place, measure).update(Answers(_unasked, _unasked, partial(_same, together)), y)


def _number(measure: Measure) -> float:
    """Return the value of a measure. Raises TypeError for what is no number."""
    value: object = measure.compute()
    try:
        return float(value)  # type: ignore[arg-type]  # that is asked
    except (TypeError, ValueError, RuntimeError):
        what = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
        raise TypeError(f"{type(measure).__name__}.compute must return a number, and returned {what}") from None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _unasked() -> Tensor:
    raise AttributeError("a measure that asks for novelty is given the novelty alone, not scores or predictions")


def _columns(classes: Sequence[int], outputs: int, like: Tensor) -> Tensor:
    """Return (outputs,), bool: which outputs are of some classes."""
    columns = torch.zeros(outputs, dtype=torch.bool)
    columns[list(classes)] = True
    return columns.to(like.device)
