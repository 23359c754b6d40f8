"""Loading data sets as whole raw tensors: torchvision's from a folder or by its download, scikit-learn's digits and tables."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clstream.stream import Samples

_FOUR = "the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
FILES = {
    "MNIST": _FOUR + " in {root}/MNIST/raw",
    "FashionMNIST": _FOUR + " in {root}/FashionMNIST/raw",
    "CIFAR10": "the unpacked cifar-10-python.tar.gz in {root}/cifar-10-batches-py",
    "CIFAR100": "the unpacked cifar-100-python.tar.gz in {root}/cifar-100-python",
}

TABLES = ("breast_cancer", "wine")
"""Those of scikit-learn's tables that are to classify, beside the digits."""


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder for data: `root`, else the environment's CLSTREAM_DATA, else clstream's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clstream"
    return Path(root or os.environ.get("CLSTREAM_DATA") or cache).expanduser()


def source(data: str, root: str | Path | None = None) -> tuple[Samples, Samples]:
    """Return the training and the test set of a data set by name."""
    if data in TABLES:
        return table(data)
    if data not in (*FILES, "digits"):
        raise ValueError(f"data must be one of digits, {', '.join((*TABLES, *FILES))}, not {data!r}")
    return digits() if data == "digits" else load(data, root)


def load(name: str, root: str | Path | None = None) -> tuple[Samples, Samples]:
    """Return the training and the test set of a torchvision data set: uint8 images (n, channels, height, width).

    Raises:
        FileNotFoundError: if the data is not in the folder and can't be downloaded; it says which files, where, and how.

    """
    folder = data_root(root)
    try:
        return _read(name, folder)
    except FileNotFoundError:
        _download(name, folder)
        return _read(name, folder)


def digits() -> tuple[Samples, Samples]:
    """Return scikit-learn's digits, float32 (n, 1, 8, 8) from 0 to 1: every fourth of each class is for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return every_fourth(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))


def table(name: str) -> tuple[Samples, Samples]:
    """Return one of scikit-learn's tables, "breast_cancer" or "wine": every fourth row of each class is for the test.

    Inputs are float32, (n, features); each feature has mean 0 and standard deviation 1 over the training rows.
    """
    from sklearn import datasets

    rows, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, test = every_fourth(torch.tensor(rows), torch.tensor(labels))
    mean, deviation = train.x.mean(0), train.x.std(0, correction=0)
    return tuple(Samples(((part.x - mean) / deviation).float(), part.y) for part in (train, test))  # type: ignore[return-value]


def every_fourth(x: Tensor, y: Tensor) -> tuple[Samples, Samples]:
    """Return samples to train and, every fourth of each class, to test on."""
    rank = torch.zeros_like(y)
    for label in y.unique():
        here = y == label
        rank[here] = torch.arange(int(here.sum()))
    test = rank % 4 == 3
    return Samples(x[~test], y[~test]), Samples(x[test], y[test])


def _download(name: str, folder: Path) -> None:
    """Have torchvision download a data set into the folder."""
    from torchvision import datasets

    try:
        folder.mkdir(parents=True, exist_ok=True)
        getattr(datasets, name)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} is not in {folder}, and could not be downloaded to it ({' '.join(str(error).split())}). "
            f"Put {FILES[name].format(root=folder)}, or name the folder that has them with --data-root, root=... or the "
            "environment variable CLSTREAM_DATA"
        ) from None


def _read(name: str, folder: Path) -> tuple[Samples, Samples]:
    """Return both sets from the folder; FileNotFoundError if they are not all there."""
    if name in ("MNIST", "FashionMNIST"):  # read here: importing torchvision takes longer, and thrice the memory
        raw = folder / name / "raw"
        train, test = (
            Samples(_idx(raw / f"{kind}-images-idx3-ubyte")[:, None], _idx(raw / f"{kind}-labels-idx1-ubyte").long())
            for kind in ("train", "t10k")
        )
        return train, test
    from torchvision import datasets

    try:
        parts = [getattr(datasets, name)(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # torchvision's word for "not there"
        raise FileNotFoundError(str(error)) from None
    train, test = (Samples(torch.from_numpy(part.data).movedim(-1, 1).contiguous(), torch.tensor(part.targets)) for part in parts)
    return train, test


def _idx(file: Path) -> Tensor:
    """Read a file of bytes in the IDX format: two zeros, type 8, number of dimensions, big-endian sizes, then the bytes."""
    data = np.fromfile(file, dtype=np.uint8)
    sizes = data[4 : 4 + 4 * int(data[3])].view(">u4").tolist() if data[:3].tolist() == [0, 0, 8] else []
    body = data[4 + 4 * len(sizes) :]
    if not sizes or len(body) != math.prod(sizes):
        raise ValueError(f"{file} is damaged: it is not a whole IDX file of bytes; delete it, and it is downloaded again")
    return torch.from_numpy(body).view(sizes)
