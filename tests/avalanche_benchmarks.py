"""Small benchmarks of Avalanche's."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as tv

Import = Callable[[str], ModuleType]


class Images(Dataset[Any]):
    """Small images of PIL's, all pixels different, and a transform, as torchvision's data sets are."""

    def __init__(self, n: int = 12, size: int = 6, transform: Any = None, noisy: bool = False) -> None:
        self.data = np.random.default_rng(0).permutation(n * size * size * 3).reshape(n, size, size, 3) % 251
        self.targets, self.transform, self.noisy = [index % 4 for index in range(n)], transform, noisy

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.data[index].astype(np.uint8))
        if self.noisy:
            image = tv.functional.hflip(image) if random.random() < 0.5 else image
        return image if self.transform is None else self.transform(image), self.targets[index]


def images(avalanche: Import, train: Any, evaluation: Any = None, **kept: Any) -> Any:
    evaluation = evaluation or tv.Compose([tv.ToTensor(), tv.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))])
    return avalanche("benchmarks").nc_benchmark(
        Images(**kept), Images(8), 2, task_labels=False, shuffle=False, train_transform=train, eval_transform=evaluation
    )


NORMAL = (tv.ToTensor(), tv.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
