"""Experience replay (ER): every step learns new samples together with samples kept from the past.

Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning"; memory filled by reservoir sampling (Vitter 1985).
Form implemented: one step on the mean cross-entropy over the batch and as many samples drawn from the memory with repeats;
then the batch is offered to the memory. As the whole loss is a mean over both parts, a larger `replay_batch` weighs more.
Deviations: with several epochs, a session is offered to the memory in its first epoch only, so that no sample is kept twice.
The memory keeps raw samples, and what is drawn is augmented afresh with the batch.

Measured (anchor `er-split-mnist`: class-IL, 5 tasks, 1 epoch, batch 10 + 10, capacity 500, SGD 0.1, Mlp 100-100): average
accuracy 0.858 ± 0.023 over 40 seeds; a loop by hand gives 0.863 ± 0.018 over 50.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned
from clstream.memory import Reservoir
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples


class Replay(Strategy):
    """Learn each batch together with samples of a reservoir memory.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples are drawn for each batch. None: as many as the batch holds.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        replay_batch: int | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        if replay_batch is not None and replay_batch < 1:
            raise ValueError(f"replay_batch must be at least 1, or None, not {replay_batch}")
        self.memory, self.replay_batch = Reservoir(capacity), replay_batch

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean cross-entropy over the batch and the samples drawn for it."""
        if len(self.memory):
            samples = samples + self.memory.sample(self.replay_batch or len(samples))
        return super().loss(samples)

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory, once."""
        if event.batch.epoch == 0:
            self.memory.add(event.batch.samples)
