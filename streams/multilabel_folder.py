"""Streams of one's own images with several labels each: folders train and test, and a file that says what is on each image."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import data_root
from clstream.streams.image_cache import ImageSet, cache_files, decode_all, key_of, load_cached
from clstream.streams.image_files import MOST_BYTES, ImageFile, find_files, opened
from clstream.streams.image_folder import RESIDENT, check_images, outer, sides
from clstream.streams.options import check_options
from clstream.streams.tensors import from_tensors

from clstream.params import check_bool
from clstream.stream import DataSource, Samples, Stream

LABELS = "labels.csv"
"""The file that says which labels each image has."""

PARTS = ("train", "val", "test")
"""The folders of images."""


def multilabel_folder(
    root: str | Path,
    tasks: int | list[int] | list[list[str]] = 5,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[str] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    size: int | list[int] | None = None,
    mode: str = "RGB",
    seed: int = 0,
    cache: str | Path | None = None,
    boundaries: bool = True,
    augment: bool = False,
    drop_last: bool = False,
    progress: bool = True,
) -> Stream:
    """Images with several labels each, by class: a task has the images with a label of its own, and no other labels of them.

    `root` has images in folders `train` and `test` (or `val`), and a file `labels.csv` with the columns `file`, as
    `train/0001.png`, and `labels`, names parted by spaces. Images are decoded once to uint8, (channels, height, width), and kept in
    a file: see `image_folder`. An image without labels is in no task. A task's test samples keep all of their labels.

    Args:
        root: the folder, or a zip archive of it. One that is not where the command was given is looked for in the data folder.
        tasks, class_order: see `from_tensors`; classes are named by their labels, in the order of the alphabet.
        scenario: "class" or "task".
        epochs, batch_size, sessions_per_task, validation, boundaries, drop_last, seed: see `from_tensors`.
        size, mode, cache, progress: see `image_folder`.
        augment: random crops (padding 4) and horizontal flips where samples are learned.

    Raises:
        ValueError: naming the file, for what can't be read as an image, one without a line, and a class that no training image has.
        FileNotFoundError, OSError: if there is no such folder or `labels.csv`, or no cache can be written.

    """
    check_options(locals() | {"class_order": None if isinstance(class_order, (list, tuple)) else class_order})
    check_bool(augment=augment)
    check_images(size, mode)
    classes, parts = load_labelled(root, size, mode, cache, progress)
    train, test = parts["train"], parts["test"] if "test" in parts else parts["val"]
    name = Path(root).expanduser().absolute().name.removesuffix(".zip")
    number = {label: column for column, label in enumerate(classes)}

    def columns(option: str, labels: Sequence[str]) -> list[int]:
        if unknown := [label for label in labels if str(label) not in number]:
            raise ValueError(f"{name}: {option} names {unknown[0]!r}, which is not one of the labels")
        return [number[str(label)] for label in labels]

    dealt = [
        columns(f"tasks[{position}]", part) if isinstance(part, (list, tuple)) else part
        for position, part in enumerate(tasks if isinstance(tasks, (list, tuple)) else ())
    ]
    order = columns("class_order", class_order) if isinstance(class_order, (list, tuple)) else class_order
    stream = from_tensors(
        train.x, train.y, test.x, test.y, name, dealt or tasks, scenario, epochs, batch_size, order, sessions_per_task,  # type: ignore[arg-type]
        validation, seed, boundaries=boundaries, augment=crop_and_flip if augment else None, drop_last=drop_last,
        resident=train.x.numel() + test.x.numel() <= RESIDENT, target="multilabel",
    )  # fmt: skip
    pair = sides(size)
    options = {"height": None if pair is None else pair[0], "width": None if pair is None else pair[1], "mode": mode}
    source = DataSource({"train": train, "test": test}, "multilabel_folder", options)
    return replace(stream, class_names=classes[: stream.classes]).with_source(source)


def load_labelled(
    root: str | Path,
    size: int | Sequence[int] | None = None,
    mode: str = "RGB",
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[tuple[str, ...], dict[str, Samples]]:
    """Return the labels that there are, sorted, and the images of "train" and of "val" and "test" where there are some.

    Raises FileNotFoundError and ValueError as `multilabel_folder` does.
    """
    place = Path(root).expanduser()
    place = place if place.exists() or not (data_root() / place).exists() else data_root() / place
    listed = find_files(place)
    prefix = outer(listed)
    named = _labels(place, prefix, listed)
    own = {part: [file for file in listed if file.name.startswith(f"{prefix}{part}/") and file.name[-1] != "/"] for part in PARTS}
    if not own["train"] or not (own["val"] or own["test"]):
        raise ValueError(f"{place} needs images in its folders train and test")
    if lacking := [file.name for part in own.values() for file in part if file.name.removeprefix(prefix) not in named]:
        raise ValueError(f"{place / prefix / LABELS} has no line for {lacking[0].removeprefix(prefix)}")
    first, second = own["train"] + (own["val"] if own["test"] else []), own["test"] or own["val"]
    images = ImageSet(("image",), [first], [second])
    facts = [(file.name, file.size, file.changed) for file in images.files]
    where = cache_files(place, cache, f"{key_of('labels', facts, sides(size), mode)}.images")
    cached = load_cached(where)
    if cached is None:
        cached = load_cached([decode_all(place, images, mode, sides(size), where, f"decoding {place.name}", progress)])
        assert cached is not None
    classes = tuple(sorted({label for labels in named.values() for label in labels}))
    column = {label: number for number, label in enumerate(classes)}
    y = torch.zeros(len(images.files), len(classes))
    for row, file in enumerate(images.files):
        y[row, [column[label] for label in named[file.name.removeprefix(prefix)]]] = 1
    train, last = len(own["train"]), "test" if own["test"] else "val"
    whole = Samples(cached[1].x, y[: len(first)], target="multilabel")
    parts = {"train": whole[:train], last: Samples(cached[2].x, y[len(first) :], target="multilabel")}
    return classes, parts if len(first) == train else {**parts, "val": whole[train:]}


def _labels(place: Path, prefix: str, listed: Sequence[ImageFile]) -> Mapping[str, list[str]]:
    """Return the labels of each file that a labels.csv names. Raises ValueError, in one sentence, for what is none."""
    file = next((file for file in listed if file.name == f"{prefix}{LABELS}"), None)
    where = place / prefix / LABELS
    if file is None:
        raise FileNotFoundError(f"there is no {where}: a multilabel data set has one, with the columns file and labels")
    if file.size > MOST_BYTES:
        raise ValueError(f"{where} has more than {MOST_BYTES:,} bytes: it is no file of labels")
    with opened(place) as read:
        content = read(file)
    try:
        lines = list(csv.DictReader(io.StringIO(content.decode("utf-8"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is no CSV file: {error}") from None
    if not lines or not {"file", "labels"} <= lines[0].keys():
        raise ValueError(f"{where} must have the columns file and labels, in its first line, and a line for each image")
    return {str(line["file"]): str(line["labels"] or "").split() for line in lines}
