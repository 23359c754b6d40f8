"""Nearest class mean as an answer: a strategy learns as it does, and the class answers whose mean feature is nearest.

As in iCaRL (Rebuffi, Kolesnikov, Sperl, Lampert 2017), for any strategy whose model has `features`:

    ClassMeans(Replay(model))        means over the samples of the strategy's memory
    ClassMeans(Finetune(model), of="session")

Form implemented, when a session ends, with the network as it is then: features are divided by their length, m_c is their mean over
the samples of a class, and score_c the cosine of a sample's feature and m_c, the nearest mean of vectors of length 1.

of="memory"   all classes' means are taken anew, over what the memory holds: features that moved are followed, as in iCaRL
of="session"  the means of the session's own classes are taken over its samples, and those of others stay what they were, though the
              network has moved since

iCaRL's choice of exemplars (herding) and its loss are not part of this: the memory is the wrapped strategy's. Within a session
classes that are new in it have no mean yet. Before the first session ends the wrapped strategy answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunContinued, RunStarted, SessionEnded
from clstream.memory import Memory
from clstream.params import check_choice
from clstream.strategy import Strategy, Wrapper
from clstream.strategy.frozen_features import add_by_class
from clstream.stream import Task

TOGETHER = 1024
"""Samples whose features are computed together."""


class ClassMeans(Wrapper):
    """Answer with the class whose mean feature is nearest; learn as the wrapped strategy does.

    Args:
        base: the strategy; its model has `features`: (n, *input_shape) raw inputs to (n, features).
        of: "memory" (means over the samples of its memory) or "session" (over those of each session, when it ends).

    """

    learns_targets = ("label",)
    scores_are = "ranks"
    fixed_classes = "as in the wrapped strategy; in an answer those with a mean"

    def __init__(self, base: Strategy, of: str = "memory") -> None:
        super().__init__(base)
        check_choice(("memory", "session"), of=of)
        if not callable(getattr(base.model, "features", None)):
            raise TypeError(f"ClassMeans needs a model with a method `features`, which {type(base.model).__name__} hasn't")
        if of == "memory" and not isinstance(getattr(base, "memory", None), Memory):
            raise ValueError(f"{type(base).__name__} has no memory to take means over: take of='session'")
        self.of = of
        self.means: Tensor | None = None  # (classes, features); 0 of those that have none
        self.classes = 0

    @on(RunStarted)
    def forget(self, event: RunStarted) -> None:
        """Forget the means: nothing was learned yet."""
        self.means, self.classes = None, event.stream.classes

    @on(RunContinued)
    def widen(self, event: RunContinued) -> None:
        """Have no means of classes that are new."""
        if self.means is not None:
            self.means = F.pad(self.means, (0, 0, 0, event.stream.classes - len(self.means)))

    @on(SessionEnded)
    def take_means(self, event: SessionEnded) -> None:
        """Take the means of the memory's classes, or of the session's."""
        samples = event.session.samples if self.of == "session" else self.memory.all()
        device = next(self.model.parameters()).device
        sums: Tensor | None = None
        with evaluating(self):
            for start in range(0, len(samples), TOGETHER):
                part = samples[start : start + TOGETHER].to(device)
                features = self.unit_features(part.x)
                if sums is None:
                    sums = features.new_zeros(self.classes, features.shape[1])
                add_by_class(sums, part.y, features)
        assert sums is not None
        new = F.normalize(sums, dim=1)
        if self.means is not None and self.of == "session":
            new = torch.where((sums == 0).all(1, keepdim=True), self.means, new)
        self.means = new

    @property
    def memory(self) -> Memory:
        """The wrapped strategy's memory."""
        memory: Memory = self.base.memory  # type: ignore[attr-defined]  # the constructor has asked for it
        return memory

    def unit_features(self, x: Tensor) -> Tensor:
        """Return the features of raw inputs, divided by their length."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        return F.normalize(features, dim=1)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): cosines; -inf for classes without a mean. Before there is any, what the wrapped strategy answers."""
        if self.means is None:
            return self.base.scores(x, task)
        return (self.unit_features(x) @ self.means.T).masked_fill((self.means == 0).all(1), float("-inf"))

    def predict(self, x: Tensor, task: Task | None = None, threshold: float = 0.5) -> Tensor:
        """Return the label with the highest score; with a task, of its classes."""
        return Strategy.predict(self, x, task, threshold)

    def predict_online(self, x: Tensor) -> Tensor:
        """Return the same."""
        return self.predict(x)

    def novelty(self, x: Tensor) -> Tensor:
        """Return (n,): 1 minus the cosine with the nearest mean; own choice."""
        return 1 - self.scores(x).amax(1).clamp(min=-1)
