"""Few-shot class-incremental learning: a base session with all samples of many classes, then sessions with a few of new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clstream.streams.augmentations import crop_and_flip
from clstream.streams.class_splits import are_groups
from clstream.streams.data import NAMES, data_root
from clstream.streams.drifting import few_shot
from clstream.streams.image_folder import by_class, load_images
from clstream.streams.omniglot import load_omniglot
from clstream.streams.options import Tasks, check_options
from clstream.streams.task_free import split_source

from clstream.params import check_bool, check_choice, check_integer, check_integers
from clstream.seeds import derive
from clstream.stream import DataSource, Stream, Subset

OMNIGLOT = "omniglot"
"""The name of both small sets of Omniglot: the 136 characters of the first set, then the 106 that only the second one has."""


def few_shot_tasks(
    data: str = "digits",
    tasks: Tasks = 5,
    shots: int = 5,
    after: int = 1,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    boundaries: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
    base: int | None = None,
    way: int | None = None,
    support: int | list[list[int]] | None = None,
    augment: bool = False,
) -> Stream:
    """Few-shot class-incremental learning: the first tasks have all of their samples, the others a few of each class.

    With `base` it is the field's protocol: a base session, then sessions of so many ways and shots, and the tests of all of them.

    Args:
        data: "digits", "MNIST" or another data set, see `clstream.streams.task_free`. "omniglot": both small sets of Omniglot, the
            136 characters of the first set and then the 106 that only the second one has, with 15 drawings to train on and 5 to
            test on. Else a folder or zip archive of images of one size, see `image_folder`.
        tasks: as in `from_tensors`. With `base` it is the number of sessions, the base session among them.
        shots: training samples of each class in the later tasks.
        after: how many tasks keep all of theirs.
        boundaries: whether strategies are told of tasks.
        seed: of the order of batches, of what validation holds back, and of which samples are left, unless `support` says that.
        root: the folder with the data, as in `split_mnist`.
        base: how many classes the base session has, the first ones of the order. None: `tasks` says which classes come when.
        way: new classes of each later session. None: those that the base session leaves, dealt out evenly. It goes with `base`.
        support: which samples the later tasks have. A number draws them, and nothing else, so that runs tell the spread over such
            draws from that over trainings. Or for each later task the positions of its samples in the data set's training samples,
            as published lists have them.
        augment: random crops (padding 4) and horizontal flips of images where samples are learned.
        epochs, batch_size, class_order, validation, drop_last: see `fuzzy_tasks`.

    Raises:
        ValueError: for more classes than there are, more shots than a class has samples, and lists of samples that don't fit; see
            also `from_tensors`.

    """
    check_options({name: value for name, value in locals().items() if name != "data"})
    check_integer(1, none=True, base=base, way=way)
    check_bool(augment=augment)
    if not isinstance(support, (list, tuple)):
        check_integer(0, none=True, support=support)

    def load(dealt: Tasks) -> Stream:
        if data in NAMES:
            return split_source("few_shot", data, root, dealt, epochs, batch_size, class_order, validation, seed)
        return named(data, root, dealt, class_order, epochs=epochs, batch_size=batch_size, validation=validation, seed=seed)

    if way is not None and base is None:
        raise ValueError("way is the number of new classes after a base session: say base too, the number of its classes")
    stream = load(tasks if base is None else sizes(len(load(1).tasks[0].classes), tasks, base, way))
    if support is None:
        few = few_shot(stream, shots, after, seed)
    elif isinstance(support, (list, tuple)):
        few = chosen(stream, support, shots, after, "by lists")
    else:
        few = chosen(stream, drawn(stream, support, shots, after), shots, after, f"draw {support}")
    return replace(few, boundaries=boundaries, drop_last=drop_last, augment=crop_and_flip if augment else None)


def named(data: str, root: str | Path | None, tasks: Tasks, class_order: int | list[int] | None, **options: Any) -> Stream:
    """Return a stream of classes that have names: Omniglot's characters, or a folder of images; `options` are `from_tensors`'."""
    facts: dict[str, Any]
    if data == OMNIGLOT:
        facts = {"background": "small", "rotations": False, "size": 28, "test_drawers": 5}
        names, train, test = load_omniglot("small", root=root)
        first = load_omniglot("small1", root=root)[0]
        order = [*first, *(name for name in names if name not in first)]
    else:
        place = Path(str(data)).expanduser()
        place = place if place.exists() else data_root(root) / place
        if not place.exists():
            try:
                check_choice((*NAMES, OMNIGLOT), data=data)
            except ValueError as error:
                raise ValueError(f"{error}; or a folder or zip archive of images, which is not there") from None
        facts = {"height": None, "width": None, "mode": "RGB", "test": 0.2, "seed": 0}
        names, train, test = load_images(place)
        order = list(names)
    if isinstance(class_order, int):
        shuffle = torch.randperm(len(order), generator=torch.Generator().manual_seed(class_order))
        order = [order[position] for position in shuffle.tolist()]
    elif class_order is not None:
        if sorted(class_order) != list(range(len(order))):
            raise ValueError(f"{data}: class_order must name each of the classes 0 to {len(order) - 1} once, not {class_order}")
        order = [order[position] for position in class_order]
    if are_groups(tasks):
        raise ValueError(f"{data}: tasks must be a number or sizes, as [6, 2, 2], for the classes have names")
    title = OMNIGLOT if data == OMNIGLOT else place.absolute().name.removesuffix(".zip")
    stream = by_class(f"few_shot_{title}", names, train, test, tasks, order, **options)
    return stream.with_source(DataSource({"train": train, "test": test}, OMNIGLOT if data == OMNIGLOT else "image_folder", facts))


def sizes(classes: int, tasks: Tasks, base: int, way: int | None) -> list[int]:
    """Return the number of classes of each session: the base session's, then `way` each, or what is left dealt out evenly."""
    if isinstance(tasks, (list, tuple)) or tasks < 2:
        raise ValueError(f"with base, tasks must be a number of sessions of at least 2, the base session among them, not {tasks}")
    later, left = tasks - 1, classes - base
    needed = later * (1 if way is None else way)
    if needed > left:
        raise ValueError(
            f"{later} later sessions need {needed} new classes, and {max(left, 0)} of {classes} are left after {base} in the base "
            "session: take fewer sessions, ways, or classes in the base"
        )
    if way is not None:
        return [base] + later * [way]
    return [base, *(left // later + (number < left % later) for number in range(later))]


def drawn(stream: Stream, number: int, shots: int, after: int) -> list[list[int]]:
    """Return for each later task the positions of so many samples of each class, drawn by a number alone."""
    few_shot(stream, shots, after)  # it refuses more shots than there are
    lists = []
    for task in stream.tasks[after:]:
        assert isinstance(task.train, Subset)  # as `from_tensors` makes them
        draw = torch.Generator().manual_seed(derive(number, "support", task.id))
        positions, order = task.train.index.sort()
        labels = task.train.y[order]
        pools = [positions[labels == label] for label in task.classes]
        lists.append([row for pool in pools for row in pool[torch.randperm(len(pool), generator=draw)[:shots]].tolist()])
    return lists


def chosen(stream: Stream, support: Sequence[Sequence[int]], shots: int, after: int, how: str) -> Stream:
    """Leave in each later task the samples whose positions in the data set's training samples are listed.

    Raises ValueError for lists that are not one for each later task, of so many samples of each of its classes.
    """
    later = stream.tasks[after:]
    if len(support) != len(later):
        raise ValueError(f"support must have a list of positions for each of {len(later)} later tasks, not {len(support)}")
    tasks = list(stream.tasks[:after])
    for number, (task, positions) in enumerate(zip(later, support, strict=True)):
        check_integers(0, **{f"support[{number}]": positions})
        assert isinstance(task.train, Subset)  # as `from_tensors` makes them
        place = {row: position for position, row in enumerate(task.train.index.tolist())}
        if outside := [row for row in positions if row not in place]:
            raise ValueError(f"support[{number}] has the position {outside[0]}, which is no training sample of task {task.id}")
        if len(set(positions)) < len(positions):
            raise ValueError(f"support[{number}] names a sample twice: each position may come once")
        few = task.train.take(torch.tensor([place[row] for row in sorted(positions)]))
        counts = Counter(few.y.tolist())
        if set(counts) != set(task.classes) or set(counts.values()) != {shots}:
            raise ValueError(
                f"support[{number}] must have {shots} samples of each of the {len(task.classes)} classes of task {task.id}, not "
                f"{[counts[label] for label in task.classes]}"
            )
        tasks.append(replace(task, train=few))
    return replace(stream, tasks=tasks, notes=(*stream.notes, f"few shots: {shots} a class {how}, from task {after} on"))
