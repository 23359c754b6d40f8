"""Shared losses, against sums written out and the numbers of the specs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clstream.losses import supervised_contrastive

H = torch.tensor([[1, 2, 0.5], [0.5, 0.2, 1.5], [0.8, 1.5, 0.7], [0.3, 0.4, 1.2]], dtype=torch.float64)


def by_hand(features: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return the loss as its equation reads, in float64, one pair at a time."""
    z = features.double() / features.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    terms = []
    for i in range(len(y)):
        others = [a for a in range(len(y)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        if positives:
            every = torch.stack([(z[i] @ z[a] / temperature).exp() for a in others]).sum().log()
            terms.append(-torch.stack([z[i] @ z[p] / temperature - every for p in positives]).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 0, 1], 0.0501423180), ([0, 0, 0, 0], 3.8982493577 * 0.07 / 0.1)])
def test_supervised_contrastive_is_that_of_the_test_vector(labels: list[int], expected: float) -> None:
    assert supervised_contrastive(H, torch.tensor(labels), 0.1).item() == pytest.approx(expected, abs=1e-10)


def test_supervised_contrastive_and_its_gradient_are_those_of_the_equation() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (24,), generator=draw)
    features = torch.randn(24, 7, generator=draw, dtype=torch.float64)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    one, two = supervised_contrastive(ours, y, 0.2), by_hand(theirs, y, 0.2)
    one.backward()
    two.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(one, two, rtol=0, atol=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_supervised_contrastive_in_float32_keeps_its_digits_at_a_low_temperature() -> None:
    features = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % 4
    assert supervised_contrastive(features, y, 0.005).item() == pytest.approx(by_hand(features, y, 0.005).item(), rel=1e-5)


def test_rows_that_are_alone_are_left_out_of_the_mean() -> None:
    y = torch.tensor([0, 0, 1, 0])
    assert supervised_contrastive(H, y, 0.1).item() == pytest.approx(by_hand(H, y, 0.1).item(), abs=1e-12)
    for n in (1, 4):
        features = H[:n].clone().requires_grad_()
        loss = supervised_contrastive(features, torch.arange(n), 0.1)
        loss.backward()
        assert features.grad is not None
        assert loss.item() == 0 and not features.grad.any()


def test_a_row_of_zeros_gives_no_nan() -> None:
    features = torch.cat([H, torch.zeros(2, 3, dtype=torch.float64)]).requires_grad_()
    loss = supervised_contrastive(features, torch.tensor([0, 1, 0, 1, 0, 1]), 0.1)
    loss.backward()
    assert features.grad is not None
    assert loss.isfinite() and features.grad.isfinite().all()


def test_supervised_contrastive_does_not_change_with_the_order_of_the_rows() -> None:
    y = torch.tensor([0, 1, 0, 1])
    order = torch.tensor([2, 0, 3, 1])
    assert supervised_contrastive(H[order], y[order], 0.1).item() == pytest.approx(supervised_contrastive(H, y, 0.1).item())
