"""Exemplars: what ICaRL, BiC, WA, LUCIR, PODNet and DynamicER share. A session is learned beside few samples of each class.

A session is what these papers have as a batch of classes; those that come in it are new, all others old. Each pass goes over the
session's samples and all exemplars, shuffled: a step takes a batch of the session, and its share of the exemplars (the codes
shuffle both together into batches of one size, so that a pass has more steps). When the session ends, each class keeps the first
capacity / classes of its samples in the order of their herding: with f the features divided by their length, the k-th is the one
that brings the mean of the first k nearest to the mean of all. Old classes keep their first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import BatchReady, EpochStarted, RunStarted, SessionEnded, SessionStarted
from clstream.params import check_integer
from clstream.strategy.answers import mask_logits
from clstream.strategy.core_sets import herding
from clstream.strategy.regulariser import frozen
from clstream.strategy.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, Task

TOGETHER = 1024
"""Samples whose features are computed together."""


class Rehearsal(Strategy):
    """Learn beside exemplars of old classes, with the network as it was before the session as a teacher of these.

    A subclass has a `loss` over `joined(samples)`. What comes with a class that is old by now makes it new again: its exemplars are
    chosen among the session's samples and those that it had.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with `features`: the same to (n, features).
        optimizer: makes the optimizer from the model's parameters.
        capacity: the most exemplars of all classes together.

    Raises:
        TypeError: for a model without `features`.

    """

    learns_targets = ("label",)
    fixed_classes = "old and new in the loss, in an answer those that came"

    least = 1
    """How many of the kept samples each class must have, at least."""

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, capacity: int) -> None:
        super().__init__(model, optimizer)
        name = type(self).__name__
        if not callable(getattr(model, "features", None)):
            raise TypeError(f"{name} needs a model with a method `features`, which {type(model).__name__} hasn't")
        check_integer(1, capacity=capacity)
        self.capacity = capacity
        self.random = torch.Generator()
        self.forget_all(0, (), "cpu")

    def forget_all(self, classes: int, input_shape: tuple[int, ...], device: torch.device | str) -> None:
        """Start with nothing learned, on a stream of so many classes and of inputs of a shape."""
        self.classes, self.input_shape = classes, input_shape
        self.exemplars: Samples | None = None  # class by class, each in the order of its herding
        self.counts: dict[int, int] = {}  # exemplars of each class, in their order
        self.teacher: nn.Module | None = None
        self.old_classes = self.new_classes = torch.empty(0, dtype=torch.int64, device=device)
        self.order = torch.empty(0, dtype=torch.int64)  # of the exemplars in the pass that goes on
        self.batches, self.turn = 1, 0

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Forget the exemplars: nothing was learned yet."""
        self.forget_all(event.stream.classes, event.stream.input_shape, event.stream.device or "cpu")

    @on(SessionStarted)
    def open(self, event: SessionStarted) -> None:
        """Make the network as it is the teacher of the old classes. Raises ValueError for more classes than there is room for."""
        new = event.session.classes
        old = [label for label in self.counts if label not in new]
        if (len(new) + len(old)) * self.least > self.capacity:
            raise ValueError(
                f"session {event.session.index} makes it {len(new) + len(old)} classes, and capacity={self.capacity} exemplars are "
                f"fewer{f' than {self.least} of each' * (self.least > 1)}: take a larger capacity"
            )
        self.new_classes, self.old_classes = (self.new_classes.new_tensor(labels) for labels in (new, sorted(old)))
        self.teacher = frozen(self.model) if old else None

    @on(EpochStarted)
    def shuffle(self, event: EpochStarted) -> None:
        """Put the exemplars in a new order, to be spread over the batches of the pass."""
        self.order = torch.randperm(sum(self.counts.values()), generator=self.random)
        self.batches = len(event.epoch)

    @on(BatchReady)
    def count_batch(self, event: BatchReady) -> None:
        """Take down which batch of the pass is learned."""
        self.turn = event.batch.index

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return the share of the exemplars that is learned with this batch; none if it is empty."""
        first, end = (len(self.order) * (self.turn + more) // self.batches for more in (0, 1))
        if self.exemplars is None or first == end:
            return ()
        return (self.exemplars[self.order[first:end].to(self.exemplars.y.device)],)

    def joined(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the (n, *input_shape) inputs, augmented, and (n,) labels of a batch and of what was drawn beside it."""
        parts = (samples, *self.drawn_for(samples))
        x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
        return x if self.augment is None else self.augment(x), y

    def exemplar_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a pass over the exemplars: (size, *input_shape) inputs, shuffled and augmented, with their (size,) labels."""
        if self.exemplars is None:
            return
        order = torch.randperm(len(self.exemplars), generator=self.random).to(self.exemplars.y.device)
        for rows in order.split(size):
            x = self.exemplars.x[rows]
            yield x if self.augment is None else self.augment(x), self.exemplars.y[rows]

    def exemplar_features(
        self, size: int, passes: int, features_of: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of the pass, (size, features) features of exemplars, and their (size,) labels, for some passes.

        The features are taken in evaluation mode; where nothing is augmented they are the same in each pass, and taken once.
        """
        if self.exemplars is None:
            return
        whole = Tensor()
        if self.augment is None:
            with evaluating(self):
                whole = torch.cat([features_of(x) for x in self.exemplars.x.split(TOGETHER)])
        for number in range(passes):
            if self.augment is None:
                order = torch.randperm(len(whole), generator=self.random).to(whole.device)
                yield from ((number, whole[rows], self.exemplars.y[rows]) for rows in order.split(size))
                continue
            for x, y in self.exemplar_batches(size):
                with evaluating(self):
                    features = features_of(x)
                yield number, features, y

    @property
    def competing(self) -> Tensor:
        """The classes that came, with those of the session that goes on: the old ones, then the new."""
        return torch.cat([self.old_classes, self.new_classes])

    @property
    def labels(self) -> Tensor:
        """The classes that have exemplars, sorted."""
        return self.new_classes.new_tensor([*self.counts])

    @on(SessionEnded)
    def close(self, event: SessionEnded) -> None:
        """Choose the exemplars of the session's classes, and keep the first ones of others."""
        self.choose(event.session.samples[:], self.new_classes.tolist())
        self.teacher = None

    def share(self, classes: int) -> int:
        """Return how many exemplars each of so many classes keeps."""
        return self.capacity // classes

    def choose(self, samples: Samples, labels: list[int]) -> None:
        """Choose exemplars of some classes among new samples and those they have, and keep the first of others."""
        kept = self.exemplars_by_class()
        share = self.share(len({*kept, *labels}))
        chosen: dict[int, Samples] = {}
        with evaluating(self):
            for label in sorted({*kept, *labels}):
                candidates = kept.get(label)
                if label in labels:
                    rows = samples.y == label
                    new = Samples(samples.x[rows], samples.y[rows]).to(self.new_classes.device)
                    candidates = new if candidates is None else distinct(candidates + new)
                    candidates = candidates[herding(self.unit_features(candidates.x), share).to(self.new_classes.device)]
                assert candidates is not None
                chosen[label] = candidates[:share]
        self.hold(chosen)

    def hold(self, chosen: dict[int, Samples]) -> None:
        """Keep these exemplars of each class, in the order of their herding, and no others."""
        self.counts = {label: len(own) for label, own in chosen.items()}
        parts = [*chosen.values()]
        self.exemplars = Samples(torch.cat([own.x for own in parts]), torch.cat([own.y for own in parts]))

    def exemplars_by_class(self) -> dict[int, Samples]:
        """Return the exemplars of each class, in the order of their herding."""
        if self.exemplars is None:
            return {}
        sizes = [*self.counts.values()]
        parts = zip(self.exemplars.x.split(sizes), self.exemplars.y.split(sizes), strict=True)
        return {label: Samples(x, y) for label, (x, y) in zip(self.counts, parts, strict=True)}

    @torch.no_grad()
    def unit_features(self, x: Tensor) -> Tensor:
        """Return the network's (n, features) for raw inputs, divided by their length."""
        return torch.cat([F.normalize(self.model.features(part), dim=1) for part in x.split(TOGETHER)])  # type: ignore[operator]

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return the (n, classes) outputs, -inf for classes that did not come."""
        outputs: Tensor = self.model(x)
        return mask_logits(outputs, self.competing)

    @property
    def scores_ignore_task(self) -> bool:
        """Whether `scores` is the same with and without the task given: it is."""
        return self.predicts_from_scores


def distinct(samples: Samples) -> Samples:
    """Return samples without those whose input came before among them: learners that are merged may have some in common."""
    number = samples.x.flatten(1).unique(dim=0, return_inverse=True)[1]
    first = (number[:, None] == number).int().argmax(1)
    return samples[first == torch.arange(len(number), device=number.device)]
