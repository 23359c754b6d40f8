"""A strategy with regularisers: any strategy, and the penalties that each of its steps minimises too.

So the rows of Smith et al. 2023 are put together, `Regularised(LwFMC(model), [L2Penalty()])` for PredKD + L2, and a method of
replay can hold its weights: `Regularised(Replay(model), [EWCPenalty(100.0)])`. On the command line, with more of them after it:

    --strategy Regularised --strategy.base Replay --strategy.regularisers+=EWCPenalty --strategy.regularisers.strength 100

The wrapped strategy takes its own steps, on `objective` in place of `loss`; what else it does is left alone.
"""

from __future__ import annotations

from clstream.strategy import Regulariser, Strategy, Wrapper


class Regularised(Wrapper):
    """Add regularisers to a strategy.

    Args:
        base: the strategy; its steps minimise its `objective`, as all of clstream's do.
        regularisers: those to add, whose penalties each step minimises too.

    """

    def __init__(self, base: Strategy, regularisers: list[Regulariser]) -> None:
        super().__init__(base)
        if not regularisers or not all(isinstance(regulariser, Regulariser) for regulariser in regularisers):
            raise TypeError(f"regularisers must be a list of at least one Regulariser, not {regularisers!r}")
        base.add_regularisers(*regularisers)
