"""CoPE: the pseudo-prototypical proxy loss worked pair by pair, prototypes that follow, and Avalanche's plugin step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from clstream.strategies import CoPE
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchReady, Samples, on, run
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated

SMALL = {"capacity": 30, "alpha": 0.9, "width": 16}


def small(**options: object) -> CoPE:
    return built(partial(CoPE, **{**SMALL, **options}))


def ppp_by_hand(z: Tensor, y: Tensor, prototypes: dict[int, Tensor], temperature: float, *, frozen: bool = False) -> Tensor:
    """The equations of the docstring, one pair at a time, in the dtype of z."""

    def share(c: int, of: Tensor, proxy: Tensor) -> Tensor:
        others = [(p @ of / temperature).exp() for k, p in prototypes.items() if k != c]
        mine = (proxy @ of / temperature).exp()
        return mine / (mine + sum(others))

    total = torch.zeros((), dtype=z.dtype)
    labels = y.tolist()
    for i, c in enumerate(labels):
        same = [j for j, k in enumerate(labels) if k == c]
        near = [share(c, z[i], z[j].detach()) for j in same if j != i] + [share(c, z[i], prototypes[c])]
        total = total + (sum(near) / len(same)).log()
        for j, k in enumerate(labels):
            if k != c:
                proxy = z[i].detach() if frozen else z[i]
                total = total + (1 - (share(c, z[j], proxy) + share(c, z[j], prototypes[c])) / 2).log()
    return -total / len(labels)


class Watch:
    """Takes down the prototypes and embeddings before the only step."""

    strategy: CoPE

    @on(BatchReady)
    def look(self, event: BatchReady) -> None:
        samples = event.batch.samples
        self.z, self.y, self.prototypes = self.strategy.embed(samples.x).detach(), samples.y, self.strategy.prototypes.clone()


def drawn_case(classes: int = 5) -> tuple[CoPE, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    strategy = small()
    strategy.prototypes = F.normalize(torch.randn(6, 16, generator=draw, dtype=torch.float64), dim=1)
    strategy.labels, strategy.came = torch.arange(6), torch.arange(6) < classes
    z = F.normalize(torch.randn(9, 16, generator=draw, dtype=torch.float64), dim=1).requires_grad_()
    return strategy, z, torch.tensor([0, 1, 1, 0, 2, 2, 2, 3, 0]).clamp(max=classes - 1)


@pytest.mark.parametrize("classes", [5, 2])
def test_the_loss_and_its_gradient_are_those_of_the_equations(classes: int) -> None:
    strategy, z, y = drawn_case(classes)
    loss = strategy.ppp_loss(z, y)
    (slope,) = torch.autograd.grad(loss, z)
    prototypes = {c: p for c, p in enumerate(strategy.prototypes) if strategy.came[c]}
    expected = ppp_by_hand(z, y, prototypes, 0.1)
    (expected_slope,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, expected_slope)


def test_the_loss_of_two_samples_is_what_paper_and_pencil_give() -> None:
    """Two classes at right angles, T = 1: each P of the first sum is e / (e + 1), each of the second 1 / (1 + e)."""
    strategy = small(temperature=1.0, width=2)
    strategy.prototypes, strategy.labels, strategy.came = torch.eye(2).double(), torch.arange(2), torch.ones(2, dtype=torch.bool)
    e = torch.tensor(1.0).double().exp()
    expected = -(2 * (e / (e + 1)).log() + 2 * (1 - 1 / (1 + e)).log()) / 2
    torch.testing.assert_close(strategy.ppp_loss(torch.eye(2).double(), torch.tensor([0, 1])), expected)


def test_of_one_class_alone_there_is_nothing_to_learn() -> None:
    strategy, z, _ = drawn_case(classes=1)
    y = torch.zeros(9, dtype=torch.int64)
    loss = strategy.ppp_loss(z, y)
    assert loss.item() == 0 and not torch.autograd.grad(loss, z)[0].any()


def test_it_stays_finite_at_a_low_temperature() -> None:
    strategy, z, y = drawn_case()
    z = z.detach().float().requires_grad_()
    strategy.prototypes, strategy.temperature = strategy.prototypes.float(), 0.001
    loss = strategy.ppp_loss(z, y)
    assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_the_loss_is_of_the_embeddings_of_the_batch_and_the_draw() -> None:
    stream = example_stream()
    strategy = small()
    run(strategy, stream, max_sessions=1)
    batch, drawn = stream.tasks[1].train[:5], strategy.memory.all()[:4]
    strategy.add_prototypes([2, 3, 4, 5])
    before = strategy.prototypes.clone()
    loss = strategy.objective_with(batch, (drawn,))
    both = batch + drawn
    embedded = F.linear(strategy.model.features(both.x), strategy.embedding.weight, strategy.embedding.bias)
    z = embedded / embedded.norm(dim=1, keepdim=True)
    expected = ppp_by_hand(z.double(), both.y, {c: before[c].double() for c in (0, 1, 2, 3)}, 0.1)
    torch.testing.assert_close(loss.double(), expected)
    assert strategy.came.tolist() == [True] * 4 + [False] * 2  # those of the batch came with it


def test_prototypes_follow_the_embeddings_of_before_the_step() -> None:
    stream = example_stream(batch_size=60)
    strategy, before = small(optimizer=partial(SGD, lr=1.0)), Watch()
    before.strategy = strategy
    run(strategy, stream, before, max_sessions=1)
    for label in (0, 1):
        mean = before.z[before.y == label].mean(0)
        moved = 0.9 * before.prototypes[label] + 0.1 * mean
        torch.testing.assert_close(strategy.prototypes[label], moved / moved.norm())
    assert strategy.came.tolist() == [True] * 2 and strategy.labels.tolist() == [0, 1]
    assert float(before.prototypes.min()) >= 0
    torch.testing.assert_close(before.prototypes.norm(dim=1), torch.ones(2))


class AsAvalanche(CoPE):
    """CoPE with what Avalanche's plugin does otherwise."""

    def proxies(self, z: Tensor) -> Tensor:
        return z.detach()

    def means(self, z: Tensor, y: Tensor) -> Tensor:
        return F.normalize(super().means(z, y), dim=1)


def test_steps_are_those_of_avalanche(avalanche: Callable[[str], ModuleType]) -> None:
    """From the same weights, prototypes and batches, five steps give the same weights and prototypes."""
    plugins = avalanche("training.plugins")
    with isolated(0, "strategy"):
        ours = AsAvalanche(example_model(), partial(SGD, lr=0.05), **SMALL)
    ours.add_prototypes(list(range(6)))
    ours.classes = 6
    ours.came[:] = True
    net = nn.Sequential(*example_model().stages, nn.Linear(32, 16))
    net[-1].load_state_dict(ours.embedding.state_dict())
    theirs = plugins.CoPEPlugin(n_classes=6, p_size=16, alpha=0.9, T=0.1)
    theirs.p_mem.update({c: p[None].clone() for c, p in enumerate(ours.prototypes)})
    optimizer = SGD(net.parameters(), 0.05)
    stream = example_stream()

    class Seen:
        """What the plugin reads of Avalanche's strategy."""

        device = "cpu"
        mb_y: Any
        mb_output: Any

    for number in range(5):
        samples: Samples = stream.tasks[number % 3].train[8 * number : 8 * number + 8] + stream.tasks[0].train[:4]
        loss = ours.objective_with(samples, ())
        ours.minimise(loss)
        z, y = ours.embedded
        ours.prototypes = F.normalize(0.9 * ours.prototypes + 0.1 * ours.means(z, y), dim=1).where(
            (ours.means(z, y) != 0).any(1, keepdim=True), ours.prototypes
        )
        seen = Seen()
        seen.mb_y, seen.mb_output = samples.y, F.normalize(net(samples.x), dim=1)
        theirs.after_forward(seen)
        expected = theirs.ppp_loss(seen.mb_output, samples.y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        theirs._update_prototypes()
        torch.testing.assert_close(loss, expected)
    for c, prototype in enumerate(ours.prototypes):
        torch.testing.assert_close(prototype, theirs.p_mem[c][0])
    torch.testing.assert_close(ours.embedding.weight, net[-1].weight)
    x = stream.tasks[0].test[:].x
    answers = theirs._get_nearest_neigbor_distr(F.normalize(net(x), dim=1)).argmax(1)
    ours.memory.add(stream.tasks[0].train[:8])
    assert torch.equal(ours.predict(x), answers)


def test_an_answer_is_the_nearest_prototype_of_a_class_that_came() -> None:
    stream = example_stream()
    strategy = small()
    run(strategy, stream, max_sessions=2)
    x = torch.cat([task.test.x for task in stream.tasks])
    scores = strategy.scores(x)
    assert torch.isinf(scores[:, 4:]).all()
    torch.testing.assert_close(scores[:, :4], strategy.embed(x).detach() @ strategy.prototypes[:4].T / 0.1)
    assert strategy.memory.all().y.bincount().tolist() == [8, 8, 7, 7]


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(TypeError, match=r"CoPE needs a model with a method `features` and a linear `head`.*Linear hasn't"):
        CoPE(nn.Linear(3, 2))
