"""MAS: the importance by its closed form and by a loop over samples, and against Avalanche's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import MAS, MASPenalty
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Samples, Strategy, TaskEnded, on, run
from clstream.checks import example_model, example_stream

DOUBLE = torch.float64


def on_linear(**options: object) -> MASPenalty:
    """Return the penalty on a strategy with one linear layer of two outputs, worked out below."""
    net = nn.Linear(2, 2).double()
    net.weight.data = torch.tensor([[1.0, -1.0], [2.0, 0.5]], dtype=DOUBLE)
    net.bias.data = torch.tensor([0.5, -1.0], dtype=DOUBLE)
    strategy = Strategy(net)
    strategy.add_regularisers(penalty := MASPenalty(1.0, **options))
    return penalty


X = torch.tensor([[1.0, 2.0], [-3.0, 0.0]], dtype=DOUBLE)
GIVEN = Samples(X, torch.tensor([0, 1]))


def test_the_importance_of_a_linear_net_is_the_closed_form() -> None:
    """d |z|^2 / d w = 2 z x': z is (-0.5, 2) and (-2.5, -7), so by hand the gradients are the following."""
    first = torch.tensor([[-1.0, -2.0], [4.0, 8.0]], dtype=DOUBLE), torch.tensor([-1.0, 4.0], dtype=DOUBLE)
    second = torch.tensor([[15.0, 0.0], [42.0, 0.0]], dtype=DOUBLE), torch.tensor([-5.0, -14.0], dtype=DOUBLE)
    exact = [(a.abs() + b.abs()) / 2 for a, b in zip(first, second, strict=True)]
    batch = [((a + b) / 2).abs() for a, b in zip(first, second, strict=True)]
    for options, expected, factor in (
        ({}, exact, 1.0),
        ({"norm": "mean"}, exact, 0.5),
        ({"importance_batch": 2}, batch, 1.0),
        ({"importance_batch": 1}, exact, 1.0),
    ):
        penalty = on_linear(**options)
        penalty.add_importance(GIVEN)
        for name, values in zip(("weight", "bias"), expected, strict=True):
            torch.testing.assert_close(penalty.task_importance[name], factor * values)
    assert batch[1][0] == 3.0 == exact[1][0]  # the gradients of this bias agree in sign
    assert batch[1][1] == 5.0 < exact[1][1] == 9.0  # those of this one don't


def test_samples_are_averaged_over_all_calls_and_tasks_are_summed_or_averaged() -> None:
    more = Samples(torch.tensor([[0.5, 1.0]], dtype=DOUBLE), torch.tensor([1]))
    for alpha, expected in ((None, lambda a, b: a + b), (0.25, lambda a, b: 0.25 * a + 0.75 * b)):
        penalty, whole, other = on_linear(alpha=alpha), on_linear(), on_linear()
        penalty.add_importance(GIVEN)
        penalty.add_importance(more)
        whole.add_importance(GIVEN + more)
        torch.testing.assert_close(penalty.task_importance, whole.task_importance)
        penalty.consolidate(None)
        torch.testing.assert_close(penalty.importance, whole.task_importance)
        penalty.strategy.model.weight.data += 1
        assert penalty.penalty(GIVEN).item() == pytest.approx(float(whole.task_importance["weight"].sum()))
        other.strategy.model.weight.data += 1
        other.add_importance(more)
        penalty.add_importance(more)
        penalty.consolidate(None)
        for name, value in penalty.importance.items():
            torch.testing.assert_close(value, expected(whole.task_importance[name], other.task_importance[name]))


def test_no_target_is_looked_at_where_all_outputs_compete() -> None:
    found = []
    for y in (torch.tensor([0, 1]), torch.tensor([1, 1])):
        penalty = on_linear()
        penalty.add_importance(Samples(X, y))
        found.append(penalty.task_importance)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scenario", "norm", "head"), [("class", "sum", "fixed"), ("class", "mean", "growing"), ("task", "mean", "fixed")]
)
def test_over_tasks_it_is_the_loop_over_samples(scenario: str, norm: str, head: str) -> None:
    """Only what competes counts: the classes that came, or those of the task."""
    strategy = MAS(example_model(head=head), strength=0.5, norm=norm, active_classes="seen")
    seen: set[int] = set()
    total: dict[str, Tensor] = {}

    class Loop:
        @on(TaskEnded)
        def end(self, event: TaskEnded) -> None:
            seen.update(event.task.classes)
            competing = sorted(event.task.classes if scenario == "task" else seen)
            for x in (samples := event.task.train[:]).x:
                z = strategy.model(x[None])[0, competing]
                value = z.square().sum() if norm == "sum" else z.square().mean()
                weights = dict(strategy.model.named_parameters())
                for name, slope in zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True):
                    before = total.get(name, slope[:0] if slope.dim() else 0)
                    grown = torch.cat([before, torch.zeros_like(slope[len(before) :])])
                    total[name] = grown + slope.abs() / len(samples)

    run(strategy, example_stream(scenario=scenario), Loop())
    (penalty,) = strategy.regularisers
    for name, value in penalty.importance.items():
        torch.testing.assert_close(value, total[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(penalty.anchor[name], dict(strategy.model.named_parameters())[name])


def test_against_avalanche_s(avalanche: Callable[[str], ModuleType]) -> None:
    """With batches of all samples nothing depends on their order: the weights after three tasks are the same."""
    from clstream.strategies.avalanche import strategy_class

    stream = example_stream(batch_size=60, epochs=4)
    ours = MAS(example_model(), partial(SGD, lr=0.05), strength=3.0, importance_batch=60, alpha=0.5)
    theirs = strategy_class("MAS")(example_model(), partial(SGD, lr=0.05), lambda_reg=3.0, alpha=0.5)
    free = MAS(example_model(), partial(SGD, lr=0.05), strength=0.0)
    for strategy in (ours, theirs, free):
        run(strategy, stream)
    flat = [torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]) for strategy in (ours, theirs, free)]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-4, atol=1e-6)
    assert float((flat[0] - flat[2]).norm()) > 0.003


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"importance_batch": 0}, "importance_batch must be a whole number of at least 1 or None"),
        ({"norm": "max"}, "norm must be one of sum, mean"),
        ({"alpha": 1.5}, "alpha must be a finite number from 0 to 1 or None"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MAS(example_model(), **options)
