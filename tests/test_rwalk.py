"""RWalk: against its loop by hand, with each of its options, and against Avalanche's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import RWalk
from clstream.strategies.rwalk import scaled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import run
from clstream.checks import example_model, example_stream


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 6)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double() / 255)


def to_unit(tensors: list[Tensor]) -> list[Tensor]:
    every = torch.cat([tensor.flatten() for tensor in tensors])
    return [(tensor - every.min()) / (every.max() - every.min()) for tensor in tensors]


@pytest.mark.parametrize(("fisher", "clip"), [("step", "window"), ("window", "window"), ("step", "task")])
def test_rwalk_is_the_loop_by_hand(fisher: str, clip: str) -> None:
    """Three tasks of six batches in two passes, windows of five steps: two are whole, the third is cut off."""
    stream, twin = example_stream(batch_size=10, epochs=2), Double()
    strategy = RWalk(Double(), partial(Adam, lr=1e-2), strength=0.7, alpha=0.8, interval=5, damping=0.01, fisher=fisher, clip=clip)
    run(strategy, stream, seed=1)
    optimizer, weights = Adam(twin.parameters(), lr=1e-2), list(twin.parameters())
    zeros = [torch.zeros_like(w) for w in weights]
    importance, anchors, running, scores, first = zeros, zeros, zeros, None, True
    for session in stream.reseeded(1):
        way, done, begun = zeros, zeros, [w.detach().clone() for w in weights]
        squares, steps = zeros, 0
        for epoch in session:
            for batch in epoch:
                loss = F.cross_entropy(twin(batch.samples.x), batch.samples.y)
                slopes = torch.autograd.grad(loss, weights, retain_graph=True)
                held = sum((o * (w - a).square()).sum() for o, w, a in zip(importance, weights, anchors, strict=True))
                before = [w.detach().clone() for w in weights]
                optimizer.zero_grad()
                (loss + 0.7 * held).backward()
                optimizer.step()
                done = [d - g * (w.detach() - b) for d, g, w, b in zip(done, slopes, weights, before, strict=True)]
                squares = [q + g.square() for q, g in zip(squares, slopes, strict=True)]
                if fisher == "step":
                    share = 1.0 if first else 0.8
                    running = [share * g.square() + (1 - share) * f for g, f in zip(slopes, running, strict=True)]
                first, steps = False, steps + 1
                if steps % 5 == 0:
                    did = [d.clamp(min=0) for d in done] if clip == "window" else done
                    lengths = [f * (w.detach() - b).square() / 2 for f, w, b in zip(running, weights, begun, strict=True)]
                    way = [s + d / (length + 0.01) for s, d, length in zip(way, did, lengths, strict=True)]
                    if fisher == "window":
                        running = [0.8 * q / 5 + 0.2 * f for q, f in zip(squares, running, strict=True)]
                    done, squares, begun = zeros, zeros, [w.detach().clone() for w in weights]
        assert steps == 12
        scores = way if scores is None else [(old + new) / 2 for old, new in zip(scores, way, strict=True)]
        parts = to_unit(running), to_unit([score.clamp(min=0) for score in scores])
        importance = [f + s for f, s in zip(*parts, strict=True)]
        anchors = [w.detach().clone() for w in weights]
    (penalty,) = strategy.regularisers
    for (name, ours), theirs, omega in zip(strategy.model.named_parameters(), weights, importance, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(penalty.importance[name], omega, rtol=1e-6, atol=1e-8)
    assert 0 < max(float(omega.max()) for omega in importance) <= 2


def test_what_is_all_alike_is_scaled_to_zero() -> None:
    found = scaled({"a": torch.full((2,), 3.0), "b": torch.tensor([3.0])})
    assert not torch.cat(list(found.values())).any()


def test_against_avalanche_s(avalanche: Callable[[str], ModuleType]) -> None:
    """A pixel that is always 0 gives weights without importance, so that scaling by range and by the greatest are one."""
    from clstream.strategies.avalanche import strategy_class

    stream = example_stream(batch_size=12, epochs=2)  # 10 steps a task: no window is cut off
    for task in stream.tasks:
        task.train.x[:, 0, 0, 0] = 0
    options = {"clip": "task", "damping": torch.finfo(torch.float32).eps}
    ours = RWalk(example_model(), partial(SGD, lr=0.05), strength=2.0, **options)
    plugins = [avalanche("training.plugins").RWalkPlugin(ewc_lambda=2.0, ewc_alpha=0.9, delta_t=10)]
    theirs = strategy_class("Naive")(example_model(), partial(SGD, lr=0.05), plugins=plugins)
    free = RWalk(example_model(), partial(SGD, lr=0.05), strength=0.0, **options)
    for strategy in (ours, theirs, free):
        run(strategy, stream)
    flat = [torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]) for strategy in (ours, theirs, free)]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-3, atol=1e-5)
    assert float((flat[0] - flat[2]).norm()) > 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.5}, "alpha must be a finite number from 0 to 1"),
        ({"interval": 0}, "interval must be a whole number of at least 1"),
        ({"damping": 0.0}, "damping must be a finite number above 0"),
        ({"fisher": "epoch"}, "fisher must be one of step, window"),
        ({"clip": "never"}, "clip must be one of window, task"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RWalk(example_model(), **options)
