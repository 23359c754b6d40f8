"""Losses that must be finite: looked at many at a time, and on a GPU without waiting for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from clstream.strategy import Strategy
from clstream.stream import Batch, Session, Task


@dataclass(frozen=True)
class Look:
    """Losses of batches that follow on each other, on the CPU once they have `arrived`; None: they are there.

    `epoch` and `batch` are the numbers of the last one.
    """

    losses: Tensor
    arrived: torch.cuda.Event | None
    epoch: int
    batch: int


class FiniteLosses:
    """Refuses losses of a session that are no detached, finite scalars, naming the batch of the first one.

    On a GPU what is looked at is what it has computed by then; `finish` waits for all.
    """

    def __init__(self, strategy: Strategy, task: Task, session: Session) -> None:
        self.strategy, self.task, self.session = strategy, task, session
        self.looks: deque[Look] = deque()

    def look(self, losses: list[Tensor], newest: Batch) -> None:
        """Look at the losses of batches, of which `newest` is the last, and forget them."""
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.requires_grad:
                raise TypeError(
                    f"{type(self.strategy).__name__}.learn must return its loss as a detached scalar tensor: `return loss.detach()`"
                )
        if losses:
            together, arrived = torch.stack(losses), None
            if together.is_cuda:
                pinned = torch.empty_like(together, device="cpu", pin_memory=True)
                together, arrived = pinned.copy_(together, non_blocking=True), torch.cuda.Event()
                arrived.record()
            self.looks.append(Look(together, arrived, newest.epoch, newest.index))
            losses.clear()
        while self.looks and (self.looks[0].arrived is None or self.looks[0].arrived.query()):
            self._check(self.looks.popleft())

    def finish(self) -> None:
        """Wait for what was not looked at yet."""
        while self.looks:
            look = self.looks.popleft()
            if look.arrived is not None:
                look.arrived.synchronize()
            self._check(look)

    def _check(self, look: Look) -> None:
        finite = look.losses.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            batch = look.batch - (len(finite) - 1 - first)
            raise FloatingPointError(
                f"the loss is {float(look.losses[first])} in task {self.task.id}, session {self.session.index}, "
                f"epoch {look.epoch}, batch {batch}: try a smaller learning rate, or look at that batch"
            )
