"""Stacked steps: one step of several strategies that differ in their tensors alone, each with its own samples.

The tensors of all of them are stacked along a new first dimension, and the objective of the first one is mapped over it by
torch.func.vmap. While strategies are stacked, their own tensors are views of the stacks: whoever looks at a model sees its own
weights, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from clstream.bus import with_parts
from clstream.engine.compiled_step import learner_of
from clstream.strategy import Regulariser, Strategy
from clstream.stream import Samples

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD)
"""Optimizers that treat each number of a weight by itself: a step on stacks is the steps on what was stacked."""

PLAIN = (bool, int, float, str, type(None))

OWN_STEPS = "each seed clips or accumulates its own gradients, or has its own schedule of the learning rate"

Slot = tuple[Any, Any, str]
"""A place that holds a tensor: a dictionary or a list, the key, and how the place is called."""


class UnstackableError(ValueError):
    """These strategies can't take their steps together; the message says why."""


def why_unstackable(strategy: Strategy) -> str:
    """Return why a strategy's steps can't be taken together with those of others of its kind; "" if nothing shows before a run."""
    learner = learner_of(strategy)
    name = type(learner).__name__
    for method in ("learn", "objective", "objective_with"):
        if getattr(type(learner), method) is not getattr(Strategy, method):
            return f"{name} takes its steps by a `{method}` of its own"
    optimizer = learner.optimizer
    if type(optimizer) not in ELEMENTWISE:
        return f"a step of {type(optimizer).__name__} is not one of each number by itself"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
        return f"something was put around the step of its {type(optimizer).__name__}"
    return ""


def holders(learner: Strategy) -> list[Any]:
    """Return what a step reads: the strategy, and the regularisers."""
    return [part for part in with_parts(learner) if part is learner or isinstance(part, Regulariser)]


def slots(learner: Strategy) -> Iterator[Slot]:
    """Yield the places of all tensors that a step may read, and those of the dictionaries, lists and modules that hold them."""
    waiting: list[tuple[str, Any]] = [(type(holder).__name__, vars(holder)) for holder in holders(learner)]
    met: set[int] = set()
    while waiting:
        path, container = waiting.pop(0)
        if id(container) in met:
            continue
        met.add(id(container))
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            place = f"{path}.{key}"
            if isinstance(value, Tensor):
                yield container, key, place
            elif isinstance(value, nn.Module):
                yield container, key, place
                for name, module in value.named_modules(prefix=place):
                    waiting += [(name, module._parameters), (name, module._buffers)]
            elif isinstance(value, (dict, list)) and key != "params":
                yield container, key, place
                waiting.append((place, value))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one, along a new first dimension.

    Matrices lie there column by column: the gradients that a batched product gives lie so, and nothing has to be turned.
    """
    if tensors[0].dim() == 2 and tensors[0].is_floating_point():
        return torch.stack([tensor.detach().T for tensor in tensors]).transpose(1, 2)
    return torch.stack([tensor.detach() for tensor in tensors])


class Stack:
    """Several strategies, whose steps are taken as one.

    Args:
        strategies: built alike, each after a step of its own.

    Raises UnstackableError if they differ in more than the numbers in their tensors.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self.learners = [learner_of(strategy) for strategy in strategies]
        self.holders = [holders(learner) for learner in self.learners]
        self.watched = [[(*slot[:2], slot[0][slot[1]]) for slot in slots(learner)] for learner in self.learners]
        self.slots = [[slot for slot in slots(learner) if isinstance(slot[0][slot[1]], Tensor)] for learner in self.learners]
        self.optimizers = [learner.optimizer for learner in self.learners]
        places = [[place for *_, place in held] for held in self.slots]
        if any(of_seed != places[0] for of_seed in places):
            raise UnstackableError("one seed's strategy holds other tensors than another's")
        self.own = [[container[key] for container, key, _ in held] for held in self.slots]  # (seeds, slots)
        number: dict[int, int] = {}  # tied weights are one tensor in several slots
        self.number_of = [number.setdefault(id(tensor), len(number)) for tensor in self.own[0]]
        self.rows = [[dict(zip(self.number_of, own, strict=True))[place] for own in self.own] for place in range(len(number))]
        self.tensors: list[Tensor] = []
        self.dims: list[int | None] = []
        for rows in self.rows:
            tensor, dim = self._stacked(rows)
            self.tensors.append(tensor)
            self.dims.append(dim)
        self.ones = torch.ones(len(self.learners), device=self.tensors[0].device)
        self.views = False

    def _stacked(self, rows: list[Tensor]) -> tuple[Tensor, int | None]:
        first = rows[0]
        if any(row.shape != first.shape or row.dtype != first.dtype or row.requires_grad != first.requires_grad for row in rows):
            raise UnstackableError("a tensor of one seed's strategy has another shape than that of another's")
        if any(row.requires_grad and not row.is_leaf for row in rows):
            raise UnstackableError("the strategy holds a tensor with a history of gradients")
        whole_numbers = not (first.is_floating_point() or first.is_complex()) and first.dim() > 0
        if all(row is first for row in rows) or (whole_numbers and all(torch.equal(row, first) for row in rows)):
            return first.detach(), None  # one for all: labels of heads, say
        return stacked(rows).requires_grad_(first.requires_grad), 0

    def enter(self) -> None:
        """Let the strategies' own tensors be views of the stacks, and make an optimizer of these."""
        self.optimizer = self._optimizer()
        for tensor, dim, rows in zip(self.tensors, self.dims, self.rows, strict=True):
            if dim is not None:
                for row, view in zip(rows, tensor.detach().unbind(), strict=True):
                    row.data = view
        self.versions = [[row._version for row in rows] for rows in self.rows]
        trained = [place for place, tensor in enumerate(self.tensors) if tensor.requires_grad]
        self.trained = [(self.tensors[place], self.rows[place]) for place in trained]
        self.views = True

    def _optimizer(self) -> Optimizer:
        """Return an optimizer of the stacks, in the state that the strategies' own are in."""
        first, place_of = self.optimizers[0], {id(row): place for place, rows in enumerate(self.rows) for row in rows}
        groups: list[dict[str, Any]] = []
        for same in zip(*(optimizer.param_groups for optimizer in self.optimizers), strict=True):
            options = [{name: value for name, value in group.items() if name != "params"} for group in same]
            places = [[place_of.get(id(weight)) for weight in group["params"]] for group in same]
            if options.count(options[0]) < len(options) or places.count(places[0]) < len(places) or None in places[0]:
                raise UnstackableError("the optimizers of the seeds differ, or have weights that the strategy doesn't hold")
            groups.append({**options[0], "params": [self.tensors[place] for place in places[0] if place is not None]})
        make: Callable[..., Optimizer] = type(first)
        optimizer = make(groups)
        for own_group, group in zip(first.param_groups, optimizer.param_groups, strict=True):
            for own, tensor in zip(own_group["params"], group["params"], strict=True):
                rows = self.rows[place_of[id(own)]]
                states = [mine.state.get(row, {}) for mine, row in zip(self.optimizers, rows, strict=True)]
                if any(state.keys() != states[0].keys() for state in states):
                    raise UnstackableError("the optimizers of the seeds keep different things")
                kept = {name: self._stacked_state([state[name] for state in states], own) for name in states[0]}
                if kept:
                    optimizer.state[tensor] = kept
        return optimizer

    @staticmethod
    def _stacked_state(values: list[Any], weight: Tensor) -> Any:
        if isinstance(values[0], Tensor) and values[0].shape == weight.shape and weight.dim():
            return stacked(values)
        if any(value != values[0] for value in values):
            raise UnstackableError("the optimizers of the seeds have taken different numbers of steps")
        return values[0].clone() if isinstance(values[0], Tensor) else values[0]

    def leave(self) -> None:
        """Give each strategy tensors of its own, with what was learned, and its optimizer what the steps left."""
        if not self.views:
            return
        self.views = False
        for dim, rows in zip(self.dims, self.rows, strict=True):
            if dim is not None:
                for row in rows:
                    row.data = row.data.clone(memory_format=torch.contiguous_format)
        for tensor, rows in self.trained:
            kept = self.optimizer.state.get(tensor, {})
            for seed, row in enumerate(rows):
                if kept:
                    self.optimizers[seed].state[row] = {name: _of_seed(value, seed, row) for name, value in kept.items()}
                if row.grad is not None:
                    row.grad = row.grad.clone(memory_format=torch.contiguous_format)

    def is_current(self) -> bool:
        """Return whether the strategies still hold what was stacked: no handler of an event put something else in its place."""
        for mine, learner in zip(self.optimizers, self.learners, strict=True):
            if learner.optimizer is not mine or any(
                own["lr"] != group["lr"] for own, group in zip(mine.param_groups, self.optimizer.param_groups, strict=True)
            ):
                return False
        for watched in self.watched:
            for container, key, value in watched:
                if container[key] is not value:
                    return False
        return all(
            dim is not None or row._version == version
            for dim, rows, versions in zip(self.dims, self.rows, self.versions, strict=True)
            for row, version in zip(rows, versions, strict=True)
        )

    def losses(self, samples: Sequence[Samples], drawn: Sequence[tuple[Samples, ...]], assign: bool = True) -> Tensor:
        """Return (seeds,), what the step of each seed minimises; attributes that it sets are set for each seed, if `assign`."""
        parts = list(zip(*((own, *past) for own, past in zip(samples, drawn, strict=True)), strict=True))
        inputs: list[Tensor] = []
        rebuilt: list[tuple[tuple[str, ...], str]] = []
        for part in parts:
            names = tuple(part[0].extra)
            rebuilt.append((names, part[0].target))
            inputs += [torch.stack([own.x for own in part]), torch.stack([own.y for own in part])]
            inputs += [torch.stack([own.extra[name] for own in part]) for name in names]
        learner, holding, before = self.learners[0], self.holders[0], [dict(vars(holder)) for holder in self.holders[0]]
        assigned: list[tuple[int, str]] = []
        plain: list[tuple[int, str, Any]] = []

        def objective(*tensors: Tensor) -> tuple[Tensor, ...]:
            for place, (container, key, _) in zip(self.number_of, self.slots[0], strict=True):
                container[key] = tensors[place]
            entered = [dict(vars(holder)) for holder in holding]
            rest = iter(tensors[len(self.tensors) :])
            whole = [Samples(next(rest), next(rest), {name: next(rest) for name in names}, kind) for names, kind in rebuilt]
            loss = learner.objective_with(whole[0], tuple(whole[1:]))
            outputs = [loss]
            for number, (holder, had) in enumerate(zip(holding, entered, strict=True)):
                for name, value in vars(holder).items():
                    if name in had and had[name] is value:
                        continue
                    if isinstance(value, Tensor):
                        assigned.append((number, name))
                        outputs.append(value)
                    elif isinstance(value, PLAIN):
                        plain.append((number, name, value))
                    else:
                        raise UnstackableError(f"a step sets {type(holder).__name__}.{name} to a {type(value).__name__}")
            return tuple(outputs)

        dims = (*self.dims, *[0] * len(inputs))
        mapped: Callable[..., tuple[Tensor, ...]] = vmap(objective, in_dims=dims, randomness="error")
        try:
            losses, *values = mapped(*self.tensors, *inputs)
        finally:
            for holder, had in zip(holding, before, strict=True):
                vars(holder).clear()
                vars(holder).update(had)
            for tensor, (container, key, _) in zip(self.own[0], self.slots[0], strict=True):
                container[key] = tensor
        if not assign:
            return losses
        for (number, name), value in zip(assigned, values, strict=True):
            for held, row in zip(self.holders, value.unbind(), strict=True):
                setattr(held[number], name, row)
        for number, name, setting in plain:
            for held in self.holders:
                setattr(held[number], name, setting)
        return losses

    def step(self, samples: Sequence[Samples], drawn: Sequence[tuple[Samples, ...]]) -> tuple[Tensor, ...]:
        """Take one step of each strategy, and return their detached losses."""
        losses = self.losses(samples, drawn)
        self.optimizer.zero_grad()
        losses.backward(self.ones)
        self.optimizer.step()
        for tensor, rows in self.trained:
            if tensor.grad is not None:
                for row, view in zip(rows, tensor.grad.unbind(), strict=True):
                    row.grad = view
        return losses.detach().unbind()


def _of_seed(value: Any, seed: int, weight: Tensor) -> Any:
    """Return what one seed has of what an optimizer keeps of a stack."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == weight.dim() + 1:
        return value[seed].clone(memory_format=torch.contiguous_format)
    return value.clone()
