"""Regularisers: small objects for any strategy, each with a penalty that a step minimises beside the loss.

    self.add_regularisers(EWCPenalty(100.0))           in a strategy's constructor, or
    Regularised(Replay(model), [EWCPenalty(100.0)])    around a strategy

A regulariser knows the strategy that it was added to, and hears the run as one of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from clstream.bus import on, with_parts
from clstream.events import RunStarted
from clstream.models import GrowingHead
from clstream.models.heads import pad_rows
from clstream.params import check_number
from clstream.strategy.strategy import Regulariser, Strategy
from clstream.stream import Samples


class Quadratic(Regulariser):
    """strength * sum over the held weights of importance * (weight - anchor)^2: a sum over all numbers, without a factor 1/2.

    A subclass sets an anchor by `set_anchor`. Rows that a growing head got since are free.

    Args:
        strength: a number; or, for each held weight by its name in the model, a number, or a tensor that broadcasts to it.
        parameters: which weights are held: a pattern of their names in the model, or several, as a shell knows them
            ("*", "stages.*", "*.attn.qkv.*").

    """

    def __init__(self, strength: float | dict[str, Any] = 1.0, parameters: str | list[str] = "*") -> None:
        if not isinstance(strength, (Mapping, Tensor)):
            check_number(0, strength=strength)
        if not isinstance(parameters, (str, list, tuple)) or not all(isinstance(pattern, str) for pattern in parameters):
            raise ValueError(f"parameters must be a pattern of names, or a list of some, not {parameters!r}")
        values = strength if isinstance(strength, Mapping) else {"all": strength}
        given = {name: torch.as_tensor(value) for name, value in values.items()}
        if not all(bool(((value >= 0) & value.isfinite()).all()) for value in given.values()):
            raise ValueError(f"strength must be finite and not below 0, not {strength}")
        self.strength: float | dict[str, Tensor] = given if isinstance(strength, Mapping) else strength
        self.parameters = parameters
        self.weights: dict[str, nn.Parameter] = {}
        self.anchor: dict[str, Tensor] = {}  # nothing before the first one is set
        self.importance: dict[str, Tensor] = {}  # nothing stands for 1
        self.offset = torch.zeros(())  # what the penalty is where it is least: the anchors of several tasks may disagree

    def attach(self, strategy: Strategy) -> None:
        """Attach to a strategy, and find the weights to hold in its model."""
        super().attach(strategy)
        self.weights = matching(strategy.model, self.parameters)
        if not isinstance(self.strength, Mapping):
            return
        if odd := sorted({*self.strength} ^ {*self.weights}):
            raise ValueError(f"strength must have one tensor for each held weight, and no other: see {', '.join(odd[:3])}")
        heads = [module for module in strategy.model.modules() if isinstance(module, GrowingHead)]
        grown = {id(weight): (head.classes, *weight.shape[1:]) for head in heads for weight in head.parameters()}
        for name, weight in self.weights.items():
            given, shape = tuple(self.strength[name].shape), grown.get(id(weight), tuple(weight.shape))
            if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
                raise ValueError(f"the strength of {name} is {given}, which doesn't broadcast to {shape}")

    @on(RunStarted)
    def reset(self, event: RunStarted) -> None:
        """Forget the anchor, and move the strengths to where the weights are."""
        self.anchor, self.importance, self.offset = {}, {}, torch.zeros((), device=event.stream.device or "cpu")
        if isinstance(self.strength, Mapping):
            self.strength = {name: self.strength[name].to(weight) for name, weight in self.weights.items()}

    def set_anchor(self) -> None:
        """Anchor the weights where they are."""
        self.anchor = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def add(self, importance: Mapping[str, Tensor]) -> None:
        """Add a term with its own anchor, where the weights are: the sum of all terms is one of the same form, exactly.

        a (w - p)^2 + b (w - q)^2 = (a + b) (w - (a p + b q) / (a + b))^2 + a b / (a + b) (p - q)^2
        """
        old, before = self.importance, self.anchor
        self.set_anchor()
        self.importance = {name: values.clone() for name, values in importance.items()}
        for name, b in importance.items():
            if name in old:
                a, anchor = pad_rows(old[name], b), self.anchor[name]
                total = a + b
                share = torch.where(total > 0, a / total, 0)
                difference = torch.where(a > 0, pad_rows(before[name], b) - anchor, 0)
                self.offset = self.offset + self.scale(name, share * b * difference.square()).sum()
                self.importance[name], self.anchor[name] = total, anchor + share * difference

    def scale(self, name: str, terms: Tensor) -> Tensor:
        """Return the terms of a weight, one for each of its numbers, times its own strength if it has one."""
        if not isinstance(self.strength, Mapping):
            return terms
        own = self.strength[name]
        return terms * (own[: len(terms)] if own.dim() == terms.dim() > 0 and len(own) > 1 else own)

    def differences(self) -> dict[str, Tensor]:
        """Return how far each held weight is from its anchor."""
        differences = {}
        for name, anchor in self.anchor.items():
            weight = self.weights[name]
            differences[name] = (weight if weight.shape == anchor.shape else weight[: len(anchor)]) - anchor
        return differences

    def penalty(self, samples: Samples) -> Tensor:
        """Return the penalty at the weights as they are; nothing depends on the samples."""
        if self.strength == 0:
            return torch.zeros_like(self.offset)
        total = self.offset
        for name, difference in self.differences().items():
            terms = difference.square()
            total = total + self.scale(name, self.importance[name] * terms if self.importance else terms).sum()
        return total if isinstance(self.strength, Mapping) else self.strength * total

    def penalty_gradient(self, name: str, at: Tensor) -> Tensor:
        """Return the gradient of the penalty with respect to a held weight that has an importance, where it was.

        It has the rows that the anchor has: those that a growing head got since are free.
        """
        anchor = self.anchor[name]
        difference = (at if at.shape == anchor.shape else at[: len(anchor)]) - anchor
        strength = 1.0 if isinstance(self.strength, Mapping) else self.strength
        return self.scale(name, 2 * self.importance[name] * difference) * strength


@contextmanager
def no_step(strategy: Strategy) -> Iterator[None]:
    """Within it, a call of the strategy's `objective` is no sign that its steps minimise the penalties."""
    regularisers = [part for part in with_parts(strategy) if isinstance(part, Regulariser)]
    penalised = [regulariser.penalised for regulariser in regularisers]
    yield
    for regulariser, before in zip(regularisers, penalised, strict=True):
        regulariser.penalised = before


def matching(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient and whose names match a pattern, in the model's order.

    Raises ValueError for a pattern that matches none; it names some that are near.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    chosen = [patterns] if isinstance(patterns, str) else list(patterns)
    if not chosen:
        raise ValueError("parameters must name at least one pattern, such as '*'")
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to hold: unfreeze some, "
            "weight.requires_grad_(True)"
        )
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in weights):
            near = get_close_matches(pattern, list(weights), n=3, cutoff=0)
            raise ValueError(f"no parameter of {type(model).__name__} matches {pattern!r}; near it: {', '.join(near)}")
    return {name: weight for name, weight in weights.items() if any(fnmatchcase(name, pattern) for pattern in chosen)}


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy of a model as it is, in evaluation mode, whose parameters require no gradient: a teacher."""
    return deepcopy(model).eval().requires_grad_(False)
