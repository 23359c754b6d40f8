"""Streams of one's own images: a folder of images for each class, in a folder or a zip archive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import data_root
from clstream.streams.image_cache import ImageSet, cache_files, decode_all, key_of, load_cached
from clstream.streams.image_files import ENDINGS, ImageFile, find_files
from clstream.streams.options import check_options
from clstream.streams.tensors import from_tensors

from clstream.params import check_bool, check_choice, check_integer, check_integers, check_number
from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream

MODES = ("RGB", "L")
"""Colours: red, green and blue, or grey."""

MOST_SIDE = 4096
"""Pixels of a side at most."""

PARTS = ("train", ("test", "val"))
"""The folder of images to train on, and those of which the first that is there has the images to test on."""

RESIDENT = 1 << 32
"""Bytes of images up to which all are moved to the device of a run."""


def image_folder(
    root: str | Path,
    tasks: int | list[int] | list[list[int | str]] = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int | str] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    size: int | list[int] | None = None,
    mode: str = "RGB",
    test: float = 0.2,
    seed: int = 0,
    cache: str | Path | None = None,
    boundaries: bool = True,
    augment: bool = False,
    drop_last: bool = False,
    progress: bool = True,
    train_per_class: int | None = None,
) -> Stream:
    """Images in a folder for each class, by class: decoded once to uint8, (channels, height, width), and kept in a file.

    The folders of the classes are in `root/train` and `root/test` (or `root/val`), which need the same classes; or in `root`
    itself, and then a share of each class is for the test. A folder that is alone around all of these is looked through. What is
    hidden is left out; anything else in the folder of a class must be an image that can be read.

    Args:
        root: the folder, or a zip archive of it, which is read as it is. One that is not where the command was given is looked
            for in the data folder.
        tasks, class_order: see `from_tensors`; classes are named by their folders.
        scenario, epochs, batch_size, sessions_per_task, validation, boundaries, drop_last: see `from_tensors`.
        size: of all images, in pixels: the side of a square, or height and width. An image of another size is scaled, bilinearly,
            to cover it, and cut about its middle. None: images must have one size already.
        mode: "RGB" or "L" (grey, one channel). All images are converted to it, and transparency is dropped.
        test: share of each class that is for the test, where there are no folders train and test.
        seed: of which images these are, and of those that `train_per_class` draws.
        cache: the folder for the decoded images. None: one beside `root`, named as it and `.cache`, if that can be written, else
            clstream's cache folder. What is there is found again by the names, sizes and times of the files, and these options.
        augment: random crops (padding 4) and horizontal flips where samples are learned.
        progress: whether to show a bar while images are decoded, in a terminal.
        train_per_class: so many training images of each class, drawn at random by `seed`, in the order of their names; of the
            others nothing is read. None: all. The images to test on stay the same.

    Raises:
        ValueError: naming the file, for what can't be read as an image; for one class only, one without images, or one that has
            fewer than `train_per_class`.
        FileNotFoundError, OSError: if there is no such folder, or no cache can be written.

    """
    check_options(locals() | {"class_order": None if isinstance(class_order, (list, tuple)) else class_order}, "train_per_class")
    check_bool(augment=augment)
    check_images(size, mode, test)
    names, train, tested = load_images(root, size, mode, test, seed, cache, progress, train_per_class)
    name = Path(root).expanduser().absolute().name.removesuffix(".zip")
    stream = by_class(
        name, names, train, tested, tasks, class_order, scenario=scenario, epochs=epochs, batch_size=batch_size,
        sessions_per_task=sessions_per_task, validation=validation, boundaries=boundaries, drop_last=drop_last,
        augment=crop_and_flip if augment else None,
    )  # fmt: skip
    pair = sides(size)
    options = {
        "height": None if pair is None else pair[0], "width": None if pair is None else pair[1], "mode": mode, "test": test,
        "seed": seed, **({} if train_per_class is None else {"train_per_class": train_per_class}),
    }  # fmt: skip
    if train_per_class is not None:
        stream = replace(stream, notes=(*stream.notes, f"{train_per_class:,} training images of each class, drawn by seed {seed}"))
    return stream.with_source(DataSource({"train": train, "test": tested}, "image_folder", options))


def by_class(
    name: str, names: Sequence[str], train: Samples, test: Samples, tasks: object, class_order: object, **options: Any
) -> Stream:
    """Split images by class, with the classes named; the images are moved to the device of a run unless they are too large."""
    if isinstance(tasks, (list, tuple)):
        tasks = [[str(label) for label in part] if isinstance(part, (list, tuple)) else part for part in tasks]
    if isinstance(class_order, (list, tuple)):
        class_order = [str(label) for label in class_order]
    called = np.array(names, dtype=object)
    resident = train.x.numel() + test.x.numel() <= RESIDENT
    return from_tensors(
        train.x, called[train.y.numpy()], test.x, called[test.y.numpy()], name=name, relabel=True, resident=resident,
        tasks=tasks, class_order=class_order, **options,  # type: ignore[arg-type]  # by name, as `relabel` has it
    )  # fmt: skip


def check_images(size: object, mode: object, test: object = 0.5) -> None:
    """Raise ValueError, in one sentence, for options of images that are not what they must be."""
    check_choice(MODES, mode=mode)
    check_number(0, 1, test=test)
    if test in (0, 1):
        raise ValueError(f"test must be a share above 0 and below 1, not {test}")
    if not isinstance(size, (list, tuple)):
        check_integer(1, MOST_SIDE, none=True, size=size)
        return
    check_integers(1, size=size)
    if len(size) != 2 or max(size) > MOST_SIDE:
        raise ValueError(f"size must be a number of pixels, or height and width, up to {MOST_SIDE}, not {list(size)!r:.100}")


def sides(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return height and width."""
    if size is None:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def load_images(
    root: str | Path,
    size: int | Sequence[int] | None = None,
    mode: str = "RGB",
    test: float = 0.2,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    train_per_class: int | None = None,
) -> tuple[tuple[str, ...], Samples, Samples]:
    """Return class names, images to train on and images to test on: see `image_folder`."""
    root = Path(root).expanduser()
    root = root if root.exists() or not (data_root() / root).exists() else data_root() / root
    if root.is_file():
        status = root.stat()
        facts: object = (root.name, status.st_size, status.st_mtime_ns)
        found = None
    else:
        found = find_files(root)
        facts = [(file.name, file.size, file.changed) for file in found]
    pair = sides(size)
    drawn = () if train_per_class is None else (int(train_per_class),)
    places = cache_files(root, cache, f"{key_of(facts, pair, mode, float(test), int(seed), *drawn)}.images")
    cached = load_cached(places)
    if cached is None:
        images = _by_class(root, find_files(root) if found is None else found, test, seed)
        if train_per_class is not None:
            images = replace(images, train=_draw(images, train_per_class, seed, root))
        cached = load_cached([decode_all(root, images, mode, pair, places, f"decoding {root.name}", progress)])
        assert cached is not None
    return cached


def _by_class(root: Path, found: list[ImageFile], test: float, seed: int) -> ImageSet:
    """Sort files by part and class. Raises ValueError, in one sentence, for folders that make no stream."""
    prefix = outer(found)
    tops = {file.name.removeprefix(prefix).split("/")[0] for file in found if "/" in file.name.removeprefix(prefix)}
    tested = next((part for part in PARTS[1] if part in tops), None)
    if PARTS[0] in tops and tested is not None:
        train, other = (_classes(root, f"{prefix}{part}/", found) for part in (PARTS[0], tested))
        for part, present, needed in ((tested, other, train), (PARTS[0], train, other)):
            if missing := sorted(needed.keys() - present.keys()):
                raise ValueError(f"{root / prefix / part} has no folder {missing[0]!r}, and both parts need the same classes")
        names = tuple(sorted(train))
        return ImageSet(names, [train[name] for name in names], [other[name] for name in names])
    classes = _classes(root, prefix, found)
    names = tuple(sorted(classes))
    split = [_split(classes[name], test, derive(seed, "test", number), root / prefix / name) for number, name in enumerate(names)]
    return ImageSet(names, [kept for kept, _ in split], [held for _, held in split])


def _draw(images: ImageSet, count: int, seed: int, root: Path) -> list[list[ImageFile]]:
    """Return so many training images of each class, in the order of their names. Raises ValueError for a class with fewer."""
    drawn = []
    for number, (name, files) in enumerate(zip(images.names, images.train, strict=True)):
        if len(files) < count:
            raise ValueError(f"{root} has {len(files):,} training images of {name!r}: take a train_per_class of at most that")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(derive(seed, "train", number)))
        drawn.append([files[place] for place in order[:count].sort().values.tolist()])
    return drawn


def outer(found: Sequence[ImageFile]) -> str:
    """Return the path to where the folders of parts or classes are: archives have a folder around them as a rule."""
    prefix = ""
    while True:
        inner = [file.name.removeprefix(prefix) for file in found if file.name.startswith(prefix) and file.name != prefix]
        inner = [name for name in inner if "/" in name or name.lower().endswith(ENDINGS)]
        tops = {name.split("/")[0] for name in inner}
        if len(tops) != 1 or any(name.count("/") < 2 and name.lower().endswith(ENDINGS) for name in inner):
            return prefix
        prefix += f"{tops.pop()}/"


def _classes(root: Path, prefix: str, found: Sequence[ImageFile]) -> Mapping[str, list[ImageFile]]:
    """Return the files of each class. Raises ValueError for no class, one, or an empty one, and for an image of none."""
    classes: dict[str, list[ImageFile]] = defaultdict(list)
    for file in found:
        name = file.name.removeprefix(prefix)
        if not name or not file.name.startswith(prefix):
            continue
        top, slash, _ = name.partition("/")
        if not slash and name.lower().endswith(ENDINGS):
            raise ValueError(f"{root / file.name} is in no folder of a class: there must be a folder of images for each class")
        if slash:
            classes[top] += [] if name.endswith("/") else [file]
    if not classes:
        raise ValueError(f"{root / prefix} has no folders of images: it needs one for each class, or train/ and test/ with them")
    if empty := sorted(name for name, files in classes.items() if not files):
        raise ValueError(f"the class {empty[0]!r} in {root / prefix} has no images: remove its folder, or fill it")
    if len(classes) == 1:
        raise ValueError(f"{root / prefix} has images of one class only, {next(iter(classes))!r}: there is nothing to tell apart")
    return classes


def _split(files: list[ImageFile], share: float, seed: int, what: Path) -> tuple[list[ImageFile], list[ImageFile]]:
    """Return the images of a class to train and to test on, each in the order of their names."""
    if len(files) < 2:
        raise ValueError(f"{what} has one image, and a class needs one to train on and one to test on")
    count = min(max(1, round(share * len(files))), len(files) - 1)
    held = set(torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return [file for place, file in enumerate(files) if place not in held], [files[place] for place in sorted(held)]
