"""FDR: its steps against a loop by hand, distances by hand, what is kept of each task and how its function stays."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import FDR, Finetune
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchReady, Samples, TaskEnded, TaskStarted, on, run
from clstream.checks import example_model, example_stream, normed_model


def small(**options: Any) -> FDR:
    return built(partial(FDR, **{"capacity": 30, **options}))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


class Twin:
    """The loop by hand beside a strategy, which says what is drawn."""

    def __init__(self, strategy: FDR, alpha: float, alternate: bool) -> None:
        self.strategy, self.alpha, self.alternate = strategy, alpha, alternate
        self.network = deepcopy(strategy.model)
        self.optimizer = SGD(self.network.parameters(), lr=0.05, momentum=0.5)
        self.distances: list[float] = []

    @on(BatchReady)
    def learn(self, event: BatchReady) -> None:
        samples, past = event.batch.samples, self.strategy.past
        losses = [F.cross_entropy(self.network(samples.x), samples.y)]
        if past is not None:
            generator = torch.Generator()
            generator.set_state(self.strategy.random.get_state())
            rows = torch.randperm(len(past), generator=generator)[: len(samples)]
            if self.alternate:
                self.step(losses.pop())
            p = torch.exp(F.log_softmax(self.network(past.x[rows]), 1))
            norms = ((p - past.extra["function"][rows]) ** 2).sum(1).add(1e-30).sqrt()
            distance = norms[norms > 1e-6].sum() / len(rows)  # of those that have moved
            self.distances.append(float(distance.detach()))
            losses.append(self.alpha * distance)
        self.step(sum(losses))

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("steps", ["alternate", "sum"])
def test_it_is_the_loop_by_hand(steps: str) -> None:
    strategy = small(steps=steps, alpha=0.7, optimizer=partial(SGD, lr=0.05, momentum=0.5))
    twin = Twin(strategy, 0.7, steps == "alternate")
    run(strategy, example_stream(epochs=2), twin)
    torch.testing.assert_close(flat(strategy.model), flat(twin.network), rtol=1e-4, atol=1e-6)
    assert len(twin.distances) == 2 * 2 * 8 and sum(distance > 1e-3 for distance in twin.distances) >= 2 * 2 * 8 - 2


def test_distances_by_hand() -> None:
    """The outputs are log p: their softmax is p. The differences have the lengths 0.5, 0 and 0.1 sqrt 2."""
    now = torch.tensor([[0.8, 0.2, 0.0], [0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    then = torch.tensor([[0.5, 0.2, 0.4], [0.5, 0.25, 0.25], [0.1, 0.3, 0.6]])  # a function is all that is asked of it
    past = Samples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), {"function": then})

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outputs = nn.Parameter(now.clamp_min(1e-30).log())

        def forward(self, x: Tensor) -> Tensor:
            return self.outputs

    last = (2 * 0.1**2) ** 0.5
    for distance, expected in (("norm", (0.5 + last) / 3), ("root", ((0.25 + 0.02) / 3) ** 0.5), ("squared", (0.25 + 0.02) / 3)):
        strategy = FDR(Fixed(), distance=distance)
        assert strategy.distance_to_past(past).item() == pytest.approx(expected, rel=1e-5)
        strategy.distance_to_past(past).backward()
        assert strategy.model.outputs.grad.isfinite().all()
        same = Samples(past.x, past.y, {"function": now})  # nothing has moved: no distance, and a gradient of 0
        strategy.model.outputs.grad = None
        strategy.distance_to_past(same).backward()
        assert strategy.model.outputs.grad is None or (strategy.model.outputs.grad.abs() < 1e-5).all()


class Tasks:
    """Takes down what a strategy held when each task ended, and the network that it had."""

    def __init__(self, strategy: FDR) -> None:
        self.strategy = strategy
        self.held: list[tuple[dict[int, int], Samples]] = []
        self.networks: dict[int, nn.Module] = {}

    @on(TaskEnded)
    def look(self, event: TaskEnded) -> None:
        self.networks[event.task.id] = deepcopy(self.strategy.model).eval()
        self.held.append((dict(self.strategy.counts), self.strategy.past))


def rows_of(samples: Samples) -> set[bytes]:
    return {x.numpy().tobytes() for x in samples.x}


def test_each_task_has_its_share_with_the_function_that_there_was_when_it_ended() -> None:
    stream = example_stream()
    strategy = FDR(normed_model(), partial(SGD, lr=0.05), capacity=32)
    tasks = Tasks(strategy)
    run(strategy, stream, tasks)
    assert [counts for counts, _ in tasks.held] == [{0: 32}, {0: 16, 1: 16}, {0: 11, 1: 11, 2: 10}]
    before: set[bytes] = set()
    for counts, past in tasks.held:
        for (task, count), part in zip(counts.items(), past.x.split([*counts.values()]), strict=True):
            assert count == len({x.numpy().tobytes() for x in part})  # none twice
            assert {x.numpy().tobytes() for x in part} <= rows_of(stream.tasks[task].train[:])
        assert before & rows_of(past) == {x.numpy().tobytes() for x in past.x[: len(past) - counts[max(counts)]]}
        before = rows_of(past)
    counts, past = tasks.held[-1]
    for task, part in zip(counts, torch.arange(len(past)).split([*counts.values()]), strict=True):
        with torch.no_grad():
            then = tasks.networks[task](past.x[part]).softmax(1)
        torch.testing.assert_close(past.extra["function"][part], then)
    assert strategy.model.training


def test_a_task_that_comes_again_has_one_share_with_its_newest_function() -> None:
    stream = example_stream(schedule=(0, 1, 0))
    strategy = small()
    tasks = Tasks(strategy)
    run(strategy, stream, tasks)
    assert strategy.counts == {0: 15, 1: 15}
    (_, middle), (_, last) = tasks.held[1:]
    assert 0 < len(rows_of(last[:15]) & rows_of(middle[:15])) < 15  # a part of both samples
    with torch.no_grad():
        torch.testing.assert_close(last.extra["function"][:15], tasks.networks[0](last.x[:15]).softmax(1))
    assert rows_of(last[15:]) == rows_of(middle[15:])
    order = {x.numpy().tobytes(): value for x, value in zip(middle.x[15:], middle.extra["function"][15:], strict=True)}
    assert all(
        torch.equal(order[x.numpy().tobytes()], value) for x, value in zip(last.x[15:], last.extra["function"][15:], strict=True)
    )


@pytest.mark.parametrize("target", ["multilabel", "value"])
def test_the_function_of_other_targets(target: str) -> None:
    strategy = small()
    tasks = Tasks(strategy)
    run(strategy, example_stream(target=target), tasks)
    past = strategy.past
    with torch.no_grad():
        outputs = tasks.networks[2](past.x[20:])
    torch.testing.assert_close(past.extra["function"][20:], outputs.sigmoid() if target == "multilabel" else outputs)


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_outputs_that_do_not_compete_are_0_in_the_function(head: str) -> None:
    strategy = FDR(example_model(head=head), partial(SGD, lr=0.05), capacity=30, active_classes="seen")
    tasks = Tasks(strategy)
    run(strategy, example_stream(), tasks)
    for number, (_, past) in enumerate(tasks.held):
        values = past.extra["function"][-10:]
        assert (values[:, : 2 * number + 2] > 0).all() and (values[:, 2 * number + 2 :] == 0).all()
    assert strategy.distance_to_past(strategy.past).isfinite()


def test_without_a_weight_it_is_fine_tuning() -> None:
    optimizer = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
    ours, plain = small(alpha=0.0, optimizer=optimizer), built(partial(Finetune, optimizer=optimizer))
    run(ours, example_stream())
    run(plain, example_stream())
    assert torch.equal(flat(ours.model), flat(plain.model))


def test_more_tasks_than_places_are_refused() -> None:
    strategy, begun = small(capacity=2), []

    class Begun:
        @on(TaskStarted)
        def note(self, event: TaskStarted) -> None:
            begun.append(event.task.id)

    with pytest.raises(ValueError, match="task 2 makes it 3 tasks, and capacity=2: take a larger one"):
        run(strategy, example_stream(), Begun())
    assert begun == [0, 1] and strategy.counts == {0: 1, 1: 1}
