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


OPTIONS: dict[str, Any] = {"train_mb_size": 10, "train_epochs": 2, "evaluator": None}


def naive(avalanche: Import, model: nn.Module, plugin: Any) -> Any:
    optimizer = SGD(model.parameters(), 0.05)
    return avalanche("training.supervised").Naive(
        model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), plugins=[plugin], **OPTIONS
    )


def icarl(avalanche: Import) -> Any:
    net = single(avalanche)
    return avalanche("training.supervised").ICaRL(
        feature_extractor=net.stages, classifier=net.head, optimizer=SGD(net.parameters(), 0.05), memory_size=60,
        buffer_transform=None, fixed_memory=True, eval_mb_size=100, **OPTIONS,
    )  # fmt: skip


def scr(avalanche: Import) -> Any:
    model = avalanche("models").SCRModel(single(avalanche).stages, nn.Linear(20, 20))
    return avalanche("training.supervised").SCR(
        model=model, optimizer=SGD(model.parameters(), 0.05), mem_size=60, batch_size_mem=20, eval_mb_size=100, **OPTIONS
    )


def gss(avalanche: Import) -> Any:
    plugin = avalanche("training.plugins").GSS_greedyPlugin(mem_size=60, mem_strength=3, input_size=[1, 8, 8])
    return naive(avalanche, single(avalanche), plugin)


def packnet(avalanche: Import) -> Any:
    theirs = avalanche("models.packnet")
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    return naive(avalanche, theirs.PackNetModel(layers), theirs.PackNetPlugin(1, 0.5))


def pnn(avalanche: Import) -> Any:
    model = avalanche("models").PNN(2, 64, 20)
    return avalanche("training.supervised").PNNStrategy(
        model=model, optimizer=SGD(model.parameters(), 0.05), criterion=nn.CrossEntropyLoss(), **OPTIONS
    )


BUILT = {"iCaRL": icarl, "SCR": scr, "GSS": gss, "PackNet": packnet, "PNN": pnn}
"""Those that take networks or loops of their own."""


def builder(avalanche: Import, name: str) -> Make:
    def make() -> Any:
        torch.manual_seed(0)
        return BUILT[name](avalanche)

    return make
