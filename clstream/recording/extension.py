"""Extension: a recording gets the sessions that came after those it has; what it has is compared first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from clstream.recording.reader import Recording, read
from clstream.stream import Samples, Stream, Subset, content_hash

_SAME = ("scenario", "epochs", "batch_size", "seed", "boundaries", "shuffle", "drop_last")
"""What a replay takes for all of its sessions, so that a longer recording must have it too."""


def check_extends(stream: Stream, file: Path) -> Recording:
    """Return the recording in a file, which is the begin of a stream: of each task and session the very samples.

    Raises:
        ValueError: if the stream begins otherwise, or the recording can't be read.
        OSError: if there is none.

    """
    recording = read(file)
    past = recording.replay(recording.find_parts(stream), f"the data of {stream.name}", dict(_functions(stream)))

    def refuse(what: str) -> ValueError:
        return ValueError(f"{stream.name} doesn't begin with what {file} has: {what}. Give one that does, or write another file")

    for name in _SAME:
        if (then := getattr(past, name)) != (now := getattr(stream, name)):
            raise refuse(f"its {name} was {then!r}, and is {now!r}")
    if repr(past.augment) != repr(stream.augment):
        raise refuse(f"its augmentation was {past.augment!r}, and is {stream.augment!r}")
    if past.class_names != stream.class_names[: len(past.class_names)]:
        raise refuse("classes have other names")
    if len(past.tasks) > len(stream.tasks) or len(past) > len(stream):
        raise refuse(
            f"it has {len(past.tasks)} tasks and {len(past)} sessions, and {stream.name} has {len(stream.tasks)} and {len(stream)}"
        )
    for task, other in zip(past.tasks, stream.tasks, strict=False):
        if (task.classes, task.target) != (other.classes, other.target) or _hash(task.test) != _hash(other.test):
            raise refuse(f"task {task.id} has other classes or test samples")
    for number in range(len(past)):
        if past.task_of(number) != stream.task_of(number):
            raise refuse(f"session {number} is of another task")
        if _hash(past.session(number).samples) != _hash(stream.session(number).samples):
            raise refuse(f"session {number} delivers other samples")
    return recording


def _hash(samples: Samples | Subset) -> tuple[bytes, bytes]:
    whole = samples[:]
    return content_hash(whole.x), content_hash(whole.y)


def _functions(stream: Stream) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the transforms and the augmentation of a stream, by the names that a recording has for them."""
    parts = [part for task in stream.tasks for part in (task.train, task.test, task.validation)]
    for part in (*parts, *(probe.samples for probe in stream.probes)):
        if isinstance(part, Subset) and part.transform is not None:
            yield type(part.transform).__name__, type(part.transform)
    if isinstance(stream.augment, FunctionType):
        yield stream.augment.__name__, stream.augment
    elif stream.augment is not None:
        yield type(stream.augment).__name__, type(stream.augment)
