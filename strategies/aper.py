"""APER: class means of the features of a pre-trained network, and of the same network adapted to the first session.

Zhou, Cai, Ye, Zhan, Liu 2023, "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need" (first called ADAM). Form implemented, with f the pre-trained network and g what becomes of it:

    first session   g = f, adapted: cross-entropy over the session's classes, with a head that is not used afterwards
    from then on    [f(x), g(x)] are the features, side by side; both networks stay as they are
                    m_c is their mean over the samples of class c, and score_c = cosine([f(x), g(x)], m_c)

How g is adapted is a matter of the model that is given: one with `Bottleneck`, `ScaleShift`, `InputPrompts` ... in it, or a plain
one, all of which learns. Without the first part it is the paper's SimpleCIL, which is `NCM(model, distance="cosine")`.

The paper adapts to the first task, which comes in one session; here it is the first session, so that no boundary is needed. f
shares the weights that g doesn't change: with adapters the head alone is there twice. As in the authors' code
(recalled) the learning rate falls by a cosine, epoch by epoch. Means are sums over samples, in float64, as those of `NCM`.

Measured: see `docs/adapters.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.adapters import without_adapters
from clstream.bus import on
from clstream.events import EpochStarted, RunStarted, SessionEnded, SessionStarted
from clstream.measures.flops import consolidating
from clstream.params import check_choice
from clstream.strategy import OptimizerFactory
from clstream.strategy.answers import mask_logits, session_outputs
from clstream.strategy.frozen_features import TOGETHER, FrozenFeatures, class_means
from clstream.stream import Batch, Samples, Task

SCHEDULES = ("cosine", "constant")


class APER(FrozenFeatures):
    """Adapt to the first session; then answer by class means of the features before and after it, side by side.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). What of it learns is adapted: put adapters into it
            before (`clstream.adapters.adapt`), or all of it learns.
        optimizer: makes the optimizer of the first session from the model's parameters.
        schedule: of its learning rate, epoch by epoch: "cosine" to 0, or "constant".
        dtype: of the statistics, "float64" or "float32".

    """

    scores_are = "ranks"
    fixed_classes = "in the first session its own, in an answer those that came"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.01, momentum=0.9),
        schedule: str = "cosine",
        dtype: str = "float64",
    ) -> None:
        super().__init__(model, dtype)
        check_choice(SCHEDULES, schedule=schedule)
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ValueError(
                f"nothing of this {type(model).__name__} learns, so APER can't adapt it: put an adapter into it, or take "
                "NCM(distance='cosine')"
            )
        self.optimizer, self.schedule = optimizer(model.parameters()), schedule
        self.first = True  # whether the first session is not over
        self.before: nn.Module | None = None  # the network as it was before
        self.rates: list[float] = []
        self.first_classes = torch.empty(0, dtype=torch.int64)

    @on(RunStarted)
    def freeze(self, event: RunStarted) -> None:
        """Keep the network as it is without adapters, in a copy that shares what is frozen; start without statistics."""
        self.before = without_adapters(self.model, share_frozen=True).eval().requires_grad_(False)
        self.first_classes = torch.empty(0, dtype=torch.int64, device=event.stream.device or "cpu")
        self.first, self.rates = True, [group["lr"] for group in self.optimizer.param_groups]
        self.classes, self.statistics, self.waiting, self.solved = event.stream.classes, {}, [], None

    @on(SessionStarted)
    def take_classes(self, event: SessionStarted) -> None:
        """Take the classes of the first session."""
        if self.first:
            labels = session_outputs(event.session)
            self.first_classes = torch.tensor(labels, device=self.first_classes.device)

    @on(EpochStarted)
    def set_rate(self, event: EpochStarted) -> None:
        """Set the learning rate of an epoch of the first session."""
        if self.first and self.schedule == "cosine":
            share = (1 + math.cos(math.pi * event.epoch.index / event.epoch.session.epochs)) / 2
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean cross-entropy over the classes of the first session."""
        return F.cross_entropy(mask_logits(self.outputs(samples), self.first_classes), samples.y)

    def learn(self, batch: Batch) -> Tensor:
        """Take a step in the first session; later, take up the features of the batch."""
        if not self.first:
            return super().learn(batch)
        loss = self.loss(batch.samples)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """After the first session, freeze the network and take up the session's features; after others, what is left of theirs."""
        if self.first:
            self.first = False
            self.model.eval().requires_grad_(False)
            self.optimizer.zero_grad()
            self.optimizer.state.clear()
            samples = event.session.samples
            device = self.first_classes.device
            with consolidating():
                for start in range(0, len(samples), TOGETHER):
                    part = samples[start : start + TOGETHER].to(device)
                    self.receive(self.features(part.x), part.y)
        self.take_up_waiting()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return (n, 2 * features): of the network as it was, and as it is."""
        assert self.before is not None
        before: Tensor = self.before.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return torch.cat([before.to(getattr(torch, self.dtype)), super().features(x)], 1)

    def solve(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the class means, of length 1."""
        return F.normalize(class_means(statistics), dim=1)

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return the cosines with the class means."""
        cosines: Tensor = F.normalize(features, dim=1) @ solved.T
        return cosines

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): cosines, -inf for classes that did not come; within the first session the head's outputs."""
        if self.first and len(self.first_classes):
            return mask_logits(self.model(x), self.first_classes)
        return super().scores(x, task)

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): 1 minus the cosine with the nearest mean; own choice."""
        return 1 - scores.amax(1).clamp(min=-1)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of the network as it is, and as it was, those that both share once."""
        yield from super().answering_weights()
        if self.before is not None:
            yield from (*self.before.parameters(), *self.before.buffers())

    def export(self, since: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Raise TypeError: each learner adapts a network of its own."""
        raise TypeError("learners of APER adapt networks of their own, so sums of their features can't be added: federate NCM")

    def merge(self, payloads: Any, weights: Sequence[float] | None = None) -> None:
        """Raise TypeError, as `export` does."""
        self.export()
