"""Optimizers that begin anew."""

from __future__ import annotations

from torch.optim import Optimizer

from clstream.attributes import find_all
from clstream.bus import on
from clstream.events import SessionStarted
from clstream.strategy import Strategy


class OptimizerRenewal:
    """Has the optimizers of a strategy forget what they keep of each weight, momenta and the like, as new ones would begin.

    Args:
        strategy: whose optimizers.
        each: "session", or "task": only where a session is of another task than the one before.

    """

    def __init__(self, strategy: Strategy, each: str) -> None:
        self.strategy, self.each = strategy, each
        self.task = -1  # the number of the task that goes on

    @on(SessionStarted)
    def renew(self, event: SessionStarted) -> None:
        """Renew the optimizers, if it is time."""
        task = event.session.task_if_shown
        number = -1 if task is None else task.id
        if self.each == "session" or number != self.task:
            for _, optimizer in find_all(self.strategy, Optimizer):
                optimizer.state.clear()
        self.task = number
