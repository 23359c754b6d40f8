"""What a strategy answers about a chunk of test samples: each question asked once at most, when an answer is needed."""

from __future__ import annotations

from collections.abc import Sized
from functools import cached_property

import torch
from torch import Tensor

from clstream.evaluation.questions import Chunk, Questions
from clstream.measures import Answers
from clstream.strategy import Strategy
from clstream.strategy.answers import allowed, predictions_of
from clstream.stream import Stream, Task, TestSet


class ChunkAnswers:
    """The answers about a chunk, each asked for once at most, when it is needed.

    With the task given, a strategy is asked only if its answer may depend on it; else, and where the stream hides its boundaries,
    the answer is read from the scores without it.
    """

    def __init__(self, strategy: Strategy, questions: Questions, chunk: Chunk) -> None:
        self.strategy, self.questions, self.chunk = strategy, questions, chunk
        self.unknown = torch.zeros((), dtype=torch.bool, device=questions.device)
        self.asks_again = not strategy.scores_ignore_task and questions.stream.boundaries and self.task is not None

    @property
    def task(self) -> Task | None:
        """The task that all of the chunk is of; None where there is none, or several."""
        number = self.questions.stream.test_sets[self.chunk.places[0]].task
        return None if number is None or len(self.chunk.places) > 1 else self.questions.stream.tasks[number]

    def _checked(self, scores: Tensor) -> Tensor:
        check_scores(scores, len(self.chunk.x), self.questions.stream, self.strategy)
        self.unknown = self.unknown | scores.amax().isnan()  # NaN is the greatest there is
        return scores

    @cached_property
    def scores(self) -> Tensor:
        """(n, outputs)."""
        return self._checked(self.strategy.scores(self.chunk.x))

    @cached_property
    def scores_with_task(self) -> Tensor:
        """(n, outputs), with the task given."""
        return self._checked(self.strategy.scores(self.chunk.x, self.task)) if self.asks_again else self.scores

    @cached_property
    def novelty(self) -> Tensor:
        """(n,), higher is stranger."""
        if self.strategy.novelty_is_of_scores:
            return self.strategy.novelty_of(self.scores)
        novelty: object = self.strategy.novelty(self.chunk.x)
        if not isinstance(novelty, Tensor) or novelty.shape != (len(self.chunk.x),):
            shape = tuple(novelty.shape) if isinstance(novelty, Tensor) else f"a {type(novelty).__name__}"
            raise ValueError(
                f"{type(self.strategy).__name__}.novelty answers {len(self.chunk.x)} samples with {shape}, not a tensor of one "
                "number each"
            )
        self.unknown = self.unknown | novelty.isnan().any()
        return novelty

    @cached_property
    def labels(self) -> Tensor:
        """(n,), the predicted labels."""
        from_scores = self.strategy.predicts_from_scores
        return self._labels(self.scores.argmax(1) if from_scores else self.strategy.predict(self.chunk.x))

    @cached_property
    def labels_with_task(self) -> Tensor:
        """(n,), the predicted labels with the task given; of samples of no task they mean nothing."""
        if len(self.chunk.places) == 1 and self.task is None:
            return self.labels
        if self.asks_again and not self.strategy.predicts_from_scores:
            return self._labels(self.strategy.predict(self.chunk.x, self.task))
        return self.questions.best_of_task(self.scores_with_task, self.chunk.number)

    def _labels(self, answer: Tensor) -> Tensor:
        check_labels((answer,), self.chunk.x, self.strategy)
        return answer

    @cached_property
    def predicted(self) -> Tensor:
        """(n, outputs), what a `predict` of the strategy's own answers of multi-label targets and values."""
        return self._predicted(self.strategy.predict(self.chunk.x))

    @cached_property
    def predicted_with_task(self) -> Tensor:
        """(n, outputs), the same with the task given."""
        return self._predicted(self.strategy.predict(self.chunk.x, self.task)) if self.asks_again else self.predicted

    def _predicted(self, answer: Tensor) -> Tensor:
        check_scores(answer, len(self.chunk.x), self.questions.stream, self.strategy)
        self.unknown = self.unknown | answer.amax().isnan()
        return answer

    def of(self, rows: Tensor, test_set: TestSet, columns: Tensor | None, with_task: bool) -> Answers:
        """Return the answers about some samples of a test set, by their rows in the chunk."""
        target, strategy = test_set.samples.target, self.strategy
        task = None if test_set.task is None else self.questions.stream.tasks[test_set.task]

        def scores() -> Tensor:
            answered = (self.scores_with_task if with_task else self.scores)[rows]
            if not with_task or task is None or not task.classes:
                return answered
            return answered.masked_fill(~allowed(task, answered), 0.0 if strategy.scores_are == "probabilities" else float("-inf"))

        def predicted() -> Tensor:
            if target == "label":
                return (self.labels_with_task if with_task else self.labels)[rows]
            if not strategy.predicts_from_scores:
                return (self.predicted_with_task if with_task else self.predicted)[rows]
            return predictions_of(scores(), target, strategy.scores_are, threshold=0.5)

        return Answers(scores, predicted, lambda: self.novelty[rows], columns, strategy.scores_are, target)


def check_scores(scores: Tensor, samples: int, stream: Stream, strategy: Strategy) -> None:
    """Refuse scores that are not (samples, outputs)."""
    if scores.dim() != 2 or len(scores) != samples or scores.shape[1] < stream.outputs:
        model = getattr(strategy, "model", strategy)
        what = "classes" if stream.outputs == stream.classes else "outputs"
        raise ValueError(
            f"{type(model).__name__} answers {samples} samples with {tuple(scores.shape)}, but {stream.name} asks for "
            f"{(samples, stream.outputs)}: build it with {what}={stream.outputs}"
        )


def check_labels(answers: tuple[object, ...], samples: Sized, strategy: Strategy) -> None:
    """Refuse answers of `predict` that are not one label a sample."""
    for answer in answers:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        if not isinstance(answer, Tensor) or answer.shape != (len(samples),):
            raise ValueError(
                f"{type(strategy).__name__}.predict answers {len(samples)} samples with {shape}, not a tensor of one label each"
            )
