"""Continual few-shot episodes (CFSL) of a data set, and the instance test.

Antoniou, Patacchiola, Ochal, Storkey 2020, "Defining Benchmarks for Continual Few-Shot Learning", arXiv 2004.11967; the instance
test and its corruptions are of Kowadlo, Ahmed, Mayan, Rawlinson, arXiv 2209.07863. What an episode is made of is in
`clstream.stream.Episodes`. Deviations from the authors' code: samples of a group's support sets are distinct, unless `repeats`;
sets that groups don't divide are refused, where they vanish there; random numbers come from torch's generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.streams.corruptions import Disc, PixelNoise, check_corruptible
from clstream.streams.data import NAMES, source
from clstream.streams.features import features
from clstream.streams.omniglot import load_omniglot
from torch import nn

from clstream.params import check_bool, check_choice, check_integer, check_number
from clstream.stream import Episodes, Samples, Stream, Task
from clstream.stream.episodes import Corruption

OMNIGLOT = ("omniglot_base", "omniglot_novel")
"""The 136 characters of the first small background set, and the 106 of the second one that are not among these."""

POOLS = (*OMNIGLOT, *NAMES)
"""What episodes can be drawn from by name."""


def episodes(
    data: str = "omniglot_novel",
    ways: int | None = None,
    shots: int = 1,
    targets: int = 5,
    sets: int = 4,
    sets_per_group: int | None = None,
    overwrite: bool = False,
    repeats: bool = False,
    instances: bool = False,
    noise: Sequence[float] = (),
    occlusion: Sequence[float] = (),
    steps: int = 1,
    count: int = 600,
    seed: int = 0,
    rotations: bool = False,
    root: str | Path | None = None,
    cache: str | Path | None = None,
) -> Episodes:
    """Return episodes of continual few-shot learning: `episodes(...)[7]` is a stream, and always the same one.

    Args:
        data: "omniglot_base" (136 characters) or "omniglot_novel" (106 others), each with all of its 20 drawings; or the test
            samples of a data set by name, as "digits" or "MNIST".
        ways: classes of a support set. None: 5, in the instance test 1.
        shots: samples of each class in a support set.
        targets: samples of each class that are asked about, for each support set; the instance test asks about the support sets.
        sets: support sets of an episode.
        sets_per_group: support sets with the same classes; the next ones have others. None: 1, in the instance test all.
        overwrite: whether each group has the labels from 0 up again, with other classes, in place of labels of its own.
        repeats: whether each support set draws from all samples of its classes, as the authors' code does, so that sets of a group
            may share samples, and a target of one may be a support sample of the next.
        instances: the instance test: all sets are of one class, and each of their samples is a label of its own.
        noise: shares of an image's numbers, from 0 to 1: for each the targets are also asked about with so many replaced by noise.
        occlusion: shares of an image's height, from 0 to 0.5: for each the targets are also asked about with a disc of this radius
            hidden.
        steps: gradient steps on each support set: passes over it, each as one batch.
        count: how many episodes there are.
        seed: of which samples are drawn; which classes an episode has depends on its number alone, as in the authors' code.
        rotations: whether each character turned by 90, 180 and 270 degrees is a class too; for Omniglot.
        root: the folder with the data, as in `split_mnist`.
        cache: the folder for decoded images, as in `image_folder`.

    Raises:
        ValueError: for more classes or samples than there are, sets that groups don't divide, corruptions outside their range.
        FileNotFoundError: if the data is not there and can't be downloaded.

    """
    check_choice(POOLS, data=data)
    check_integer(1, none=True, ways=ways, sets_per_group=sets_per_group)
    check_integer(1, shots=shots, targets=targets, sets=sets, steps=steps, count=count)
    check_integer(0, seed=seed)
    check_bool(overwrite=overwrite, repeats=repeats, instances=instances, rotations=rotations)
    for option, shares, most in (("noise", noise, 1.0), ("occlusion", occlusion, 0.5)):
        if not isinstance(shares, (list, tuple)):
            raise ValueError(f"{option} must be a list of shares, not {shares!r:.100}")
        for share in shares:
            check_number(0, most, **{option: share})
    if rotations and data not in OMNIGLOT:
        raise ValueError(f"rotations=True is for the characters of Omniglot, not for {data}")
    kinds: list[tuple[str, Sequence[float], Any]] = [("noise", noise, PixelNoise), ("occlusion", occlusion, Disc)]
    corruptions: dict[str, Corruption] = {
        f"{kind}_{share:g}": partial(make, float(share)) for kind, shares, make in kinds for share in shares
    }
    pool = load_pool(data, rotations, root, cache)
    if corruptions:
        check_corruptible(pool.x[:1], "occlusion")
    ways = ways or (1 if instances else 5)
    sets_per_group = sets_per_group or (sets if instances else 1)
    return Episodes(
        f"{data} episodes", pool, ways, shots, targets, sets, sets_per_group, overwrite, repeats, instances, corruptions, steps,
        count, seed,
    )  # fmt: skip


def episode_features(episodes: Episodes, backbone: nn.Module, cache: str | Path | None = None, progress: bool = True) -> Episodes:
    """Return the same episodes with each sample as a backbone's features, computed once and kept: see `features`.

    Raises ValueError where targets are corrupted: give the backbone to the learner instead.
    """
    pool = episodes.pool
    whole = Stream(episodes.name, [Task(0, tuple(pool.y.unique().tolist()), pool, pool[:1])])
    inputs = features(whole, backbone, cache=cache, progress=progress).tasks[0].train[:].x
    return episodes.with_inputs(inputs, f"{episodes.name}, features of {type(backbone).__name__}")


def load_pool(data: str, rotations: bool = False, root: str | Path | None = None, cache: str | Path | None = None) -> Samples:
    """Return the samples that episodes are drawn from, by the name of their data; see `episodes`."""
    if data not in OMNIGLOT:
        return source(data, root)[1]
    names, train, test = load_omniglot("small", rotations, root=root, cache=cache)
    base = set(load_omniglot("small1", rotations, root=root, cache=cache)[0])
    own = torch.tensor([(name in base) == (data == "omniglot_base") for name in names])
    both = train + test
    rows = own[both.y].nonzero().flatten()
    return Samples(both.x[rows], both.y[rows])


def episode(
    index: int = 0,
    data: str = "omniglot_novel",
    ways: int | None = None,
    shots: int = 1,
    targets: int = 5,
    sets: int = 4,
    sets_per_group: int | None = None,
    overwrite: bool = False,
    repeats: bool = False,
    instances: bool = False,
    noise: Sequence[float] = (),
    occlusion: Sequence[float] = (),
    steps: int = 1,
    count: int = 600,
    seed: int = 0,
    rotations: bool = False,
    root: str | Path | None = None,
    cache: str | Path | None = None,
) -> Stream:
    """One of the `episodes`, as a stream: a task for each support set, whose test samples are its targets.

    Args:
        index: the number of the episode, from 0 to count - 1.
        data, ways, shots, targets, sets, sets_per_group, overwrite, repeats, instances, noise, occlusion, steps, count, seed,
            rotations, root, cache: see `episodes`.

    """
    options = dict(locals())
    check_integer(0, index=options.pop("index"))
    drawn = episodes(**options)
    if index >= count:
        raise ValueError(f"index must be below count, {count}, not {index}")
    return drawn[index]
