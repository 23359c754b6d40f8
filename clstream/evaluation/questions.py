"""Questions: the test samples of a stream, laid out once in chunks that are answered together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clstream.measures import Measure, chosen
from clstream.strategy import Strategy
from clstream.stream import Stream, TestSet
from clstream.stream.samples import pooled, repeated_samples

CHUNK = 2048
"""The most test samples that are answered together."""

IMAGES_ON_CPU = 192
"""The most images on a CPU: the layers of more would each take fresh memory, and convolutions are thrice as slow then.

Small images are as many as other samples where the strategy's model has no convolutions.
"""

SMALL_IMAGE = 4096
"""Numbers that a small image has at most."""

BUILT_IN = ("accuracy", "task_accuracy")
"""Measures that are counted for all test sets together, whatever their number."""


class Questions:
    """The test samples of a stream in chunks, laid out once, and the measures that are taken of the answers.

    Where boundaries show, a chunk holds test set after test set. Small ones share one if the strategy's scores ignore the task: a
    hundred of them cost about what one large one does. Where boundaries are hidden, each chunk holds an equal share of every test
    set, in a random order that is always the same, in tensors that are no views of the data: neither what a chunk holds nor where
    a sample stands in it tells of tasks, or of probes.

    Args:
        strategy, stream: who is asked, and about what.
        asked: (tasks,), bool: which tasks are asked about; probes of others are left out too. None: all.
        measures: that are taken. None: the main ones of the stream.

    """

    def __init__(
        self, strategy: Strategy, stream: Stream, asked: Tensor | None = None, measures: Sequence[Measure] | None = None
    ) -> None:
        self.stream, self.device = stream, stream.device
        self.measures = chosen(None, stream.targets, stream.scenario) if measures is None else tuple(measures)
        self.asked = torch.ones(len(stream.tasks), dtype=torch.bool) if asked is None else asked
        self.asks_novelty = any(measure.asks == "novelty" for measure in self.measures)
        ask = torch.tensor([self._is_asked(test_set) for test_set in stream.test_sets])
        self.places = ask.nonzero().flatten().tolist()  # of what is asked about, among all test sets
        self.tests = [stream.test_sets[place].samples for place in self.places]
        self.pool = pooled(self.tests) if self.tests else None
        sizes = torch.tensor([len(test) for test in self.tests], dtype=torch.int64)
        self.sizes = torch.zeros(len(ask), dtype=torch.int64).masked_scatter(ask, sizes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        device = stream.device or "cpu"
        self.number = ask.nonzero().flatten().repeat_interleave(sizes).to(device)
        self.targets = {place: test.y.to(device) for place, test in zip(self.places, self.tests, strict=True)}
        kinds = {test_set.samples.target for test_set in stream.test_sets if test_set.known is not False}
        self.labelled = "label" in kinds and any(measure.name in BUILT_IN for measure in self.measures)
        labels = [
            y if self.has_labels(place) else y.new_full((len(y),), -1, dtype=torch.int64) for place, y in self.targets.items()
        ]
        self.labels = torch.cat(labels) if self.labelled and labels else torch.empty(0, dtype=torch.int64, device=device)
        on_cpu = stream.device is None or stream.device.type == "cpu"
        few = on_cpu and len(stream.input_shape) == 3 and (math.prod(stream.input_shape) > SMALL_IMAGE or _convolves(strategy))
        most = IMAGES_ON_CPU if few else CHUNK
        self.chunks = (
            _packed(sizes, most, together=strategy.scores_ignore_task)
            if stream.boundaries
            else _mixed(sizes, most, in_pieces=self.pool is None)
        )
        rows = {tuple(sorted(task.classes)): 0 for task in stream.tasks if task.classes}  # tasks that share their classes share one
        rows = {classes: place for place, classes in enumerate(rows)}
        width = max(map(len, rows), default=1)
        table = torch.tensor([[*classes, *classes[-1:] * (width - len(classes))] for classes in rows] or [[0]])
        self.columns = table.to(device)
        numbers = [rows.get(tuple(sorted(task.classes)), 0) for task in stream.tasks]
        of_sets = [0 if test_set.task is None else numbers[test_set.task] for test_set in stream.test_sets]
        self.kind = torch.tensor(of_sets, device=stream.device)

    def _is_asked(self, test_set: TestSet) -> bool:
        """Return whether there is anything to ask about a test set."""
        if not len(test_set.samples) or (test_set.known is False and not self.asks_novelty):
            return False
        return test_set.task is None or bool(self.asked[test_set.task])

    def has_labels(self, place: int) -> bool:
        """Return whether a test set has labels of the stream's classes."""
        test_set = self.stream.test_sets[place]
        return test_set.samples.target == "label" and test_set.known is not False

    @cached_property
    def labelled_sizes(self) -> Tensor:
        """(test sets, 2), float64: how many samples have labels, without and with the task given."""
        places = range(len(self.stream.test_sets)) if self.labelled else ()
        labelled = torch.tensor([self.has_labels(place) for place in places], dtype=torch.bool)
        of_tasks = torch.tensor([self.stream.test_sets[place].task is not None for place in places], dtype=torch.bool)
        if not self.labelled:
            return torch.zeros(len(self.sizes), 2, dtype=torch.float64)
        return self.sizes.double()[:, None] * torch.stack([labelled, labelled & of_tasks], 1)

    def __iter__(self) -> Iterator[Chunk]:
        for layout in self.chunks:
            rows = layout.rows if isinstance(layout.rows, slice) else layout.rows.to(self.number.device)
            number = self.number[rows]
            places = [self.places[place] for place, _, _ in layout.pieces] or number.unique().tolist()
            yield Chunk(self._inputs(layout), rows, number, list(dict.fromkeys(places)))

    def _inputs(self, layout: Layout) -> Tensor:
        """Return the inputs of a chunk, on the device."""
        if self.pool is not None:
            rows = layout.rows if isinstance(layout.rows, slice) else layout.rows.to(self.pool.index.device)
            x = self.pool[rows].x
        else:
            parts = [self.tests[place][first:end].x for place, first, end in layout.pieces]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            x = x if layout.order is None else x[layout.order.to(x.device)]
        return x if self.device is None else x.to(self.device)

    def best_of_task(self, scores: Tensor, number: Tensor) -> Tensor:
        """Return for each sample the class of its task with the highest score; 0 where none of them competes."""
        columns = self.columns.index_select(0, self.kind.index_select(0, number))
        best, place = scores.gather(1, columns).max(1)
        return columns.gather(1, place[:, None])[:, 0].masked_fill(best == float("-inf"), 0)

    @cached_property
    def repeated(self) -> Tensor | None:
        """(samples,), int64: equal numbers for the same sample in test sets of several tasks; None if there is no such sample."""
        own = [test for place, test in zip(self.places, self.tests, strict=True) if place < len(self.stream.tasks)]
        numbers = repeated_samples(own)
        if numbers is None:
            return None
        probes = torch.arange(len(numbers), len(self.number), device=numbers.device)  # after the tasks' own
        return torch.cat([numbers, probes]).to(self.number.device)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the test samples of a chunk are, among those of all test sets one after the other.

    Args:
        rows: their numbers.
        pieces: the same by test set: its place among those asked about, its first sample here, and the one after its last.
        order: of the samples, where they don't come piece by piece.

    """

    rows: Tensor | slice
    pieces: Sequence[Sequence[int]]
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Test samples that are answered together.

    Args:
        x: the inputs.
        rows: their numbers, among the samples of all test sets.
        number: (n,), the number of the test set of each, among those of the stream.
        places: these numbers, each once.

    """

    x: Tensor
    rows: Tensor | slice
    number: Tensor
    places: list[int]


def _convolves(strategy: Strategy) -> bool:
    """Return whether the strategy's model has convolutions, as far as is known."""
    model: object = getattr(strategy, "model", None)
    return not isinstance(model, nn.Module) or any(isinstance(module, _ConvNd) for module in model.modules())


def _packed(sizes: Tensor, most: int, together: bool) -> list[Layout]:
    """Return chunks of at most so many samples, of one test set after the other; small ones share one if `together`."""
    chunks: list[Layout] = []
    begin, end = 0, 0
    pieces: list[Sequence[int]] = []
    for place, size in enumerate(sizes.tolist()):
        for first in range(0, size, most):
            piece = place, first, min(first + most, size)
            if pieces and (not together or end + piece[2] - first - begin > most):
                chunks.append(Layout(slice(begin, end), pieces))
                begin, pieces = end, []
            pieces.append(piece)
            end += piece[2] - first
    return [*chunks, Layout(slice(begin, end), pieces)] if pieces else chunks


def _mixed(sizes: Tensor, most: int, in_pieces: bool) -> list[Layout]:
    """Return chunks of an equal share of every test set, in a random order; their pieces only if asked for."""
    starts, count = sizes.cumsum(0) - sizes, -(-int(sizes.sum()) // most)
    draw = torch.Generator().manual_seed(0)
    chunks = []
    for number in range(count):
        first, end = sizes * number // count, sizes * (number + 1) // count
        share = end - first
        rows = torch.arange(int(share.sum())) + (starts + first - share.cumsum(0) + share).repeat_interleave(share)
        order = torch.randperm(len(rows), generator=draw)
        if not len(order):  # of many small test sets: the others hold a sample more of each
            continue
        pieces = torch.stack([torch.arange(len(sizes)), first, end], 1)[share > 0].tolist() if in_pieces else []
        chunks.append(Layout(rows[order], pieces, order))
    return chunks
