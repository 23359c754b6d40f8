"""Folders and archives of small images, as users have them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(number: int, height: int = 6, width: int = 6, mode: str = "RGB") -> Image.Image:
    """Return an image of random pixels, another one for each number."""
    draw = np.random.default_rng(number)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image.quantize(16) if mode == "P" else image.convert(mode)


def write_pictures(root: Path, classes: dict[str, int], start: int = 0, ending: str = "png", **options: object) -> Path:
    """Write so many images of each class."""
    for position, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(start + 100 * position + number, **options).save(root / name / f"{number:03}.{ending}")  # type: ignore[arg-type]
    return root


def in_parts(root: Path, train: int = 6, test: int = 3, **options: object) -> Path:
    """Write folders train and test of four classes."""
    names = ("owl", "cat", "dog", "fox")
    write_pictures(root / "train", dict.fromkeys(names, train), **options)
    write_pictures(root / "test", dict.fromkeys(names, test), 50, **options)
    return root


def zipped(folder: Path, file: Path, within: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    """Put a folder into an archive."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{within}{path.relative_to(folder)}")
    return file


SCENES = {
    "train/0.png": "sea boat", "train/1.png": "sea", "train/2.png": "tree", "train/3.png": "boat tree", "train/4.png": "",
    "test/0.png": "sea tree", "test/1.png": "boat",
}  # fmt: skip
"""The labels of some images, by their files."""


def scenes(root: Path, labels: dict[str, str] = SCENES) -> Path:
    """Write a few images with several labels each, as `multilabel_folder` reads them."""
    for number, name in enumerate(SCENES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    (root / "labels.csv").write_text("\n".join(["file,labels", *(f"{name},{labels[name]}" for name in labels)]))
    return root


def as_tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels, (channels, height, width)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
