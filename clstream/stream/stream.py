"""A stream is data: tasks, and a schedule of the sessions that visit them.

Iterating a stream twice gives the same batches: the order of the samples is a pure function of
(stream seed, session, epoch), so nothing has to be remembered to reach any batch again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from clstream.params import check_bool, check_choice, check_integer
from clstream.seeds import derive
from clstream.stream.samples import TARGETS, Samples, Subset, check_samples, content_hash, own_storage, pooled, positives
from clstream.stream.sessions import DataSource, Delivery, MixedSchedule, Session, Task, TestSet, task_content

SCENARIOS = ("class", "task", "domain")

MOST = 2**31 - 1  # epochs, or samples of a batch: a number beyond is a mistake, and would overflow

MOST_CLASSES = 65536  # a label beyond is a number of something else, and would make tables of its square


class NotToldError(AttributeError, ValueError):
    """A strategy asked for what a stream doesn't tell, or can't know."""


@dataclass(frozen=True, slots=True, eq=False)
class StreamView:
    """What a strategy is given of a stream that hides its boundaries: the fields of `Stream` without tasks, schedule and data."""

    name: str
    classes: int
    input_shape: tuple[int, ...]
    scenario: str
    epochs: int
    batch_size: int
    augment: Callable[[Tensor], Tensor] | None
    resident: bool
    device: torch.device | None
    boundaries: bool = False
    drop_last: bool = False
    target: str = "label"
    outputs: int = 0
    class_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> NoReturn:
        if self.boundaries:
            raise NotToldError(f"{self.name} arrives while it is learned, so no strategy can be told its {name!r} beforehand")
        raise NotToldError(f"a strategy is not told {name!r} of a stream that hides its boundaries")


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """Tasks, and for each session the task, or the tasks, that it draws from.

    Args:
        name: how tables and MLflow call it.
        tasks: the tasks, numbered from 0; each has training and test samples with labels among its classes.
        schedule: for each session, the number of the task that it draws from. None: each task in one session. A task with
            several sessions is dealt out among them, so no sample comes in two sessions. Or a `MixedSchedule`, whose sessions may
            mix tasks; where one does, `boundaries` must be False.
        epochs: passes over a session.
        batch_size: samples of a step.
        scenario: "class" (all classes seen compete), "task" (the task is given at test: its classes compete, in training
            too; where tasks share classes, samples to learn have the number of their task as `extra["task"]`) or "domain" (the
            tasks share their classes).
        seed: of the order of the batches. A run adds its own seed to it.
        boundaries: whether a strategy is told of tasks. If not, there are no task events, and `batch.task` raises HiddenTaskError.
        augment: a function of a raw batch of inputs, applied where samples are learned, so replayed ones change too. It may
            draw from torch's global generator: a run seeds that, and gives it back as it was.
        shuffle: whether each pass over a session has an order of its own; if not, the samples come in that of the data, or in
            the order of a `MixedSchedule`.
        resident: whether the samples are moved to the run's device whole; if not, batch by batch (memory-mapped data).
        notes: what the user should know, shown on the card.
        data: where the samples come from, for recordings. None: the samples of the tasks are all that is known.
        drop_last: whether each pass leaves out what is left for a last batch that is not full, as torch's DataLoader does. If
            not, that batch is a smaller one.
        class_names: what reports call the labels from 0 up; (): by their numbers.
        target: the kind of targets of its tasks, unless a task has its own: "label", "multilabel" or "value". "": as the tasks say.
        probes: further test sets, beside those of the tasks.

    Raises:
        ValueError, TypeError: for an empty task or schedule, labels outside the classes, values that are not finite, ...

    """

    name: str
    tasks: Sequence[Task]
    schedule: Sequence[int] | MixedSchedule | None = None
    epochs: int = 1
    batch_size: int = 32
    scenario: str = "class"
    seed: int = 0
    boundaries: bool = True
    augment: Callable[[Tensor], Tensor] | None = None
    resident: bool = True
    notes: tuple[str, ...] = ()
    data: DataSource | None = None
    shuffle: bool = True
    drop_last: bool = False
    class_names: tuple[str, ...] = ()
    target: str = ""
    probes: Sequence[TestSet] = ()
    device: torch.device | None = field(default=None, init=False)
    held_out: float = field(default=0.0, init=False)

    arrives: ClassVar[bool] = False
    """Whether its sessions arrive while it is learned: see `clstream.stream.arriving`."""

    def __post_init__(self) -> None:
        _check_options(self)
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "probes", tuple(self.probes))
        if self.target and all(isinstance(task, Task) for task in self.tasks):
            object.__setattr__(self, "tasks", tuple(_of_target(task, self.target) for task in self.tasks))
        if self.tasks and self.target not in [getattr(task, "target", "label") for task in self.tasks]:
            object.__setattr__(self, "target", getattr(self.tasks[0], "target", "label"))
        if not isinstance(self.schedule, MixedSchedule):
            object.__setattr__(self, "schedule", tuple(range(len(self.tasks)) if self.schedule is None else self.schedule))
        _check(self)

    def __len__(self) -> int:
        """Return the number of sessions."""
        assert self.schedule is not None
        return len(self.schedule)

    def __iter__(self) -> Iterator[Session]:
        return (self.session(index) for index in range(len(self)))

    def session(self, index: int) -> Session:
        """Return a session by number; each can be reached directly. Raises IndexError outside 0 to len(stream) - 1."""
        return self._session(index, self._delivered(index))

    def deliveries(self, first: int = 0, end: int | None = None) -> Iterator[Delivery]:
        """Yield the sessions from number `first` on, before number `end`, with their tasks; the last one ends its task."""
        end = len(self) if end is None else end
        for index in range(first, end):
            task = self.task_of(index)
            begins = self.boundaries and (index == 0 or self.task_of(index - 1) != task)
            ends = self.boundaries and (index + 1 == end or self.task_of(index + 1) != task)
            yield Delivery(self.session(index), self.tasks[task], begins, ends)

    def _session(self, index: int, samples: Samples | Subset) -> Session:
        """Return a session that delivers some samples; where tasks are hidden, apart from the data that they are of."""
        if not self.boundaries:
            samples = own_storage(samples[:])
        elif isinstance(samples, Subset) and samples.transform is not None:
            samples = samples[:]  # a domain is made once a session, not once a batch
        task = self.tasks[self.task_of(index)] if self.boundaries else None
        if task is not None and self.marks_tasks:
            whole = samples[:]
            number = torch.full((len(whole),), task.id, device=whole.y.device)
            samples = replace(whole, extra={**whole.extra, "task": number})
        device = None if self.resident else self.device
        return Session(index, task, samples, self.epochs, self.batch_size, self.seed, device, self.shuffle, self.drop_last)

    def holding_out(self, share: float) -> Stream:
        """Return the stream whose sessions hold back a share of their samples: they don't deliver it, `held_back` does.

        Of labels it is that share of each class, rounded, but never all of it. Which samples these are is a pure function of
        (stream seed, session).

        Args:
            share: above 0 and below 1.

        """
        return self._like(held_out=share)

    def held_back(self, session: int) -> Samples | Subset:
        """Return the samples that a session holds back."""
        dealt = self._dealt(session)
        return _rows(dealt, self._held_rows(session, dealt).nonzero().flatten())

    def _held_rows(self, session: int, dealt: Samples | Subset) -> Tensor:
        """Return which of a session's samples it holds back: (n,), bool, on the CPU."""
        y = dealt.y.cpu() if dealt.target == "label" else torch.zeros(len(dealt), dtype=torch.int64)
        same = torch.arange(len(y))
        if isinstance(self.schedule, MixedSchedule) and not self.schedule.once:
            same = self.schedule.draw(session).unique(return_inverse=True)[1]  # a sample that comes twice is one
            y = torch.zeros(int(same.max()) + 1, dtype=torch.int64).scatter(0, same, y)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derive(self.seed, session, "held out")))
        order = order[y[order].argsort(stable=True)]
        counts = y.bincount()
        rank = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        most = torch.minimum((counts * self.held_out).round().long(), counts - 1)
        held = torch.zeros(len(y), dtype=torch.bool)
        held[order] = rank < most.repeat_interleave(counts)
        return held[same]

    def _delivered(self, index: int) -> Samples | Subset:
        """Return the samples of a session, without those that it holds back."""
        dealt = self._dealt(index)
        return _rows(dealt, (~self._held_rows(index, dealt)).nonzero().flatten()) if self.held_out else dealt

    def _dealt(self, index: int) -> Samples | Subset:
        """Return the samples of a session, with those that it holds back."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has the sessions 0 to {len(self) - 1}, not {index}")
        if isinstance(self.schedule, MixedSchedule):
            return self._mixed(_checked(self.schedule.draw(index), int(self._ends[-1]), f"{self.name}: session {index}"))
        number, part, parts = self.visits[index]
        train, share = self.tasks[number].train, slice(part, None, parts)
        return train.take(share) if isinstance(train, Subset) else train[share]

    def _mixed(self, drawn: Tensor) -> Samples | Subset:
        """Return training samples by their numbers over all tasks."""
        if self._pool is not None:
            return self._pool.take(drawn.to(self._pool.index.device))
        number = torch.bucketize(drawn, self._ends, right=True)
        parts: list[Samples] = []
        places: list[Tensor] = []
        for task in number.unique().tolist():
            place = (number == task).nonzero().flatten()
            train = self.tasks[task].train
            parts.append(train[(drawn[place] - self._ends[task] + len(train)).to(train[:1].y.device)])
            places.append(place)
        whole = parts[0]
        for other in parts[1:]:
            whole = whole + other
        return whole[torch.cat(places).argsort().to(whole.y.device)]

    @cached_property
    def _ends(self) -> Tensor:
        """For each task the number of training samples up to its end, over all tasks."""
        return torch.tensor([len(task.train) for task in self.tasks]).cumsum(0)

    @cached_property
    def _pool(self) -> Subset | None:
        """The training samples of all tasks, where they are rows of one source."""
        return pooled([task.train for task in self.tasks])

    @cached_property
    def visits(self) -> list[tuple[int, int, int]]:
        """For each session (task, part, parts): it draws every `parts`-th sample of the task, from number `part` on."""
        assert self.schedule is not None
        assert not isinstance(self.schedule, MixedSchedule)
        parts = [0] * len(self.tasks)
        visits = []
        for number in self.schedule:
            visits.append((number, parts[number]))
            parts[number] += 1
        return [(number, part, parts[number]) for number, part in visits]

    def mix(self, session: int) -> Tensor:
        """Return how many samples of each task a session draws, also where strategies are not told: (tasks,), int64, on the CPU."""
        if isinstance(self.schedule, MixedSchedule):
            drawn = self.schedule.draw(session)
            if self.held_out:
                drawn = drawn[~self._held_rows(session, self._dealt(session))]
            return torch.bucketize(drawn, self._ends, right=True).bincount(minlength=len(self.tasks))
        return len(self._delivered(session)) * (torch.arange(len(self.tasks)) == self.task_of(session))

    def labels(self, session: int) -> Tensor:
        """Return the targets that a session delivers, without its inputs, as in `Samples`, on the CPU."""
        return self._delivered(session).y.cpu()

    def size_of(self, session: int) -> int:
        """Return how many samples a session delivers."""
        if isinstance(self.schedule, MixedSchedule) and not self.held_out:
            return len(self.schedule.draw(session))
        return len(self._delivered(session))

    def task_of(self, session: int) -> int:
        """Return the number of the task that a session draws from, or draws most from, also where strategies are not told."""
        return int(self.mix(session).argmax()) if isinstance(self.schedule, MixedSchedule) else self.visits[session][0]

    @property
    def visible(self) -> Stream | StreamView:
        """What strategies are given: this stream, or, if it hides its boundaries, a view without tasks and schedule."""
        return self if self.boundaries else self.view

    @cached_property
    def view(self) -> StreamView:
        """What strategies are given of this stream where its boundaries are hidden."""
        return StreamView(
            self.name, self.classes, self.input_shape, self.scenario, self.epochs, self.batch_size, self.augment, self.resident,
            self.device, drop_last=self.drop_last, target=self.target, outputs=self.outputs, class_names=self.class_names,
        )  # fmt: skip

    @cached_property
    def classes(self) -> int:
        """Number of labels over the whole stream: the greatest label, plus one; 0 if all targets are values."""
        return 1 + max((max(task.classes) for task in self.tasks if task.classes), default=-1)

    @cached_property
    def outputs(self) -> int:
        """Number of outputs that a model of the stream needs: the classes, or the values of a sample."""
        widths = [task.train[:1].y.shape[1] for task in self.tasks if task.target != "label"]
        return max(self.classes, *widths) if widths else self.classes

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of targets that its tasks have, each once."""
        return tuple(dict.fromkeys(task.target for task in self.tasks))

    @cached_property
    def test_sets(self) -> tuple[TestSet, ...]:
        """All that it is tested on: the tasks' own test samples ("task_00", "task_01", ...), then the probes."""
        width = max(2, len(str(len(self.tasks) - 1)))
        own = [TestSet(f"task_{task.id:0{width}d}", task.test, task.id) for task in self.tasks]
        return (*own, *self.probes)

    def class_name(self, label: int) -> str:
        """Return what reports call a label."""
        return self.class_names[label] if self.class_names else str(label)

    @property
    def gaps(self) -> str:
        """A sentence on labels below the greatest one that no task has; empty if there are none."""
        used = len({label for task in self.tasks for label in task.classes})
        if used == self.classes or "label" not in self.targets:
            return ""
        return (
            f"its {used} labels have gaps: models get {self.classes} outputs, and {self.classes - used} of them are never right; "
            "from_tensors(..., relabel=True) numbers the labels without gaps"
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.tasks[0].test[:1].x.shape[1:])

    @cached_property
    def heads(self) -> Tensor:
        """(classes, classes), bool: row i is the classes of the task that class i belongs to."""
        table = torch.zeros(self.classes, self.classes, dtype=torch.bool)
        for task in self.tasks:
            own = torch.tensor(task.classes, dtype=torch.int64)
            table[own[:, None], own] = True
        return table

    @cached_property
    def shares_classes(self) -> bool:
        """Whether a class is of several tasks."""
        return sum(len(task.classes) for task in self.tasks) > len({label for task in self.tasks for label in task.classes})

    @property
    def marks_tasks(self) -> bool:
        """Whether samples to learn have the number of their task as `extra["task"]`: where it is given, and no label tells it."""
        return self.scenario == "task" and (self.shares_classes or "multilabel" in self.targets)

    @cached_property
    def task_heads(self) -> Tensor:
        """(tasks, classes), bool: row i is the classes of task i."""
        table = torch.zeros(len(self.tasks), self.classes, dtype=torch.bool)
        for task in self.tasks:
            table[task.id, list(task.classes)] = True
        return table

    def _like(self, **changes: object) -> Stream:
        """Return a copy with attributes that need no check; what was found out about the data stays known."""
        twin = copy(self)
        for name in ("_pool", "view", "test_sets"):  # these hold where the data is
            vars(twin).pop(name, None)
        for name, value in changes.items():
            object.__setattr__(twin, name, value)
        return twin

    def reseeded(self, seed: int) -> Stream:
        """Return the stream with the order of its batches moved by a run's seed; 0 changes nothing."""
        return self._like(seed=self.seed + seed)

    def scheduled(self, schedule: MixedSchedule) -> Stream:
        """Return the stream with another schedule over the same samples, which is not checked."""
        return self._like(schedule=schedule)

    def followed_by(self, other: Stream) -> Stream:
        """Return a stream of this one's tasks and sessions, and then another one's, whose tasks are numbered on.

        Options (epochs, batch size, order, augmentation) are those of the other one, which must have inputs, targets and a scenario
        of the same kind; labels are numbered over both. Where both have their samples of the same data set, a recording can load it
        by name. Raises ValueError for what doesn't go together, and for sessions that mix tasks.
        """
        mixed = [stream.name for stream in (self, other) if isinstance(stream.schedule, MixedSchedule)]
        if mixed:
            raise ValueError(f"sessions of {mixed[0]} mix tasks, so it can't be joined to another stream")
        clash = next(
            (label for label, names in enumerate(zip(self.class_names, other.class_names, strict=False)) if len({*names}) > 1), None
        )
        if self.scenario != other.scenario or clash is not None:
            what = f"one is {self.scenario}-incremental, the other {other.scenario}-incremental"
            what = what if clash is None else f"label {clash} is {self.class_name(clash)!r} and {other.class_name(clash)!r}"
            raise ValueError(f"{self.name} and {other.name} can't be joined: {what}")
        count = len(self.tasks)
        probes = [probe if probe.task is None else replace(probe, task=count + probe.task) for probe in other.probes]
        names = max(self.class_names, other.class_names, key=len)
        ours, theirs = self.data or DataSource({}), other.data or DataSource({})
        same = ours.loader is not None and (ours.loader, ours.options) == (theirs.loader, theirs.options)
        return replace(
            other,
            name=f"{self.name}, {other.name}",
            tasks=(*self.tasks, *(replace(task, id=count + task.id) for task in other.tasks)),
            schedule=(*self.schedule, *(count + number for number in other.schedule)),  # type: ignore[misc,union-attr]
            probes=(*self.probes, *probes),
            class_names=names if len(names) == max(self.classes, other.classes) else (),
            notes=(*self.notes, *other.notes),
            data=theirs if same else None,
            target="" if len({*self.targets, *other.targets}) > 1 else other.target,
        )

    def joined(
        self,
        tasks: Iterable[Task],
        schedule: Sequence[int] | MixedSchedule | None,
        probes: Iterable[TestSet],
        class_names: tuple[str, ...],
    ) -> Stream:
        """Return the stream with other tasks and sessions before its own, which are not checked: see `History.followed_by`."""
        twin = self._like(tasks=tuple(tasks), schedule=schedule, probes=tuple(probes), class_names=class_names, data=None)
        for name, attribute in vars(Stream).items():
            if isinstance(attribute, cached_property):
                vars(twin).pop(name, None)
        return twin

    def with_source(self, data: DataSource) -> Stream:
        """Return the stream with a note of the data that its samples were taken from."""
        return self._like(data=data)

    def with_probes(self, *probes: TestSet | Iterable[TestSet]) -> Stream:
        """Return the stream with further test sets; each argument is one test set, or several.

        Raises ValueError or TypeError for what can't be asked about beside the others.
        """
        more: list[TestSet] = []
        for probe in probes:
            if not isinstance(probe, TestSet) and not isinstance(probe, Iterable):
                raise TypeError(f"{self.name}: probes must be TestSet objects, not a {type(probe).__name__}")
            more += [probe] if isinstance(probe, TestSet) else probe
        twin = self._like(probes=(*self.probes, *more))
        vars(twin).pop("fingerprint", None)
        _check_probes(twin, set())
        _check_columns(twin)
        return twin

    def for_tuning(self) -> Stream:
        """Return the stream tested on its validation samples, without its test samples and probes: what to tune on.

        Raises ValueError if the stream holds back no validation samples.
        """
        tasks = [replace(task, test=task.validation, validation=None) for task in self.tasks if task.validation is not None]
        if len(tasks) < len(self.tasks):
            raise ValueError(f"{self.name} holds back no validation samples: build it with validation=0.1, say")
        return replace(self, name=f"{self.name} (validation)", tasks=tasks, probes=())

    def testing(self, samples: Samples | Subset, task: int) -> Stream:
        """Return the stream with other test samples of a task, and without probes."""
        tasks = [replace(own, test=samples) if own.id == task else own for own in self.tasks]
        return self._like(tasks=tuple(tasks), probes=())

    def to(self, device: torch.device | str) -> Stream:
        """Return the stream with its samples on `device`; if not `resident`, its batches will be moved there."""
        tasks, probes = self.tasks, self.probes
        if self.resident and any(task.train[:1].y.device != torch.device(device) for task in self.tasks):
            moved: dict[int, Tensor] = {}  # tasks share their data: each tensor is moved once

            def moved_tensor(tensor: Tensor) -> Tensor:
                if id(tensor) not in moved:
                    moved[id(tensor)] = tensor.to(device)
                return moved[id(tensor)]

            def moved_samples(part: Samples) -> Samples:
                extra = {name: moved_tensor(rows) for name, rows in part.extra.items()}
                return Samples(moved_tensor(part.x), moved_tensor(part.y), extra, part.target)

            def move(part: Samples | Subset) -> Samples | Subset:
                if isinstance(part, Samples):
                    return moved_samples(part)
                cached = None if part.cached is None else moved_samples(part.cached)
                mask = None if part.class_mask is None else moved_tensor(part.class_mask)
                return Subset(moved_samples(part.source), part.index.to(device), part.transform, cached, mask)

            tasks = [
                replace(task, train=move(task.train), test=move(task.test), validation=task.validation and move(task.validation))
                for task in self.tasks
            ]
            probes = [replace(probe, samples=move(probe.samples)) for probe in self.probes]
        return self._like(tasks=tasks, probes=probes, device=torch.device(device))

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """For each task sixteen hexadecimal digits that change with its targets, and with some of its inputs."""
        return tuple(map(task_content, self.tasks))

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any sample, label, class or schedule of this stream."""
        visits = f"{len(self)} sessions: {self.schedule}" if isinstance(self.schedule, MixedSchedule) else self.visits
        digest = hashlib.sha256(repr((self.scenario, visits, [task.classes for task in self.tasks])).encode())
        if self.targets != ("label",):
            digest.update(repr([task.target for task in self.tasks]).encode())
        parts = [part for task in self.tasks for part in (task.train, task.test, task.validation)]
        for probe in self.probes:
            digest.update(repr((probe.name, probe.task, probe.known, probe.samples.target)).encode())
            parts.append(probe.samples)
        hashes: dict[int, bytes] = {}  # tasks share their data: each tensor is read once

        def content(rows: Tensor) -> bytes:
            if id(rows) not in hashes:
                hashes[id(rows)] = content_hash(rows)
            return hashes[id(rows)]

        for part in parts:
            if isinstance(part, Subset):
                digest.update(repr(part.transform).encode() + content(part.index))
                digest.update(b"" if part.class_mask is None else content(part.class_mask))
            whole = part.source if isinstance(part, Subset) else part
            digest.update(b"none" if whole is None else content(whole.x) + content(whole.y))
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, tasks={len(self.tasks)}, classes={self.classes}, sessions={len(self)})"

    def __str__(self) -> str:
        """Return the stream's card."""
        hidden = "" if self.boundaries else ", boundaries hidden"
        passes = f"{self.epochs} epoch{'s' * (self.epochs != 1)} each"
        batches = f"batches of {self.batch_size}{', the last one dropped if it is not full' * self.drop_last}"
        lines = [
            f"{self.name}: {self.scenario}-incremental{hidden}",
            f"  tasks        {len(self.tasks)}",
            f"  classes      {self.classes}",
            *([] if self.targets == ("label",) else [f"  targets      {', '.join(self.targets)}; {self.outputs} outputs"]),
            f"  inputs       {tuple(self.input_shape)} {str(self.tasks[0].test[:1].x.dtype).removeprefix('torch.')}",
            f"  train/test   {sum(len(t.train) for t in self.tasks):,} / {sum(len(t.test) for t in self.tasks):,} samples",
            f"  sessions     {len(self)}, {passes}, {batches}{'' if self.shuffle else ', not shuffled'}",
            f"  fingerprint  {self.fingerprint}",
        ]
        if isinstance(self.schedule, MixedSchedule):
            lines.insert(-1, f"  drift        {self.schedule}")
        for task in self.tasks[:20]:
            shown = ", ".join(map(self.class_name, task.classes[:10])) + (" ..." if len(task.classes) > 10 else "")
            shown = "values" if task.target == "value" else f"classes {shown}"
            lines.append(f"  task {task.id:<8}{shown}; {len(task.train):,} to train, {len(task.test):,} to test")
        if len(self.tasks) > 20:
            lines.append(f"  ... and {len(self.tasks) - 20} more tasks")
        for probe in self.probes[:20]:
            whose = {True: "", False: ", strange", "taught": ", strange until taught"}[probe.known]
            of = "" if probe.task is None else f", of task {probe.task}"
            note = f"; {probe.note}" if probe.note else ""
            lines.append(f"  probe        {probe.name}: {len(probe.samples):,} to test{of}{whose}{note}")
        if len(self.probes) > 20:
            lines.append(f"  ... and {len(self.probes) - 20} more probes")
        notes = [*self.notes, self.gaps] if self.gaps else self.notes
        return "\n".join(lines + [f"  note: {note}" for note in notes])


def _rows(part: Samples | Subset, rows: Tensor) -> Samples | Subset:
    """Return some samples by their numbers on the CPU, still ungathered if they are."""
    if isinstance(part, Subset):
        return part.take(rows.to(part.index.device))
    return part[rows.to(part.y.device)]


def _checked(drawn: object, most: int, what: str) -> Tensor:
    """Return what a mixture draws for a session. Raises ValueError for what are no numbers of training samples."""
    if not isinstance(drawn, Tensor) or drawn.dtype != torch.int64 or drawn.dim() != 1 or not len(drawn):
        raise ValueError(f"{what} must draw a tensor of one or more int64 numbers of training samples")
    if int(drawn.min()) < 0 or int(drawn.max()) >= most:
        raise ValueError(f"{what} draws training samples that there aren't: they are numbered from 0 to {most - 1}")
    return drawn


def _check_options(stream: Stream) -> None:
    """Refuse options that are not what they must be, in one sentence that says which."""
    if not isinstance(stream.name, str):
        raise TypeError(f"a stream's name must be a string, not {stream.name!r}")
    try:
        check_integer(1, epochs=stream.epochs, batch_size=stream.batch_size)
        check_integer(1, MOST, epochs=stream.epochs, batch_size=stream.batch_size)
        check_integer(0, seed=stream.seed)
        check_choice(SCENARIOS, scenario=stream.scenario)
        if stream.target != "":
            check_choice(TARGETS, target=stream.target)
        check_bool(boundaries=stream.boundaries, resident=stream.resident, shuffle=stream.shuffle, drop_last=stream.drop_last)
    except ValueError as error:
        raise ValueError(f"{stream.name}: {error}") from None
    if stream.augment is not None and not callable(stream.augment):
        raise TypeError(f"{stream.name}: augment must be a function of a batch of inputs, or None, not {stream.augment!r}")
    for what, texts in (("notes", stream.notes), ("class_names", stream.class_names)):
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{stream.name}: {what} must be a tuple of strings, not {texts!r}")
    if isinstance(stream.tasks, Task) or not isinstance(stream.tasks, Iterable):
        raise TypeError(f"{stream.name}: tasks must be a list of Task objects, not a {type(stream.tasks).__name__}")
    if isinstance(stream.probes, TestSet) or not isinstance(stream.probes, Iterable):
        raise TypeError(f"{stream.name}: probes must be a list of TestSet objects, not a {type(stream.probes).__name__}")
    if not isinstance(stream.schedule, (type(None), MixedSchedule)) and not isinstance(stream.schedule, Iterable):
        raise TypeError(
            f"{stream.name}: schedule must be None, a MixedSchedule or the number of each session's task, not {stream.schedule!r}"
        )


def _check(stream: Stream) -> None:
    """Refuse a stream that can't be played, in one sentence that says why."""
    name = stream.name
    if not all(isinstance(task, Task) for task in stream.tasks):
        other = next(task for task in stream.tasks if not isinstance(task, Task))
        raise TypeError(f"{name}: tasks must be a list of Task objects, and one of them is a {type(other).__name__}")
    if not stream.tasks:
        raise ValueError(f"{name} has no tasks")
    if not stream.schedule:
        raise ValueError(f"{name} has no sessions: its schedule is empty")
    mixes = isinstance(stream.schedule, MixedSchedule)
    if mixes and stream.boundaries and any(int((stream.mix(index) > 0).sum()) > 1 for index in range(len(stream))):
        raise ValueError(f"{name}: its sessions mix tasks, so it has no boundaries to show: boundaries must be False")
    if stream.scenario == "task" and not stream.boundaries:
        raise ValueError(f"{name}: a task-incremental stream tells the task of each sample, so it can't hide its boundaries")
    for position, number in enumerate(() if isinstance(stream.schedule, MixedSchedule) else stream.schedule):
        if isinstance(number, bool) or not hasattr(number, "__index__") or not 0 <= number < len(stream.tasks):
            raise ValueError(f"{name}: session {position} draws from task {number}, but the tasks are 0 to {len(stream.tasks) - 1}")
    checked: set[int] = set()
    shapes = set()
    for position, task in enumerate(stream.tasks):
        if task.id != position:
            raise ValueError(f"{name}: the task at position {position} has id {task.id}; ids count from 0")
        if task.target == "value":
            if task.classes:
                raise ValueError(f"{name}: task {position} has values to learn, and no classes: classes=(), not {task.classes}")
        elif not task.classes or min(task.classes) < 0 or len(set(task.classes)) != len(task.classes):
            raise ValueError(f"{name}: task {position} must have distinct classes from 0 up, not {task.classes}")
        for kind, part in (("training", task.train), ("test", task.test), ("validation", task.validation)):
            if part is None:
                continue
            if not len(part):
                raise ValueError(f"{name}: task {position} has no {kind} samples")
            any_class = task.target == "multilabel" and kind != "training"
            check_samples(part, f"{name}: the {kind} samples of task {position}", None if any_class else task.classes, checked)
            if stream.marks_tasks and "task" in part[:1].extra:
                raise ValueError(
                    f"{name}: the task is given to its samples as the extra field 'task': give your own field another name"
                )
            shapes.add((tuple(part[:1].x.shape[1:]), part[:1].x.dtype))
        if task.target == "multilabel":
            lacking = sorted(set(task.classes) - {*positives(task.train.y), *positives(task.test.y)})
            if lacking:
                raise ValueError(f"{name}: no sample of task {position} has a positive of its classes {lacking}: leave them out")
    _check_probes(stream, checked)
    _check_columns(stream)
    if stream.classes > MOST_CLASSES:
        raise ValueError(f"{name}: the greatest label is {stream.classes - 1}; number the classes from 0, without gaps")
    if stream.class_names and len(stream.class_names) != stream.classes:
        raise ValueError(f"{name}: there must be a name for each of the {stream.classes} classes, not {len(stream.class_names)}")
    if len(shapes) > 1:
        raise ValueError(f"{name}: all inputs must have one shape and dtype, not {sorted(map(str, shapes))}")
    for number, _, parts in () if mixes else stream.visits:
        if parts > len(stream.tasks[number].train):
            raise ValueError(
                f"{name}: task {number} has {len(stream.tasks[number].train)} training samples, too few for {parts} sessions"
            )
    if stream.drop_last:
        short = next((index for index in range(len(stream)) if stream.size_of(index) < stream.batch_size), None)
        if short is not None:
            raise ValueError(
                f"{name}: session {short} has {stream.size_of(short)} samples, too few for a batch of {stream.batch_size}, and "
                "drop_last=True leaves out batches that are not full: take a smaller batch_size, or drop_last=False"
            )


def _of_target(task: Task, target: str) -> Task:
    """Return a task with the stream's kind of targets, unless it has its own."""
    part = task.train.source if isinstance(task.train, Subset) else task.train
    labels = isinstance(part, Samples) and isinstance(part.y, Tensor) and part.y.dim() == 1
    return task if task.target == target or task.target != "label" or labels else replace(task, target=target)


def _check_columns(stream: Stream) -> None:
    """Refuse targets of another number of columns than others of their kind, or of fewer than there are classes."""
    for target in ("multilabel", "value"):
        parts = [part for task in stream.tasks for part in (task.train, task.test, task.validation) if task.target == target]
        parts += [probe.samples for probe in stream.probes if probe.samples.target == target]
        widths = {part.source.y.shape[1] if isinstance(part, Subset) else part.y.shape[1] for part in parts if part is not None}
        if len(widths) > 1:
            raise ValueError(f"{stream.name}: all {target} targets must have one number of columns, not {sorted(widths)}")
        if target == "multilabel" and widths and stream.classes > min(widths):
            raise ValueError(
                f"{stream.name}: its multi-label targets have {min(widths)} columns, too few for the class {stream.classes - 1}"
            )


def _check_probes(stream: Stream, checked: set[int]) -> None:
    """Refuse test sets that can't be asked about beside those of the tasks."""
    first = stream.tasks[0].test[:1].x
    names = {"seen", *(f"task_{task.id:0{max(2, len(str(len(stream.tasks) - 1)))}d}" for task in stream.tasks)}
    for probe in stream.probes:
        if not isinstance(probe, TestSet):
            raise TypeError(f"{stream.name}: probes must be a list of TestSet objects, and one of them is a {type(probe).__name__}")
        what = f"{stream.name}: the probe {probe.name}"
        if probe.name in ("mean", "forgetting", "sessions_finished"):
            raise ValueError(f"{what} is called as a column of tables is: give it another name")
        if probe.name in names:
            raise ValueError(f"{what} has the name of another test set: give it another one")
        names.add(probe.name)
        if not len(probe.samples):
            raise ValueError(f"{what} has no samples")
        if probe.task is not None and probe.task >= len(stream.tasks):
            raise ValueError(f"{what} is of task {probe.task}, but the tasks are 0 to {len(stream.tasks) - 1}")
        classes = tuple(range(stream.classes)) if probe.task is None else stream.tasks[probe.task].classes
        check_samples(
            probe.samples,
            f"{stream.name}: the samples of the probe {probe.name}",
            None if probe.known is False or probe.samples.target != "label" else classes,
            checked,
        )
        x = probe.samples[:1].x
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"{what} has inputs of {tuple(x.shape[1:])} {x.dtype}, and the stream those of {tuple(first.shape[1:])} "
                f"{first.dtype}: bring them to one shape and dtype"
            )
        if probe.known is not False and probe.samples.target not in stream.targets:
            raise ValueError(f"{what} has {probe.samples.target} targets, which no task has")
        if probe.known == "taught" and probe.samples.target != "label":
            raise ValueError(f"{what} can't be strange until its classes are taught, since its targets are no labels")
