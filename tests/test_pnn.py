"""PNN: columns by hand and against Avalanche's, old answers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import PNN
from clstream.strategies.pnn import Lateral
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import TaskEnded, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.models import ConvNet, Mlp, VitTiny
from clstream.seeds import isolated


def two_columns(model: nn.Module, adapter: str = "mlp") -> tuple[PNN, Tensor]:
    """Return one that learned two tasks, and inputs."""
    stream = example_stream((0, 1))
    strategy = PNN(model, partial(SGD, lr=0.05), adapter)
    run(strategy, stream)
    return strategy, stream.tasks[1].test[:].x


@pytest.mark.parametrize("adapter", ["mlp", "linear"])
def test_the_second_column_is_given_what_the_first_makes_of_the_input(adapter: str) -> None:
    with isolated(0, "model"):
        strategy, x = two_columns(Mlp((1, 8, 8), 6, hidden=(12, 9)), adapter)
    first, second = strategy.columns
    into_second, into_head = strategy.laterals[1]

    def adapted(lateral: nn.Module, h: Tensor) -> Tensor:
        return ((lateral.alpha[0] * h) @ lateral.V.T).relu() if adapter == "mlp" else h

    with torch.no_grad():
        flat = x.flatten(1) / 255
        h1 = F.linear(flat, first.stages.layer1.weight, first.stages.layer1.bias).relu()
        h2 = F.linear(h1, first.stages.layer2.weight, first.stages.layer2.bias).relu()
        g1 = F.linear(flat, second.stages.layer1.weight, second.stages.layer1.bias).relu()
        g2 = F.linear(g1, second.stages.layer2.weight, second.stages.layer2.bias) + adapted(into_second, h1) @ into_second.U.T
        g2 = g2.relu()
        expected = F.linear(g2, second.head.weight, second.head.bias)
        expected[:, 2:4] += adapted(into_head, h2) @ into_head.U.T
        ours = strategy.outputs_of(x, 1)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(strategy.outputs_of(x, 0), first(x))


def test_it_is_avalanches_column(avalanche: Callable[[str], ModuleType]) -> None:
    """A layer with two columns before it, with their biases of the adapter at 0."""
    theirs = avalanche("models.pnn").PNNColumn(7, 5, 2)
    h = [torch.randn(4, 7) for _ in range(3)]
    lateral = Lateral(theirs.itoh.weight, 2, "mlp", torch.Generator())
    with torch.no_grad():
        for name, own in (("U", lateral.U), ("V", lateral.V)):
            getattr(theirs.adapter, name).weight.copy_(own)
            getattr(theirs.adapter, name).bias.zero_()
        theirs.adapter.alphas.copy_(lateral.alpha)
        expected = theirs([*h])
        widened = F.linear(torch.cat([h[2], lateral(h[:2])], 1), torch.cat([theirs.itoh.weight, lateral.U], 1), theirs.itoh.bias)
    torch.testing.assert_close(widened, expected)


def test_a_convolution_is_given_the_channels_of_the_other_columns() -> None:
    with isolated(0, "model"):
        strategy, x = two_columns(ConvNet((1, 8, 8), 6, (4, 5, 6), 7))
    names = [*strategy.layers, strategy.head]
    first, second = strategy.columns
    seen: list[dict[str, Tensor]] = [{}, {}]

    def note(module: nn.Module, given: tuple[Tensor, ...], place: int, name: str) -> None:
        seen[place][name] = given[0]

    for place, column in enumerate((first, second)):
        for name in names:
            column.get_submodule(name).register_forward_pre_hook(partial(note, place=place, name=name), prepend=True)
    with torch.no_grad():
        strategy.outputs_of(x, 1)
        lateral, layer = strategy.laterals[1][0], second.get_submodule(names[1])
        scaled = F.conv2d(lateral.alpha[0] * seen[0][names[1]], lateral.V[:, :, None, None]).relu()
        expected = layer(seen[1][names[1]]) + F.conv2d(scaled, lateral.U, padding=1)
        pooled = F.max_pool2d(expected.relu(), 2)
    torch.testing.assert_close(seen[1][names[2]], pooled)


class Remember:
    """Takes down what each column answers when its task ends."""

    def __init__(self, strategy: PNN, x: Tensor) -> None:
        self.strategy, self.x, self.answers = strategy, x, list[Tensor]()

    @on(TaskEnded)
    def look(self, event: TaskEnded) -> None:
        place = len(self.strategy.columns) - 1
        self.answers.append(self.strategy.outputs_of(self.x, place).detach())


@pytest.mark.parametrize("model", [example_model, normed_model, partial(example_model, head="growing")])
def test_old_answers_are_the_same_bits(model: Callable[[], nn.Module]) -> None:
    stream = example_stream((0, 1, 0, 2), epochs=2)
    x = torch.cat([task.test.x for task in stream.tasks])
    with isolated(0, "strategy"):
        strategy = PNN(model(), partial(Adam, lr=0.01))
    run(strategy, stream, remember := Remember(strategy, x))
    for place, answer in enumerate(remember.answers):
        assert torch.equal(strategy.outputs_of(x, place), answer)
    assert strategy.tasks == [0, 1, 0, 2] and strategy.newest() == [1, 2, 3]
    everything = strategy.outputs_of_all(x, [0, 1, 2, 3])
    assert all(torch.equal(one, answer) for one, answer in zip(everything, remember.answers, strict=True))


def test_each_column_begins_with_the_model_shuffled() -> None:
    strategy = built(PNN)
    start = {name: value.detach().clone() for name, value in strategy.model.named_parameters()}
    run(strategy, example_stream())
    for name, value in strategy.model.named_parameters():
        assert torch.equal(value, start[name])  # the model stays as it was given
    with isolated(0, "again"):
        fresh = built(partial(PNN, optimizer=partial(SGD, lr=1e-12)))
    run(fresh, example_stream())
    for name, value in start.items():
        first, second = (column.get_parameter(name) for column in fresh.columns[:2])
        torch.testing.assert_close(first, value)
        assert not torch.equal(second, value)
        torch.testing.assert_close(second.flatten().sort().values, value.flatten().sort().values)


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="PNN keeps what old tasks answer with as it is, and weight decay would move it"):
        PNN(example_model(), partial(SGD, lr=0.1, weight_decay=1e-4))
    with pytest.raises(TypeError, match="PNN shares out linear and convolutional layers, and VitTiny has other weights, in"):
        PNN(VitTiny((1, 8, 8), 6, patch=4, width=32, depth=1, heads=2))
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 6))
    with pytest.raises(TypeError, match="PNN gives layers further inputs, and 1 of Sequential has groups of them"):
        PNN(grouped)
    with pytest.raises(ValueError, match="adapter must be one of mlp, linear"):
        PNN(example_model(), adapter="conv")
