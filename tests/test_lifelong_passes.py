"""What the lifelong framework does when a task has ended: relax passes, pruning, events, and going on from a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.experiments.lifelong_properties import PROPERTIES
from clstream.experiments.lifelong_table import by_method, table, verdicts
from clstream.strategies import Lifelong
from clstream.strategies.lifelong import Consolidated, Pruned, Relaxed
from clstream.strategies.lifelong.confusion import TOP, error, worst_pair
from clstream.strategies.lifelong.stiffness import quantiles, smallest
from torch import Tensor, nn
from torch.optim import SGD

from clstream import TaskEnded, on, run
from clstream.bus import Event
from clstream.checkpoint.compare import difference
from clstream.checks import example_stream
from clstream.checks.examples import normed_model
from clstream.checks.recorders import Checkpoints
from clstream.models import Mlp
from clstream.seeds import isolated

INF = float("inf")
LEARN = partial(SGD, lr=0.05)


def deep() -> nn.Module:
    with isolated(0, "model"):
        return Mlp((1, 8, 8), 6, hidden=(24, 18))


class Told:
    """Keeps the strategy's own events, and the weights when it consolidated and when it relaxed."""

    def __init__(self, strategy: Lifelong) -> None:
        self.strategy, self.events = strategy, []
        self.before: dict[str, Tensor] = {}
        self.moved: list[dict[str, Tensor]] = []

    @on(Consolidated)
    @on(Relaxed)
    @on(Pruned)
    def keep(self, event: Event) -> None:
        self.events.append(event)
        now = {name: weight.detach().clone() for name, weight in self.strategy.weights.items()}
        if isinstance(event, Relaxed):
            self.moved.append({name: now[name] != weight for name, weight in self.before.items()})
        self.before = now


def play(**options: object) -> tuple[Lifelong, Told]:
    strategy = Lifelong(deep(), LEARN, **options)  # type: ignore[arg-type]
    run(strategy, example_stream(epochs=3), told := Told(strategy))
    return strategy, told


def test_a_relax_pass_moves_only_what_is_not_held() -> None:
    strategy, told = play(relax="all", relax_steps=5)
    groups = strategy.groups
    assert len(told.moved) == 3 and groups is not None
    moved = told.moved[0]
    owner = groups.owner["stages.layer1"]
    assert bool(moved["stages.layer1.weight"][owner == 0].any())  # of the first task, which is over
    assert not bool(moved["stages.layer1.weight"][owner > 0].any())  # of those that belong to no task then
    assert not bool(moved["head.weight"][2:].any())
    later = told.moved[2]["stages.layer2.weight"]
    assert bool(later[groups.owner["stages.layer2"] == 0][:, owner == 2].any())  # a link from new to old


def test_a_relax_pass_for_a_pair_moves_its_rows_on_some_inputs() -> None:
    _, told = play(relax="pair", relax_steps=3, pair_error=0.0)
    passes = [event for event in told.events if isinstance(event, Relaxed)]
    assert passes
    for event, moved in zip(passes, told.moved, strict=True):
        assert len(event.classes) == 2
        for name, changed in moved.items():
            if not name.startswith("head"):
                assert not bool(changed.any())
        rows = moved["head.weight"].any(1).nonzero().flatten().tolist()
        assert set(rows) <= set(event.classes)
        assert int(moved["head.weight"].any(0).sum()) <= int(TOP * 18)


def test_a_relax_pass_leaves_the_reference_and_the_stiffness_for_what_comes() -> None:
    strategy, _ = play(relax="all", relax_steps=5)
    for name, weight in strategy.weights.items():
        assert torch.equal(strategy.reference[name], weight)
    assert strategy.stiffness["head.weight"].isinf().all()  # all classes came; and all is held, as "guarantee" has it


def test_stiffness_keeps_a_relax_pass_near() -> None:
    """The stiffer, the less it moves; with 0 these are plain steps on the samples."""
    ways = []
    for stiffness in (0.0, 1.0, 1e3):
        strategy = Lifelong(deep(), LEARN, relax="all", relax_steps=5, relax_stiffness=stiffness)
        told = Told(strategy)
        run(strategy, example_stream(epochs=3), told, max_sessions=1)
        after = torch.cat([weight.detach().flatten() for weight in strategy.weights.values()])
        plain = Lifelong(deep(), LEARN)
        run(plain, example_stream(epochs=3), max_sessions=1)
        ways.append(float((after - torch.cat([weight.detach().flatten() for weight in plain.weights.values()])).norm()))
    assert ways[0] > ways[1] > ways[2] > 0


def test_the_pair_that_is_confused_most_is_found() -> None:
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = torch.eye(3)[torch.tensor([0, 1, 0, 1, 2, 1])]
    assert worst_pair(scores, y) == (0, 1)
    assert worst_pair(torch.eye(3)[y], y) is None
    assert error(scores, y) == pytest.approx(0.5)
    assert error(scores[:4], y[:4], (0, 1)) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.7])
def test_pruning_takes_the_smallest_and_no_more(share: float) -> None:
    weights = {"a": torch.randn(7, 3), "b": torch.randn(9)}
    stiffness = {name: torch.rand(weight.shape) + 0.01 for name, weight in weights.items()}
    chosen = smallest(weights, stiffness, share)
    scores = {name: stiffness[name] * weight.square() for name, weight in weights.items()}
    taken = torch.cat([scores[name][chosen[name]] for name in weights])
    left = torch.cat([scores[name][~chosen[name]] for name in weights])
    assert len(taken) == math.ceil(round(share * 30, 6))
    assert not len(taken) or float(taken.max()) <= float(left.min())


def test_what_is_pruned_is_zero_and_free() -> None:
    strategy, told = play(policy="fisher", prune=0.3, decay=0.5)
    total = sum(weight.numel() for weight in strategy.weights.values())
    assert [event.weights for event in told.events if isinstance(event, Pruned)] == [math.ceil(round(0.3 * total, 6))] * 3
    free = {name: (weight == 0) & (strategy.stiffness[name] == 0) for name, weight in strategy.weights.items()}
    assert sum(int(mask.sum()) for mask in free.values()) == math.ceil(round(0.3 * total, 6))


def test_what_is_told_of_stiffness_are_numbers_that_a_tracker_takes() -> None:
    strategy, told = play(relax="all", relax_steps=2)
    events = [event for event in told.events if isinstance(event, Consolidated)]
    assert [event.capacity for event in events] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [event.samples for event in events] == [40, 80, 120]
    for event in events:
        assert event.policy == "guarantee" and event.penalty == 0  # what is held did not move
        curves = event.curves()
        assert {"stiffness/mean", "stiffness/penalty", "stiffness/capacity", "stiffness/layer1/q50", "stiffness/head/held"} <= {
            *curves
        }
        assert all(math.isfinite(value) for value in curves.values())
    assert events[-1].quantiles["layer1"]["held"] == 1
    soft = [event for event in play(policy="constant", strength=0.5)[1].events if isinstance(event, Consolidated)]
    assert soft[1].penalty > 0 and soft[1].mean == 0.5 == soft[1].quantiles["head"]["q10"]
    assert strategy.rehearsal_free is False and Lifelong(deep()).rehearsal_free is True


def test_quantiles_are_of_what_is_finite() -> None:
    row = quantiles({"stages.a.weight": torch.tensor([*range(10), INF, INF]), "stages.a.bias": torch.tensor([10.0])})["a"]
    assert row == {"q10": 1.0, "q50": 5.0, "q90": 9.0, "held": pytest.approx(2 / 13)}


@pytest.mark.parametrize(
    ("make", "model"),
    [
        (partial(Lifelong, start="nearest_task", relax="all", relax_steps=2, per_class=3), deep),
        (partial(Lifelong, start="nearest_class", relax="pair", relax_steps=2, per_class=3), deep),
        (partial(Lifelong, policy="fisher", prune=0.1, decay=0.5), deep),
        (Lifelong, normed_model),
    ],
    ids=["units and all", "rows and pair", "fisher", "batch norm"],
)
def test_variants_resume_to_the_bit(make: Callable[[nn.Module], Lifelong], model: Callable[[], nn.Module]) -> None:
    def play(observer: Checkpoints, state: Mapping[str, Any] | None = None) -> None:
        with isolated(0, "strategy"):
            strategy = make(model())
        run(strategy, example_stream((0, 1, 0, 2), epochs=2, batch_size=20), observer, resume=state)

    play(whole := Checkpoints())
    for number in (len(whole.written) // 2, len(whole.written) - 4):
        play(rest := Checkpoints(every=0), whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None


class Modes:
    """Notes the mode of batch norm whenever a task has ended."""

    def __init__(self, model: nn.Module) -> None:
        self.norm, self.means = model.stages[1], []  # type: ignore[index]

    @on(TaskEnded)
    def note(self, event: TaskEnded) -> None:
        self.means.append(self.norm.running_mean.clone())


def test_batch_norm_keeps_the_statistics_of_the_first_task() -> None:
    strategy = Lifelong(normed_model())
    run(strategy, example_stream(), modes := Modes(strategy.model))
    assert bool(modes.means[0].any()) and torch.equal(modes.means[0], modes.means[2])


def test_the_tables_of_the_docs_are_what_the_results_say() -> None:
    root = Path(__file__).parent.parent
    lines = (root / "experiments" / "results" / "lifelong_properties.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    page = (root / "docs" / "lifelong.md").read_text(encoding="utf-8")
    assert {row["property"] for row in rows} == set(PROPERTIES)
    said = []
    for name in PROPERTIES:
        assert table(name, rows) in page
        verdict = verdicts(name, by_method(name, rows))
        assert all(f"- {line}\n" in page for line in verdict)
        said += verdict
    assert (len(said), sum("FAILS" not in line for line in said)) == (9, 4) and "Of nine four hold" in page
