"""Prototypical networks: features are trained on few-shot episodes, then frozen, and classes are the means of their samples.

Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning". Form implemented, with f the features of a network.
`EpisodicTraining` minimises for one episode after the other, each of `ways` classes with `shots` support samples and some queries,

    mean over queries (x, c) of -log softmax_c s(f(x), m),    m_k the mean of f over the support samples of class k,

with s(f, m) = -|f - m|^2, the cosine of f and m, or their dot product, times `scale`. Support and queries pass the network apart,
so that in batch norm each has its own statistics. `ProtoNet` then answers by s, with the means over all samples of a class so far.
It takes no step, so what comes when does not matter.

Deviations: an episode is drawn from a batch of the stream, which must be large (all of the training samples are best), and its
classes are drawn without a bias for large ones. A linear head learns on the features beside that, and passes no gradient to them:
it is what `EpisodicTraining` answers with. The code of Kowadlo et al. (github.com/Cerenaut/cfsl) calls the dot product "matching"
and "cosine"; there, each mean is divided by the samples of all support sets, and classes that an episode does not have compete with
a prototype of 0. Neither is done here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.events import EpochEnded, EpochStarted
from clstream.losses import SIMILARITIES, prototype_scores, prototypical
from clstream.measures.flops import same_flops
from clstream.params import check_bool, check_choice, check_integer, check_positive
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.frozen_features import FrozenFeatures, class_means
from clstream.stream import Batch, Samples


class ProtoNet(FrozenFeatures):
    """Answer by the prototypes of classes, the means of their features; the network is frozen.

    Args:
        model: has `features`: (n, *input_shape) raw inputs to (n, features). It is frozen, and its head is not used.
        similarity: "squared" (minus the squared distance), "cosine" or "dot" (the dot product).
        scale: of the similarities, which are logits.
        dtype: of the statistics, "float64" or "float32".

    """

    def __init__(self, model: nn.Module, similarity: str = "squared", scale: float = 1.0, dtype: str = "float64") -> None:
        super().__init__(model, dtype)
        check_choice(SIMILARITIES, similarity=similarity)
        check_positive(scale=scale)
        self.similarity, self.scale = similarity, scale

    def solve(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the prototypes: (classes, features)."""
        return class_means(statistics)

    def answer(self, solved: Any, features: Tensor) -> Tensor:
        """Return the similarities: (n, classes)."""
        return prototype_scores(features, solved, self.similarity, self.scale)

    def answer_together(self, support: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
        """Return the scores of the questions of several episodes, as if each had been learned alone: (episodes, asked, classes).

        Args:
            support: (episodes, sets, n, *input_shape), raw.
            labels: (episodes, sets, n), int64.
            asked: (episodes, asked, *input_shape), raw.
            classes: the number of labels.

        """
        learned = self.features(support.flatten(0, 2)).unflatten(0, labels.flatten(1).shape)  # (episodes, sets * n, features)
        questions = self.features(asked.flatten(0, 1)).unflatten(0, asked.shape[:2])
        members = F.one_hot(labels.flatten(1), classes).to(learned)  # (episodes, sets * n, classes)
        counts = members.sum(1)
        prototypes = members.mT @ learned / counts.clamp(min=1)[:, :, None]
        scores = prototype_scores(questions, prototypes, self.similarity, self.scale)
        return scores.masked_fill((counts == 0)[:, None], float("-inf")).float()


class EpisodicTraining(Strategy):
    """Train features on episodes that are drawn from each batch, and a linear head on them.

    A batch with fewer classes that have enough samples gives an episode of these; one with fewer than two teaches the head alone,
    and where all batches of a pass over a session are so, a warning says it.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), and a `head`, a module from these to the outputs.
        optimizer: makes the optimizer from the model's parameters.
        ways: classes of an episode.
        shots: support samples of each class.
        queries: samples of each class that are asked about.
        similarity: "squared" (minus the squared distance), "cosine" or "dot" (the dot product).
        scale: of the similarities, which are logits.
        turn: whether each class of an episode is turned by 0, 90, 180 or 270 degrees, so that there are more of them; for square
            images.
        active_classes: whose outputs compete for the head, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = ("schedule", "renew_optimizer")
    rehearsal_free = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.001),
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        similarity: str = "squared",
        scale: float = 1.0,
        turn: bool = False,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(2, ways=ways)
        check_integer(1, shots=shots, queries=queries)
        check_choice(SIMILARITIES, similarity=similarity)
        check_positive(scale=scale)
        check_bool(turn=turn)
        if not callable(getattr(model, "features", None)) or not isinstance(getattr(model, "head", None), nn.Module):
            raise TypeError(
                f"EpisodicTraining needs a model with a method `features` and a `head`, which {type(model).__name__} hasn't"
            )
        self.ways, self.shots, self.queries = ways, shots, queries
        self.similarity, self.scale, self.turn = similarity, scale, turn
        self.episodes = 0  # of the pass that goes on
        self.random = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return support samples and queries of an episode, each class by class; nothing where there is no episode."""
        if samples.x.dim() != 4 and self.turn:
            raise ValueError(f"turn=True is for images (channels, height, width), not for inputs of {tuple(samples.x.shape[1:])}")
        needed = self.shots + self.queries
        y = samples.y.cpu()
        labels, counts = y.unique(return_counts=True)
        enough = labels[counts >= needed]
        chosen = enough[torch.randperm(len(enough), generator=self.random)[: self.ways]].tolist()
        if len(chosen) < 2:
            return ()
        support: list[Tensor] = []
        queries: list[Tensor] = []
        for label in chosen:
            own = (y == label).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=self.random)[:needed]]
            support.append(own[: self.shots])
            queries.append(own[self.shots :])
        turns = torch.randint(4, (len(chosen),), generator=self.random).tolist() if self.turn else []
        parts = [samples[torch.cat(rows).to(samples.y.device)] for rows in (support, queries)]
        return tuple(_turned(part, turns) if turns else part for part in parts)

    def loss(self, samples: Samples) -> Tensor:
        """Return the prototypical loss of an episode of these samples, and the head's loss on the features."""
        drawn = self.drawn_for(samples) or (samples,)
        features = [self.features(part.x if self.augment is None else self.augment(part.x)) for part in drawn]
        outputs: Tensor = self.model.head(torch.cat(features).detach())  # type: ignore[operator]  # the constructor has asked for it
        whole = drawn[0] if len(drawn) == 1 else drawn[0] + drawn[1]
        loss = self.loss_of_outputs(outputs, whole)
        if len(drawn) == 1:
            return loss
        self.episodes += 1
        support, queries = features
        return loss + prototypical(support, queries, len(support) // self.shots, self.similarity, self.scale)

    def learn(self, batch: Batch) -> Tensor:
        """Take one step on an episode that is drawn from a batch, and return its loss."""
        drawn = self.draw(batch.samples)
        with same_flops(tuple(map(len, drawn)) or len(batch.samples)):
            loss = self.objective_with(batch.samples, drawn)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def features(self, x: Tensor) -> Tensor:
        """Return the model's (n, features) for raw inputs."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return features

    @on(EpochStarted)
    def begin_pass(self, event: EpochStarted) -> None:
        """Count the episodes of a pass."""
        self.episodes = 0

    @on(EpochEnded)
    def check_episodes(self, event: EpochEnded) -> None:
        """Warn where all batches of a pass were too small for any episode."""
        if not self.episodes:
            warnings.warn(
                f"EpisodicTraining: no batch of session {event.epoch.session.index} has two classes with {self.shots} shots and "
                f"{self.queries} queries each, so the features learned nothing: take larger batches (best of all samples)",
                stacklevel=2,
            )


def _turned(samples: Samples, turns: list[int]) -> Samples:
    """Return samples, class by class, each class turned by so many right angles."""
    parts = samples.x.split(len(samples) // len(turns))
    x = torch.cat([part.rot90(turn, (2, 3)) for part, turn in zip(parts, turns, strict=True)])
    return Samples(x, samples.y, samples.extra, samples.target)
