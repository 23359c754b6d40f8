"""History: what a stream has delivered so far, as those must know it that go on with another stream where its data is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clstream.stream.samples import TARGETS, Samples
from clstream.stream.sessions import MixedSchedule, Task, TestSet
from clstream.stream.stream import SCENARIOS, Stream


@dataclass(frozen=True, slots=True)
class PastTask:
    """What is known of a task when its samples may be gone.

    Args:
        classes, target: as of `Task`.
        content: sixteen hexadecimal digits that change with its targets, and with some of its inputs: see `Stream.contents`.

    """

    classes: tuple[int, ...]
    target: str
    content: str


@dataclass(frozen=True, slots=True)
class History:
    """The tasks and sessions of a stream without their samples: data for a file.

    Args:
        name, scenario, input_shape, dtype, classes, outputs, class_names: of the stream.
        tasks: its tasks.
        visits: for each session the task that it is of, the share of that task's samples that it draws, and how many shares there
            are; of a stream whose sessions mix tasks three times 0.
        mixture: the `repr` of a schedule whose sessions mix tasks; "" of others.
        gone: how many of the first tasks have no samples any more.

    """

    name: str
    scenario: str
    input_shape: tuple[int, ...]
    dtype: str
    classes: int
    outputs: int
    class_names: tuple[str, ...]
    tasks: tuple[PastTask, ...]
    visits: tuple[tuple[int, int, int], ...]
    mixture: str = ""
    gone: int = 0

    @classmethod
    def of(cls, stream: Stream, before: History | None = None, gone: int = 0) -> History:
        """Return the history of a stream; of its first tasks, `gone` of them, and their sessions it is what `before` says."""
        own = [PastTask(task.classes, task.target, stream.contents[task.id]) for task in stream.tasks]
        tasks = tuple(own) if before is None else (*before.tasks[:gone], *own[gone:])
        mixed = isinstance(stream.schedule, MixedSchedule)
        past = before.visits if before is not None and gone else ()
        later = len(stream) - len(past)
        visits = (*past, *([(0, 0, 0)] * later if mixed else stream.visits[len(past) :]))
        dtype = str(stream.tasks[-1].test[:1].x.dtype).removeprefix("torch.")
        return cls(
            stream.name, stream.scenario, stream.input_shape, dtype, stream.classes, stream.outputs, stream.class_names, tasks,
            visits, repr(stream.schedule) if mixed else "", gone,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` takes."""
        return {
            "name": self.name, "scenario": self.scenario, "input_shape": list(self.input_shape), "dtype": self.dtype,
            "classes": self.classes, "outputs": self.outputs, "class_names": list(self.class_names),
            "tasks": [[list(task.classes), task.target, task.content] for task in self.tasks],
            "visits": [list(visit) for visit in self.visits], "mixture": self.mixture, "gone": self.gone,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Return the history whose `to_dict` gave these values. Raises ValueError for values that no history gives."""
        try:
            right = all(type(values[name]) is str for name in ("name", "scenario", "dtype", "mixture"))
            right &= values["scenario"] in SCENARIOS and isinstance(getattr(torch, values["dtype"]), torch.dtype)
            right &= all(type(name) is str for name in values["class_names"]) and values["gone"] <= len(values["tasks"])
            right &= _are_sizes([values["classes"], values["outputs"], values["gone"]]) and _are_sizes(values["input_shape"])
            right &= all(_are_sizes(classes) and target in TARGETS and type(content) is str for classes, target, content in
                         values["tasks"])  # fmt: skip
            right &= all(_are_sizes(visit) and len(visit) == 3 and visit[0] < len(values["tasks"]) for visit in values["visits"])
            right &= len(values["tasks"]) > 0 and len(values["visits"]) > 0 and len(values) == 11
        except (KeyError, TypeError, AttributeError, ValueError):
            right = False
        if not right:
            raise ValueError("these can't be the values of a History")
        tasks = tuple(PastTask(tuple(classes), target, content) for classes, target, content in values["tasks"])
        return cls(
            values["name"], values["scenario"], tuple(values["input_shape"]), values["dtype"], values["classes"], values["outputs"],
            tuple(values["class_names"]), tasks, tuple((task, part, parts) for task, part, parts in values["visits"]),
            values["mixture"], values["gone"],
        )  # fmt: skip

    def taught(self, sessions: int) -> list[int]:
        """Return the tasks that the first so many sessions may be of, each once."""
        if self.mixture:
            return list(range(len(self.tasks)))
        return list(dict.fromkeys(task for task, _, _ in self.visits[:sessions]))

    def begins(self, stream: Stream, sessions: int) -> bool:
        """Return whether the first so many sessions of a stream are those of this history."""
        other = History.of(stream)
        if self.mixture or other.mixture:
            return self.mixture == other.mixture and self.tasks == other.tasks
        return self.visits[:sessions] == other.visits[:sessions] and all(
            task < len(other.tasks) and self.tasks[task] == other.tasks[task] for task in self.taught(sessions)
        )

    def check_follows(self, stream: Stream, sessions: int) -> None:
        """Refuse a stream that can't come after the first so many sessions of this history, in a sentence. Raises ValueError."""
        dtype = str(stream.tasks[-1].test[:1].x.dtype).removeprefix("torch.")
        if (stream.input_shape, dtype) != (self.input_shape, self.dtype):
            raise ValueError(
                f"{self.name} had inputs of {self.input_shape} {self.dtype}, and {stream.name} has those of {stream.input_shape} "
                f"{dtype}: a run goes on with inputs of one shape and dtype"
            )
        past = {task.target for task in self.tasks}
        if past != {*stream.targets} or ("label" not in past and self.outputs != stream.outputs):
            raise ValueError(
                f"{self.name} had {' and '.join(sorted(past))} targets of {self.outputs} outputs, and {stream.name} has "
                f"{' and '.join(stream.targets)} targets of {stream.outputs}: a run goes on with targets of one kind"
            )
        if stream.scenario != self.scenario:
            raise ValueError(f"{self.name} was {self.scenario}-incremental, and {stream.name} is {stream.scenario}-incremental")
        for label, (then, now) in enumerate(zip(self.class_names, stream.class_names, strict=False)):
            if then != now:
                raise ValueError(
                    f"label {label} was {then!r} in {self.name}, and is {now!r} in {stream.name}: number new classes from "
                    f"{self.classes} up"
                )
        taught = {self.tasks[task].content: task for task in self.taught(sessions)}
        for task in stream.tasks:
            if (before := taught.get(stream.contents[task.id])) is not None:
                raise ValueError(
                    f"task {task.id} of {stream.name} is what was learned already, as task {before} of {self.name}: give new data, "
                    "or a stream that begins with the sessions that were learned, in their order"
                )

    def followed_by(self, stream: Stream) -> Stream:
        """Return a stream with the tasks and sessions of this history, without samples, and then those of another stream."""
        first, sessions = len(self.tasks), len(self.visits)
        names = self.class_names if len(self.class_names) >= len(stream.class_names) else stream.class_names
        empty = {task.target: self._no_samples(task.target) for task in self.tasks}
        tasks = [Task(number, task.classes, empty[task.target], empty[task.target]) for number, task in enumerate(self.tasks)]
        tasks += [replace(task, id=first + task.id) for task in stream.tasks]
        probes = [probe if probe.task is None else replace(probe, task=first + probe.task) for probe in stream.probes]
        past = tuple(task for task, _, _ in self.visits)
        schedule: MixedSchedule | tuple[int, ...]
        if isinstance(stream.schedule, MixedSchedule):
            schedule = Later(sessions, stream.schedule)
        else:
            assert stream.schedule is not None
            schedule = (*past, *(first + task for task in stream.schedule))
        return stream.joined(tasks, schedule, probes, names if len(names) == max(self.classes, stream.classes) else ())

    def with_lost_probes(self, stream: Stream, names: Sequence[str]) -> Stream:
        """Return a stream with test sets without samples in place of probes, by name, that it hasn't."""
        lost = [name for name in names if name not in {probe.name for probe in stream.probes}]
        probes = [TestSet(name, self._no_samples(self.tasks[0].target)) for name in lost]
        return stream.joined(stream.tasks, stream.schedule, (*stream.probes, *probes), stream.class_names) if lost else stream

    def _no_samples(self, target: str) -> Samples:
        x = torch.empty(0, *self.input_shape, dtype=getattr(torch, self.dtype))
        y = torch.empty(0, dtype=torch.int64) if target == "label" else torch.empty(0, self.outputs)
        return Samples(x, y, target=target)


@dataclass(frozen=True)
class Later:
    """A schedule that comes after `sessions` sessions, which draw nothing any more."""

    sessions: int
    schedule: MixedSchedule

    @property
    def once(self) -> bool:
        """Whether a training sample comes in one session at most."""
        return self.schedule.once

    def __len__(self) -> int:
        return self.sessions + len(self.schedule)

    def draw(self, session: int) -> Tensor:
        """Return what a session draws."""
        return torch.empty(0, dtype=torch.int64) if session < self.sessions else self.schedule.draw(session - self.sessions)


def _are_sizes(numbers: Sequence[Any]) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
