"""The learning rate by the step: linear warm-up, then a cosine, a line, or a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clstream.bus import on
from clstream.events import BatchReady, EpochEnded, SessionStarted
from clstream.strategy import Strategy

SCHEDULES = ("cosine", "linear", "constant")


def rate_factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """Return what the learning rates of step t are multiplied by, of T steps, from 0, of which the first W are warm-up:

    (t + 1) / W                                 in the warm-up,
    (1 + cos(pi (t - W) / (T - W))) / 2         after it, with "cosine" (Loshchilov & Hutter 2017, without restarts),
    1 - (t - W) / (T - W)                       with "linear",
    1                                           with "constant".

    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    share = (step - warmup) / (steps - warmup)
    return 1 - share if kind == "linear" else (1 + math.cos(math.pi * share)) / 2


class RateSchedule:
    """Sets the learning rates of a strategy's optimizer before each step, by the step's place in its session, or in the run.

    They are multiples of what the optimizer has, which torch's own schedulers keep as `initial_lr` too, and which is back at the
    end of each epoch. Steps that early stopping leaves out count for the place: what follows has the rates of a run without it.

    Args:
        learner: whose optimizer.
        kind: "cosine", "linear" or "constant".
        warmup: batches of linear warm-up.
        sizes: the batches of each session of the run, over all of its epochs. None: each session has a schedule of its own.

    """

    def __init__(self, learner: Strategy, kind: str, warmup: int, sizes: Sequence[int] | None) -> None:
        self.learner, self.kind, self.warmup = learner, kind, warmup
        self.sizes = None if sizes is None else list(sizes)
        self.before, self.epoch_steps, self.steps = 0, 0, 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        """Find the place of the session."""
        session = event.session
        self.epoch_steps = len(next(iter(session)))
        self.before, self.steps = 0, self.epoch_steps * session.epochs
        if self.sizes is not None:
            self.before, self.steps = sum(self.sizes[: session.index]), sum(self.sizes)

    @on(BatchReady)
    def set_rates(self, event: BatchReady) -> None:
        """Set the learning rates of the next step."""
        step = self.before + event.batch.epoch * self.epoch_steps + event.batch.index
        factor = rate_factor(self.kind, step, self.steps, self.warmup)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    @on(EpochEnded)
    def restore_rates(self, event: EpochEnded) -> None:
        """Give the optimizer its own learning rates back, for what is done when the session ends."""
        for group in self.learner.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
