"""Groups of weights with owners: which task each unit and each row of the head belongs to, and so in which group each weight is.

A unit is an output of a linear layer or a channel of a convolution. A layer is divided among tasks if nothing above it mixes its
units, as a layer norm or a residual block does: its statistics, or its sums, would carry what a later task learns to older units.
All up to the last module that mixes units belongs to the first task as a whole, and only what follows is divided. The rows of the
head belong to the task in which their class came first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from clstream.models import GrowingHead
from clstream.models.heads import CosineHead
from clstream.models.layers import LinearRelu, LinearTanh, Normalise
from clstream.stream import Stream

GROUPS = ("old", "new", "old_to_new", "new_to_old", "old_rows", "new_rows")
OLD, NEW, OLD_TO_NEW, NEW_TO_OLD, OLD_ROWS, NEW_ROWS, FREE = range(7)
"""The numbers of the groups; FREE is that of weights to or from what belongs to no task yet."""

APART = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, Normalise, _BatchNorm, _InstanceNorm,
)  # fmt: skip
"""Modules that keep units apart; of batch norm as long as its statistics stay."""


class Groups:
    """The owners of a model's units.

    Args:
        model: with `stages`, an nn.Sequential, and a linear `head`, as those of `clstream.models`; or an nn.Sequential that ends in
            a linear layer.
        tasks: how many tasks the units of each divided layer are shared out to, evenly.

    Raises:
        TypeError: for another model.
        ValueError: for more tasks than a divided layer has units.

    """

    def __init__(self, model: nn.Module, tasks: int) -> None:
        self.tasks = tasks
        self.allocated = 0
        """The number of tasks that have units."""
        self.owner: dict[str, Tensor] = {}
        """By layer: (units,) int64, the task that each belongs to, counted from 0; -1 for none yet."""
        self.rows: dict[str, str] = {}
        """By name of a weight or bias: the layer whose units are its rows; all others belong to the first task as a whole."""
        self.columns: dict[str, tuple[str, int]] = {}
        """By name of a weight: the divided layer that its inputs come from, and how many come from one unit."""
        body, head = parts_of(model)
        names = {id(module): name for name, module in model.named_modules()}
        self.head = names[id(head)]
        leaves = list(leaves_of(body))
        before = ""
        for module in leaves[first_divided(leaves, head) :]:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                before = self.divide(names[id(module)], module, before)
                if len(module.weight) < tasks:
                    raise ValueError(
                        f"layer {before} has {len(module.weight)} units, too few for {tasks} tasks: make it wider, or let `tasks` "
                        "be fewer"
                    )
            elif before:
                self.rows |= {f"{names[id(module)]}.{name}": before for name, _ in module.named_parameters()}
        self.divide(self.head, head, before)
        self.width = head.in_features
        """The number of features, which the head takes."""
        self.labels: list[int] = []
        """The label of each of the head's rows."""

    def divide(self, name: str, module: nn.Linear | nn.Conv2d | GrowingHead, before: str) -> str:
        """Give each unit of a layer an owner, none yet; return its name."""
        units, inputs = module.weight.shape[:2]
        self.owner[name] = torch.full((units,), -1, device=module.weight.device)
        self.rows |= {f"{name}.{own}": name for own, _ in module.named_parameters()}
        if before:
            self.columns[f"{name}.weight"] = before, inputs // len(self.owner[before])
        return name

    @torch.no_grad()
    def allocate(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Give the next task its share of the units of each layer; nothing that is free feeds them."""
        taken = {}
        for name, owner in self.owner.items():
            if name != self.head:
                share = (self.allocated + 1) * len(owner) // self.tasks - self.allocated * len(owner) // self.tasks
                taken[name] = torch.zeros_like(owner, dtype=torch.bool)
                taken[name][(owner < 0).nonzero().flatten()[:share]] = True
                owner[taken[name]] = self.allocated
        self.allocated += 1
        self.cut(weights, taken)

    @torch.no_grad()
    def take_rows(self, labels: Iterable[int], weights: Mapping[str, nn.Parameter]) -> None:
        """Give the head's rows of some labels to the task that was allocated last; nothing that is free feeds them."""
        owner = self.owner[self.head]
        taken = torch.zeros_like(owner, dtype=torch.bool)
        taken[[self.labels.index(label) for label in labels]] = True
        owner[taken] = self.allocated - 1
        self.cut(weights, {self.head: taken})

    def grow(self, model: nn.Module) -> None:
        """Take notice of the head's rows: those that are new have no owner yet."""
        head, owner = parts_of(model)[1], self.owner[self.head]
        self.labels = head.labels.tolist() if isinstance(head, GrowingHead) else list(range(len(owner)))
        self.owner[self.head] = torch.cat([owner, owner.new_full((len(self.labels) - len(owner),), -1)])

    def without_row(self, labels: Iterable[int]) -> list[int]:
        """Return the labels whose rows belong to no task yet."""
        owner = self.owner[self.head].tolist()
        return [label for label in labels if owner[self.labels.index(label)] < 0]

    def cut(self, weights: Mapping[str, nn.Parameter], taken: Mapping[str, Tensor]) -> None:
        """Set the weights from free units to those that were taken to 0."""
        for name, (source, span) in self.columns.items():
            if self.rows[name] in taken:
                free = (self.owner[source] < 0).repeat_interleave(span)
                weights[name][taken[self.rows[name]][:, None] & free] = 0

    def sources(self, name: str, inputs: int) -> Tensor:
        """Return (inputs,), the owners of what a weight's columns come from; inputs of the network are the first task's."""
        if name not in self.columns:
            return torch.zeros(inputs, dtype=torch.int64, device=self.owner[self.head].device)
        source, span = self.columns[name]
        return self.owner[source].repeat_interleave(span)

    def numbers(self, name: str, weight: Tensor, now: int) -> Tensor:
        """Return the number of the group of each weight, in the weight's shape, while task `now` is learned.

        With `now` the number of all that have units, none is: what belongs to a task is old.
        """
        if name not in self.rows:
            return torch.full_like(weight, OLD if now > 0 else NEW, dtype=torch.int64)
        out = self.owner[self.rows[name]]
        source = out if weight.dim() == 1 else self.sources(name, weight.shape[1])
        if weight.dim() > 1:
            out = out[:, None]
        is_row = self.rows[name] == self.head
        within = torch.where(source < now, OLD_TO_NEW, NEW)
        groups = torch.where(out < now, OLD_ROWS if is_row else OLD, NEW_ROWS if is_row else within)
        groups = groups.masked_fill(source > out, NEW_TO_OLD).masked_fill((out < 0) | (source < 0), FREE)
        return groups.view(*groups.shape, *(1,) * (weight.dim() - groups.dim())).expand(weight.shape)

    def capacity(self) -> float:
        """Return the share of the units of all divided layers that belong to a task; without any, that of the head's rows."""
        layers = [owner for name, owner in self.owner.items() if name != self.head] or [self.owner[self.head]]
        owners = torch.cat(layers)
        return float((owners >= 0).float().mean()) if len(owners) else 0.0


def shares_needed(stream: Stream) -> int:
    """Return how often a task starts that brings classes that are new."""
    came: set[int] = set()
    shares, counted = 0, False
    for delivery in stream.deliveries():
        counted = counted and not delivery.begins_task
        if not counted and not came.issuperset(delivery.session.classes):
            counted, shares = True, shares + 1
        came.update(delivery.session.classes)
    return shares


def parts_of(model: nn.Module) -> tuple[nn.Sequential, nn.Linear | GrowingHead]:
    """Return what is below the head of a model, and its head. Raises TypeError for a model of another form."""
    body, head = getattr(model, "stages", None), getattr(model, "head", None)
    if isinstance(model, nn.Sequential) and len(model) > 1:
        body, head = model[:-1], model[-1]
    if not isinstance(body, nn.Sequential) or not isinstance(head, (nn.Linear, GrowingHead)):
        raise TypeError(
            "groups need a model with `stages`, an nn.Sequential, and a linear `head`, as those of clstream.models, or an "
            f"nn.Sequential that ends in a linear layer, not {type(model).__name__}: the policies 'zero', 'constant' and 'fisher' "
            "take any model"
        )
    return body, head


def leaves_of(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that follow one another, those within nn.Sequentials too."""
    for module in body.children():
        if isinstance(module, nn.Sequential):
            yield from leaves_of(module)
        else:
            yield module


def first_divided(leaves: Sequence[nn.Module], head: nn.Module) -> int:
    """Return the place of the first module after all that mix units: a cosine head mixes what is below it."""
    if isinstance(head, CosineHead) or len({id(leaf) for leaf in leaves}) < len(leaves):
        return len(leaves)
    return max((place for place, leaf in enumerate(leaves, 1) if not keeps_apart(leaf)), default=0)


def keeps_apart(module: nn.Module) -> bool:
    """Return whether a unit's activation after a module depends on no other unit, but through weights of the module."""
    plain = type(module) in (nn.Linear, LinearRelu, LinearTanh)
    return plain or (type(module) is nn.Conv2d and module.groups == 1) or isinstance(module, APART)
