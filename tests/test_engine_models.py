"""Models in a run: heads that grow, layers that are lazy, more outputs than classes; copies of a strategy."""

from __future__ import annotations

from copy import deepcopy

import torch
from clstream.strategies import Finetune, Joint
from torch import Tensor, nn

import clstream
from clstream import (
    Strategy,
    TaskEnded,
    on,
    run,
)
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Trace
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest


def test_task_scenario_trains_only_the_tasks_head() -> None:
    model = example_model()
    before = model.head.weight.detach().clone()
    run(Finetune(model), example_stream(schedule=(1,), scenario="task"))
    moved = (model.head.weight != before).any(1)
    assert moved.tolist() == [False, False, True, True, False, False]


def test_a_growing_head_is_trained_by_every_optimizer_that_has_it() -> None:
    class Wrapping(Strategy):
        def __init__(self, base: Strategy) -> None:
            super().__init__(base.model)
            self.base, self.parts = base, (base,)

        def learn(self, batch: clstream.Batch) -> Tensor:
            return self.base.learn(batch)

    stream = example_stream(epochs=5)
    plain = run(Finetune(example_model(head="growing")), stream)
    wrapped = run(Wrapping(Finetune(example_model(head="growing"))), stream)
    assert torch.equal(plain.accuracy, wrapped.accuracy)
    assert float(plain.accuracy.diagonal().min()) > 0.9


def test_growing_head_state_loads_into_a_fresh_one() -> None:
    strategy = Finetune(example_model(head="growing"))
    run(strategy, example_stream(), max_sessions=2)
    fresh = example_model(head="growing")
    fresh.load_state_dict(strategy.model.state_dict())
    x = example_stream().tasks[0].test.x
    assert torch.equal(fresh(x), strategy.model(x))


def test_strategies_can_be_copied_within_and_after_a_run() -> None:
    copies = []

    class Copying(Joint):
        @on(TaskEnded)
        def copy(self, event: TaskEnded) -> None:
            copies.append(deepcopy(self))

    strategy = Copying(example_model())
    run(strategy, example_stream(), Trace())
    assert [copy.bus for copy in copies] == [None] * 3
    assert digest(deepcopy(strategy).model) == digest(strategy.model)


def test_a_model_with_more_outputs_than_classes_works() -> None:
    for scenario in ("class", "task"):
        with isolated(0):
            wide = Mlp((1, 8, 8), 11, hidden=(32,))
        result = run(Finetune(wide), example_stream(epochs=5, scenario=scenario))
        assert float(result.main.diagonal().min()) > 0.9


def test_lazy_modules_are_trained() -> None:
    with isolated(0):
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(6))

    class Floats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float() / 255)

    result = run(Finetune(Floats()), example_stream(epochs=10))
    assert float(result.accuracy[0, 0]) > 0.9
