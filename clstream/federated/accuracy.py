"""Accuracy of clients and server on base classes, field classes and missions: Eval 0, 1 and 2 of federated reconnaissance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from clstream.bus import Event, ObserverError, on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionEnded
from clstream.federated.events import ClientTrained, Merged
from clstream.strategy import Strategy


@dataclass(frozen=True, slots=True, eq=False)
class FederatedMeasured(Event):
    """The server, or a client, was asked about test samples; all classes that it knows compete in each answer.

    Args:
        round: its number, 0 after the base session.
        client: its number; -1: the server.
        base: accuracy on the base classes.
        field: on field classes that were merged, for a client before this round. NaN where there are none.
        mission: on the classes of the client's mission. NaN for the server.

    """

    round: int
    client: int
    base: float
    field: float
    mission: float

    @property
    def mean(self) -> float:
        """The mean of those that are there."""
        there = [value for value in (self.base, self.field, self.mission) if not math.isnan(value)]
        return sum(there) / len(there) if there else math.nan

    def curves(self) -> dict[str, float]:
        """Return the accuracies, for the tracker; of a client those of the last one of a round."""
        where = "server" if self.client < 0 else "client"
        values = {"base": self.base, "field": self.field, "mission": self.mission}
        return {f"federated/{where}_{name}": value for name, value in values.items() if not math.isnan(value)}


class FederatedAccuracy:
    """Measures the server after the base session and after each merge, and each client when it has learned.

    The first task of the stream has the base classes, all others field classes. A class counts as known from the merge on that
    first brings it. `rows` has all that was measured; each is emitted too, so that the tracker draws it. Clients in other processes
    are not asked.
    """

    def __init__(self) -> None:
        self.rows: list[FederatedMeasured] = []
        self.merged: set[int] = set()
        self.tests: tuple[Tensor, Tensor] | None = None

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before. Raises ObserverError for a stream of one task."""
        tasks = event.stream.tasks
        if len(tasks) < 2:
            raise ObserverError(f"{event.stream.name} has no field classes: FederatedAccuracy needs a stream of streams.federated")
        self.rows, self.merged, self.strategy = [], set(), event.strategy
        self.base = set(tasks[0].classes)
        self.tests = torch.cat([task.test.x for task in tasks]), torch.cat([task.test.y for task in tasks])

    @on(SessionEnded)
    def ask_after_base(self, event: SessionEnded) -> None:
        """Ask the server after the base session: Eval 0."""
        if event.session.index == 0 and not self.rows:
            self.measure(self.strategy, 0, -1, (), ())

    @on(ClientTrained)
    def ask_client(self, event: ClientTrained) -> None:
        """Ask a client: Eval 1."""
        if event.strategy is not None:
            self.measure(event.strategy, event.round, event.client, self.merged, event.classes)

    @on(Merged)
    def ask_server(self, event: Merged) -> None:
        """Ask the server after a merge: Eval 2."""
        self.merged |= set(event.classes) - self.base
        self.measure(self.strategy, event.round, -1, self.merged, ())

    def measure(self, strategy: Strategy, number: int, client: int, field: Iterable[int], mission: Iterable[int]) -> None:
        """Take the accuracies of a strategy now, and emit them."""
        assert self.tests is not None
        x, y = self.tests
        groups = [torch.isin(y, y.new_tensor(sorted(labels))) for labels in (self.base, field, mission)]
        asked = groups[0] | groups[1] | groups[2]
        with evaluating(strategy):
            right = torch.cat([strategy.predict(part) for part in x[asked].split(512)]) == y[asked]
        means = [float(right[group[asked]].double().mean()) if bool(group.any()) else math.nan for group in groups]
        self.rows.append(FederatedMeasured(number, client, *means))
        self.strategy.emit(self.rows[-1])

    def server(self) -> list[FederatedMeasured]:
        """Return what the server was measured at, by rounds from 0: Eval 0, then each Eval 2."""
        return [row for row in self.rows if row.client < 0]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on, as plain values."""
        return {"rows": [list(astuple(row)) for row in self.rows], "merged": sorted(self.merged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.rows, self.merged = [FederatedMeasured(*row) for row in state["rows"]], set(state["merged"])
