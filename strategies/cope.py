"""CoPE, continual prototype evolution: embeddings learn beside prototypes that follow them, and the nearest prototype answers.

De Lange, Tuytelaars 2021, "Continual Prototype Evolution: Learning Online from Non-Stationary Data Streams" (ICCV). Form
implemented, with z = g(f(x)) / |g(f(x))| the embedding, f the model's `features` and g a linear layer, p_c the prototype of class
c, of length 1, and T the temperature. A batch and as many samples of a class-balanced memory, without repeats, are B. A step is on
the pseudo-prototypical proxy loss (PPP), whose proxies of a class are its prototype and the other samples of it in B:

    P(c | z, q) = exp(q z / T) / ( exp(q z / T) + sum over classes k other than c of exp(p_k z / T) )

    -1/|B|  sum over c  [ sum over i in B_c of  log( (sum over j in B_c, j not i, of P(c | z_i, z_j) + P(c | z_i, p_c)) / |B_c| )
                        + sum over i in B_c, j not in B_c of  log( 1 - (P(c | z_j, z_i) + P(c | z_j, p_c)) / 2 ) ]

The first sum draws a sample to the proxies of its class; there the z_j are constants, as in the authors' code. The second pushes
samples of other classes away from them; there each z learns. Classes that never came have no prototype and are in no sum. After
the step each class in B moves its prototype to the mean of its embeddings, those of before the step:

    p_c <- alpha p_c + (1 - alpha) mean of z over B_c, divided by its length

and the batch is offered to the memory. A prototype starts as a random direction, of numbers from 0 to 1, when its class first
comes. An answer has the logits p_c z / T, of classes that came. It needs no task boundaries. The model's own head is not used.

Avalanche's plugin has prototypes of all classes from the start, of numbers from -1 to 1, so those of classes to come push and
answer too; it takes the z_i of the second sum for constants as well, and divides the mean of z by its length before it is added.

Deviations: samples are drawn from the memory at random, in the code a class first and then a sample of it, which is the same where
each class has as many; the shares of classes are as `ClassBalanced` has them (the code: capacity / classes, or one share for each
class from the start). The authors' code leaves the moved prototype as long as it is, which their notes call slightly better;
Avalanche's divides it, as here. Left out: several steps for a batch. With several epochs a session is offered in its first pass
only.

Measured (anchor `cope-split-mnist`: class-IL Split MNIST, one epoch, batch 10 + 10, memory 2000, SGD 0.01, width 32, Mlp 400-400):
accuracy 0.929 ± 0.011 over 3 seeds; ContinualAI's continual-learning-baselines have 0.93 for Avalanche's CoPE, so set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, RunContinued, RunStarted, SessionStarted
from clstream.memory import ClassBalanced
from clstream.params import check_integer, check_positive, check_share
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, Task


class CoPE(Strategy):
    """Learn embeddings by the pseudo-prototypical proxy loss, and answer by prototypes that follow them.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), and a `head` that tells their width.
        optimizer: makes the optimizer from the model's parameters; those of the embedding join it.
        capacity: the most samples that are kept, the classes' shares as equal as possible.
        replay_batch: how many kept samples are drawn for each batch, at most all. None: as many as the batch holds.
        alpha: how much of a prototype stays in each step.
        temperature: T, which cosines are divided by.
        width: of the embedding.

    """

    learns_targets = ("label",)
    fixed_classes = "those that came, in all of it"
    not_state = (*Strategy.not_state, "embedded")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.01),
        capacity: int = 2000,
        replay_batch: int | None = None,
        alpha: float = 0.99,
        temperature: float = 0.1,
        width: int = 100,
    ) -> None:
        super().__init__(model, optimizer)
        check_integer(1, none=True, replay_batch=replay_batch)
        check_integer(1, width=width)
        check_share(alpha=alpha)
        check_positive(temperature=temperature)
        features = getattr(getattr(model, "head", None), "in_features", None)
        if not callable(getattr(model, "features", None)) or not isinstance(features, int):
            raise TypeError(
                "CoPE needs a model with a method `features` and a linear `head`, as those of clstream, which "
                f"{type(model).__name__} hasn't"
            )
        self.embedding = nn.Linear(features, width)
        self.optimizer.add_param_group({"params": list(self.embedding.parameters())})
        self.memory, self.replay_batch = ClassBalanced(capacity), replay_batch
        self.alpha, self.temperature = alpha, temperature
        self.prototypes = torch.empty(0, width)  # a row for each class of the sessions so far
        self.labels = torch.empty(0, dtype=torch.int64)  # (rows,): whose it is
        self.came = torch.empty(0, dtype=torch.bool)  # (rows,): whether it came in a batch; if not, the prototype waits
        self.embedded: tuple[Tensor, Tensor] | None = None  # (n, width) embeddings of the step under way, and labels
        self.classes = 0
        self.random = torch.Generator()

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Start with no prototypes."""
        device = event.stream.device or "cpu"
        self.prototypes, self.labels, self.came = (rows[:0].to(device) for rows in (self.prototypes, self.labels, self.came))
        self.classes = event.stream.classes

    @on(RunContinued)
    def widen(self, event: RunContinued) -> None:
        """Take down how many classes there are now."""
        self.classes = event.stream.classes

    @on(SessionStarted)
    def grow(self, event: SessionStarted) -> None:
        """Draw a prototype for each class that is new."""
        known = self.labels.tolist()
        new = [label for label in event.session.classes if label not in known]
        if new:
            self.add_prototypes(new)

    def add_prototypes(self, labels: list[int]) -> None:
        """Draw prototypes for some classes: random directions of numbers from 0 to 1."""
        rows = F.normalize(torch.rand(len(labels), self.prototypes.shape[1], generator=self.random), dim=1)
        self.prototypes = torch.cat([self.prototypes, rows.to(self.prototypes)])
        self.labels = torch.cat([self.labels, self.labels.new_tensor(labels)])
        self.came = F.pad(self.came, (0, len(labels)))

    def embed(self, x: Tensor) -> Tensor:
        """Return the (n, width) embeddings of raw inputs, of length 1."""
        return F.normalize(self.embedding(self.model.features(x)), dim=1)  # type: ignore[operator]  # the constructor has asked for it

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return one draw, if anything is kept."""
        return (self.memory.sample(self.replay_batch or len(samples), repeats=False),) if len(self.memory) else ()

    def loss(self, samples: Samples) -> Tensor:
        """Return the PPP loss of the samples and of those drawn beside them."""
        for past in self.drawn_for(samples):
            samples = samples + past
        z = self.embed(samples.x if self.augment is None else self.augment(samples.x))
        self.came = self.came | (samples.y[:, None] == self.labels).any(0)
        self.embedded = z.detach(), samples.y
        return self.ppp_loss(z, samples.y)

    def ppp_loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the pseudo-prototypical proxy loss of (n, width) embeddings with (n,) labels: a scalar."""
        n, lowest = len(z), torch.finfo(z.dtype).min
        to_prototypes = (z @ self.prototypes.T / self.temperature).masked_fill(~self.came, lowest)  # (n, rows)
        own = y[:, None] == self.labels  # (n, rows)
        # (class of i, j): log of the sum over the other classes' prototypes, of z_j
        others = to_prototypes[None].masked_fill(own[:, None], lowest).logsumexp(2)  # (n, n)
        same = y[:, None] == y
        itself = same.new_ones(n).diag()
        # log P(c | z_i, z_j) is logsigmoid(z_j z_i / T - others), and log(1 - P) that of its negative
        mine = others.diagonal()[:, None]
        pairs = (z @ z.detach().T / self.temperature - mine).masked_fill(~same | itself, float("-inf"))
        rows = own.int().argmax(1)
        near = torch.cat([pairs, to_prototypes.gather(1, rows[:, None]) - mine], 1)
        drawn = F.logsigmoid(near).masked_fill(near == float("-inf"), lowest).logsumexp(1) - same.sum(1).to(z.dtype).log()
        from_samples = F.logsigmoid(others - self.proxies(z) @ z.T / self.temperature)
        from_prototypes = F.logsigmoid(others - to_prototypes.T[rows])
        pushed = torch.logaddexp(from_samples, from_prototypes) - math.log(2)
        return -(drawn.sum() + pushed.masked_fill(same, 0).sum()) / n

    def proxies(self, z: Tensor) -> Tensor:
        """Return the embeddings that push samples of other classes away: they learn by it."""
        return z

    @on(BatchLearned)
    def follow(self, event: BatchLearned) -> None:
        """Move the prototypes of the classes that were learned, and offer the batch to the memory."""
        assert self.embedded is not None
        z, y = self.embedded
        means = self.means(z, y)
        moved = F.normalize(self.alpha * self.prototypes + (1 - self.alpha) * means, dim=1)
        self.prototypes = torch.where((means != 0).any(1, keepdim=True), moved, self.prototypes)
        self.embedded = None
        if event.batch.epoch == 0:
            self.memory.add(event.batch.samples)

    def means(self, z: Tensor, y: Tensor) -> Tensor:
        """Return (rows, width): the mean of the (n, width) embeddings of each class; 0 of those that there are none of."""
        own = (self.labels[:, None] == y).to(z.dtype)
        return own @ z / own.sum(1, keepdim=True).clamp(min=1)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): logits by prototype; -inf for classes that did not come. Before one came, the model's outputs."""
        if not len(self.memory):
            outputs: Tensor = self.model(x)
            return outputs
        logits = (self.embed(x) @ self.prototypes.T / self.temperature).masked_fill(~self.came, float("-inf"))
        return logits.new_full((len(x), self.classes), float("-inf")).index_copy(1, self.labels, logits)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the weights and buffers of the model and of the embedding, and the prototypes."""
        yield from super().answering_weights()
        yield from (*self.embedding.parameters(), self.prototypes)
