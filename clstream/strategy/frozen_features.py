"""Frozen features: what NCM, SLDA, RanPAC and FeCAM share. The network stays as it is, and statistics of its features answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from clstream.bus import on
from clstream.events import RunContinued, RunStarted, SessionEnded
from clstream.measures.flops import consolidating, same_flops
from clstream.params import check_choice
from clstream.strategy.merging import Payload, as_payloads, check_is_payload, check_tensors
from clstream.strategy.strategy import Strategy
from clstream.stream import Batch, Task

TOGETHER = 1024
"""Samples whose features are taken up together: few large products in place of many small ones."""


class FrozenFeatures(Strategy):
    """Take up statistics of features, each sample once, and answer from them; no step changes the network.

    A subclass says which statistics those are (`start`, `take_up`), and what they answer (`solve`, `answer`). They are sums over
    samples, so those of several learners add up: `merge`. Inputs are taken as they are, without the stream's augmentation; later
    passes over a session bring nothing new. The loss of a step is 0: nothing is minimised.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is put in evaluation mode, and its parameters
            require no gradient any more. Its head is not used.
        dtype: of the statistics, "float64" or "float32".

    """

    takes_regularisers = False
    rehearsal_free = True
    fixed_classes = "classes that came, in all of it"
    not_state = ("solved",)

    by_class: Mapping[str, int] = MappingProxyType({"counts": 0, "sums": 0})
    """Statistics that have an entry for each class, and the dimension of the classes."""

    def __init__(self, model: nn.Module, dtype: str = "float64") -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} takes a torch module as its model, not {model!r}")
        if not callable(getattr(model, "features", None)):
            raise TypeError(
                f"{name} needs a model with a method `features` that returns (n, features), which {type(model).__name__} hasn't"
            )
        check_choice(("float32", "float64"), dtype=dtype)
        self.model, self.dtype, self.classes = model, dtype, 0
        self.statistics: dict[str, Tensor] = {}
        self.waiting: list[tuple[Tensor, Tensor]] = []  # features and labels that were not taken up yet
        self.solved: tuple[Any, Tensor] | None = None  # what `solve` made, with what waits, and which classes did not come

    @on(RunStarted)
    def freeze(self, event: RunStarted) -> None:
        """Freeze the network, and start with no statistics."""
        self.model.eval().requires_grad_(False)
        self.classes, self.statistics, self.waiting, self.solved = event.stream.classes, {}, [], None

    @on(RunContinued)
    def widen(self, event: RunContinued) -> None:
        """Give the statistics rows of zeros for new classes."""
        for name, dimension in self.by_class.items():
            if name in self.statistics:
                old = self.statistics[name]
                more = [*old.shape]
                more[dimension] = max(0, event.stream.classes - old.shape[dimension])
                self.statistics[name] = torch.cat([old, old.new_zeros(more)], dimension)
        self.solved = None

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return the network's (n, features) for raw inputs, in the dtype of the statistics."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        if features.dim() != 2:
            raise ValueError(f"{type(self.model).__name__}.features must return (n, features), not {tuple(features.shape)}")
        return features.to(getattr(torch, self.dtype))

    def learn(self, batch: Batch) -> Tensor:
        """Take up the features of a batch, in the first pass over its session."""
        if batch.epoch == 0:
            with same_flops(len(batch.samples)):  # later passes cost nothing
                features = self.features(batch.samples.x)
            self.receive(features, batch.samples.y)
        return torch.zeros((), device=batch.samples.y.device)

    def receive(self, features: Tensor, y: Tensor) -> None:
        """Have (n, features) with their labels wait, until there are many."""
        self.waiting.append((features, y))
        self.solved = None
        if sum(len(labels) for _, labels in self.waiting) >= TOGETHER:
            self.take_up_waiting()

    @on(SessionEnded)
    def end_session(self, event: SessionEnded) -> None:
        """Take up what is left of the session."""
        self.take_up_waiting()

    def take_up_waiting(self) -> None:
        """Add the features that wait to the statistics."""
        with consolidating():
            self.statistics, self.waiting, self.solved = self.with_waiting(copy=False), [], None

    @torch.no_grad()
    def with_waiting(self, copy: bool = True) -> dict[str, Tensor]:
        """Return the statistics with those of the features that wait; an answer must not change them, so it takes a copy."""
        statistics = {name: tensor.clone() for name, tensor in self.statistics.items()} if copy else self.statistics
        if self.waiting:
            features, y = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            statistics = statistics or self.start(features)
            self.take_up(statistics, features, y)
        return statistics

    def start(self, features: Tensor) -> dict[str, Tensor]:
        """Return statistics of no samples: here their number by class (classes,), and sums of features (classes, features)."""
        return {
            "counts": features.new_zeros(self.classes),
            "sums": features.new_zeros(self.classes, features.shape[1]),
        }

    def take_up(self, statistics: dict[str, Tensor], features: Tensor, y: Tensor) -> None:
        """Add (n, features) with their (n,) labels to statistics, in place."""
        add_by_class(statistics["counts"], y, torch.ones_like(features[:, 0]))
        add_by_class(statistics["sums"], y, features)

    @abstractmethod
    def solve(self, statistics: Mapping[str, Tensor]) -> object:
        """Return what answers are computed from."""

    @abstractmethod
    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return (n, classes), higher is likelier, for (n, features); of classes that did not come it may be anything."""

    def export(self, since: Payload | None = None) -> dict[str, Tensor]:
        """Return the statistics of all samples, or of those that came `since` others were taken over: sums, as `merge` takes them.

        Empty before the first sample.
        """
        own = self.with_waiting()
        return {name: tensor - since[name].to(tensor) if since else tensor for name, tensor in own.items()}

    def merge(self, payloads: Payload | Iterable[Payload], weights: Sequence[float] | None = None) -> None:
        """Add what other learners around the same network exported: as if their samples had come here.

        Args:
            payloads: what `export` of others returned: one, or several.
            weights: without meaning here: sums hold the numbers of their samples.

        Raises ValueError, before anything changes, for what `check_payload` refuses.
        """
        payloads = as_payloads(payloads)
        for payload in payloads:
            self.check_payload(payload)
        merged = self.with_waiting()
        for payload in payloads:
            if merged and payload:
                merged = {name: tensor + payload[name].to(tensor) for name, tensor in merged.items()}
            else:
                merged = merged or {name: tensor.clone() for name, tensor in payload.items()}
        self.statistics, self.waiting, self.solved = merged, [], None

    def check_payload(self, payload: Payload) -> None:
        """Raise ValueError for statistics of other names or shapes, or of numbers that are not finite."""
        check_is_payload(payload, type(self).__name__)
        if not payload:
            return
        own = self.with_waiting() or payload
        shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in (own, payload)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{type(self).__name__} has statistics of the shapes {shapes[0]}, and these are of {shapes[1]}")
        check_tensors(payload, type(self).__name__, shapes[0])

    @torch.no_grad()
    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes) scores; -inf for classes that did not come."""
        if not self.statistics and not self.waiting:
            width = self.classes or self.model(x).shape[1]
            return torch.full((len(x), width), float("-inf"), device=x.device)
        if self.solved is None:
            with same_flops(("solve", sum(len(labels) for _, labels in self.waiting))):
                statistics = self.with_waiting()
                self.solved = self.solve(statistics), statistics["counts"] == 0
        solved, absent = self.solved
        return self.answer(solved, self.features(x)).masked_fill(absent, float("-inf")).float()

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores


def class_means(statistics: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each class: (classes, features); 0 of those that did not come."""
    return statistics["sums"] / statistics["counts"].clamp(min=1)[:, None]


def add_by_class(sums: Tensor, y: Tensor, rows: Tensor) -> None:
    """Add each of (n, ...) rows to the sum of its class, in place, in (classes, ...) sums: in the same order each time.

    On a GPU `index_add_` adds in no fixed order, and `index_put_` with `accumulate` in a fixed one; on the CPU it is the other way.
    """
    if sums.is_cuda:
        sums.index_put_((y,), rows, accumulate=True)
    else:
        sums.index_add_(0, y, rows)
