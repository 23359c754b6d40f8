"""DynamicER: growth, frozen extractors, the loss by hand, masks and their gradients, and what pruning takes out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import DynamicER
from clstream.strategies.dynamic_er import auxiliary_labels
from clstream.streams import blobs
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, SessionEnded, SessionStarted, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.eval_mode import evaluating
from clstream.models import ConvNet, Mlp, ResNet18
from clstream.seeds import isolated
from clstream.strategy.channel_masks import followers, masked_features, pruned, used_share

INPUTS = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_auxiliary_labels_have_one_for_all_old_classes() -> None:
    y = torch.tensor([3, 0, 5, 4, 1])
    assert auxiliary_labels(y, torch.tensor([4, 5])).tolist() == [0, 0, 2, 1, 0]


class Watch:
    """Takes down what earlier extractors give when their session ends, and compares the loss with one by hand."""

    def __init__(self, strategy: DynamicER) -> None:
        self.strategy, self.given, self.sizes, self.looked = strategy, list[Tensor](), list[int](), 0

    @on(SessionStarted)
    def begin(self, event: SessionStarted) -> None:
        strategy, sessions = self.strategy, len(self.given)
        assert len(strategy.extractors) == sessions
        assert strategy.H.weight.shape == (2 * (sessions + 1), strategy.width * (sessions + 1))
        if sessions:
            for name, value in strategy.extractors[-1].named_parameters():
                assert torch.equal(value, strategy.model.get_parameter(name))  # the new one begins as the one before
            rows, columns = self.H.shape
            assert torch.equal(strategy.H.weight[:rows, :columns], self.H)

    @on(BatchLearned)
    def compare(self, event: BatchLearned) -> None:
        strategy, samples = self.strategy, event.batch.samples
        if event.batch.index or not strategy.extractors:
            return
        x, y = strategy.joined(samples)
        strategy.model.eval()
        parts = [extractor.features(x) for extractor in strategy.extractors] + [strategy.model.features(x)]
        loss = F.cross_entropy(F.linear(torch.cat(parts, 1), strategy.H.weight), y)
        first = min(strategy.new_classes.tolist())
        loss = loss + 0.7 * F.cross_entropy(F.linear(parts[-1], strategy.H_a.weight), (y - first + 1).clamp(min=0))
        torch.testing.assert_close(strategy.loss(samples), loss)
        strategy.optimizer.zero_grad()
        strategy.loss(samples).backward()
        assert all(weight.grad is None for extractor in strategy.extractors for weight in extractor.parameters())
        assert all(weight.grad is not None for name, weight in strategy.model.named_parameters() if "head" not in name)
        strategy.model.train()
        self.looked += 1

    @on(SessionEnded)
    def end(self, event: SessionEnded) -> None:
        strategy = self.strategy
        self.H = strategy.H.weight.detach().clone()
        with evaluating(strategy):
            self.given.append(strategy.model.features(INPUTS))
        self.sizes.append(sum(weight.numel() for weight in strategy.answering_weights()))


@pytest.mark.parametrize("model", [example_model, normed_model])
def test_it_grows_by_an_extractor_a_session_and_old_ones_give_the_same_bits(model: partial[nn.Module]) -> None:
    with isolated(0, "strategy"):
        strategy = DynamicER(model(), partial(SGD, lr=0.05, momentum=0.9), 60, lambda_a=0.7, finetune_epochs=1)
    run(strategy, example_stream(), watch := Watch(strategy))
    assert watch.looked == 2
    for extractor, given in zip(strategy.extractors, watch.given, strict=False):
        assert not extractor.training and torch.equal(extractor.features(INPUTS), given)
    body, width = sum(value.numel() for name, value in model().state_dict().items() if "head" not in name), strategy.width
    head = parameters(strategy.model.head)
    assert watch.sizes == [body * t + head + 2 * t * width * t for t in (1, 2, 3)]


def test_a_class_that_comes_again_brings_no_extractor() -> None:
    strategy = DynamicER(Mlp(blobs().input_shape, 4, hidden=(8,)), capacity=60, finetune_epochs=1)
    run(strategy, blobs(tasks=2, classes=4, sessions_per_task=2))
    assert len(strategy.extractors) == 1 and strategy.labels_of_outputs.tolist() == [0, 1, 2, 3]


def test_the_classifier_learns_the_exemplars_from_a_new_start() -> None:
    """One pass in one batch is a step of gradient descent on cross-entropy at the temperature; nothing else moves."""
    stream = example_stream()
    plain, tuned = (
        built(partial(DynamicER, capacity=60, finetune_epochs=epochs, finetune_lr=0.5, finetune_batch=100)) for epochs in (0, 1)
    )
    for strategy in (plain, tuned):
        run(strategy, stream, max_sessions=2)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, tuned.model.state_dict()[name])
    assert torch.equal(plain.exemplars.x, tuned.exemplars.x)
    start = plain.drawn(*plain.H.weight.shape)  # its generator is where that of the other was
    with evaluating(plain):
        u = plain.super_features(plain.exemplars.x)
    loss = F.cross_entropy(u @ start.weight.T / 5, plain.exemplars.y)
    loss.backward()
    expected = start.weight.detach() - 0.5 * (start.weight.grad + 5e-4 * start.weight.detach())
    torch.testing.assert_close(tuned.H.weight.detach(), expected)


NETWORKS = {
    "Mlp": (partial(Mlp, (1, 8, 8), 6, hidden=(7, 5, 4)), ["stages.layer1", "stages.layer2"]),
    "ConvNet": (partial(ConvNet, (1, 8, 8), 6, (4, 5, 6), 7, norm="batch"), ["stages.conv1.0", "stages.conv2.0", "stages.conv3.0"]),
    "ResNet18": (partial(ResNet18, (1, 8, 8), 6, width=2), [f"stages.layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_networks_give_what_shut_channels_leave(name: str) -> None:
    make, masked = NETWORKS[name]
    with isolated(0, "model"):
        model = make().train()
        model(torch.rand(16, 1, 8, 8))  # batch norms have statistics
    model.eval()
    follows = followers(model, INPUTS[:2])
    assert list(follows) == masked
    draw = torch.Generator().manual_seed(0)
    kept = [torch.rand(len(model.get_parameter(f"{layer}.weight")), generator=draw) < 0.5 for layer in follows]
    for keep in kept:
        keep[0] = True
    small = pruned(model, follows, kept)
    with torch.no_grad():
        masked_whole = masked_features(model, follows, [keep.float() for keep in kept], INPUTS)
        torch.testing.assert_close(small.features(INPUTS), masked_whole, rtol=1e-4, atol=1e-6)
        assert not torch.equal(masked_whole, model.features(INPUTS))
    for keep, layer in zip(kept, follows, strict=True):
        assert len(small.get_parameter(f"{layer}.weight")) == int(keep.sum())
    assert parameters(small) < parameters(model)
    share = used_share(model, follows, [keep.float() for keep in kept])
    weights = [sum(net.get_parameter(f"{n}.weight").numel() for n in of(model)) for net in (small, model)]
    assert float(share) == pytest.approx(weights[0] / weights[1])


class NormsLast(nn.Module):
    """Its norms are not defined where they stand, and its last pair of layers is joined past the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(6, 6)

    def features(self, x: Tensor) -> Tensor:
        y = self.second(self.norm(self.first(x.flatten(1).float() / 255)).relu())
        return y + self.third(y.relu())


def test_what_can_not_be_cut_has_no_mask() -> None:
    with isolated(0, "model"):
        assert followers(NormsLast().eval(), INPUTS[:2]) == {}


def of(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d)) and name != "head"]


def test_masks_get_steeper_and_their_gradient_stays_that_of_a_sigmoid() -> None:
    strategy = built(partial(DynamicER, capacity=60, prune=True, s_max=100.0))
    run(strategy, example_stream(), max_sessions=1)
    strategy.embeddings = nn.ParameterList([nn.Parameter(torch.tensor([-1.0, 0.0, 0.1]))])
    e = strategy.embeddings[0]
    for turn, s in ((0, 0.01), (3, 0.01 + 99.99 / 3), (9, 100.0)):
        strategy.turn, strategy.batches = turn, 10
        (mask,) = strategy.masks()
        torch.testing.assert_close(mask.detach(), (s * e.detach()).sigmoid())
        (slope,) = torch.autograd.grad(mask.sum(), e)
        torch.testing.assert_close(slope, 100 * e.detach().sigmoid() * (1 - e.detach().sigmoid()))
    strategy.turn = 3  # HAT's own words: the gradient times s_max (cosh(s e) + 1) / (s (cosh(e) + 1))
    s, at = 0.01 + 99.99 / 3, torch.tensor([-0.2, 0.05, 0.3], dtype=torch.float64)
    plain = s * (s * at).sigmoid() * (1 - (s * at).sigmoid()) * 100 / s * ((s * at).cosh() + 1) / (at.cosh() + 1)
    strategy.embeddings = nn.ParameterList([nn.Parameter(at)])
    (slope,) = torch.autograd.grad(strategy.masks()[0].sum(), strategy.embeddings[0])
    torch.testing.assert_close(slope, plain)
    assert [channels.tolist() for channels in strategy.open_channels()] == [[False, True, True]]
    strategy.embeddings = nn.ParameterList([nn.Parameter(torch.tensor([-1.0, -2.0]))])
    assert [channels.tolist() for channels in strategy.open_channels()] == [[True, False]]  # one stays


def test_sparsity_takes_channels_out_for_good() -> None:
    with isolated(0, "strategy"):
        model = Mlp((1, 8, 8), 6, hidden=(32, 16))
        options = {"capacity": 60, "finetune_epochs": 10, "finetune_batch": 16, "finetune_lr": 0.5, "temperature": 1.0}
        strategy = DynamicER(model, partial(SGD, lr=0.05), prune=True, lambda_s=0.3, **options)
    result = run(strategy, example_stream(epochs=4))
    networks = [*strategy.extractors, strategy.smaller]
    widths = [len(network.stages.layer1.weight) for network in networks]
    assert len(networks) == 3 and min(widths) > 1 and max(widths) < 32
    assert [parameters(network) for network in networks] == [65 * width + 16 * width + 16 for width in widths]
    assert parameters(model.stages) == 65 * 32 + 17 * 16 + 16 * 16  # the next one would begin whole
    assert result.average_accuracy > 0.8


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="session 2 makes it 6 classes, and capacity=5 exemplars are fewer: take"):
        run(built(partial(DynamicER, capacity=5)), example_stream())
    headless = Mlp(4, 2)
    del headless.head
    with pytest.raises(TypeError, match="DynamicER needs a model whose `head` tells the width of its features, and Mlp has none"):
        DynamicER(headless)
    for wrong in ({"lambda_a": -1}, {"lambda_s": -1}, {"s_max": 0.5}, {"prune": 1}, {"temperature": 0}, {"finetune_lr": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DynamicER(example_model(), **wrong)
    with pytest.raises(TypeError, match="DynamicER answers with more than its model"):
        DynamicER(example_model()).export()
