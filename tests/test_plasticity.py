"""Continual backprop, ReDo, shrink-and-perturb, L2 init: which units and weights they move, when, and to what."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from clstream.strategies import ContinualBackprop, Finetune, L2Init, L2InitPenalty, ReDo, Regularised, Replay, ShrinkAndPerturb
from clstream.strategies.l2 import L2
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, Strategy, on, run
from clstream.checks import check_alike, example_model, example_stream
from clstream.models import Linear

CALM = partial(SGD, lr=0.0)


class Follow:
    """Takes down the model's weights after each step."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.weights = strategy, [self.now(strategy)]

    @staticmethod
    def now(strategy: Strategy) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in strategy.model.named_parameters()}

    @on(BatchLearned)
    def look(self, event: BatchLearned) -> None:
        self.weights.append(self.now(self.strategy))

    def changed(self, name: str = "stages.layer1.weight") -> list[list[int]]:
        """Return which rows of a weight each step changed."""
        rows = [weights[name] for weights in self.weights]
        return [(a != b).any(1).nonzero().flatten().tolist() for a, b in pairwise(rows)]


def followed(strategy: Strategy, **options: Any) -> Follow:
    run(strategy, example_stream(**options), follow := Follow(strategy))
    return follow


# Continual backprop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("utility", ["contribution", "adaptable"])
def test_the_unit_of_the_lowest_utility_starts_anew_when_it_is_time(utility: str) -> None:
    """32 units, a rate of 1/80, all mature after 5 steps: 0.4 a step, so one in the 8th, then by the equations."""
    stream = example_stream(batch_size=20, epochs=4)
    strategy = ContinualBackprop(Finetune(example_model(), CALM), rate=1 / 80, maturity=5, decay=0.8, utility=utility)
    run(strategy, stream, follow := Follow(strategy), seed=2)
    model = example_model()
    batches = [batch.samples.x for session in stream for epoch in session for batch in epoch]
    u, mean, age, due = torch.zeros(32), torch.zeros(32), torch.zeros(32), 0.0
    for x, weights, rows in zip(batches, follow.weights, follow.changed(), strict=False):
        model.load_state_dict({**model.state_dict(), **weights})
        h = model.features(x).detach()
        age += 1
        mean = 0.8 * mean + 0.2 * h.mean(0)
        out = weights["head.weight"].abs().sum(0)
        used = h.abs().mean(0) * out
        if utility == "adaptable":
            used = (h - mean / (1 - 0.8**age)).abs().mean(0) * out / weights["stages.layer1.weight"].abs().sum(1)
        u = 0.8 * u + 0.2 * used
        mature = age > 5
        due += int(mature.sum()) / 80
        if int(due):
            due -= 1
            ready = torch.where(mature, u / (1 - 0.8**age), float("inf"))
            assert len(rows) == 1 and float(ready[rows[0]]) <= float(ready.min()) + 1e-7  # units that never fire are alike
            for values in (u, mean, age):
                values[rows] = 0
            continue
        assert not rows
    assert sum(map(len, follow.changed())) > 8
    last = follow.weights[-1]
    assert not last["head.weight"][:, follow.changed()[-1]].any()


def test_a_young_unit_is_left_alone_and_no_rate_is_the_strategy_itself() -> None:
    follow = followed(ContinualBackprop(Finetune(example_model(), CALM), rate=0.5, maturity=6), batch_size=20, epochs=4)
    seen: dict[int, int] = {}
    for step, rows in enumerate(follow.changed(), 1):
        for row in rows:
            assert step - seen.get(row, 0) > 6
            seen[row] = step
    assert len(seen) == 32
    for check in list(check_alike(lambda model: ContinualBackprop(Finetune(model), rate=0.0), Finetune))[1:3]:
        check()


# ReDo -----------------------------------------------------------------------------------------------------------------


def test_dormant_units_are_recycled_each_period() -> None:
    model = example_model()
    with torch.no_grad():
        model.stages.layer1.bias[[3, 7]] = -1e3  # asleep
    before = model.stages.layer1.weight.clone()
    strategy = ReDo(Finetune(model, CALM), period=4, threshold=0.0, samples=16)
    follow = followed(strategy)
    changed = follow.changed()
    model = example_model()
    x = torch.cat([batch.samples.x for batch in next(iter(example_stream().session(0)))][2:4])
    asleep = {*(model.features(x) == 0).all(0).nonzero().flatten().tolist(), 3, 7}
    assert {*changed[3]} == asleep and not any(changed[:3])
    assert not follow.weights[4]["stages.layer1.bias"][[3, 7]].any() and not follow.weights[4]["head.weight"][:, [3, 7]].any()
    assert 0 in asleep or torch.equal(follow.weights[4]["stages.layer1.weight"][0], before[0])


def test_activity_is_relative_to_the_layer_and_over_the_last_samples() -> None:
    model, stream = example_model(), example_stream(batch_size=8)
    strategy = ReDo(Finetune(model, CALM), period=6, threshold=0.5, samples=16)
    batches = [batch.samples.x for batch in next(iter(stream.session(0)))]
    run(strategy, stream, follow := Follow(strategy), max_sessions=1)
    model = example_model()
    activity = model.features(torch.cat(batches[4:6])).abs().mean(0)
    assert follow.changed()[5] == (activity / activity.mean() <= 0.5).nonzero().flatten().tolist()


# Shrink and perturb ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["session", "step"])
def test_weights_shrink_and_get_noise(when: str) -> None:
    model = example_model()
    strategy = ShrinkAndPerturb(Finetune(model, CALM), shrink=0.5, perturb=0.0, when=when)
    follow = followed(strategy, batch_size=60)  # a step a session
    times = 2 if when == "session" else 3
    for name, weight in example_model().named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight * 0.5**times)
        assert torch.equal(follow.weights[1][name], weight if when == "session" else weight * 0.5)


def test_noise_is_normal_or_as_the_first_weights() -> None:
    for noise, deviation in (("normal", 0.1), ("initial", 0.1 * 8**-1 / 3**0.5)):
        model = example_model()
        strategy = ShrinkAndPerturb(Finetune(model, CALM), shrink=0.0, perturb=0.1, noise=noise)
        followed(strategy, batch_size=60)
        weight = model.stages.layer1.weight.detach()
        assert float(weight.std()) == pytest.approx(deviation, rel=0.05)
        assert (float(weight.abs().max()) < 0.1 / 8 + 1e-3) == (noise == "initial")


def test_one_that_moves_nothing_is_the_strategy_itself() -> None:
    for check in list(check_alike(lambda model: ShrinkAndPerturb(Finetune(model), shrink=1.0, perturb=0.0), Finetune))[1:3]:
        check()


# L2 init --------------------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_way_from_the_first_weights_in_every_task() -> None:
    strategy = L2Init(example_model(), strength=0.02)
    run(strategy, example_stream())
    samples = example_stream().tasks[0].train[:9]
    way = sum(
        (w - first).square().sum() for w, first in zip(strategy.model.parameters(), example_model().parameters(), strict=True)
    )
    expected = F.cross_entropy(strategy.model(samples.x), samples.y) + 0.02 * way
    torch.testing.assert_close(strategy.objective(samples), expected)
    other = L2(example_model(), strength=0.02)
    run(other, example_stream())
    assert (other.objective(samples) - other.loss(samples)).item() < 0.01 * way.item()  # its anchor has moved


def test_rows_of_a_growing_head_are_held_near_their_own_start() -> None:
    class First:
        """Takes down the rows of the head when they come."""

        rows: list[torch.Tensor]

        def __init__(self) -> None:
            self.rows = []

        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            head: Any = strategy.model.head
            if len(head.weight) > sum(map(len, self.rows)):
                self.rows.append(head.weight.detach()[sum(map(len, self.rows)) :].clone())

    strategy = L2Init(example_model(head="growing"), CALM, strength=0.1)
    run(strategy, example_stream(), first := First())
    assert torch.equal(strategy.regularisers[0].anchor["head.weight"], torch.cat(first.rows))
    assert len(first.rows) == 3


def test_any_strategy_takes_it() -> None:
    ways = []
    for strength in (0.0, 0.1):
        strategy = Regularised(Replay(example_model()), [L2InitPenalty(strength)])
        run(strategy, example_stream(epochs=3))
        pairs = zip(strategy.model.parameters(), example_model().parameters(), strict=True)
        ways.append(sum((w - first).square().sum().item() for w, first in pairs))
    assert ways[1] < ways[0] / 2


def test_networks_without_hidden_units_are_refused_before_anything_is_learned() -> None:
    for wrapper in (ContinualBackprop, ReDo):
        with pytest.raises(ValueError, match="Linear has no hidden units"):
            run(wrapper(Finetune(Linear((1, 8, 8), 6))), example_stream())
        with pytest.raises(TypeError, match="wraps a strategy object"):
            wrapper(nn.Linear(2, 2))
