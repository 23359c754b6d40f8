"""The ledger of a run's costs, while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from clstream.bus import Stopwatch
from clstream.measures.cost import ADDED, HELD, SENT, Cost
from clstream.measures.flops import KINDS, METER, FlopMeter
from clstream.measures.memory import Answering, count_parameters, memory_by_attribute, peak_bytes, storages_of_stream
from clstream.stream import Stream


class Ledger:
    """Keeps what each session of a run costs.

    Args:
        strategy, stream, device: of the run.
        seconds: returns how long the run took so far.
        tracking: measures what observers take.

    """

    def __init__(
        self, strategy: Answering, stream: Stream, device: torch.device, seconds: Callable[[], float], tracking: Stopwatch
    ) -> None:
        self.strategy, self.stream, self.device, self.seconds, self.tracking = strategy, stream, device, seconds, tracking
        self.meter = FlopMeter(strategy, lambda: tracking.depth > 0)
        self.spent = {"consolidating": 0.0, "evaluating": 0.0}  # seconds; those of "compiling" only if steps are compiled
        self.rows: list[list[float]] = []  # of sessions that are over, in the order of the columns
        self.sent: list[list[int]] = []  # the bytes up and down until the end of each of these
        self.epochs_saved = [0]  # by early stopping, in each session so far
        self.before = [0.0] * len(ADDED)  # what had added up before the session that goes on
        self.held = [float("nan")] * (len(HELD) - 1)
        self.memory: dict[str, int] = {}

    @cached_property
    def of_stream(self) -> set[tuple[str, int]]:
        """Where the stream's samples are."""
        return storages_of_stream(self.stream)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have blocks of `same_flops` counted here."""
        token = METER.set(self.meter)
        try:
            yield
        finally:
            METER.reset(token)

    @contextmanager
    def consolidating(self) -> Iterator[None]:
        """Measure what the strategy does when a session ends."""
        with self.meter.counting("consolidating"), self._timed("consolidating"):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure an evaluation, whose chunks are blocks of `same_flops`."""
        self.meter.look()
        with self.meter.counting("evaluating", wholly=False), self._timed("evaluating"):
            yield

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begin, tracked = time.perf_counter(), self.tracking.seconds
        yield
        self.spent[kind] += time.perf_counter() - begin - (self.tracking.seconds - tracked)

    def begin_session(self, number: int) -> None:
        """Close the row of the session before, if there is one."""
        if number:
            self.meter.flush()
            self.rows.append(self._row())
            self.sent.append([*self.strategy.sent_bytes])
            self.epochs_saved.append(0)
            self.before = self._added()
            self.held = [float("nan")] * len(self.held)

    def look(self) -> None:
        """Look at what the strategy holds, when the session has begun."""
        self.meter.look(steps=True)

    def end_session(self) -> None:
        """Take down what the strategy holds, when the session is over."""
        self.memory = memory_by_attribute(self.strategy, self.of_stream)
        self.held = [*map(float, count_parameters(self.strategy)), float(sum(self.memory.values()))]

    def _added(self) -> list[float]:
        """Return what has added up so far, in the order of the columns."""
        flops = [float(self.meter.totals[kind]) for kind in KINDS]
        spent = [self.spent["consolidating"], self.spent["evaluating"], self.tracking.total]
        return [*flops, max(0.0, self.seconds() - sum(spent) - self.spent.get("compiling", 0.0)), *spent]

    def _row(self) -> list[float]:
        """Return the row of the session that goes on."""
        return [
            *(now - before for now, before in zip(self._added(), self.before, strict=True)),
            *self.held,
            peak_bytes(self.device),
        ]

    def cost(self) -> Cost:
        """Return the costs so far; the last row is of the session that goes on, or was the last."""
        table = torch.tensor([*self.rows, self._row()], dtype=torch.float64)
        skipped = sum(steps.skipped() for steps in self.meter.steps.values())
        table[-1, 0] += skipped
        sent = torch.tensor([[0, 0], *self.sent, [*self.strategy.sent_bytes]], dtype=torch.float64).diff(dim=0)
        return Cost(
            **dict(zip((*ADDED, *HELD, *SENT), torch.cat([table, sent], 1).T.contiguous(), strict=True)),
            epochs_saved=torch.tensor(self.epochs_saved, dtype=torch.float64),
            memory=dict(self.memory),
            compiling_seconds=self.spent.get("compiling", 0.0),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on, as plain values."""
        return {
            "meter": self.meter.state_dict(),
            "spent": dict(self.spent),
            "tracking": self.tracking.total,
            "rows": [list(row) for row in self.rows],
            "before": list(self.before),
            "held": list(self.held),
            "memory": dict(self.memory),
            **({"sent": [list(row) for row in self.sent]} if any(map(any, self.sent)) else {}),
            **({"epochs_saved": list(self.epochs_saved)} if any(self.epochs_saved) else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.meter.load_state_dict(state["meter"])
        self.spent, self.tracking.seconds, self.memory = dict(state["spent"]), state["tracking"], dict(state["memory"])
        self.rows, self.before, self.held = [list(row) for row in state["rows"]], list(state["before"]), list(state["held"])
        self.sent = [list(row) for row in state.get("sent", [[0, 0]] * len(self.rows))]
        self.epochs_saved = list(state.get("epochs_saved", [0] * (len(self.rows) + 1)))

    @staticmethod
    def is_state(state: Mapping[str, Any]) -> bool:
        """Return whether these may be what `state_dict` returns."""
        kinds = {"meter": dict, "spent": dict, "tracking": float, "rows": list, "before": list, "held": list, "memory": dict}
        if state.keys() - {"sent", "epochs_saved"} != kinds.keys() or not all(
            isinstance(state[name], kind) for name, kind in kinds.items()
        ):
            return False
        widths = [len(ADDED) + len(HELD)] * len(state["rows"]) + [len(ADDED), len(HELD) - 1]
        rows = [*state["rows"], state["before"], state["held"]]
        sent = state.get("sent", [[0, 0]] * len(state["rows"]))
        saved = state.get("epochs_saved", [0] * (len(state["rows"]) + 1))
        if not isinstance(sent, list) or len(sent) != len(state["rows"]):
            return False
        if not isinstance(saved, list) or len(saved) != len(state["rows"]) + 1:
            return False
        return (
            FlopMeter.is_state(state["meter"])
            and state["spent"].keys() - {"compiling"} == {"consolidating", "evaluating"}
            and all(isinstance(row, list) and len(row) == width for row, width in zip(rows, widths, strict=True))
            and all(type(number) is float for numbers in (*rows, state["spent"].values()) for number in numbers)
            and all(isinstance(row, list) and len(row) == len(SENT) for row in sent)
            and all(type(number) is int and 0 <= number < 2**63 for row in sent for number in row)
            and all(type(number) is int and 0 <= number < 2**31 for number in saved)
            and all(isinstance(name, str) and type(size) is int for name, size in state["memory"].items())
        )
