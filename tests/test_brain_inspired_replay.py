"""Brain-inspired replay: its loss by the definition, what is drawn of which class, and the part of the decoder that draws it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import BIR
from clstream.streams import blobs
from conftest import built
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn import functional as F
from torch.optim import Adam

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.models import Mlp
from clstream.seeds import isolated

SMALL = {"decoder": (16, 12), "latent": 5, "gated": 0.5}


def small(**options: object) -> BIR:
    return built(partial(BIR, **{**SMALL, **options}))


def generative_loss(strategy: BIR, x: Tensor, shares: Tensor) -> Tensor:
    """L_R + L_V of inputs from 0 to 1, with (n, 6) probabilities of classes, by the definitions."""
    latent, h = strategy.generator, strategy.model.features(x)
    mean, deviation = latent.mean(h), (latent.log_variance(h) / 2).exp()
    z = mean + deviation * torch.randn_like(mean)
    first, second = latent.layers
    hidden = ((shares @ latent.gates0) * first(z)).relu()
    hidden = ((shares @ latent.gates1) * second(hidden)).relu()
    likelihood = Bernoulli(logits=latent.output(hidden), validate_args=False).log_prob(x.flatten(1)).sum(1)
    posterior = Independent(Normal(mean, deviation), 1).log_prob(z)
    each = [
        Independent(Normal(own, (log_variance / 2).exp()), 1).log_prob(z)
        for own, log_variance in zip(latent.prior_mean, latent.prior_log_variance, strict=True)
    ]
    prior = (torch.stack(each, 1).double().exp() * shares).sum(1).log()
    return (posterior - prior - likelihood).mean() / 64


@pytest.mark.parametrize(("scenario", "distill"), [("class", True), ("class", False), ("task", True)])
def test_the_loss_is_the_paper_s(scenario: str, distill: bool) -> None:
    stream = example_stream(scenario=scenario)
    strategy = small(distill=distill)
    run(strategy, stream, max_sessions=2)
    strategy.seen_classes, strategy.task_classes = torch.arange(6), torch.tensor([4, 5])  # as when the third task begins
    batch = stream.tasks[2].train[:8]
    (drawn,) = strategy.draw(batch)
    with isolated(3):
        loss = strategy.objective_with(batch, (drawn,))
    before, outputs = strategy.teacher(drawn.x), strategy.model(drawn.x)
    others = torch.full((8, 6), float("-inf"))
    for row in range(8):
        head = [0, 1, 2, 3] if scenario == "class" else [[0, 1], [2, 3]][row % 2]
        others[row, head] = 0
    targets = ((before + others) / 2).softmax(1) if distill else F.one_hot((before + others).argmax(1), 6).float()
    temperature = 2 if distill else 1
    logs = ((outputs + (others if scenario == "task" else 0)) / temperature).log_softmax(1)
    old = -(temperature**2) * torch.where(targets > 0, targets * logs, 0).sum(1).mean()
    own = [4, 5] if scenario == "task" else list(range(6))
    new = F.cross_entropy(strategy.model(batch.x)[:, own], batch.y - own[0])
    with isolated(3):
        new = new + generative_loss(strategy, batch.x / 255, F.one_hot(batch.y, 6).float())
        old = old + generative_loss(strategy, drawn.x, targets)
    torch.testing.assert_close(loss, (new / 3 + 2 * old / 3).float(), rtol=1e-4, atol=1e-5)


def test_each_old_class_is_drawn_alike_of_its_normal_and_with_its_gates() -> None:
    strategy = small()
    run(strategy, example_stream(), max_sessions=2)
    drawn = strategy.generate(4000)
    assert drawn.y.bincount(minlength=6).tolist()[4:] == [0, 0]
    assert (drawn.y.bincount(minlength=4) - 1000).abs().max() < 120
    assert torch.equal(drawn.extra["before"], strategy.teacher(drawn.x))
    latent = strategy.teacher_generator
    with torch.no_grad():  # a class without any unit has but the bias to draw with
        latent.gates1[2] = 0
        nothing = latent.output.bias.sigmoid()
        drawn = strategy.generate(40)
        plain = [torch.equal(x.flatten(), nothing) for x in drawn.x]
    assert all(alike for alike, label in zip(plain, drawn.y.tolist(), strict=True) if label == 2)
    assert {*plain} == {True, False}


def test_a_replayed_sample_is_of_one_past_task() -> None:
    strategy = small()
    run(strategy, example_stream(scenario="task"), max_sessions=2)
    drawn = strategy.generate(9)
    assert drawn.extra["head"].tolist() == [0, 1] * 4 + [0]
    assert (drawn.y // 2).tolist() == drawn.extra["head"].tolist()


def test_classifier_and_generator_are_one_network() -> None:
    """The decoder's loss reaches the features, and not the head; the classifier's not the latent."""
    strategy, samples = small(), example_stream().tasks[0].train[:8]
    strategy.seen_classes = torch.tensor([0, 1])
    features, _ = strategy.features_and_outputs(samples.x)
    labels, shares = torch.arange(2), F.one_hot(samples.y, 2).float()
    strategy.generator.loss(samples.x / 255, features, labels, shares).backward()
    reached = {name for name, weight in strategy.model.named_parameters() if weight.grad is not None}
    assert reached == {"stages.layer1.weight", "stages.layer1.bias"}
    prior = strategy.generator.prior_mean.grad
    assert prior[:2].abs().sum() > 0 and not prior[2:].any()
    assert all(weight.grad is not None for weight in strategy.generator.parameters())
    assert {id(weight) for group in strategy.optimizer.param_groups for weight in group["params"]} == {
        id(weight) for module in (strategy.model, strategy.generator) for weight in module.parameters()
    }


def test_components_can_be_left_out() -> None:
    plain = small(conditional=False, gated=0.0)
    assert plain.generator.prior_mean is None and [*plain.generator.named_buffers()] == [("seed", plain.generator.seed)]
    mean, log_variance = torch.randn(2, 4, 5)
    exact = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1)
    torch.testing.assert_close(plain.generator.divergence(mean, log_variance, mean, torch.arange(2), torch.ones(4, 2)), exact)
    gated = small(conditional=False)
    run(gated, example_stream(), max_sessions=2)
    assert gated.generator.prior_mean is None and gated.generate(5).x.shape == (5, 1, 8, 8)


def test_a_class_has_the_same_normal_and_gates_whatever_others_there_are() -> None:
    four, six = (built(lambda _, n=n: BIR(example_model(classes=n), **SMALL)).generator for n in (4, 6))
    assert torch.equal(six.prior_mean[:4], four.prior_mean) and torch.equal(six.gates1[:4], four.gates1)
    assert four.widen(6) == {four.prior_mean: 4, four.prior_log_variance: 4}
    for name, value in six.state_dict().items():
        assert torch.equal(four.state_dict()[name], value), name
    assert not torch.equal(six.prior_mean[0], six.prior_mean[1])


def test_features_are_replayed_with_squared_errors() -> None:
    """Internal replay: inputs are the features of a frozen network, any numbers."""
    stream = blobs(tasks=3, classes=6)
    with isolated(0):
        strategy = BIR(
            Mlp(stream.input_shape, 6, hidden=(32,)), partial(Adam, lr=0.01), reconstruction="mse", decoder=(32,), latent=10
        )
    result = run(strategy, stream)
    assert strategy.generate(50).x.min() < 0
    assert result.average_accuracy > 0.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gated": 1.0}, "gated must be a share, from 0 to below 1"),
        ({"latent": 0}, "latent must be a whole number of at least 1"),
        ({"reconstruction": "l1"}, "reconstruction must be one of bce, mse"),
        ({"distill": 1}, "distill must be True or False"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)


def test_models_must_have_features() -> None:
    with pytest.raises(TypeError, match="BIR needs a model with a method `features`, a linear `head` and an argument"):
        BIR(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)))
