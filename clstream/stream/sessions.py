"""Task, session, epoch and batch: what a stream delivers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from re import ASCII, fullmatch
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from clstream.params import check_choice, check_integer
from clstream.seeds import derive
from clstream.stream.samples import TARGETS, Samples, Subset, content_hash, positives, sent, with_target


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One thing to learn: its classes, and the samples to train and to test on.

    Args:
        id: its position in the stream.
        classes: its labels; with multi-label targets the columns that it brings; () with values.
        train, test: the samples. With multi-label targets, training samples have positives of these classes alone; test samples
            may have others too.
        validation: what to tune on, where the stream holds some back.
        target: the kind of its targets: "label", "multilabel" or "value"; samples that say nothing else are taken for that. "": as
            the training samples say.

    """

    id: int
    classes: tuple[int, ...]
    train: Samples | Subset
    test: Samples | Subset
    validation: Samples | Subset | None = None
    target: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "classes", tuple(map(index, self.classes)))
        except TypeError:
            raise TypeError(f"the classes of a task must be whole numbers, not {self.classes!r}") from None
        target = self.target or getattr(self.train, "target", "label")
        check_choice(TARGETS, target=target)
        object.__setattr__(self, "target", target)
        for name in ("train", "test", "validation"):
            part = getattr(self, name)
            if not isinstance(part, (Samples, Subset)):
                continue  # the stream says what is wrong with it
            if part.target not in ("label", target):
                raise ValueError(f"the {name} samples of task {self.id} have {part.target} targets, and the task {target} targets")
            object.__setattr__(self, name, with_target(part, target))

    def __repr__(self) -> str:
        return f"Task({self.id}, classes={self.classes}, train={len(self.train)}, test={len(self.test)})"


HASHED = 16
"""Training and test samples of a task whose inputs are hashed, evenly spaced; of all others the targets are."""


def task_content(task: Task) -> str:
    """Return sixteen hexadecimal digits that change with the targets of a task, and with some of its inputs.

    All targets of its training and test samples are hashed, and the inputs of `HASHED` of each, evenly spaced, so that data that
    is larger than memory is not read for it.
    """
    digest = hashlib.sha256(f"{task.target} {task.classes}".encode())
    for part in (task.train, task.test):
        rows = torch.linspace(0, len(part) - 1, min(HASHED, len(part))).round().long()
        some = part[rows.to(part.index.device if isinstance(part, Subset) else part.y.device)]
        digest.update(content_hash(part.y) + content_hash(some.x))
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class TestSet:
    """Samples to test on: a task's own, or a further set that a stream has among its `probes`.

    Args:
        name: as "task_00", or "unknown/fashion_mnist": columns and curves are called so. Letters, digits, and . _ - /
        samples: the inputs, of the stream's shape and dtype, and their targets.
        task: the number of the task that they are of; questions with the task given are asked about these alone. None: of none.
        known: whether their classes are of the stream. False: they are strange for good, and only novelty measures are asked of
            them. "taught": each class is strange until it is taught.
        note: what was done to them, for the stream's card.

    """

    __test__ = False  # pytest would take it for a test class

    name: str
    samples: Samples | Subset
    task: int | None = None
    known: bool | str = True
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not fullmatch(r"(?!\.+(/|$))[\w.-]+(/(?!\.+(/|$))[\w.-]+)*", self.name, ASCII):
            raise ValueError(
                f"a test set's name is made of letters, digits, '.', '_', '-' and '/', as 'noise/low', not {self.name!r}"
            )
        if not isinstance(self.samples, (Samples, Subset)):
            raise TypeError(f"the test set {self.name} must have Samples or a Subset, not a {type(self.samples).__name__}")
        check_integer(0, none=True, task=self.task)
        if not isinstance(self.known, bool) and self.known != "taught":
            raise ValueError(f"known must be True, False or 'taught', not {self.known!r}")
        if not isinstance(self.note, str):
            raise TypeError(f"the note of the test set {self.name} must be a string, not {self.note!r}")

    def __repr__(self) -> str:
        return f"TestSet({self.name!r}, {len(self.samples)} samples)"


class HiddenTaskError(AttributeError):
    """A task was asked for where the stream hides its boundaries."""


def shown(task: Task | None, what: str) -> Task:
    """Return a task; raises HiddenTaskError if it is hidden."""
    if task is None:
        raise HiddenTaskError(
            f"this stream hides its boundaries, so a {what} has no task: a strategy that reads it says so on its class, "
            "needs_task = True, and runs on streams that show their boundaries; task_hidden says whether they do"
        )
    return task


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The samples of one step. `index` counts the batches of the epoch, and `epoch` the epochs of the session, both from 0."""

    samples: Samples
    task_if_shown: Task | None
    index: int
    epoch: int

    @property
    def task(self) -> Task:
        """The task that it is of. Raises HiddenTaskError where the stream hides its boundaries."""
        return shown(self.task_if_shown, "batch")

    @property
    def task_hidden(self) -> bool:
        """Whether the stream hides its boundaries."""
        return self.task_if_shown is None


@dataclass(frozen=True, slots=True, eq=False)
class Epoch:
    """One pass over a session, in an order that depends on nothing but (seed, session, epoch)."""

    session: Session
    index: int

    def __repr__(self) -> str:
        return f"Epoch({self.index} of session {self.session.index})"

    def __len__(self) -> int:
        """Return the number of batches."""
        samples, size = len(self.session.samples), self.session.batch_size
        return samples // size if self.session.drop_last else -(-samples // size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def order(self) -> Tensor:
        """Return the positions in the session in the order of this pass: (samples,), int64, on the CPU."""
        session = self.session
        if not session.shuffle:
            return torch.arange(len(session.samples))
        shuffle = torch.Generator().manual_seed(derive(session.seed, session.index, self.index))
        return torch.randperm(len(session.samples), generator=shuffle)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of this pass, from number `first` on.

        The last one holds what is left; if the session is to drop that, each pass leaves out other samples.
        """
        session, number = self.session, self.index
        samples, order = session.samples, self.order()
        if session.drop_last:
            order = order[: len(self) * session.batch_size]
        if (
            isinstance(samples, Subset) and samples.transform is None and samples.class_mask is None
        ):  # straight from the source: one gather a batch
            order = samples.index[sent(order, samples.index.device)]
            samples = samples.source
        order = sent(order, samples.y.device)
        chunks = order[first * session.batch_size :].split(session.batch_size) if first < len(self) else ()
        if session.device is None:
            for index, chunk in enumerate(chunks, first):
                yield Batch(samples[chunk], session.task_if_shown, index, number)
        else:
            for index, chunk in enumerate(chunks, first):
                yield Batch(samples[chunk].sent_to(session.device), session.task_if_shown, index, number)


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """One delivery of training samples; they may be passed over `epochs` times, then they are gone.

    `device` is where the batches go, if not where the samples lie. Each
    pass has an order of its own if `shuffle`; if not, the samples come in the order that they have here. `drop_last` leaves
    out what a pass has left for a last batch that is not full; `samples` and `classes` are of all samples nevertheless.
    """

    index: int
    task_if_shown: Task | None
    samples: Samples | Subset
    epochs: int
    batch_size: int
    seed: int
    device: torch.device | None = None
    shuffle: bool = True
    drop_last: bool = False

    @property
    def task(self) -> Task:
        """The task that it is of. Raises HiddenTaskError where the stream hides its boundaries."""
        return shown(self.task_if_shown, "session")

    @property
    def task_hidden(self) -> bool:
        """Whether the stream hides its boundaries."""
        return self.task_if_shown is None

    def __len__(self) -> int:
        """Return the number of epochs."""
        return self.epochs

    def __iter__(self) -> Iterator[Epoch]:
        return (Epoch(self, index) for index in range(self.epochs))

    @property
    def target(self) -> str:
        """The kind of targets that its samples have: "label", "multilabel" or "value"."""
        return self.samples.target

    @property
    def classes(self) -> list[int]:
        """The classes that its samples have, sorted: labels, or the columns with a positive; of values there are none."""
        if self.target == "value":
            return []
        return [int(label) for label in self.samples.y.unique()] if self.target == "label" else positives(self.samples.y)


class Delivery(NamedTuple):
    """A session as it is delivered, and where it stands in its task.

    Args:
        session: the training samples.
        task: what is taught; of a session that mixes tasks, the one that most samples are of.
        begins_task: whether the session before was of another task; never where the stream hides its boundaries.
        ends_task: whether it is the last one of its task; never where the stream hides its boundaries.

    """

    session: Session
    task: Task
    begins_task: bool
    ends_task: bool


@dataclass(frozen=True, slots=True, eq=False)
class DataSource:
    """The data sets that a stream takes its samples from, so that a recording can name them.

    `parts` are the whole data sets by name ("train", "test"), with the labels they came with. `loader` and `options` say how
    a stream of ours had them; without a loader they are the user's own.
    """

    parts: Mapping[str, Samples]
    loader: str | None = None
    options: Mapping[str, int | float | str | None] = field(default_factory=dict)


@runtime_checkable
class MixedSchedule(Protocol):
    """A schedule whose sessions may mix tasks: what each draws is a pure function of its number, so any can be reached directly.

    Its `repr` names it fully: the fingerprint depends on it. Its length is the number of sessions.
    """

    @property
    def once(self) -> bool:
        """Whether a training sample comes in one session at most."""
        ...

    def __len__(self) -> int: ...

    def draw(self, session: int) -> Tensor:
        """Return what a session draws, in the order in which it comes: (n,), int64, on the CPU.

        Training samples are numbered over all tasks, those of task 0 first.
        """
        ...
