"""TAME against its specification: when it switches, what its memories and its selector hold, what pruning leaves, and no trace."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import AGEM, TAME, Refresh
from clstream.strategies.tame import ExpertAdded, ExpertReactivated, Routing, RoutingMeasured
from clstream.strategies.tame.pruning import magnitude_masks, parameter_counts, prunable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Batch, Event, RunStarted, Samples, Stream, Task, on, run
from clstream.bus import ObserverError
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.drift_detection import ShiftDetected
from clstream.models import GrowingHead, LeNet, Mlp
from clstream.models.ensemble import Stacked
from clstream.online_metrics import Detection, Prequential
from clstream.params import Recorded
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.strategy import needs


def moving(schedule: list[int], epochs: int = 6, each: int = 40, batch_size: int = 10, scenario: str = "domain") -> Stream:
    """Four tasks of four blobs: each is marked in its inputs, and has its labels in another order, so no expert knows two."""
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 10, generator=draw)

    def samples(task: int, n: int) -> Samples:
        y = torch.arange(4).repeat_interleave(n)
        blobs = centres[y] + 0.3 * torch.randn(len(y), 10, generator=draw)
        marks = 2.0 * (torch.arange(4) == task).expand(len(y), 4)
        return Samples(torch.cat([blobs, marks], 1), (y + task) % 4 + (4 * task if scenario == "class" else 0))

    def classes(task: int) -> tuple[int, ...]:
        return tuple(range(4 * task, 4 * task + 4) if scenario == "class" else range(4))

    tasks = [Task(number, classes(number), samples(number, each), samples(number, 10)) for number in range(4)]
    return Stream("moving", tasks, schedule, epochs, batch_size, scenario, boundaries=False)


def tame(seed: int = 0, classes: int = 4, **options: Any) -> TAME:
    short = {"window": 20, "selector_epochs": 30, "retrain_epochs": 8, "optimizer": partial(SGD, lr=0.1, momentum=0.9)}
    with isolated(seed, "model"):
        return TAME(Mlp(14, classes, hidden=(32,)), **short | options)


class Ear:
    """An observer that keeps a strategy's own events."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    @on(Event)
    def hear(self, event: Event) -> None:
        if not type(event).__module__.endswith(".events"):
            self.heard.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kind)]


class Scripted(TAME):
    """TAME with the losses of its experts given: a row for each batch, with a column for each expert there may be."""

    not_state = ("table",)
    table: np.ndarray

    def losses(self, samples: Samples, only: int | None = None) -> dict[int, float]:
        row = self.table[self.step]
        return {number: float(row[number]) for number in range(len(self.experts)) if only in (None, number)}


def played(table: np.ndarray, classes: int = 4, **options: Any) -> list[int]:
    """Return which expert learned each batch."""
    strategy = Scripted(Mlp(2, classes, hidden=()), optimizer=partial(SGD, lr=0.0), **options)
    strategy.table, strategy.classes = table, classes
    strategy.experts = [strategy.expert(strategy.model, strategy.optimizer)]
    active = []
    for index in range(len(table)):
        strategy.learn(Batch(Samples(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), None, index, 0))
        active.append(strategy.active)
    return active


def by_the_book(table: np.ndarray, classes: int, window: int, settle: bool) -> list[int]:
    """The specification, step by step."""
    alpha, experts, current, active = 0.2, [], 0, []

    def new() -> dict[str, Any]:
        return {"W": [math.log(classes)], "all": None, "act": None, "tau": None}

    experts.append(new())
    for t, row in enumerate(table):
        for k, expert in enumerate(experts):
            if not settle or k == current:
                expert["all"] = row[k] if expert["all"] is None else alpha * row[k] + (1 - alpha) * expert["all"]
        chosen = experts[current]
        chosen["tau"] = np.mean(chosen["W"]) + 3 * max(np.std(chosen["W"]), 0.005)
        if chosen["all"] > chosen["tau"] and t:
            for k, expert in enumerate(experts):
                value = row[k] if expert["act"] is None else alpha * row[k] + (1 - alpha) * expert["act"]
                if value < expert["tau"]:
                    if settle:
                        expert["all"] = value
                    current = k
                    break
            else:
                experts.append(new())
                current = len(experts) - 1
        chosen = experts[current]
        chosen["W"] = [*chosen["W"], row[current]][-window:]
        chosen["act"] = row[current] if chosen["act"] is None else alpha * row[current] + (1 - alpha) * chosen["act"]
        active.append(current)
    return active


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_switches_as_the_specification_says(seed: int, settle: bool) -> None:
    """Losses of experts that each learn a distribution when it first comes; then the distributions recur at random."""
    draw = np.random.default_rng(seed)
    rows, met = [], set()
    for segment in [0, 1, 0, 2, 3, *draw.integers(0, 4, 8)]:
        for step in range(draw.integers(70, 120)):
            row = 0.75 + 0.64 * math.exp(-step / 8) + 0.01 * draw.random(80)  # of a new expert
            row[:4] = 1.6
            row[segment] = 0.75 + (0 if segment in met else 0.64 * math.exp(-step / 8)) + 0.01 * draw.random()
            rows.append(row)
        met.add(segment)
    table = np.array(rows)
    active = played(table, window=35, settle=settle)
    assert active == by_the_book(table, 4, 35, settle)
    assert len(set(active)) >= 4 and any(one > two for one, two in pairwise(active))  # some came back


def falling(n: int, start: float = 1.38, end: float = 0.75) -> list[float]:
    return [end + (start - end) * math.exp(-t / 5) for t in range(n)]


def test_an_old_expert_comes_back_and_the_first_that_fits_is_taken_not_the_best() -> None:
    one, two = falling(60), falling(60)
    table = np.full((240, 6), 2.0)
    table[:60, 0], table[60:120, 1], table[60:120, 0] = one, two, 2.0
    table[120:180, 0], table[120:180, 1] = 0.76, 2.0  # the first distribution again
    table[180:, 1], table[180:, 0] = 0.70, 2.0
    active = played(table, window=35)
    assert active[59] == 0 and active[119] == 1 and active[179] == 0 and active[-1] == 1 and max(active) == 1
    table[120:180, 0], table[120:180, 1] = 0.80, 0.70
    table[120, 1] = table[121, 1] = 5.0  # an alarm; from then on both would fit, number 1 better
    assert played(table, window=35)[119:124] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("settle", [False, True])
def test_what_is_known_of_an_expert_that_rests(settle: bool) -> None:
    """Its threshold stays; its smoothed loss goes on or, where it is to settle, is that of its own batches when it comes back."""
    table = np.full((121, 3), 2.0)
    table[:60, 0], table[60:120, 1], table[120, 0] = falling(60), falling(60), 0.76
    strategy = Scripted(Mlp(2, 4, hidden=()), optimizer=partial(SGD, lr=0.0), window=35, settle=settle)
    strategy.table, strategy.classes = table, 4
    strategy.experts = [strategy.expert(strategy.model, strategy.optimizer)]
    known, thresholds = strategy.experts[0].known, []
    for index in range(121):
        strategy.learn(Batch(Samples(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), None, index, 0))
        thresholds.append(known.threshold)
    assert strategy.active == 0
    window = table[25:60, 0]  # the newest that it learned, when it was last asked as the active one
    assert thresholds[60:] == [pytest.approx(np.mean(window) + 3 * max(np.std(window), 0.005))] * 61
    smoothed = learned = table[0, 0]
    for loss in table[1:60, 0]:
        smoothed = learned = 0.2 * loss + 0.8 * learned
    for loss in [2.0] * 60:
        smoothed = 0.2 * loss + 0.8 * smoothed
    assert known.smoothed == pytest.approx(0.2 * 0.76 + 0.8 * (learned if settle else smoothed))


def test_a_new_expert_whose_loss_rises_at_once_is_doubled() -> None:
    """Two nearly equal values in the window: the floor of the deviation decides."""
    table = np.full((70, 6), 3.0)
    table[:60, 0] = falling(60)
    table[60:, 1] = [1.386, 1.39, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6]
    assert max(played(table, window=35)) >= 2
    table[62:, 1] = 1.39
    assert max(played(table, window=35)) == 1


def test_the_first_batch_is_no_shift() -> None:
    table = np.full((5, 3), 2.4)
    assert played(table, classes=2)[0] == 0


@pytest.mark.parametrize(
    ("classes", "least", "chance", "most"), [(2, 0.313, 0.693, 1.313), (5, 0.905, 1.609, 2.474), (10, 1.461, 2.303, 3.237)]
)
def test_the_sigmoid_bounds_the_loss(classes: int, least: float, chance: float, most: float) -> None:
    strategy = TAME(Mlp(3, classes))
    y = torch.zeros(1, dtype=torch.int64)
    right = torch.full((1, classes), -100.0)
    right[0, 0] = 100.0
    for outputs, expected in ((right, least), (torch.zeros(1, classes), chance), (-right, most)):
        assert float(F.cross_entropy(strategy.bounded(outputs), y)) == pytest.approx(expected, abs=6e-4)
    assert torch.equal(TAME(Mlp(3, classes), sigmoid=False).bounded(right), right)


def test_windows_start_with_the_loss_of_a_guess() -> None:
    strategy = tame(window=1000, deviations=1.0)
    run(strategy, moving([0, 1]))
    assert len(strategy.experts) == 2
    assert [expert.known.losses[0] for expert in strategy.experts] == [math.log(4)] * 2
    assert strategy.experts[0].known.losses[1] == pytest.approx(math.log(4), abs=0.2)  # from before the first step


@pytest.mark.parametrize("settle", [False, True])
def test_a_stream_where_one_task_comes_again_ends_with_as_many_experts_as_there_are_tasks(settle: bool) -> None:
    strategy, ear, detection, routing = tame(settle=settle), Ear(), Detection(), Routing()
    result = run(strategy, moving([0, 1, 2, 1, 3]), ear, detection, routing)
    assert len(strategy.experts) == 4 and result.average_accuracy > 0.97
    assert [event.expert for event in ear.of(ExpertAdded)] == [1, 2, 3]
    assert [event.expert for event in ear.of(ExpertReactivated)] == [1]
    assert ear.of(ExpertAdded)[-1].curves() == {"experts/number": 4, "experts/active": 3}
    assert len(ear.of(ShiftDetected)) == 4 and [event.step for event in ear.of(ShiftDetected)] == detection.alarms
    assert detection.boundaries == [96, 144, 240, 288]  # 6 epochs of 16 batches, of 8 where the task comes twice
    assert detection.measured.precision == detection.measured.recall == 1 and detection.measured.delay < 5
    assert routing.homes() == {0: 0, 1: 1, 2: 2, 3: 3}
    assert routing.measured[-1].selector > 0.97 and routing.measured[-1].strict > 0.95
    assert not needs(strategy)


def test_where_samples_were_sent_is_not_told_to_the_strategy() -> None:
    class Curious(TAME):
        @on(Event)
        def hear(self, event: Event) -> None:
            assert not isinstance(event, RoutingMeasured)

    with isolated(0, "model"):
        strategy = Curious(Mlp(14, 4, hidden=(32,)), partial(SGD, lr=0.1), window=20, selector_epochs=5, retrain_epochs=2)
    run(strategy, moving([0, 1]), routing := Routing(), ear := Ear())
    assert ear.of(RoutingMeasured) == routing.measured and len(routing.measured) == 2


def test_experts_need_not_be_tasks() -> None:
    """A stream whose task is split in two, and one that is learned in two sessions."""
    strategy, routing = tame(), Routing()
    result = run(strategy, moving([0, 0, 1, 1]), routing)
    assert len(strategy.experts) == 2 and len(result.accuracy) == 4
    assert float(result.accuracy[-1, :2].min()) > 0.97
    short = tame(window=10_000, floor=1.0)  # its threshold stays high, so one expert learns it all
    run(short, moving([0, 1], epochs=1), routing)
    assert len(short.experts) == 1


def test_a_batch_across_a_boundary_is_stored_for_the_expert_that_learned_it() -> None:
    strategy = tame()
    run(strategy, moving([0, 1], epochs=6), max_sessions=1)
    mixed = moving([0, 1]).tasks[1].train[:10]
    held = len(strategy.memory)
    strategy.learn(Batch(mixed, None, 0, 0))
    assert strategy.active == 1  # here the loss rises at once
    owners = strategy.memory.all().y // 4
    assert Counter(owners.tolist()) == {0: held, 1: 10}
    calm = tame(floor=10.0)  # never a switch: the other task's samples are the first expert's
    run(calm, moving([0, 1], epochs=1))
    assert set((calm.memory.all().y // 4).tolist()) == {0}


def test_the_selectors_memory_is_balanced_over_experts_and_labels_and_takes_each_sample_once() -> None:
    strategy = tame(selector_capacity=80)
    run(strategy, moving([0, 1, 2, 3]))
    kept = Counter(strategy.memory.all().y.tolist())
    assert strategy.memory.seen == 4 * 160  # one epoch of each session
    assert sum(kept.values()) == 80
    counts = [n for label, n in sorted(kept.items()) if n > 2]  # a batch that came before the switch has few samples
    assert max(counts) - min(counts) <= 2


def test_what_is_measured_is_tracked(store: str) -> None:
    from mlflow.tracking import MlflowClient

    from clstream.tracking import MlflowTracker

    tracker, prequential, routing = MlflowTracker(uri=store), Prequential(), Routing()
    run(tame(), moving([0, 1, 2, 1, 3]), tracker, Detection(), routing, prequential)

    def curve(name: str) -> list[float]:
        return [point.value for point in MlflowClient(store).get_metric_history(tracker.run_id, name)]

    assert curve("experts/number") == [2, 3, 3, 4] and curve("experts/active") == [1, 2, 1, 3]
    assert curve("detection/recall") == [1, 1, 1, 1] and curve("detection/false_alarms") == [0] * 5
    assert curve("prequential/mean")[-1] == prequential.accuracy
    assert curve("routing/strict_accuracy") == [each.strict for each in routing.measured]
    assert curve("parameters/dense")[-1] == 5 * 14 * 32 + 5 * 32 + 4 * (32 * 4 + 4) + 32 * 4 + 4  # selector: four outputs too


# Answers, and no trace of them


@pytest.mark.parametrize("pruning", ["none", "online", "posthoc"])
def test_evaluations_leave_no_trace(pruning: str) -> None:
    states, results = [], []
    for every in (None, 7):
        strategy = tame(pruning=pruning, selector="mlp")
        results.append(run(strategy, moving([0, 1, 2], epochs=3), evaluate_every=every).accuracy)
        states.append(digest(strategy))
    assert len(strategy.experts) == 3
    assert states[0] == states[1] and torch.equal(*results)


def test_the_selector_is_trained_once_for_what_the_memory_has() -> None:
    strategy = tame()
    run(strategy, moving([0, 1]))
    first = strategy.selecting()[0]
    assert strategy.selecting()[0] is first and not first.training and first(torch.zeros(1, 14)).shape == (1, 2)
    weights = [each.clone() for each in first.parameters()]
    strategy.selected = None
    assert all(torch.equal(one, two) for one, two in zip(weights, strategy.selecting()[0].parameters(), strict=True))
    strategy.learn(Batch(moving([0]).tasks[0].train[:10], None, 0, 0))
    assert strategy.selecting()[0] is not first


def test_a_selector_that_collapsed_is_trained_anew() -> None:
    class Collapsing(TAME):
        not_state = ("trained",)
        trained = 0

        def train_selector(self, samples: Samples) -> tuple[nn.Module, Any]:
            self.trained += 1
            model, masks = super().train_selector(samples)
            if self.trained <= 2:
                with torch.no_grad():
                    model.head.weight.zero_()
                    model.head.bias.copy_(torch.tensor([0.0, 9.0]))
            return model, masks

    strategy = Collapsing(Mlp(14, 4, hidden=(32,)), window=20, selector_epochs=30, retrain_epochs=8)
    assert run(strategy, moving([0, 1])).average_accuracy > 0.97
    assert strategy.trained == 3


def test_scores_are_those_of_the_expert_that_a_sample_is_sent_to() -> None:
    strategy = tame()
    run(strategy, moving([0, 1, 2]))
    x = torch.cat([task.test.x for task in moving([0]).tasks[:3]])
    with torch.no_grad():
        sent, scores = strategy.route(x), strategy.scores(x)
        for row in range(0, len(x), 17):
            expert = strategy.experts[int(sent[row])].model
            torch.testing.assert_close(scores[row], expert(x[row : row + 1])[0])
    assert strategy.scores_ignore_task
    assert torch.equal(strategy.predict_online(x), strategy.experts[2].model(x).argmax(1))


@pytest.mark.parametrize("options", [{}, {"pruning": "online"}, {"settle": True, "initial": "given"}], ids=str)
def test_a_run_with_several_experts_resumes_exactly(options: dict[str, Any]) -> None:
    def go_on(observer: Checkpoints, state: Any = None) -> list[object]:
        others = [Detection(), Routing(), Prequential()]
        run(tame(**options), moving([0, 1, 2, 1, 3], epochs=4), *others, observer, evaluate_every=29, resume=state)
        return [others[0].measured.delay, [vars_of(each) for each in others[1].measured], others[2].accuracy]

    whole = Checkpoints()
    expected = go_on(whole)
    for number in range(3, len(whole.written), 31):
        rest = Checkpoints(every=False)
        assert go_on(rest, whole.load(number)) == expected
        assert difference(whole.load(-1), rest.load(-1)) is None, f"from checkpoint {number}"


def vars_of(event: RoutingMeasured) -> tuple[float, ...]:
    return tuple(event.curves().values())


def test_new_experts_differ_by_the_runs_seed_and_not_by_the_callers() -> None:
    def second(seed: int, mine: int, **options: Any) -> Tensor:
        torch.manual_seed(mine)
        strategy = tame(optimizer=partial(SGD, lr=0.0), alpha=1.0, deviations=0.0, floor=0.0, **options)
        given = strategy.model.stages.layer1.weight.clone()
        run(strategy, moving([0], epochs=1), seed=seed)
        assert len(strategy.experts) > 1
        other = strategy.experts[1].model.stages.layer1.weight
        assert torch.equal(other, given) == (options.get("initial") == "given")
        return other.detach()

    assert torch.equal(second(0, 1), second(0, 2))
    assert not torch.equal(second(0, 1), second(1, 1))
    second(0, 1, initial="given")


# Pruning


def test_masks_cut_the_smallest_weights_of_all_layers_together() -> None:
    torch.manual_seed(0)
    model = LeNet((1, 28, 28), 10)
    assert sum(each.numel() for each in model.parameters()) == 61_706
    masks = magnitude_masks(model, 0.98)
    weights = prunable(model)
    total = sum(each.numel() for each in weights.values())
    cut = sum(int((~mask).sum()) for mask in masks.values())
    assert cut == round(0.98 * total) and masks.keys() == weights.keys() and not any("bias" in name for name in masks)
    stay = torch.cat([weights[name].detach()[mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name].detach()[~mask].abs() for name, mask in masks.items()])
    assert float(stay.min()) >= float(gone.max())
    assert parameter_counts(model, masks) == (61_706, 61_706 - cut)


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in prunable(model).values())


@pytest.mark.parametrize("pruning", ["none", "online", "posthoc"])
def test_pruning_leaves_exactly_as_many_weights(pruning: str) -> None:
    strategy, routing = tame(pruning=pruning, sparsity=0.6, selector_sparsity=0.5, retrain_epochs=20), Routing()
    result = run(strategy, moving([0, 1, 0, 2]), routing)
    total = sum(weight.numel() for weight in prunable(strategy.model).values())
    gone = round(0.6 * total)
    own = [zeros(expert.model) for expert in strategy.experts]
    answering = [zeros(model) for model, _ in strategy.answering()]
    assert own == {"none": [0, 0, 0], "online": [gone, gone, 0], "posthoc": [0, 0, 0]}[pruning]  # the first learned on, pruned
    assert answering == {"none": [0, 0, 0], "online": [gone, gone, 0], "posthoc": [gone] * 3}[pruning]
    assert zeros(strategy.selecting()[0]) == round(0.5 * sum(each.numel() for each in prunable(strategy.selecting()[0]).values()))
    dense, sparse = strategy.parameter_counts()
    assert dense - sparse == sum(answering) + zeros(strategy.selecting()[0])
    assert (routing.measured[-1].parameters, routing.measured[-1].parameters_left) == (dense, sparse)
    assert result.average_accuracy > 0.9


def test_an_expert_is_pruned_for_good_once_with_an_optimizer_of_its_own_after_that() -> None:
    class Noting(TAME):
        not_state = ("notes",)
        notes: list[tuple[int, bool]]

        def prune_for_good(self, number: int) -> None:
            before = self.experts[number].optimizer
            super().prune_for_good(number)
            self.notes.append((number, self.experts[number].optimizer is before))
            samples = moving([0]).tasks[0].train[:20]
            found = self.losses(samples)
            for each, expert in enumerate(self.experts):
                with torch.no_grad():
                    loss = F.cross_entropy(expert.model(samples.x).sigmoid(), samples.y)
                assert found[each] == pytest.approx(float(loss), abs=1e-6)  # also of what was pruned since the last batch

    with isolated(0, "model"):
        strategy = Noting(
            Mlp(14, 4, hidden=(32,)), partial(SGD, lr=0.1, momentum=0.9), window=20, selector_epochs=5, retrain_epochs=8,
            pruning="online", sparsity=0.6,
        )  # fmt: skip
    strategy.notes = []
    run(strategy, moving([0, 1, 0, 1]))
    assert strategy.notes == [(0, False), (1, False)]


@pytest.mark.parametrize("sigmoid", [True, False])
def test_training_from_a_memory_is_the_loop_by_hand(sigmoid: bool) -> None:
    """A falling learning rate, augmented inputs, outputs that pass the sigmoid, and pruned weights at zero."""
    strategy = tame(sigmoid=sigmoid, retrain_epochs=8, sparsity=0.5)
    strategy.augment = lambda x: x + 0.5 * torch.rand(len(x), 1)
    samples = moving([0]).tasks[0].train[:]
    with isolated(1, "start"):
        model, other = (Mlp(14, 4, hidden=(16,)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with isolated(2, "draws"):
        masks = strategy.prune(model, samples)
    assert masks.keys() == magnitude_masks(other, 0.5).keys()
    optimizer = SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def cut_by_hand() -> None:
        for name, weight in other.named_parameters():
            if name in masks:
                weight.data[~masks[name]] = 0

    cut_by_hand()
    with isolated(2, "draws"):
        for epoch in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 if epoch < 4 else 0.01 if epoch < 6 else 0.001
            for rows in torch.randperm(160).split(128):
                x = samples.x[rows] + 0.5 * torch.rand(len(rows), 1)
                outputs = other(x).sigmoid() if sigmoid else other(x)
                optimizer.zero_grad()
                F.cross_entropy(outputs, samples.y[rows]).backward()
                optimizer.step()
                cut_by_hand()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        assert not torch.equal(one, before[name])


# Scoring


def test_experts_are_scored_together_as_one_by_one() -> None:
    torch.manual_seed(0)
    for make, x in (
        (lambda: Mlp(10, 4, hidden=(16,)), torch.randn(12, 10)),
        (lambda: LeNet((1, 28, 28), 4), torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8)),
    ):
        models = [make() for _ in range(4)]
        stacked = Stacked(models)
        assert stacked.batched == isinstance(models[0], Mlp)  # convolutions are batched where there is a GPU
        with torch.no_grad():
            next(models[2].parameters()).add_(0.1)
            expected = torch.stack([model(x) for model in models])
        stacked.renew(2)
        torch.testing.assert_close(stacked.outputs(x), expected)
        torch.testing.assert_close(stacked.one(2, x), expected[2])
        assert all(model.training for model in models)


def test_losses_are_those_of_each_expert_in_evaluation_mode() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(14, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    strategy = TAME(Dropped())
    strategy.experts += [strategy.another() for _ in range(3)]
    samples = moving([0]).tasks[0].train[:20]
    strategy.learn(Batch(samples, None, 0, 0))
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    found = strategy.losses(samples)
    assert all(torch.equal(one, two) for one, two in zip(before, strategy.model.buffers(), strict=True))
    for number, expert in enumerate(strategy.experts):
        expert.model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(expert.model(samples.x).sigmoid(), samples.y)
        assert found[number] == pytest.approx(float(loss), abs=1e-6)
        assert strategy.losses(samples, number)[number] == pytest.approx(float(loss), abs=1e-6)


def test_a_network_that_cannot_be_batched_is_scored_one_by_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out if float(out.detach().sum()) > 1e9 else out * 2

    models = [Branching() for _ in range(3)]
    stacked = Stacked(models)
    x = torch.randn(6, 10)
    torch.testing.assert_close(stacked.outputs(x), torch.stack([model(x) for model in models]).detach())
    assert not stacked.batched


# What is refused, and what is said


def test_saturated_sigmoids_are_said() -> None:
    with isolated(0, "model"):
        strategy = TAME(Mlp(14, 4, hidden=(32,)), partial(SGD, lr=30.0, momentum=0.9), floor=1e9)
    with pytest.warns(UserWarning, match="sigmoids of TAME's active expert are saturated") as said:
        run(strategy, moving([0, 1, 2]))
    assert len(said) == 1


def test_a_selector_that_tells_nothing_apart_is_said() -> None:
    with pytest.warns(UserWarning, match="selector sends all that it was trained on to one expert, after 5 trainings"):
        run(tame(selector_retrain_lr=1e38), moving([0, 1]))  # infinite weights at the second step, whatever the machine


def test_a_model_that_no_selector_can_be_made_of_is_refused_before_anything_is_learned() -> None:
    class HeadFirst(nn.Module):
        """Its head is not the last of its linear layers."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(8, 4), nn.Linear(14, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    with pytest.raises(ValueError, match="can't make a selector of HeadFirst: with two outputs it answers one sample with mat1"):
        run(TAME(HeadFirst()), moving([0, 1]))
    run(TAME(HeadFirst(), selector="mlp"), moving([0]), max_sessions=1)

    class Sized(Recorded, nn.Module):
        """Knows how it was built, by other names than the models of clstream."""

        def __init__(self, width: int = 8, outputs: int = 4) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(14, width), nn.ReLU(), nn.Linear(width, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with isolated(0, "model"):
        strategy = TAME(Sized(), partial(SGD, lr=0.1, momentum=0.9), window=20, selector_epochs=30, retrain_epochs=8)
    run(strategy, moving([0, 1]))
    assert len(strategy.experts) == 2 and strategy.selecting()[0].net[2].out_features == 2


@pytest.mark.filterwarnings("ignore:this TAME was run before:UserWarning")
def test_a_strategy_that_has_learned_keeps_its_classes() -> None:
    strategy, ear, detection = tame(classes=16), Ear(), Detection()
    run(strategy, moving([0, 1]))
    with pytest.raises(ValueError, match="this TAME has learned 4 classes, and moving has 16: make another one"):
        run(strategy, moving([0, 1], scenario="class"))
    run(strategy, moving([2, 3]), ear, detection)
    assert [event.step for event in ear.of(ShiftDetected)] == detection.alarms


def test_a_switch_within_later_epochs_is_remembered() -> None:
    """The expert that takes over has samples in its memories at once, not from the next session on."""
    strategy = tame(window=20, pruning="posthoc")
    run(strategy, moving([0]))
    strategy.begin(RunStarted(moving([1]), strategy, 0, False))
    known, samples = (moving([1]).tasks[task].train for task in range(2))
    strategy.learn(Batch(known[:10], None, 0, 3))
    for index in range(8):
        strategy.learn(Batch(samples[10 * index : 10 * index + 10], None, index, 3))
    assert strategy.active == 1 and len(strategy.experts[1].memory) >= 50
    assert int((strategy.memory.all().y // 4 == 1).sum()) == len(strategy.experts[1].memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"alpha": 0}, "alpha is the weight of a new loss"),
        ({"sparsity": 1.0}, "sparsity is the share of weights"),
        ({"selector_sparsity": -0.1}, "selector_sparsity must be a finite number of at least 0"),
        ({"pruning": "late"}, "pruning must be none, online or posthoc, not 'late'"),
        ({"selector": "lenet"}, "selector must be expert or mlp"),
        ({"initial": "old"}, "initial must be new or given"),
        ({"selector_capacity": 0}, "capacity must be a whole number of at least 1"),
        ({"selector_epochs": 0}, "selector_epochs must be a whole number"),
        ({"selector_retrain_lr": 0.0}, "selector_retrain_lr must be a finite number above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tame(**options)


def test_models_that_experts_cannot_be_made_of_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(14, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(ValueError, match="build the model with head='fixed'"):
        TAME(Mlp(10, 4, head="growing"))
    with pytest.raises(ValueError, match="TAME can't draw the weights of Own anew"):
        TAME(Own())
    with pytest.raises(ValueError, match="has no parameters"):
        TAME(nn.Flatten(), optimizer=lambda _: SGD([torch.zeros(1)], lr=0.1))
    assert isinstance(GrowingHead(3, 2), nn.Module)
    strategy = TAME(Own(), partial(SGD, lr=0.1), window=20, initial="given", selector="mlp", selector_epochs=5)
    run(strategy, moving([0, 1]))
    assert len(strategy.experts) > 1


def test_a_network_of_ones_own_gets_experts_and_a_selector() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 32), nn.ReLU(), nn.Linear(32, 4))
    strategy = TAME(net, partial(SGD, lr=0.1), window=20, selector_epochs=20)
    result = run(strategy, moving([0, 1, 2], epochs=10))
    assert len(strategy.experts) >= 3 and strategy.selecting()[0][2].out_features == len(strategy.experts)
    assert result.average_accuracy > 0.9


def test_routing_watches_tame_alone() -> None:
    with pytest.raises(ObserverError, match="Routing watches TAME, not Refresh"):
        run(Refresh(AGEM(Mlp(14, 4))), moving([0]).__class__("shown", moving([0]).tasks, [0], scenario="domain"), Routing())
