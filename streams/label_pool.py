"""Active learning: a pool of samples without labels, of which some are bought before each session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from clstream.streams.corruptions import KINDS, Corrupt, check_corruptible
from clstream.streams.options import check_options
from clstream.streams.task_free import split_source

from clstream.params import check_choice, check_integer, check_share
from clstream.seeds import derive
from clstream.stream import PoolSchedule, Samples, Stream, Subset


def label_pool(
    data: str = "digits",
    start: int = 20,
    budget: int = 20,
    rounds: int = 5,
    size: int | None = None,
    corrupted: float = 0.2,
    corruption: str = "noise",
    severity: int = 5,
    epochs: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """A pool whose labels are bought: the first session has a few labelled samples, each later one those that were bought.

    Before a later session the strategy is asked which labels it wants, `query(x, budget)` of what has none yet; `Active` gives any
    strategy such a method, and without one they are drawn at random. Boundaries are hidden, and with them all labels that were not
    bought. There is one task with all classes. Some images of the pool are corrupted, and have their true labels; the test images
    are clean.

    Args:
        data: "digits", "MNIST" or another data set; see `clstream.streams.data.NAMES`.
        start: how many samples of the pool are labelled from the start, drawn at random.
        budget: labels that are bought for each later session.
        rounds: later sessions.
        size: samples of the pool, drawn at random from the training samples. None: all of them.
        corrupted: share of the pool that is corrupted, from 0 to below 1.
        corruption, severity: how: see `clstream.streams.corruptions.Corrupt`.
        epochs, batch_size, root, drop_last: as in `split_mnist`.
        seed: of the pool, of which of it is corrupted and how, of what is labelled from the start, and of the order of batches.

    Raises:
        ValueError: for a pool that has fewer samples than labels are bought, and for data that can't be corrupted.

    """
    check_options(locals())
    check_integer(1, start=start, budget=budget, rounds=rounds)
    check_integer(1, none=True, size=size)
    check_share(corrupted=corrupted)
    check_choice(KINDS, corruption=corruption)
    check_integer(1, 5, severity=severity)
    stream = split_source("label_pool", data, root, 1, epochs, batch_size, None, 0.0, seed)
    task = stream.tasks[0]
    whole = task.train[:]
    if size is not None and size > len(whole):
        raise ValueError(f"{data} has {len(whole):,} samples to train on, so no pool of {size:,}")
    draw = torch.Generator().manual_seed(derive(seed, "pool"))
    pool = whole[torch.randperm(len(whole), generator=draw)[:size]]
    schedule = PoolSchedule(len(pool), start, budget, rounds, derive(seed, "start"))
    rows = corrupted_rows(len(pool), corrupted, seed)
    x = pool.x.clone()
    if len(rows):
        check_corruptible(x, corruption)
        x[rows] = Corrupt(corruption, severity, derive(seed, "corrupted"))(x[rows])
    note = f"{len(rows):,} of {len(pool):,} samples of the pool have {corruption} of severity {severity} of 5"
    taught = Subset(Samples(x, pool.y), torch.arange(len(pool)))
    tasks = [replace(task, train=taught)]
    return replace(stream, tasks=tasks, schedule=schedule, boundaries=False, drop_last=drop_last, data=None, notes=(note,))


def corrupted_rows(pool: int, share: float, seed: int) -> torch.Tensor:
    """Return which rows of a pool of so many samples `label_pool` corrupts: (n,), int64."""
    return torch.randperm(pool, generator=torch.Generator().manual_seed(derive(seed, "which")))[: round(share * pool)]
