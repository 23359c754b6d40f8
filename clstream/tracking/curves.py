"""Curves: the points that a tracker writes of a run, gathered while it goes on. All trackers have them, by the same names.

The step of a point is the number of sessions finished; of `anytime/...` it is the batches learned, and of `final/...` it is 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clstream import events
from clstream.bus import Event, on
from clstream.results import Evaluation
from clstream.tracking.run_metrics import _width, cost_metrics, final_metrics, session_metrics, tasks_by_row, tasks_with_curves

Curve = list[tuple[int, float]]
"""(step, value) of each point."""

_OWN = frozenset(kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event))


class Curves:
    """The base of trackers: keeps losses, counts and times while sessions go on, and makes points of them and of evaluations."""

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self) -> None:
        self._reset_curves()

    def _reset_curves(self) -> None:
        self.started: events.RunStarted | None = None
        self.evaluation: Evaluation | None = None
        self.tasks_by_row: Tensor | None = None  # (evaluations, tasks), bool: which tasks had samples since the one before
        self.probes_written = 0
        self.samples, self.losses = 0, list[Tensor]()
        self.earlier_losses: Tensor | None = None  # losses of this session from before the run was resumed
        self.learning_seconds, self.began = 0.0, 0.0
        self.counts: dict[str, float] = {}
        self.first = 0  # sessions that were finished before, by the run that this one continues

    def _start_curves(self, event: events.RunStarted) -> None:
        """Take up a run that begins, or goes on."""
        self.started = event
        self.title = f"{type(event.strategy).__name__} on {event.stream.name}, seed {event.seed}"
        self.start = self.began = time.perf_counter()

    @on(events.RunContinued)
    def note_earlier(self, event: events.RunContinued) -> None:
        """Take notice of what the run before has written."""
        self.first = event.sessions

    @on(events.SessionStarted)
    def begin(self, event: events.SessionStarted) -> None:
        """Start the clock of the session."""
        self.began, self.samples, self.losses, self.earlier_losses = time.perf_counter(), 0, [], None

    @on(events.BatchLearned)
    def count(self, event: events.BatchLearned) -> None:
        """Keep the loss, on its device, and count the samples."""
        self.samples += len(event.batch.samples)
        self.losses.append(event.loss)

    @on(events.SessionEnded)
    def end(self, event: events.SessionEnded) -> None:
        """Stop the clock of the session."""
        self.learning_seconds = time.perf_counter() - self.began

    @on(Event)
    def count_others(self, event: Event) -> None:
        """Count the events that strategies and detectors emit, and keep the numbers that these want shown as curves."""
        if type(event) not in _OWN:
            name = f"events/{type(event).__name__}"
            self.counts[name] = self.counts.get(name, 0) + 1
            self.counts |= event.curves()

    def _of_session(self, evaluation: Evaluation) -> dict[str, Curve]:
        """Return what there is to write after an evaluation at the end of a session, with those since the one before."""
        assert self.started is not None
        self.tasks_by_row = tasks_by_row(self.started.stream, evaluation.sessions, self.tasks_by_row)
        values = session_metrics(evaluation, self.tasks_by_row.any(0))
        values["seconds"] = time.perf_counter() - self.start
        if self.started.run is not None:
            values |= cost_metrics(self.started.run.cost)
        losses = self._losses()
        if losses is not None:
            values["loss"] = float(losses.mean())
            values["samples_per_second"] = self.samples / self.learning_seconds if self.learning_seconds else math.nan
        step = evaluation.sessions_finished
        return {name: [(step, value)] for name, value in (values | self.counts).items()} | self._probes()

    def _of_run(self, evaluation: Evaluation) -> dict[str, Curve]:
        """Return what there is to write of a run that came to its end."""
        final = final_metrics(evaluation)
        if self.started is not None and self.started.run is not None:
            total = self.started.run.cost.total
            final |= {f"final/{name}": total[name] for name in ("flops", "memory_bytes")}
        return {name: [(0, value)] for name, value in final.items()}  # step 0: MLflow draws bars

    def _losses(self) -> Tensor | None:
        """Return the losses of the session so far, (batches,), or None."""
        parts = [] if self.earlier_losses is None else [self.earlier_losses]
        if self.losses:
            new = torch.stack(self.losses)
            parts = [*(part.to(new.device) for part in parts), new]
        return torch.cat(parts) if parts else None

    def _probes(self) -> dict[str, Curve]:
        """Return the evaluations that were not written yet, by batches learned, if there are any within sessions."""
        evaluation = self.evaluation
        assert evaluation is not None
        before = sum(
            row.sessions < self.first or (row.sessions == self.first and not row.within_session) for row in evaluation.rows
        )
        before = before if self.first else 0
        new = range(max(before, self.probes_written), len(evaluation.probes))
        if self.probes_written <= before and not any(evaluation.rows[index].within_session for index in new):
            return {}
        self.probes_written = len(evaluation.probes)
        width = _width(len(evaluation.baseline))
        return {
            f"anytime/task_{task:0{width}d}": [
                (evaluation.probe_steps[index], float(evaluation.probes[index][task])) for index in new
            ]
            for task in tasks_with_curves(len(evaluation.baseline))
        }

    def _curves_state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with its curves: plain values and tensors."""
        now, evaluation = time.perf_counter(), self.evaluation
        return {
            "seconds": now - self.start,
            "session_seconds": now - self.began,
            "learning_seconds": self.learning_seconds,
            "samples": self.samples,
            "losses": self._losses(),
            "counts": dict(self.counts),
            "probes_written": self.probes_written,
            **({"first": self.first} if self.first else {}),
            "tasks_by_row": self.tasks_by_row,
            "evaluation": evaluation and evaluation.to_dict(),
        }

    def _load_curves(self, state: Mapping[str, Any]) -> None:
        """Restore what `_curves_state` returned."""
        now = time.perf_counter()
        self.start, self.began = now - state["seconds"], now - state["session_seconds"]
        self.learning_seconds, self.samples = state["learning_seconds"], state["samples"]
        self.earlier_losses, self.losses = state["losses"], []
        self.tasks_by_row = state["tasks_by_row"]
        self.counts, self.probes_written, self.first = dict(state["counts"]), state["probes_written"], state.get("first", 0)
        self.evaluation = state["evaluation"] and Evaluation.from_dict(state["evaluation"])
