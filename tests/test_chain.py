"""Chains of layers: what they take, what they refuse, and that a path through them leaves out nothing that matters."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from clstream.strategies.sharp.layers import Chain
from torch import nn

from clstream.models import ConvNet, Mlp, MnistLike, SlimResNet18, VggSmall


def layers(model: nn.Module, cut: str | None = None) -> list[tuple[str, int, int, bool, int]]:
    return [(layer.name, layer.units, layer.inputs, layer.early, layer.span) for layer in Chain(model, cut).layers]


def test_the_networks_of_sharp() -> None:
    assert layers(MnistLike((1, 28, 28), 10)) == [
        ("conv1", 16, 1, True, 1), ("conv2", 16, 16, True, 1), ("hidden", 500, 784, False, 49), ("penultimate", 500, 500, False, 1)
    ]  # fmt: skip
    vgg = layers(VggSmall((3, 32, 32), 10))
    assert [units for _, units, _, _, _ in vgg] == [64, 64, 64, 64, 128, 128, 128, 1024, 1024]
    assert [early for _, _, _, early, _ in vgg] == [True] * 4 + [False] * 5
    assert vgg[7] == ("hidden", 1024, 2048, False, 16)


@pytest.mark.parametrize(("model", "weights"), [(MnistLike((1, 28, 28), 10), 645_480), (VggSmall((3, 32, 32), 10), 3_629_376)])
def test_the_networks_of_sharp_have_as_many_weights_as_the_authors(model: nn.Module, weights: int) -> None:
    assert sum(weight.numel() for weight in Chain(model).parameters()) == weights


def test_the_activations_at_the_cut_are_those_of_the_authors() -> None:
    x = torch.zeros(2, 3, 32, 32)
    assert Chain(VggSmall((3, 32, 32), 10)).below(x).shape == (2, 64, 8, 8)
    assert Chain(MnistLike((1, 28, 28), 10)).below(x[:, :1, :28, :28]).shape == (2, 16, 7, 7)


def test_without_a_cut_it_is_the_models_own_or_before_the_first_linear_layer() -> None:
    assert Chain(ConvNet((1, 8, 8), 10)).cut == "conv3.1"
    assert Chain(Mlp(20, 10, hidden=(30, 30))).cut == "input"  # the model's own has no layer above it
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 10))
    assert Chain(plain).cut == "2"
    assert Chain(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))).cut == "input"


def test_a_sequential_net_of_ones_own() -> None:
    net = nn.Sequential(
        OrderedDict(
            eye=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()),
            flat=nn.Flatten(),
            body=nn.Linear(96, 20),
            bend=nn.ReLU(),
            head=nn.Linear(20, 10),
        )
    )
    assert layers(net, "eye") == [("eye.0", 4, 1, True, 1), ("eye.3", 6, 4, True, 1), ("body", 20, 96, False, 16)]
    assert layers(net, "eye.1")[1] == ("eye.3", 6, 4, False, 1)
    chain, x = Chain(net), torch.randn(3, 1, 8, 8)
    assert chain.head is net.head
    assert torch.equal(chain.above(chain.below(x)), net[:-1](x))


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


shared = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "cut", "message"),
    [
        (nn.Linear(3, 3), None, "not a Linear: its layers must follow one another"),
        (SlimResNet18((3, 32, 32), 10), None, "stem.1 is a BatchNorm2d, which a chain can't have"),
        (nn.Sequential(nn.Linear(8, 8), Twice(), nn.ReLU()), None, "1 is a Twice, which a chain can't have"),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()), None, "there is no ReLU before 1"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), None, "there is no ReLU after the last layer"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU()), None, "0 is a convolution of 2 groups"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), None, "no layer above the cut '1'"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "2", "the cut must be one of 0, 1, not '2'"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "1", "no layer above the cut '1'"),
        (nn.Sequential(), None, "no layer above"),
        (nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU()), None, "a layer comes twice"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU()), None, "3 units before it"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(model: nn.Module, cut: str | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Chain(model, cut)


def test_activity_is_summed_after_relu_and_before_pooling() -> None:
    model = MnistLike((1, 8, 8), 10, channels=3, hidden=7)
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    conv1, conv2 = (model.stages.get_submodule(name)[0] for name in ("conv1", "conv2"))  # type: ignore[index]
    first = conv1(model.stages.get_submodule("input")(x)).relu()
    second = conv2(nn.functional.max_pool2d(first, 2)).relu()
    third = model.stages.get_submodule("hidden")(nn.functional.max_pool2d(second, 2))
    expected = [first.sum((0, 2, 3)), second.sum((0, 2, 3)), third.sum(0), model.features(x).sum(0)]
    activity = Chain(model).activity(x)
    assert [len(sums) for sums in activity] == [3, 3, 7, 7] and {sums.dtype for sums in activity} == {torch.float64}
    for sums, slow in zip(activity, expected, strict=True):
        assert torch.allclose(sums, slow.double(), rtol=1e-5)


@pytest.mark.parametrize("cut", ["conv1", "conv2", "hidden.0", "hidden"])
def test_a_path_gives_what_the_whole_gives_where_nothing_else_is_connected(cut: str) -> None:
    chain = Chain(MnistLike((1, 8, 8), 10, channels=4, hidden=10), cut)
    units = [torch.randperm(layer.units)[: layer.units // 2].sort().values for layer in chain.layers]
    with torch.no_grad():  # cut every connection from a unit that is off the path to one that is on it
        for before, layer, here in zip(units[:-1], chain.layers[1:], units[1:], strict=True):
            off = ~torch.isin(torch.arange(layer.inputs) // layer.span, before)
            layer.module.weight[here[:, None], off.nonzero().flatten()] = 0
    path, x = chain.path(units), torch.rand(6, 1, 8, 8)
    at = chain.below(x, path)
    assert torch.allclose(at, chain.along(chain.below(x), path), atol=1e-6)
    along, whole = chain.above(at, path), chain.above(chain.below(x))[:, units[-1]]
    assert torch.allclose(along, whole, atol=1e-6)
    parameters = list(chain.parameters())
    one, two = (torch.autograd.grad(out.square().sum(), parameters) for out in (along, whole))
    for step, weight in zip(path, range(0, len(parameters), 2), strict=True):
        inputs = torch.arange(parameters[weight].shape[1]) if step.inputs is None else step.inputs
        on = step.outputs[:, None], inputs
        assert torch.allclose(one[weight][on], two[weight][on], atol=1e-5)
        assert torch.allclose(one[weight + 1][step.outputs], two[weight + 1][step.outputs], atol=1e-5)
        assert one[weight].count_nonzero() == one[weight][on].count_nonzero()  # nothing else gets a gradient
