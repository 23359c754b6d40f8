"""Evaluation: one pass over the union of the test sets, from which all measures are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.eval_mode import evaluating
from clstream.evaluation.answers import ChunkAnswers
from clstream.evaluation.questions import Questions
from clstream.evaluation.tally import Listener, Tally
from clstream.measures import chosen, main_names
from clstream.measures.flops import same_flops
from clstream.strategy import Strategy
from clstream.stream import Stream


def evaluate(strategy: Strategy, stream: Stream, questions: Questions | None = None) -> tuple[Tensor, Tensor]:
    """Return the main measure on each task of the stream, without and with the task given: two (tasks,), float64, on the CPU.

    It is the accuracy of labels, the mean average precision of multi-label targets, and r2 of values. A strategy whose `scores`
    and `predict` are the base's answers both questions from one forward pass over the union of the test sets; one that overrides
    them is asked task by task, without and with the task, since its answer may depend on it. If the stream hides its boundaries,
    the strategy is never given the task: the answer with the task is then read from the scores of the task's classes, and the
    samples of all tasks come mixed. What isn't asked is NaN.

    Args:
        strategy, stream: who is asked, and about what.
        questions: `Questions(strategy, stream)`, kept by who asks again and again. None: made for this once.

    Raises:
        ValueError, TypeError: if the answers have the wrong shape or type.
        FloatingPointError: if scores hold NaN.

    """
    names = main_names(stream.targets, "task")
    if questions is None:
        questions = Questions(strategy, stream, measures=chosen(None, stream.targets, "task"))
    values = measure(strategy, questions)
    rows = []
    for prefix in ("", "task_"):
        row = torch.full((len(stream.tasks),), torch.nan, dtype=torch.float64)
        for name in names:
            if name in values and name.startswith("task_") == bool(prefix):
                row = torch.where(row.isnan(), values[name][: len(row)], row)
        rows.append(row)
    return rows[0], rows[1]


def measure(
    strategy: Strategy, questions: Questions, seen: Tensor | None = None, listener: Listener | None = None
) -> dict[str, Tensor]:
    """Ask a strategy the questions; return the values of the measures by name.

    Args:
        strategy: who is asked.
        questions: about what; kept by who asks again and again.
        seen: (tasks,), bool: the tasks taught so far. None: none.
        listener: is told of each test set's answers, a part at a time.

    Returns:
        For each measure (test sets + 1,), float64, on the CPU: for each test set, and last for all test samples of the tasks seen,
        each once. NaN where nothing is asked, or the measure is not defined.

    Raises:
        ValueError, TypeError: if the answers have the wrong shape or type.
        FloatingPointError: if scores hold NaN.

    """
    seen = torch.zeros(len(questions.stream.tasks), dtype=torch.bool) if seen is None else seen
    tally = Tally(questions, seen)
    unknown = torch.zeros((), dtype=torch.bool, device=questions.device)
    begun: set[int | None] = set()
    with evaluating(strategy):
        for chunk in questions:
            answered = ChunkAnswers(strategy, questions, chunk)
            place = chunk.places[0] if answered.asks_again else None
            strange = all(questions.stream.test_sets[number].known is False for number in chunk.places)
            counts = questions.labelled and (len(chunk.places) > 1 or questions.has_labels(chunk.places[0]))
            with same_flops((len(chunk.x), place, place in begun, strange, counts)):
                if counts:
                    tally.count_hits(chunk, answered)
                if tally.measures or listener is not None:
                    for number in chunk.places:
                        tally.update(chunk, answered, number, listener)
            begun.add(place)
            unknown |= answered.unknown
        if unknown:
            raise FloatingPointError(
                f"{type(strategy).__name__} answers test samples of {questions.stream.name} with NaN: its weights are not finite, "
                "or a scores, predict or novelty of its own divides by 0"
            )
        return tally.values()
