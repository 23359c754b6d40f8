"""GEM: the quadratic program against a solver and by hand, the step against the constraints, and against Avalanche's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from clstream.strategies import GEM, Finetune
from clstream.strategies.gem import solve_dual
from torch import Tensor
from torch.optim import SGD

from clstream import BatchLearned, BatchReady, Samples, on, run
from clstream.checks import example_model, example_stream


def test_the_program_is_solved_as_by_hand() -> None:
    """One past gradient (1, 0) and g = (-2, 3): the nearest is (0, 3), so v = 2; a margin of 3 is more than is needed."""
    assert solve_dual(np.array([[1.0]]), np.array([-2.0])) == pytest.approx([2.0])
    assert solve_dual(np.array([[1.0]]), np.array([-2.0]), margin=3.0) == pytest.approx([3.0])
    assert solve_dual(np.array([[1.0]]), np.array([-2.0]), ridge=1.0) == pytest.approx([1.0])  # v = 2 / (1 + 1)
    g = np.array([-1.0, -1.0])  # against (1, 0) and (1, 2): both bind, and g becomes 0
    past = np.array([[1.0, 0.0], [1.0, 2.0]])
    assert solve_dual(past @ past.T, past @ g) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_program_is_solved_as_quadprog_solves_it(margin: float) -> None:
    qpsolvers = pytest.importorskip("qpsolvers")
    draw = np.random.default_rng(0)
    for tasks in (1, 2, 5, 19):
        for _ in range(5):
            past, g = draw.normal(size=(tasks, 40)), draw.normal(size=40)
            gram = past @ past.T + 1e-3 * np.eye(tasks)
            expected = qpsolvers.solve_qp(P=gram, q=past @ g, G=-np.eye(tasks), h=-np.full(tasks, margin), solver="quadprog")
            assert solve_dual(past @ past.T, past @ g, margin, 1e-3) == pytest.approx(expected, abs=1e-8)


def test_gradients_that_depend_on_each_other_are_no_harm() -> None:
    row = np.array([1.0, 2.0])
    past, g = np.stack([row, 2 * row, row]), np.array([-3.0, 0.5])
    projected = g + past.T @ solve_dual(past @ past.T, past @ g)
    assert projected == pytest.approx(g - (g @ row) / (row @ row) * row)
    assert solve_dual(np.zeros((2, 2)), np.zeros(2)) == pytest.approx([0.0, 0.0])


def gradient(strategy: GEM, samples: Samples) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(strategy.loss(samples), list(strategy.model.parameters()))])


def test_each_step_obeys_all_constraints_and_is_plain_where_it_may_be() -> None:
    strategy = GEM(example_model(), partial(SGD, lr=0.1), per_task=20, margin=0.0, ridge=0.0)
    found = []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            self.g = gradient(strategy, event.batch.samples).double()
            past = [gradient(strategy, memory.all()) for task, memory in strategy.kept.items() if task != strategy.task]
            self.past = torch.stack(past).double() if past else self.g[None][:0]
            self.weights = torch.cat([w.detach().flatten() for w in strategy.model.parameters()])

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            now = torch.cat([w.detach().flatten() for w in strategy.model.parameters()])
            step = (self.weights - now).double() / 0.1
            scale = self.past.norm(dim=1) * self.g.norm()
            assert bool((self.past @ step >= -1e-4 * scale).all())
            violated = bool((self.past @ self.g < 0).any())
            if not violated:
                torch.testing.assert_close(step, self.g, rtol=1e-3, atol=1e-4)
            else:  # what is taken off is made of the past's gradients that bind, with numbers above 0
                v = torch.linalg.lstsq(self.past.T, (step - self.g)[:, None]).solution[:, 0]
                assert bool((v > -1e-3).all()) and float(((self.past @ step) * v).abs().max()) < 1e-3 * float(scale.max())
            found.append((len(self.past), violated))

    run(strategy, example_stream(batch_size=6), Watch())
    assert {(1, True), (2, True)} <= {*found} and {past for past, _ in found} == {0, 1, 2}


def test_it_keeps_the_newest_or_a_uniform_sample_of_each_task() -> None:
    stream = example_stream(epochs=2)
    ring, reservoir = GEM(example_model(), per_task=7), GEM(example_model(), per_task=7, memory="reservoir")
    newest: list[Tensor] = []

    class Watch:
        @on(BatchLearned)
        def see(self, event: BatchLearned) -> None:
            if event.batch.epoch == 0:
                newest.append(event.batch.samples.x)

    run(ring, stream, Watch())
    run(reservoir, stream)
    came = torch.cat(newest)
    for task, memory in ring.kept.items():
        kept = sorted(x.flatten().tolist() for x in memory.all().x)
        assert kept == sorted(x.flatten().tolist() for x in came[60 * task : 60 * task + 60][-7:])
    assert [len(memory) for memory in reservoir.kept.values()] == [7, 7, 7]
    assert not torch.equal(reservoir.kept[0].all().x, ring.kept[0].all().x)


def test_without_a_past_it_is_fine_tuning() -> None:
    one, two = GEM(example_model()), Finetune(example_model())
    for strategy in (one, two):
        run(strategy, example_stream((0, 0, 0)))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_against_avalanche_s(avalanche: Callable[[str], ModuleType], margin: float) -> None:
    """With memories of all samples nothing depends on how these are drawn: the weights are the same."""
    from clstream.strategies.avalanche import strategy_class

    stream = example_stream(batch_size=20)
    ours = GEM(example_model(), partial(SGD, lr=0.05), per_task=60, margin=margin)
    theirs = strategy_class("GEM")(example_model(), partial(SGD, lr=0.05), patterns_per_exp=60, memory_strength=margin)
    free = Finetune(example_model(), partial(SGD, lr=0.05))
    for strategy in (ours, theirs, free):
        run(strategy, stream)
    flat = [torch.cat([weight.detach().flatten() for weight in strategy.model.parameters()]) for strategy in (ours, theirs, free)]
    torch.testing.assert_close(flat[0], flat[1], rtol=1e-3, atol=1e-5)
    assert float((flat[0] - flat[2]).norm()) > 0.01


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"per_task": 0}, "per_task must be a whole number of at least 1"),
        ({"margin": -0.1}, "margin must be a finite number of at least 0"),
        ({"memory": "herding"}, "memory must be one of ring, reservoir"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GEM(example_model(), **options)
