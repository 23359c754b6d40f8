"""HAT: steps against a loop by hand with gates on activations, old answers, and what it refuses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from clstream.strategies import HAT
from clstream.strategies.hat import capacity
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, BatchReady, TaskEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.models import ConvNet, LeNet, Mlp
from clstream.seeds import isolated


def test_capacity_is_the_mean_gate_of_units_not_in_use() -> None:
    gates = [torch.tensor([0.5, 1.0]), torch.tensor([0.2, 0.0, 0.4])]
    used = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0, 1.0])]
    torch.testing.assert_close(capacity(gates, used), torch.tensor((0.5 + 0.1) / 2.5))
    assert capacity(gates, [torch.ones(2), torch.ones(3)]) == 0


class Note:
    """Takes down the batches of each task, and the embeddings that it begins with."""

    def __init__(self, strategy: HAT) -> None:
        self.strategy = strategy
        self.batches = list[tuple[int, Tensor, Tensor]]()
        self.embeddings = dict[int, list[Tensor]]()

    @on(BatchReady)
    def note(self, event: BatchReady) -> None:
        number = event.batch.task.id
        self.batches.append((number, event.batch.samples.x, event.batch.samples.y))
        self.embeddings.setdefault(number, [own.detach().clone() for own in self.strategy.embeddings[-1]])


def by_hand(model: nn.Module, note: Note, batches_a_task: int, s_max: float, lamb: float, lr: float) -> list[list[Tensor]]:
    """The authors' steps on an Mlp of two hidden layers, with gates on activations; return the embeddings of each task."""
    first, second, head = model.stages.layer1, model.stages.layer2, model.head
    cumulative, learned = [torch.zeros(12), torch.zeros(9)], []
    for task in range(2):
        embeddings = [own.clone().requires_grad_(True) for own in note.embeddings[task]]
        own = [(x, y) for number, x, y in note.batches if number == task]
        for step, (x, y) in enumerate(own):
            s = 1 / s_max + (s_max - 1 / s_max) * step / (batches_a_task - 1)
            gates = [(s * embedding).sigmoid() for embedding in embeddings]
            h = F.linear(x.flatten(1) / 255, first.weight, first.bias).relu() * gates[0]
            h = F.linear(h, second.weight, second.bias).relu() * gates[1]
            outputs = F.linear(h, head.weight, head.bias)[:, 2 * task : 2 * task + 2]
            spent = sum((gate * (1 - before)).sum() for gate, before in zip(gates, cumulative, strict=True))
            loss = F.cross_entropy(outputs, y - 2 * task) + lamb * spent / sum((1 - before).sum() for before in cumulative)
            weights = [first.weight, first.bias, second.weight, second.bias, head.weight, head.bias]
            slopes = list(torch.autograd.grad(loss, [*weights, *embeddings]))
            slopes[0] = slopes[0] * (1 - cumulative[0])[:, None]
            slopes[1] = slopes[1] * (1 - cumulative[0])
            slopes[2] = slopes[2] * (1 - torch.minimum(cumulative[1][:, None], cumulative[0][None]))
            slopes[3] = slopes[3] * (1 - cumulative[1])
            with torch.no_grad():
                for place, embedding in enumerate(embeddings, 6):
                    steep = (torch.cosh((s * embedding).clamp(-50, 50)) + 1) / (torch.cosh(embedding) + 1)
                    slopes[place] = slopes[place] * s_max / s * steep
                for weight, slope in zip([*weights, *embeddings], slopes, strict=True):
                    weight -= lr * slope
                for embedding in embeddings:
                    embedding.clamp_(-6, 6)
        with torch.no_grad():
            cumulative = [torch.maximum(c, (s_max * e).sigmoid()) for c, e in zip(cumulative, embeddings, strict=True)]
        learned.append([embedding.detach() for embedding in embeddings])
    return learned


def test_the_steps_are_those_of_the_authors() -> None:
    stream = example_stream((0, 1), batch_size=10)
    with isolated(0, "model"):
        model, copy = (Mlp((1, 8, 8), 6, hidden=(12, 9)) for _ in range(2))
    copy.load_state_dict(model.state_dict())
    strategy = HAT(model, partial(SGD, lr=0.05), s_max=20.0)
    run(strategy, stream, note := Note(strategy))
    learned = by_hand(copy, note, 6, 20.0, 0.75, 0.05)
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for task, embeddings in enumerate(learned):
        for ours, theirs in zip(strategy.embeddings[task], embeddings, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-5)


def test_s_goes_from_1_over_s_max_to_s_max_in_each_pass() -> None:
    strategy = built(partial(HAT, s_max=100.0))
    values = list[float]()

    class Look:
        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            values.append(strategy.s)

    run(strategy, example_stream((0,), epochs=2, batch_size=20), Look())
    assert values == pytest.approx([0.01, 50.005, 100.0] * 2) and not math.isnan(sum(values))


def remembered(gates: str, model: nn.Module, lr: float = 0.05) -> tuple[HAT, list[Tensor], Tensor]:
    """Run it, and return what each task's network answered when its task ended, for all inputs."""
    stream = example_stream((0, 1, 0, 2), epochs=3)
    x = torch.cat([task.test.x for task in stream.tasks])
    with isolated(0, "strategy"):
        strategy = HAT(model, partial(SGD, lr=lr, momentum=0.9), gates=gates)
    answers = list[Tensor]()

    class Remember:
        @on(TaskEnded)
        def look(self, event: TaskEnded) -> None:
            place = len(strategy.tasks) - 1
            answers.append(strategy.masked(strategy.outputs_of(x, place), place).detach())

    run(strategy, stream, Remember())
    return strategy, answers, x


@pytest.mark.parametrize("model", [example_model, partial(ConvNet, (1, 8, 8), 6, (4, 5, 6), 7), partial(LeNet, (1, 8, 8), 6)])
def test_with_hard_gates_old_answers_are_the_same_bits(model: partial[nn.Module]) -> None:
    with isolated(0, "model"):
        net = model()
    strategy, answers, x = remembered("hard", net)
    with torch.no_grad():
        for place, answer in enumerate(answers):
            assert torch.equal(strategy.masked(strategy.outputs_of(x, place), place), answer)
    assert all(set(used.unique().tolist()) <= {0.0, 1.0} for used in strategy.used)


def test_with_sigmoids_old_answers_hardly_change() -> None:
    strategy, answers, x = remembered("sigmoid", example_model())
    with torch.no_grad():
        for place, answer in enumerate(answers):
            now = strategy.masked(strategy.outputs_of(x, place), place)
            torch.testing.assert_close(now.softmax(1), answer.softmax(1), rtol=0, atol=0.05)
            assert torch.equal(now.argmax(1), answer.argmax(1))


def test_a_gate_on_a_channel_is_one_on_its_columns() -> None:
    """Of a convolutional network, against gates that hooks put on what its layers are given."""
    with isolated(0, "model"):
        model = ConvNet((1, 8, 8), 6, (4, 5, 6), 7)
    strategy = HAT(model)
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    gates = [torch.rand(units) for units in (4, 5, 6, 7)]
    ours = strategy.gated(x, gates)
    for gate, name in zip(gates, [*strategy.layers[1:], "head"], strict=True):

        def scaled(module: nn.Module, given: tuple[Tensor], gate: Tensor = gate) -> Tensor:
            (h,) = given
            return h * (gate.view(1, -1, 1, 1) if h.dim() == 4 else gate.repeat_interleave(h.shape[1] // len(gate)))

        model.get_submodule(name).register_forward_pre_hook(scaled)
    torch.testing.assert_close(ours, model(x))


class Skipping(nn.Module):
    """A network whose first layer is given to the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1) / 255)
        return self.head(h + self.second(h))


class ChannelsLast(nn.Module):
    """A network that flattens the places of an image before its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x / 255).relu().movedim(1, -1).flatten(1))


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    for seed in range(30):  # whatever the weights are, units that a ReLU shuts off too
        with isolated(seed, "model"):
            channels_last, skipping = HAT(ChannelsLast()), HAT(Skipping())
        with pytest.raises(TypeError, match=r"in ChannelsLast the outputs of 'first' don't go through the layer .* in their order"):
            run(channels_last, example_stream())
        with pytest.raises(TypeError, match="chain, and in Skipping the outputs of 'first' don't go through the layer"):
            run(skipping, example_stream())
    with pytest.raises(ValueError, match="HAT keeps what old tasks answer with as it is, and weight decay would move it"):
        HAT(example_model(), partial(SGD, lr=0.1, weight_decay=1e-4))
    for wrong in ({"s_max": 0.5}, {"lamb": -1}, {"gates": "soft"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HAT(example_model(), **wrong)
