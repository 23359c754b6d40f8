"""Core sets in a strategy's memory: which samples it replays is chosen when a session ends, not as they come.

The survey "A Wholistic View of Continual Learning" (Mundt, Hong, Pliushch, Ramesh 2023) compares core sets of so many images a
class. Form implemented, around any strategy with a memory of inputs and labels:

    CoreSets(Replay(model, capacity=200), method="herding")

When a session ends, every class that came so far has an equal share of the capacity. Of a class, the candidates are the session's
samples of it, and those that are kept already; where they are more than its share, `method` chooses: see
`clstream.strategy.core_sets`, which says how, and that the last of them, "evt", is our own form. "evt" takes mean and distribution
of the candidates that are classified right, and leaves outliers out, so that a class may have fewer than its share; where none can
be had, which is told, it chooses as "herding" does. Within a session the memory has samples of earlier sessions alone.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import SessionEnded
from clstream.memory import Memory
from clstream.params import check_choice, check_number
from clstream.strategy import Strategy, Wrapper
from clstream.strategy.core_sets import CORE_SETS, CoreSet, choose
from clstream.stream import Samples

SPACES = ("features", "input")
TOGETHER = 1024
"""Samples whose features are computed together."""


class CoreSets(Wrapper):
    """Fill the memory of a strategy with core sets; learn and answer as it does.

    Args:
        base: the strategy; it has a `memory`, and a model with `features`.
        method: "random", "k_center", "k_means", "herding" or "evt".
        space: where samples are near each other: "features" of the model as it is then, or "input".
        omega: a sample is left out by "evt" whose outlier probability is above this.

    """

    learns_targets = ("label",)

    def __init__(self, base: Strategy, method: str = "herding", space: str = "features", omega: float = 0.95) -> None:
        super().__init__(base)
        check_choice(CORE_SETS, method=method)
        check_choice(SPACES, space=space)
        check_number(0, 1, omega=omega)
        memory = getattr(base, "memory", None)
        if not isinstance(memory, Memory) or getattr(base, "per_class", None) is not None:
            raise ValueError(f"CoreSets fills a strategy's memory, of one capacity for all classes: {type(base).__name__} has none")
        if space == "features" and not callable(getattr(base.model, "features", None)):
            raise TypeError(f"CoreSets needs a model with a method `features`, which {type(base.model).__name__} hasn't")
        self.method, self.space, self.omega = method, space, omega
        self.random = torch.Generator()
        base.memory = CoreSet(memory.capacity)  # type: ignore[attr-defined]  # it has one

    @property
    def memory(self) -> Memory:
        """The wrapped strategy's memory."""
        memory: Memory = self.base.memory  # type: ignore[attr-defined]  # the constructor has asked for it
        return memory

    @on(SessionEnded)
    def choose_samples(self, event: SessionEnded) -> None:
        """Choose anew what is kept of each class that came."""
        memory, candidates = self.memory, event.session.samples[:]
        assert isinstance(memory, CoreSet)
        if len(memory):
            candidates = candidates + memory.all()
        features, right = self.looked_at(candidates)
        labels = candidates.y.unique().tolist()
        chosen = []
        for place, label in enumerate(labels):
            rows = (candidates.y == label).nonzero().flatten()
            share = memory.capacity // len(labels) + (place < memory.capacity % len(labels))
            chosen.append(rows.cpu()[self.picked(features[rows], share, right[rows], label)])
        memory.hold(candidates[torch.cat(chosen).to(candidates.y.device)])

    def picked(self, features: Tensor, share: int, right: Tensor, label: int) -> Tensor:
        """Return the rows that are chosen among those of a class."""
        if len(features) <= share and self.method != "evt":
            return torch.arange(len(features))
        try:
            return choose(self.method, features, share, self.random, right, self.omega)
        except ValueError as error:
            warnings.warn(f"CoreSets chooses by herding in class {label}: {error}", UserWarning, stacklevel=2)
            return choose("herding", features, share, self.random)

    def looked_at(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return where samples lie, (n, d), and whether each is classified right, (n,) bool; for "evt" alone that is asked."""
        features, right = list[Tensor](), list[Tensor]()
        device = next(self.model.parameters()).device
        with evaluating(self):
            for start in range(0, len(samples), TOGETHER):
                part = samples[start : start + TOGETHER].to(device)
                x: Tensor = part.x.flatten(1).float() if self.space == "input" else self.model.features(part.x)  # type: ignore[operator]
                features.append(x)
                right.append(self.base.predict(part.x) == part.y if self.method == "evt" else torch.ones_like(part.y) > 0)
        return torch.cat(features), torch.cat(right)
