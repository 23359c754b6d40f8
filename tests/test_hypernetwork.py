"""Hypernetworks against their definitions: counts, one step by hand, what must stay as it is, and what is answered."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from clstream.experiments.bench_hypernetwork import numbers_held
from clstream.strategies import Hypernetwork
from clstream.strategies.ewc import EWCPenalty
from clstream.strategies.hypernetwork.hypernetwork import Known, entropy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchLearned, BatchReady, Samples, Stream, TaskEnded, TaskStarted, metrics, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.evaluation import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated

SMALL = {"chunk": 500, "task_size": 8, "chunk_size": 8}
LSTM = SMALL | {"generator": "lstm", "hidden": (16,)}


def built(model: nn.Module | None = None, **options: Any) -> Hypernetwork:
    with isolated(0, "strategy"):
        return Hypernetwork(model or example_model(), **SMALL | options)


class Watching:
    """An observer that calls something at each start of a task, after the strategy has heard of it, and at each end."""

    def __init__(self, start: Any = None, end: Any = None, batch: Any = None) -> None:
        self.start, self.end, self.batch = start, end, batch

    @on(TaskStarted)
    def started(self, event: TaskStarted) -> None:
        if self.start is not None:
            self.start(event.task.id)

    @on(TaskEnded)
    def ended(self, event: TaskEnded) -> None:
        if self.end is not None:
            self.end(event.task.id)

    @on(BatchReady)
    def ready(self, event: BatchReady) -> None:
        if self.batch is not None:
            self.batch(event.batch)


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# One step


def at_second_task(stream: Stream | None = None, batches: int = 3, task: int = 1, **options: Any) -> tuple[Hypernetwork, Any]:
    """Return a strategy that stands in a task, after some batches of it, and the next batch."""

    class Enough(Exception):
        pass

    kept: list[Any] = []

    def look(batch: Any) -> None:
        if batch.task.id == task and batch.index == batches:
            kept.append((deepcopy(strategy), batch))
            raise Enough

    strategy = built(**options)
    with pytest.raises(Enough):
        run(strategy, stream or example_stream(), Watching(batch=look))
    return kept[0]


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
    ahead = strategy.ahead()
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
    theta, own = list(generator.parameters()), [each for each in (now.embedding, now.chunks) if each is not None]

    def made(known: Known, weights: list[Tensor]) -> Tensor:
        chunks = None if known.chunks is None else known.chunks[None]
        return functional_call(generator, dict(zip(names, weights, strict=True)), (known.embedding[None], chunks))[0]

    goals = strategy.goals_of(None)
    network = twin.target.named(made(now, theta))
    outputs = functional_call(twin.model, network, (batch.samples.x,))
    task_loss = F.cross_entropy(outputs[:, [4, 5]], batch.samples.y - 4)
    slopes = torch.autograd.grad(task_loss, theta + own, retain_graph=True)
    states = [twin.optimizer.state.get(weight) for weight in theta]
    ahead = theta
    if lookahead:
        changes = [adam(slope, state, 1e-3) for slope, state in zip(slopes, states, strict=False)]
        ahead = [weight + change.detach() for weight, change in zip(theta, changes, strict=True)]
    hold = torch.zeros(())
    for known, goal, classes in zip(old, goals, ([0, 1], [2, 3]), strict=True):
        weights = torch.ones_like(goal)
        if options.get("held_heads") == "own":
            rows = {"head.weight": torch.zeros(6, 32), "head.bias": torch.zeros(6)}
            for part in rows.values():
                part[classes] = 1.0
            rest = {name: torch.ones(shape) for name, shape in twin.target.shapes.items()}
            weights = torch.cat([part.flatten() for part in (rest | rows).values()])
        if "importance" in options:
            weights = known.fisher / (1.0 if options["importance"] == "fisher" else known.fisher.mean())
        hold = hold + (weights * (made(known, ahead) - goal) ** 2).sum() * options["beta"] / 2
    moving = [each for known in old for each in (known.embedding, known.chunks) if each is not None and each.requires_grad]
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
    ours = [each for known in (strategy.tasks[2], *strategy.old) for each in (known.embedding, known.chunks) if each is not None]
    for weight, value in zip([each for each in ours if each.requires_grad], vectors, strict=True):
        assert torch.allclose(weight, value, atol=2e-6)


def test_a_subset_of_old_tasks_is_drawn_anew_and_divided_by_its_number() -> None:
    strategy, _ = at_second_task(task=2, old_tasks=1, lookahead=False, beta=3.0)
    errors = (strategy.weights(strategy.old) - strategy.goals_of(None)).square().sum(1).mul(3.0).tolist()
    found = {round(strategy.hold().item(), 9) for _ in range(40)}
    assert sorted(found) == pytest.approx(sorted(errors), rel=1e-5) and len(found) == 2
    more = at_second_task(task=2, old_tasks=7, lookahead=False, beta=3.0)[0]
    assert more.hold().item() == pytest.approx((more.weights(more.old) - more.goals_of(None)).square().sum().item() * 1.5)


def test_gradients_are_clipped_all_together() -> None:
    strategy, batch = at_second_task(clip=0.01, optimizer=partial(SGD, lr=1.0), lookahead=False)
    before = [weight.detach().clone() for weight in (*strategy.generator.parameters(), strategy.current.embedding)]
    strategy.learn(batch)
    after = [*strategy.generator.parameters(), strategy.current.embedding]
    norm = torch.cat([(one - two).flatten() for one, two in zip(before, after, strict=True)]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-2)


# What must stay


@pytest.mark.parametrize("options", [{}, {"chunks": "own"}, LSTM, {"optimizer": partial(Adam, lr=1e-3, weight_decay=0.1)}])
def test_old_embeddings_stay_bit_for_bit(options: dict[str, Any]) -> None:
    kept: dict[int, list[Tensor]] = {}
    strategy = built(**options)

    def note(number: int) -> None:
        known = strategy.tasks[number]
        kept[number] = [each.detach().clone() for each in (known.embedding, known.chunks) if each is not None]

    run(strategy, example_stream(epochs=2), Watching(end=note))
    for number, vectors in kept.items():
        known = strategy.tasks[number]
        now = [each for each in (known.embedding, known.chunks) if each is not None]
        assert all(torch.equal(one, two) for one, two in zip(vectors, now, strict=True))
        assert not any(each.requires_grad for each in now)


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
            assert torch.equal(strategy.goals_of(None), ended[number - 1])

    run(strategy, example_stream(), Watching(start=look, end=note))
    assert len(ended) == 3


def test_both_optimizers_are_new_for_each_task() -> None:
    steps: list[int] = []
    strategy = built()

    def note(batch: Any) -> None:
        optimizers = strategy.optimizer, strategy.embedding_optimizer
        steps.extend(max([int(held["step"]) for held in each.state.values()], default=0) for each in optimizers)

    run(strategy, example_stream(batch_size=20), Watching(batch=note))
    assert steps == [0, 0, 1, 1, 2, 2] * 3


def test_the_regulariser_holds_old_networks() -> None:
    def drift(beta: float) -> float:
        first: list[Tensor] = []
        strategy = built(beta=beta)
        note = Watching(end=lambda number: first.append(strategy.weights([strategy.tasks[0]]).detach()))
        run(strategy, example_stream(epochs=5), note)
        return (first[-1] - first[0]).square().sum().item()

    free, some, much = drift(0.0), drift(0.01), drift(1.0)
    assert much < 0.1 * some and some < 0.5 * free


class Normed(nn.Module):
    """A network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.into(x.flatten(1).float() / 255))))


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
    alone.load_state_dict(dict(strategy.target.named(strategy.weights([strategy.tasks[0]])[0].detach())) | kept[0])
    with evaluating(strategy):
        assert torch.allclose(strategy.scores(task.test.x, task)[:, :2], alone(task.test.x)[:, :2], atol=1e-5)


def test_weights_without_gradient_are_used_as_they_are() -> None:
    model = example_model()
    model.stages.requires_grad_(False)
    strategy = built(model)
    before = deepcopy(model.stages.state_dict())
    assert strategy.target.size == 32 * 6 + 6
    result = run(strategy, example_stream(epochs=10, scenario="task"))
    assert result.average_accuracy > 0.8
    assert all(torch.equal(value, model.stages.state_dict()[name]) for name, value in before.items())


# Answers


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, -1e4, 3.0], [200.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    p = logits[3].softmax(0)
    expected = torch.stack([torch.tensor(4.0).log(), torch.tensor(0.0), torch.tensor(0.0), -(p * p.log()).sum()])
    assert torch.allclose(entropy(logits), expected, atol=1e-6)


def learned(stream: Stream, **options: Any) -> Hypernetwork:
    strategy = built(**options)
    run(strategy, stream)
    return strategy


@pytest.mark.parametrize("head", ["own", "shared"])
def test_the_surest_task_answers_each_sample(head: str) -> None:
    stream = example_stream(epochs=2)
    strategy = learned(stream, head=head)
    x = torch.cat([task.test.x for task in stream.tasks])
    answers, labels = [], []
    with evaluating(strategy):
        for one in x.split(1):
            found = []
            for number, known in strategy.tasks.items():
                network = strategy.target.named(strategy.weights([known])[0])
                outputs = functional_call(strategy.model, network, (one,))[0]
                outputs = outputs[[2 * number, 2 * number + 1]] if head == "own" else outputs[:2]
                p = outputs.double().softmax(0)
                found.append((-(p * p.log()).sum().item(), number, outputs))
            _, number, outputs = min(found, key=lambda each: each[0])
            row = torch.full((6,), float("-inf"))
            row[[2 * number, 2 * number + 1]] = outputs
            answers.append(row)
            labels.append(int(row.argmax()))
        assert torch.allclose(strategy.scores(x), torch.stack(answers), atol=1e-5)
        assert strategy.predict(x).tolist() == labels
    assert len({label // 2 for label in labels}) > 1


def test_one_head_serves_all_tasks() -> None:
    """The network has the outputs of one task; labels are places among its classes, and no task is known beforehand."""
    stream = example_stream(epochs=10, scenario="task")
    with isolated(0, "model"):
        model = Mlp((1, 8, 8), 2, hidden=(32,))
    strategy = built(model, head="shared")
    with pytest.raises(ValueError, match="once a run has started"):
        strategy.scores(stream.tasks[0].test.x)
    result = run(strategy, stream)
    assert result.average_accuracy > 0.9
    with evaluating(strategy):
        assert set(strategy.predict(stream.tasks[1].test.x, stream.tasks[1]).tolist()) == {2, 3}
        assert set(strategy.predict(stream.tasks[1].test.x).tolist()) <= set(range(6))


def test_what_is_made_for_answers_is_not_kept_when_something_is_learned() -> None:
    stream = example_stream()
    strategy, batch = at_second_task(stream)
    task = stream.tasks[0]
    with evaluating(strategy):
        before = strategy.scores(task.test.x, task)
    strategy.learn(batch)
    with evaluating(strategy):
        now = strategy.scores(task.test.x, task)
        network = strategy.target.named(strategy.weights([strategy.tasks[0]])[0])
        assert torch.allclose(now[:, :2], functional_call(strategy.model, network, (task.test.x,))[:, :2], atol=1e-5)
    assert not torch.equal(before, now)


def test_before_a_batch_the_current_task_answers() -> None:
    strategy, batch = at_second_task()
    with evaluating(strategy):
        assert set(strategy.predict_online(batch.samples.x).tolist()) <= {2, 3}
        assert torch.equal(strategy.predict_online(batch.samples.x), strategy.predict(batch.samples.x, batch.task))


def test_a_domain_incremental_stream_has_one_head_and_a_network_for_each_domain() -> None:
    """Labels are swapped from domain to domain, and the background tells which it is: only the right network is right."""
    base = example_stream(epochs=10)
    tasks = []
    for number in range(2):

        def shifted(samples: Samples, number: int = number) -> Samples:
            return Samples(samples.x.bitwise_not() if number else samples.x, (samples.y + number) % 2)

        first = base.tasks[0]
        tasks.append(type(first)(number, (0, 1), shifted(first.train), shifted(first.test)))
    result = run(built(example_model()), Stream("swapped", tasks, epochs=10, batch_size=8, scenario="domain"))
    assert metrics.average_accuracy(result.task_accuracy, result.taught) > 0.9


# Importance


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
            outputs = functional_call(strategy.model, strategy.target.named(row), (x,))
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
    rows = strategy.target.named(fisher)
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
    known, samples, total = strategy.tasks[0], stream.tasks[0].train[:], torch.zeros(strategy.target.size)
    with evaluating(strategy), torch.enable_grad():
        for x, y in zip(samples.x.split(1), samples.y.split(1), strict=True):
            row = strategy.weights([known])[0].detach().requires_grad_()
            outputs = functional_call(strategy.model, {**strategy.target.named(row), **known.statistics}, (x,))
            F.cross_entropy(outputs[:, :2], y).backward()
            total += row.grad.square()
    assert torch.allclose(known.fisher, total / len(samples), rtol=1e-3, atol=1e-8)


def test_the_fisher_of_a_task_that_comes_again_is_anew() -> None:
    counts: list[int] = []
    strategy = built(importance="fisher", beta=1.0)
    run(strategy, example_stream((0, 1, 0)), Watching(end=lambda number: counts.append(strategy.tasks[number].samples)))
    assert counts == [30, 60, 30]


def test_the_fisher_of_some_samples() -> None:
    draws = [learned(example_stream((0,)), importance="fisher", fisher_samples=number) for number in (5, 60, None)]
    few, all_drawn, whole = [each.tasks[0].fisher for each in draws]
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


# Growth


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
    assert not any(torch.equal(one, two) for one, two in zip(before, recurrent[0], strict=True))
    for later in recurrent[1:]:
        assert all(torch.equal(one, two) for one, two in zip(recurrent[0], later, strict=True))
    with evaluating(strategy):
        for task in stream.tasks[1:]:
            assert torch.equal(answers[task.id], strategy.scores(task.test.x, task))
    assert strategy.past is None  # nothing is held


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


# The rest


def test_a_task_that_comes_again_is_not_held_and_the_others_are() -> None:
    held: list[list[int]] = []
    strategy = built()

    def look(number: int) -> None:
        held.append([key for key, known in strategy.tasks.items() if any(known is each for each in strategy.old)])
        assert strategy.current is strategy.tasks[number] and strategy.current.embedding.requires_grad

    run(strategy, example_stream((0, 1, 0, 2)), Watching(start=look))
    assert held == [[], [0], [1], [1, 0]]
    assert len(strategy.tasks) == 3


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
@pytest.mark.parametrize(
    "check", ["resumes_exactly", "is_deterministic", "evaluates_without_trace", "keeps_no_samples", "takes_any_batch"]
)
def test_the_contract_with_other_options(options: dict[str, Any], check: str) -> None:
    checks = {each.name: each for each in check_strategy(lambda model: Hypernetwork(model, **SMALL | options))}
    checks[check]()


@pytest.mark.parametrize("check", ["resumes_exactly", "evaluates_without_trace"])
def test_the_contract_with_batch_norm(check: str) -> None:
    checks = {each.name: each for each in check_strategy(lambda model: Hypernetwork(Normed(), **SMALL))}
    checks[check]()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"generator": "gru"}, "generator must be mlp or lstm, not 'gru'"),
        ({"chunks": "none"}, "chunks must be shared or own"),
        ({"old_embeddings": "moving"}, "old_embeddings must be frozen or learned"),
        ({"held_heads": "none"}, "held_heads must be all or own"),
        ({"importance": "si"}, "importance must be none, fisher or normalised"),
        ({"head": "growing"}, "head must be own or shared"),
        ({"activation": "gelu"}, "activation must be one of relu, elu"),
        ({"old_tasks": 0}, "old_tasks must be a whole number of at least 1"),
        ({"fisher_samples": 0.5}, "fisher_samples must be a whole number"),
        ({"chunk": 0}, "chunk must be a whole number"),
        ({"task_size": 0}, "task_size must be a whole number"),
        ({"hidden": (10, 0)}, r"hidden\[1\] must be a whole number"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"beta": float("nan")}, "beta must be a finite number of at least 0"),
        ({"chunk_std": float("inf")}, "chunk_std must be a finite number of at least 0"),
        ({"clip": 0.0}, "clip must be a finite number above 0"),
        ({"generator": "lstm"}, "hidden must be one width"),
        ({"growth": True}, "growth stores what is around an LSTM"),
        (LSTM | {"growth": True, "importance": "fisher"}, "importance='none'"),
    ],
)
def test_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        built(**options)


class Raw(nn.Module):
    """Raw images as rows of floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float() / 255


class OutFirst(nn.Module):
    """Its output layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.raw, self.into = nn.Linear(16, 6), Raw(), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(self.raw(x)).relu())


def test_the_head_is_the_layer_that_gives_the_outputs() -> None:
    strategy = built(OutFirst(), held_heads="own")
    run(strategy, example_stream())
    assert strategy.target.head == "out"
    own = strategy.target.named(strategy.target.own(torch.tensor([0, 1])))
    assert own["out.weight"].sum(1).tolist() == [16, 16, 0, 0, 0, 0] and own["out.bias"].tolist() == [1, 1, 0, 0, 0, 0]
    assert own["into.weight"].all() and own["into.bias"].all()


class Counting(SGD):
    """Counts its steps where some optimizers do: in its groups, of which it has two."""

    def __init__(self, parameters: Any, lr: float = 1.0) -> None:
        parameters = list(parameters)
        groups = [[each for each in parameters if each.dim() < 2], [each for each in parameters if each.dim() >= 2]]
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
            moved.append(sum((one - two).square().sum().item() for one, two in pairs) ** 0.5)

    run(strategy, example_stream(), Moves())
    assert 5e-4 < max(moved) < 1.001e-3  # at a rate of 1, a step is as long as the gradient, that of the embedding apart
    steps = [group["steps"] for group in strategy.optimizer.param_groups]
    assert steps == [strategy.embedding_optimizer.param_groups[0]["steps"]] * 2


@pytest.mark.parametrize("options", [{}, {"importance": "fisher"}, {"held_heads": "own"}], ids=str)
def test_a_subset_of_old_tasks_is_held_each_to_its_own(options: dict[str, Any]) -> None:
    """The mean over draws of one old task is what all together give: so what is drawn has its own goal and its own weights."""
    strategy, _ = at_second_task(task=2, old_tasks=1, lookahead=False, **options)
    assert len(strategy.old) == 2
    drawn = {round(strategy.hold().item(), 9) for _ in range(24)}
    each = []
    for row in range(2):
        known, goals = strategy.old[row], strategy.goals_of(None)[row]
        squares = (strategy.weights([known])[0] - goals).square()
        if strategy.weighing is not None:
            squares = squares * strategy.weighing[row]
        each.append(strategy.beta * squares.sum().item())
    assert len(drawn) == 2
    for one, two in zip(sorted(drawn), sorted(each), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_embeddings_are_drawn_each_with_its_own_spread() -> None:
    strategy = built(chunks="own", task_size=2000, chunk_size=400, task_std=3.0, chunk_std=0.1)
    known = strategy.drawn(example_stream().tasks[0])
    assert known.embedding.std().item() == pytest.approx(3.0, rel=0.1)
    assert known.chunks is not None and known.chunks.std().item() == pytest.approx(0.1, rel=0.1)


def test_another_run_begins_without_tasks() -> None:
    strategy = built()
    run(strategy, example_stream())
    assert list(strategy.tasks) == [0, 1, 2]
    with pytest.warns(UserWarning, match="was run before"):
        run(strategy, example_stream(), max_sessions=1)
    assert list(strategy.tasks) == [0] and not strategy.old


def test_what_is_learned_and_weighed_is_augmented() -> None:
    stream = replace(example_stream(), augment=torch.zeros_like)
    strategy, batch = at_second_task(stream, importance="fisher")
    outputs = strategy.outputs(batch.samples)
    assert torch.equal(outputs, outputs[:1].expand_as(outputs))
    fisher = strategy.target.named(strategy.tasks[0].fisher)
    first, *_, last = fisher.values()
    assert not first.any() and last.any()  # nothing goes into the first layer


def test_a_label_of_another_task_ends_the_run() -> None:
    strategy, batch = at_second_task()
    assert strategy.loss(batch.samples).isfinite()
    assert strategy.loss(batch.samples + example_stream().tasks[0].train[:1]).isnan()


def test_models_are_refused() -> None:
    with pytest.raises(ValueError, match="its head can't grow"):
        built(example_model(head="growing"))
    with pytest.raises(ValueError, match="no weights that require a gradient"):
        built(example_model().requires_grad_(False))
    flat = nn.Sequential(Raw(), nn.Unflatten(1, (64, 1)), nn.Conv1d(64, 6, 1), nn.Flatten())
    with pytest.raises(ValueError, match="is about the rows of a linear layer, and none gives the outputs of Sequential"):
        run(built(flat, held_heads="own"), example_stream())
    with pytest.raises(ValueError, match="Mlp has 1 outputs, too few for a task of 2 classes"):
        run(built(Mlp((1, 8, 8), 1), head="shared"), example_stream())
    model = Mlp((1, 8, 8), 6)
    model.head.double()
    with pytest.raises(ValueError, match=r"head\.weight is torch\.float64: call model\.float"):
        built(model)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: ask the model once"):
        built(nn.Sequential(nn.LazyLinear(6)))
    with pytest.raises(TypeError, match="takes no regularisers"):
        built().add_regularisers(EWCPenalty(1.0))
