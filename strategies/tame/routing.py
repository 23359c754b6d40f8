"""Routing: an observer that measures which expert answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from clstream.strategies.tame.tame import TAME

from clstream.bus import Event, ObserverError, on
from clstream.evaluation import CHUNK, evaluating
from clstream.events import BatchLearned, RunStarted, SessionEnded, SessionStarted


@dataclass(frozen=True, slots=True, eq=False)
class RoutingMeasured(Event):
    """A session is over. Shares of test samples of the tasks taught so far, the mean over tasks; and parameters that answer.

    `selector` went to the expert that learned most of their task; `strict` did, and got the right label there.
    """

    selector: float
    strict: float
    parameters: int
    parameters_left: int

    def curves(self) -> dict[str, float]:
        """Return all of it, for the tracker."""
        return {
            "routing/selector_accuracy": self.selector,
            "routing/strict_accuracy": self.strict,
            "parameters/dense": self.parameters,
            "parameters/sparse": self.parameters_left,
        }


class Routing:
    """An observer that measures where test samples are sent; it knows the tasks, which TAME does not.

    `measured` has an event for each session. It emits `RoutingMeasured`, so the tracker draws it. Raises ObserverError
    where a run starts that is not one of TAME.
    """

    def __init__(self) -> None:
        self.learned: dict[tuple[int, int], int] = {}  # batches, by task and expert
        self.measured: list[RoutingMeasured] = []

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start anew, on the stream and the strategy of the run."""
        if not isinstance(event.strategy, TAME):
            raise ObserverError(f"Routing watches TAME, not {type(event.strategy).__name__}")
        self.started, self.strategy = event, event.strategy
        self.task = 0
        self.learned, self.measured = {}, []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "task": self.task,
            "learned": [[*key, n] for key, n in self.learned.items()],
            "measured": [[shares.selector, shares.strict, shares.parameters, shares.parameters_left] for shares in self.measured],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.task = state["task"]
        self.learned = {(task, expert): n for task, expert, n in state["learned"]}
        self.measured = [RoutingMeasured(*numbers) for numbers in state["measured"]]

    @on(SessionStarted)
    def note_task(self, event: SessionStarted) -> None:
        """Remember the task that the session is of."""
        self.task = self.started.stream.task_of(event.session.index)

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        """Count the batch for the expert that learned it."""
        key = self.task, self.strategy.active
        self.learned[key] = self.learned.get(key, 0) + 1

    def homes(self) -> dict[int, int]:
        """Return for each task taught the expert that learned most of it."""
        best: dict[int, tuple[int, int]] = {}
        for (task, expert), n in sorted(self.learned.items()):
            if task not in best or n > best[task][0]:
                best[task] = n, expert
        return {task: expert for task, (_, expert) in best.items()}

    @on(SessionEnded)
    def measure(self, event: SessionEnded) -> None:
        """Route the test samples of the tasks taught, and emit what was measured."""
        stream, strategy, homes = self.started.stream, self.strategy, self.homes()
        shares = []
        with evaluating(strategy):
            for task, home in homes.items():
                test = stream.tasks[task].test
                hits = torch.zeros(2, dtype=torch.int64, device=stream.device)
                for start in range(0, len(test), CHUNK):
                    part = test[start : start + CHUNK].to(stream.device or "cpu")
                    home_rows = strategy.route(part.x) == home
                    hits += torch.stack([home_rows.sum(), (home_rows & (strategy.predict(part.x) == part.y)).sum()])
                shares.append(hits.double() / len(test))
            dense, sparse = strategy.parameter_counts()
        selector, strict = torch.stack(shares).mean(0).tolist()
        self.measured.append(RoutingMeasured(selector, strict, dense, sparse))
        if self.started.run is not None:
            self.started.run.emit_to_observers(self.measured[-1])
