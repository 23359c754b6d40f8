"""ASER: what is replayed, and kept, is chosen by the Shapley values of kept samples for a nearest-neighbour classifier.

Shim, Mai, Jeong, Sanner, Kim, Jang 2021, "Online Class-Incremental Continual Learning with Adversarial Shapley Value" (AAAI), in
the form of the authors' code (github.com/RaptorMai/online-continual-learning). The value of candidate i for classifying a sample
(x, y) by its k nearest candidates in the network's features, alpha_1 the nearest of N (Jia et al. 2019):

    s(alpha_N) = 1[y_N = y] min(k, N) / (k N)
    s(alpha_m) = s(alpha_(m+1)) + (1[y_m = y] - 1[y_(m+1) = y]) min(k, m) / (k m)

a step  candidates are some kept samples of each class, drawn; those with the greatest adversarial value are replayed:

        "asv_mu"  mean of s over other kept samples, drawn likewise - mean of s over the batch
        "asv"     greatest of s over these - least of s over the batch
        "neg_sv"  - sum of s over the batch

        so that they stand for what was learned, and are near to what comes and of other classes. The step minimises the mean
        cross-entropy of both together. Until more came than the memory holds, what is replayed is drawn uniformly
update  when the step is over: what there is room for is kept. With a full memory, candidates are the batch and per_class * classes
        kept samples, drawn uniformly; a candidate's value is the sum of s over other kept samples, per_class of each class. As many
        as there were kept candidates stay, those of the greatest values: samples of the batch take the places of others. A class
        that has less of the memory than a share, drawn for each batch from 0 to 1 / classes, has its new samples among those
        classified

Features are those of the network in evaluation mode, of inputs that aren't augmented. It needs no boundaries. With several epochs
(the paper has one) a session is offered in its first pass only.

Deviations: classes are those that memory and batch hold, where the code has all of the data set, which a learner can't know. The
code has 1 / N for the farthest, which is the same unless there are less than k candidates. Where no kept samples are left beside
the candidates, the first term of a value is 0, where the code fails. The code also takes gradients of the batch and of what is
replayed, and drops both. Its configs for CIFAR-10 have 9 candidates of each class and k = 3. Of the code's options the updates and
retrievals of others are left out.

Measured (class-IL Split MNIST, Mlp 400-400, one pass in batches of 32, memory of 500, three seeds): accuracy 0.747 ± 0.051.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import BatchLearned
from clstream.measures.flops import same_flops
from clstream.memory import Memory
from clstream.params import check_choice, check_integer
from clstream.strategy import CONTROLS, OptimizerFactory, Strategy
from clstream.stream import Batch, Samples

RETRIEVALS = ("asv_mu", "asv", "neg_sv")


class ExchangingMemory(Memory):
    """Samples that are kept until others are put in their places."""

    def put(self, samples: Samples, slots: Tensor) -> None:
        """Keep samples in (n,) slots, no one twice; those that are new come after those that hold samples."""
        self._prepare(samples)
        self._write(samples, slots.numpy(), torch.arange(len(samples)).numpy())
        self.size = max(self.size, int(slots.max()) + 1)

    def balanced(self, per_class: int, without: Tensor) -> Tensor:
        """Return the places of so many samples of each class, drawn, (n,) on the CPU; none of (size,) bool `without`."""
        rows = torch.randperm(self.size, generator=self.random)
        rows = rows[~without[rows]]
        y = self.all().y.cpu()[rows]
        order = y.argsort(stable=True)
        counts = y.bincount()
        rank = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return rows[order[rank < per_class]]


class ASER(Strategy):
    """Replay, and keep, samples by their Shapley values for a nearest-neighbour classifier.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), beside (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most samples that are kept.
        replay_batch: how many kept samples are learned beside each batch, at most the candidates: with as few as
            these, values choose nothing.
        retrieval: "asv_mu", "asv" or "neg_sv".
        k: how many nearest candidates classify a sample.
        per_class: how many kept samples of each class are drawn as candidates, and as many to be classified.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    takes_controls = CONTROLS
    learns_targets = ("label",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1),
        capacity: int = 500,
        replay_batch: int = 10,
        retrieval: str = "asv_mu",
        k: int = 5,
        per_class: int = 2,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, replay_batch=replay_batch, k=k, per_class=per_class)
        check_choice(RETRIEVALS, retrieval=retrieval)
        if not callable(getattr(model, "features", None)):
            raise TypeError(
                f"ASER needs a model with a method `features`, as those of clstream, which {type(model).__name__} hasn't"
            )
        self.memory = ExchangingMemory(capacity)
        self.replay_batch, self.retrieval, self.k, self.per_class = replay_batch, retrieval, k, per_class

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return what is replayed beside a batch, if anything is kept."""
        memory = self.memory
        if not len(memory):
            return ()
        if memory.seen <= memory.capacity:
            return (memory.sample(self.replay_batch, repeats=False),)
        candidates = memory.balanced(self.per_class, torch.zeros(len(memory), dtype=torch.bool))
        others = memory.balanced(self.per_class, torch.zeros(len(memory), dtype=torch.bool).index_fill_(0, candidates, True))
        kept = memory.all()
        chosen = kept[candidates.to(kept.y.device)]
        values = self.adversarial_values(chosen, kept[others.to(kept.y.device)], samples)
        return (chosen[values.argsort(descending=True, stable=True)[: self.replay_batch]],)

    def adversarial_values(self, candidates: Samples, kept: Samples, batch: Samples) -> Tensor:
        """Return (candidates,), what `retrieval` says of the values of candidates for kept samples and for a batch."""
        shapley = self.shapley(kept + batch, candidates)
        cooperative, adversarial = shapley[: len(kept)], shapley[len(kept) :]
        if self.retrieval == "neg_sv":
            return -adversarial.sum(0)
        if not len(kept):
            cooperative = torch.zeros_like(shapley[:1])
        if self.retrieval == "asv":
            return cooperative.amax(0) - adversarial.amin(0)
        return cooperative.mean(0) - adversarial.mean(0)

    def shapley(self, classified: Samples, candidates: Samples) -> Tensor:
        """Return (classified, candidates) Shapley values in the network's features."""
        x = torch.cat([classified.x, candidates.x])
        with same_flops(("features", len(classified), len(candidates))), evaluating(self):
            features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
            one, two = features.flatten(1).split([len(classified), len(candidates)])
            return knn_shapley(one, classified.y, two, candidates.y, self.k)

    def learn(self, batch: Batch) -> Tensor:
        """Take one step on a batch and what is replayed beside it, as in any replay."""
        drawn = self.draw(batch.samples)
        with same_flops((len(batch.samples), *map(len, drawn))):
            loss = self.objective_with(batch.samples, drawn)
            self.minimise(loss)
        return loss.detach()

    def loss(self, samples: Samples) -> Tensor:
        """Return the mean cross-entropy of samples and of what is replayed beside them, together."""
        for past in self.drawn_for(samples):
            samples = samples + past
        return super().loss(samples)

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Offer the batch to the memory, in the first pass."""
        if event.batch.epoch:
            return
        samples, memory = event.batch.samples, self.memory
        room = memory.capacity - len(memory)
        memory.seen += len(samples)
        if room:
            fitting = samples[:room]
            memory.put(fitting, torch.arange(len(memory), len(memory) + len(fitting)))
        if len(samples) > room:
            self.exchange(samples[room:])

    def exchange(self, samples: Samples) -> None:
        """Put those of some new samples into the full memory whose values are greater than those of kept ones."""
        memory, new = self.memory, len(samples)
        classified = memory.balanced(self.per_class, torch.zeros(len(memory), dtype=torch.bool))
        kept = memory.all()
        classes = len(torch.cat([kept.y, samples.y]).unique())
        order = torch.randperm(len(memory), generator=memory.random)
        taken = torch.zeros(len(memory), dtype=torch.bool).index_fill_(0, classified, True)
        rows = order[~taken[order]][: self.per_class * classes]
        device = kept.y.device
        shares = (samples.y[:, None] == kept.y).float().mean(1)  # of the full memory, for each new sample's class
        least = float(torch.rand((), generator=memory.random)) / classes
        rare = samples[(shares < least).nonzero().flatten()]
        candidates = kept[rows.to(device)] + samples
        values = self.shapley(kept[classified.to(device)] + rare, candidates).sum(0)
        stays = values.argsort(descending=True, stable=True).cpu()[: len(rows)]
        enter = stays[stays >= len(rows)] - len(rows)
        leave = torch.ones(len(rows) + new, dtype=torch.bool).index_fill_(0, stays, False)[: len(rows)].nonzero().flatten()
        if len(enter):
            memory.put(samples[enter.to(device)], rows[leave])


def knn_shapley(features: Tensor, y: Tensor, candidates: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the Shapley values of candidates for classifying samples by their k nearest ones: (n, candidates).

    The worth of some candidates for a sample is the number of those of its label among the nearest k of them, divided by k.

    Args:
        features: (n, d), of the samples.
        y: (n,), their labels.
        candidates: (candidates, d).
        labels: (candidates,), theirs.
        k: how many classify.

    """
    order = torch.cdist(features, candidates).argsort(dim=1, stable=True)
    right = (labels[order] == y[:, None]).to(features.dtype)
    rank = torch.arange(1, len(labels) + 1, device=features.device)
    factor = rank.clamp(max=k) / (k * rank)
    steps = torch.cat([right[:, :-1] - right[:, 1:], right[:, -1:]], 1) * factor
    return torch.zeros_like(right).scatter_(1, order, steps.flip(1).cumsum(1).flip(1))
