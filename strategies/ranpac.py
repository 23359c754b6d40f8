"""RanPAC: ridge regression to the labels on a random projection of frozen features.

McDonnell, Gong, Parvaneh, Abbasnejad, van den Hengel 2023, "RanPAC: Random Projections and Pre-trained Models for Continual
Learning". Form implemented, with f the features of a frozen network, y the one-hot labels and W (features, M) standard normal,
drawn once:

    h = max(0, f W),    G = sum of h h',    Q = sum of h y',    score = h (G + ridge I)^-1 Q

G and Q are sums, so what comes when does not matter with a fixed `ridge`. As in the authors' code, `ridge=None` takes the power of
ten from 1e-8 to 1e8 that, fitted on the first 80 % of the newest session's samples, has the least squared error on the others; they
do so after each task. It then belongs to the session that came last. `projection=0` is ridge regression on the features themselves,
their decorrelation without a projection. G of fewer samples than M is singular, and the ridge makes it regular.

Left out: the paper's first phase, which tunes the network on the first task with adapters; a network that was tuned before is given
as `model`. G is M x M: 800 MB in float64 with M = 10,000, and half of that in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.bus import on
from clstream.events import RunStarted, SessionEnded
from clstream.params import check_integer, check_positive
from clstream.strategy.frozen_features import FrozenFeatures, add_by_class
from clstream.strategy.merging import Payload, as_payloads, check_is_payload

RIDGES = [10.0**power for power in range(-8, 9)]
"""What is tried where none is given."""

SHARE = 0.8
"""Of a session's samples that they are fitted on."""


class RanPAC(FrozenFeatures):
    """Answer by ridge regression on a random projection of the features.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is frozen, and its head is not used.
        projection: M, the width of the random projection; 0 for none.
        ridge: what is added to the diagonal. None: chosen at the end of each session.
        dtype: of the statistics, "float64" or "float32".

    """

    scores_are = "ranks"

    def __init__(self, model: nn.Module, projection: int = 10_000, ridge: float | None = None, dtype: str = "float64") -> None:
        super().__init__(model, dtype)
        check_integer(0, projection=projection)
        check_positive(none=True, ridge=ridge)
        self.projection, self.ridge = projection, ridge
        self.chosen_ridge = 1.0 if ridge is None else ridge
        self.random = torch.Generator()
        self.weights: Tensor | None = None
        self.session: list[tuple[Tensor, Tensor]] = []  # features and labels of the session that goes on, to choose the ridge

    by_class = MappingProxyType({"counts": 0, "targets": 1})

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Start without a projection: it is drawn when the width of the features is known."""
        self.weights, self.session = None, []
        self.chosen_ridge = 1.0 if self.ridge is None else self.ridge

    def project(self, features: Tensor) -> Tensor:
        """Return (n, M) projections of (n, features)."""
        return features if self.weights is None else (features @ self.weights).relu()

    def receive(self, features: Tensor, y: Tensor) -> None:
        """Have features wait, and keep them for the choice of a ridge at the session's end, if none is given."""
        super().receive(features, y)
        if self.ridge is None:
            self.session.append((features, y))

    def start(self, features: Tensor) -> dict[str, Tensor]:
        """Draw the projection; return no samples of any class, and G and Q of none."""
        if self.projection:
            drawn = torch.randn(features.shape[1], self.projection, generator=self.random, dtype=torch.float64)
            self.weights = drawn.to(features)
        width = self.projection or features.shape[1]
        return {
            "counts": features.new_zeros(self.classes),
            "gram": features.new_zeros(width, width),
            "targets": features.new_zeros(width, self.classes),
        }

    def take_up(self, statistics: dict[str, Tensor], features: Tensor, y: Tensor) -> None:
        """Add to G and Q."""
        projected = self.project(features)
        add_by_class(statistics["counts"], y, torch.ones_like(features[:, 0]))
        statistics["gram"].addmm_(projected.T, projected)
        add_by_class(statistics["targets"].T, y, projected)

    def end_session(self, event: SessionEnded) -> None:
        """Take up what is left of the session, and choose the ridge if none is given."""
        super().end_session(event)
        if self.session:
            features, y = (torch.cat(parts) for parts in zip(*self.session, strict=True))
            self.chosen_ridge, self.session, self.solved = self.best_ridge(features, y), [], None

    @torch.no_grad()
    def best_ridge(self, features: Tensor, y: Tensor) -> float:
        """Return the ridge with the least squared error on the last samples, of those that are fitted on the first ones."""
        first = int(len(y) * SHARE)
        if not 0 < first < len(y):
            return self.chosen_ridge
        projected, targets = self.project(features), F.one_hot(y, self.classes).to(features)
        fitted, others = projected[:first], projected[first:]
        wide = first < projected.shape[1]  # then the products of samples are the smaller matrix
        values, vectors = torch.linalg.eigh(fitted @ fitted.T if wide else fitted.T @ fitted)
        inside = (vectors.T @ targets[:first]) if wide else vectors.T @ (fitted.T @ targets[:first])
        outside = (others @ fitted.T if wide else others) @ vectors
        errors = []
        for ridge in RIDGES:
            answers = outside @ (inside / (values.clamp(min=0) + ridge)[:, None])
            errors.append(F.mse_loss(answers, targets[first:]))
        return RIDGES[int(torch.stack(errors).argmin())]

    def solve(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the weights of the answer: (M, classes)."""
        regular = statistics["gram"].clone()
        regular.diagonal().add_(self.chosen_ridge)
        weights: Tensor = torch.linalg.solve(regular, statistics["targets"])
        return weights

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return the regressed one-hot labels."""
        answers: Tensor = self.project(features) @ solved
        return answers

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Return (n,): 1 minus the greatest regressed label; own choice."""
        return 1 - scores.amax(1).clamp(min=-1e30)

    def export(self, since: Payload | None = None) -> dict[str, Tensor]:
        """Return the sums of samples, and the projection that they are of, unless `since` has it."""
        exported = super().export(since)
        if self.weights is None or not exported or (since and "projection" in since):
            return exported
        return {**exported, "projection": self.weights.clone()}

    def merge(self, payloads: Payload | Iterable[Payload], weights: Sequence[float] | None = None) -> None:
        """Add what others exported that have the same network and the same projection: run them with one seed.

        Raises ValueError for statistics of another projection, or of other shapes.
        """
        payloads = as_payloads(payloads)
        for payload in payloads:
            self.check_payload(payload)
        drawn = (payload["projection"] for payload in payloads if "projection" in payload)
        self.weights = next(drawn, None) if self.weights is None else self.weights
        super().merge([sums_of(payload) for payload in payloads], weights)

    def check_payload(self, payload: Payload) -> None:
        """Raise ValueError for statistics of another projection, or of other shapes."""
        check_is_payload(payload, "RanPAC")
        theirs = payload.get("projection")
        if theirs is not None and self.weights is not None and not torch.equal(theirs.to(self.weights), self.weights):
            raise ValueError("these statistics are of another random projection: run learners that are merged with one seed")
        super().check_payload(sums_of(payload))


def sums_of(payload: Payload) -> dict[str, Tensor]:
    """Return what is a sum over samples in a payload of RanPAC."""
    return {name: tensor for name, tensor in payload.items() if name != "projection"}
