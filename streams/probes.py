"""Ready probes: further test sets for a stream, beside those of its tasks. `Stream.with_probes` takes them.

    stream = split_mnist()
    stream = stream.with_probes(unknown(stream, "FashionMNIST"), corrupted(stream, "blur", 3))

As text: `unknown:fashion_mnist,corrupted:blur:3`, which `probes_from` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from clstream.streams.corruptions import KINDS, Corrupt, Fit, PixelNoise, check_corruptible
from clstream.streams.data import NAMES, TABLES, known_name, plain_name, source
from clstream.streams.omniglot import load_omniglot
from torch import Tensor

from clstream.params import check_choice, check_integer, check_integers
from clstream.seeds import derive
from clstream.stream import Samples, Stream, Subset, TestSet

OMNIGLOT = "omniglot"

MOST = 1000
"""Samples of another data set, unless told otherwise."""


def unknown(stream: Stream, data: str, most: int = MOST, seed: int = 0, root: str | Path | None = None) -> TestSet:
    """Return another data set's test samples, as "unknown/NAME": they are strange for good (`known=False`).

    They are brought to the stream's shape and dtype: grey or RGB, and scaled, as the card says.

    Args:
        stream: that they are asked about beside.
        data: "FashionMNIST" or "fashion_mnist", "digits", ...: as in `clstream.streams.data.NAMES`; or "omniglot", the drawings of
            `clstream.streams.omniglot("small")` that are for the test, as white ink on black.
        most: samples; of more, so many at random.
        seed: of which.
        root: the folder with the data, as in `split_mnist`.

    Raises ValueError for data that can't be brought to the stream's shape, or that is the stream's own.
    """
    check_integer(1, most=most)
    check_integer(0, seed=seed)
    name = known_name(data) if isinstance(data, str) else data
    check_choice((*NAMES, OMNIGLOT), data=name)
    if stream.data is not None and stream.data.loader == name:
        raise ValueError(f"{name} is the data of {stream.name}, so it is not unknown: see held_out_classes")
    other = _inverted(load_omniglot("small", root=root, progress=False)[2]) if name == OMNIGLOT else source(name, root)[1]
    like = stream.tasks[0].test[:1].x
    rows = _some(torch.arange(len(other)), most, seed)
    taken, note = Subset(other, rows), f"{name}, as it is" if name != OMNIGLOT else "omniglot, as white ink on black"
    if (other.x.shape[1:], other.x.dtype) != (like.shape[1:], like.dtype):
        shape, dtype = tuple(like.shape[1:]), str(like.dtype).removeprefix("torch.")
        if name in TABLES or len(shape) != 3 or shape[0] not in (1, 3) or dtype not in ("uint8", "float32"):
            raise ValueError(
                f"{name} has inputs of {tuple(other.x.shape[1:])} {other.x.dtype}, which can't be brought to those of "
                f"{stream.name}, {shape} {like.dtype}"
            )
        taken = Subset(other, rows, Fit(*shape, dtype)).cache()
        note = f"{name}, brought from {tuple(other.x.shape[1:])} {str(other.x.dtype).removeprefix('torch.')} to {shape} {dtype}"
    return TestSet(f"unknown/{plain_name(name)}", taken, known=False, note=note)


def _inverted(samples: Samples) -> Samples:
    """Return the negatives of images of bytes."""
    return Samples(255 - samples.x, samples.y)


def noise(stream: Stream, most: int = MOST, seed: int = 0) -> TestSet:
    """Return images of uniform noise, in the shape and dtype of the stream's, as "noise": strange for good.

    Args:
        stream: that they are asked about beside; it has images.
        most: how many, and no more than the first task has test samples.
        seed: of the noise.

    """
    check_integer(1, most=most)
    check_integer(0, seed=seed)
    test = stream.tasks[0].test
    part = test if isinstance(test, Subset) and test.transform is None else Subset(test[:], torch.arange(len(test)))
    try:
        check_corruptible(part[:1].x, "occlusion")
    except ValueError as error:
        raise ValueError(f"{stream.name}: {str(error).replace('occlusion', 'noise')}") from None
    taken = Subset(part.source, part.index[:most], PixelNoise(1.0, int(seed))).cache()
    return TestSet("noise", taken, known=False, note="every number uniform noise")


def corrupted(stream: Stream, kind: str, severity: int = 3, most: int | None = None, seed: int = 0) -> tuple[TestSet, ...]:
    """Return a corrupted copy of each task's test samples: "corrupted/blur_3/task_00" is asked about as "task_00" is.

    A copy is a task's own, so that it counts from when the task was taught, and questions with the task given are asked too.

    Args:
        stream: whose test samples.
        kind: "noise", "blur", "occlusion" or "contrast": see `clstream.streams.corruptions.Corrupt`, which has the numbers.
        severity: from 1 to 5.
        most: samples of a task; of more, so many at random. None: all.
        seed: of noise, of what is hidden, and of which samples are taken.

    """
    check_choice(KINDS, kind=kind)
    check_integer(1, 5, severity=severity)
    check_integer(1, none=True, most=most)
    check_integer(0, seed=seed)
    probes = []
    for task, own in zip(stream.tasks, stream.test_sets, strict=False):
        part, change = task.test, Corrupt(kind, int(severity), derive(seed, "corrupted", task.id))
        if isinstance(part, Samples):
            part = Subset(part, torch.arange(len(part)))
        elif part.transform is not None:  # a recording can name one transform, not two
            gathered = part[:]
            part = Subset(Samples(gathered.x, gathered.y, target=gathered.target), torch.arange(len(part)))
        try:
            check_corruptible(part[:].x, kind)
        except ValueError as error:
            raise ValueError(f"{stream.name}: {error}") from None
        rows = part.index if most is None else _some(part.index, most, derive(seed, "taken", task.id))
        taken = Subset(part.source, rows, change).cache()
        probes.append(
            TestSet(f"corrupted/{kind}_{severity}/{own.name}", taken, task.id, note=f"{kind} of severity {severity} of 5")
        )
    return tuple(probes)


def held_out_classes(stream: Stream, classes: Sequence[int] | None = None) -> TestSet:
    """Return test samples of classes that are strange, for good or until they are taught, as "held_out_classes".

    Args:
        stream: whose data.
        classes: of the stream: their test samples, each class strange until it is taught (`known="taught"`). None: the test samples
            of the stream's data that no task has, as of `split_mnist(tasks=[5, 1])`, strange for good.

    Raises ValueError for classes that the stream hasn't, or if its tasks have all of its data.
    """
    if classes is None:
        rows_of = [part for task in stream.tasks for part in (task.train, task.test, task.validation) if isinstance(part, Subset)]
        tested = {id(task.test.source.x) for task in stream.tasks if isinstance(task.test, Subset)}
        data_sets = [] if stream.data is None else list(stream.data.parts.values())
        data = next((part for part in data_sets if tested == {id(part.x)}), None)
        if data is None or not all(isinstance(task.test, Subset) for task in stream.tasks):
            raise ValueError(
                f"{stream.name} doesn't say which data its test samples are rows of: no class is known that no task has"
            )
        free = torch.ones(len(data), dtype=torch.bool)
        for part in rows_of:
            if part.source.x is data.x:
                free[part.index.cpu()] = False
        if data.target == "multilabel":
            free &= data.y.any(1)  # one without any object has no class that is held out
        if not bool(free.any()) or data.target == "value":
            raise ValueError(f"{stream.name}: its tasks have all classes of its data; tasks=[5, 1] leaves some out")
        rows = free.nonzero().flatten()
        left = sorted(set(data.y[rows].tolist())) if data.target == "label" else data.y[rows].any(0).nonzero().flatten().tolist()
        return TestSet("held_out_classes", Subset(data, rows), known=False, note=f"classes {_listed(left)}, which no task has")
    check_integers(0, classes=list(classes))
    if stream.targets != ("label",):
        raise ValueError(
            f"{stream.name} has {' and '.join(stream.targets)} targets: only classes of labels are strange until taught"
        )
    labels = {label for task in stream.tasks for label in task.classes}
    if not classes or not set(classes) <= labels:
        raise ValueError(f"{stream.name} has no classes {sorted(set(classes) - labels)}: it has {_listed(sorted(labels))}")
    own = torch.tensor(sorted(set(classes)))
    parts = [task.test[torch.isin(task.test.y, own.to(task.test[:1].y.device)).nonzero().flatten()] for task in stream.tasks]
    whole, *others = [part for part in parts if len(part)]
    for samples in others:
        whole = whole + samples
    name = "held_out_classes/" + "_".join(map(str, own.tolist()))
    return TestSet(name, whole, known="taught", note=f"classes {_listed(own.tolist())}, each strange until it is taught")


def _some(rows: Tensor, most: int, seed: int) -> Tensor:
    """Return at most so many of some rows, at random, in their order."""
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most].sort().values.to(rows.device)]


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:20])) + (" ..." if len(labels) > 20 else "")


FORMS = {
    "unknown": "unknown:DATA or unknown:DATA:MOST",
    "corrupted": "corrupted:KIND or corrupted:KIND:SEVERITY",
    "held_out_classes": "held_out_classes or held_out_classes:7+8",
    "noise": "noise or noise:MOST",
}
"""How each probe is written."""


def probes_from(stream: Stream, text: str | Iterable[str], root: str | Path | None = None) -> tuple[TestSet, ...]:
    """Return the probes that a text names, as "unknown:fashion_mnist,corrupted:blur:3,held_out_classes".

    Args:
        stream: that they are for.
        text: one or more, with commas between them, or a list; each is in one of `FORMS`.
        root: the folder with the data of `unknown`.

    Raises ValueError, in one sentence, for what names none.
    """
    names = text.split(",") if isinstance(text, str) else list(text)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"probes must be named by text, as {FORMS['unknown']}, not {text!r:.100}")
    probes: list[TestSet] = []
    for name in (name.strip() for name in names):
        kind, *options = name.split(":")
        check_choice(FORMS, probes=kind)
        try:
            named = _READ[kind](stream, options, root)
        except _FormError:
            raise ValueError(f"probes: {name!r} is not written as {FORMS[kind]}") from None
        except ValueError as error:
            raise ValueError(f"probes: {name}: {error}") from None
        probes += [named] if isinstance(named, TestSet) else named
    return tuple(probes)


class _FormError(Exception):
    """A probe is not written as its form says."""


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise _FormError
    return int(text)


def _first(options: list[str]) -> tuple[str, list[int]]:
    """Return a name, and the number that may follow it."""
    if not 1 <= len(options) <= 2 or "" in options:
        raise _FormError
    return options[0], [_number(option) for option in options[1:]]


def _unknown(stream: Stream, options: list[str], root: str | Path | None) -> TestSet:
    data, numbers = _first(options)
    return unknown(stream, data, numbers[0] if numbers else MOST, root=root)


def _corrupted(stream: Stream, options: list[str], root: str | Path | None) -> tuple[TestSet, ...]:  # noqa: ARG001  # as the others
    kind, numbers = _first(options)
    return corrupted(stream, kind, *numbers)


def _held_out(stream: Stream, options: list[str], root: str | Path | None) -> TestSet:  # noqa: ARG001  # as the others
    if len(options) > 1:
        raise _FormError
    return held_out_classes(stream, [_number(label) for option in options for label in option.split("+")] or None)


def _noise(stream: Stream, options: list[str], root: str | Path | None) -> TestSet:  # noqa: ARG001  # as the others
    if len(options) > 1:
        raise _FormError
    return noise(stream, *[_number(option) for option in options])


_READ: dict[str, Callable[[Stream, list[str], str | Path | None], TestSet | tuple[TestSet, ...]]] = {
    "unknown": _unknown, "corrupted": _corrupted, "held_out_classes": _held_out, "noise": _noise,
}  # fmt: skip
