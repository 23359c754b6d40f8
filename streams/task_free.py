"""Task-free streams: real data whose classes or domains come, go and mix without a word, by `drifting`.

`data` is "digits", "breast_cancer" or "wine" (scikit-learn's, no download), "MNIST", "FashionMNIST", "CIFAR10" or "CIFAR100". For
data of one's own: `drifting(from_tensors(...), a schedule)`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from clstream.streams.data import source
from clstream.streams.drifting import at_moments, drifting
from clstream.streams.options import Tasks, check_options
from clstream.streams.schedules import Blurry, Gaussian, LabelShift, Transitions
from clstream.streams.tensors import from_tensors
from torch import Tensor

from clstream.params import check_integer, check_integers
from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream, Subset, Task


def fuzzy_tasks(
    data: str = "digits",
    tasks: Tasks = 5,
    width: float = 0.5,
    sessions: int | None = None,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Fuzzy boundaries: each task fades linearly into the next one; each sample comes once.

    Args:
        data: "digits", "MNIST" or another data set; see `clstream.streams.task_free`.
        tasks, class_order, validation: see `from_tensors`.
        width: of a transition, as a share of a task's time: 0 is sharp, and at 1 no task is ever alone.
        sessions: how many; the samples are delivered in so many spans of time. None: four for each task's turn, or 20 if fuzzy.
        epochs: passes over a session.
        batch_size: samples of a step.
        straddle: sessions of equal size, whatever boundary falls within one; if not, of equal time.
        delay: how late labels come on average, in sessions; see `drifting`.
        shuffle: whether each pass over a session has an order of its own; if not, samples come in the order of the drift.
        seed: of which samples come when.
        root: the folder with the data, as in `split_mnist`.
        drop_last: whether each pass leaves out the last batch if it is not full.

    """
    check_options(locals(), "sessions")
    stream = split_source("fuzzy", data, root, tasks, epochs, batch_size, class_order, validation, seed)
    return drifting(stream, Transitions(width), sessions, None, straddle, delay, shuffle, seed, drop_last=drop_last)


def recurring_tasks(
    data: str = "digits",
    order: tuple[int, ...] = (0, 1, 2, 1, 3),
    width: float = 0.0,
    sessions: int | None = None,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Tasks that come again, their samples dealt out over their visits; boundaries are hidden, and sharp or fuzzy.

    With `from_tensors(..., schedule=...)` such a stream can also show its boundaries.

    Args:
        order: the tasks in the order in which they come, as [0,1,2,1,3]; the classes are dealt to as many tasks as it names.
        data, width, sessions, epochs, batch_size, class_order, validation, straddle, delay, shuffle, seed, root,
            drop_last: see `fuzzy_tasks`.

    """
    check_options(locals(), "sessions")
    check_integers(0, order=order)
    stream = split_source("recurring", data, root, 1 + max(order, default=0), epochs, batch_size, class_order, validation, seed)
    return drifting(stream, Transitions(width, tuple(order)), sessions, None, straddle, delay, shuffle, seed, drop_last=drop_last)


def blurry_tasks(
    data: str = "digits",
    tasks: Tasks = 5,
    disjoint: float = 0.5,
    blur: float = 0.1,
    sessions: int | None = None,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    straddle: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Blurry(n, m): n of each task's classes are disjoint, and m of the samples of the others are spread over all tasks' time.

    The setting i-Blurry-N-M of Koh et al. 2022. Each sample comes once.

    Args:
        disjoint: share of each task's classes that come in its time only (N), rounded to whole classes.
        blur: share of the samples of the other classes that is spread evenly over the stream (M).
        data, tasks, sessions, epochs, batch_size, class_order, validation, straddle, shuffle, seed, root,
            drop_last: see `fuzzy_tasks`.

    """
    check_options(locals(), "sessions")
    stream = split_source("blurry", data, root, tasks, epochs, batch_size, class_order, validation, seed)
    draw = torch.Generator().manual_seed(derive(seed, "disjoint"))
    blurry = []
    for task in stream.tasks:
        order = torch.randperm(len(task.classes), generator=draw).tolist()
        blurry += [task.classes[place] for place in order[round(disjoint * len(order)) :]]
    return drifting(stream, Blurry(tuple(sorted(blurry)), blur), sessions, None, straddle, 0.0, shuffle, seed, drop_last=drop_last)


def si_blurry(
    data: str = "digits",
    tasks: int = 5,
    disjoint: float = 0.5,
    blur: float = 0.1,
    sessions: int | None = None,
    epochs: int = 1,
    batch_size: int = 10,
    straddle: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Si-Blurry (Moon et al. 2023): as `blurry_tasks`, but chance says how many classes and blurred samples each task has.

    Form implemented: the classes are shuffled, and a share of them is disjoint. These are cut into as many pieces as there are
    tasks, at random places; the others are dealt out evenly, so every task has one of them. The share `blur` of the samples of
    the latter is spread over the tasks' times in random proportions. Each sample comes once.

    Args:
        disjoint: share of all classes that come in their task's time only.
        blur: share of the samples of the other classes that is spread.
        seed: of all that is said to be random here, and of which samples come when.
        data, tasks, sessions, epochs, batch_size, straddle, shuffle, root, drop_last: see `fuzzy_tasks`.

    """
    check_options(locals(), "sessions")
    check_integer(1, tasks=tasks)
    train, test = source(data, root)
    labels = train.y.unique()
    draw = torch.Generator().manual_seed(derive(seed, "si-blurry"))
    labels = labels[torch.randperm(len(labels), generator=draw)]
    first = round(disjoint * len(labels))
    if not 1 <= tasks <= len(labels) - first:
        raise ValueError(
            f"si_blurry: {len(labels) - first} of the {len(labels)} classes of {data} are not disjoint, which must be enough for "
            f"one in each of {tasks} tasks: take fewer tasks, or a smaller share of disjoint ones"
        )
    cuts = torch.randint(0, first + 1, (tasks - 1,), generator=draw).sort().values
    alone, blurred = torch.tensor_split(labels[:first], cuts), torch.tensor_split(labels[first:], tasks)
    gaps = torch.cat([torch.zeros(1), torch.rand(tasks - 1, generator=draw).sort().values, torch.ones(1)]).double().diff()
    built = []
    for number in range(tasks):
        own = torch.cat([alone[number], blurred[number]])
        rows, test_rows = (torch.isin(part.y, own).nonzero().flatten() for part in (train, test))
        built.append(Task(number, tuple(own.tolist()), Subset(train, rows), Subset(test, test_rows)))
    stream = Stream(_named("si_blurry", data), built, None, epochs, batch_size, seed=seed, data=_data(data, train, test))
    schedule = Blurry(tuple(sorted(labels[first:].tolist())), blur, tuple(round(gap, 4) for gap in gaps.tolist()))
    return drifting(stream, schedule, sessions, None, straddle, 0.0, shuffle, seed, drop_last=drop_last)


def gaussian_schedule(
    data: str = "digits",
    tasks: int = 5,
    width: float = 1.0,
    sessions: int = 50,
    session_size: int = 100,
    epochs: int = 1,
    batch_size: int = 10,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """A Gaussian schedule over the classes (Shanahan et al. 2021): each class has its peak, and they come and go one by one.

    Samples are drawn at random with replacement: a class by its weight, then any of its training samples.

    Args:
        tasks: groups of classes that are tested together. Peaks are in the order of tasks, and by label within one.
        width: standard deviation of a class's peak, in distances from one peak to the next.
        session_size: samples of a session.
        data, sessions, epochs, batch_size, class_order, validation, straddle, delay, shuffle, seed, root,
            drop_last: see `fuzzy_tasks`.

    """
    check_options(locals())
    stream = split_source("gaussian", data, root, tasks, epochs, batch_size, class_order, validation, seed)
    return drifting(stream, Gaussian(width), sessions, session_size, straddle, delay, shuffle, seed, drop_last=drop_last)


def label_shift(
    data: str = "digits",
    ratio: float = 20.0,
    sessions: int = 20,
    session_size: int = 100,
    epochs: int = 1,
    batch_size: int = 10,
    validation: float = 0.0,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Label shift: which classes are likely changes over time, from the first ones to the last ones; what they look like doesn't.

    Samples are drawn at random with replacement. Each class is a task, to see its accuracy.

    Args:
        ratio: how much likelier the first class is than the last one at the begin, and the last one than the first at the end.
        session_size: samples of a session.
        data, sessions, epochs, batch_size, validation, straddle, delay, shuffle, seed, root, drop_last: see `fuzzy_tasks`.

    """
    check_options(locals())
    stream = split_source("label_shift", data, root, None, epochs, batch_size, None, validation, seed)
    return drifting(stream, LabelShift(ratio), sessions, session_size, straddle, delay, shuffle, seed, drop_last=drop_last)


def feature_drift(
    data: str = "breast_cancer",
    feature: int | None = 0,
    softness: float = 0.1,
    tasks: int = 5,
    sessions: int = 20,
    epochs: int = 1,
    batch_size: int = 10,
    straddle: bool = True,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Covariate drift made of real data: samples come soft-sorted by a feature, the small values first; each comes once.

    The drift is made here; the data has none of its own. A task is a range of the feature, with as many training samples as the
    others: a domain of the same classes.

    Args:
        feature: number of the input, of the flattened ones where they are images, from 0. None: the mean of them all, as of
            brightness.
        softness: 0 sorts strictly, 1 shuffles: a sample's moment is (1 - softness) times its rank plus softness times chance.
        tasks: how many ranges.
        data, sessions, epochs, batch_size, straddle, delay, shuffle, seed, root, drop_last: see `fuzzy_tasks`.

    """
    check_options(locals(), "feature")
    check_integer(1, tasks=tasks)
    train, test = source(data, root)
    return sorted_by(train, test, _named("feature_drift", data), feature, softness, tasks, sessions, epochs, batch_size, straddle,
                     delay, shuffle, seed, drop_last).with_source(_data(data, train, test))  # fmt: skip


def sorted_by(
    train: Samples,
    test: Samples,
    name: str = "feature_drift",
    feature: int | None = 0,
    softness: float = 0.1,
    tasks: int = 5,
    sessions: int = 20,
    epochs: int = 1,
    batch_size: int = 10,
    straddle: bool = True,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
) -> Stream:
    """Soft-sort samples of one's own by a feature: see `feature_drift`.

    Args:
        train, test: the samples.
        name: how tables and MLflow call the stream.
        feature, softness, tasks, sessions, epochs, batch_size, straddle, delay, shuffle, seed, drop_last: see `feature_drift`.

    """
    check_options(locals(), "feature")
    check_integer(1, tasks=tasks)
    values, test_values = (_feature(name, part, feature) for part in (train, test))
    if not bool(torch.cat([values, test_values]).isfinite().all()):
        raise ValueError(f"{name}: the feature that samples are sorted by must be finite")
    rank = torch.empty_like(values)
    rank[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype)  # ties in the order of the data
    if not 1 <= tasks <= len(values):
        raise ValueError(f"{name}: there can be 1 to {len(values)} tasks, not {tasks}")
    group = (rank * tasks / len(values)).long()
    bounds = torch.stack([values[group == number].max() for number in range(tasks - 1)]) if tasks > 1 else values[:0]
    test_group = torch.bucketize(test_values, bounds)
    if train.target == "multilabel":
        raise ValueError(f"{name}: a range of a feature is a domain of all classes, which multi-label targets can't have")
    classes, built, rows = tuple(train.y.unique().tolist()) if train.target == "label" else (), [], []
    for number in range(tasks):
        rows.append((group == number).nonzero().flatten())
        test_rows = (test_group == number).nonzero().flatten()
        if not len(test_rows):
            raise ValueError(f"{name}: no test sample is in range {number} of {tasks} of the feature: take fewer tasks")
        built.append(Task(number, classes, Subset(train, rows[-1]), Subset(test, test_rows)))
    stream = Stream(name, built, None, epochs, batch_size, "domain", seed=seed, data=DataSource({"train": train, "test": test}))
    chance = torch.rand(len(values), generator=torch.Generator().manual_seed(derive(seed, "softness")), dtype=torch.float64)
    moments = ((1 - softness) * rank / len(values) + softness * chance)[torch.cat(rows)]
    what = f"sorted by {'the mean of the inputs' if feature is None else f'input {feature}'}, softness {softness:g}"
    return at_moments(stream, moments, what, sessions, straddle, delay, shuffle, seed, drop_last)


def _named(kind: str, data: str) -> str:
    return f"{kind}_{data.lower()}"


def _data(data: str, train: Samples, test: Samples) -> DataSource:
    return DataSource({"train": train, "test": test}, data)


def split_source(
    kind: str,
    data: str,
    root: str | Path | None,
    tasks: Tasks | None,
    epochs: int,
    batch_size: int,
    class_order: int | list[int] | None,
    validation: float,
    seed: int,
) -> Stream:
    """Return a data set split by class; None: a task for each class."""
    train, test = source(data, root)
    stream = from_tensors(
        train.x, train.y, test.x, test.y, name=_named(kind, data), epochs=epochs, batch_size=batch_size, class_order=class_order,
        tasks=len(train.y.unique()) if tasks is None else tasks, validation=validation, seed=seed,
    )  # fmt: skip
    return stream.with_source(_data(data, train, test))


def _feature(name: str, samples: Samples, feature: int | None) -> Tensor:
    """Return the value of a feature of each sample: (n,), float64."""
    flat = samples.x.flatten(1)
    if feature is not None and not 0 <= feature < flat.shape[1]:
        raise ValueError(f"{name}: feature must be an input from 0 to {flat.shape[1] - 1}, or None for the mean, not {feature}")
    return flat.mean(1, dtype=torch.float64) if feature is None else flat[:, feature].double()
