"""Hidden units: which there are in which network, what they are, and how they start anew."""

from __future__ import annotations

import pytest
import torch
from conftest import vit_like
from torch import Tensor, nn
from torch.optim import Adam

from clstream.checks import example_model, normed_model
from clstream.models import ConvNet, Linear, Mlp, SlimResNet18
from clstream.models.units import HiddenUnits, hidden_units, noting, units_between

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_units_of_a_perceptron_are_what_its_layers_give() -> None:
    model = Mlp((1, 8, 8), 6, hidden=(20, 30))
    first, second = hidden_units(model, X)
    assert (first.names, second.names) == (("stages.layer1", "stages.layer2"), ("stages.layer2", "head"))
    assert (len(first), len(second)) == (20, 30) and second.outgoing.shape == (6, 30, 1)
    again = units_between(model, [first.names, second.names])
    assert again[1].maker is second.maker and again[1].taker is second.taker
    with noting([first, second]) as noted:
        model(X)
    one = torch.relu(first.maker.weight @ X.flatten(1).T + first.maker.bias[:, None])
    torch.testing.assert_close(noted[0], one.T[..., None].detach())
    assert not noted[0].requires_grad and noted[1].shape == (3, 30, 1)
    assert not model.stages.layer2._forward_pre_hooks and not model.head._forward_pre_hooks


def test_a_channel_is_a_unit_also_where_a_linear_layer_takes_its_places() -> None:
    model = ConvNet((1, 8, 8), 6, channels=(4, 5, 6), hidden=8)
    units = hidden_units(model, X)
    assert [len(layer) for layer in units] == [4, 5, 6, 8]
    with noting(units) as noted:
        model(X)
    assert [part.shape[:2] for part in noted] == [(3, 4), (3, 5), (3, 6), (3, 8)]
    (unit,) = hidden_units(normed_model(), X)  # behind batch norm and dropout
    assert unit.outgoing.shape == (6, 4, 36)


def test_units_that_go_around_a_layer_too_are_left_out() -> None:
    resnet = SlimResNet18((3, 16, 16), 6)
    makers = {layer.names[0] for layer in hidden_units(resnet, torch.rand(2, 3, 16, 16))}
    assert makers and not any("shortcut" in name for name in makers)
    for layer in hidden_units(resnet, torch.rand(2, 3, 16, 16)):
        resnet.eval()
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            layer.outgoing[:, 0] = 0
            before = resnet(x)
            layer.incoming[0] += 1
            assert torch.equal(resnet(x), before)
    vit = vit_like(example_model(), depth=2)
    blocks = hidden_units(vit, X)
    assert len(blocks) == 2 and len(blocks[0]) == 4 * 32  # of the perceptron in each block
    with noting(blocks) as noted:
        blocks[0].taker(torch.rand(3, 5, 128))
    assert noted[0].shape == (3, 128, 5) and not len(noted[1])
    with pytest.raises(ValueError, match="Linear has no hidden units that one layer makes and another takes"):
        hidden_units(Linear((1, 8, 8), 6), X)


def test_looking_for_units_leaves_a_network_alone() -> None:
    model = normed_model().train()
    model.stages[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    hidden_units(model, (255 * X).to(torch.uint8))
    assert model.training and not model.stages[1].training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def step(model: nn.Module, optimizer: Adam, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_units_start_anew_and_the_others_stay() -> None:
    model = ConvNet((1, 8, 8), 6, channels=(4, 5, 6), hidden=8)
    optimizer = Adam(model.parameters(), 0.01)
    step(model, optimizer, X)
    layer: HiddenUnits = hidden_units(model, X)[2]  # channels that a linear layer takes
    weights = {"in": layer.incoming, "out": layer.taker.weight, "bias": layer.maker.bias}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        layer.outgoing[:, [1, 4]] = 0
        kept = model(X)
        layer.outgoing[:, [1, 4]] += before["out"].view(len(before["out"]), 6, -1)[:, [1, 4]]
    chosen = torch.zeros(6, dtype=torch.bool)
    chosen[[1, 4]] = True
    layer.renew(chosen, 0.5, torch.Generator().manual_seed(0), optimizer)
    torch.testing.assert_close(model(X), kept)  # the network without them
    same = (layer.incoming == before["in"]).flatten(1).all(1)
    assert same.tolist() == (~chosen).tolist() and layer.incoming[chosen].abs().max().item() <= 0.5
    assert abs(layer.incoming[chosen].std().item() - 0.5 / 3**0.5) < 0.05
    assert not layer.maker.bias[chosen].any() and torch.equal(layer.maker.bias[~chosen], before["bias"][~chosen])
    assert not layer.outgoing[:, chosen].any()
    assert torch.equal(layer.outgoing[:, ~chosen], before["out"].view(len(before["out"]), 6, -1)[:, ~chosen])
    moments = optimizer.state[layer.taker.weight]["exp_avg_sq"].view(len(before["out"]), 6, -1)
    assert not moments[:, chosen].any() and bool((moments[:, ~chosen] != 0).any())
    moments = optimizer.state[layer.incoming]["exp_avg"]
    assert not moments[chosen].any() and bool((moments[~chosen] != 0).any())


def test_new_weights_spread_as_the_first_ones() -> None:
    model = Mlp(400, 6, hidden=(300, 300), init="xavier")
    first, _ = hidden_units(model, torch.rand(2, 400))
    assert first.initial_bound() == pytest.approx((6 / 700) ** 0.5, rel=0.01)
