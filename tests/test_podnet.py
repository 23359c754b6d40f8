"""PODNet: the losses by hand and as the codes have them, which outputs are distilled, and what learns."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from clstream.strategies import PODNet
from clstream.strategies.podnet import convolving_stages, nca, pooled, pooled_distance
from conftest import built
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, SessionEnded, SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.models import ConvNet, LeNet, Mlp, ResNet18
from clstream.seeds import isolated
from clstream.strategy.core_sets import k_means
from clstream.strategy.cosine_rehearsal import similarities


def test_nca_by_hand() -> None:
    similar, places = torch.tensor([[0.5, 0.1, -0.2], [0.9, -0.9, -0.9]], requires_grad=True), torch.tensor([1, 0])
    eta = torch.tensor(2.0, requires_grad=True)
    first = math.log(math.exp(1.0) + math.exp(-0.4)) - 0.2 + 1.2
    second = math.log(2 * math.exp(-1.8)) - 1.8 + 1.2  # below 0
    assert second < 0
    loss = nca(similar, places, eta, 0.6, "paper")
    assert float(loss.detach()) == pytest.approx(first / 2)
    loss.backward()
    assert not similar.grad[1].any() and float(similar.grad[0, 1]) == pytest.approx(-1.0)  # eta / 2 rows
    assert float(similar.grad[0].sum()) == pytest.approx(0, abs=1e-6)
    a = math.log(math.exp(1.0) + math.exp(-0.4) + math.exp(1.0)) - 0.2
    b = math.log(2 * math.exp(-1.8) + math.exp(1.8)) - 1.8
    assert float(nca(similar, places, eta, 0.6, "code").detach()) == pytest.approx((a + b) / 2)
    assert torch.equal(nca(similar, places, eta, 0.6, "code"), nca(similar, places, eta, 0.0, "code"))
    assert float(nca(similar[:, :1], places * 0, eta, 0.6, "paper").detach()) == 0


def of_the_code(similar: Tensor, places: Tensor, eta: Tensor, margin: float) -> Tensor:
    """What the authors' code computes, step by step: a margin off everything, the greatest off everything, the own one put to 0."""
    rows = torch.arange(len(similar))
    shifted = eta * (similar - margin)
    shifted = shifted - shifted.max(1, keepdim=True).values
    own = torch.zeros_like(shifted)
    own[rows, places] = shifted[rows, places]
    return -(shifted[rows, places] - (shifted - own).exp().sum(1).log()).mean()


def test_the_form_of_the_code_and_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(5, (7,), generator=draw)
    ours, theirs = (torch.empty(7, 5).uniform_(-1, 1, generator=draw.manual_seed(1)).requires_grad_(True) for _ in range(2))
    eta = torch.tensor(3.0)
    first, second = nca(ours, places, eta, 0.6, "code"), of_the_code(theirs, places, eta, 0.6)
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_margin_of_the_paper_turns_eta_down_until_similarities_differ_by_more() -> None:
    """With the derivative of the loss by eta, which is that of others minus that of the own class, plus the margin."""
    for ahead, slope in ((0.5, 0.1), (0.7, -0.1)):
        eta = torch.tensor(0.1, requires_grad=True)
        nca(torch.tensor([[ahead, 0.0]]), torch.tensor([0]), eta, 0.6, "paper").backward()
        assert float(eta.grad) == (pytest.approx(slope) if slope > 0 else 0)  # cut off at 0, it is learned no more


def test_pooled_outputs_by_hand() -> None:
    maps = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]])  # squares 1 4 / 9 0: rows 5 9, columns 10 4
    torch.testing.assert_close(pooled(maps), torch.tensor([[5.0, 9.0, 10.0, 4.0]]) / math.sqrt(222))
    swapped = maps.flip(3)  # columns 4 10
    assert float(pooled_distance([maps, maps], [maps, swapped])) == pytest.approx(math.sqrt(72 / 222) / 2)
    assert float(pooled_distance([maps], [-5 * maps])) == pytest.approx(0, abs=1e-6)  # length and sign don't matter
    moving = maps.clone().requires_grad_(True)
    pooled_distance([moving], [maps]).backward()
    assert bool(moving.grad.isfinite().all())  # where nothing has moved yet


def test_which_stages_are_distilled() -> None:
    shape = (1, 8, 8)
    assert convolving_stages(ResNet18(shape, 6, width=2)) == [f"stages.layer{number}" for number in (1, 2, 3, 4)]
    assert convolving_stages(ConvNet(shape, 6, (2, 3, 4), 5)) == [f"stages.{name}" for name in ("conv1", "conv2", "conv3")]
    assert convolving_stages(LeNet((1, 28, 28), 6)) == ["stages.conv1", "stages.conv2"]
    assert convolving_stages(Mlp(shape, 6)) == []


class Watch:
    """Compares losses, imprinting, and what is fixed, with what is computed by hand."""

    def __init__(self, strategy: PODNet) -> None:
        self.strategy, self.looked = strategy, 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        classifier = self.strategy.classifier
        self.old, self.new = classifier.old.clone(), classifier.new.detach().clone()
        if len(self.old):
            length = classifier.old.norm(dim=2).mean()
            torch.testing.assert_close(self.new.norm(dim=2), length.expand(2, 3))

    @on(BatchLearned)
    def compare(self, event: BatchLearned) -> None:
        strategy, samples = self.strategy, event.batch.samples
        if strategy.teacher is None or event.batch.index:
            return
        x, y = strategy.joined(samples)
        strategy.model.eval()
        (features, maps), (before, then) = (stages_of(network, x) for network in (strategy.model, strategy.teacher))
        old = len(strategy.old_classes)
        loss = nca(strategy.classifier(features), y, strategy.classifier.eta, 0.6, "code")
        factor = math.sqrt((old + 2) / 2)
        spatial = torch.stack([(pooled(a) - pooled(b)).norm(dim=1).mean() for a, b in zip(maps, then, strict=True)]).mean()
        loss = loss + factor * (3 * spatial + F.cosine_embedding_loss(features, before, torch.ones(len(x))))
        torch.testing.assert_close(strategy.loss(samples), loss)
        strategy.model.train()
        self.looked += 1

    @on(SessionEnded)
    def end(self, event: SessionEnded) -> None:
        assert len(self.strategy.classifier.labels) == len(self.old) + len(self.new)


def stages_of(model: ResNet18, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return features, and what the four stages give, by going through the stages one by one."""
    maps = []
    for name, stage in model.stages.named_children():
        x = stage(x)
        if name.startswith("layer"):
            maps.append(x)
    return x, maps


def resnet() -> ResNet18:
    with isolated(0, "model"):
        return ResNet18((1, 8, 8), 6, width=2, last_relu=False)


@pytest.mark.slow
def test_a_run_of_a_resnet_takes_the_steps_of_the_method() -> None:
    with isolated(0, "strategy"):
        strategy = PODNet(resnet(), partial(SGD, lr=0.05, momentum=0.9), capacity=60, proxies=3, finetune_epochs=1)
    run(strategy, example_stream(batch_size=20), watch := Watch(strategy))
    assert watch.looked == 2 and strategy.classifier.labels.tolist() == [0, 1, 2, 3, 4, 5]


class Start:
    """Takes down the proxies that a session begins with."""

    def __init__(self, strategy: PODNet) -> None:
        self.strategy = strategy

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        self.old, self.new = self.strategy.classifier.old.clone(), self.strategy.classifier.new.detach().clone()


def test_only_new_proxies_learn_in_a_session_and_all_of_them_afterwards() -> None:
    stream = example_stream()
    plain, tuned = (built(partial(PODNet, capacity=60, proxies=2, finetune_epochs=epochs)) for epochs in (0, 1))
    run(plain, stream, watch := Start(plain))
    run(tuned, stream)
    assert torch.equal(plain.classifier.old, watch.old) and not torch.equal(plain.classifier.new, watch.new)
    same = torch.equal(plain.classifier.eta, built(partial(PODNet, proxies=2)).classifier.eta)
    assert not same and bool((tuned.classifier.old != plain.classifier.old).any(2).any(1).all())


def test_distillation_moves_the_stages_back() -> None:
    """A step on the distillation of maps alone brings a network that was moved nearer to its teacher, at all stages."""
    strategy = PODNet(resnet(), capacity=60)
    x = example_stream().tasks[0].train[:].x
    moved = resnet()
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    strategy.model.eval()
    _, maps = strategy.features_and_maps(moved.eval(), x)
    _, before = strategy.features_and_maps(strategy.model, x)
    distance = pooled_distance(maps, before)
    moved.zero_grad()
    distance.backward()
    grads = {name: weight.grad for name, weight in moved.named_parameters() if weight.grad is not None}
    assert any("layer1" in name for name in grads) and any("layer4" in name for name in grads)
    assert not any("head" in name for name in grads)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if name in grads:
                weight.sub_(1e-3 * grads[name])
        _, now = strategy.features_and_maps(moved, x)
    assert float(pooled_distance(now, before).detach()) < float(distance.detach())


def test_centres_are_means_of_what_is_nearest() -> None:
    draw = torch.Generator().manual_seed(0)
    near = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 9.0]]).repeat_interleave(20, 0)
    features = near + 0.1 * torch.randn(60, 2, generator=draw)
    centres = k_means(features, 3, torch.Generator().manual_seed(3))
    owner = torch.cdist(features, centres).argmin(1)
    for number in range(3):
        torch.testing.assert_close(centres[number], features[owner == number].mean(0))
    few = built(partial(PODNet, proxies=5)).imprint(features[:2])
    assert few.shape == (5, 2) and torch.equal(few[0], few[2]) and torch.equal(few[1], few[3])


def test_answers_are_the_similarities() -> None:
    strategy = built(partial(PODNet, capacity=60, proxies=3, finetune_epochs=1))
    run(strategy, stream := example_stream(), max_sessions=2)
    x = stream.tasks[1].test[:].x
    classifier = strategy.classifier
    with torch.no_grad():
        expected = classifier.eta * similarities(strategy.model.features(x), torch.cat([classifier.old, classifier.new]))
    torch.testing.assert_close(strategy.scores(x)[:, :4], expected)


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"layers must be a list of names of modules of Mlp, not \['stages.layer9'\]"):
        PODNet(example_model(), layers=["stages.layer9"])
    with pytest.raises(ValueError, match=r"PODNet distils feature maps .*, and stages.layer1 gives none: leave it out of layers"):
        run(built(partial(PODNet, layers=["stages.layer1"])), example_stream())
    for wrong in ({"margin": -1}, {"lambda_c": -1}, {"lambda_f": -1}, {"proxies": 0}, {"form": "other"}, {"finetune_lr": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PODNet(example_model(), **wrong)
