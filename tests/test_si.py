"""SI against its loop, written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import (
    SI,
    Finetune,
    Regularised,
    SIPenalty,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream import run
from clstream.checks import example_model, example_stream


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 6)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double() / 255)


@pytest.mark.parametrize("gradient", ["loss", "objective"])
def test_si_is_the_loop_by_hand(gradient: str) -> None:
    stream, twin = example_stream(batch_size=10, epochs=2), Double()
    strategy = SI(Double(), partial(Adam, lr=1e-2), strength=7.0, gradient=gradient, damping=0.05, active_classes="seen")
    run(strategy, stream, seed=1)
    optimizer = Adam(twin.parameters(), lr=1e-2)
    weights = list(twin.parameters())
    importance, anchors = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
    for number, session in enumerate(stream.reseeded(1)):
        path, start = [torch.zeros_like(w) for w in weights], [w.detach().clone() for w in weights]
        for epoch in session:
            for batch in epoch:
                loss = F.cross_entropy(twin(batch.samples.x)[:, : 2 * number + 2], batch.samples.y)
                held = sum((o * (w - a).square()).sum() for o, w, a in zip(importance, weights, anchors, strict=True))
                whole = loss + 7.0 * held
                slopes = torch.autograd.grad(loss if gradient == "loss" else whole, weights, retain_graph=True)
                before = [w.detach().clone() for w in weights]
                optimizer.zero_grad()
                whole.backward()
                optimizer.step()
                for total, slope, weight, was in zip(path, slopes, weights, before, strict=True):
                    total -= slope * (weight.detach() - was)
        importance = [
            o + p / ((w.detach() - s).square() + 0.05) for o, p, w, s in zip(importance, path, weights, start, strict=True)
        ]
        anchors = [w.detach().clone() for w in weights]
    (penalty,) = strategy.regularisers
    for ours, theirs, omega in zip(strategy.model.parameters(), weights, importance, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        name = next(name for name, weight in strategy.model.named_parameters() if weight is ours)
        torch.testing.assert_close(penalty.importance[name], omega, rtol=1e-6, atol=1e-8)


def test_si_cuts_importance_off_where_it_is_used_not_where_it_is_summed() -> None:
    free, cut = SIPenalty(0.0), SIPenalty(0.0, most=1e-3)
    for penalty in (free, cut):
        run(Regularised(Finetune(example_model()), [penalty]), example_stream())
    for name, value in free.importance.items():
        assert torch.equal(cut.uncut[name], value)
        assert torch.equal(cut.importance[name], value.clamp(max=1e-3))
    assert max(float(value.max()) for value in free.importance.values()) > 1e-3
