"""TAME against its specification: when it switches, to which expert, and what it knows of experts that rest."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from clstream.strategies import TAME
from clstream.strategies.tame import ExpertAdded, ExpertReactivated, Routing
from tame_runs import Ear, moving, tame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Batch, Samples, run
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.drift_detection import ShiftDetected
from clstream.models import Mlp
from clstream.online_metrics import Detection, Prequential
from clstream.seeds import isolated
from clstream.strategy import needs


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
    strategy.experts = [strategy.untrained_expert(strategy.model, strategy.optimizer)]
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


@pytest.mark.slow
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
    assert len(set(active)) >= 4 and any(before > after for before, after in pairwise(active))  # some came back


def falling(n: int, start: float = 1.38, end: float = 0.75) -> list[float]:
    return [end + (start - end) * math.exp(-t / 5) for t in range(n)]


def test_an_old_expert_comes_back_and_the_first_that_fits_is_taken_not_the_best() -> None:
    table = np.full((240, 6), 2.0)
    table[:60, 0], table[60:120, 1], table[60:120, 0] = falling(60), falling(60), 2.0
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
    strategy.experts = [strategy.untrained_expert(strategy.model, strategy.optimizer)]
    window, thresholds = strategy.experts[0].loss_window, []
    for index in range(121):
        strategy.learn(Batch(Samples(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), None, index, 0))
        thresholds.append(window.threshold)
    assert strategy.active == 0
    newest = table[25:60, 0]  # that it learned, when it was last asked as the active one
    assert thresholds[60:] == [pytest.approx(np.mean(newest) + 3 * max(np.std(newest), 0.005))] * 61
    smoothed = learned = table[0, 0]
    for loss in table[1:60, 0]:
        smoothed = learned = 0.2 * loss + 0.8 * learned
    for loss in [2.0] * 60:
        smoothed = 0.2 * loss + 0.8 * smoothed
    assert window.smoothed == pytest.approx(0.2 * 0.76 + 0.8 * (learned if settle else smoothed))


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
    assert [expert.loss_window.losses[0] for expert in strategy.experts] == [math.log(4)] * 2
    assert strategy.experts[0].loss_window.losses[1] == pytest.approx(math.log(4), abs=0.2)  # from before the first step


@pytest.mark.slow
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


@pytest.mark.slow
def test_experts_need_not_be_tasks() -> None:
    """A stream whose task is split in two, and one that is learned in two sessions."""
    strategy, routing = tame(), Routing()
    result = run(strategy, moving([0, 0, 1, 1]), routing)
    assert len(strategy.experts) == 2 and len(result.accuracy) == 4
    assert float(result.accuracy[-1, :2].min()) > 0.97
    short = tame(window=10_000, floor=1.0)  # its threshold stays high, so one expert learns it all
    run(short, moving([0, 1], epochs=1), routing)
    assert len(short.experts) == 1


def test_losses_are_those_of_each_expert_in_evaluation_mode() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(14, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    strategy = TAME(Dropped())
    strategy.experts += [strategy.new_expert() for _ in range(3)]
    samples = moving([0]).tasks[0].train[:20]
    strategy.learn(Batch(samples, None, 0, 0))
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    losses = strategy.losses(samples)
    assert all(map(torch.equal, before, strategy.model.buffers()))
    for number, expert in enumerate(strategy.experts):
        expert.model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(expert.model(samples.x).sigmoid(), samples.y)
        assert losses[number] == pytest.approx(float(loss), abs=1e-6)
        assert strategy.losses(samples, number)[number] == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"pruning": "online"}, {"settle": True, "initial": "given"}], ids=str)
def test_a_run_with_several_experts_resumes_exactly(options: dict[str, Any]) -> None:
    def go_on(observer: Checkpoints, state: Any = None) -> list[object]:
        others = [Detection(), Routing(), Prequential()]
        run(tame(**options), moving([0, 1, 2, 1, 3], epochs=4), *others, observer, evaluate_every=29, resume=state)
        return [others[0].measured.delay, [tuple(event.curves().values()) for event in others[1].measured], others[2].accuracy]

    whole = Checkpoints(every=53, step=4)
    expected = go_on(whole)
    for number in range(len(whole.written) - 1):
        rest = Checkpoints(every=0)
        assert go_on(rest, whole.load(number)) == expected
        assert difference(whole.load(-1), rest.load(-1)) is None, f"from checkpoint {number}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this TAME was run before:UserWarning")
def test_a_strategy_that_has_learned_keeps_its_classes() -> None:
    strategy, ear, detection = tame(classes=16), Ear(), Detection()
    run(strategy, moving([0, 1]))
    with pytest.raises(ValueError, match="this TAME has learned 4 classes, and moving has 16: make another one"):
        run(strategy, moving([0, 1], scenario="class"))
    run(strategy, moving([2, 3]), ear, detection)
    assert [event.step for event in ear.of(ShiftDetected)] == detection.alarms


# What is refused, and what is said
def test_saturated_sigmoids_are_said() -> None:
    with isolated(0, "model"):
        strategy = TAME(Mlp(14, 4, hidden=(32,)), partial(SGD, lr=30.0, momentum=0.9), floor=1e9)
    with pytest.warns(UserWarning, match="sigmoids of TAME's active expert are saturated") as caught:
        run(strategy, moving([0, 1, 2]))
    assert len(caught) == 1
