"""NEVIS's learners, by what a task starts from; the search inside a task is that of `clstream.strategies.nevis.search`.

NEVIS'22 (Bornschein et al., arXiv 2211.11747; JMLR 24(308), 2023), as its code (google-deepmind/dm_nevis, 2022-12-13) has it.

Independent   the weights that the learner came with
Previous      the final model of the task before; the heads of all tasks come along
DynamicKNN    the best one of all final models and the weights that the learner came with: that in whose features the nearest
              neighbours among the task's training samples are right most often on its validation samples (accuracy, or mean average
              precision)
FrozenLinear  a backbone that stays as it is, pre-trained, and a linear head for each task: not the code's, but the row that a user
              of such a network compares with

Two quirks of DynamicKNN in the code are options, off here. Its features are computed as in training, by the statistics of each
batch (`embedding="batch"`), so a score depends on which samples come together. And the weights that it came with are ranked, but
they are not among the stored states: where they win, the next best one is taken (`scratch_counts=False`).

Deviations: the squared Euclidean distance, and one neighbour unless said otherwise (the code's choice was not re-read). Where a
stream holds back no validation samples, each training sample is answered by its neighbours among the others.

Measured, own numbers (`experiments/nevis.py`: mini_nevis, 14 tasks, 3 seeds): mean error 0.388 ± 0.077 (Independent), 0.381 ± 0.026
(Previous), 0.380 ± 0.005 (DynamicKNN), 0.304 ± 0.022 (FrozenLinear, for 3.4 times the FLOPs). Nothing published is for this.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from clstream.strategies.nevis.search import FinalModel, TaskSearch, quality
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted
from clstream.params import check_bool, check_choice, check_integer
from clstream.seeds import derive
from clstream.strategy import OptimizerFactory
from clstream.stream import Samples, Session, Subset

MOST_TRAIN, MOST_HELD_OUT = 10_000, 5_000
"""Training and validation samples whose features are compared, at most."""

EMBEDDED = 128
"""Samples whose features are computed together, at most."""


class Independent(TaskSearch):
    """Learn each task from the weights that the learner came with.

    Args:
        model, optimizer, rates, trials, warmup: see `clstream.strategies.nevis.search.TaskSearch`.

    """


class Previous(TaskSearch):
    """Learn each task from the final model of the one before.

    Args:
        model, optimizer, rates, trials, warmup: see `clstream.strategies.nevis.search.TaskSearch`.

    """

    def start(self, session: Session) -> FinalModel | None:
        """Return the newest final model."""
        return self.newest


class DynamicKNN(TaskSearch):
    """Learn each task from the model in whose features the task's nearest neighbours are right most often.

    Args:
        model: as for the other learners, with `features`, (n, *input_shape) raw inputs to (n, features).
        optimizer, rates, trials, warmup: see `clstream.strategies.nevis.search.TaskSearch`.
        neighbours: how many vote.
        embedding: "eval" (features as in answers) or "batch" (as in training, by the statistics of each batch of 128).
        scratch_counts: whether the weights that the learner came with may win; if not they are ranked, and passed over.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4),
        rates: list[float] | None = None,
        trials: int | None = None,
        warmup: int = 1,
        neighbours: int = 1,
        embedding: str = "eval",
        scratch_counts: bool = True,
    ) -> None:
        super().__init__(model, optimizer, rates, trials, warmup)
        check_integer(1, neighbours=neighbours)
        check_choice(("eval", "batch"), embedding=embedding)
        check_bool(scratch_counts=scratch_counts)
        check_features(self, model)
        self.neighbours, self.embedding, self.scratch_counts = neighbours, embedding, scratch_counts

    def start(self, session: Session) -> FinalModel | None:
        """Return the best final model, of equals the newest; None if the weights that the learner came with are better."""
        train = self.some(session.samples, MOST_TRAIN, session.index)
        held = session.task.validation
        asked = None if held is None else self.some(held, MOST_HELD_OUT, session.index)
        candidates = [*reversed(self.finals.values()), None]
        scores = [self.neighbours_score(self.model if final is None else final.network, train, asked) for final in candidates]
        if not self.scratch_counts:
            scores.pop()
        return candidates[max(range(len(scores)), key=lambda number: scores[number])]

    def some(self, part: Samples | Subset, most: int, session: int) -> Samples:
        """Return at most so many samples, drawn from the run's seed and the session."""
        if len(part) <= most:
            return part[:]
        draw = torch.Generator().manual_seed(derive(self.seed, "neighbours", session))
        return part[torch.randperm(len(part), generator=draw)[:most].to(part.y.device)]

    def neighbours_score(self, network: nn.Module, train: Samples, asked: Samples | None) -> float:
        """Return how often, or how well, the nearest training samples answer; without `asked`, for each one of the others."""
        features = self.embed(network, train.x)
        similar = 2 * (features if asked is None else self.embed(network, asked.x)) @ features.T - features.square().sum(1)
        if asked is None:
            similar.fill_diagonal_(float("-inf"))
        nearest = similar.topk(min(self.neighbours, len(features) - (asked is None)), dim=1).indices
        y, of = train.y.to(features.device), (train if asked is None else asked)
        labels, place = y.unique(return_inverse=True) if train.target == "label" else (None, None)
        if labels is None or place is None:
            return quality(y[nearest].mean(1), of.y.to(features.device), "multilabel")
        voted = labels[F.one_hot(place[nearest], len(labels)).sum(1).argmax(1)]
        return float((voted == of.y.to(features.device)).double().mean())

    def embed(self, network: nn.Module, x: Tensor) -> Tensor:
        """Return the (n, features) features of raw inputs."""
        device, chunks = next(network.parameters()).device, x.tensor_split(-(-len(x) // EMBEDDED))
        if self.embedding == "batch":
            network = deepcopy(network).train()  # a copy, whose running statistics are nobody's
            with torch.no_grad():
                return torch.cat([network.features(chunk.to(device)) for chunk in chunks])  # type: ignore[operator]  # it was asked for
        with evaluating(self):
            return torch.cat([network.features(chunk.to(device)) for chunk in chunks])  # type: ignore[operator]  # as above


class FrozenLinear(TaskSearch):
    """Learn a linear head for each task on the features of a frozen backbone, which are computed once for all trials.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), and a `head`, a module from these to the outputs. The
            parameters outside of the head require no gradient any more.
        optimizer, rates, trials, warmup: see `clstream.strategies.nevis.search.TaskSearch`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4),
        rates: list[float] | None = None,
        trials: int | None = None,
        warmup: int = 1,
    ) -> None:
        super().__init__(model, optimizer, rates, trials, warmup)
        check_features(self, model)
        if not isinstance(getattr(model, "head", None), nn.Module):
            raise TypeError(f"FrozenLinear needs a model with a module `head`, which {type(model).__name__} hasn't")
        model.requires_grad_(False)
        self.network.requires_grad_(True)

    @property
    def network(self) -> nn.Module:
        """The model's head."""
        head: nn.Module = self.model.head  # type: ignore[assignment]  # the constructor has asked for it
        return head

    @on(RunStarted)
    def freeze(self, event: RunStarted) -> None:
        """Put the backbone in evaluation mode."""
        self.model.eval()

    def inputs(self, x: Tensor) -> Tensor:
        """Return the (n, features) features of raw inputs, without gradients."""
        with torch.no_grad():
            features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return features

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of the backbone, and of all heads."""
        heads = [final.network for final in self.finals.values()]
        own = {id(tensor) for tensor in (*self.network.parameters(), *self.network.buffers())} if heads else set[int]()
        for module in (self.model, *heads):
            yield from (tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own)


def check_features(learner: TaskSearch, model: nn.Module) -> None:
    """Raise TypeError for a model without features."""
    if not callable(getattr(model, "features", None)):
        raise TypeError(f"{type(learner).__name__} needs a model with a method `features`, which {type(model).__name__} hasn't")
