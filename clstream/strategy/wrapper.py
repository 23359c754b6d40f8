"""A strategy around a strategy: it learns and answers as the one that it wraps, but for what a subclass changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from clstream.strategy.merging import Payload
from clstream.strategy.strategy import Regulariser, Strategy
from clstream.stream import Batch, Samples, Subset, Task


class Wrapper(Strategy):
    """What wrappers share: the wrapped strategy's model, steps and answers; it hears the run as one of the `parts`.

    Args:
        base: the strategy; it has a `model`.

    Raises TypeError for anything else.

    """

    fixed_classes = "as in the wrapped strategy"

    def __init__(self, base: Strategy) -> None:
        if not isinstance(base, Strategy) or not isinstance(getattr(base, "model", None), nn.Module):
            raise TypeError(f"{type(self).__name__} wraps a strategy object that has a model, not {base!r}")
        self.base, self.parts = base, (base,)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # it is the base's, also if that takes another one
        """The wrapped strategy's model."""
        return self.base.model

    @property
    def rehearsal_free(self) -> bool:  # type: ignore[override]  # it is the base's
        """Whether the wrapped strategy says so."""
        return self.base.rehearsal_free

    @property
    def learns_targets(self) -> tuple[str, ...]:  # type: ignore[override]  # it is the base's
        """The kinds of targets that the wrapped strategy learns."""
        return self.base.learns_targets

    @property
    def mixes_targets(self) -> bool:  # type: ignore[override]  # it is the base's
        """Whether the wrapped strategy learns targets of several kinds."""
        return self.base.mixes_targets

    @property
    def scores_are(self) -> str:  # type: ignore[override]  # it is the base's
        """What the wrapped strategy's scores are."""
        return self.base.scores_are

    @property
    def bce_mean(self) -> str:  # type: ignore[override]  # it is the base's
        """What the wrapped strategy averages binary cross-entropies over."""
        return self.base.bce_mean

    def add_regularisers(self, *regularisers: Regulariser) -> None:
        """Add them to the wrapped strategy."""
        self.base.add_regularisers(*regularisers)

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        """Return what the wrapped strategy draws."""
        return self.base.draw(samples)

    def loss(self, samples: Samples) -> Tensor:
        """Return the wrapped strategy's loss."""
        return self.base.loss(samples)

    def objective(self, samples: Samples) -> Tensor:
        """Return what the wrapped strategy's steps minimise."""
        return self.base.objective(samples)

    def objective_with(self, samples: Samples, drawn: tuple[Samples, ...]) -> Tensor:
        """Return the same, with what was drawn for it before."""
        return self.base.objective_with(samples, drawn)

    def learn(self, batch: Batch) -> Tensor:
        """Have the wrapped strategy take its step."""
        return self.base.learn(batch)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.scores(x, task)

    def predict(self, x: Tensor, task: Task | None = None, threshold: float = 0.5) -> Tensor:
        """Answer as the wrapped strategy does."""
        if threshold == 0.5:  # a `predict` of the user's own may take none
            return self.base.predict(x, task)
        return self.base.predict(x, task, threshold)

    def predict_online(self, x: Tensor) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.predict_online(x)

    def novelty(self, x: Tensor) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.novelty(x)

    def novelty_of(self, scores: Tensor) -> Tensor:
        """Answer as the wrapped strategy does."""
        return self.base.novelty_of(scores)

    @property
    def novelty_is_of_scores(self) -> bool:
        """Whether the wrapped strategy's novelty is that of its scores, and nothing is answered here."""
        own = type(self).scores is Wrapper.scores and type(self).novelty is Wrapper.novelty
        return own and self.base.novelty_is_of_scores

    @property
    def scores_ignore_task(self) -> bool:
        """Whether the wrapped strategy does, and nothing is answered here."""
        own = type(self).scores is Wrapper.scores and type(self).predict is Wrapper.predict
        return own and self.base.scores_ignore_task

    def tells_novelty(self, targets: Sequence[str]) -> bool:
        """Return whether the wrapped strategy does, or something is answered here."""
        own = type(self).novelty is not Wrapper.novelty or type(self).novelty_of is not Wrapper.novelty_of
        return own or self.base.tells_novelty(targets)

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield what the wrapped strategy answers with."""
        return self.base.answering_weights()

    @property
    def sent_bytes(self) -> tuple[int, int]:
        """The bytes that were sent in the wrapped strategy."""
        return self.base.sent_bytes

    def kept_samples(self) -> Iterable[Samples | Subset]:
        """Return what the wrapped strategy keeps."""
        return self.base.kept_samples()

    def export(self, since: Payload | None = None) -> dict[str, Tensor]:
        """Return what the wrapped strategy exports. Raises TypeError for a wrapper that answers otherwise than it does."""
        self._check_merges()
        return self.base.export(since)

    def merge(self, payloads: Payload | Iterable[Payload], weights: Sequence[float] | None = None) -> None:
        """Have the wrapped strategy merge. Raises TypeError for a wrapper that answers otherwise than it does."""
        self._check_merges()
        self.base.merge(payloads, weights)

    def take_over(self, payload: Payload) -> None:
        """Have the wrapped strategy take over what another exported."""
        self._check_merges()
        self.base.take_over(payload)

    def check_payload(self, payload: Payload) -> None:
        """Refuse what the wrapped strategy refuses to merge."""
        self._check_merges()
        self.base.check_payload(payload)

    def _check_merges(self) -> None:
        if type(self).scores is not Wrapper.scores:
            name, base = type(self).__name__, type(self.base).__name__
            raise TypeError(f"{name} answers otherwise than the {base} that it wraps, so merging those makes no {name}")

    @property
    def predicts_from_scores(self) -> bool:
        """Whether the wrapped strategy does, and nothing is answered here."""
        own = type(self).scores is Wrapper.scores and type(self).predict is Wrapper.predict
        return own and self.base.predicts_from_scores
