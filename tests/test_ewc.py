"""EWC and the Fisher that it holds weights by, against the equation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import (
    EWC,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Samples, Strategy, TaskEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.fisher import batch_fisher

DOUBLE = torch.float64


class Scalar(nn.Module):
    """One weight w: logits (w x, -w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.w * x[:, 0], -self.w * x[:, 0]], 1)


def test_the_batch_gradient_fisher_and_its_penalty_have_the_values_worked_out() -> None:
    given = Samples(torch.tensor([[1.0], [2.0], [-1.0], [0.5]], dtype=DOUBLE), torch.tensor([0, 1, 1, 0]))
    paired = next(
        seed
        for seed in range(100)
        if {*torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:2].tolist()} in ({0, 1}, {2, 3})
    )
    strategy = EWC(Scalar(), strength=5.0, fisher="empirical", fisher_batch=2, form="bce")  # 1/2 of the code's 10
    (penalty,) = strategy.regularisers
    assert [
        strategy.sample_losses(strategy.model(part.x), part.y).mean().item() for part in (given[:2], given[2:])
    ] == pytest.approx([4.4683466793, 2.6250410101], abs=1e-9)
    found = batch_fisher(strategy.model, given, 2, "empirical", None, torch.Generator().manual_seed(paired), strategy.sample_losses)
    assert found["w"].item() == pytest.approx(9.5753852918, abs=1e-8)
    penalty.add(found)
    strategy.model.w.data.fill_(0.7)
    assert penalty.penalty(given).item() == pytest.approx(1.9150770584, abs=1e-8)


def test_the_batch_gradient_fisher_drops_what_is_left_over() -> None:
    given = Samples(torch.rand(7, 1, dtype=DOUBLE), torch.zeros(7, dtype=torch.int64))
    model = Scalar()
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))[:6].split(3)
    expected = sum(
        3 / 2 * torch.autograd.grad(F.cross_entropy(model(given.x[rows]), given.y[rows]), model.w)[0].square() for rows in order
    )
    torch.testing.assert_close(batch_fisher(model, given, 3, generator=draw)["w"], expected)
    whole = torch.autograd.grad(F.cross_entropy(model(given.x), given.y), model.w)[0].square() * 7
    torch.testing.assert_close(batch_fisher(model, given, 100)["w"], whole)  # a session smaller than a batch is one


class FisherByHand(Strategy):
    """EWC as its equation has it: a Fisher by a loop over samples, and a list of terms."""

    def __init__(self, model: nn.Module, kind: str, scenario: str) -> None:
        super().__init__(model)
        self.kind, self.scenario, self.seen = kind, scenario, set()
        self.terms: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    @on(TaskEnded)
    def end(self, event: TaskEnded) -> None:
        samples = event.task.train[:]
        self.seen |= set(event.task.classes)
        competing = list(event.task.classes) if self.scenario == "task" else sorted(self.seen)
        fisher = {name: torch.zeros_like(weight) for name, weight in self.model.named_parameters()}
        for x, y in zip(samples.x, samples.y, strict=True):
            logits = self.model(x[None])[:, competing]
            label = logits.argmax(1) if self.kind == "predicted" else torch.tensor([competing.index(int(y))])
            slopes = torch.autograd.grad(F.cross_entropy(logits, label), list(self.model.parameters()))
            for total, slope in zip(fisher.values(), slopes, strict=True):
                total += slope.square() / len(samples)
        self.terms.append((fisher, {name: weight.detach().clone() for name, weight in self.model.named_parameters()}))

    def penalty(self, decay: float | None) -> Tensor:
        weights = dict(self.model.named_parameters())
        if decay is None:
            return sum((f[n] * (weights[n][: len(a[n])] - a[n]).square()).sum() for f, a in self.terms for n in weights)
        total: dict[str, Tensor] = {}
        for fisher, _ in self.terms:
            for name, value in fisher.items():
                before = total.get(name, value[:0])
                total[name] = torch.cat([decay * before + value[: len(before)], value[len(before) :]])
        anchor = self.terms[-1][1]
        return sum((total[n] * (weights[n] - anchor[n]).square()).sum() for n in weights)


@pytest.mark.parametrize(("scenario", "head"), [("class", "growing"), ("task", "fixed")])
@pytest.mark.parametrize(("kind", "decay"), [("predicted", None), ("empirical", None), ("predicted", 1.0), ("empirical", 0.5)])
def test_ewc_is_its_equation(kind: str, decay: float | None, scenario: str, head: str) -> None:
    """After three tasks, and a move from there, value and gradient are those of the sum over the terms."""
    strategy = EWC(
        example_model(head=head), strength=3.0, fisher=kind, online=decay is not None, decay=decay or 1.0, active_classes="seen"
    )
    hand = FisherByHand(strategy.model, kind, scenario)

    class Watch:
        @on(TaskEnded)
        def end(self, event: TaskEnded) -> None:
            hand.end(event)

    run(strategy, example_stream(scenario=scenario), Watch())
    (penalty,) = strategy.regularisers
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in strategy.model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    weights = list(strategy.model.parameters())
    given = example_stream().session(0).samples[:1]
    ours, theirs = penalty.penalty(given), 3 * hand.penalty(decay)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)
    for one, two in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_the_fisher_of_a_task_in_several_sessions_is_the_mean_over_its_samples() -> None:
    strategy = EWC(example_model(), partial(SGD, lr=0.0))
    run(strategy, example_stream((0, 0, 0)))
    whole = EWC(example_model(), partial(SGD, lr=0.0))
    stream = example_stream()
    run(whole, stream, max_sessions=1)
    # the first sessions see one class each in turn, so the outputs that compete differ: the number of terms does not
    assert strategy.regularisers[0].importance.keys() == whole.regularisers[0].importance.keys()
    same = EWC(example_model(), partial(SGD, lr=0.0))
    run(same, example_stream((0, 0, 0)))
    all_at_once = EWC(example_model(), partial(SGD, lr=0.0))
    run(all_at_once, example_stream(), max_sessions=1)
    for name, value in all_at_once.regularisers[0].importance.items():
        torch.testing.assert_close(same.regularisers[0].importance[name], value)
