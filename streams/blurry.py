"""Blurry streams: classes that were taught come again, beside new ones."""

from __future__ import annotations

from pathlib import Path

import torch
from clstream.streams.class_splits import hold_back
from clstream.streams.data import source
from clstream.streams.options import check_options

from clstream.seeds import derive
from clstream.stream import DataSource, Stream, Subset, Task


def blurry_episodes(
    data: str = "MNIST",
    slots: int = 3,
    new_class: float = 0.3,
    epochs: int = 1,
    batch_size: int = 32,
    validation: float = 0.0,
    root: str | Path | None = None,
    seed: int = 0,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """Episodes of a few classes each, most of which were taught before: the blurry scenario of SHARP (Gurbuz et al. 2023).

    The first episode has `slots` random classes. Each later one fills as many slots: each with a class that is new, with
    probability `new_class`, else with one that was taught and is not in this episode yet. The stream ends with the episode that
    brings the last class. A class comes with all of its training samples each time, and an episode's test samples are those of its
    classes.

    Args:
        data: "MNIST", "digits" or another data set; see `clstream.streams.task_free`.
        slots: classes of an episode.
        new_class: the probability that a slot gets a new class, above 0 and up to 1.
        epochs: passes over an episode.
        batch_size: samples of a step.
        validation: share of the training samples held back, from all episodes alike, as `task.validation`.
        root: the folder with the data, as in `split_mnist`.
        seed: of the classes, of the order of batches, and of what validation holds back.
        boundaries: whether strategies are told of tasks.
        drop_last: whether each pass leaves out the last batch if it is not full.

    Raises:
        ValueError: for options out of range; FileNotFoundError: see `split_mnist`.

    """
    check_options(locals())
    if new_class > 1:
        raise ValueError(f"blurry_episodes: new_class is a probability above 0, up to 1, not {new_class}")
    train, test = source(data, root)
    classes = train.y.unique().tolist()
    if slots > len(classes):
        raise ValueError(f"blurry_episodes: slots must be 1 to {len(classes)}, the classes of {data}, not {slots!r}")
    taught, held = hold_back(torch.arange(len(train)), validation, derive(seed, "samples"), "blurry_episodes")
    tasks = []
    for number, episode in enumerate(episodes(classes, slots, new_class, seed)):
        own = torch.tensor(episode)
        test_rows = torch.isin(test.y, own).nonzero().flatten()
        tasks.append(
            Task(
                number,
                tuple(episode),
                Subset(train, taught[torch.isin(train.y[taught], own)]),
                Subset(test, test_rows),
                None if held is None else Subset(train, held[torch.isin(train.y[held], own)]),
            )
        )
    note = f"classes come again: {slots} in each episode, a slot has a new one with probability {new_class}"
    name = f"blurry_{data.lower()}"
    stream = Stream(name, tasks, None, epochs, batch_size, seed=seed, boundaries=boundaries, notes=(note,), drop_last=drop_last)
    return stream.with_source(DataSource({"train": train, "test": test}, data))


def episodes(classes: list[int], slots: int, new_class: float, seed: int) -> list[list[int]]:
    """Return the classes of each episode, sorted: see `blurry_episodes`."""
    draw = torch.Generator().manual_seed(derive(seed, "episodes"))

    def one_of(some: list[int]) -> int:
        return some[int(torch.randint(len(some), (), generator=draw))]

    new = [classes[place] for place in torch.randperm(len(classes), generator=draw).tolist()]
    episodes, new = [sorted(new[:slots])], new[slots:]
    taught = list(episodes[0])
    while new:
        episode: list[int] = []
        for _ in range(slots):
            if new and float(torch.rand((), generator=draw)) < new_class:
                taught.append(new[0])
                episode.append(new.pop(0))
            else:
                episode.append(one_of([label for label in taught if label not in episode]))
        episodes.append(sorted(episode))
    return episodes
