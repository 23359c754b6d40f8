"""Sequences of data sets in order of publication: a small one of real data, and one of the user's own: see `task_sequence`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.data import data_root, load
from clstream.streams.image_files import find_files
from clstream.streams.image_folder import check_images, load_images
from clstream.streams.multilabel_canvas import draw_canvases
from clstream.streams.multilabel_folder import load_labelled
from clstream.streams.omniglot import load_omniglot
from clstream.streams.options import check_options
from clstream.streams.task_sequence import SPLITS, DataSet, TaskKey, task_sequence
from torch import Tensor
from torch.nn import functional as F

from clstream.params import check_bool, check_choice, check_integer
from clstream.seeds import derive
from clstream.stream import Samples, Stream

KINDS = ("label", "multilabel")
"""The kinds of targets that data sets may have."""

PARTS = ("development", "all")
"""Without the tail, and with it."""

SIDE = 32
"""Pixels of a side of mini_nevis's images."""

ANIMALS, VEHICLES = ("bird", "cat", "deer", "dog", "frog", "horse"), ("airplane", "automobile", "ship", "truck")
"""The classes of CIFAR-10."""

ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
"""Of Omniglot, for development."""

TAIL = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
"""Of Omniglot, for the final evaluation."""

LARGEST_LIST = 1 << 20
"""Bytes of a list of data sets."""


def mini_nevis(
    part: str = "development",
    split: str = "dev_test",
    images: int = 2000,
    mode: str = "RGB",
    epochs: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
    augment: bool = False,
    root: str | Path | None = None,
    drop_last: bool = False,
    progress: bool = True,
) -> Stream:
    """Fourteen tasks of real images, 32 x 32, in order of publication; eleven are for development, and three alphabets the tail.

    MNIST (1998); the animals, then the vehicles of CIFAR-10 (2009, JPEG copies); Omniglot's Balinese, Early Aramaic, Greek, Korean
    and Latin (2015); Fashion-MNIST (2017); MNIST again; canvases of one to four objects of Fashion-MNIST, with several labels. The
    tail is Omniglot's katakana, Sanskrit and Tagalog. It has the protocol of NEVIS'22, and neither its data, nor nets, nor numbers.

    Args:
        part: "development" (without the tail) or "all".
        split: what tasks are tested on: "dev_test", cut from training images, or "test", the data sets' own.
        images: training images of a task at most, before they are cut; of test images half as many.
        mode: "RGB", or "L": grey, one channel.
        epochs, batch_size: see `task_sequence`.
        seed: of which images these are, how they are cut, the canvases, and the order of batches.
        augment: random crops (padding 4) and horizontal flips where samples are learned.
        root: as in `split_mnist`; the data is in its folders MNIST, FashionMNIST and `omniglot-py`, and in `cifar10-jpeg.zip` (or a
            folder `cifar10-jpeg`), which has a folder of images for each class in its folders train and test.
        drop_last: see `Stream`.
        progress: whether to show a bar while images are decoded, in a terminal.

    Raises:
        FileNotFoundError: if data is not there; it says which, and where.

    """
    check_options(locals(), "batch_size")
    check_choice(PARTS, part=part)
    check_choice(SPLITS, split=split)
    check_integer(100, images=images)
    check_images(SIDE, mode)
    check_bool(augment=augment)
    digits = _grey("MNIST", 1998, images, mode, seed, root)
    photos = _photos(images, mode, seed, root, progress)
    alphabets = _alphabets((*ALPHABETS, *TAIL) if part == "all" else ALPHABETS, mode, root, progress)
    clothes, canvases = _grey("FashionMNIST", 2017, images, mode, seed, root), _canvases(images, mode, seed, root)
    data = [digits, *photos, *alphabets[:5], clothes, digits, canvases, *alphabets[5:]]
    note = "real data under NEVIS'22's protocol: no number is comparable with the paper's"
    return task_sequence(
        "mini_nevis", data, split, epochs, batch_size, seed, crop_and_flip if augment else None, drop_last, (note,)
    )


def nevis_list(
    file: str | Path,
    part: str = "development",
    split: str = "dev_test",
    final_from: int | None = None,
    size: int = SIDE,
    mode: str = "RGB",
    epochs: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
    augment: bool = False,
    cache: str | Path | None = None,
    drop_last: bool = False,
    progress: bool = True,
) -> Stream:
    """Data sets of the user's own, as tasks in order of publication: a list in YAML.

        - {folder: digits, year: 1998}
        - {folder: scenes, year: 2009, kind: multilabel, name: scenes at night}

    A `folder`, or zip archive, is looked for beside the list. With `kind: label`, as it is if nothing is said, it has a folder of
    images for each class in its folders train, test and, if there is a validation set, val; or a folder for each class, and then a
    fifth of each is for the test. With `kind: multilabel` it has images in train, test and, maybe, val, and a file labels.csv with
    the columns file, as train/0001.png, and labels, parted by spaces. Data sets of one year come in the order of the list; one that
    is named twice comes again.

    Args:
        file: the list.
        part: "development" (without the tail) or "all".
        split: what tasks are tested on: "dev_test", the validation set or what is cut from training images, or "test".
        final_from: the first year of the tail. None: there is no tail.
        size: height and width of all images: see `image_folder`.
        mode: "RGB", or "L": grey, one channel.
        epochs, batch_size: see `task_sequence`.
        seed: of how data sets are cut, and of the order of batches.
        augment: random crops (padding 4) and horizontal flips where samples are learned.
        cache, progress: see `image_folder`.
        drop_last: see `Stream`.

    Raises:
        FileNotFoundError: if the list, or a folder in it, is not there.
        ValueError: for what is no such list, naming the entry, and for what `image_folder` refuses.

    """
    check_options({name: value for name, value in locals().items() if name != "file"}, "batch_size")
    check_choice(PARTS, part=part)
    check_choice(SPLITS, split=split)
    check_integer(0, none=True, final_from=final_from)
    check_integer(1, size=size)
    check_images(size, mode)
    check_bool(augment=augment)
    place = Path(file).expanduser()
    entries = sorted(_entries(place), key=lambda entry: int(entry["year"]))
    late = sum(final_from is not None and entry["year"] >= final_from for entry in entries)
    if late == len(entries):
        raise ValueError(f"{place}: all of its data sets are of {final_from} or later, so there is nothing but the tail")
    if part == "development":
        entries = entries[: len(entries) - late]  # of what is not to be seen nothing is read
    read: dict[str, DataSet] = {}
    for entry in entries:
        if (name := entry["name"]) not in read:
            read[name] = _data_set(place.parent / entry["folder"], entry, size, mode, seed, cache, progress)
    notes = (f"without the {late} data sets of {final_from} or later",) if late and part == "development" else ()
    return task_sequence(
        place.stem, [read[entry["name"]] for entry in entries], split, epochs, batch_size, seed,
        crop_and_flip if augment else None, drop_last, notes,
    )  # fmt: skip


# The small sequence -----------------------------------------------------------------------------------------------------


def _some(samples: Samples, count: int, seed: int) -> Samples:
    """Return so many samples, or all, drawn at random."""
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
    return samples[rows.sort().values]


def _in_mode(x: Tensor, mode: str) -> Tensor:
    """Return grey images in a mode, 28 x 28 ones with a margin of zeros."""
    margin = (SIDE - x.shape[-1]) // 2
    x = F.pad(x, (margin,) * 4)
    return x.expand(-1, 3, -1, -1).contiguous() if mode == "RGB" else x


def _grey(name: str, year: int, images: int, mode: str, seed: int, root: str | Path | None) -> DataSet:
    """Return some of MNIST or Fashion-MNIST."""
    parts = [_some(part, count, derive(seed, name)) for part, count in zip(load(name, root), (images, images // 2), strict=True)]
    train, test = (Samples(_in_mode(part.x, mode), part.y) for part in parts)
    return DataSet(TaskKey(name, "label", year, tuple(map(str, range(10)))), train, test)


def _photos(images: int, mode: str, seed: int, root: str | Path | None, progress: bool) -> list[DataSet]:
    """Return the animals and the vehicles of CIFAR-10."""
    places = [data_root(root) / f"cifar10-jpeg{ending}" for ending in (".zip", "")]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise FileNotFoundError(
            f"there is no {places[0]}, nor a folder of that name: mini_nevis takes CIFAR-10 from it, a folder of images for each "
            "class in train and in test; or name the folder that has it with root=..., --data-root or CLSTREAM_DATA"
        )
    names, train, test = load_images(place, SIDE, mode, seed=seed, progress=progress, train_per_class=min(5000, images // 4))
    if lacking := {*ANIMALS, *VEHICLES} - {*names}:
        raise ValueError(f"{place} lacks the folders {sorted(lacking)}: it is not CIFAR-10")
    data = []
    for name, classes in (("cifar10_animals", ANIMALS), ("cifar10_vehicles", VEHICLES)):
        parts = []
        for part, count in ((train, images), (test, images // 2)):
            rows = [_some(part[part.y == names.index(label)], count // len(classes), derive(seed, label)) for label in classes]
            y = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(own) for own in rows]))
            parts.append(Samples(torch.cat([own.x for own in rows]), y))
        data.append(DataSet(TaskKey(name, "label", 2009, classes), *parts))
    return data


def _alphabets(chosen: tuple[str, ...], mode: str, root: str | Path | None, progress: bool) -> list[DataSet]:
    """Return alphabets of Omniglot, white on black."""
    names, train, test = load_omniglot("small", size=SIDE, root=root, progress=progress)
    data = []
    for alphabet in chosen:
        labels = [label for label, name in enumerate(names) if name.startswith(f"{alphabet}/")]
        parts = []
        for part in (train, test):
            own = part[(part.y >= labels[0]) & (part.y <= labels[-1])]  # classes are sorted by name
            parts.append(Samples(_in_mode(255 - own.x, mode), own.y - labels[0]))
        classes = tuple(names[label].split("/")[1] for label in labels)
        data.append(DataSet(TaskKey(f"omniglot_{alphabet.lower()}", "label", 2015, classes), *parts))
    return data


def _canvases(images: int, mode: str, seed: int, root: str | Path | None) -> DataSet:
    """Return canvases of Fashion-MNIST, of other images than the task of that name has."""
    parts = []
    for kind, part, count in zip(("train", "test"), load("FashionMNIST", root), (images, images // 2), strict=True):
        taken = torch.randperm(len(part), generator=torch.Generator().manual_seed(derive(seed, "FashionMNIST")))[:count]
        others = torch.ones(len(part), dtype=torch.bool)
        others[taken] = False
        drawn = draw_canvases(part[others], count, 10, derive(seed, "canvas", kind))
        x = F.interpolate(drawn.x.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        parts.append(Samples(_in_mode(x.round().clamp(0, 255).to(torch.uint8), mode), drawn.y, target="multilabel"))
    return DataSet(TaskKey("fashion_mnist_canvas", "multilabel", 2017, tuple(map(str, range(10)))), *parts)


# The user's own list ----------------------------------------------------------------------------------------------------


def _entries(file: Path) -> list[dict[str, Any]]:
    """Return the data sets that a list names. Raises FileNotFoundError, ValueError, in one sentence, for what is no list."""
    import yaml

    try:
        if file.stat().st_size > LARGEST_LIST:
            raise ValueError(f"{file} has more than {LARGEST_LIST:,} bytes: it is no list of data sets")
        content = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no list of data sets {file}: name a YAML file of folders, years and kinds") from None
    except OSError as error:
        raise OSError(f"the list of data sets {file} can't be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file} must be a list of data sets, as - {{folder: digits, year: 1998}}, not {content!r:.100}")
    entries = []
    for number, entry in enumerate(content):
        what = f"{file}: data set {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("folder"), str) or not entry["folder"]:
            raise ValueError(f"{what} must have a folder, as {{folder: digits, year: 1998}}, not {entry!r:.100}")
        if unknown := sorted(map(str, entry.keys() - {"folder", "year", "kind", "name"})):
            raise ValueError(f"{what} has {unknown[0]!r}, and takes folder, year, kind and name")
        whole: dict[str, Any] = {"kind": "label", "name": Path(entry["folder"]).name.removesuffix(".zip"), **entry}
        try:
            check_integer(0, 9999, year=whole.get("year"))
            check_choice(KINDS, kind=whole["kind"])
        except ValueError as error:
            raise ValueError(f"{what}, {entry['folder']}: {error}") from None
        if not isinstance(whole["name"], str) or not whole["name"]:
            raise ValueError(f"{what}, {entry['folder']}: its name must be text, not {whole['name']!r:.100}")
        if not (file.parent / entry["folder"]).exists():
            raise FileNotFoundError(f"{what}: there is no folder or zip archive {file.parent / entry['folder']}")
        entries.append(whole)
    for entry in entries:
        first = next(earlier for earlier in entries if earlier["name"] == entry["name"])
        if first["folder"] != entry["folder"] or first["kind"] != entry["kind"]:
            raise ValueError(f"{file}: two data sets are named {entry['name']!r}: give them names of their own")
    return entries


def _data_set(
    place: Path, entry: Mapping[str, Any], size: int, mode: str, seed: int, cache: str | Path | None, progress: bool
) -> DataSet:
    """Return a data set of the user's own."""
    if entry["kind"] == "multilabel":
        return _of_labels(place, entry, size, mode, cache, progress)
    options: dict[str, Any] = {"size": size, "mode": mode, "seed": seed, "cache": cache, "progress": progress}
    names, train, test = load_images(place, **options)
    validation = None
    if (place / "val").is_dir() and (place / "test").is_dir():
        own, *parts = load_images(place / "val", **options)
        if own != names:
            raise ValueError(f"{place / 'val'} must have the folders of classes that {place / 'train'} has")
        validation = Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    elif place.is_file() and {"val", "test"} <= {file.name.split("/")[0] for file in find_files(place)}:
        raise ValueError(f"{place} has a validation set, which is read of folders alone: unpack it")
    return DataSet(TaskKey(entry["name"], "label", entry["year"], names), train, test, validation)


def _of_labels(place: Path, entry: Mapping[str, Any], size: int, mode: str, cache: str | Path | None, progress: bool) -> DataSet:
    """Return a data set whose images have several labels each, as its labels.csv says."""
    classes, parts = load_labelled(place, size, mode, cache, progress)
    if "test" not in parts:
        raise ValueError(f"{place} needs images in its folders train and test")
    return DataSet(TaskKey(entry["name"], "multilabel", entry["year"], classes), parts["train"], parts["test"], parts.get("val"))
