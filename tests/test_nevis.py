"""NEVIS's learners: the search inside a task, what tasks start from, what they cost, and that nothing is forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.experiments.nevis import front, front_table, point, relations, table
from clstream.strategies.nevis import DynamicKNN, FrozenLinear, Independent, Previous, StartChosen, TrialEnded
from clstream.strategies.nevis.search import TaskSearch, warmup_cosine
from clstream.streams.task_sequence import DataSet, TaskKey, TaskSequence, batch_size_of, task_sequence
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from clstream import Strategy, on, run
from clstream.checks.recorders import Checkpoints
from clstream.evaluation import evaluate
from clstream.measures import pareto_front
from clstream.measures.flops import FlopMode
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.stream import Samples

ROOT = Path(__file__).resolve().parent.parent

RATES = [0.003, 0.1]


def data_set(name: str, seed: int, classes: int = 3, kind: str = "label") -> DataSet:
    """Return a data set whose classes are told by 4 of 32 numbers, weakly, among noise: raw neighbours are wrong often."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, 32, generator=draw) * (torch.randperm(32, generator=draw) < 4)

    def samples(count: int) -> Samples:
        noise = torch.randn(count, 32, generator=draw)
        if kind == "label":
            y = torch.arange(count) % classes
            return Samples(noise + 2 * directions[y], y)
        y = torch.randint(0, 2, (count, classes), generator=draw).float()
        return Samples(noise + 2 * y @ directions, y, target="multilabel")

    key = TaskKey(name, kind, 2000 + seed, tuple(f"class {label}" for label in range(classes)))
    return DataSet(key, samples(240), samples(60))


FIRST, SECOND = data_set("first", 1), data_set("second", 2, 4)


def sequence(*data: DataSet, **options: Any) -> TaskSequence:
    return task_sequence("sequence", data or (FIRST, SECOND, FIRST), **{"epochs": 5, **options})


def built(kind: Callable[..., TaskSearch], stream: TaskSequence, **options: Any) -> TaskSearch:
    with isolated(0, "strategy"):
        return kind(Mlp(stream.input_shape, stream.outputs, (16,)), partial(SGD, lr=0.1), **options)


class Heard:
    """Keeps what a learner tells of its searches."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.trials: list[TrialEnded] = []

    @on(StartChosen)
    def start(self, event: StartChosen) -> None:
        self.starts.append(event.start)

    @on(TrialEnded)
    def trial(self, event: TrialEnded) -> None:
        self.trials.append(event)


# Vectors of the protocol ----------------------------------------------------------------------------------------------


def test_the_pareto_front() -> None:
    points = [(1, 0.5), (2, 0.4), (2.5, 0.45), (4, 0.4), (5, 0.3), (6, 0.31)]
    costs, errors = torch.tensor(points, dtype=torch.float64).T
    assert [points[place] for place in pareto_front(costs, 1 - errors)] == [(1, 0.5), (2, 0.4), (5, 0.3)]
    rows = [{"learner": str(place), "seed": 0, "flops": flops, "error": error} for place, (flops, error) in enumerate(points)]
    assert [row["learner"] for row in front(rows)] == ["0", "1", "4"]


def test_batch_sizes() -> None:
    sizes = (100, 6400, 12_800, 60_000, 204_800, 1_281_167)
    assert [batch_size_of(samples) for samples in sizes] == [16, 16, 32, 128, 512, 512]


def test_the_schedule_of_learning_rates() -> None:
    rates = [warmup_cosine(step, 0.1, 100, 1000, 1e-8) for step in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.050000005, 1e-8], rel=1e-12)
    assert warmup_cosine(0, 0.1, 0, 1) == 0.1  # one step takes the peak


@pytest.mark.parametrize(("gradient", "flops"), [(None, 1024), (False, 2048), (True, 3072)])
def test_flops_of_a_linear_layer_by_both_counters(gradient: bool | None, flops: int) -> None:
    layer, x = nn.Linear(16, 4), torch.rand(8, 16, requires_grad=bool(gradient))

    def call() -> None:
        outputs = layer(x)
        if gradient is not None:
            outputs.sum().backward()

    with FlopMode(lambda: False) as ours:
        call()
    with FlopCounterMode(display=False) as theirs:
        call()
    assert ours.flops == theirs.get_total_flops() == flops


# The search -----------------------------------------------------------------------------------------------------------


def test_a_search_keeps_the_trial_with_the_least_error_on_validation_samples() -> None:
    stream, heard = sequence(), Heard()
    learner = built(Independent, stream, rates=[1e-6, 0.1, 1e9])
    result = run(learner, stream, heard, evaluate_at="end")
    assert [(event.task, event.trial, event.rate) for event in heard.trials[:3]] == [(0, 0, 1e-6), (0, 1, 0.1), (0, 2, 1e9)]
    assert [event.trial for event in heard.trials if event.kept] == [1, 1, 1]
    assert heard.trials[2].error > heard.trials[1].error  # it diverged, and ended no run
    assert float(result.task_accuracy[-1].min()) > 0.8
    for task, event in zip(stream.tasks, [event for event in heard.trials if event.kept], strict=True):
        assert task.validation is not None
        right = (learner.predict(task.validation.x, task) == task.validation.y).double().mean()
        if task.id:  # the first one was learned again
            assert event.error == pytest.approx(1 - float(right))  # the cost is that of the weights that are kept


@pytest.mark.slow
def test_rates_are_drawn_from_the_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        stream, heard = sequence(), Heard()
        run(built(Previous, stream, rates=RATES, trials=3), stream, heard, seed=seed, max_sessions=2, evaluate_at="end")
        drawn.append([event.rate for event in heard.trials])
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 6
    assert all(RATES[0] <= rate <= RATES[1] for rate in drawn[0])


def test_its_flops_are_those_of_all_trials() -> None:
    stream = sequence()
    one, three = (run(built(Independent, stream, rates=rates), stream).cost for rates in ([0.1], [0.1, 0.01, 0.2]))
    assert torch.equal(three.learning_flops, 3 * one.learning_flops) and bool((one.learning_flops > 0).all())
    validation = 2 * (32 * 16 + 16 * stream.outputs) * torch.tensor([len(task.validation or ()) for task in stream.tasks])
    assert torch.equal(three.consolidating_flops, 3 * validation.double())


def test_one_rate_needs_no_validation_samples_and_several_do() -> None:
    stream = replace(sequence(), tasks=[replace(task, validation=None) for task in sequence().tasks])
    heard = Heard()
    run(built(Independent, stream), stream, heard, max_sessions=1)
    assert math.isnan(heard.trials[0].error) and heard.trials[0].kept and heard.trials[0].rate == 0.1
    with pytest.raises(ValueError, match=r"compares 2 learning rates on held-out samples, and sequence holds back none: build it"):
        run(built(Independent, stream, rates=RATES), stream)


# What tasks start from ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_each_learner_starts_from() -> None:
    stream = sequence(FIRST, SECOND, data_set("third", 3), FIRST, epochs=10)
    starts = {}
    for kind in (Independent, Previous, DynamicKNN, FrozenLinear):
        run(built(kind, stream), stream, heard := Heard(), evaluate_at="end")
        starts[kind] = heard.starts
    assert starts[Independent] == starts[FrozenLinear] == [-1, -1, -1, -1] and starts[Previous] == [-1, 0, 1, 2]
    assert starts[DynamicKNN][0] == -1 and starts[DynamicKNN][3] == 0  # what comes again picks its own earlier model


def test_where_the_weights_from_scratch_win_they_are_taken_unless_they_do_not_count() -> None:
    class SureOfScratch(DynamicKNN):
        def neighbours_score(self, network: nn.Module, train: Samples, asked: Samples | None) -> float:
            return 1.0 if network is self.model else 0.5

    stream = sequence(FIRST, SECOND)
    for counts, starts in ((True, [-1, -1]), (False, [-1, 0])):
        run(built(SureOfScratch, stream, scratch_counts=counts), stream, heard := Heard(), evaluate_at="end")
        assert heard.starts == starts


def test_features_by_the_statistics_of_a_batch_depend_on_it_and_leave_the_model_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    network.features = network.forward  # type: ignore[assignment]
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    before = digest(network)
    for embedding, same in (("eval", True), ("batch", False)):
        learner = DynamicKNN(network, embedding=embedding)
        assert torch.equal(learner.embed(network, x)[:20], learner.embed(network, x[:20])) == same
    assert digest(network) == before


# A sequence of tasks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kinds_of_targets_mix_and_nothing_is_forgotten() -> None:
    stream = sequence(FIRST, data_set("several", 4, kind="multilabel"), SECOND, FIRST)
    for kind in (Previous, FrozenLinear):
        result = run(built(kind, stream, rates=RATES), stream)
        assert result.main_names == ("task_accuracy", "task_map", "task_accuracy", "task_accuracy")
        for task in range(3):
            since = result.main[task:, task] if task else result.main[:3, task]  # the first one is learned again at the end
            assert torch.equal(since, since[:1].expand_as(since))
        assert torch.equal(result.main[3, 0], result.main[3, 3])  # one key, one model
        assert float(result.main[-1].min()) > (0.5 if kind is Previous else 0.3)


def test_flops_never_fall_and_an_answer_changes_nothing() -> None:
    stream = sequence(FIRST, data_set("several", 4, kind="multilabel"), FIRST)
    learner = built(DynamicKNN, stream, rates=RATES)
    result = run(learner, stream)
    assert bool((result.cost.training_flops > 0).all()) and bool((result.cost.evaluating_flops >= 0).all())
    before = digest(learner)
    evaluate(learner, stream)
    learner.predict(stream.tasks[1].test.x, stream.tasks[1])
    assert digest(learner) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicKNN, FrozenLinear])
def test_killed_within_a_search_it_ends_as_it_would_have(kind: Callable[..., TaskSearch]) -> None:
    stream = sequence(FIRST, data_set("several", 4, kind="multilabel"), FIRST, epochs=2)
    options = {"rates": RATES, "trials": 3}
    whole, heard = Checkpoints(every=7), Heard()
    expected = run(built(kind, stream, **options), stream, whole, heard)
    end = expected.cost.to_dict()
    for number in range(1, len(whole.written) - 1):
        state, rest = whole.load(number), Heard()
        again = run(built(kind, stream, **options), stream, rest, resume=state)
        assert torch.equal(again.main, expected.main)
        assert all(torch.equal(again.cost.to_dict()[name], end[name]) for name in end if name.endswith("_flops"))
        told = [(event.task, event.trial, event.rate, event.error) for event in rest.trials]
        assert (
            told == [(event.task, event.trial, event.rate, event.error) for event in heard.trials][len(heard.trials) - len(told) :]
        )
        assert len(told) == 3 * (3 - state["position"][0])  # each trial of a task that was under way, or came later, once


# Costs that can't be counted ------------------------------------------------------------------------------------------


class OutsideTorch(torch.autograd.Function):
    """A product that numpy computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.from_numpy(slope.numpy() @ weight.numpy().T), torch.from_numpy(x.numpy().T @ slope.numpy())


class Unreadable(nn.Module):
    """A linear model that the counter sees no operation of."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, outputs))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = OutsideTorch.apply(x, self.weight)
        return outputs


def test_flops_that_the_counter_cannot_read_are_nan_and_said() -> None:
    stream = sequence(FIRST)
    result = run(Independent(Unreadable(stream.outputs)), stream, evaluate_at="end")
    with pytest.warns(
        UserWarning, match="no operation of Independent's steps is one that the FLOP counter knows: its FLOPs are NaN"
    ):
        error, flops = point(result)
    assert math.isnan(flops) and 0 <= error < 0.5
    known = {"learner": "a", "seed": 0, "flops": 1.0, "error": 0.9}
    assert front([known, {"learner": "b", "seed": 0, "flops": flops, "error": error}]) == [known]


def test_the_tables_in_the_docs_are_those_of_the_results() -> None:
    rows = [json.loads(line) for line in (ROOT / "experiments" / "results" / "nevis.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "nevis.md").read_text(encoding="utf-8")
    assert table(rows) in page and front_table(rows) in page and relations(rows) in page
    assert "not comparable with the paper" in table(rows).splitlines()[0] + page.splitlines()[2]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: Independent(Mlp(4, 3), rates=[]),
            ValueError,
            r"rates must be a list of learning rates, as \[0.01, 0.1\], or None",
        ),
        (lambda: Independent(Mlp(4, 3), rates=[0.1, 0]), ValueError, r"rates\[1\] must be a finite number above 0, not 0"),
        (lambda: Independent(Mlp(4, 3), trials=3), ValueError, "trials=3 draws rates between the lowest and the highest"),
        (lambda: Previous(Mlp(4, 3, head="growing")), ValueError, "Previous has a head for each task from the start"),
        (lambda: DynamicKNN(nn.Linear(4, 3)), TypeError, "DynamicKNN needs a model with a method `features`"),
        (lambda: FrozenLinear(nn.Linear(4, 3)), TypeError, "FrozenLinear needs a model with a method `features`"),
    ],
)
def test_what_is_refused(make: Callable[[], Strategy], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make()


def test_a_task_that_was_not_learned_is_answered_by_the_newest_model() -> None:
    stream = sequence(FIRST, SECOND)
    learner = built(Previous, stream)
    run(learner, stream, max_sessions=1, evaluate_at="end")
    other = stream.tasks[1]
    assert learner.newest is not None
    assert torch.equal(learner.scores(other.test.x, other), learner.newest.network(other.test.x).detach())
