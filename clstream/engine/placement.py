"""Placement: moves modules to the run's device, seeds generators from the run's seed, connects emitters to the run's bus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from clstream.attributes import walk
from clstream.bus import Bus, Emitter, with_parts
from clstream.seeds import derive
from clstream.strategy import Strategy


class Placement:
    """Moves the modules that a strategy holds to the run's device, seeds its generators, and connects its emitters to the bus.

    `update` does the same for what was made since: experts, heads, a memory for a new task. If `seeded`, the generators that there
    are stay as they are: those of a strategy that goes on as a run has left it.
    """

    def __init__(self, strategy: Strategy, device: str | torch.device, seed: int, bus: Bus, seeded: bool = False) -> None:
        self.strategy, self.device, self.seed, self.bus = strategy, device, seed, bus
        self.placed: dict[int, object] = {}  # the objects themselves, so that no new one gets the id of an old one
        if seeded:
            self.placed = {id(value): value for _, value in self.walk() if isinstance(value, torch.Generator)}
        self.update()

    def update(self) -> None:
        """Place the modules, generators and emitters that the strategy did not hold before."""
        for path, value in self.walk():
            if not isinstance(value, (nn.Module, torch.Generator, Emitter)) or id(value) in self.placed:
                continue
            self.placed[id(value)] = value
            if isinstance(value, nn.Module):
                value.to(self.device)
            elif isinstance(value, torch.Generator):
                value.manual_seed(derive(self.seed, path))
            else:
                value.bus = self.bus

    def walk(self) -> Iterator[tuple[str, object]]:
        """Yield (path, value) for what the strategy holds; what a wrapped strategy holds has the path that it has without wrapper.

        So a wrapped strategy draws the same random numbers as it does alone.
        """
        strategies = [part for part in with_parts(self.strategy) if isinstance(part, Strategy)]
        names = Counter[str]()
        for strategy in reversed(strategies):
            name = type(strategy).__name__
            names[name] += 1
            mark = f"{name}#{names[name]}" if names[name] > 1 else name
            for path, value in walk(strategy):
                yield mark + path.removeprefix(name), value

    def take_over(self, objects: Iterable[object]) -> None:
        """Count objects as placed: they come from a checkpoint, with the states of their generators."""
        self.placed = {id(value): value for value in objects}
        for value in self.placed.values():
            if isinstance(value, Emitter):
                value.bus = self.bus

    def leave(self) -> None:
        """Disconnect the emitters."""
        for value in self.placed.values():
            if isinstance(value, Emitter):
                value.bus = None
