"""Measures on small vectors worked by hand, and what can't be measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from clstream.measures import MEASURES, Answers, Measure, chosen, measure_named
from clstream.measures.labels import Accuracy, TopK

NAN = math.nan


def value(name: str, scores: Tensor, y: Tensor, scores_are: str = "logits", columns: Tensor | None = None, parts: int = 1) -> float:
    """Return a measure of answers that are given as scores, in some parts."""
    measure = measure_named(name)
    target = measure.targets[0]
    for rows in torch.arange(len(y)).chunk(parts):
        own = scores[rows]
        predicted = own.argmax(1) if own.dim() == 2 and target == "label" else own
        measure.update(
            Answers(lambda own=own: own, lambda p=predicted: p, lambda own=own: own, columns, scores_are, target), y[rows]
        )
    return measure.compute()


PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])


def test_labels_by_hand() -> None:
    logits = PROBABILITIES.log() + torch.tensor([[3.0], [-1.0], [0.0], [7.0]])  # softmax forgets the shifts
    for scores, kind in ((PROBABILITIES, "probabilities"), (logits, "logits")):
        assert value("accuracy", scores, LABELS, kind) == 0.5  # of equal scores the first counts
        assert value("balanced_accuracy", scores, LABELS, kind) == pytest.approx((1 + 0 + 0.5) / 3)
        assert value("nll", scores, LABELS, kind) == pytest.approx(-np.log([0.7, 0.3, 0.4, 0.5]).mean())
        squares = [0.3**2 + 0.2**2 + 0.1**2, 0.1**2 + 0.6**2 + 0.7**2, 0.4**2 + 0.6**2 + 0.2**2, 0.2**2 + 0.3**2 + 0.5**2]
        assert value("brier", scores, LABELS, kind) == pytest.approx(np.mean(squares))
        # confidences .7 (right), .6 (wrong), .4 (wrong), .5 (right) lie in four of 15 bins
        assert value("ece", scores, LABELS, kind) == pytest.approx((0.3 + 0.6 + 0.4 + 0.5) / 4)
    for parts in (1, 3, 4):
        assert value("nll", logits, LABELS, parts=parts) == pytest.approx(-np.log([0.7, 0.3, 0.4, 0.5]).mean())


def test_calibration_of_one_class_and_of_samples_that_no_class_competes_for() -> None:
    assert value("ece", torch.rand(4, 1), torch.zeros(4, dtype=torch.int64)) == 0
    nowhere = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]])
    for name in ("ece", "nll", "brier"):
        assert math.isnan(value(name, nowhere, torch.tensor([1, 1])))
        assert math.isnan(value(name, torch.zeros(2, 2), torch.tensor([1, 1]), "probabilities"))


def test_top_k_counts_ties_as_argmax_does_and_no_class_that_does_not_compete() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [5.0, -math.inf, -math.inf, -math.inf]])
    for k, hits in ((1, [1, 0, 0, 0]), (2, [1, 1, 0, 0]), (3, [1, 1, 1, 0])):
        for label in range(4):
            measure = TopK(k)
            measure.update(Answers(lambda: scores[:1], None, None), torch.tensor([label]))  # type: ignore[arg-type]  # not asked
            assert measure.compute() == hits[label]
    assert value("top5", scores, torch.tensor([2, 3, 1])) == pytest.approx(2 / 3)
    assert value("top5", scores[2:], torch.tensor([0])) == 1


SCORES = torch.tensor([[0.9, 0.2, 0.85], [0.95, 0.9, 0.1], [0.3, 0.82, 0.81], [0.6, 0.1, 0.99]], dtype=torch.float64)
HOT = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])


@pytest.mark.parametrize("parts", [1, 4])
def test_multi_label_measures_by_hand(parts: int) -> None:
    logits = SCORES.logit()
    for scores, kind in ((SCORES, "probabilities"), (logits, "logits"), (40 * logits, "ranks")):
        assert value("map", scores, HOT, kind, parts=parts) == pytest.approx(0.9444444444)
        if kind != "ranks":
            assert value("cf1:0.8", scores, HOT, kind, parts=parts) == pytest.approx(0.8666666667)
            assert value("cf1_of_means:0.8", scores, HOT, kind, parts=parts) == pytest.approx(0.8888888889)
            assert value("of1:0.8", scores, HOT, kind, parts=parts) == pytest.approx(0.8571428571)


def test_classes_without_a_positive_or_not_asked_about_are_left_out() -> None:
    more, hot = torch.cat([SCORES, torch.full((4, 1), 0.99)], 1), torch.cat([HOT, torch.zeros(4, 1)], 1)
    assert value("map", more, hot, "ranks") == pytest.approx(0.9444444444)
    assert value("cf1:0.8", more, hot, "probabilities") == pytest.approx(0.8666666667)
    assert value("cf1_of_means:0.8", more, hot, "probabilities") == pytest.approx(0.8888888889)
    assert value("cf1_of_means:0.999", more, hot, "probabilities") == 0  # nothing is answered
    assert value("of1:0.8", more, hot, "probabilities") == pytest.approx(2 * 6 / (2 * 6 + 1 + 1 + 4))  # false positives count
    asked = torch.tensor([False, False, True, False])
    assert value("map", more, hot, "ranks", asked) == pytest.approx(0.8333333333)
    assert value("of1:0.8", more, hot, "probabilities", asked) == pytest.approx(0.8)
    for name in ("map", "cf1", "cf1_of_means", "of1"):
        assert math.isnan(value(name, more, hot, "probabilities", torch.tensor([False, False, False, True])))


def test_average_precision_survives_ties_and_large_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60, 4), generator=draw).double()
    y = (torch.rand(60, 4, generator=draw) < 0.3).float()
    expected = sklearn_metrics.average_precision_score(y.numpy(), scores.numpy(), average="macro")
    for spread in (1.0, 1e3):  # a sigmoid would make all large ones equal
        assert value("map", spread * scores, y) == pytest.approx(expected)


def test_novelty_by_hand() -> None:
    known, strange = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.35, 0.5, 0.3])
    novelty, y = torch.cat([known, strange]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert value("auroc", novelty, y) == pytest.approx((3 + 4 + 2.5) / 12)
    assert value("fpr95", novelty, y) == pytest.approx(2 / 3)  # to let all four in, what is at most .4 must pass
    assert value("auroc", 1e4 * (novelty - 0.3), y) == pytest.approx((3 + 4 + 2.5) / 12)
    for name in ("auroc", "fpr95"):
        assert math.isnan(value(name, known, torch.zeros(4).long())) and math.isnan(value(name, strange, torch.ones(3).long()))
    assert (value("auroc", novelty[:1].repeat(6), torch.tensor([0, 1] * 3)), value("fpr95", novelty[:1].repeat(6), y[1:])) == (
        0.5,
        1,
    )


def test_fpr95_lets_95_of_a_hundred_known_samples_in() -> None:
    known = torch.arange(100).double()
    assert value("fpr95", torch.cat([known, torch.tensor([94.5, 93.5, 94.0, 200.0])]), torch.tensor([0] * 100 + [1] * 4)) == 0.5


def test_values_by_hand() -> None:
    y, answers = torch.tensor([[1.0, 0], [2, 0], [3, 3]]), torch.tensor([[1.0, 1], [2, 0], [2, 2]])
    assert value("mse", answers, y) == pytest.approx((0 + 1 + 0 + 0 + 1 + 1) / 6)
    assert value("r2", answers, y) == pytest.approx(((1 - 1 / 2) + (1 - 2 / 6)) / 2)
    assert value("r2", answers, torch.tensor([[1.0, 5], [2, 5], [3, 5]])) == pytest.approx(0.5)  # what is constant is left out
    for scale, offset in ((1e-6, 0), (1e-3, 1e3), (1e6, -1e9)):  # whatever the unit
        assert value("r2", answers.double() * scale + offset, y.double() * scale + offset) == pytest.approx(
            ((1 - 1 / 2) + (1 - 2 / 6)) / 2, rel=1e-6
        )
    assert math.isnan(value("r2", answers[:1], y[:1])) and math.isnan(value("r2", answers, torch.ones(3, 2)))


@pytest.mark.parametrize("name", MEASURES)
def test_of_no_samples_nothing_is_defined(name: str) -> None:
    assert math.isnan(measure_named(name).compute())


class Odd(Measure):
    """A measure to make something odd of."""

    name = "odd"

    def update(self, answers: Answers, y: Tensor) -> None:
        """Take nothing up."""

    def compute(self) -> float:
        """Return nothing."""
        return 0.0


def named(name: str, asks: str = "class") -> Measure:
    """Return a measure with a name."""
    measure = Odd()
    measure.name, measure.asks = name, asks
    return measure


def saying(**attributes: object) -> Measure:
    """Return a measure that says something else of itself."""
    measure = Odd()
    vars(measure).update(attributes)
    return measure


class Plainer(Accuracy):
    """Another arithmetic under the name of ours."""


class Needy(Odd):
    """A measure with an argument."""

    def __init__(self, weight: float) -> None:
        self.weight = weight


@pytest.mark.parametrize(
    ("measures", "error", "words"),
    [
        (["acuracy"], ValueError, "there is no measure 'acuracy': did you mean 'accuracy'?"),
        (["nll:0.5"], ValueError, "there is no measure 'nll:0.5'"),
        (["cf1:2"], ValueError, "'cf1:2' has no threshold from 0 to 1 after the colon: write cf1:0.8"),
        (["task_auroc"], ValueError, "strange samples, which have no task: leave task_ away"),
        (["top5", "top5"], ValueError, "two measures are called 'top5'"),
        (["map"], ValueError, "map is of multilabel targets, and the stream has label ones: take accuracy, top5"),
        ("top5", TypeError, "must be a list of names or measures, as"),
        ([3], TypeError, "a measure is a name, or an object of a class that derives from"),
        ([Measure], TypeError, "a measure is a name, or an object"),
        ([named("accuracy")], ValueError, "Odd is called 'accuracy', as a measure of clstream's is: give it another name"),
        ([named("task_odd")], ValueError, "begins with task_ if asks is 'task', and only then"),
        ([named("odd", "task")], ValueError, "begins with task_ if asks is 'task', and only then"),
        ([named("odd", "colour")], ValueError, "Odd.asks must be one of class, task, novelty, not 'colour'"),
        ([named("")], ValueError, "needs a name"),
        ([named("a/b")], ValueError, "Odd is called 'a/b': files and curves are called so"),
        ([named("a, b")], ValueError, "Odd is called 'a, b'"),
        ([named("forgetting")], ValueError, "is none of anytime, cost, events, final, forgetting, transfer"),
        ([Plainer()], ValueError, "Plainer is called 'accuracy', as a measure of clstream's is: give it another name"),
        ([Needy], TypeError, "Needy can't be made without arguments"),
        ([saying(targets="label")], ValueError, "Odd.targets must be a tuple of some of label, multilabel, value, not 'label'"),
        ([saying(targets=("labels",))], ValueError, "Odd.targets must be a tuple"),
        ([saying(scores_are="logits")], ValueError, "Odd.scores_are must be a tuple of some of logits, probabilities, ranks"),
        ([saying(higher_is_better=None)], ValueError, "Odd.higher_is_better must be True or False"),
    ],
)
def test_what_is_no_measure_is_refused(measures: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        chosen(measures, ("label",), "class")  # type: ignore[arg-type]  # on purpose
    assert words in str(raised.value)


def test_the_main_measures_come_first_and_each_once() -> None:
    def names(*arguments: object) -> list[str]:
        return [measure.name for measure in chosen(*arguments)]  # type: ignore[arg-type]

    assert names(None, ("label",), "class") == names(["accuracy"], ("label",), "domain") == ["accuracy", "task_accuracy"]
    assert names([Odd, "task_top5"], ("label",), "class") == ["accuracy", "task_accuracy", "odd", "task_top5"]
    assert names(["of1"], ("multilabel",), "class") == ["map", "of1"]
    assert names(None, ("multilabel",), "task") == ["map", "task_map"]
    assert names(["mse"], ("value", "label"), "domain") == ["r2", "accuracy", "task_accuracy", "mse"]
