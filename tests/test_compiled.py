"""Compiled steps: what they draw and minimise, that they equal eager ones, and what falls back."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import ERACE, EWC, DERpp, Finetune, L2Penalty, Regularised, Replay
from clstream.streams import blobs

from clstream import run
from clstream.models import Mlp


def learned(make, **options):
    """Return a strategy that has learned a small stream, and two batches of it."""
    stream = blobs(tasks=2, classes=4)
    torch.manual_seed(0)
    strategy = make(Mlp(stream.input_shape, stream.classes, hidden=(8,)), **options)
    run(strategy, stream)
    return strategy, [stream.tasks[1].train[start : start + 10] for start in (0, 10)]


MAKE = {
    "Finetune": Finetune,
    "Replay": Replay,
    "mir": lambda model: Replay(model, retrieval="mir", candidates=20),
    "DERpp": DERpp,
    "one draw": lambda model: DERpp(model, draws=1),
    "ERACE": ERACE,
    "EWC": EWC,
    "Regularised": lambda model: Regularised(Replay(model), [L2Penalty()]),
}


@pytest.mark.parametrize("name", MAKE)
def test_an_objective_with_what_was_drawn_for_it_is_the_same_and_draws_nothing(name):
    strategy, (samples, _) = learned(MAKE[name])
    memory = getattr(getattr(strategy, "base", strategy), "memory", None)
    before = None if memory is None else memory.random.get_state()
    whole = strategy.objective(samples)
    if memory is None:
        assert strategy.draw(samples) == ()
    else:
        memory.random.set_state(before)
    drawn = strategy.draw(samples)
    for _ in range(2):
        assert torch.equal(strategy.objective_with(samples, drawn), whole)
    assert "drawn_before" not in vars(strategy) or strategy.drawn_before is None
