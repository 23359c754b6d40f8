"""Streams whose inputs hold their own row numbers, so that it can be told which samples came when."""

import torch
from clstream.streams import from_tensors


def numbered(per_class=10, classes=6, first=0):
    """Return inputs that hold their own row number and label, and labels: `per_class` samples of each class, interleaved."""
    y = torch.arange(classes).repeat(per_class)
    number = torch.arange(first, first + len(y))
    return torch.stack([number, y], 1).float(), y


def numbered_stream(per_class=10, classes=6, tasks=3, **options):
    """Return a stream of such samples."""
    return from_tensors(*numbered(per_class, classes), *numbered(4, classes, 10_000), tasks=tasks, **options)


def rows(part):
    """Return the row numbers of samples."""
    return part.x[:, 0].int().tolist()


def played(stream):
    """Return the row numbers of all batches: by session, epoch and batch."""
    return [[[rows(batch.samples) for batch in epoch] for epoch in session] for session in stream]


def flat(epoch):
    """Return the row numbers of an epoch."""
    return [row for batch in epoch for row in batch]
