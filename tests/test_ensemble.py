"""Ensembles: networks that are scored together answer as one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream.models import LeNet, Mlp
from clstream.models.ensemble import Ensemble


# Scoring
def test_networks_are_asked_together_as_one_by_one() -> None:
    torch.manual_seed(0)
    for make, x in (
        (lambda: Mlp(10, 4, hidden=(16,)), torch.randn(12, 10)),
        (lambda: LeNet((1, 28, 28), 4), torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8)),
    ):
        models = [make() for _ in range(4)]
        ensemble = Ensemble(models)
        assert ensemble.batched == isinstance(models[0], Mlp)  # convolutions are batched where there is a GPU
        with torch.no_grad():
            next(models[2].parameters()).add_(0.1)
            expected = torch.stack([model(x) for model in models])
        ensemble.refresh(2)
        torch.testing.assert_close(ensemble.outputs(x), expected)
        torch.testing.assert_close(ensemble.outputs_of(2, x), expected[2])
        assert all(model.training for model in models)


def test_networks_that_cannot_be_batched_are_asked_one_by_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out if float(out.detach().sum()) > 1e9 else out * 2

    models = [Branching() for _ in range(3)]
    ensemble = Ensemble(models)
    x = torch.randn(6, 10)
    torch.testing.assert_close(ensemble.outputs(x), torch.stack([model(x) for model in models]).detach())
    assert not ensemble.batched
