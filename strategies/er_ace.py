"""ER-ACE: replay with an asymmetric cross-entropy, so that new classes don't push the old ones away.

Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky 2022, "New Insights on Reducing Abrupt Representation Change in Online
Continual Learning". Form implemented: one step on

    CE(f(x), y) over the classes among y only  +  CE(f(x'), y') over all classes,

x a batch of the stream, x' drawn from a reservoir. Then the batch is offered to the memory. Nothing of old classes is in the
first term, so their outputs are moved by replay alone. It needs no task boundaries.

Deviations: the first term is masked from the first batch on, by what is in the batch, so that no boundaries are needed. In the
second term all outputs compete, also those of classes that were never seen. With several epochs a session is offered to the memory
in its first one only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned
from clstream.memory import Reservoir
from clstream.params import check_integer
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples


class ERACE(Strategy):
    """Let only a batch's own classes compete for it, and all classes for what is replayed.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples are drawn for each batch. None: as many as the batch holds.
        active_classes: whose outputs compete for what is replayed, "all", "seen" or "task": see `clstream.Strategy`.

    """

    fixed_classes = "for a batch its own labels"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        replay_batch: int | None = None,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, none=True, replay_batch=replay_batch)
        self.memory, self.replay_batch = Reservoir(capacity), replay_batch

    def loss(self, samples: Samples) -> Tensor:
        """Return both cross-entropies."""
        logits = self.logits(samples)
        absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device).index_fill_(0, samples.y, False)
        loss = F.cross_entropy(logits.masked_fill(absent, float("-inf")), samples.y)
        if len(self.memory):
            past = self.memory.sample(self.replay_batch or len(samples))
            loss = loss + F.cross_entropy(self.logits(past), past.y)
        return loss

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory, once."""
        if event.batch.epoch == 0:
            self.memory.add(event.batch.samples)
