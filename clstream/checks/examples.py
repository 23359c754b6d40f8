"""The example stream and model that the checks use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.stream import Samples, Stream, Task


def example_stream(
    schedule: tuple[int, ...] = (0, 1, 2),
    epochs: int = 1,
    batch_size: int = 8,
    scenario: str = "class",
    boundaries: bool = True,
    target: str = "label",
) -> Stream:
    """Return a small stream: 3 tasks of 2 classes, (1, 8, 8) uint8 images of one pattern a class with noise, 60 + 20 a task.

    With other targets an image has none, one or both of the patterns of its task. Multi-label ones say in 6 columns which; values
    are 6 numbers, the sum of a row of a matrix for each pattern.
    """
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (6, 1, 8, 8), generator=draw)
    mixing = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def samples(task: int, per_class: int) -> Samples:
        labels = torch.tensor([2 * task, 2 * task + 1])
        noise = torch.randint(0, 56, (2 * per_class, 1, 8, 8), generator=draw)
        if target == "label":
            y = labels.repeat(per_class)
            return Samples((patterns[y] + noise).to(torch.uint8), y)
        present = torch.zeros(2 * per_class, 6)
        present[:, labels] = torch.randint(0, 2, (2 * per_class, 2), generator=draw).float()
        images = (present @ (patterns > 100).flatten(1).float() * 100).view(-1, 1, 8, 8)
        return Samples((images + noise).to(torch.uint8), present if target == "multilabel" else present @ mixing, target=target)

    classes = [() if target == "value" else (2 * number, 2 * number + 1) for number in range(3)]
    tasks = [Task(number, classes[number], samples(number, 30), samples(number, 10)) for number in range(3)]
    return Stream("example", tasks, schedule, epochs, batch_size, scenario, boundaries=boundaries)


def example_model(seed: int = 0, head: str = "fixed", classes: int = 6) -> nn.Module:
    """Return a small model for `example_stream`, the same for the same seed."""
    with isolated(seed, "model"):
        return Mlp((1, 8, 8), classes, hidden=(32,), head=head)


class NormedNet(nn.Module):
    """A small model for `example_stream` that answers otherwise while it learns: a convolution, batch norm, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(144, 6)

    def features(self, x: Tensor) -> Tensor:
        """Return (n, 144) features of (n, 1, 8, 8) bytes."""
        features: Tensor = self.stages(x.float() / 255)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 6) logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


def normed_model() -> nn.Module:
    """Return a model with batch norm and dropout for `example_stream`, always the same."""
    with isolated(0, "model"):
        return NormedNet()
