"""Replaying a recording: the same stream, batch for batch, over the same data wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clstream.streams.augmentations import CropFlipJitter, crop_and_flip
from clstream.streams.blobs import points
from clstream.streams.corruptions import Corrupt, Fit
from clstream.streams.data import FILES, NAMES, TABLES, data_root, digits, known_name, load, source, table
from clstream.streams.domains import Pad, Permute, Rotate
from clstream.streams.image_folder import check_images, load_images
from clstream.streams.multilabel_canvas import canvases, check_canvases
from clstream.streams.multilabel_folder import load_labelled
from clstream.streams.omniglot import check_drawings, load_omniglot
from clstream.streams.options import check_options
from clstream.streams.split_regression import diabetes, synthetic

from clstream.recording import Recording, read
from clstream.stream import Samples, Stream

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Pad": Pad, "Permute": Permute, "Rotate": Rotate, "crop_and_flip": crop_and_flip,
    "CropFlipJitter": CropFlipJitter, "Corrupt": Corrupt, "Fit": Fit,
}  # fmt: skip
"""The transforms and augmentations of ours: all that a recording can name by itself."""


def recorded(
    file: str | Path,
    root: str | Path | None = None,
    data: Stream | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Stream:
    """The stream of a recording, batch for batch, over the same data: `--stream recorded:FILE` on the command line.

    Args:
        file: what `clstream record` or `clstream.recording.record` wrote.
        root: the folder with the data, where that is one of torchvision's data sets, as in `split_mnist`; the folder or archive of
            an `image_folder`.
        data: a stream over the same data, where the samples are the user's own: only its samples are used.
        functions: transforms and augmentations of the user's own that the recording names, by name: for a transform its class.

    Raises:
        FileNotFoundError, OSError: if the recording or the data is not there.
        ValueError: if the recording is damaged, or what is here is not what was recorded: the data, a transform, or the order
            in which torch deals the batches.

    """
    recording = read(file)
    if data is not None:
        parts, where = recording.find_parts(data), f"the data of {data.name}"
    else:
        parts, where = _loaded(recording, root)
    for name in recording.about["parts"]:  # data of probes that has a name
        kind, _, other = name.partition("/")
        if kind == "unknown" and known_name(other) in NAMES:
            parts[name] = source(known_name(other), root)[1]
    return recording.replay(parts, where, {**FUNCTIONS, **(functions or {})})


def _loaded(recording: Recording, root: str | Path | None) -> tuple[dict[str, Samples], str]:
    """Return the data sets that a recording names, and what to call them."""
    loader = recording.about["loader"]
    if loader in FILES:
        (train, test), where = load(loader, root), f"{loader} in {data_root(root)}"
    elif loader == "digits":
        (train, test), where = digits(), "scikit-learn's digits, as they are here,"
    elif loader in TABLES:
        (train, test), where = table(loader), f"scikit-learn's {loader}, as it is here,"
    elif loader == "blobs":
        (train, test), where = _points(recording), "blobs, as this torch draws them,"
    elif loader == "multilabel_canvas":
        (train, test), where = _canvases(recording, root), "canvases, as this torch draws them,"
    elif loader == "split_regression":
        (train, test), where = _regression(recording), "split_regression's data, as it is here,"
    elif loader == "image_folder":
        (train, test), where = _images(recording, root), f"the images in {root}"
    elif loader == "multilabel_folder":
        (train, test), where = _labelled(recording, root), f"the images in {root}"
    elif loader == "omniglot":
        (train, test), where = _drawings(recording, root), f"Omniglot in {data_root(root)}"
    else:
        raise ValueError(
            f"{recording.file} was recorded from samples that clstream can't load: give a stream over them, "
            f"recorded({str(recording.file)!r}, data=my_stream()) or --stream.data my_file.my_stream"
        )
    return {"train": train, "test": test}, where


MOST_POINTS = 1 << 27
"""Numbers that are drawn for a recording of blobs at most: it is a small file that asks for them."""

_COUNTS = ("classes", "features", "train_per_class", "test_per_class", "seed")


def _points(recording: Recording) -> tuple[Samples, Samples]:
    """Return the points that a recording of blobs asks for. Raises ValueError for what can't be, and for too many."""
    options = recording.about["options"]
    counts = [options.get(name) for name in _COUNTS]
    if set(options) != {*_COUNTS, "spread"} or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{recording.file} asks for blobs that can't be: {options}")
    classes, features, train, test, _ = counts
    if classes * features * (train + test) > MOST_POINTS:
        raise ValueError(f"{recording.file} asks for blobs of more than {MOST_POINTS:,} numbers: give a stream over them, data=...")
    return points(**options)


MOST_CANVASES = 1 << 17
"""Canvases that are drawn for a recording at most: it is a small file that asks for them."""


def _canvases(recording: Recording, root: str | Path | None) -> tuple[Samples, Samples]:
    """Return the canvases that a recording asks for. Raises ValueError for what can't be, and for too many."""
    options = dict(recording.about["options"])
    try:
        data, train, test, seed = (options.pop(name) for name in ("data", "train", "test", "seed"))
        check_canvases(data, train, test, seed)
        if train + test > MOST_CANVASES:
            raise ValueError(f"{train + test:,} are more than {MOST_CANVASES:,}: give a stream over them, data=...")
        return canvases(data, train, test, seed, root)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{recording.file} asks for canvases that can't be: {error}") from None


def _regression(recording: Recording) -> tuple[Samples, Samples]:
    """Return the rows that a recording of split_regression asks for. Raises ValueError for what can't be, and for too many."""
    options = dict(recording.about["options"])
    if options == {"data": "diabetes"}:
        return diabetes()
    try:
        data, *others = (options.pop(name) for name in ("data", *_SYNTHETIC))
        if data != "synthetic":
            raise ValueError(f"there is no data {data!r:.50}")
        drawn = synthetic(*others)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{recording.file} asks for rows that can't be: {error}") from None
    return drawn.train, drawn.test


_SYNTHETIC = ("tasks", "drift", "train", "test", "features", "noise", "seed")


def _images(recording: Recording, root: str | Path | None) -> tuple[Samples, Samples]:
    """Return the images that a recording asks for, of a folder that the user names: a recording names none."""
    if root is None:
        raise ValueError(f"{recording.file} was recorded from a folder of images: name it, root=... or --data_root")
    options = dict(recording.about["options"])
    try:
        height, width, mode, test, seed = (options.pop(name) for name in ("height", "width", "mode", "test", "seed"))
        size = None if height is None and width is None else [height, width]
        check_images(size, mode, test)
        train_per_class = options.pop("train_per_class", None)
        check_options({"seed": seed, "train_per_class": train_per_class}, "train_per_class")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{recording.file} asks for images that can't be: {error}") from None
    _, train, tested = load_images(root, size, mode, test, seed, train_per_class=train_per_class)
    return train, tested


def _labelled(recording: Recording, root: str | Path | None) -> tuple[Samples, Samples]:
    """Return the images with several labels that a recording asks for, of a folder that the user names."""
    if root is None:
        raise ValueError(f"{recording.file} was recorded from a folder of images: name it, root=... or --data_root")
    try:
        height, width, mode = (recording.about["options"][name] for name in ("height", "width", "mode"))
        size = None if height is None and width is None else [height, width]
        check_images(size, mode)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{recording.file} asks for images that can't be: {error}") from None
    _, parts = load_labelled(root, size, mode)
    return parts["train"], parts["test"] if "test" in parts else parts["val"]


def _drawings(recording: Recording, root: str | Path | None) -> tuple[Samples, Samples]:
    """Return the drawings of Omniglot that a recording asks for."""
    options = dict(recording.about["options"])
    try:
        background, rotations, size, test_drawers = (
            options.pop(name) for name in ("background", "rotations", "size", "test_drawers")
        )
        check_drawings(background, rotations, size, test_drawers)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{recording.file} asks for drawings that can't be: {error}") from None
    _, train, test = load_omniglot(background, rotations, size, test_drawers, root)
    return train, test
