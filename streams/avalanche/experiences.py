"""The experiences of a benchmark of Avalanche, read once into tensors; their random transforms are taken out, for whole batches.

This is the only place that knows how Avalanche 0.6.0 keeps the transforms of a data set: in groups, at each level of a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clstream.streams.arrays import as_samples
from clstream.streams.avalanche.transforms import (
    Steps,
    as_batched_steps,
    as_per_sample,
    flatten,
    is_nondeterministic,
    is_random,
    remove,
)
from clstream.streams.tensors import collate, read
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from clstream.seeds import isolated
from clstream.stream import Samples


class Pairs(Dataset[Any]):
    """The inputs and labels of an Avalanche data set, without what else its samples hold."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self.dataset[index]
        return sample[0], _label(sample[1])


def _label(target: Any) -> int:
    """Return a label as a plain number. Raises TypeError for other targets."""
    several = getattr(target, "shape", ()) not in ((), (1,)) or isinstance(target, (list, tuple))
    if several or float(target) != int(target):
        what = "a row of numbers" if several else f"{float(target):g}"
        raise TypeError(
            f"Avalanche's benchmarks are read for labels, one whole number each, not {what}: from_dataset(target='multilabel') "
            "takes several labels of a sample, and target='value' real numbers"
        )
    return int(target)


@dataclass(eq=False)
class Experiences:
    """The experiences of one of a benchmark's streams, read.

    `samples` has them one after the other; `ends` says where each one ends, `labels` are the task labels of each one's samples, and
    `origins` the experiences that they were cut from, None if they were not.
    """

    samples: Samples
    ends: list[int]
    labels: list[Tensor]
    origins: list[Any]
    shown: bool  # whether boundaries are

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self, number: int) -> Tensor:
        """Return the rows of an experience."""
        return torch.arange(self.ends[number - 1] if number else 0, self.ends[number])

    def classes(self, number: int) -> set[int]:
        """Return the labels of an experience."""
        return set(self.samples.y[self.rows(number)].unique().tolist())


@dataclass(frozen=True)
class RandomTransforms:
    """The random transforms of a chain: as a function of a batch, None without any, and the transforms themselves."""

    augment: Callable[[Tensor], Tensor] | None
    taken: tuple[Any, ...]


def read_experiences(
    stream: Any, what: str, group: str, lazy: bool, file: Path | None, workers: int, progress: bool
) -> tuple[Experiences, Callable[[Tensor], Tensor] | None]:
    """Read all experiences of one of a benchmark's streams; return their random transforms apart, as a function of a batch."""
    parts: list[Dataset[Any]] = []
    ends: list[int] = []
    labels: list[Tensor] = []
    origins, shown = [], True
    augments: dict[str, Callable[[Tensor], Tensor] | None] = {}
    lifted_of: dict[tuple[int, ...], RandomTransforms] = {}
    for number, experience in enumerate(stream):
        dataset = getattr(experience, "dataset", None)
        if dataset is None or not hasattr(dataset, "_flat_data"):
            raise TypeError(f"{what}: experience {number} has no data set of inputs with labels")
        if not len(dataset):
            raise ValueError(f"{what}: experience {number} is empty")
        dataset = dataset.train() if group == "train" else dataset.eval()
        dataset, augment = take_random_transforms(dataset, group, what, lazy, lifted_of)
        augments[repr(augment)] = augment
        parts.append(Pairs(dataset))
        ends.append(len(dataset) + (ends[-1] if ends else 0))
        given = getattr(dataset, "targets_task_labels", None)
        labels.append(
            torch.zeros(len(dataset), dtype=torch.int64) if given is None else torch.tensor([int(label) for label in given])
        )
        origins.append(getattr(experience, "origin_experience", None))
        shown &= bool(getattr(experience, "access_task_boundaries", True))
    if not parts:
        raise ValueError(f"{what}: the stream has no experiences")
    if len(augments) > 1:
        raise ValueError(f"{what}: its experiences have different random transforms: {'; '.join(augments)[:200]}")
    whole = as_samples(*read(ConcatDataset(parts), what, file, workers, progress), what)
    return Experiences(whole, ends, labels, origins, shown), next(iter(augments.values()))


def take_random_transforms(
    dataset: Any, group: str, what: str, lazy: bool, lifted_of: dict[tuple[int, ...], RandomTransforms]
) -> tuple[Any, Callable[[Tensor], Tensor] | None]:
    """Return an Avalanche data set without the random transforms of a group, and these as a function of a batch, or None."""
    parts = []
    for chain, leaf in transform_chains(dataset._flat_data, group):
        key = (id(leaf), *map(id, chain))
        if key not in lifted_of:
            lifted_of[key] = find_random_transforms(chain, leaf, what, group, lazy)
        parts.append(lifted_of[key])
    if len({repr(part.augment) for part in parts}) > 1:
        raise ValueError(f"{what}: the parts of an experience have different random transforms")
    taken = [transform for part in parts for transform in part.taken]
    if taken:
        dataset = copy(dataset)
        dataset._flat_data = strip_transforms(dataset._flat_data, group, taken)
        reads = []
        for seed in range(2):
            with isolated(seed, "transforms"):
                reads.append(collate([dataset[0][:2]])[0])
        if not torch.equal(*reads):
            raise ValueError(f"{what}: something random in its transforms could not be taken out: build the benchmark without it")
    return dataset, parts[0].augment


def find_random_transforms(chain: list[Any], leaf: Any, what: str, group: str, lazy: bool) -> RandomTransforms:
    """Return the random transforms of a chain, as a function of what is read without them; refuse what can't be one."""
    raw = copy(leaf)
    if flatten(getattr(raw, "transform", None)):
        raw.transform = None
        if hasattr(raw, "transforms"):  # torchvision's pair of both
            raw.transforms = None
    if is_nondeterministic(lambda: raw[0][0]):
        raise ValueError(
            f"{what}: what {type(leaf).__name__} gives is random, so its samples can't be read once: take what is random "
            "out of it, and pass it as augment=..., a function of a batch"
        )
    sample = raw[0][0]
    chance = [transform for transform, given in trace_chain(chain, sample) if is_random(transform, given)]
    if not chance:
        return RandomTransforms(None, ())
    names = ", ".join(getattr(transform, "__name__", None) or type(transform).__name__ for transform in chance)
    if group != "train":
        raise ValueError(f"{what}: {names} is random, and what is tested must stay the same: leave it out of the group 'eval'")
    rest = sample
    for transform in chain:
        rest = rest if any(transform is other for other in chance) else transform(rest)
    once = collate([(rest, 0)])[0][0]
    steps = as_batched_steps(chain, sample, once)
    if isinstance(steps, Steps):
        return RandomTransforms(steps, tuple(chance))
    if not lazy:
        raise ValueError(
            f"{what}: {steps}. Build the benchmark without its random transforms, and pass augment=..., a function of a batch; "
            "or have them done sample by sample, slowly: lazy=True"
        )
    alone = as_per_sample(chain, sample, once)
    if isinstance(alone, str):
        raise ValueError(f"{what}: its random transforms can't be done on what was read: {alone}")
    return RandomTransforms(alone, tuple(chance))


def trace_chain(chain: list[Any], sample: Any) -> list[tuple[Any, Any]]:
    """Return each transform of a chain with what it is given for a sample."""
    walk = []
    with isolated(0, "transforms"):
        for transform in chain:
            walk.append((transform, sample))
            sample = transform(sample)
    return walk


def transform_chains(flat: Any, group: str) -> list[tuple[list[Any], Any]]:
    """Return, for each data set below an Avalanche one, the transforms of inputs from there on, and the data set."""
    leaves = []
    here = flatten(_of(flat._frozen_transform_groups, group)) + flatten(_of(flat._transform_groups, group))
    for inner in flat._datasets:
        if hasattr(inner, "_transform_groups"):
            leaves += [(chain + here, leaf) for chain, leaf in transform_chains(inner, group)]
        else:
            leaves.append((flatten(getattr(inner, "transform", None)) + here, inner))
    return leaves


def _of(groups: Any, group: str) -> Any:
    return groups.transform_groups[group]


def strip_transforms(flat: Any, group: str, taken: list[Any]) -> Any:
    """Return the inside of an Avalanche data set without some transforms of inputs."""
    twin = copy(flat)
    twin._datasets = []
    for inner_data in flat._datasets:
        if hasattr(inner_data, "_transform_groups"):
            inner = strip_transforms(inner_data, group, taken)
        elif flatten(getattr(inner_data, "transform", None)):
            inner = copy(inner_data)
            inner.transform = remove(inner_data.transform, taken)
            if hasattr(inner, "transforms"):  # torchvision's pair of both
                inner.transforms = None
        else:
            inner = inner_data
        twin._datasets.append(inner)
    for name in ("_frozen_transform_groups", "_transform_groups"):
        groups = copy(getattr(flat, name))
        groups.transform_groups = {**groups.transform_groups, group: remove(_of(groups, group), taken)}
        setattr(twin, name, groups)
    return twin
