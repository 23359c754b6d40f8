"""Streams that are recorded, and what two equal ones have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from clstream.streams import (
    blobs,
    from_tensors,
    multilabel_canvas,
    permuted_mnist,
    rotated_mnist,
    split_digits,
    split_mnist,
    split_regression,
)
from clstream.streams.probes import corrupted, held_out_classes, unknown
from torch import Tensor

from clstream import Samples, Stream, Subset, Task
from clstream.stream import content_hash


def pictures(n: int = 60, first: int = 0) -> Samples:
    draw = torch.Generator().manual_seed(first)
    return Samples(torch.randint(0, 256, (n, 1, 6, 6), generator=draw).to(torch.uint8), torch.arange(n) % 6)


def own(**options) -> Stream:
    train, test = pictures(), pictures(24, 1)
    return from_tensors(train.x, train.y, test.x, test.y, **{"name": "pictures", "tasks": 3, "batch_size": 7, **options})


@dataclass(frozen=True)
class Invert:
    highest: int = 255

    def __call__(self, x: Tensor) -> Tensor:
        return self.highest - x


def flip(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def by_hand(transform: Callable[[Tensor], Tensor] | None = None, **options) -> Stream:
    """Domains of samples in mixed forms: plain, subsets of all and of some rows, labels that are no function of others."""
    source, tested = pictures(), pictures(24, 1)
    mixed = Samples(source.x, torch.randint(0, 6, (60,), generator=torch.Generator().manual_seed(5)))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(6))
    tasks = [
        Task(0, tuple(range(6)), Subset(source, torch.arange(60)), tested),
        Task(1, tuple(range(6)), Subset(mixed, rows[:40], transform), Subset(tested, torch.arange(24), transform).cache(),
             Subset(mixed, rows[40:], transform)),
        Task(2, tuple(range(6)), pictures(60, 2), Subset(tested, torch.arange(0, 24, 2))),
    ]  # fmt: skip
    return Stream("by hand", tasks, scenario="domain", **{"batch_size": 9, **options})


def probed(stream: Stream) -> Stream:
    """Return a stream with probes of all makes that are for it."""
    images = len(stream.input_shape) == 3
    kinds = ("noise", "blur", "occlusion", "contrast") if images else ("noise",)
    left = [held_out_classes(stream)] if images else []
    return stream.with_probes(*(corrupted(stream, kind, 2, 10) for kind in kinds), *left)


def digest(stream: Stream, seed: int = 0) -> str:
    """Return a digest of all that a run is given: every batch of every pass, its task, and what is tested."""
    found = hashlib.sha256()
    for session in stream.reseeded(seed):
        for epoch in session:
            found.update(repr((session.index, len(session), epoch.index, len(epoch))).encode() + epoch.order().numpy().tobytes())
            for batch in epoch:
                task = None if batch.task_hidden else (batch.task.id, batch.task.classes)
                found.update(repr((batch.index, task)).encode())
                found.update(content_hash(batch.samples.x) + content_hash(batch.samples.y))
    for part in (part for task in stream.tasks for part in (task.train, task.test, task.validation)):
        found.update(b"none" if part is None else content_hash(part.x) + content_hash(part.y) + part.target.encode())
    for probe in stream.probes:
        found.update(repr((probe.name, probe.task, probe.known, probe.samples.target)).encode())
        found.update(content_hash(probe.samples.x) + content_hash(probe.samples.y))
    return found.hexdigest()


def recounted(stream: Stream) -> str:
    """Return the fingerprint as it is counted anew from what the stream is made of."""
    return replace(stream).fingerprint


def sizes(stream: Stream) -> dict[str, object]:
    names = (
        "name",
        "schedule",
        "epochs",
        "batch_size",
        "scenario",
        "seed",
        "boundaries",
        "resident",
        "notes",
        "classes",
        "input_shape",
    )
    return {name: getattr(stream, name) for name in names}


STREAMS: dict[str, Callable[[], Stream]] = {
    "blobs": lambda: blobs(epochs=2),
    "blobs, other points": lambda: blobs(tasks=2, classes=5, features=3, train_per_class=30, test_per_class=4, spread=0.3, seed=8),
    "blobs, online, hidden": lambda: blobs(tasks=3, sessions_per_task=3, boundaries=False, batch_size=7, class_order=2),
    "blobs, recurring": lambda: blobs(tasks=3, schedule=[0, 1, 2, 1, 0], epochs=2, train_per_class=20),
    "blobs, task-IL, validation": lambda: blobs(tasks=3, scenario="task", validation=0.2),
    "blobs, domain-IL, validation": lambda: blobs(tasks=4, scenario="domain", class_order=3, validation=0.2),
    "blobs, for tuning": lambda: blobs(tasks=2, validation=0.2).for_tuning(),
    "blobs, reseeded": lambda: blobs(tasks=2).reseeded(11),
    "digits": lambda: split_digits(tasks=3, sessions_per_task=2, epochs=2),
    "digits, probes": lambda: probed(split_digits(tasks=[4, 4])),
    "canvases": lambda: multilabel_canvas(train=200, test=50, epochs=1, class_order=1, validation=0.2),
    "canvases, task-IL, probes": lambda: probed(multilabel_canvas(tasks=[3, 3], train=100, test=50, epochs=1, scenario="task")),
    "regression": lambda: split_regression(epochs=1, validation=0.2, sessions_per_task=2),
    "regression, synthetic, probes": lambda: probed(split_regression("synthetic", train=90, test=60, epochs=1)),
}
REAL: dict[str, Callable[[], Stream]] = {
    "split_mnist": lambda: split_mnist(validation=0.1, batch_size=500),
    "split_mnist, domain-IL": lambda: split_mnist(scenario="domain", batch_size=500),
    "split_mnist, padded": lambda: split_mnist(batch_size=2000, pad=2, validation=0.5),
    "permuted_mnist": lambda: permuted_mnist(tasks=2, batch_size=2000, pad=2),
    "permuted_mnist, class-IL": lambda: permuted_mnist(tasks=2, batch_size=2000, scenario="class", validation=0.5),
    "split_mnist, probes": lambda: (stream := split_mnist(batch_size=2000)).with_probes(
        unknown(stream, "fashion_mnist", 50), corrupted(stream, "blur", 2, 20)
    ),
    "rotated_mnist": lambda: rotated_mnist(tasks=2, batch_size=2000, sessions_per_task=2, validation=0.9),
}
