"""Loading data sets as whole raw tensors: torchvision's from a folder or by its download, scikit-learn's digits and tables."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clstream.params import check_choice
from clstream.stream import Samples

_FOUR = "the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
FILES = {
    "MNIST": _FOUR + " in {root}/MNIST/raw",
    "FashionMNIST": _FOUR + " in {root}/FashionMNIST/raw",
    "CIFAR10": "the unpacked cifar-10-python.tar.gz in {root}/cifar-10-batches-py",
    "CIFAR100": "the unpacked cifar-100-python.tar.gz in {root}/cifar-100-python",
}

PLACES = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}
"""The folders of their files, below that of all data."""

KINDS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The files of MNIST and Fashion-MNIST."""

CLASSES = {"MNIST": 10, "FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100}
COUNTS = {"MNIST": (60000, 10000), "FashionMNIST": (60000, 10000), "CIFAR10": (50000, 10000), "CIFAR100": (50000, 10000)}
"""How many training and test images there are."""

SHA256 = {
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "FashionMNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
"""Of the unpacked files, in the order of KINDS. Those of CIFAR are compared by torchvision, which has their MD5."""

_AGAIN = "delete it, and it is downloaded again"

TABLES = ("breast_cancer", "wine")
"""Those of scikit-learn's tables that are to classify, beside the digits."""

NAMES = ("digits", *TABLES, *FILES)
"""All data sets that have a name."""


def known_name(name: str) -> str:
    """Return a data set's name as `NAMES` has it: "fashion_mnist" is FashionMNIST. A name that none has stays as it is."""
    plain = {ours.lower().replace("_", ""): ours for ours in NAMES}
    return plain.get(name.lower().replace("_", ""), name)


def plain_name(name: str) -> str:
    """Return a data set's name in lower case, as names of test sets and classes have it: "fashion_mnist"."""
    return "fashion_mnist" if name == "FashionMNIST" else name.lower()


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder for data: `root`, else the environment's CLSTREAM_DATA, else clstream's cache folder."""
    return Path(root or os.environ.get("CLSTREAM_DATA") or cache_folder()).expanduser()


def cache_folder() -> Path:
    """Return clstream's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clstream"


def source(data: str, root: str | Path | None = None) -> tuple[Samples, Samples]:
    """Return the training and the test set of a data set by name."""
    check_choice(NAMES, data=data)
    if data in TABLES:
        return table(data)
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


def look(name: str, root: str | Path | None = None) -> str | None:
    """Return what is wrong with a torchvision data set in a folder: "" if nothing is, None if it is not there.

    It is read as `load` reads it, with its checksums; nothing is downloaded.
    """
    folder = data_root(root)
    place = folder / PLACES[name]
    if not place.is_dir() or not any(place.iterdir()):  # a download that failed leaves an empty one
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _read(name, folder)
        except FileNotFoundError:
            return f"it is not whole: there must be {FILES[name].format(root=folder)}"
        except Exception as error:  # noqa: BLE001  # torchvision unpickles CIFAR's files, and what is damaged raises anything
            return " ".join(str(error).split()) or type(error).__name__
    return "; ".join(str(warning.message) for warning in said)


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
        own = y == label
        rank[own] = torch.arange(int(own.sum()))
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
        images, labels = zip(*[(raw / KINDS[0 + part], raw / KINDS[1 + part]) for part in (0, 2)], strict=True)
        train, test = (
            Samples(_idx(image, (0, 28, 28))[:, None], _idx(label, (0,)).long())
            for image, label in zip(images, labels, strict=True)
        )
        _check_content(name, raw, train, test)
        _check_sums(name, raw)
        return train, test
    from torchvision import datasets

    try:
        parts = [getattr(datasets, name)(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # torchvision's word for "not there"
        raise FileNotFoundError(str(error)) from None
    train, test = (Samples(torch.from_numpy(part.data).movedim(-1, 1).contiguous(), torch.tensor(part.targets)) for part in parts)
    _check_content(name, folder, train, test)  # torchvision has compared the checksums
    return train, test


def _idx(file: Path, sizes: tuple[int, ...]) -> Tensor:
    """Read a file of bytes in the IDX format: two zeros, type 8, number of dimensions, big-endian sizes, then the bytes.

    These are memory-mapped, so that all processes of a machine share them; what one of them writes to stays its own.
    No more is read than a file of these sizes has, whatever its header promises; another number of samples is let through.
    """
    with file.open("rb") as opened:
        header = opened.read(4 + 4 * len(sizes))
        if len(header) < 4 + 4 * len(sizes) or header[:4] != bytes((0, 0, 8, len(sizes))):
            raise ValueError(f"{file} is no IDX file of bytes in {len(sizes)} dimensions: {_AGAIN}")
        promised = struct.unpack(f">{len(sizes)}I", header[4:])
        following = file.stat().st_size - len(header)
        if promised[1:] != sizes[1:]:
            raise ValueError(f"{file} holds samples of {promised[1:]}, not of {sizes[1:]}: {_AGAIN}")
        if following != math.prod(promised):
            raise ValueError(
                f"{file} is damaged: its header promises {math.prod(promised):,} bytes, and {following:,} follow: {_AGAIN}"
            )
    if not following:
        return torch.empty(promised, dtype=torch.uint8)
    body = np.memmap(file, np.uint8, "c", len(header), (following,))
    return torch.from_numpy(body).view(promised)


def _check_content(name: str, folder: Path, train: Samples, test: Samples) -> None:
    """Refuse sets that can't be a data set, and warn if they are of its kind but of other sizes."""
    classes, counts = CLASSES[name], COUNTS[name]
    for which, part, count in zip(("training", "test"), (train, test), counts, strict=True):
        what = f"the {which} set of {name} in {folder}"
        if len(part.x) != len(part.y):
            raise ValueError(f"{what} has {len(part.x):,} images and {len(part.y):,} labels: {_AGAIN}")
        if not len(part):
            raise ValueError(f"{what} is empty: {_AGAIN}")
        if not 0 <= int(part.y.min()) <= int(part.y.max()) < classes:
            raise ValueError(f"{what} has the label {int(part.y.max())}, but there are only 0 to {classes - 1}: {_AGAIN}")
        if len(part) != count and len(part) in counts:
            raise ValueError(f"{what} has {len(part):,} images, as the other set must have: are its files in the place of others?")
    if (len(train), len(test)) != counts:
        sizes = f"{len(train):,} + {len(test):,} images, not {counts[0]:,} + {counts[1]:,}"
        warnings.warn(f"{name} in {folder} has {sizes}: results are not those of the known data set", stacklevel=4)


def _check_sums(name: str, raw: Path) -> None:
    """Warn of files that are not the known ones."""
    files = [raw / kind for kind in KINDS]
    sums = [_sha256(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    if others := [file.name for file, digest, expected in zip(files, sums, SHA256[name], strict=True) if digest != expected]:
        warnings.warn(
            f"{', '.join(others)} in {raw} are not the known files of {name} (their SHA-256 differ): results are not those of the "
            "known data set",
            stacklevel=4,
        )


@cache
def _sha256(file: Path, changed: int, size: int) -> str:  # noqa: ARG001  # when it changes, it is read again
    """Return the SHA-256 of a file, read again only when it has changed."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
