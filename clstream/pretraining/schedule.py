"""The learning rate by the step: linear warm-up, then a cosine."""

from __future__ import annotations

from torch.optim import Optimizer

from clstream.bus import on
from clstream.events import BatchReady, SessionStarted
from clstream.params import check_choice, check_number
from clstream.training import rate_factor

SCHEDULES = ("cosine", "constant")


class LearningRateSchedule:
    """Sets the learning rates of an optimizer before each step of a session, as a part of a strategy:

        strategy.parts = (*strategy.parts, LearningRateSchedule(strategy.optimizer, warmup=1))

    In step t of T, from 0, of which W = round(warmup * steps of an epoch) are warm-up, each is what it was at the begin, times

        (t + 1) / W                                 in the warm-up,
        (1 + cos(pi (t - W) / (T - W))) / 2         after it, or 1 with kind="constant".

    SimCLR and most supervised training have it so (Loshchilov & Hutter 2017, without restarts).

    Args:
        optimizer: whose learning rates are set.
        kind: "cosine" or "constant".
        warmup: epochs of linear warm-up, at most those of the session; also a part of one.

    """

    def __init__(self, optimizer: Optimizer, kind: str = "cosine", warmup: float = 0.0) -> None:
        check_choice(SCHEDULES, schedule=kind)
        check_number(0, warmup=warmup)
        self.optimizer, self.kind, self.warmup = optimizer, kind, warmup
        self.rates: list[float] = [group["lr"] for group in optimizer.param_groups]
        self.step, self.steps, self.warmup_steps = 0, 0, 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        """Count the steps of the session."""
        steps = len(next(iter(event.session)))
        self.step, self.steps, self.warmup_steps = 0, steps * event.session.epochs, round(self.warmup * steps)

    @on(BatchReady)
    def set_rates(self, event: BatchReady) -> None:
        """Set the learning rates of the next step."""
        factor = self.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        self.step += 1

    def factor(self, step: int) -> float:
        """Return what the learning rates of a step are multiplied by."""
        return rate_factor(self.kind, step, self.steps, self.warmup_steps)
