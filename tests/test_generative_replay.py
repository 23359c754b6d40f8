"""DGR: the generator's losses in closed form, what is replayed, weighed and labelled, and Avalanche's steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import DGR
from clstream.streams import blobs
from conftest import built
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.distributions import Categorical as Shares
from torch.nn import functional as F
from torch.optim import SGD

from clstream import TaskEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.models import Mlp
from clstream.models.vae import VAE, Latent
from clstream.seeds import isolated
from clstream.strategy.generative_replay import unit
from clstream.stream import Samples, Stream

SMALL = {"hidden": (16, 12), "latent": 5}


def small(**options: object) -> DGR:
    return built(partial(DGR, **{**SMALL, **options}))


def test_the_vae_minimises_the_bound_of_kingma_and_welling() -> None:
    """Per pixel: -log p(x | z) of the z that is drawn, and the exact divergence from a unit normal."""
    with isolated(0):
        vae, x = VAE((1, 4, 4), (7, 6), 3), torch.rand(5, 1, 4, 4).round()
    with isolated(1):
        loss = vae.loss(x)
    with isolated(1):
        features = vae.encoder(x)
        mean, deviation = vae.latent.mean(features), (vae.latent.log_variance(features) / 2).exp()
        z = mean + deviation * torch.randn_like(mean)
    first, second = vae.latent.layers
    decoded = F.linear(second(first(z).relu()).relu(), vae.latent.output.weight, vae.latent.output.bias)
    likelihood = Bernoulli(logits=decoded).log_prob(x.flatten(1)).sum(1)
    divergence = kl_divergence(Normal(mean, deviation), Normal(torch.zeros(3), torch.ones(3))).sum(1)
    torch.testing.assert_close(loss, (divergence - likelihood).mean() / 16)
    assert [layer.out_features for layer in vae.latent.layers] == [6, 7]  # the decoder mirrors the encoder


def test_squared_errors_are_those_of_unit_normals() -> None:
    with isolated(0):
        vae, x = VAE((6,), (7,), 3, "mse"), 5 * torch.randn(4, 6)
    with isolated(1):
        loss = vae.loss(x)
    with isolated(1):
        mean, log_variance, z = vae.latent.encode(vae.encoder(x))
    likelihood = Normal(vae.latent.inputs(z), 1.0).log_prob(x).sum(1) + 3 * math.log(2 * math.pi)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(loss, (divergence - likelihood).mean() / 6)


def test_with_classes_the_prior_is_a_mixture_and_gates_switch_units_off() -> None:
    with isolated(0):
        latent = Latent(4, 3, (50,), (6,), classes=4, gated=0.7)
        z, mean, log_variance = torch.randn(3, 5, 3)
    shares = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.1, 0.7, 0.1, 0.1]])
    every = torch.arange(4)
    each = Independent(Normal(latent.prior_mean[None], (latent.prior_log_variance / 2).exp()[None]), 1)
    own = Independent(Normal(mean, (log_variance / 2).exp()), 1).log_prob(z)
    expected = own - MixtureSameFamily(Shares(shares), each).log_prob(z)
    torch.testing.assert_close(latent.divergence(mean, log_variance, z, every, shares), expected)
    one = F.one_hot(torch.tensor([3, 1, 0, 0, 2]), 4).float()  # a label: its normal alone
    torch.testing.assert_close(latent.divergence(mean, log_variance, z, every, one), own - (each.log_prob(z[:, None]) * one).sum(1))
    hidden = (latent.layers[0](z) * (shares @ latent.gates0)).relu()
    torch.testing.assert_close(latent.decode(z, every, shares), latent.output(hidden))
    assert set(latent.gates0.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < latent.gates0.mean() < 0.4
    latent.divergence(mean, log_variance, z, every, one).sum().backward()
    assert torch.isfinite(latent.prior_mean.grad).all() and latent.prior_mean.grad.abs().sum() > 0


def test_samples_of_a_class_are_of_its_normal() -> None:
    latent = Latent(4, 2, (), (2,), "mse", classes=2)
    with torch.no_grad():
        latent.prior_mean.copy_(torch.tensor([[1.0, 2.0], [-3.0, 4.0]]))
        latent.prior_log_variance.copy_(torch.tensor([[-20.0, -20.0], [0.0, math.log(4.0)]]))
        latent.output.weight.copy_(torch.eye(2))
        latent.output.bias.zero_()
    x = latent.sample(20_000, torch.Generator().manual_seed(0), torch.arange(20_000) % 2)
    torch.testing.assert_close(x[::2], torch.tensor([[1.0, 2.0]]).expand(10_000, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(x[1::2].mean(0), torch.tensor([-3.0, 4.0]), atol=0.06, rtol=0)
    torch.testing.assert_close(x[1::2].std(0), torch.tensor([1.0, 2.0]), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("scenario", "distill", "importance"),
    [("class", False, None), ("class", True, 0.9), ("task", False, 0.9), ("task", True, None), ("domain", True, None)],
)
def test_the_loss_is_the_paper_s(scenario: str, distill: bool, importance: float | None) -> None:
    stream = example_stream(scenario=scenario)
    strategy = small(distill=distill, importance=importance)
    run(strategy, stream, max_sessions=2)
    strategy.task_classes = torch.tensor(stream.tasks[2].classes)  # as when the third task begins
    strategy.seen_classes = torch.cat([strategy.old_classes, strategy.task_classes]).unique()
    batch = stream.tasks[2].train[:8]
    (drawn,) = strategy.draw(batch)
    with isolated(3):
        loss = strategy.objective_with(batch, (drawn,))
    with isolated(3):
        generator_new, generator_old = strategy.generator.loss(batch.x / 255), strategy.generator.loss(drawn.x)
    heads = [[0, 1], [2, 3]] if scenario == "task" else [[0, 1, 2, 3]]
    own = [4, 5] if scenario == "task" else [0, 1, 2, 3, 4, 5]
    if scenario == "domain":
        heads, own = [strategy.old_classes.tolist()], strategy.seen_classes.tolist()
    new = F.cross_entropy(strategy.model(batch.x)[:, own], torch.tensor([own.index(label) for label in batch.y.tolist()]))
    outputs, before, old = strategy.model(drawn.x), strategy.teacher(drawn.x), []
    for head in heads:
        competing = head if scenario == "task" else own
        if distill:
            targets = torch.zeros(8, 6).index_copy(1, torch.tensor(head), (before[:, head] / 2).softmax(1))
            old.append(-4 * (targets[:, competing] * (outputs[:, competing] / 2).log_softmax(1)).sum(1).mean())
        else:
            labels = torch.tensor(head)[before[:, head].argmax(1)]
            places = torch.tensor([competing.index(label) for label in labels.tolist()])
            old.append(F.cross_entropy(outputs[:, competing], places))
    share = 1 / 3 if importance is None else importance
    expected = share * (new + generator_new) + (1 - share) * (torch.stack(old).mean() + generator_old)
    torch.testing.assert_close(loss, expected)
    if scenario == "class":
        assert torch.equal(drawn.y, before[:, :4].argmax(1))


class AtTaskEnd:
    """Takes down copies of solver and generator when a task ends."""

    def __init__(self, strategy: DGR) -> None:
        self.strategy, self.copies = strategy, list[tuple[dict[str, Tensor], dict[str, Tensor]]]()

    @on(TaskEnded)
    def copy(self, event: TaskEnded) -> None:
        """Keep what is there."""
        self.copies.append(deepcopy((self.strategy.model.state_dict(), self.strategy.generator.state_dict())))


def test_the_last_scholar_replays_and_neither_learns_nor_is_changed() -> None:
    strategy, stream = small(), example_stream()
    run(strategy, stream, ends := AtTaskEnd(strategy), max_sessions=2)
    teacher, generator = strategy.teacher, strategy.teacher_generator
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, ends.copies[1][0][name])
    for name, value in generator.state_dict().items():
        assert torch.equal(value, ends.copies[1][1][name])
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    (drawn,) = strategy.draw(stream.tasks[2].train[:5])
    assert drawn.x.shape == (5, 1, 8, 8) and 0 <= drawn.x.min() <= drawn.x.max() <= 1
    torch.testing.assert_close(drawn.extra["before"], teacher(drawn.x))
    assert small(replay_batch=3).draw(stream.tasks[0].train[:5]) == ()  # nothing to replay in the first task


def test_solver_and_generator_share_nothing() -> None:
    """So one optimizer for both, whose steps are elementwise, is one for each."""
    strategy = small()
    samples = example_stream().tasks[0].train[:8]
    strategy.objective(samples).backward()
    both = [parameter.grad.clone() for parameter in strategy.generator.parameters()]
    for group in strategy.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    strategy.loss_of_outputs(strategy.model(samples.x), samples).backward()
    assert all(parameter.grad is None for parameter in strategy.generator.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in both)


def test_any_numbers_are_replayed_with_squared_errors() -> None:
    stream = blobs(tasks=2, classes=4)
    model = Mlp(stream.input_shape, 4, hidden=(16,))
    with pytest.raises(ValueError, match="DGR with reconstruction='bce' decodes images of bytes, or of numbers from 0 to 1, not"):
        run(DGR(model, **SMALL), stream)
    strategy = DGR(model, reconstruction="mse", **SMALL)
    run(strategy, stream)
    assert strategy.draw(stream.tasks[0].train[:50])[0].x.min() < 0
    assert unit(torch.tensor([255], dtype=torch.uint8)).item() == 1


def floats(stream: Stream, shape: tuple[int, ...] = (1, 8, 8)) -> Stream:
    """Return a stream with its inputs from 0 to 1, in another shape."""

    def part(samples: Samples) -> Samples:
        return Samples(samples.x.view(-1, *shape) / 255, samples.y)

    tasks = [replace(task, train=part(task.train[:]), test=part(task.test[:])) for task in stream.tasks]
    return replace(stream, tasks=tasks)


class Constant(nn.Module):
    """A generator for Avalanche that draws one image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image)

    def generate(self, n: int) -> Tensor:
        """Return it so often."""
        return self.image.detach().expand(n, *self.image.shape)


def test_against_avalanche_s_steps(avalanche: Callable[[str], ModuleType]) -> None:
    """Both replay one image, with which Avalanche's joined batch is an importance of 1/2: the same weights."""
    from clstream.strategies.avalanche import AvalancheStrategy, strategy_class

    stream = floats(example_stream(batch_size=20))  # theirs joins the batch and what is drawn before the network's first layer
    with isolated(4):
        image = torch.rand(1, 8, 8)
    ours = built(partial(DGR, optimizer=partial(SGD, lr=0.1), importance=0.5, active_classes="all", **SMALL))
    with torch.no_grad():
        ours.generator.latent.output.weight.zero_()
        ours.generator.latent.output.bias.copy_(image.logit().flatten())
    ours.optimizer.param_groups[1]["lr"] = 0.0
    plugin = avalanche("training.plugins").GenerativeReplayPlugin
    naive = strategy_class("Naive")
    generator = type("Learner", (), {"model": Constant(image)})()
    theirs: AvalancheStrategy = naive(example_model(), partial(SGD, lr=0.1), plugins=[plugin(generator_strategy=generator)])
    run(theirs, stream)
    run(ours, stream)
    for one, two in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"importance": 1.5}, "importance must be a finite number from 0 to 1 or None"),
        ({"replay_batch": 0}, "replay_batch must be a whole number of at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"reconstruction": "l1"}, "reconstruction must be one of bce, mse"),
        ({"latent": 0}, "latent must be a whole number of at least 1"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)


def test_models_must_say_what_they_take() -> None:
    with pytest.raises(TypeError, match="DGR needs a model with an argument `input_shape`, as those of clstream, to generate such"):
        DGR(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)))
    with pytest.raises(ValueError, match=r"DGR generates inputs of \(1, 8, 8\), as its model takes, and those of example are \(64"):
        run(small(), floats(example_stream(), (64,)))
