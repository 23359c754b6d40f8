"""The vision half of CPE-CLIP: prompts beside a frozen transformer's tokens, and class means that answer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import CPEVision
from torch.nn import functional as F
from torch.optim import SGD

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.models import VitTiny
from clstream.seeds import isolated


def play(sessions: int | None = None, **options: object) -> CPEVision:
    """Run it on the example stream."""
    with isolated(0, "strategy"):
        model = VitTiny((1, 8, 8), 6, patch=4, width=16, depth=3, heads=2)
        strategy = CPEVision(model, **options)  # type: ignore[arg-type]
    run(strategy, example_stream(), max_sessions=sessions)
    return strategy


def test_prompts_are_appended_to_the_tokens_and_gather() -> None:
    strategy, x = play(1, depth=2), example_stream().tasks[0].test[:4].x
    stages, bank = strategy.model.stages, strategy.bank.weight
    with torch.no_grad():
        tokens = torch.cat([stages.patches(stages.input(x)), bank[0].expand(4, -1, -1)], 1)
        tokens = torch.cat([stages.block1(tokens), bank[1].expand(4, -1, -1)], 1)
        tokens = stages.block3(stages.block2(tokens))
        assert tokens.shape[1] == 1 + 4 + 2 * 2
        torch.testing.assert_close(strategy.features(x), stages.norm(tokens))


@pytest.mark.slow
def test_nothing_but_the_prompts_learns() -> None:
    with isolated(0, "strategy"):
        before = VitTiny((1, 8, 8), 6, patch=4, width=16, depth=3, heads=2).state_dict()
    strategy, resting = play(), play(optimizer=partial(SGD, lr=0.0))
    assert all(torch.equal(strategy.model.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(strategy.bank.weight, resting.bank.weight)
    assert [weight.shape for group in strategy.optimizer.param_groups for weight in group["params"]] == [(3, 2, 16)]


def test_means_answer_and_old_ones_stay() -> None:
    first, whole = play(1), play()
    assert first.means is not None and whole.means is not None
    assert torch.equal(first.means[:2], whole.means[:2]) and not first.means[2:].any()
    task = example_stream().tasks[2]
    part, x = task.train[:], task.test[:5].x
    with torch.no_grad():
        mean = whole.features(part.x[part.y == 5]).mean(0)
        cosines = F.normalize(whole.features(x), dim=1) @ F.normalize(mean, dim=0)
        torch.testing.assert_close(whole.scores(x)[:, 5], 16 * cosines)
    assert (first.scores(x)[:, 2:] == float("-inf")).all()


def test_the_loss_is_over_the_sessions_classes_and_braked() -> None:
    free, slow = play(2, brake=False), play(2)
    samples = example_stream().tasks[1].train[:8]
    with torch.no_grad():
        cosines = F.normalize(slow.features(samples.x), dim=1) @ slow.rows.T
    assert slow.rows.shape == (2, 16) and float(slow.ratio) == 0.5 and float(free.ratio) == 1
    torch.testing.assert_close(slow.loss(samples), F.cross_entropy(16 * cosines, samples.y - 2))
    slow.current, rows = torch.tensor([2]), slow.rows
    slow.rows = rows[:1]
    assert slow.loss(samples[(samples.y == 2).nonzero().flatten()]).item() == 0  # one class alone teaches nothing
    slow.current, slow.rows = torch.tensor([2, 3]), rows
    (half,) = torch.autograd.grad(slow.loss(samples), slow.bank.weight)
    slow.ratio = torch.ones(())
    (full,) = torch.autograd.grad(slow.loss(samples), slow.bank.weight)
    torch.testing.assert_close(half, full / 2)


def test_other_models_and_other_sizes_are_refused() -> None:
    with pytest.raises(TypeError, match="CPEVision needs a vision transformer: VitTiny, or"):
        CPEVision(example_model())
    with pytest.raises(ValueError, match="depth must be at most 2, as many blocks as VitTiny has, not 5"):
        CPEVision(VitTiny((1, 8, 8), 6, depth=2), depth=5)
    with pytest.raises(ValueError, match=r"VitTiny can.t take the inputs of example, \(1, 8, 8\)"):
        run(CPEVision(VitTiny((1, 12, 12), 6, depth=2)), example_stream())
