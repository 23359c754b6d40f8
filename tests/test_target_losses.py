"""Losses by kind of targets: their values, their gradients, and what doesn't compete."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clstream import Strategy
from clstream.checks import example_model
from clstream.losses import mean_loss, sample_losses
from clstream.stream import TARGETS, Samples

NONE = float("-inf")


def test_the_loss_of_labels_is_torchs_cross_entropy_bit_for_bit() -> None:
    outputs, y = torch.randn(9, 5), torch.randint(5, (9,))
    assert torch.equal(sample_losses(outputs, y), F.cross_entropy(outputs, y, reduction="none"))
    assert torch.equal(mean_loss(outputs, y), F.cross_entropy(outputs, y))


def test_multi_label_losses_are_those_of_multi_lane_but_for_its_constant() -> None:
    """MULTI-LANE puts logits and targets of masked columns to 0, so that each adds log 2 / columns."""
    masked, y = torch.tensor([[2.0, -1.0, NONE, NONE]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    competing = sample_losses(masked, y, "multilabel", "competing")
    assert competing.item() == pytest.approx(0.2200948493)
    over_all = sample_losses(masked, y, "multilabel", "all")
    assert over_all.item() + 2 * math.log(2) / 4 == pytest.approx(0.4566210149)
    theirs = F.binary_cross_entropy_with_logits(torch.tensor([[2.0, -1.0, 0.0, 0.0]]), y)
    assert theirs.item() == pytest.approx(0.4566210149)


def test_gradients_of_the_mean_over_all_are_competing_over_all_of_the_others() -> None:
    outputs, y = torch.randn(3, 4, requires_grad=True), (torch.rand(3, 4) > 0.5).float()
    masked = outputs.masked_fill(torch.tensor([False, False, True, True]), NONE)
    over_all, competing = (
        torch.autograd.grad(sample_losses(masked, y, "multilabel", how).sum(), outputs, retain_graph=True)[0]
        for how in ("all", "competing")
    )
    zeros = torch.where(torch.tensor([True, True, False, False]), outputs, 0)
    theirs = F.binary_cross_entropy_with_logits(zeros, y * torch.tensor([1.0, 1, 0, 0]), reduction="none").mean(1).sum()
    torch.testing.assert_close(over_all, torch.autograd.grad(theirs, outputs)[0])
    torch.testing.assert_close(over_all, competing * 2 / 4)
    assert over_all.isfinite().all() and not over_all[:, 2:].any()


def test_where_nothing_competes_the_loss_is_0_and_a_nan_shows() -> None:
    nothing = torch.full((2, 3), NONE, requires_grad=True)
    for how in ("all", "competing"):
        loss = mean_loss(nothing, torch.ones(2, 3), "multilabel", how)
        assert loss.item() == 0 and not torch.autograd.grad(loss, nothing)[0].any()
    broken = torch.tensor([[float("nan"), 1.0]])
    assert sample_losses(broken, torch.zeros(1, 2), "multilabel").isnan().all()


def test_outputs_that_no_class_has_are_left_out() -> None:
    outputs, y = torch.randn(4, 7, requires_grad=True), (torch.rand(4, 5) > 0.5).float()
    for how in ("all", "competing"):
        losses = sample_losses(outputs, y, "multilabel", how)
        torch.testing.assert_close(losses, F.binary_cross_entropy_with_logits(outputs[:, :5], y, reduction="none").mean(1))
        assert not torch.autograd.grad(losses.sum(), outputs)[0][:, 5:].any()


def test_the_loss_of_values_is_the_mean_squared_error() -> None:
    outputs, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert sample_losses(outputs, y, "value").tolist() == [2.5, 0.0] and mean_loss(outputs, y, "value").item() == 1.25


@pytest.mark.parametrize("target", TARGETS)
def test_a_strategys_losses_go_by_the_targets_of_the_samples(target: str) -> None:
    class Competing(Strategy):
        bce_mean = "competing"

    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    y = torch.randint(6, (5,)) if target == "label" else torch.randint(0, 2, (5, 6)).float()
    samples = Samples(x, y, target=target)
    for cls in (Strategy, Competing):
        strategy = cls(example_model())
        strategy.target = target  # as a run has it
        outputs = strategy.model(x)
        torch.testing.assert_close(strategy.loss(samples), mean_loss(outputs, y, target, cls.bce_mean))
        torch.testing.assert_close(strategy.sample_losses(outputs, y), sample_losses(outputs, y, target, cls.bce_mean))
        masked = torch.where(torch.arange(6) < 4, outputs, NONE) if target == "multilabel" else outputs
        torch.testing.assert_close(strategy.loss_of_outputs(masked, samples), mean_loss(masked, y, target, cls.bce_mean))
