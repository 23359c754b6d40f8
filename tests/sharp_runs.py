"""What the tests of SHARP share: a small stream, network and strategy, and an observer of a run's phases and episodes."""

from __future__ import annotations

from typing import Any

import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp import ActivationsStored, PhaseStarted, UnitsFrozen
from torch import Tensor, nn

from clstream import Stream, on, streams
from clstream.models import MnistLike
from clstream.seeds import isolated


def stream(tasks: int = 5, epochs: int = 4, **options: Any) -> Stream:
    return streams.split_digits(tasks=tasks, epochs=epochs, batch_size=64, **options)


def model(channels: int = 6, hidden: int = 40) -> MnistLike:
    return MnistLike((1, 8, 8), 10, channels=channels, hidden=hidden)


def built(seed: int = 0, net: nn.Module | None = None, **options: Any) -> SHARP:
    options = {"phase_epochs": 2, "short_term": 10, "long_term": 10, "least_quota": 60.0} | options
    with isolated(seed, "model"):
        return SHARP(model() if net is None else net, **options)


class Watch:
    """An observer that keeps what SHARP was at each phase, and at the end of each episode."""

    def __init__(self, strategy: SHARP, x: Tensor | None = None) -> None:
        self.strategy, self.x = strategy, x
        self.phases: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.events: list[PhaseStarted | UnitsFrozen | ActivationsStored] = []

    def look(self) -> dict[str, Any]:
        own = self.strategy
        state = {
            "weights": [layer.module.weight.detach().clone() for layer in own.chain.layers],
            "biases": [layer.module.bias.detach().clone() for layer in own.chain.layers],
            **{name: [tensor.clone() for tensor in getattr(own, name)] for name in ("masks", "ranks", "frozen")},
        }
        if own.long_term is not None:
            state["long"] = {
                int(label): (
                    own.long_term.exemplars[row].clone(),
                    own.long_term.units[row].clone(),
                    int(own.long_term.episodes[row]),
                )
                for row, label in enumerate(own.long_term.labels)
            }
        if self.x is not None:
            with torch.no_grad():
                state["features"] = own.features(own.chain.below(self.x))
        return state

    @on(PhaseStarted)
    def phase(self, event: PhaseStarted) -> None:
        self.phases.append(self.look())
        self.events.append(event)

    @on(UnitsFrozen)
    def froze(self, event: UnitsFrozen) -> None:
        self.events.append(event)

    @on(ActivationsStored)
    def stored(self, event: ActivationsStored) -> None:
        self.ends.append(self.look())
        self.events.append(event)
