"""The Fisher of multi-label targets and values: against a loop over samples, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clstream.strategies import EWC, LwFMC, Regularised, Replay
from clstream.strategies.ewc import EWCPenalty
from torch import Tensor, nn

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.fisher import batch_fisher, diagonal_fisher
from clstream.losses import sample_losses
from clstream.stream import Samples


class Net(nn.Module):
    """A layer with a closed form, and weights without one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.first(x)).tanh())


def given(target: str, n: int = 7) -> tuple[nn.Module, Samples]:
    torch.manual_seed(3)
    y = torch.randint(0, 2, (n, 4)).double() if target == "multilabel" else torch.randn(n, 4).double()
    return Net().double(), Samples(torch.randn(n, 5).double(), y, target=target)


def by_hand(model: nn.Module, x: Tensor, y: Tensor, losses: Callable[[Tensor, Tensor], Tensor], weighted: bool) -> list[Tensor]:
    weights = list(model.parameters())
    totals = [torch.zeros_like(weight) for weight in weights]
    for sample, target in zip(x, y, strict=True):
        loss = losses(model(sample[None]), target[None])[0]
        for total, slope in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += slope.square() * (loss.detach().neg().exp() if weighted else 1) / len(x)
    return totals


@pytest.mark.parametrize("kind", ["empirical", "weighted", "sampled", "predicted"])
@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_it_is_the_mean_of_squares_over_samples(target: str, kind: str) -> None:
    model, samples = given(target)
    if (target, kind) == ("value", "predicted"):
        with pytest.raises(ValueError, match="a model's own values have no error, so their 'predicted' Fisher is 0: take"):
            diagonal_fisher(model, samples, kind)
        return
    fisher = diagonal_fisher(model, samples, kind, generator=torch.Generator().manual_seed(5))
    answers, y, draw = model(samples.x).detach(), samples.y, torch.Generator().manual_seed(5)
    if kind == "predicted":
        y = (answers > 0).double()
    elif kind == "sampled":
        drawn = {"multilabel": torch.rand, "value": torch.randn}[target](answers.shape, generator=draw).double()
        y = (answers.sigmoid() > drawn).double() if target == "multilabel" else answers + drawn * 2**0.5  # of variance 4 / 2
    expected = by_hand(model, samples.x, y, partial(sample_losses, target=target), kind == "weighted")
    for value, other in zip(fisher.values(), expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize(("scale", "mean"), [(1.0, True), (5.0, True), (1.0, False)])
def test_sampled_values_have_the_normal_whose_likelihood_the_loss_is(scale: float, mean: bool) -> None:
    """With loss c |o - y|^2 in k outputs the Fisher of a linear layer is 2 c x^2: here c is scale / k, or scale."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(1, 3).double()

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        return scale * ((outputs - y).square().mean(1) if mean else (outputs - y).square().sum(1))

    samples = Samples(x.expand(20000, 3), torch.zeros(20000, 4).double(), target="value")
    fisher = diagonal_fisher(model, samples, "sampled", generator=torch.Generator().manual_seed(0), losses=losses)
    c = scale / 4 if mean else scale
    torch.testing.assert_close(fisher["weight"], (2 * c * x.square()).expand(4, 3), rtol=0.05, atol=0)
    torch.testing.assert_close(fisher["bias"], torch.full((4,), 2 * c).double(), rtol=0.05, atol=0)


def test_sampled_label_sets_have_the_probabilities_of_their_sigmoids() -> None:
    """The Fisher of the bias of a column is p (1 - p) / columns^2; a masked column is never drawn and has no Fisher."""
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, -2.0, 1.0]))
    samples = Samples(torch.zeros(20000, 1), torch.zeros(20000, 3), target="multilabel")

    def hide(outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.masked_fill(torch.arange(3) == 2, float("-inf"))

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        return sample_losses(hide(outputs, y), y, "multilabel")

    fisher = diagonal_fisher(model, samples, "sampled", generator=torch.Generator().manual_seed(0), losses=losses, competing=hide)
    odds = torch.tensor([0.0, -2.0]).sigmoid()
    torch.testing.assert_close(fisher["bias"][:2], odds * (1 - odds) / 9, rtol=0.05, atol=0)
    assert fisher["bias"][2] == 0


@pytest.mark.parametrize("kind", ["empirical", "sampled", "predicted"])
def test_whole_batches_take_other_targets_too(kind: str) -> None:
    for target in ("multilabel", "value"):
        model, samples = given(target)
        if (target, kind) == ("value", "predicted"):
            with pytest.raises(ValueError, match="their 'predicted' Fisher is 0"):
                batch_fisher(model, samples, 7, kind)
            continue
        draw = torch.Generator().manual_seed(1)
        fisher = batch_fisher(model, samples, 7, kind, generator=draw)
        assert all(bool((value >= 0).all()) and bool(value.any()) for value in fisher.values())
        if kind == "empirical":
            loss = sample_losses(model(samples.x), samples.y, target).mean()
            for value, slope in zip(fisher.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                torch.testing.assert_close(value, 7 * slope.square())


@pytest.mark.parametrize(("target", "kind"), [("label", "predicted"), ("multilabel", "predicted"), ("value", "sampled")])
def test_ewc_takes_the_fisher_that_the_targets_have(target: str, kind: str) -> None:
    stream = example_stream(target=target)
    plain, same = EWC(example_model()), EWC(example_model(), fisher=kind)
    for strategy in (plain, same):
        run(strategy, stream, max_sessions=2)
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, dict(same.model.named_parameters())[name]), name
    assert any(bool(value.any()) for value in plain.regularisers[0].importance.values())


def test_ewc_refuses_the_fisher_that_values_dont_have() -> None:
    for strategy in (
        EWC(example_model(), fisher="predicted"),
        Regularised(Replay(example_model()), [EWCPenalty(fisher="predicted")]),
    ):
        with pytest.raises(ValueError, match="the gradient at the model's own answer, which is 0 for the values of example"):
            run(strategy, example_stream(target="value"))


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_ewc_weighs_by_the_loss_that_the_strategy_learns_with(target: str) -> None:
    """With LwFMC's scale of 5, which is 1 with values, and the sum's, over the samples of the first task, sample by sample."""
    for scale in (5.0, None):
        base = LwFMC(example_model(), bce_scale=scale)
        penalty = EWCPenalty(fisher="empirical")
        run(Regularised(base, [penalty]), stream := example_stream(target=target), max_sessions=1)
        model, samples = base.model, stream.tasks[0].train[:]
        own = range(2) if target == "multilabel" else range(6)

        def losses(outputs: Tensor, y: Tensor, own: range = own, scale: float | None = scale) -> Tensor:
            outputs, y = outputs[:, list(own)], y[:, list(own)]
            terms = (outputs - y).square() if target == "value" else nn.functional.softplus(outputs) - outputs * y
            return terms.sum(1) if scale is None else (scale if target == "multilabel" else 1) * terms.mean(1)

        expected = by_hand(model, samples.x, samples.y, losses, False)
        for value, other in zip(penalty.importance.values(), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-6)
