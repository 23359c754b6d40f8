"""Benchmarks of Avalanche 0.6.0 as streams: read once into tensors, then played without Avalanche.

    from_avalanche(SplitMNIST(5, seed=1))                                   any scenario that is at hand
    clstream run --stream avalanche:SplitMNIST --stream.n_experiences 5     one of Avalanche's classic benchmarks by name

Avalanche's words and ours: an *experience* of the training stream is a session. What it is tested on makes the task: experience i
of the training stream and experience i of the test stream are task i. Where there are more training than test experiences (an
online split), those that were cut from one experience, or whose labels are those of one test experience, are sessions of one task;
sessions that mix tasks make a stream without boundaries. A single test experience for all of them (a complete test set) tests each
task on its classes.

Inputs are what Avalanche's data sets give in their groups "train" and "eval". What is random in a transform becomes the stream's
`augment`, see `clstream.streams.avalanche.transforms`. Task labels that differ from experience to experience make a stream
task-incremental.
Avalanche is imported when one of these functions is called, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from clstream.streams.avalanche.experiences import Experiences, read_experiences
from clstream.streams.options import check_options
from torch import Tensor

from clstream.avalanche.imports import import_avalanche
from clstream.stream import DataSource, Samples, Stream, Subset, Task, content_hash


@dataclass(frozen=True, eq=False, repr=False)
class ExperienceSchedule:
    """A schedule of experiences, where several belong to a task; see `MixedSchedule`.

    Args:
        numbers: (n,), int64: training samples, numbered over all tasks, one experience after the other.
        ends: for each experience, where it ends.

    """

    numbers: Tensor
    ends: tuple[int, ...]

    @property
    def once(self) -> bool:
        """Whether a sample comes in one experience at most: the data that was read is."""
        return True

    def __repr__(self) -> str:
        return f"{len(self)} experiences of an Avalanche benchmark, {content_hash(self.numbers).hex()[:16]}"

    def __len__(self) -> int:
        return len(self.ends)

    def draw(self, session: int) -> Tensor:
        """Return what a session delivers: see `MixedSchedule`."""
        return self.numbers[self.ends[session - 1] if session else 0 : self.ends[session]]


def from_avalanche(
    benchmark: Any,
    name: str = "avalanche",
    epochs: int = 1,
    batch_size: int = 32,
    scenario: str | None = None,
    train: str | None = None,
    test: str = "test",
    validation: str | None = "valid",
    boundaries: bool | None = None,
    shuffle: bool = True,
    augment: Callable[[Tensor], Tensor] | None = None,
    lazy: bool = False,
    memory_map: str | Path | None = None,
    workers: int = 0,
    progress: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Read a benchmark of Avalanche, once, into a stream.

    Args:
        benchmark: a `CLScenario`: classic, from `nc_benchmark`, `benchmark_from_datasets`, with online streams, ...
        name: how tables and MLflow call the stream.
        epochs: passes over a session, Avalanche's `train_epochs`.
        batch_size: samples of a step, Avalanche's `train_mb_size`.
        scenario: "class", "task" or "domain". None: "task" if experiences have task labels of their own, "domain" if all tasks have
            the same classes, else "class".
        train: the benchmark's stream to learn. None: "train", or the only one whose name begins so.
        test: the one to test on; `with_test` makes a stream that is tested on another one.
        validation: the one to hold back as `task.validation`, if the benchmark has it.
        boundaries: whether strategies are told of tasks. None: unless experiences mix tasks, or are of an online stream that hides
            them.
        shuffle: whether each pass over a session has an order of its own.
        augment: a batched function of inputs, for a benchmark without random transforms.
        lazy: whether random transforms that don't act on whole batches are done sample by sample, at every step: slow.
        memory_map: a folder for the inputs of data larger than memory.
        workers: processes that read.
        progress: whether to show a bar, in a terminal.
        drop_last: whether each pass leaves out the last batch if it is not full.

    Returns:
        The stream, inputs as the benchmark gives them: uint8 if they are, else float32.

    Raises:
        TypeError: for what is no benchmark, or data that are no inputs with labels.
        ValueError: for streams that it hasn't, experiences that can't be told apart, and random transforms that don't act on whole
            batches, unless `lazy`.
        ImportError: if Avalanche is not there.

    """
    options = {name: value for name, value in locals().items() if name != "validation"}  # that is a stream's name here
    check_options(options, "scenario", "boundaries")
    streams = streams_by_name(benchmark)
    train = training_stream_name(streams, train)
    folder = None if memory_map is None else Path(memory_map)

    def taken(which: str, group: str) -> tuple[Experiences, Callable[[Tensor], Tensor] | None]:
        file = None if folder is None else folder / f"{which}.raw"
        return read_experiences(streams[which], f"{name}: {which}", group, lazy, file, workers, progress)

    if test not in streams:
        raise ValueError(f"{name}: the benchmark has no stream {test!r} to test on{suggestion(test, list(streams))}")
    if validation not in (None, "valid", *streams):
        raise ValueError(f"{name}: there is no stream {validation!r} to validate on{suggestion(str(validation), list(streams))}")
    if augment is not None and not callable(augment):
        raise TypeError(f"{name}: augment must be a function of a batch of inputs, not {augment!r}")
    training, random_transforms = taken(train, "train")
    if augment is not None and random_transforms is not None:
        raise ValueError(f"{name}: the benchmark has random transforms already: build it without them, or leave augment out")
    testing, _ = taken(test, "eval")
    held_out = taken(validation, "eval")[0] if validation in streams and validation is not None else None
    numbers = assign_tasks(name, training, testing)
    pure = all(len(labels.unique()) == 1 for labels in numbers)
    show_tasks = boundaries if boundaries is not None else pure and training.shown
    tasks, schedule = build_tasks(name, training, testing, held_out, numbers, show_tasks)
    own = {int(label) for labels in training.labels for label in labels.unique()}
    one_each = all(len(labels.unique()) == 1 for labels in training.labels)
    if scenario is None:
        alike = len(tasks) > 1 and len({frozenset(task.classes) for task in tasks}) == 1
        scenario = "task" if show_tasks and one_each and len(own) > 1 else "domain" if alike else "class"
    notes = [f"from Avalanche: {len(training)} experiences to train on, tested on {test!r}"]
    if rest := sorted(set(streams) - {train, test, validation}):
        notes.append(f"the benchmark also has {', '.join(map(repr, rest))}: with_test(stream, benchmark, {rest[0]!r}) tests on it")
    if scenario == "task" and sum(len(task.classes) for task in tasks) > len({c for task in tasks for c in task.classes}):
        notes.append("its tasks share labels: strategies of clstream learn them with the same outputs")
    parts = {train: training.samples, test: testing.samples} | (
        {} if held_out is None or validation is None else {validation: held_out.samples}
    )
    return Stream(
        name, tasks, schedule, epochs, batch_size, scenario, boundaries=show_tasks, augment=random_transforms or augment,
        resident=folder is None, notes=tuple(notes), data=DataSource(parts), shuffle=shuffle, drop_last=drop_last,
    )  # fmt: skip


def with_test(stream: Stream, benchmark: Any, test: str, workers: int = 0, progress: bool = True) -> Stream:
    """Return a stream of `from_avalanche` that is tested on another stream of its benchmark, without reading the rest again.

    `clstream.evaluation.evaluate(strategy, with_test(...))` asks a strategy after a run.

    Raises ValueError for a stream that the benchmark hasn't, or that has neither one experience nor one for each task.
    """
    streams = streams_by_name(benchmark)
    if test not in streams:
        raise ValueError(f"{stream.name}: the benchmark has no stream {test!r} to test on{suggestion(test, list(streams))}")
    testing, _ = read_experiences(streams[test], f"{stream.name}: {test}", "eval", False, None, workers, progress)
    if len(testing) not in (1, len(stream.tasks)):
        raise ValueError(f"{stream.name}: {test!r} has {len(testing)} experiences for {len(stream.tasks)} tasks: one each, or one")
    tasks = []
    for task in stream.tasks:
        taught = set(task.classes)
        add_labels = "task_label" in task.test[:1].extra
        subset = Subset(with_task_labels(testing, add_labels), subset_to_test(stream.name, testing, task.id, taught).index)
        tasks.append(replace(task, test=subset, classes=tuple(sorted(taught | set(subset.y.unique().tolist())))))
    return replace(stream, name=f"{stream.name} ({test})", tasks=tasks)


def streams_by_name(benchmark: Any) -> dict[str, Any]:
    """Return a benchmark's streams by name. Raises TypeError for what is none."""
    import_avalanche("benchmarks")
    streams: Any = getattr(benchmark, "streams", None)
    if isinstance(benchmark, type) or not hasattr(streams, "items"):
        raise TypeError(f"from_avalanche takes a benchmark of Avalanche, such as SplitMNIST(5), not {type(benchmark).__name__}")
    return dict(streams.items())


def training_stream_name(streams: dict[str, Any], name: str | None) -> str:
    """Return the name of the stream to learn: `name`, or the only one that begins with "train"."""
    names = [candidate for candidate in streams if candidate == name or (name is None and candidate.startswith("train"))]
    if name is None and "train" in names:
        return "train"
    if len(names) != 1:
        wanted = "one whose name begins with 'train'" if name is None else f"{name!r}"
        raise ValueError(f"the benchmark has the streams {', '.join(map(repr, streams))}, not {wanted}: name it, train=...")
    return names[0]


def assign_tasks(name: str, training: Experiences, testing: Experiences) -> list[Tensor]:
    """Return the task of each training sample, for each training experience.

    Raises ValueError where it can't be told.
    """

    def whole(number: int, task: int) -> Tensor:
        return torch.full((len(training.rows(number)),), task)

    experiences = range(len(training))
    if all(origin is not None for origin in training.origins):
        places = [int(origin.current_experience) for origin in training.origins]  # in the stream that they were cut from
        if len(testing) == 1 or max(places) < len(testing):
            order = sorted(set(places)) if len(testing) == 1 else list(range(len(testing)))
            return [whole(number, order.index(places[number])) for number in experiences]
    elif len(testing) in (1, len(training)):
        return [whole(number, number) for number in experiences]
    groups = [testing.classes(number) for number in range(len(testing))]
    shared = sorted(label for group in groups for label in group)
    if len(set(shared)) < len(shared):
        raise ValueError(
            f"{name}: it can't be told which of {len(training)} training experiences belongs to which of {len(testing)} to test "
            "on, since these share classes: give the benchmark a test experience for each, or one for all"
        )
    owner = torch.full((1 + max(shared),), -1)
    for task, group in enumerate(groups):
        owner[list(group)] = task
    result = []
    for number in experiences:
        labels = training.samples.y[training.rows(number)]
        if int(labels.max()) >= len(owner) or int(owner[labels].min()) < 0:
            raise ValueError(f"{name}: training experience {number} has classes that no test experience has")
        result.append(owner[labels])
    return result


def build_tasks(
    name: str,
    training: Experiences,
    testing: Experiences,
    held_out: Experiences | None,
    numbers: list[Tensor],
    show_tasks: bool,
) -> tuple[list[Task], ExperienceSchedule | None]:
    """Return the tasks and, unless each is one experience after the other, the schedule of the experiences."""
    of = torch.cat(numbers)
    count = 1 + int(of.max()) if len(testing) == 1 else len(testing)
    if held_out is not None and len(held_out) not in (1, count):
        raise ValueError(
            f"{name}: {len(held_out)} experiences to validate on don't go with {count} tasks: one each, or one for all"
        )
    add_labels = show_tasks and _labels_differ_from_tasks(training, of)  # where tasks are hidden, their labels are too
    labels, tasks = torch.cat(training.labels), []
    for task in range(count):
        rows = (of == task).nonzero().flatten()
        if not len(rows):
            raise ValueError(f"{name}: nothing to train on belongs to test experience {task}: leave it out of the benchmark")
        taught = set(training.samples.y[rows].unique().tolist())
        test = subset_to_test(name, testing, task, taught)
        if not taught & set(test.y.unique().tolist()):
            raise ValueError(f"{name}: test experience {task} has none of the classes of training experience {task}")
        if add_labels and set(labels[rows].tolist()) != set(torch.cat(testing.labels)[test.index].tolist()):
            raise ValueError(f"{name}: the test samples of task {task} have other task labels than its training samples")
        tasks.append(
            Task(
                task,
                tuple(sorted(taught | set(test.y.unique().tolist()))),
                Subset(with_task_labels(training, add_labels), rows),
                Subset(with_task_labels(testing, add_labels), test.index),
                None
                if held_out is None
                else Subset(with_task_labels(held_out, add_labels), subset_to_test(name, held_out, task, taught).index),
            )
        )
    if len(training) == count and torch.equal(of, of.sort().values):
        return tasks, None
    place = torch.empty_like(of)
    place[torch.argsort(of, stable=True)] = torch.arange(len(of))
    return tasks, ExperienceSchedule(place, tuple(training.ends))


def _labels_differ_from_tasks(training: Experiences, of: Tensor) -> bool:
    """Return whether samples must say their task label: where it says something, and is not the number of the task."""
    labels = torch.cat(training.labels)
    return len(labels.unique()) > 1 and not torch.equal(labels, of)


def with_task_labels(experiences: Experiences, add_labels: bool) -> Samples:
    """Return samples, with their task labels if they are to be told."""
    samples = experiences.samples
    return Samples(samples.x, samples.y, {"task_label": torch.cat(experiences.labels)}) if add_labels else samples


def subset_to_test(name: str, testing: Experiences, task: int, classes: set[int]) -> Subset:
    """Return what a task is tested on: its own experience or, of the only one, the samples of its classes."""
    if len(testing) > 1:
        return Subset(testing.samples, testing.rows(task))
    rows = torch.isin(testing.samples.y, torch.tensor(sorted(classes))).nonzero().flatten()
    if not len(rows):
        raise ValueError(f"{name}: the only test experience has no samples of the classes of training experience {task}")
    return Subset(testing.samples, rows)


def suggestion(word: str, names: list[str]) -> str:
    """Return ': did you mean ...?' for the name nearest to a word, or all names."""
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else f": it has {', '.join(map(repr, names))}"
