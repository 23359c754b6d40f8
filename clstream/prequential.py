"""Prequential accuracy: each batch is a test first, then it is learned (Dawid 1984; Gama, Sebastiao, Rodrigues 2013)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clstream.bus import on
from clstream.evaluation import evaluating
from clstream.events import BatchReady, Event, RunStarted, SessionEnded
from clstream.params import check_integer


@dataclass(frozen=True, slots=True, eq=False)
class PrequentialMeasured(Event):
    """A session is over: the accuracy on its samples, and on all samples so far, before they were learned."""

    session: float
    mean: float

    def curves(self) -> dict[str, float]:
        """Return both, for the tracker."""
        return {"prequential/session": self.session, "prequential/mean": self.mean}


class Prequential:
    """An observer that has the strategy label each batch before it learns it; nothing in the run is changed by that.

    The first epoch of a session counts alone: later ones bring what was learned. The strategy is asked by `Strategy.anticipate`.
    Hits stay on the device until they are asked for. When a session ends it emits `PrequentialMeasured`, so the tracker draws it.

    Args:
        every: ask at every so many batches.

    """

    def __init__(self, every: int = 1) -> None:
        check_integer(1, every=every)
        self.every = every
        self._begin()

    def _begin(self) -> None:
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []
        self.first = 0  # of this session's, among them
        self.before = torch.zeros(2, dtype=torch.int64)  # hits and samples of the sessions before

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget what was before."""
        self.started = event
        self._begin()

    @on(BatchReady)
    def ask(self, event: BatchReady) -> None:
        """Ask for the batch's labels."""
        batch = event.batch
        if batch.epoch or batch.index % self.every:
            return
        strategy, samples = self.started.strategy, batch.samples
        with evaluating(strategy):
            self.hits.append((strategy.anticipate(samples.x) == samples.y).sum())
        self.sizes.append(len(samples))

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Hits and samples of each batch that was asked: two (batches,), int64, on the CPU."""
        hits = torch.stack(self.hits).cpu() if self.hits else torch.zeros(0, dtype=torch.int64)
        return hits, torch.tensor(self.sizes, dtype=torch.int64)

    def _sums(self, first: int) -> Tensor:
        """Return hits and samples since some batch: (2,), int64."""
        hits = int(torch.stack(self.hits[first:]).sum()) if self.hits[first:] else 0
        return torch.tensor([hits, sum(self.sizes[first:])])

    @property
    def accuracy(self) -> float:
        """The accuracy on all samples so far; NaN if there are none."""
        return _share(self._sums(0))

    def curve(self, window: int = 100) -> Tensor:
        """Return the accuracy over the newest `window` batches that were asked, at each of them: (batches,), float64."""
        check_integer(1, window=window)
        sums = [each.cumsum(0).double() for each in self.counts]
        late = [total - torch.cat([total.new_zeros(min(window, len(total))), total[:-window]]) for total in sums]
        return late[0] / late[1]

    @on(SessionEnded)
    def tell(self, event: SessionEnded) -> None:
        """Tell everyone."""
        session = self._sums(self.first)
        self.first, self.before = len(self.sizes), self.before + session
        measured = PrequentialMeasured(_share(session), _share(self.before))
        if self.started.run is not None:
            self.started.run.watching.emit(measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"hits": self.counts[0], "sizes": list(self.sizes), "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        device = self.started.stream.device or "cpu"
        self.hits = list(state["hits"].to(device).unbind())
        self.sizes, self.first = list(state["sizes"]), state["first"]
        self.before = torch.stack([state["hits"][: self.first].sum(), torch.tensor(sum(self.sizes[: self.first]))])


def _share(sums: Tensor) -> float:
    hits, samples = sums.tolist()
    return hits / samples if samples else math.nan
