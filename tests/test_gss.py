"""GSS-greedy: gradients and cosines against autograd and Avalanche's plugin, and which samples are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from clstream.strategies import GSS
from clstream.strategies.gss import ScoredMemory
from conftest import built
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Samples, Strategy, run
from clstream.checks import example_stream, normed_model


def small(**options: object) -> GSS:
    return built(partial(GSS, **{"capacity": 30, "gradients": 3, **options}))


def unit_gradient(strategy: Strategy, samples: Samples) -> Tensor:
    """By autograd, of one mean loss."""
    loss = F.cross_entropy(strategy.model(samples.x), samples.y)
    slope = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(strategy.model.parameters()))])
    return slope / slope.norm()


def test_cosines_are_those_of_single_gradients() -> None:
    stream = example_stream()
    strategy = small()
    run(strategy, stream, max_sessions=1)
    kept, order = strategy.memory.all(), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    batch = stream.tasks[1].train[:12]
    references = strategy.references(order, 12)
    expected = torch.stack([unit_gradient(strategy, kept[rows]) for rows in order.split(12)])  # the last of 6 samples
    torch.testing.assert_close(references, expected, rtol=1e-4, atol=1e-6)
    single = torch.stack([unit_gradient(strategy, batch[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(strategy.similarities(batch, references), (single @ expected.T).amax(1), rtol=1e-4, atol=1e-6)
    whole = (expected @ unit_gradient(strategy, batch)).amax()
    torch.testing.assert_close(strategy.batch_similarity(batch, references), whole, rtol=1e-4, atol=1e-6)


def test_cosines_are_those_of_avalanche(avalanche: Callable[[str], ModuleType]) -> None:
    stream = example_stream()
    strategy = small()
    run(strategy, stream, max_sessions=1)
    kept, batch = strategy.memory.all(), stream.tasks[1].train[:8]
    theirs = avalanche("training.plugins").GSS_greedyPlugin(mem_size=30, mem_strength=3, input_size=[1, 8, 8])
    theirs.ext_mem_list_x, theirs.ext_mem_list_y, theirs.ext_mem_list_current_index = kept.x, kept.y, 30

    class Seen:
        """What the plugin reads of Avalanche's strategy."""

        device, model, _criterion = "cpu", strategy.model, torch.nn.CrossEntropyLoss()

    dims = [weight.numel() for weight in strategy.model.parameters()]
    torch.manual_seed(5)
    order = torch.randperm(30)
    torch.manual_seed(5)
    similarity, gradients = theirs.get_batch_sim(Seen(), dims, batch.x, batch.y)
    references = strategy.references(order, 8)
    torch.testing.assert_close(references, F.normalize(gradients, dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(strategy.batch_similarity(batch, references), similarity[0], rtol=1e-4, atol=1e-6)
    single = theirs.get_each_batch_sample_sim(Seen(), dims, gradients, batch.x, batch.y)
    torch.testing.assert_close(strategy.similarities(batch, references), single, rtol=1e-4, atol=1e-6)


def numbered(first: int, count: int) -> Samples:
    return Samples(torch.arange(first, first + count).float()[:, None], torch.arange(first, first + count))


@pytest.mark.slow
def test_of_samples_that_meet_each_is_replaced_by_its_chance() -> None:
    """Scores 0.8, 0.2 and -1: the last is never drawn, the others by (C + 1) / 2.01, and replaced by (C + 1) / (C + c + 2)."""
    left = torch.zeros(3)
    for trial in range(1000):
        memory = ScoredMemory(3)
        memory.random.manual_seed(trial)
        memory.fill(numbered(0, 3), torch.tensor([0.8, 0.2, -1.0]))
        memory.exchange(numbered(9, 1), torch.tensor([-0.4]))
        new = memory.all().y == 9
        left += new
        torch.testing.assert_close(memory.scores, torch.where(new, -0.4, torch.tensor([0.8, 0.2, -1.0])).double())
    expected = torch.tensor([1.8 / 3.0 * 1.8 / 2.4, 1.2 / 3.0 * 1.2 / 1.8, 0.0])
    assert (left / 1000 - expected).abs().max() < 0.05


def test_a_replaced_sample_leaves_its_score_and_its_label() -> None:
    memory = ScoredMemory(4)
    memory.fill(numbered(0, 4), torch.ones(4))
    memory.exchange(numbered(10, 9), torch.full((9,), -1.0))  # 2 to 0: each that is met goes
    assert memory.all().y.sort().values.tolist() == [10, 11, 12, 13]  # of more than there are, the first
    assert torch.equal(memory.all().x[:, 0], memory.all().y.float()) and memory.scores.tolist() == [-1.0] * 4


class Told(GSS):
    """GSS with cosines that the test says."""

    said: Any = (0.5, 0.5)

    def batch_similarity(self, samples: Samples, references: Tensor) -> Tensor:
        return torch.tensor(self.said[0])

    def similarities(self, samples: Samples, references: Tensor) -> Tensor:
        return torch.full((len(samples),), self.said[1])


def test_a_full_memory_takes_only_batches_that_point_elsewhere() -> None:
    strategy = built(partial(Told, capacity=20, gradients=3))
    run(strategy, example_stream(), max_sessions=1)
    assert strategy.memory.scores.tolist() == [pytest.approx(0.1)] * 8 + [0.5] * 12  # the first batch, and those after it
    before, batch = strategy.memory.all().x.clone(), example_stream().tasks[1].train[:8]
    strategy.offer(batch)
    assert torch.equal(strategy.memory.all().x, before)
    strategy.said = (-0.01, -1.0)
    strategy.offer(batch)
    assert int((strategy.memory.scores == -1).sum()) == 8 and int((strategy.memory.all().y >= 2).sum()) == 8


def test_each_iteration_is_a_step_on_the_batch_and_one_on_a_draw() -> None:
    stream = example_stream()
    strategy = small(iterations=2, optimizer=partial(SGD, lr=0.1))
    run(strategy, stream, max_sessions=1)
    twin = built(partial(Strategy, optimizer=partial(SGD, lr=0.1)))
    twin.model.load_state_dict(strategy.model.state_dict())
    batch = next(iter(next(iter(stream.session(1)))))
    state = strategy.memory.random.get_state()
    first, second = strategy.draw(batch.samples)
    assert not {tuple(x.flatten().tolist()) for x in first.x} & {tuple(x.flatten().tolist()) for x in second.x}
    strategy.memory.random.set_state(state)
    strategy.learn(batch)
    for samples in (batch.samples, first, batch.samples, second):
        twin.minimise(twin.loss(samples))
    for ours, expected in zip(strategy.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_batch_norm_and_dropout_are_asked_in_evaluation_mode_and_go_on_as_they_were() -> None:
    strategy = GSS(normed_model(), capacity=30, gradients=3)
    strategy.model.stages[1].eval()  # frozen by the user
    run(strategy, example_stream(), max_sessions=1)
    assert strategy.model.training and not strategy.model.stages[1].training and strategy.model.stages[4].training
    batch = example_stream().tasks[1].train[:8]
    strategy.model.eval()
    references = strategy.references(torch.arange(30), 8)
    assert torch.equal(references, strategy.references(torch.arange(30), 8))
    torch.testing.assert_close(references[0], unit_gradient(strategy, strategy.memory.all()[:8]), rtol=1e-4, atol=1e-6)
    assert strategy.similarities(batch, references).shape == (8,)
