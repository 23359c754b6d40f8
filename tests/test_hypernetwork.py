"""Hypernetworks against their definitions: one step by hand, and what must stay as it is."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from clstream.strategies import Hypernetwork
from clstream.strategies.hypernetwork.hypernetwork import TaskState
from hypernetworks import LSTM, SMALL, Normed, Watching, at_second_task, built
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchLearned, BatchReady, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.evaluation import evaluating


def adam(slope: Tensor, state: dict[str, Tensor] | None, lr: float) -> Tensor:
    """Return the change that Adam makes, by the formula."""
    mean, square = (torch.zeros_like(slope),) * 2 if not state else (state["exp_avg"], state["exp_avg_sq"])
    step = 1 + (0 if not state else int(state["step"]))
    mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope.square()
    return -lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)


@pytest.mark.parametrize("batches", [0, 3])
def test_looking_ahead_is_what_the_optimizer_would_do_and_moves_nothing(batches: int) -> None:
    strategy, batch = at_second_task(batches=batches)
    strategy.optimizer.zero_grad()
    strategy.loss(batch.samples).backward()
    theta = {name: weight.detach().clone() for name, weight in strategy.generator.named_parameters()}
    state = deepcopy(strategy.optimizer.state_dict())
    ahead = strategy.look_ahead()
    for name, weight in strategy.generator.named_parameters():
        change = adam(weight.grad, strategy.optimizer.state.get(weight), 1e-3)
        assert torch.allclose(ahead[name] - theta[name], change, atol=1e-7)
        assert torch.equal(weight, theta[name])
    after = strategy.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"] and after["state"].keys() == state["state"].keys()
    for key, held in state["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in held.items())
    strategy.optimizer.step()
    assert all(torch.equal(weight, ahead[name]) for name, weight in strategy.generator.named_parameters())


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"held_heads": "own"},
        {"importance": "fisher", "beta": 100.0},
        {"importance": "normalised"},
        {"old_embeddings": "learned"},
        {"chunks": "own", "old_embeddings": "learned"},
        {"generator": "lstm", "hidden": (16,)},
        {"hidden": (2,)},  # narrow ones: no weights are made for the distances
        {"hidden": (2,), "chunks": "own", "old_embeddings": "learned"},
        {"generator": "lstm", "hidden": (2,)},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_a_step_by_hand(options: dict[str, Any], lookahead: bool) -> None:
    """The third task, with two old ones, task by task and with Adam's formula in place of batches, copies and trial steps."""
    options = {"beta": 1.0} | options
    strategy, batch = at_second_task(task=2, batches=3, lookahead=lookahead, **options)
    twin = deepcopy(strategy)
    generator, now, old = twin.generator, twin.tasks[2], [twin.tasks[0], twin.tasks[1]]
    names = [name for name, _ in generator.named_parameters()]
    theta, own = list(generator.parameters()), now.parameters()

    def made_weights(state: TaskState, weights: list[Tensor]) -> Tensor:
        chunks = None if state.chunks is None else state.chunks[None]
        return functional_call(generator, dict(zip(names, weights, strict=True)), (state.embedding[None], chunks))[0]

    goals = strategy.target_weights(None)
    network = twin.network.unflatten(made_weights(now, theta))
    outputs = functional_call(twin.model, network, (batch.samples.x,))
    task_loss = F.cross_entropy(outputs[:, [4, 5]], batch.samples.y - 4)
    slopes = torch.autograd.grad(task_loss, theta + own, retain_graph=True)
    states = [twin.optimizer.state.get(weight) for weight in theta]
    ahead = theta
    if lookahead:
        changes = [adam(slope, state, 1e-3) for slope, state in zip(slopes, states, strict=False)]
        ahead = [weight + change.detach() for weight, change in zip(theta, changes, strict=True)]
    hold = torch.zeros(())
    for state, goal, classes in zip(old, goals, ([0, 1], [2, 3]), strict=True):
        weights = torch.ones_like(goal)
        if options.get("held_heads") == "own":
            rows = {"head.weight": torch.zeros(6, 32), "head.bias": torch.zeros(6)}
            for part in rows.values():
                part[classes] = 1.0
            rest = {name: torch.ones(shape) for name, shape in twin.network.shapes.items()}
            weights = torch.cat([part.flatten() for part in (rest | rows).values()])
        if "importance" in options:
            weights = state.fisher / (1.0 if options["importance"] == "fisher" else state.fisher.mean())
        hold = hold + (weights * (made_weights(state, ahead) - goal) ** 2).sum() * options["beta"] / 2
    moving = [parameter for state in old for parameter in state.parameters() if parameter.requires_grad]
    assert bool(moving) == (options.get("old_embeddings") == "learned")
    held = torch.autograd.grad(hold, theta + moving)
    expected = []
    for place, (weight, state) in enumerate(zip(theta, states, strict=True)):
        expected.append(weight + adam(slopes[place] + held[place], state, 1e-3))
    vectors = [
        weight + adam(slope, twin.embedding_optimizer.state.get(weight), 1e-3)
        for weight, slope in zip(own + moving, [*slopes[len(theta) :], *held[len(theta) :]], strict=True)
    ]
    total = strategy.learn(batch)
    assert total.item() == pytest.approx((task_loss + hold).item(), rel=1e-5)
    assert hold.item() > 0
    for weight, value in zip(strategy.generator.parameters(), expected, strict=True):
        assert torch.allclose(weight, value, atol=2e-6)
    ours = [parameter for state in (strategy.tasks[2], *strategy.old) for parameter in state.parameters()]
    for weight, value in zip([parameter for parameter in ours if parameter.requires_grad], vectors, strict=True):
        assert torch.allclose(weight, value, atol=2e-6)


def test_a_subset_of_old_tasks_is_drawn_anew_and_divided_by_its_number() -> None:
    strategy, _ = at_second_task(task=2, old_tasks=1, lookahead=False, beta=3.0)
    errors = (strategy.weights(strategy.old) - strategy.target_weights(None)).square().sum(1).mul(3.0).tolist()
    penalties = {round(strategy.regularise().item(), 9) for _ in range(40)}
    assert sorted(penalties) == pytest.approx(sorted(errors), rel=1e-5) and len(penalties) == 2
    more = at_second_task(task=2, old_tasks=7, lookahead=False, beta=3.0)[0]
    assert more.regularise().item() == pytest.approx(
        (more.weights(more.old) - more.target_weights(None)).square().sum().item() * 1.5
    )


@pytest.mark.parametrize("options", [{}, {"importance": "fisher"}, {"held_heads": "own"}], ids=str)
def test_a_subset_of_old_tasks_is_held_each_to_its_own(options: dict[str, Any]) -> None:
    """The mean over draws of one old task is what all together give: so what is drawn has its own goal and its own weights."""
    strategy, _ = at_second_task(task=2, old_tasks=1, lookahead=False, **options)
    assert len(strategy.old) == 2
    drawn = {round(strategy.regularise().item(), 9) for _ in range(24)}
    alone = []
    for row in range(2):
        goal = strategy.target_weights(None)[row]
        squares = (strategy.weights([strategy.old[row]])[0] - goal).square()
        if strategy.coefficients is not None:
            squares = squares * strategy.coefficients[row]
        alone.append(strategy.beta * squares.sum().item())
    assert len(drawn) == 2
    assert sorted(drawn) == pytest.approx(sorted(alone), rel=1e-3)


def test_gradients_are_clipped_all_together() -> None:
    strategy, batch = at_second_task(clip=0.01, optimizer=partial(SGD, lr=1.0), lookahead=False)
    before = [weight.detach().clone() for weight in (*strategy.generator.parameters(), strategy.current.embedding)]
    strategy.learn(batch)
    after = [*strategy.generator.parameters(), strategy.current.embedding]
    norm = torch.cat([(old - new).flatten() for old, new in zip(before, after, strict=True)]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-2)


class Counting(SGD):
    """Counts its steps where some optimizers do: in its groups, of which it has two."""

    def __init__(self, parameters: Any, lr: float = 1.0) -> None:
        parameters = list(parameters)
        groups = [[weight for weight in parameters if weight.dim() < 2], [weight for weight in parameters if weight.dim() >= 2]]
        super().__init__([{"params": group} for group in groups if group], lr=lr)
        for group in self.param_groups:
            group["steps"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
        return super().step(closure)


def test_any_optimizer_is_looked_ahead_with_and_clipped_by_all_of_its_groups() -> None:
    strategy = built(optimizer=Counting, clip=1e-3)
    moved: list[float] = []

    class Moves:
        @on(BatchReady)
        def ready(self, event: BatchReady) -> None:
            self.before = [weight.detach().clone() for weight in strategy.generator.parameters()]

        @on(BatchLearned)
        def learned(self, event: BatchLearned) -> None:
            pairs = zip(self.before, strategy.generator.parameters(), strict=True)
            moved.append(sum((old - new).square().sum().item() for old, new in pairs) ** 0.5)

    run(strategy, example_stream(), Moves())
    assert 5e-4 < max(moved) < 1.001e-3  # at a rate of 1, a step is as long as the gradient, that of the embedding apart
    steps = [group["steps"] for group in strategy.optimizer.param_groups]
    assert steps == [strategy.embedding_optimizer.param_groups[0]["steps"]] * 2


@pytest.mark.parametrize("options", [{}, {"chunks": "own"}, LSTM, {"optimizer": partial(Adam, lr=1e-3, weight_decay=0.1)}])
def test_old_embeddings_stay_bit_for_bit(options: dict[str, Any]) -> None:
    kept: dict[int, list[Tensor]] = {}
    strategy = built(**options)

    def note(number: int) -> None:
        kept[number] = [parameter.detach().clone() for parameter in strategy.tasks[number].parameters()]

    run(strategy, example_stream(epochs=2), Watching(end=note))
    for number, vectors in kept.items():
        now = strategy.tasks[number].parameters()
        assert all(map(torch.equal, vectors, now)) and len(vectors) == len(now)
        assert not any(parameter.requires_grad for parameter in now)


def test_old_embeddings_move_where_they_are_learned() -> None:
    kept: dict[int, Tensor] = {}
    strategy = built(old_embeddings="learned", beta=10.0)
    run(strategy, example_stream(), Watching(end=lambda n: kept.update({n: strategy.tasks[n].embedding.detach().clone()})))
    assert not torch.equal(kept[0], strategy.tasks[0].embedding)
    assert torch.equal(kept[2], strategy.tasks[2].embedding)


def test_goals_are_the_weights_that_answered_when_the_last_task_ended_and_stay_for_a_task() -> None:
    ended: dict[int, Tensor] = {}
    strategy = built()

    def note(number: int) -> None:
        look(number)
        ended[number] = strategy.weights(list(strategy.tasks.values())).detach()

    def look(number: int) -> None:
        if number:
            assert torch.equal(strategy.target_weights(None), ended[number - 1])

    run(strategy, example_stream(), Watching(start=look, end=note))
    assert len(ended) == 3


def test_both_optimizers_are_new_for_each_task() -> None:
    steps: list[int] = []
    strategy = built()

    def note(batch: Any) -> None:
        optimizers = strategy.optimizer, strategy.embedding_optimizer
        steps.extend(max([int(state["step"]) for state in optimizer.state.values()], default=0) for optimizer in optimizers)

    run(strategy, example_stream(batch_size=20), Watching(batch=note))
    assert steps == [0, 0, 1, 1, 2, 2] * 3


@pytest.mark.slow
def test_the_regulariser_holds_old_networks() -> None:
    def drift(beta: float) -> float:
        first: list[Tensor] = []
        strategy = built(beta=beta)
        note = Watching(end=lambda number: first.append(strategy.weights([strategy.tasks[0]]).detach()))
        run(strategy, example_stream(epochs=5), note)
        return (first[-1] - first[0]).square().sum().item()

    free, some, much = drift(0.0), drift(0.01), drift(1.0)
    assert much < 0.1 * some and some < 0.5 * free


def test_batch_norm_has_statistics_for_each_task() -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    model = Normed()
    strategy = built(model)

    def note(number: int) -> None:
        kept[number] = {name: value.clone() for name, value in strategy.tasks[number].statistics.items()}

    stream = example_stream(batch_size=20, epochs=2)
    run(strategy, stream, Watching(end=note))
    for number, statistics in kept.items():
        now = strategy.tasks[number].statistics
        assert all(torch.equal(value, now[name]) for name, value in statistics.items())
        assert int(now["norm.num_batches_tracked"]) == 6
    assert not torch.equal(kept[0]["norm.running_mean"], kept[1]["norm.running_mean"])
    assert int(model.norm.num_batches_tracked) == 0 and not bool(model.norm.running_mean.any())
    alone, task = deepcopy(model).eval(), stream.tasks[0]
    alone.load_state_dict(dict(strategy.network.unflatten(strategy.weights([strategy.tasks[0]])[0].detach())) | kept[0])
    with evaluating(strategy):
        assert torch.allclose(strategy.scores(task.test.x, task)[:, :2], alone(task.test.x)[:, :2], atol=1e-5)


@pytest.mark.slow
def test_weights_without_gradient_are_used_as_they_are() -> None:
    model = example_model()
    model.stages.requires_grad_(False)
    strategy = built(model)
    before = deepcopy(model.stages.state_dict())
    assert strategy.network.size == 32 * 6 + 6
    result = run(strategy, example_stream(epochs=10, scenario="task"))
    assert result.average_accuracy > 0.8
    assert all(torch.equal(value, model.stages.state_dict()[name]) for name, value in before.items())


def test_embeddings_are_drawn_each_with_its_own_spread() -> None:
    strategy = built(chunks="own", task_size=2000, chunk_size=400, task_std=3.0, chunk_std=0.1)
    state = strategy.new_state(example_stream().tasks[0])
    assert state.embedding.std().item() == pytest.approx(3.0, rel=0.1)
    assert state.chunks is not None and state.chunks.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_task_that_comes_again_is_not_held_and_the_others_are() -> None:
    held: list[list[int]] = []
    strategy = built()

    def look(number: int) -> None:
        held.append([number for number, state in strategy.tasks.items() if state in strategy.old])
        assert strategy.current is strategy.tasks[number] and strategy.current.embedding.requires_grad

    run(strategy, example_stream((0, 1, 0, 2)), Watching(start=look))
    assert held == [[], [0], [1], [1, 0]]
    assert len(strategy.tasks) == 3


def test_another_run_begins_without_tasks() -> None:
    strategy = built()
    run(strategy, example_stream())
    assert list(strategy.tasks) == [0, 1, 2]
    with pytest.warns(UserWarning, match="was run before"):
        run(strategy, example_stream(), max_sessions=1)
    assert list(strategy.tasks) == [0] and not strategy.old


def test_a_label_of_another_task_ends_the_run() -> None:
    strategy, batch = at_second_task()
    assert strategy.loss(batch.samples).isfinite()
    assert strategy.loss(batch.samples + example_stream().tasks[0].train[:1]).isnan()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        LSTM | {"importance": "fisher", "beta": 10.0, "fisher_samples": 20},
        LSTM | {"growth": True},
        {"old_tasks": 1, "old_embeddings": "learned", "chunks": "own", "held_heads": "own", "clip": 1.0},
        {"lookahead": False, "hidden": (2,), "optimizer": partial(SGD, lr=0.01, momentum=0.9)},
    ],
    ids=["lstm, fisher", "lstm, growth", "all at once", "no lookahead, SGD"],
)
@pytest.mark.parametrize("check", ["resumes_exactly", "takes_any_batch"])
def test_the_contract_with_other_options(options: dict[str, Any], check: str) -> None:
    checks = {candidate.name: candidate for candidate in check_strategy(lambda model: Hypernetwork(model, **SMALL | options))}
    checks[check]()


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resumes_exactly", "evaluates_without_trace"])
def test_the_contract_with_batch_norm(check: str) -> None:
    checks = {candidate.name: candidate for candidate in check_strategy(lambda model: Hypernetwork(Normed(), **SMALL))}
    checks[check]()
