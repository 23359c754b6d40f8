"""Omniglot: handwritten characters of many alphabets, each a class, drawn once by each of 20 people (Lake et al. 2015)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from clstream.streams.data import data_root
from clstream.streams.image_cache import ImageSet, cache_files, decode_all, key_of, load_cached
from clstream.streams.image_files import ImageFile, find_files
from clstream.streams.image_folder import MOST_SIDE, by_class
from clstream.streams.options import check_options

from clstream.params import check_bool, check_choice, check_integer
from clstream.stream import DataSource, Samples, Stream

FOLDER = "omniglot-py"
"""Where torchvision has it, in the folder of the data."""

SETS = {
    "background": ("images_background",),
    "evaluation": ("images_evaluation",),
    "all": ("images_background", "images_evaluation"),
    "small1": ("images_background_small1",),
    "small2": ("images_background_small2",),
    "small": ("images_background_small1", "images_background_small2"),
}
"""The folders, or the archives of that name and `.zip`, of each set."""

DRAWERS = 20
"""People who drew each character once."""

DRAWING = re.compile(r"(?:.*/)?([^/]+/character\d+)/\d+_(\d\d)\.png")
"""The path of a drawing: its alphabet and character, and the number of who drew it."""


def omniglot(
    background: bool | str = True,
    tasks: int | list[int] | list[list[int | str]] = 10,
    scenario: str = "class",
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int | str] | None = None,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    rotations: bool = False,
    size: int = 28,
    test_drawers: int = 5,
    root: str | Path | None = None,
    cache: str | Path | None = None,
    boundaries: bool = True,
    drop_last: bool = False,
    progress: bool = True,
) -> Stream:
    """Omniglot by character: each is a class, named alphabet/character; uint8, (1, 28, 28), black on white.

    A character has 20 drawings, one by each of 20 people. The last of them, by their numbers, are for the test: the same people for
    all characters of an alphabet.

    Args:
        background: True for the 30 alphabets of the background set (964 characters), False for the 20 of the evaluation set (659);
            or "background", "evaluation", "all" (both), "small1", "small2" (the small background sets of 5 alphabets each) or
            "small" (both of these: 8 alphabets, 242 characters).
        tasks, class_order: see `from_tensors`; classes are named as "Greek/character01".
        scenario, epochs, batch_size, sessions_per_task, validation, boundaries, drop_last: see `from_tensors`.
        rotations: whether each character turned by 90, 180 and 270 degrees is a class too, as "Greek/character01/turned090"
            beside it: four times as many classes.
        size: the side of the images, in pixels; the drawings have 105.
        test_drawers: how many of the 20 drawings of a character are for the test.
        root: as in `split_mnist`; the data is in its folder `omniglot-py`, as folders or as zip archives. The background and the
            evaluation set are downloaded by torchvision if they are not there.
        cache: see `image_folder`.
        progress: whether to show a bar while images are decoded, in a terminal.

    Raises:
        FileNotFoundError: if the data is not there and can't be downloaded; it says which files, where, and how.
        ValueError: naming the file, for one that is not as it should be.

    """
    check_options(locals() | {"class_order": None if isinstance(class_order, (list, tuple)) else class_order})
    check_drawings(background, rotations, size, test_drawers)
    names, train, test = load_omniglot(background, rotations, size, test_drawers, root, cache, progress)
    stream = by_class(
        "omniglot", names, train, test, tasks, class_order, scenario=scenario, epochs=epochs, batch_size=batch_size,
        sessions_per_task=sessions_per_task, validation=validation, boundaries=boundaries, drop_last=drop_last,
    )  # fmt: skip
    options = {"background": background, "rotations": rotations, "size": size, "test_drawers": test_drawers}
    return stream.with_source(DataSource({"train": train, "test": test}, "omniglot", options))


def check_drawings(background: object, rotations: object, size: object, test_drawers: object) -> None:
    """Raise ValueError, in one sentence, for options that are not what they must be."""
    if not isinstance(background, bool):
        try:
            check_choice(SETS, background=background)
        except ValueError as error:
            raise ValueError(str(error).replace("one of", "True, False or one of")) from None
    check_bool(rotations=rotations)
    check_integer(1, MOST_SIDE, size=size)
    check_integer(1, DRAWERS - 1, test_drawers=test_drawers)


def load_omniglot(
    background: bool | str = True,
    rotations: bool = False,
    size: int = 28,
    test_drawers: int = 5,
    root: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[tuple[str, ...], Samples, Samples]:
    """Return class names, drawings to train on and drawings to test on, sorted by class: see `omniglot`."""
    chosen = background if isinstance(background, str) else "background" if background else "evaluation"
    names: list[str] = []
    parts: tuple[list[Samples], list[Samples]] = ([], [])
    for folder in SETS[chosen]:
        own, *both = _load(_place(data_root(root), folder), size, test_drawers, cache, progress)
        new = torch.tensor([name not in names for name in own])  # the small sets share two alphabets
        number = len(names) + new.cumsum(0) - 1
        for part, samples in zip(parts, both, strict=True):
            rows = new[samples.y]
            part.append(Samples(samples.x[rows], number[samples.y[rows]]))
        names += [name for name, is_new in zip(own, new.tolist(), strict=True) if is_new]
    if rotations:
        turned = [f"{name}/turned{90 * turns:03}" for turns in (1, 2, 3) for name in names]
        for part in parts:
            upright = list(part)
            for turns in (1, 2, 3):
                part += [Samples(samples.x.rot90(turns, (2, 3)), samples.y + turns * len(names)) for samples in upright]
        names += turned
    order = sorted(range(len(names)), key=names.__getitem__)
    place = torch.empty(len(names), dtype=torch.int64)
    place[order] = torch.arange(len(names))
    return tuple(names[label] for label in order), _sorted(parts[0], place), _sorted(parts[1], place)


def _sorted(parts: Sequence[Samples], place: torch.Tensor) -> Samples:
    """Join samples, and sort them by their new labels."""
    y = place[torch.cat([part.y for part in parts])]
    rows = y.argsort(stable=True)
    return Samples(torch.cat([part.x for part in parts])[rows].contiguous(), y[rows])


def _place(root: Path, folder: str) -> Path:
    """Return the folder or archive of a set, which torchvision downloads if it can; see `omniglot` for what is raised."""
    places = [root / FOLDER / folder, root / FOLDER / f"{folder}.zip"]
    why = "clstream downloads only images_background and images_evaluation"
    if not any(place.exists() for place in places) and "small" not in folder:
        from torchvision.datasets import Omniglot

        try:
            root.mkdir(parents=True, exist_ok=True)
            Omniglot(str(root), background=folder == "images_background", download=True)
        except (OSError, RuntimeError) as error:
            why = f"it could not be downloaded: {' '.join(str(error).split())}"
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{folder} of Omniglot is not in {root / FOLDER} ({why}). Put {folder}.zip there, from github.com/brendenlake/omniglot, or "
        "name the folder that has omniglot-py with --data-root, root=... or the environment variable CLSTREAM_DATA"
    )


def _load(
    place: Path, size: int, test_drawers: int, cache: str | Path | None, progress: bool
) -> tuple[tuple[str, ...], Samples, Samples]:
    """Return the characters of one set, decoded once."""
    found = find_files(place)
    facts = [(file.name, file.size, file.changed) for file in found]
    files = cache_files(place, cache, f"{key_of('omniglot', facts, size, int(test_drawers))}.images")
    cached = load_cached(files)
    if cached is None:
        images = _by_character(place, found, test_drawers)
        cached = load_cached([decode_all(place, images, "L", (size, size), files, f"decoding {place.name}", progress)])
        assert cached is not None
    return cached


def _by_character(place: Path, found: Sequence[ImageFile], test_drawers: int) -> ImageSet:
    """Sort drawings by character, and by who drew them. Raises ValueError for a file that is none, and for missing ones."""
    drawings: dict[str, dict[int, ImageFile]] = defaultdict(dict)
    for file in found:
        if file.name.endswith("/"):
            continue
        match = DRAWING.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{place / file.name} is no drawing of Omniglot, as Greek/character01/0394_01.png: remove it")
        drawings[match[1]][int(match[2])] = file
    for name, own in drawings.items():
        if sorted(own) != list(range(1, DRAWERS + 1)):
            raise ValueError(f"{place}: {name} must have the {DRAWERS} drawings _01 to _{DRAWERS}, and has {len(own)} others")
    if len(drawings) < 2:
        raise ValueError(f"{place} has no characters of Omniglot: there must be folders as Greek/character01 in it")
    names = tuple(sorted(drawings))
    cut = DRAWERS - test_drawers
    by_drawer = [[file for _, file in sorted(drawings[name].items())] for name in names]
    return ImageSet(names, [own[:cut] for own in by_drawer], [own[cut:] for own in by_drawer])
