"""Episodes: a seeded family of small streams, each drawn when it is asked for, and reached by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from clstream.params import check_bool, check_integer
from clstream.seeds import derive
from clstream.stream.samples import Samples
from clstream.stream.sessions import Task, TestSet
from clstream.stream.stream import Stream

Corruption = Callable[[int], Callable[[Tensor], Tensor]]
"""A seed to a function of raw inputs that returns them corrupted, in their shape and dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What an episode is made of: row numbers of the pool, and the labels that these have in the episode; all int64.

    Args:
        support, support_labels: (sets, ways * shots).
        targets, target_labels: (sets, ways * targets); in the instance test they are the support sets themselves.

    """

    support: Tensor
    support_labels: Tensor
    targets: Tensor
    target_labels: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Episodes:
    """Continual few-shot episodes (CFSL): support sets that come one after the other, then targets from all of them.

    The support sets of a group have the same `ways` classes, and those of other groups other classes. The classes are drawn by the
    number of the episode, the samples by that and the seed; so the same number gives the same episode, in any order of calls.

    In the instance test there is one class, and each of its samples is a label of its own: the question is which sample it is.

    Args:
        name: how tables and MLflow call them.
        pool: what the episodes are drawn from; uint8 inputs, or any others.
        ways, shots: classes of a support set, and samples of each class in it.
        targets: samples that are asked about, of each class and each support set.
        sets: support sets of an episode.
        sets_per_group: support sets with the same classes; it divides `sets`.
        overwrite: whether each group has the labels from 0 up again, with other classes, in place of labels of its own.
        repeats: whether each support set draws from all samples of its classes, as the authors' code does, so that sets of a group
            may share samples, and a target of one may be a support sample of the next. If not, no sample comes twice.
        instances: whether it is the instance test; then `ways` is 1, and all sets are of one group.
        corruptions: by name, what the targets are asked about with beside how they are.
        steps: gradient steps on each support set: passes over it, each as one batch.
        count: how many episodes there are.
        seed: of which samples they draw.

    Raises:
        ValueError: for more classes than the pool has, more samples than a class has, or sets that groups don't divide.

    """

    name: str
    pool: Samples
    ways: int = 5
    shots: int = 1
    targets: int = 5
    sets: int = 4
    sets_per_group: int = 1
    overwrite: bool = False
    repeats: bool = False
    instances: bool = False
    corruptions: Mapping[str, Corruption] = field(default_factory=dict)
    steps: int = 1
    count: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(
            1, ways=self.ways, shots=self.shots, targets=self.targets, sets=self.sets, sets_per_group=self.sets_per_group,
            steps=self.steps, count=self.count,
        )  # fmt: skip
        check_integer(0, seed=self.seed)
        check_bool(overwrite=self.overwrite, repeats=self.repeats, instances=self.instances)
        if self.sets % self.sets_per_group:
            raise ValueError(f"sets must be a multiple of sets_per_group, {self.sets_per_group}, not {self.sets}")
        if self.instances and (self.ways != 1 or self.sets_per_group != self.sets):
            raise ValueError("the instance test is of one class: ways must be 1, and sets_per_group as many as sets")
        if self.instances and (self.overwrite or self.repeats):
            raise ValueError("in the instance test each sample is a label of its own: overwrite and repeats must be False")
        if self.pool.target != "label":
            raise ValueError(f"episodes are of classes, and the pool has {self.pool.target} targets")
        if self.groups * self.ways > len(self.classes):
            raise ValueError(
                f"an episode of {self.groups} groups with {self.ways} ways needs {self.groups * self.ways} classes, and the pool "
                f"has {len(self.classes)}: take fewer ways or sets, or more sets_per_group"
            )
        fewest, needed = min(map(len, self.classes)), self._per_class
        if needed > fewest:
            own = f"{self.shots} shots" if self.instances else f"{self.shots} shots and {self.targets} targets"
            times = "" if self.repeats or self.sets_per_group == 1 else f" in each of {self.sets_per_group} sets"
            raise ValueError(f"{own}{times} need {needed} samples of a class, and one class has {fewest}: take fewer")

    def __len__(self) -> int:
        """Return how many episodes there are."""
        return self.count

    def __iter__(self) -> Iterator[Stream]:
        return (self[index] for index in range(self.count))

    def __repr__(self) -> str:
        return f"Episodes({self.name!r}, {self.count} of {self.ways} ways, {self.shots} shots, {self.sets} sets: {self.kind})"

    @property
    def groups(self) -> int:
        """The number of groups of support sets, each with classes of its own."""
        return self.sets // self.sets_per_group

    @property
    def outputs(self) -> int:
        """The number of labels of an episode, all of which compete."""
        if self.instances:
            return self.sets * self.shots
        return self.ways if self.overwrite else self.ways * self.groups

    @property
    def chance(self) -> float:
        """The accuracy of a guess."""
        return 1 / self.outputs

    @property
    def kind(self) -> str:
        """What support sets bring: "instances", "new samples", "new classes", "overwritten classes" or "classes and samples"."""
        if self.instances:
            return "instances"
        if self.groups == 1:
            return "new samples"
        if self.overwrite:
            return "overwritten classes"
        return "new classes" if self.sets_per_group == 1 else "classes and samples"

    @cached_property
    def classes(self) -> tuple[Tensor, ...]:
        """For each class of the pool the numbers of its rows: (rows,), int64."""
        counts = self.pool.y.bincount()
        return tuple(self.pool.y.argsort(stable=True).split(counts[counts > 0].tolist()))

    @property
    def _per_set(self) -> int:
        """Samples of a class in a support set and its targets."""
        return self.shots if self.instances else self.shots + self.targets

    @property
    def _per_class(self) -> int:
        """Distinct samples of a class that are needed."""
        return self._per_set if self.repeats else self._per_set * self.sets_per_group

    def draw(self, index: int) -> Draw:
        """Return what an episode is made of. Raises IndexError outside 0 to len(episodes) - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"there are the episodes 0 to {self.count - 1}, not {index}")
        of_classes = torch.Generator().manual_seed(derive("classes of an episode", index))
        of_samples = torch.Generator().manual_seed(derive("samples of an episode", index, self.seed))
        chosen = torch.randperm(len(self.classes), generator=of_classes)[: self.groups * self.ways].tolist()
        rows = torch.stack([self._samples(self.classes[number], of_samples) for number in chosen])
        rows = rows.view(self.groups, self.ways, self.sets_per_group, self._per_set).transpose(1, 2)
        rows = rows.reshape(self.sets, self.ways, self._per_set)
        if self.instances:
            support, labels = rows.flatten(1), torch.arange(self.outputs).view(self.sets, self.shots)
            return Draw(support, labels, support, labels)
        first = torch.arange(self.groups).repeat_interleave(self.sets_per_group) * (0 if self.overwrite else self.ways)
        labels = (first[:, None] + torch.arange(self.ways))[:, :, None].expand(-1, -1, self._per_set)
        taught, asked = (
            [part[:, :, own].flatten(1) for part in (rows, labels)] for own in (slice(self.shots), slice(self.shots, self._per_set))
        )
        return Draw(*taught, *asked)

    def _samples(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows of a class that an episode has, (sets of the group * samples of a set,), distinct unless `repeats`."""
        if not self.repeats:
            return rows[torch.randperm(len(rows), generator=generator)[: self._per_class]]
        sets = [torch.randperm(len(rows), generator=generator)[: self._per_set] for _ in range(self.sets_per_group)]
        return rows[torch.cat(sets)]

    def corrupt(self, index: int, x: Tensor) -> dict[str, Tensor]:
        """Return the targets of an episode, (targets, *input_shape), by the name of each corruption."""
        return {name: corruption(derive(name, index, self.seed))(x) for name, corruption in self.corruptions.items()}

    def __getitem__(self, index: int) -> Stream:
        """Return an episode as a stream: each support set is a task, whose test samples are its targets.

        Its probes are the targets of all sets, corrupted. Raises IndexError outside 0 to len(episodes) - 1.
        """
        draw = self.draw(index)
        test = Samples(self.pool.x[draw.targets.flatten()], draw.target_labels.flatten())
        width = draw.targets.shape[1]
        tasks = []
        for number, (rows, labels) in enumerate(zip(draw.support, draw.support_labels, strict=True)):
            own = test[width * number : width * (number + 1)]
            tasks.append(Task(number, tuple(labels.unique().tolist()), Samples(self.pool.x[rows], labels), own))
        probes = [TestSet(name, Samples(x, test.y)) for name, x in self.corrupt(index, test.x).items()]
        return Stream(
            self.name, tasks, epochs=self.steps, batch_size=draw.support.shape[1], shuffle=False, probes=probes,
            notes=(f"episode {index} of {self.count}: {self.kind}",),
        )  # fmt: skip

    def with_inputs(self, x: Tensor, name: str) -> Episodes:
        """Return the same episodes, by another name, with other inputs in place of the pool's: (rows of the pool, ...).

        Raises ValueError for another number of rows, and where targets are corrupted: the corruptions are of the inputs before.
        """
        if len(x) != len(self.pool):
            raise ValueError(f"the pool has {len(self.pool)} samples, and there are {len(x)} inputs")
        if self.corruptions:
            raise ValueError(f"{self.name} corrupts its targets, which must be done before they become other inputs")
        return replace(self, name=name, pool=Samples(x, self.pool.y))
