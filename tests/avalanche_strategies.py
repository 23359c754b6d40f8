"""Strategies and models of Avalanche's."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from clstream.experiments.parity.measuring import Labelled
from clstream.streams.data import digits
from torch import Tensor, nn
from torch.optim import SGD

from clstream.models import Mlp

Import = Callable[[str], ModuleType]
Make = Callable[[], Any]


def benchmark(avalanche: Import, **options: Any) -> Any:
    train, test = digits()
    kept = torch.arange(len(train.y)) % 3 == 0
    datasets = Labelled(train.x[kept], train.y[kept]), Labelled(test.x, test.y)
    return avalanche("benchmarks").nc_benchmark(*datasets, 5, seed=3, **{"task_labels": False, **options})


def features() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU())


def single(avalanche: Import) -> nn.Module:
    return Mlp((1, 8, 8), 10, hidden=(20,))


def growing(avalanche: Import) -> nn.Module:
    return nn.Sequential(features(), avalanche("models").IncrementalClassifier(20))


def headed(avalanche: Import) -> nn.Module:
    models = avalanche("models")

    class Headed(models.MultiTaskModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.features, self.heads = features(), models.MultiHeadClassifier(20)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.heads(self.features(x), task_labels)

    return Headed()


NETS = {"single": single, "growing": growing, "headed": headed}


def maker(avalanche: Import, name: str, net: str = "single", momentum: float = 0.0, **options: Any) -> Make:
    def make() -> Any:
        torch.manual_seed(0)
        model = NETS[net](avalanche)
        optimizer = SGD(model.parameters(), 0.05, momentum=momentum)
        return getattr(avalanche("training.supervised"), name)(
            model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=10, train_epochs=2,
            **{"evaluator": None, **options},
        )  # fmt: skip

    return make
