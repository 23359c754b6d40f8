"""What runs measure beside accuracy: of every test set, from one forward pass, the same whatever the stream hides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import SHARP, Finetune, Replay
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from clstream import Strategy, on, run
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.evaluation import Questions, evaluate, measure
from clstream.events import Answered, Evaluated
from clstream.measures import Answers, Measure, chosen
from clstream.models import Mlp
from clstream.stream import Samples, Stream, Subset, Task, TestSet

ALL = ["top5", "balanced_accuracy", "nll", "brier", "ece", "auroc", "fpr95", "task_nll", "task_balanced_accuracy"]


def with_probes(**options: Any) -> Stream:
    """Return the example stream with a strange probe, one that is strange until taught, and one of a task."""
    stream = example_stream(**options)
    strange = Samples(
        torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8), torch.arange(50)
    )
    both = stream.tasks[1].test[:] + stream.tasks[2].test[:]
    part = stream.tasks[1].test[:]
    probes = [
        TestSet("unknown/noise", strange, known=False),
        TestSet("later", both, known="taught"),
        TestSet("dark/task_01", Samples(part.x // 2, part.y), task=1),
        TestSet("dark", Samples(part.x // 2, part.y)),
    ]
    return replace(stream, probes=probes)


def by_hand(strategy: Strategy, stream: Stream, seen: list[int]) -> dict[tuple[str, str], float]:
    """Return some measures of an answered stream, by test set, computed by scikit-learn."""
    values: dict[tuple[str, str], float] = {}
    taught = [label for task in seen for label in stream.tasks[task].classes]

    def add(name: str, samples: Samples, task: Task | None) -> None:
        scores = strategy.scores(samples.x).double()
        answers = scores.softmax(1)
        values["accuracy", name] = float((answers.argmax(1) == samples.y).double().mean())
        values["nll", name] = sklearn_metrics.log_loss(samples.y, answers.numpy(), labels=range(6))
        values["balanced_accuracy", name] = sklearn_metrics.balanced_accuracy_score(samples.y, answers.argmax(1))
        if task is not None:
            inside = scores[:, list(task.classes)].softmax(1)
            values["task_nll", name] = -float(inside[torch.arange(len(inside)), samples.y - task.classes[0]].log().mean())

    for test_set in stream.test_sets:
        samples = test_set.samples[:]
        if test_set.known == "taught":
            samples = samples[torch.isin(samples.y, torch.tensor(taught))]
        if test_set.known is not False and len(samples):
            add(test_set.name, samples, None if test_set.task is None else stream.tasks[test_set.task])
    known = [stream.tasks[task].test[:] for task in seen]
    pool = Samples(torch.cat([part.x for part in known]), torch.cat([part.y for part in known]))
    add("seen", pool, None)
    for test_set in (stream.probes[0], stream.probes[1]):
        samples = test_set.samples[:]
        strange = samples if test_set.known is False else samples[~torch.isin(samples.y, torch.tensor(taught))]
        if len(strange):
            novelty = torch.cat([strategy.novelty(pool.x), strategy.novelty(strange.x)])
            y = [0] * len(pool) + [1] * len(strange)
            values["auroc", test_set.name] = sklearn_metrics.roc_auc_score(y, novelty)
    return values


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("boundaries", [True, False])
def test_every_test_set_has_the_values_that_it_has_by_itself(boundaries: bool) -> None:
    stream = with_probes(epochs=3, boundaries=boundaries)
    strategy = Replay(example_model())
    expected: list[dict[tuple[str, str], float]] = []

    class ByHand:
        @on(Evaluated)
        def note(self, event: Evaluated) -> None:
            expected.append(by_hand(strategy, stream, list(range(event.evaluation.sessions_finished))))

    result = run(strategy, stream, ByHand(), measures=ALL)
    names = ("task_00", "task_01", "task_02", "unknown/noise", "later", "dark/task_01", "dark", "seen")
    assert result.test_sets == names and set(result.measured) == {"accuracy", "task_accuracy", *ALL}
    for row, values in enumerate(expected):
        for (name, test_set), number in values.items():
            assert float(result.measured[name][row, names.index(test_set)]) == pytest.approx(number, abs=1e-6), (
                row,
                name,
                test_set,
            )
    matrix = {name: result.measured[name].isnan() for name in result.measured}
    assert (
        matrix["accuracy"][:, 3].all() and matrix["task_accuracy"][:, [3, 4, 6]].all() and not matrix["task_accuracy"][:, 5].any()
    )
    assert matrix["accuracy"][:, 4].tolist() == [True, False, False]  # none of its classes was taught
    assert matrix["auroc"][:, 4].tolist() == [False, False, True]  # all of them were
    assert matrix["auroc"][:, [0, 1, 2, 5, 6, 7]].all()
    assert all(bool(values.isnan()[-1]) for values in result.start.values())  # nothing was seen
    assert torch.equal(result.accuracy, result.measured["accuracy"][:, :3]) and torch.equal(result.main, result.accuracy)


class Counting(Mlp):
    """A model that counts the samples that it is asked about."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), 6, hidden=(8,))
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        """Count, and answer."""
        self.asked += len(x)
        return super().forward(x)


class AsksAgain(Finetune):
    """A strategy whose predictions are its own, and may depend on the task."""

    def predict(self, x: Tensor, task: Task | None = None, threshold: float = 0.5) -> Tensor:
        """Answer with the first class of the task."""
        labels = self.model(x).argmax(1)
        return labels if task is None else torch.full_like(labels, task.classes[0])


class ScoresByTask(Finetune):
    """A strategy whose scores depend on the task."""

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Answer, with the task's number added to the scores of its first class."""
        scores: Tensor = self.model(x)
        return scores if task is None else scores.index_add(1, torch.tensor([task.classes[0]]), torch.full((len(x), 1), 9.0))


@pytest.mark.parametrize(
    ("strategy", "boundaries", "main", "all_measures"),
    [  # 80 test samples are of tasks, 60 of other known sets, 50 strange
        (Finetune, True, 140, 190),
        (Finetune, False, 140, 190),
        (ScoresByTask, True, 140 + 80, 190 + 80),  # once more with the task
        (ScoresByTask, False, 140, 190),
        (AsksAgain, True, 140 + 80, 140 + 80 + 190 + 80),  # predictions are its own, so that scores are another question
        (AsksAgain, False, 140 + 140, 190 + 190),
    ],
)
def test_all_measures_of_a_question_share_one_forward_pass(
    strategy: type[Strategy], boundaries: bool, main: int, all_measures: int
) -> None:
    stream = with_probes(boundaries=boundaries)
    learner = strategy(model := Counting())
    seen = torch.tensor([True, True, False])
    measure(learner, Questions(learner, stream), seen)
    assert model.asked == main  # strange samples are not asked about for nothing
    model.asked = 0
    measure(learner, Questions(learner, stream, measures=chosen(ALL, ("label",), "class")), seen, listener=lambda *_: None)
    assert model.asked == all_measures


def test_observers_hear_the_answers_in_the_same_pass() -> None:
    stream = with_probes()

    class Hears:
        def __init__(self) -> None:
            self.hits: dict[str, list[float]] = {}

        @on(Answered)
        def note(self, event: Answered) -> None:
            assert event.scores.shape == (len(event.y), 6) and torch.equal(event.scores.argmax(1), event.predictions)
            self.hits.setdefault(event.test_set.name, []).append(float((event.predictions == event.y).double().mean()))

    counts = []
    for observers in ((), (hears := Hears(),)):
        result = run(Finetune(model := Counting()), stream, *observers)
        counts.append(model.asked)
    assert counts[0] == counts[1]
    assert hears.hits["task_01"][1:] == result.accuracy[:, 1].tolist() and len(hears.hits) == 6


@pytest.mark.parametrize("boundaries", [True, False])
def test_samples_of_several_test_sets_count_once_among_those_seen(boundaries: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    source = Samples(torch.randn(3000, 4, generator=draw), torch.randint(6, (3000,), generator=draw))
    rows = [((source.y // 2 == task) | (torch.rand(3000, generator=draw) < 0.3)).nonzero().flatten() for task in range(3)]
    tasks = [Task(task, tuple(range(6)), Subset(source, own), Subset(source, own)) for task, own in enumerate(rows)]
    stream = Stream("overlapping", tasks, scenario="domain", boundaries=boundaries)
    strategy = Finetune(Mlp(4, 6, hidden=(8,)))
    for seen in ([0], [0, 2], [1, 2], [0, 1, 2]):
        marks = torch.zeros(3, dtype=torch.bool).index_fill(0, torch.tensor(seen), True)
        values = measure(strategy, Questions(strategy, stream, measures=chosen(["balanced_accuracy"], ("label",), "domain")), marks)
        union = torch.cat([rows[task] for task in seen]).unique()
        y, answers = source.y[union], strategy.predict(source.x[union])
        assert float(values["accuracy"][-1]) == pytest.approx(float((answers == y).double().mean()))
        assert float(values["task_accuracy"][-1]) == pytest.approx(float((answers == y).double().mean()))
        assert float(values["balanced_accuracy"][-1]) == pytest.approx(sklearn_metrics.balanced_accuracy_score(y, answers))


def multilabel(scenario: str = "class") -> Stream:
    """Return a stream of two tasks of two classes whose test sets share samples."""
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(400, 8, generator=draw), torch.randn(8, 4, generator=draw)
    y = (x @ weights > 0).float()
    whole, tasks = Samples(x, y, target="multilabel"), []
    for task, classes in enumerate(((0, 1), (2, 3))):
        own = y[:, list(classes)].any(1)
        mask = torch.zeros(4).index_fill(0, torch.tensor(classes), 1)
        tasks.append(
            Task(task, classes, Samples(x[own], y[own] * mask), Subset(whole, own.nonzero().flatten()), target="multilabel")
        )
    return Stream("several", tasks, scenario=scenario, epochs=3)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_multi_label_test_sets_are_measured_on_their_own_classes_and_those_seen_on_all_seen(scenario: str) -> None:
    stream, strategy = multilabel(scenario), Finetune(Mlp(8, 4, hidden=(16,)))
    result = run(strategy, stream, measures=["cf1", "of1"])
    source = stream.tasks[0].test.source  # type: ignore[union-attr]  # it is a Subset
    precision = sklearn_metrics.average_precision_score
    for task in stream.tasks:
        part = task.test[:]
        own = list(task.classes)
        expected = precision(part.y[:, own].numpy(), strategy.scores(part.x)[:, own].numpy(), average="macro")
        assert float(result.measured["map"][-1, task.id]) == pytest.approx(expected)
    some = source.y.any(1)
    answers = strategy.scores(source.x[some]).numpy()
    assert float(result.measured["map"][-1, -1]) == pytest.approx(precision(source.y[some].numpy(), answers, average="macro"))
    f1 = sklearn_metrics.f1_score(source.y[some].numpy(), answers > 0, average="micro")
    assert float(result.measured["of1"][-1, -1]) == pytest.approx(f1)
    assert result.main_names == (("task_map",) * 2 if scenario == "task" else ("map",) * 2) and result.main_name == "map"
    assert result.average == pytest.approx(float(result.measured[result.main_names[0]][-1, :2].mean()))
    assert result.accuracy.isnan().all() and "map" in result.headline


@pytest.mark.slow
def test_a_resumed_run_has_measured_the_same() -> None:
    stream, whole, measures = with_probes(epochs=2), Checkpoints(), ["nll", "auroc", Worst]
    expected = run(Replay(example_model()), stream, whole, measures=measures, evaluate_every=4)
    for number in (1, len(whole.written) // 2, -2):
        result = run(Replay(example_model()), stream, measures=measures, evaluate_every=4, resume=whole.load(number))
        for name, values in expected.measured.items():
            assert torch.equal(values.nan_to_num(-1), result.measured[name].nan_to_num(-1)), name
        assert torch.equal(result.probes, expected.probes) and result.probe_steps == expected.probe_steps
    with pytest.raises(
        ValueError, match="the checkpoint is of another run: measures was 'accuracy, task_accuracy, nll, auroc, worst'"
    ):
        run(Replay(example_model()), stream, measures=["nll"], evaluate_every=4, resume=whole.load(1))


class Worst(Measure):
    """A measure of the user's own: the accuracy on the class that is answered worst."""

    name = "worst"

    def __init__(self) -> None:
        self.hits, self.samples = torch.zeros(6), torch.zeros(6)

    def update(self, answers: Answers, y: Tensor) -> None:
        """Count hits and samples by class."""
        self.hits += y[answers.predicted == y].bincount(minlength=6)
        self.samples += y.bincount(minlength=6)

    def compute(self) -> float:
        """Return the lowest share."""
        return float((self.hits / self.samples).nan_to_num(1).min())


def test_a_measure_of_ones_own_starts_anew_for_each_test_set_and_evaluation() -> None:
    result = run(Finetune(example_model()), example_stream(epochs=10), measures=[Worst()])
    assert result.measured["worst"].diagonal().min() > 0.5 and result.measured["worst"][-1, :2].max() < 0.2
    assert result.to_frame("worst").shape == (3, 5) and list(result.to_frame("worst"))[-2:] == ["seen", "mean"]
    with pytest.raises(ValueError, match="'top5' was not measured: there are accuracy, task_accuracy, worst"):
        result.to_frame("top5")


class Share(Measure):
    """A measure that says nothing of no samples."""

    name = "share"
    compute_as: Any = float

    def __init__(self) -> None:
        self.hits = self.samples = 0

    def update(self, answers: Answers, y: Tensor) -> None:
        """Count."""
        self.hits += int((answers.predicted == y).sum())
        self.samples += len(y)

    def compute(self) -> float:
        """Return the share."""
        return self.compute_as(self.hits / self.samples)  # type: ignore[no-any-return]  # on purpose


@pytest.mark.parametrize("about", ["all", "seen"])
def test_a_measure_is_asked_for_no_value_of_no_samples(about: str) -> None:
    result = run(Finetune(example_model()), with_probes(), measures=[Share()], evaluate_on=about)
    assert torch.equal(result.measured["share"].nan_to_num(-1), result.measured["accuracy"].nan_to_num(-1))
    assert result.measured["share"][:, result.test_sets.index("unknown/noise")].isnan().all()


@pytest.mark.parametrize("number", [float, int, torch.tensor, np.float32, lambda share: torch.tensor([share])])
def test_the_value_of_a_measure_is_any_number(number: Any) -> None:
    measure = Share()
    measure.compute_as = number
    expected = run(Finetune(example_model()), example_stream(epochs=1)).accuracy
    result = run(Finetune(example_model()), example_stream(epochs=1), measures=[measure])
    expected = expected.long().double() if number is int else expected
    torch.testing.assert_close(result.measured["share"][:, :3], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("answer", "words"), [(None, "None"), ("high", "'high'"), (torch.zeros(2), r"a tensor of \(2,\)"), ([], r"\[\]")]
)
def test_a_value_that_is_no_number_is_refused_by_the_name_of_its_measure(answer: object, words: str) -> None:
    measure = Share()
    measure.compute_as = lambda share: answer  # whatever it is
    with pytest.raises(TypeError, match=f"Share.compute must return a number, and returned {words}"):
        run(Finetune(example_model()), example_stream(), measures=[measure])


@pytest.mark.parametrize("learns", ["label", ("labels",), (), None])
def test_a_strategy_that_names_no_targets_is_refused(learns: object) -> None:
    strategy = Finetune(example_model())
    strategy.learns_targets = learns  # type: ignore[assignment]  # on purpose
    with pytest.raises(ValueError, match=r"Finetune\.learns_targets must be a tuple of some of label, multilabel, value"):
        run(strategy, example_stream())


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        (["auroc"], "auroc needs a test set of strange samples, which example hasn't: give it a probe"),
        (["map"], "map is of multilabel targets, and example has label ones"),
    ],
)
def test_measures_that_nothing_answers_are_refused_before_the_run(measures: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(Finetune(example_model()), example_stream(), measures=measures)


def test_measures_that_a_strategy_has_no_answer_to_are_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="nll needs logits or probabilities, and the scores of SHARP are ranks: leave it out"):
        run(SHARP(Mlp((1, 8, 8), 6)), example_stream(), measures=["nll"])

    class Ranking(Finetune):
        scores_are = "ranks"

    with pytest.raises(ValueError, match="auroc needs how strange a sample is, and the scores of Ranking don't say"):
        run(Ranking(example_model()), with_probes(), measures=["auroc"])


@pytest.mark.parametrize(("answer", "words"), [(3.0, "a float"), (torch.zeros(2, 2), r"\(2, 2\)")])
def test_novelties_that_are_none_are_refused(answer: object, words: str) -> None:
    class Odd(Finetune):
        def novelty(self, x: Tensor) -> Any:
            return answer

    with pytest.raises(ValueError, match=f"Odd.novelty answers .* samples with {words}, not a tensor of one number each"):
        run(Odd(example_model()), with_probes(), measures=["auroc"])


def test_novelties_that_are_nan_end_the_run() -> None:
    class Nowhere(Finetune):
        def novelty(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), math.nan)

    with pytest.raises(FloatingPointError, match="Nowhere answers test samples of example with NaN"):
        run(Nowhere(example_model()), with_probes(), measures=["auroc"])


def test_the_untrained_strategy_is_measured_by_every_kind_of_target() -> None:
    accuracy, task_accuracy = evaluate(Finetune(example_model()), example_stream())
    assert ((accuracy >= 0) & (task_accuracy <= 1)).all()
    several, with_task = evaluate(Finetune(Mlp(8, 4)), multilabel())
    assert torch.equal(several, with_task) and ((several > 0) & (several < 1)).all()
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    values = Stream("values", [Task(0, (), *[Samples(x, x @ torch.ones(3, 2), target="value")] * 2)], scenario="domain")
    strategy = Finetune(Mlp(3, 2))
    expected = sklearn_metrics.r2_score((x @ torch.ones(3, 2)).numpy(), strategy.scores(x).numpy())
    assert np.allclose([float(row) for row in evaluate(strategy, values)], expected, atol=1e-6)


def test_a_sample_in_the_test_sets_of_two_tasks_counts_once_where_there_are_probes() -> None:
    plain = multilabel()
    other = TestSet("other", Samples(torch.randn(9, 8), torch.ones(9, 4), target="multilabel"))
    results = []
    for stream in (plain, plain.with_probes(other)):
        torch.manual_seed(0)
        results.append(run(Finetune(Mlp(8, 4, hidden=(16,))), stream, measures=["of1"]))
    for name in ("map", "of1"):
        assert results[0].measured[name][:, -1].equal(results[1].measured[name][:, -1])


def test_observers_hear_which_samples_were_answered() -> None:
    class Heard:
        def __init__(self) -> None:
            self.rows: dict[str, list[Tensor]] = {}

        @on(Answered)
        def hear(self, event: Answered) -> None:
            assert event.y.equal(event.test_set.samples.y[event.rows]) and len(event.scores) == len(event.rows)
            self.rows.setdefault(event.test_set.name, []).append(event.rows)

    for stream in (with_probes(), with_probes(boundaries=False)):
        heard = Heard()
        result = run(Finetune(example_model()), stream, heard, measures=["auroc"], max_sessions=1)
        assert set(heard.rows) == set(result.test_sets) - {"seen"}
        for test_set in stream.test_sets:
            rows = torch.cat(heard.rows[test_set.name])
            assert rows.bincount().tolist() == [2] * len(test_set.samples)  # before the run, and after the session
