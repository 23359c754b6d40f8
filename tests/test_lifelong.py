"""The lifelong framework: vectors, what it equals, and that old logits are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clstream.strategies import EWC, L2, Finetune, Lifelong
from clstream.strategies.lifelong.stiffness import penalty, proximal
from torch import Tensor, nn
from torch.optim import SGD, Adam

from clstream import SessionEnded, TaskEnded, on, run, run_seeds
from clstream.checks import check_alike, example_model, example_stream
from clstream.checks.examples import normed_model
from clstream.eval_mode import evaluating
from clstream.models import Conv4, ConvNet, LeNet, Mlp, VitTiny
from clstream.models.layers import FlatInput
from clstream.seeds import isolated

INF = float("inf")
GUARANTEE = {"old": INF, "old_rows": INF, "new_to_old": INF}
LARGE = dict.fromkeys(GUARANTEE, 1e6)


def test_the_proximal_step_has_the_values_worked_out() -> None:
    weight, reference = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def step(b: float) -> list[float]:
        return proximal(weight, reference, torch.full_like(weight, b), 0.1).tolist()

    assert step(1.0) == pytest.approx([0.8333333333, -1.6666666667, 0.4166666667], abs=1e-10)
    assert step(10.0) == pytest.approx([1 / 3, -2 / 3, 0.5 / 3], abs=1e-12)
    assert step(INF) == [0.0, 0.0, 0.0]
    assert step(0.0) == weight.tolist()


def test_a_weight_that_is_free_or_held_is_so_to_the_bit() -> None:
    weight, reference = torch.randn(1000) * 1e3, torch.randn(1000) * 1e-3
    assert torch.equal(proximal(weight, reference, torch.zeros(1000), 0.37), weight)
    assert torch.equal(proximal(weight, reference, torch.full((1000,), INF), 0.37), reference)
    assert torch.equal(proximal(weight, reference, torch.full((1000,), INF), 0.0), reference)
    assert not torch.equal(proximal(weight, reference, torch.full((1000,), 1e6), 0.37), reference)


@pytest.mark.parametrize("check", check_alike(Finetune, partial(Lifelong, policy="zero")), ids=str)
def test_zero_is_fine_tuning(check: Callable[[], None]) -> None:
    check()


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def pair(ours: Callable[[nn.Module], Lifelong], theirs: Callable[[nn.Module], EWC | L2]) -> tuple[Lifelong, EWC | L2]:
    """Run both on three tasks with a learning rate of 0, so that the weights are the same, and move the weights alike."""
    strategies = []
    for make in (ours, theirs):
        with isolated(0, "strategy"):
            strategy = make(example_model())
        run(strategy, example_stream())
        strategy.model.double()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in strategy.model.parameters():
                weight += torch.randn(weight.shape, generator=draw).double()
        strategies.append(strategy)
    return strategies[0], strategies[1]


REST = partial(SGD, lr=0.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            partial(Lifelong, optimizer=REST, policy="fisher", strength=2.0, decay=0.5, step="gradient"),
            partial(EWC, optimizer=REST, strength=2.0, decay=0.5, online=True),
        ),
        (
            partial(Lifelong, optimizer=REST, policy="constant", strength=0.25, step="gradient"),
            partial(L2, optimizer=REST, strength=0.25, from_start=False),
        ),
    ],
    ids=["fisher is EWC", "constant is L2"],
)
def test_the_penalty_and_its_gradient_are_the_other_s(ours: Callable, theirs: Callable) -> None:
    own, other = pair(ours, theirs)
    (held,) = other.regularisers
    held.anchor, held.importance, held.offset = double(held.anchor), double(held.importance), held.offset.double()
    expected = held.penalty(example_stream().tasks[0].train[:1])
    value = penalty(own.weights, double(own.reference), double(own.stiffness))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12) and value.item() > 0
    slopes = torch.autograd.grad(expected, list(other.model.parameters()))
    for mine, slope in zip(torch.autograd.grad(value, list(own.model.parameters())), slopes, strict=True):
        assert torch.allclose(mine, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_runs_with_the_fisher_are_those_of_ewc(head: str) -> None:
    models = []
    for make in (
        partial(Lifelong, policy="fisher", strength=0.5, step="gradient"),
        partial(EWC, strength=0.5, online=True),
    ):
        with isolated(0, "strategy"):
            strategy = make(example_model(head=head))
        run(strategy, example_stream((0, 1, 0, 2)))
        models.append(strategy.model)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)


def test_the_first_proximal_step_is_that_of_the_gradient_to_second_order() -> None:
    """w' - 2 lr b (w - ref) against the minimum: they differ by the square of 2 lr b."""
    weight, reference, b, lr = torch.randn(50).double(), torch.randn(50).double(), torch.rand(50).double(), 1e-4
    explicit = weight - 2 * lr * b * (weight - reference)
    difference = (proximal(weight, reference, b, lr) - explicit).abs()
    assert bool((difference <= 1.01 * (2 * lr * b).square() * (weight - reference).abs()).all()) and float(difference.max()) > 0


class OldLogits:
    """Keeps the logits of a fixed batch for the classes that came, whenever a task has ended."""

    def __init__(self, strategy: Lifelong, x: Tensor) -> None:
        self.strategy, self.x = strategy, x
        self.classes: list[int] = []
        self.logits: list[Tensor] = []

    @on(SessionEnded)
    def came(self, event: SessionEnded) -> None:
        self.classes += [label for label in event.session.classes if label not in self.classes]

    @on(TaskEnded)
    def ask(self, event: TaskEnded) -> None:
        with evaluating(self.strategy), torch.no_grad():
            self.logits.append(self.strategy.model(self.x)[:, self.classes])

    def are_the_same(self) -> bool:
        last = self.logits[-1]
        return all(torch.equal(logits, last[:, : logits.shape[1]]) for logits in self.logits)


def conv(norm: str) -> nn.Module:
    with isolated(0, "model"):
        return Conv4((1, 8, 8), 6, width=8, blocks=2, norm=norm)


def batch_normed() -> nn.Module:
    with isolated(0, "model"):
        return ConvNet((1, 8, 8), 6, channels=(4, 6, 6), hidden=12, norm="batch")


def deep() -> nn.Module:
    with isolated(0, "model"):
        return Mlp((1, 8, 8), 6, hidden=(24, 18))


def layer_normed() -> nn.Module:
    with isolated(0, "model"):
        first = (FlatInput(), nn.Linear(64, 20), nn.LayerNorm(20), nn.ReLU())
        return nn.Sequential(*first, nn.Identity(), nn.Linear(20, 15), nn.GELU(), nn.Linear(15, 6))


MODELS = {
    "mlp": deep,
    "conv": partial(conv, "none"),
    "group norm of one group": partial(conv, "layer"),
    "batch norm": batch_normed,
    "dropout": normed_model,
}
OPTIMIZERS = {"momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01), "adam": partial(Adam, lr=0.01, weight_decay=0.01)}


def ask(model: nn.Module, optimizer: Callable, **options: object) -> OldLogits:
    strategy = Lifelong(model, optimizer, **options)  # type: ignore[arg-type]
    stream = example_stream((0, 1, 0, 2), epochs=2)
    observer = OldLogits(strategy, torch.cat([task.test.x for task in stream.tasks]))
    run(strategy, stream, observer)
    assert len(observer.logits) == 4
    return observer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_old_logits_are_the_same_bits_after_later_tasks(model: str, optimizer: str) -> None:
    assert ask(MODELS[model](), OPTIMIZERS[optimizer]).are_the_same()


@pytest.mark.parametrize(
    "model",
    [LeNet, partial(VitTiny, width=24, depth=2, heads=2), partial(Mlp, hidden=(24,), head="cosine")],
    ids=["LeNet", "VitTiny", "cosine head"],
)
def test_other_models_keep_old_logits_too(model: Callable) -> None:
    with isolated(0, "model"):
        network = model((1, 8, 8), 6)
    assert ask(network, OPTIMIZERS["momentum"]).are_the_same()


@pytest.mark.parametrize("start", ["nearest_task", "nearest_class"])
def test_starts_leave_old_logits_alone(start: str) -> None:
    assert ask(deep(), OPTIMIZERS["momentum"], start=start).are_the_same()


@pytest.mark.parametrize("model", ["mlp", "conv", "group norm of one group"])
def test_a_large_number_in_place_of_infinity_is_no_guarantee(model: str) -> None:
    assert ask(MODELS[model](), OPTIMIZERS["momentum"], policy=GUARANTEE).are_the_same()
    assert not ask(MODELS[model](), OPTIMIZERS["momentum"], policy=LARGE).are_the_same()


def test_old_logits_of_a_growing_head_are_the_same_to_rounding() -> None:
    with isolated(0, "model"):
        model = Mlp((1, 8, 8), 6, hidden=(24, 18), head="growing")
    observer = ask(model, OPTIMIZERS["momentum"])
    for logits in observer.logits:
        assert torch.allclose(logits, observer.logits[-1][:, : logits.shape[1]], rtol=1e-5, atol=1e-6)


def test_layer_norm_s_layers_belong_to_the_first_task_whole() -> None:
    observer = ask(layer_normed(), OPTIMIZERS["momentum"])
    groups = observer.strategy.groups
    assert observer.are_the_same() and groups is not None
    assert sorted(groups.owner) == ["5", "7"]  # the second linear layer, and the head


def test_seeds_together_end_as_their_own_runs() -> None:
    strategies: dict[int, Lifelong] = {}

    def make(seed: int) -> Lifelong:
        strategies[seed] = Lifelong(Mlp((1, 8, 8), 6, hidden=(24, 18)), OPTIMIZERS["momentum"])
        return strategies[seed]

    stream = example_stream(epochs=2)
    run_seeds(make, stream, (0, 1))
    for seed, together in strategies.copy().items():
        with isolated(seed, "model"):
            alone = make(seed)
        run(alone, stream, seed=seed)
        for name, weight in alone.weights.items():
            assert torch.allclose(weight, together.weights[name], atol=1e-4)
            assert torch.equal(together.weights[name], together.reference[name])  # all is held in the end
