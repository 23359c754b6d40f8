"""Streams that arrive: sessions come from a source while the run goes on, and nobody knows how many there will be.

What a run has of such a stream grows: each session that arrives is one more task, whose test samples stay, and whose training
samples are let go when the session is over. So there is one session in memory at a time, beside the test sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from clstream.seeds import derive
from clstream.stream.samples import Samples, Subset, check_samples, content_hash, positives
from clstream.stream.sessions import Delivery, Session, Task, TestSet
from clstream.stream.stream import Stream, StreamView

FIRST_ROWS = 4
"""Training samples of the first session that are kept, to try a strategy on before it is run."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One session, as a source delivers it.

    Args:
        x: (n, *input_shape) inputs. None: these are the labels of inputs that came before under the same name.
        y: their labels, (n,) whole numbers or strings; other targets as in `Samples`. None: they come later, under the same name.
        name: of the session, which no other one has. "": its number.
        x_test, y_test: what to test on. None: a share of the samples is held out for that.

    """

    x: Any
    y: Any = None
    name: str = ""
    x_test: Any = None
    y_test: Any = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """What can't be learned: the name of a session, and the reason, in one sentence."""

    name: str
    reason: str


class NothingYetError(ValueError):
    """Nothing that can be learned has arrived, so nobody knows what the sessions will be like."""


class Reader(Protocol):
    """Reads a source, from its begin on."""

    ended: bool
    """Whether nothing more will come."""

    def next(self) -> Arrival | Refusal | None:
        """Return what has arrived next, with inputs and targets as `Samples` has them, or labels as strings; None: nothing yet."""
        ...

    def again(self, names: Sequence[str]) -> Iterator[Arrival | None]:
        """Yield the sessions that were delivered before, in that order, and go on after them; None for one that is gone."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what it must know to read the same again, in plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class Source(Protocol):
    """Where sessions come from."""

    def open(self) -> Reader:
        """Return what reads it from its begin on."""
        ...


@dataclass(eq=False)
class Progress:
    """What one run has had of a stream so far."""

    names: list[str]  # of classes that have one, in the order in which they came
    reader: Reader | None = None
    sessions: dict[str, str] = field(default_factory=dict)  # the hash of what was delivered, by name
    sizes: list[int] = field(default_factory=list)
    session: Session | None = None  # that is under way
    targets: Tensor | None = None  # of the newest session, all of them, in the order in which they came
    gone: list[str] = field(default_factory=list)  # sessions whose test samples could not be read again


@dataclass(frozen=True, eq=False, repr=False)
class ArrivingStream(Stream):
    """A stream whose sessions arrive. Its tasks are the sessions that came so far.

    Args:
        source: where they come from.
        first: the first session as a task, with a few of its training samples.
        first_size: how many it has.
        room: classes that there is room for; of values the outputs.
        share: of the samples of a session that is held out for its test, where it brings none.
        split_seed: of which samples are held out.
        given_names: of its classes, if there are such; other labels are set aside then.
        poll: seconds from one look at the source to the next, where nothing has arrived.

    """

    source: Source | None = None
    first: Task | None = None
    first_size: int = 0
    room: int = 0
    share: float = 0.2
    poll: float = 1.0
    split_seed: int = 0
    given_names: tuple[str, ...] = ()

    arrives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names, room = self.given_names, self.room
        object.__setattr__(self, "progress", Progress(list(names), sizes=[self.first_size]))
        if len(names) > room:
            raise ValueError(
                f"{self.name}: {len(names)} classes are named, and there is room for {room}: give classes={len(names)}"
            )
        super().__post_init__()
        if self.tasks != (self.first,) or self.schedule != (0,):
            raise ValueError(f"{self.name} arrives while it is learned, so no other stream can be made of it beforehand")
        self._changed()

    progress: Progress = field(init=False)

    def __len__(self) -> int:
        """Return the number of sessions that came so far; the first one is known from the start."""
        return len(self.tasks)

    @property
    def classes(self) -> int:
        """Number of classes that there is room for."""
        return 0 if self.target == "value" else self.room

    @property
    def outputs(self) -> int:
        """Number of outputs that a model needs."""
        return self.room

    @property
    def gaps(self) -> str:
        """Nothing: classes may come later."""
        return ""

    @property
    def visible(self) -> StreamView:
        """What strategies are given: nothing of the tasks, of which most are still to come."""
        return self.view

    @cached_property
    def view(self) -> StreamView:
        """See `visible`."""
        return replace(super().view, boundaries=self.boundaries)

    @cached_property
    def test_sets(self) -> tuple[TestSet, ...]:
        """The test samples of the sessions so far ("task_00", "task_01", ...), then the probes."""
        return (*(TestSet(f"task_{task.id:02d}", task.test, task.id) for task in self.tasks), *self.probes)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with what a session must be like: what is in them is checked as they come."""
        first = self.tasks[0].test[:1]
        about = (self.scenario, self.target, self.room, self.share, self.split_seed, self.given_names, tuple(first.x.shape[1:]))
        digest = hashlib.sha256(repr((about, str(first.x.dtype))).encode())
        for probe in self.probes:
            samples = probe.samples[:]
            digest.update(repr((probe.name, probe.known)).encode() + content_hash(samples.x) + content_hash(samples.y))
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        """Return the stream's card."""
        first = self.tasks[0].test[:1].x
        return "\n".join([
            f"{self.name}: {self.scenario}-incremental{'' if self.boundaries else ', boundaries hidden'}",
            f"  outputs      {self.outputs}, of {self.target} targets",
            f"  inputs       {tuple(first.shape[1:])} {str(first.dtype).removeprefix('torch.')}",
            f"  sessions     as they arrive, {self.epochs} epoch{'s' * (self.epochs != 1)} each, batches of {self.batch_size}",
            f"  test         {self.share:g} of each session, where it brings no test samples",
            f"  fingerprint  {self.fingerprint}",
            *(f"  probe        {probe.name}: {len(probe.samples):,} to test" for probe in self.probes),
            *(f"  note: {note}" for note in self.notes),
        ])  # fmt: skip

    def reseeded(self, seed: int) -> ArrivingStream:
        """Return the stream for one run, with a progress and tasks of its own."""
        assert self.first is not None
        progress = Progress(list(self.given_names), sizes=[self.first_size])
        twin = self._like(seed=self.seed + seed, tasks=(replace(self.first),), progress=progress)
        assert isinstance(twin, ArrivingStream)
        twin._changed()
        return twin

    def task_of(self, session: int) -> int:
        """Return the number of the task of a session: each is one."""
        return session

    def size_of(self, session: int) -> int:
        """Return how many samples a session delivers, or delivered."""
        return self.progress.sizes[session]

    def mix(self, session: int) -> Tensor:
        """Return how many samples of each task a session draws: (tasks,), int64."""
        return self.size_of(session) * (torch.arange(len(self.tasks)) == session)

    def _delivered(self, index: int) -> Samples | Subset:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has had the sessions 0 to {len(self) - 1}, not {index}")
        return self.tasks[index].train

    def deliver(self, index: int) -> Delivery:
        """Return a session that has arrived, and is to be learned now."""
        session = self.session(index)
        self.progress.session = session
        return Delivery(session, self.tasks[index], self.boundaries, self.boundaries)

    def release(self) -> None:
        """Let go of the training samples of the session that is over."""
        session = self.progress.session
        if session is not None:
            task = self.tasks[session.index]
            nothing = session.samples[:0]
            nothing = Samples(nothing.x.clone(), nothing.y.clone(), target=nothing.target)
            object.__setattr__(session, "samples", nothing)  # whoever still holds it has the samples no longer
            object.__setattr__(task, "train", nothing)
            self.progress.session = None

    def arrive(self) -> Task | Refusal | Arrival | None:
        """Look at the source: return the task of a session that has arrived, and is one of the stream's from now on.

        Or what can't be learned, with the reason; inputs whose labels come later; None if nothing has arrived yet. Whether anything
        will, `ended` says.
        """
        arrival = self.reader.next()
        if arrival is None or isinstance(arrival, Refusal):
            return arrival
        try:
            if arrival.name in self.progress.sessions:
                raise ValueError(
                    "a session of that name was learned before: it comes once, and more samples need a name of their own"
                )
            self._check_inputs(arrival.x)
            if arrival.y is None:
                return arrival
            train, test, names, digest = self._split(arrival)
            same = next((name for name, other in self.progress.sessions.items() if other == digest), None)
            if same is not None:
                raise ValueError(f"it has the very samples of {same}, which were learned before")
        except (ValueError, TypeError) as error:
            return Refusal(arrival.name, str(error))
        self.progress.names[:] = names
        self.progress.targets = numbered(arrival.y, names, self.room, fixed=True)
        return self._add(arrival.name, digest, train, test)

    @property
    def reader(self) -> Reader:
        """What reads the source."""
        if self.progress.reader is None:
            assert self.source is not None
            self.progress.reader = self.source.open()
        return self.progress.reader

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.reader.ended

    def _add(self, name: str, digest: str, train: Samples, test: Samples) -> Task:
        """Return a session as one more task; the first one takes the place of what is known from the start."""
        number = len(self.progress.sessions)
        classes = [] if self.target == "value" else labels_of(train) | labels_of(test)
        if self.resident and self.device is not None:
            train, test = train.to(self.device), test.to(self.device)
        task = Task(number, tuple(sorted(classes)), train, test)
        object.__setattr__(self, "tasks", (*self.tasks[:number], task))
        self.progress.sessions[name] = digest
        self.progress.sizes[number:] = [len(train)]
        self._changed()
        return task

    def labels(self, session: int) -> Tensor:
        """Return the targets that a session delivers, on the CPU; of one that is over, its classes, as many samples of one each."""
        train = self.tasks[session].train
        if len(train) or self.target == "value":
            return train.y.cpu()
        classes = torch.tensor(self.tasks[session].classes)
        return classes if self.target == "label" else torch.nn.functional.one_hot(classes, self.room).float()

    def _changed(self) -> None:
        """Look anew at what depends on the tasks, and on the names of the classes so far."""
        names = self.progress.names
        padded = (*names, *map(str, range(len(names), self.room))) if names else ()
        object.__setattr__(self, "class_names", padded)
        for name in ("test_sets", "_ends", "_pool", "_visits", "heads", "task_heads", "shares_classes"):
            vars(self).pop(name, None)

    def _check_inputs(self, x: Tensor) -> None:
        """Refuse inputs of another shape or dtype than those of the first session."""
        first = self.tasks[0].test[:1].x
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"it has inputs of {tuple(x.shape[1:])} {x.dtype}, and those of {self.name} are {tuple(first.shape[1:])} "
                f"{first.dtype}"
            )

    def _split(self, arrival: Arrival) -> tuple[Samples, Samples, list[str], str]:
        """Return what to learn and what to test on, the names of the classes by then, and a hash of all of it."""
        names = list(self.progress.names)
        y = numbered(arrival.y, names, self.room, bool(self.given_names))
        whole = Samples(arrival.x, y, target=self.target)
        self._check(whole)
        digest = hash_of(whole)
        if arrival.x_test is None:
            train, test = held_out(whole, self.share, self.split_seed)
        else:
            train = whole
            test = Samples(arrival.x_test, numbered(arrival.y_test, names, self.room, bool(self.given_names)), target=self.target)
            self._check_inputs(test.x)
            self._check(test)
            digest += hash_of(test)
        if self.drop_last and len(train) < self.batch_size:
            raise ValueError(
                f"it has {len(train)} samples to learn, too few for a batch of {self.batch_size}, and drop_last leaves out others"
            )
        return train, test, names, digest

    def _check(self, part: Samples) -> None:
        if not len(part.y):
            raise ValueError("it has no samples")
        check_samples(part, "its samples", None, set())
        if part.target == "label":
            most = int(part.y.max())
            if int(part.y.min()) < 0:
                raise ValueError(f"it has the label {int(part.y.min())}, and labels are numbers from 0 up")
            if most >= self.room:
                raise ValueError(
                    f"it has the label {most}, and there is room for {self.room} classes: give classes={most + 1} or more"
                )
        elif part.y.shape[1] != self.room:
            raise ValueError(f"its targets have {part.y.shape[1]} columns, and those of {self.name} {self.room}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to know of what came, in plain values."""
        progress = self.progress
        return {
            "sessions": [[name, digest] for name, digest in progress.sessions.items()],
            "sizes": list(progress.sizes),
            "names": list(progress.names),
            "source": self.reader.state_dict(),
        }

    def load_state_dict(self, state: object, session: int, under_way: bool) -> None:
        """Read again what came before a checkpoint: test samples, and of the session under way what is learned.

        Test samples that are gone are asked about no more: `progress.gone` has the names of their sessions.

        Raises ValueError for what is no state, or a source that has something else now.
        """
        came = check_state(state, session + under_way)
        names = [name for name, _ in came["sessions"]]
        reader = self.reader
        reader.load_state_dict(came["source"])
        self.progress.names[:] = came["names"]
        for number, ((name, digest), arrival) in enumerate(zip(came["sessions"], reader.again(names), strict=True)):
            needed = under_way and number == session
            if arrival is None:
                if needed:
                    raise ValueError(f"the session {name} is under way, and {self.name} no longer has it: put it back")
                self._add(name, digest, self._nothing(), self._nothing())
                self.progress.gone.append(name)
            else:
                try:
                    train, test, _, now = self._split(arrival)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"the session {name} is not what it was when it was learned: {error}") from None
                if now != digest:
                    raise ValueError(
                        f"the session {name} is not what it was when it was learned: put back what it was, or take it away"
                    )
                self._add(name, digest, train if needed else self._nothing(), test)
        self.progress.sizes[:] = came["sizes"]

    def _nothing(self) -> Samples:
        first = self.tasks[0].test[:1]
        return Samples(first.x[:0].clone(), first.y[:0].clone(), target=first.target)


def check_state(state: object, sessions: int) -> dict[str, Any]:
    """Return what a checkpoint has of a stream that arrives. Raises ValueError for what it can't have."""
    kinds = {"sessions": list, "sizes": list, "names": list, "source": dict}
    right = isinstance(state, dict) and state.keys() == kinds.keys() and all(isinstance(state[key], kinds[key]) for key in kinds)
    if right and isinstance(state, dict):
        pairs = [pair for pair in state["sessions"] if isinstance(pair, list) and len(pair) == 2]
        texts = [*state["names"], *(text for pair in pairs for text in pair)]
        right = len(pairs) == len(state["sessions"]) == sessions and all(isinstance(text, str) for text in texts)
        right = right and len({pair[0] for pair in pairs}) == sessions
        right = right and len(state["sizes"]) == max(1, sessions) and all(type(size) is int and size > 0 for size in state["sizes"])
        if right:
            return state
    raise ValueError(f"the checkpoint is no good: it doesn't name the {sessions} sessions that came")


def labels_of(part: Samples) -> set[int]:
    """Return the classes of some samples: labels, or columns with a positive."""
    return set(part.y.unique().tolist()) if part.target == "label" else set(positives(part.y))


def numbered(y: Any, names: list[str], room: int, fixed: bool) -> Tensor:
    """Return targets as a tensor; labels that are strings are numbered as `names` has them, and new ones are added there.

    Raises ValueError for a name that there is no room for, or that is none of those that were given, if these are `fixed`.
    """
    if isinstance(y, Tensor):
        return y
    values = np.asarray(y, dtype=np.str_)
    own, places = np.unique(values, return_inverse=True)
    for name in map(str, own):
        if name not in names:
            if fixed:
                raise ValueError(f"it has the class {name!r}, and the classes are {', '.join(names)}")
            if len(names) >= room:
                raise ValueError(
                    f"it has the class {name!r}, and there is room for {room} classes: give classes={room + 1} or more"
                )
            names.append(name)
    return torch.tensor([names.index(str(name)) for name in own])[torch.from_numpy(places.reshape(-1))]


def hash_of(part: Samples) -> str:
    """Return sixteen hexadecimal digits that change with any input or target."""
    return hashlib.sha256(content_hash(part.x) + content_hash(part.y)).hexdigest()[:16]


def held_out(whole: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Return samples to learn, and a share of them to test on, at least one of each. Raises ValueError for a single sample.

    Which these are is a pure function of the samples and the seed.
    """
    if len(whole) < 2:
        raise ValueError("it has one sample, and one is held out for the test")
    count = min(len(whole) - 1, max(1, round(share * len(whole))))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(derive(seed, "test", hash_of(whole))))
    return whole[order[count:].sort().values], whole[order[:count].sort().values]
