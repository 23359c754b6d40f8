"""A strategy with regularisers: any strategy, and the penalties that each of its steps minimises too.

So the rows of Smith et al. 2023 are put together, `Regularised(LwF(model), [L2Penalty()])` for PredKD + L2, and a method of replay
can hold its weights: `Regularised(Replay(model), [EWCPenalty(100.0)])`. On the command line, with more of them after it:

    --strategy Regularised --strategy.base Replay --strategy.regularisers+=EWCPenalty --strategy.regularisers.strength 100

The wrapped strategy takes its own steps, on `objective` in place of `loss`; what else it does is left alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from clstream.regulariser import Regulariser
from clstream.strategy import Strategy
from clstream.stream import Batch, Samples, Task


class Regularised(Strategy):
    """Have a strategy carry regularisers.

    Args:
        base: the strategy; its steps minimise its `objective`, as all of clstream's do.
        regularisers: what it carries.

    """

    def __init__(self, base: Strategy, regularisers: list[Regulariser]) -> None:
        if not isinstance(base, Strategy) or not isinstance(getattr(base, "model", None), nn.Module):
            raise TypeError(f"Regularised wraps a strategy object that has a model, not {base!r}")
        if not regularisers or not all(isinstance(each, Regulariser) for each in regularisers):
            raise TypeError(f"regularisers must be a list of at least one Regulariser, not {regularisers!r}")
        base.carry(*regularisers)
        self.base, self.parts = base, (base,)

    def carry(self, *regularisers: Regulariser) -> None:
        """Have the wrapped strategy carry them."""
        self.base.carry(*regularisers)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # it is the base's
        """The wrapped strategy's model."""
        return self.base.model

    @property
    def rehearsal_free(self) -> bool:  # type: ignore[override]  # it is the base's
        """Whether the wrapped strategy says so."""
        return self.base.rehearsal_free

    def objective(self, samples: Samples) -> Tensor:
        """Return what the wrapped strategy's steps minimise."""
        return self.base.objective(samples)

    def loss(self, samples: Samples) -> Tensor:
        """Return the wrapped strategy's loss."""
        return self.base.loss(samples)

    def learn(self, batch: Batch) -> Tensor:
        """Have the wrapped strategy take its step."""
        return self.base.learn(batch)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.scores(x, task)

    def predict(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.predict(x, task)

    @property
    def answers_once(self) -> bool:
        """Whether the wrapped strategy does."""
        return self.base.answers_once
