"""What hypernetworks weigh old tasks' weights by, growth, and how much is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from clstream.experiments.bench_hypernetwork import numbers_held
from hypernetworks import LSTM, Normed, Watching, at_second_task, built, count, learned
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clstream import Samples, Stream, TaskEnded, on, run
from clstream.checks import example_stream
from clstream.evaluation import evaluating


@pytest.mark.parametrize("sessions", [1, 2])
def test_the_fisher_of_what_was_made(sessions: int) -> None:
    """Sample by sample, over the task's own classes, as each session ended: not below 0, and 0 for other heads' rows."""
    expected: list[Tensor] = []
    stream = example_stream((0,) * sessions + (1,), batch_size=15)
    strategy = built(importance="fisher", beta=1.0)

    def squares(samples: Samples) -> Tensor:
        total = torch.zeros(2278)
        for x, y in zip(samples.x.split(1), samples.y.split(1), strict=True):
            row = strategy.weights([strategy.tasks[0]])[0].detach().requires_grad_()
            outputs = functional_call(strategy.model, strategy.network.unflatten(row), (x,))
            F.cross_entropy(outputs[:, :2], y).backward()
            total += row.grad.square()
        return total / len(samples)

    class AtEnds:
        @on(TaskEnded)
        def note(self, event: TaskEnded) -> None:
            expected.append(squares(stream.reseeded(0).session(sessions - 1).samples))

    run(strategy, stream, AtEnds(), max_sessions=sessions)
    fisher = strategy.tasks[0].fisher
    assert fisher is not None and bool((fisher >= 0).all()) and bool((fisher > 0).any())
    rows = strategy.network.unflatten(fisher)
    assert not bool(rows["head.weight"][2:].any()) and not bool(rows["head.bias"][2:].any())
    assert bool(rows["head.weight"][:2].any())
    if sessions == 1:
        assert torch.allclose(fisher, expected[0], rtol=1e-3, atol=1e-8)
    else:  # half of it is of the first session, with the weights of then
        assert not torch.allclose(fisher, expected[0], rtol=1e-2, atol=1e-8)
        assert bool((2.001 * fisher + 1e-8 >= expected[0]).all())
        assert strategy.tasks[0].samples == 60


def test_the_fisher_is_of_the_network_with_the_statistics_of_its_task() -> None:
    stream = example_stream((0,), epochs=3, batch_size=20)
    strategy = built(Normed(), importance="fisher")
    run(strategy, stream)
    state, samples, total = strategy.tasks[0], stream.tasks[0].train[:], torch.zeros(strategy.network.size)
    with evaluating(strategy), torch.enable_grad():
        for x, y in zip(samples.x.split(1), samples.y.split(1), strict=True):
            row = strategy.weights([state])[0].detach().requires_grad_()
            outputs = functional_call(strategy.model, {**strategy.network.unflatten(row), **state.statistics}, (x,))
            F.cross_entropy(outputs[:, :2], y).backward()
            total += row.grad.square()
    assert torch.allclose(state.fisher, total / len(samples), rtol=1e-3, atol=1e-8)


def test_the_fisher_of_a_task_that_comes_again_is_anew() -> None:
    counts: list[int] = []
    strategy = built(importance="fisher", beta=1.0)
    run(strategy, example_stream((0, 1, 0)), Watching(end=lambda number: counts.append(strategy.tasks[number].samples)))
    assert counts == [30, 60, 30]


def test_the_fisher_of_some_samples() -> None:
    draws = [learned(example_stream((0,)), importance="fisher", fisher_samples=number) for number in (5, 60, None)]
    few, all_drawn, whole = [strategy.tasks[0].fisher for strategy in draws]
    assert torch.allclose(all_drawn, whole, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(few, whole, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("importance", ["fisher", "normalised"])
def test_a_task_of_one_class_has_no_fisher(importance: str) -> None:
    """Its loss is 0 whatever the weights are: what was made for it isn't held, and nothing is divided by 0."""
    base = example_stream()
    only = base.tasks[0].train[base.tasks[0].train.y == 0]
    first = type(base.tasks[0])(0, (0,), only, only)
    second = type(base.tasks[0])(1, (2, 3), base.tasks[1].train, base.tasks[1].test)
    strategy = learned(Stream("one class", [first, second], batch_size=8), importance=importance)
    assert strategy.tasks[0].fisher is not None and not bool(strategy.tasks[0].fisher.any())
    assert bool(strategy.tasks[1].fisher.any())


def test_what_is_learned_and_weighed_is_augmented() -> None:
    stream = replace(example_stream(), augment=torch.zeros_like)
    strategy, batch = at_second_task(stream, importance="fisher")
    outputs = strategy.outputs(batch.samples)
    assert torch.equal(outputs, outputs[:1].expand_as(outputs))
    fisher = strategy.network.unflatten(strategy.tasks[0].fisher)
    first, *_, last = fisher.values()
    assert not first.any() and last.any()  # nothing goes into the first layer


def test_growth_keeps_old_answers_bit_for_bit() -> None:
    stream = example_stream((0, 1, 2, 0), epochs=2)
    strategy = built(**LSTM, growth=True)
    recurrent: list[list[Tensor]] = []
    answers: dict[int, Tensor] = {}

    def note(number: int) -> None:
        recurrent.append([weight.detach().clone() for weight in strategy.generator.recurrent().values()])
        with evaluating(strategy):
            for task in stream.tasks[: number + 1]:
                now = strategy.scores(task.test.x, task)
                if task.id in answers and len(recurrent) < 4:
                    assert torch.equal(answers[task.id], now)
                if task.id == 0 and len(recurrent) == 4:
                    assert not torch.equal(answers[0], now)  # it was learned again
                answers.setdefault(task.id, now)

    before = [weight.detach().clone() for weight in strategy.generator.recurrent().values()]
    run(strategy, stream, Watching(end=note))
    assert not any(map(torch.equal, before, recurrent[0]))
    for later in recurrent[1:]:
        assert all(map(torch.equal, recurrent[0], later))
    with evaluating(strategy):
        for task in stream.tasks[1:]:
            assert torch.equal(answers[task.id], strategy.scores(task.test.x, task))
    assert strategy.targets is None  # nothing is held


def test_a_grown_task_that_comes_again_goes_on_with_its_copy() -> None:
    strategy = built(**LSTM, growth=True)
    kept: list[Tensor] = []

    def look(number: int) -> None:
        if number == 0:
            kept.append(strategy.weights([strategy.tasks[0]]).detach())

    run(strategy, example_stream((0, 1, 0)), Watching(start=look, end=look))
    assert torch.equal(kept[1], kept[2])  # its end, and its second start
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[2], kept[3])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chunks": "own"}, {"embeddings": 3 * (8 + 8 * 5), "targets": 2 * 10 * 5 + 500 * 11, "cached": 3 * 2278, "unused": 2278}),
        (LSTM | {"growth": True}, {"copies": 3 * (16 * 4 * 16 + 4 * 16 + 5 * 8 + 500 * 17), "targets": 0}),
        ({"importance": "fisher"}, {"importance": (2 + 3) * 2278, "copies": 0, "statistics": 0}),
    ],
    ids=["own chunks", "growth", "fisher"],
)
def test_numbers_held(options: dict[str, Any], expected: dict[str, int]) -> None:
    strategy = learned(example_stream(), **options)
    held = numbers_held(strategy)
    assert held | expected == held
    generator, current = count(strategy.generator), strategy.current
    assert held["generator"] == generator
    if options == {"chunks": "own"}:
        moved = [*strategy.generator.parameters(), current.embedding, current.chunks]
        assert held["optimizers"] == sum(2 * weight.numel() + 1 for weight in moved)
    strategy.learn(next(iter(next(iter(example_stream().session(2))))))
    assert not numbers_held(strategy)["cached"]
