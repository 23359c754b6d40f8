"""Streams that drift: the training samples of any stream's tasks, mixed over time as a schedule says.

Either each sample comes once (`Dealt`): it has a moment, drawn from the schedule's weights of its part over time, and a session
delivers the samples of its span of time. What is kept is this order, 16 bytes a sample, however many sessions there are. Or a
session draws as many samples as it is told, each a part by the weights at its moment, and then any sample of that part, with
replacement (`Drawn`): nothing is kept but the rows by part, and a stream may be as long as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from clstream.streams.options import check_options
from clstream.streams.schedules import Parts, Schedule
from torch import Tensor

from clstream.params import check_integer, check_number
from clstream.seeds import derive
from clstream.stream import MixedSchedule, Samples, Stream, Subset, content_hash

_MOST = 65536  # moments, at most, at which the weights of a stream that is drawn are checked before it is run
_GRID = 4096  # moments, at least, at which the weights are looked at to give each sample its own


@dataclass(frozen=True, eq=False)
class Dealt:
    """Each training sample once, in an order of its own; see `MixedSchedule`.

    Args:
        rule: the schedule, or what else says when samples come.
        sessions: how many.
        order: (samples,), int64: the training samples in the order in which they come.
        moments: (samples,), float64: when they come, from 0 to below 1, rising.
        straddle: whether sessions are of equal size, cut at any moment; if not, of equal spans of time.
        delay: mean time, in sessions, from a sample to its label, which is in the moments; see `drifting`.

    """

    rule: Schedule | str
    sessions: int
    order: Tensor
    moments: Tensor
    straddle: bool = False
    delay: float = 0.0
    once: bool = True

    def __repr__(self) -> str:
        sizes = "of equal size" if self.straddle else "of equal time"
        return f"{self.rule}; each sample once, in sessions {sizes}{_late(self.delay)}; order {content_hash(self.order).hex()[:8]}"

    def __len__(self) -> int:
        return self.sessions

    def bounds(self, session: Tensor) -> Tensor:
        """Return where sessions begin in the order."""
        if self.straddle:
            return session * len(self.order) // self.sessions
        return torch.searchsorted(self.moments, session.double() / self.sessions)

    def draw(self, session: int) -> Tensor:
        """Return what a session draws: see `MixedSchedule`."""
        first, end = self.bounds(torch.tensor([session, session + 1])).tolist()
        return self.order[first:end]


@dataclass(frozen=True, eq=False)
class Drawn:
    """So many samples a session, drawn at random with replacement; see `MixedSchedule`.

    Args:
        schedule: the weights over time.
        parts: of the data.
        rows: (samples,), int64: the training samples, part after part.
        sizes: (parts,), int64: how many each part has.
        sessions, size: how many sessions, of how many samples.
        seed: of all draws.
        straddle: whether the weights may change within a session; if not, they are those of its middle.
        delay: mean time, in sessions, from a sample to its label; see `drifting`.

    """

    schedule: Schedule
    parts: Parts
    rows: Tensor
    sizes: Tensor
    sessions: int
    size: int
    seed: int = 0
    straddle: bool = False
    delay: float = 0.0
    once: bool = False

    def __repr__(self) -> str:
        steady = "" if self.straddle else ", weights steady within a session"
        return (
            f"{self.schedule}; {self.size} samples a session, drawn with replacement by seed {self.seed}{steady}{_late(self.delay)}"
        )

    def __len__(self) -> int:
        return self.sessions

    def draw(self, session: int) -> Tensor:
        """Return what a session draws: see `MixedSchedule`."""
        draw = torch.Generator().manual_seed(derive(self.seed, "draw", session))
        which, place, late = torch.rand(3, self.size, generator=draw, dtype=torch.float64)
        within = (torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size if self.straddle else torch.full_like(which, 0.5)
        at = (session + within) / self.sessions
        if self.delay:  # exponential, given that the sample came since the stream began
            mean = self.delay / self.sessions
            at = at + mean * torch.log1p(-late * -torch.expm1(-at / mean))
        steady = not (self.straddle or self.delay)
        weights = weights_at("this stream", self.schedule, at[:1] if steady else at, self.parts)
        ends = weights.cumsum(1).expand(self.size, -1).contiguous()
        part = torch.searchsorted(ends, which[:, None] * ends[:, -1:] * (1 - 1e-12), right=True).flatten()
        first = self.sizes.cumsum(0) - self.sizes
        return self.rows[first[part] + (place * self.sizes[part]).long()]


def drifting(
    stream: Stream,
    schedule: Schedule,
    sessions: int | None = None,
    session_size: int | None = None,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    name: str | None = None,
    drop_last: bool | None = None,
) -> Stream:
    """Mix the training samples of a stream's tasks over time, as a schedule says; strategies are not told of tasks.

    The tasks, tested one by one, stay as they are. A session counts as teaching the task that most of its samples are of.

    Args:
        stream: whose samples, of any source and kind; its own schedule is left out.
        schedule: the weights of classes and tasks over time.
        sessions: how many. None: four for each of the segments between jumps of the weights, or 20 if they don't jump.
        session_size: samples of a session, drawn at random with replacement. None: each sample comes once, and a session
            delivers those of its span of time.
        straddle: whether a boundary may fall within a session, and so within a batch. If not, the weights jump between sessions
            only, and the number of sessions must be a multiple of that of the segments between the jumps. If so, sessions have
            equal sizes.
        delay: how late labels come on average, in sessions, each by a random time of its own (exponential). A batch comes with its
            labels here, so a label that comes late means that its sample is delivered late; those that are still awaited at
            the end come in the last session if each sample comes once. The same delay for all would change nothing.
        shuffle: whether each pass over a session has an order of its own; if not, samples come in the order of the drift.
        seed: of which samples come when. A run's own seed moves the order within sessions only.
        name: how tables and MLflow call the stream. None: as the stream.
        drop_last: whether each pass leaves out the last batch if it is not full. None: as the stream.

    Raises:
        ValueError: for options that don't fit, or a session that would be empty.

    """
    check_options(locals(), "sessions", "session_size", "drop_last")
    name = name or stream.name
    check_schedule(name, schedule)
    parts, rows, sizes = parts_of(stream)
    segments = schedule.segments(parts)
    if not hasattr(segments, "__index__") or segments < 1:
        raise ValueError(
            f"{name}: the segments of {type(schedule).__name__} must be a whole number of at least 1, not {segments!r}"
        )
    if sessions is None:
        sessions = 4 * segments if segments > 1 else 20
    _check_sessions(name, sessions, delay)
    if not straddle and sessions % segments:
        raise ValueError(
            f"{name}: {sessions} sessions don't divide evenly into the {segments} segments of the schedule: take "
            f"{max(1, sessions // segments) * segments} or another multiple, or let sessions straddle a boundary (straddle=True)"
        )
    mixture: MixedSchedule
    if session_size is None:
        moments = _moments(name, schedule, parts, rows, sizes, segments, seed)
        mixture = _dealt(name, schedule, moments, sessions, straddle, delay, seed)
    else:
        looked_at = min(sessions, _MOST)
        weights_at(name, schedule, (torch.arange(looked_at, dtype=torch.float64) + 0.5) / looked_at, parts)
        mixture = Drawn(schedule, parts, rows, sizes, sessions, session_size, seed, straddle, delay)
    dropping = stream.drop_last if drop_last is None else drop_last
    return replace(stream, name=name, schedule=mixture, boundaries=False, shuffle=shuffle, drop_last=dropping)


def at_moments(
    stream: Stream,
    moments: Tensor,
    what: str,
    sessions: int = 20,
    straddle: bool = False,
    delay: float = 0.0,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool | None = None,
) -> Stream:
    """Deliver each training sample of a stream once, at a moment of its own; strategies are not told of tasks.

    Args:
        stream: whose samples.
        moments: (samples,), from 0 to below 1, for the training samples of all tasks, those of task 0 first.
        what: the name of that order, for the card.
        sessions, straddle, delay, shuffle, seed, drop_last: see `drifting`.

    Raises:
        ValueError: for moments out of range, or a session that would be empty.

    """
    check_options(locals(), "drop_last")
    count = sum(len(task.train) for task in stream.tasks)
    if moments.shape != (count,) or not bool(((moments >= 0) & (moments < 1)).all()):
        raise ValueError(f"{stream.name}: there must be a moment from 0 to below 1 for each of the {count} training samples")
    _check_sessions(stream.name, sessions, delay)
    mixture = _dealt(stream.name, what, moments.double(), sessions, straddle, delay, seed)
    dropping = stream.drop_last if drop_last is None else drop_last
    return replace(stream, schedule=mixture, boundaries=False, shuffle=shuffle, drop_last=dropping)


def parts_of(stream: Stream) -> tuple[Parts, Tensor, Tensor]:
    """Return the parts of a stream, the numbers of its training samples part after part, and the size of each part.

    The training samples of a task whose targets are no labels are one part, which counts as having one label, the task's number.
    """
    if len(stream.targets) > 1:
        raise ValueError(f"{stream.name} has {' and '.join(stream.targets)} targets: a stream that drifts has one kind")
    tasks = torch.repeat_interleave(torch.tensor([len(task.train) for task in stream.tasks]))
    if stream.targets != ("label",):
        numbers = torch.arange(len(stream.tasks))
        return Parts(numbers, numbers, len(stream.tasks)), torch.arange(len(tasks)), tasks.bincount()
    labels = torch.cat([task.train.y.cpu() for task in stream.tasks])
    keys, part, sizes = (tasks * stream.classes + labels).unique(return_inverse=True, return_counts=True)
    return Parts(keys // stream.classes, keys % stream.classes, len(stream.tasks)), part.argsort(stable=True), sizes


def check_schedule(name: str, schedule: Schedule) -> None:
    """Raise TypeError for what is no schedule, ValueError for one that doesn't say what it is."""
    methods = (getattr(schedule, method, None) for method in ("weights", "segments"))
    if isinstance(schedule, type) or not all(callable(method) for method in methods):
        raise TypeError(f"{name}: the schedule must be an object such as Transitions(0.5), not {schedule!r}")
    if " at 0x" in repr(schedule):
        raise ValueError(f"{name}: fingerprints hold what a schedule is: make {type(schedule).__name__} a dataclass")


def weights_at(name: str, schedule: Schedule, at: Tensor, parts: Parts, lasting: bool = True) -> Tensor:
    """Return a schedule's weights at some moments: (moments, parts), float64.

    Raises ValueError for what are none, or if `lasting` and nothing has a weight at some moment.
    """
    weights: object = schedule.weights(at, parts)
    what, shape = f"{name}: the weights of {type(schedule).__name__}", (len(at), len(parts))
    if not isinstance(weights, Tensor) or weights.shape != shape:
        given = f"of {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"but a {type(weights).__name__}"
        raise ValueError(f"{what} must be a tensor of (moments, parts), {shape}, not {given}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{what} must be finite numbers from 0 up")
    if lasting and len(empty := (weights.sum(1) <= 0).nonzero()):
        raise ValueError(f"{what} are all 0 at the moment {float(at[empty[0]]):.4f} of 1, so there is nothing to draw")
    return weights.double()


def _late(delay: float) -> str:
    return f", labels {delay:g} sessions late on average" if delay else ""


def _check_sessions(name: str, sessions: int, delay: float) -> None:
    check_integer(1, sessions=sessions)
    check_number(0, delay=delay)
    if delay > sessions:
        raise ValueError(f"{name}: delay must be from 0 to the number of sessions, {sessions}, not {delay}")


def _moments(name: str, schedule: Schedule, parts: Parts, rows: Tensor, sizes: Tensor, segments: int, seed: int) -> Tensor:
    """Return when each training sample comes: those of a part are spread over time as its weights are, evenly but for chance."""
    cells = segments * -(-_GRID // segments)  # no jump falls within a cell
    weights = weights_at(name, schedule, (torch.arange(cells, dtype=torch.float64) + 0.5) / cells, parts, lasting=False)
    draw = torch.Generator().manual_seed(derive(seed, "moments"))
    moments = torch.empty(len(rows), dtype=torch.float64)
    first = 0
    for part, size in enumerate(sizes.tolist()):
        ends = weights[:, part].cumsum(0)
        if not ends[-1] > 0:
            raise ValueError(f"{name}: the schedule never draws class {parts.labels[part]} of task {parts.tasks[part]}")
        amount = (torch.arange(size) + torch.rand(size, generator=draw, dtype=torch.float64)) / size * ends[-1]
        cell = torch.searchsorted(ends, amount, right=True).clamp(max=cells - 1)
        rest = (amount - ends[cell] + weights[cell, part]) / weights[cell, part]
        moment = (cell + rest.nan_to_num(0.0).clamp(0, 1 - 1e-9)) / cells
        moments[rows[first : first + size]] = moment[torch.randperm(size, generator=draw)]
        first += size
    return moments


def _dealt(name: str, rule: Schedule | str, moments: Tensor, sessions: int, straddle: bool, delay: float, seed: int) -> Dealt:
    """Return the samples in the order of their moments, after their labels' delays."""
    if sessions > len(moments):
        raise ValueError(f"{name}: {sessions} sessions can't share {len(moments)} samples, each once: take fewer sessions")
    if delay:
        late = torch.empty_like(moments).exponential_(generator=torch.Generator().manual_seed(derive(seed, "delay")))
        moments = moments + delay / sessions * late
    moments, order = moments.sort(stable=True)
    dealt = Dealt(rule, sessions, order, moments.clamp(max=1 - 1e-12), straddle, delay)
    empty = (dealt.bounds(torch.arange(sessions + 1)).diff() < 1).nonzero().flatten()
    if len(empty):
        hint = "take fewer sessions" if straddle else "take fewer sessions, or ones of equal size (straddle=True)"
        raise ValueError(f"{name}: session {int(empty[0])} of {sessions} would get none of the {len(order)} samples: {hint}")
    return dealt


def long_tailed(stream: Stream, ratio: float = 100.0, shuffled: bool = True, seed: int = 0) -> Stream:
    """Leave fewer training samples of each class than of the one before: as many of the last as of the first, by `ratio`.

    Args:
        stream: whose samples.
        ratio: of the samples left of the first class to those of the last, where both had as many. At least one is left.
        shuffled: whether the classes are in a random order; if not, by label.
        seed: of that order, and of which samples are left.

    """
    check_options(locals())
    labels = sorted({label for task in stream.tasks for label in task.classes})
    ranks = torch.arange(len(labels))
    if shuffled:
        ranks = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive(seed, "tail")))
    left = dict(zip(labels, (ratio ** -(ranks / max(1, len(labels) - 1))).tolist(), strict=True))
    return _thinned(stream, f"long tail: {ratio:g} to 1", seed, lambda _, label, count: max(1, round(left[label] * count)))


def few_shot(stream: Stream, shots: int = 5, after: int = 1, seed: int = 0) -> Stream:
    """Leave only a few training samples of each class in all tasks but the first ones.

    Args:
        stream: whose samples.
        shots: samples left of each class.
        after: how many tasks keep all of theirs.
        seed: of which are left.

    Raises ValueError for a class of a later task that has fewer samples.
    """
    check_options(locals())

    def left(task: int, label: int, count: int) -> int:
        if task >= after and count < shots:
            raise ValueError(f"{stream.name} has {count} training samples of class {label}: that is too few for {shots} shots")
        return count if task < after else shots

    note = f"few shots: {shots} a class, from task {after} on"
    return _thinned(stream, note, seed, left)


def _thinned(stream: Stream, note: str, seed: int, left: Callable[[int, int, int], int]) -> Stream:
    """Leave so many training samples of each task and label, at random, in the order that they have."""
    if stream.targets != ("label",):
        raise ValueError(f"{stream.name} has {' and '.join(stream.targets)} targets: samples are left out by label only")
    if isinstance(stream.schedule, MixedSchedule):
        raise ValueError(f"{stream.name} drifts already: leave samples out of the stream that `drifting` is given")

    def thin(number: int, part: Samples | Subset) -> Samples | Subset:
        draw = torch.Generator().manual_seed(derive(seed, "left", number))
        labels, kept = part.y.cpu(), []
        for label in labels.unique().tolist():
            own = (labels == label).nonzero().flatten()
            kept.append(own[torch.randperm(len(own), generator=draw)[: left(number, label, len(own))]])
        rows = torch.cat(kept).sort().values.to(labels.device)
        return part.take(rows) if isinstance(part, Subset) else part[rows]

    tasks = [replace(task, train=thin(task.id, task.train)) for task in stream.tasks]
    return replace(stream, tasks=tasks, notes=(*stream.notes, note))
