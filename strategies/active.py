"""Active learning: which labels of a pool are bought, around any strategy, on a stream whose labels are bought (`label_pool`).

    Active(Joint(model), ask="entropy")

Queries, of samples that have no label yet:

    random     any
    entropy    those whose prediction has the greatest entropy
    core_set   each time the one that is farthest, by features, from what is labelled and from those before it (greedy k-center;
               Sener & Savarese 2018)
    evt        first leave out what is an outlier: the probability omega that it is none of the class that it is taken for is above
               a bound; then entropy. Omega is that of the strategy itself, if it has one (`OpenVAE`, in its latent); else of the
               model's features (`clstream.strategy.extreme_values`, fitted to the labelled samples)

The last is after "A Wholistic View of Continual Learning" (Mundt, Hong, Pliushch, Ramesh 2023), where corrupted images are to be
left out: score the pool by omega, discard what is above, and of the rest query the most informative. How it measures that is in no
public code: entropy is our own choice. If the rest is smaller than the budget, the least outlying of those left out fill it up.
What is taken for a class without an outlier model, as too few of its samples are classified right, is left out.

What is asked is asked of the wrapped strategy as it is before the session. "core_set", and "evt" by features, keep the labelled
samples. On a stream that is no pool all samples come with their labels: nothing is asked, and it is the wrapped strategy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionEnded
from clstream.params import check_choice, check_number, check_positive
from clstream.strategy import Strategy, Wrapper
from clstream.strategy.core_sets import k_center
from clstream.strategy.extreme_values import OutlierModel
from clstream.stream import Samples

QUERIES = ("random", "entropy", "core_set", "evt")
TOGETHER = 1024
"""Samples that are looked at together."""


class Active(Wrapper):
    """Choose which labels are bought; learn and answer as the wrapped strategy does.

    Args:
        base: the strategy; for "core_set" and "evt" its model has `features`.
        ask: "random", "entropy", "core_set" or "evt".
        omega: a sample is left out by "evt" whose outlier probability is above this.
        tail: for "evt", the share of an average class's samples that the tail of a class is.

    """

    learns_targets = ("label",)

    def __init__(self, base: Strategy, ask: str = "entropy", omega: float = 0.95, tail: float = 0.25) -> None:
        super().__init__(base)
        check_choice(QUERIES, ask=ask)
        check_number(0, 1, omega=omega)
        check_number(0, 1, tail=tail)
        check_positive(tail=tail)
        if ask in ("core_set", "evt") and not callable(getattr(base.model, "features", None)):
            raise TypeError(f"ask={ask!r} needs a model with a method `features`, which {type(base.model).__name__} hasn't")
        if ask in ("entropy", "evt") and base.scores_are == "ranks":
            raise ValueError(f"ask={ask!r} needs probabilities of classes, and the scores of {type(base).__name__} are ranks")
        self.ask, self.omega, self.tail = ask, omega, tail
        self.keeps = ask == "core_set" or (ask == "evt" and not callable(getattr(base, "novelties", None)))
        self.random = torch.Generator()
        self.labelled: Samples | None = None
        self.classes = 0

    @property
    def rehearsal_free(self) -> bool:  # type: ignore[override]  # as the base's, where nothing is kept for the query
        """Whether no input of a session that is over is kept."""
        return self.base.rehearsal_free and not self.keeps

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Start without labelled samples."""
        self.labelled, self.classes = None, event.stream.classes

    @on(SessionEnded)
    def keep(self, event: SessionEnded) -> None:
        """Keep the session's samples, where the query looks at them."""
        if self.keeps:
            samples = event.session.samples[:]
            new = Samples(samples.x, samples.y)
            self.labelled = new if self.labelled is None else self.labelled + new

    def query(self, x: Tensor, budget: int) -> Tensor:
        """Return which of (n, *input_shape) samples without a label are bought: (budget,) int64, each once; n is at least that."""
        if self.ask == "random":
            return torch.randperm(len(x), generator=self.random)[:budget]
        if self.ask == "entropy":
            return self.entropies(x).topk(budget).indices
        if self.ask == "core_set":
            assert self.labelled is not None  # a session is over by then
            return k_center(self.features(x), budget, self.features(self.labelled.x))
        omegas = self.outlier_probabilities(x)
        inside = omegas <= self.omega
        # those inside by their entropy, which is at least 0, then the others by how little they are outliers, below 0
        order: Tensor = torch.where(inside, self.entropies(x), -1 - omegas).topk(budget).indices
        return order

    def entropies(self, x: Tensor) -> Tensor:
        """Return the entropy of the prediction of each sample: (n,)."""
        with evaluating(self):
            scores = torch.cat([self.base.scores(part.to(self.device)) for part in x.split(TOGETHER)])
        shares = scores.softmax(1) if self.base.scores_are == "logits" else scores
        entropies: Tensor = -torch.special.xlogy(shares, shares).sum(1)
        return entropies

    def outlier_probabilities(self, x: Tensor) -> Tensor:
        """Return omega of each sample, as one of the class that it is taken for: (n,); 1 where the class has no model."""
        if not self.keeps:
            several: Any = self.base
            with evaluating(self):
                return torch.cat([several.novelties(part.to(self.device), ("evt",))["evt"] for part in x.split(TOGETHER)])
        assert self.labelled is not None  # a session is over by then
        model, y = OutlierModel(), self.labelled.y.to(self.device)
        with evaluating(self):
            right, taken = (
                torch.cat([self.base.predict(part.to(self.device)) for part in inputs.split(TOGETHER)])
                for inputs in (self.labelled.x, x)
            )
        model.fit(self.features(self.labelled.x), y, right, self.classes, self.tail)
        return model.outlier_probability(self.features(x), taken).nan_to_num(1.0)

    def features(self, x: Tensor) -> Tensor:
        """Return the features of raw inputs: (n, d)."""
        with evaluating(self):
            features = [self.model.features(part.to(self.device)) for part in x.split(TOGETHER)]  # type: ignore[operator]
        return torch.cat(features)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device
