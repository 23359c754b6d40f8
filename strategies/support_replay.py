"""Replay of support sets: beside each step on a small session, some samples of the last few sessions are learned again.

Kowadlo, Ahmed, Mayan, Rawlinson, arXiv 2209.07863, github.com/Cerenaut/cfsl. Form implemented, as that code for "ground truth"
replay: a queue has the samples of the last `sets` sessions, and each step minimises

    CE of the batch and k samples of the queue, drawn at random without repeats, in one mean;

a session joins the queue when it is over, so it is never replayed to itself. If the queue has fewer samples than `k`, all of them
are replayed. A new draw is made in every step. With `sets=0` it is fine-tuning, "Pretrain + Tune" there. Deviations: their learning
rates are one for each layer and step, 0.01 throughout; batch norm answers with its running statistics, not with those of the
questions. The hippocampal module of the paper, whose recall could be replayed instead, is left out.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import SessionEnded
from clstream.losses import mean_loss
from clstream.params import check_integer
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, own_storage


class SupportReplay(Strategy):
    """Learn each batch together with samples of the sessions before.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        sets: how many of the last sessions are kept whole; 0 for none.
        k: how many of their samples are learned in each step, at most.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.01),
        sets: int = 2,
        k: int = 10,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(0, sets=sets)
        check_integer(1, k=k)
        self.k = k
        self.queue: deque[Samples] = deque(maxlen=sets)
        self.random = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return `k` samples of the queue, or all that there are; nothing before the first session is over."""
        if not self.queue:
            return ()
        kept = self.queue[0]
        for other in list(self.queue)[1:]:
            kept = kept + other
        chosen = torch.randperm(len(kept), generator=self.random)[: self.k]
        return (kept[chosen.to(kept.y.device)],)

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean loss of the samples and of those that are replayed."""
        whole = samples
        for past in self.drawn_for(samples):
            whole = whole + past
        return mean_loss(self.logits(whole), whole.y, whole.target, self.bce_mean)

    @on(SessionEnded)
    def keep(self, event: SessionEnded) -> None:
        """Take a session that is over into the queue, and drop the oldest one if there are too many."""
        if self.queue.maxlen:
            self.queue.append(own_storage(event.session.samples[:]))
