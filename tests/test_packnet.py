"""PackNet: owners and pruning by hand, answers that stay the same bits, and Avalanche's PackNet with the same batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import HAT, PackNet
from clstream.streams import blobs
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchLearned, Strategy, TaskEnded, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.models import Mlp, ResNet18, VitTiny
from clstream.seeds import isolated

PLAIN, MOMENTUM = partial(SGD, lr=0.05), partial(SGD, lr=0.05, momentum=0.9)


class Remember:
    """Takes down what each task's network answers when the task ends."""

    def __init__(self, strategy: Strategy, x: Tensor) -> None:
        self.strategy, self.x, self.answers = strategy, x, list[Tensor]()

    @on(TaskEnded)
    def look(self, event: TaskEnded) -> None:
        place = len(self.strategy.tasks) - 1
        self.answers.append(self.strategy.masked(self.strategy.outputs_of(self.x, place), place).detach())


@pytest.mark.parametrize("model", [example_model, normed_model, partial(example_model, head="growing")])
@pytest.mark.parametrize("optimizer", [MOMENTUM, partial(Adam, lr=0.01)])
def test_old_answers_are_the_same_bits(model: Callable[[], nn.Module], optimizer: object) -> None:
    stream = example_stream((0, 1, 0, 2), epochs=2)
    x = torch.cat([task.test.x for task in stream.tasks])
    with isolated(0, "strategy"):
        strategy = PackNet(model(), optimizer)

    class Resting(Remember):
        @on(TaskEnded)
        def look(self, event: TaskEnded) -> None:
            self.strategy.model.eval()  # dropout rests
            super().look(event)
            self.strategy.model.train()
            self.strategy.rest_norms(True)

    run(strategy, stream, remember := Resting(strategy, x))
    strategy.model.eval()
    with torch.no_grad():
        for place, answer in enumerate(remember.answers):
            assert torch.equal(strategy.masked(strategy.outputs_of(x, place), place), answer)
    assert strategy.tasks == [0, 1, 0, 2] and strategy.newest() == [1, 2, 3]


def test_the_smaller_half_of_a_task_is_freed_in_each_layer() -> None:
    stream = example_stream()
    strategy = built(partial(PackNet, prune=[0.5, 0.75], retrain=0.25))
    before: dict[str, Tensor] = {}

    class Look:
        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            weight, owner = strategy.model.get_parameter(name), strategy.owner[name]
            assert strategy.pruned == (event.batch.index >= 6)  # 8 batches, of which a quarter is the last part
            if event.batch.index == 5:
                before[len(strategy.tasks)] = weight.detach().clone()
            if event.batch.index == 6 and len(strategy.tasks) == 1:
                smaller = before[1].abs() <= before[1].abs().flatten().sort().values[1023]
                assert torch.equal(owner == 0, smaller)
                assert not weight[smaller].any()
            if strategy.pruned:
                assert not weight[owner == 0].any()

    (name,) = [f"{layer}.weight" for layer in strategy.layers]
    run(strategy, stream, Look())
    assert strategy.owner[name].numel() == 2048 and strategy.head == "head"
    # half of 2048, then a quarter of the 1024 that are free, then a quarter of 768
    assert strategy.owner[name].flatten().bincount().tolist() == [576, 1024, 256, 192]


def test_biases_learn_in_the_first_task_alone() -> None:
    strategy = built(PackNet)
    run(strategy, example_stream(), max_sessions=1)
    layer = strategy.model.get_submodule(strategy.layers[0])
    bias, weight = layer.bias.detach().clone(), layer.weight.detach().clone()
    again = built(PackNet)
    run(again, example_stream())
    layer = again.model.get_submodule(again.layers[0])
    assert torch.equal(layer.bias, bias) and not torch.equal(layer.weight, weight)
    owned = strategy.owner[f"{strategy.layers[0]}.weight"] == 1
    assert torch.equal(layer.weight[owned], weight[owned])


def test_without_the_task_the_network_that_is_surest_answers() -> None:
    stream = example_stream(epochs=3)
    strategy = built(PackNet)
    run(strategy, stream)
    x = torch.cat([task.test.x for task in stream.tasks])
    with torch.no_grad():
        expected = torch.cat([strategy.outputs_of(x, place)[:, 2 * place : 2 * place + 2].log_softmax(1) for place in range(3)], 1)
    torch.testing.assert_close(strategy.scores(x), expected)
    assert torch.equal(strategy.predict(x, stream.tasks[1]), expected[:, 2:4].argmax(1) + 2)


def test_tasks_that_share_classes_have_networks_of_their_own() -> None:
    stream = blobs(tasks=2, classes=4, scenario="domain")
    with isolated(0, "model"):
        strategy = PackNet(Mlp(stream.input_shape, stream.classes, hidden=(16,)))
    run(strategy, stream)
    assert strategy.shares_classes and not strategy.scores_ignore_task
    x = stream.tasks[0].test[:].x
    with torch.no_grad():
        for place, task in enumerate(stream.tasks):
            torch.testing.assert_close(strategy.scores(x, task), strategy.outputs_of(x, place).log_softmax(1))
    assert torch.equal(strategy.scores(x), strategy.scores(x, stream.tasks[1]))


def test_it_is_avalanches_packnet(avalanche: Callable[[str], ModuleType]) -> None:
    """The same weights after two tasks of 12 batches, pruned after 8, with their module and a loop around it.

    They let pruned weights begin the next task with what they were: here they are put to 0, as the authors and we do.
    """
    stream = example_stream((0, 1), epochs=2, batch_size=10)
    with isolated(0, "model"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 6))
        model = nn.Sequential(Scaled(), model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    strategy = PackNet(model, PLAIN, prune=0.5, retrain=1 / 3)
    batches = list[tuple[int, Tensor, Tensor]]()

    class Note:
        @on(BatchLearned)
        def note(self, event: BatchLearned) -> None:
            batches.append((event.batch.task.id, event.batch.samples.x, event.batch.samples.y))

    run(strategy, stream, Note())
    hidden, head = nn.Linear(64, 30), nn.Linear(30, 6)
    hidden.load_state_dict({"weight": start["1.1.weight"], "bias": start["1.1.bias"]})
    head.load_state_dict({"weight": start["1.3.weight"], "bias": start["1.3.bias"]})
    theirs = avalanche("models.packnet").PackNetModel(hidden)
    for number in range(2):
        own = [(x, y) for task, x, y in batches if task == number]
        optimizer = PLAIN([*theirs.parameters(), *head.parameters()])
        for step, (x, y) in enumerate(own):
            if step == 8:
                theirs.prune(0.5)
                hidden.weight.data[theirs.wrappee.pruned_mask] = 0
            features = theirs(x.flatten(1) / 255, torch.full((len(x),), number)).relu()
            loss = F.cross_entropy(head(features)[:, 2 * number : 2 * number + 2], y - 2 * number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        theirs.freeze_pruned()
    assert len(batches) == 24
    index = theirs.wrappee.task_index
    ours = strategy.owner["1.1.weight"]
    assert torch.equal(torch.where(index < 2, index + 1, 0).to(torch.uint8), ours)
    torch.testing.assert_close(strategy.model[1][1].weight[ours > 0], hidden.weight[ours > 0])
    torch.testing.assert_close(strategy.model[1][1].bias, hidden.bias)
    torch.testing.assert_close(strategy.model[1][3].weight, head.weight)


class Scaled(nn.Module):
    """Bytes to floats from 0 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 255


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="PackNet keeps what old tasks answer with as it is, and weight decay would move it"):
        PackNet(example_model(), partial(SGD, lr=0.1, weight_decay=1e-4))
    vit = VitTiny((1, 8, 8), 6, patch=4, width=32, depth=1, heads=2)
    with pytest.raises(TypeError, match="PackNet shares out linear and convolutional layers, and VitTiny has other weights, in"):
        PackNet(vit)
    with pytest.raises(TypeError, match="HAT shares out linear and convolutional layers, and ResNet18 has other weights, in"):
        HAT(ResNet18((3, 8, 8), 6, width=4))
    PackNet(ResNet18((3, 8, 8), 6, width=4))
    with pytest.raises(TypeError, match="PackNet shares out the layers below the head, and Linear has none"):
        PackNet(nn.Linear(4, 6))
    with pytest.raises(TypeError, match="PackNet takes a network with a linear head, and Conv2d has none"):
        PackNet(nn.Conv2d(1, 4, 3))
    for wrong in ({"prune": []}, {"prune": 1.5}, {"prune": [0.5, -1]}, {"retrain": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PackNet(example_model(), **wrong)
