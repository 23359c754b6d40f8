"""SHARP's steps, each against a slow one written out: selection, rewiring, the loss, redrawing."""

from __future__ import annotations

import math

import pytest
import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp.sharp import most_active
from hypothesis import given, settings
from hypothesis import strategies as st
from sharp_runs import built, stream
from torch import Tensor

from clstream import EpochStarted, Samples, on, run
from clstream.losses import supervised_contrastive
from clstream.models import Mlp, MnistLike

pytestmark = pytest.mark.filterwarnings("ignore:SHARP. after episode")


@given(st.integers(1, 40), st.floats(1, 100), st.floats(1e-3, 1e3), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_selection_goes_with_the_units_and_not_with_their_scale(n: int, quota: float, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sums = torch.rand(n, generator=draw, dtype=torch.float64)
    order, chosen = torch.randperm(n, generator=draw), most_active(sums, quota)
    assert torch.equal(most_active(sums[order], quota), chosen[order])
    assert torch.equal(most_active(sums * 2.0 ** math.floor(math.log2(scale)), quota), chosen)
    inside, total = sums[chosen].sum().item(), sums.sum().item()
    assert inside >= quota / 100 * total - 1e-9
    assert inside - sums[chosen].min().item() < quota / 100 * total + 1e-9  # none to spare
    assert chosen.all() or sums[chosen].min() >= sums[~chosen].max()


def test_selection_takes_one_of_units_that_are_all_silent() -> None:
    assert most_active(torch.zeros(5, dtype=torch.float64), 90).sum() == 1


# its steps, against slow ones
def test_quotas_are_those_of_the_authors_schedule() -> None:
    quotas = [built(least_quota=0.0).quota(phase) for phase in range(1, 16)]
    expected = [98.91, 98.91, 97.55, 95.68, 93.30, 90.45, 87.16, 83.46, 79.39, 75.00, 70.34, 65.45, 60.40, 55.23, 50.00]
    assert quotas == pytest.approx(expected, abs=0.005)
    assert built(least_quota=90.0).quota(9) == 90.0


def test_it_starts_sparse_but_for_the_first_convolution() -> None:
    own = built(net=MnistLike((1, 28, 28), 10))
    density = [float(mask.float().mean()) for mask in own.masks]
    assert density[0] == 1 and density[1] == pytest.approx(0.4, abs=0.1) and density[2:] == pytest.approx([0.4, 0.4], abs=0.01)
    for layer, mask in zip(own.chain.layers, own.masks, strict=True):
        weight = layer.module.weight.detach()
        assert weight[mask].std().item() == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.15)
        assert not layer.module.bias.detach().any()
    assert not any(bool(ranks.any()) for ranks in own.ranks)


def test_selection_never_changes_units_that_were_promoted() -> None:
    own = built()
    own.ranks = [torch.tensor([0, 1, 2, 3, 0, 1]), *own.ranks[1:]]
    own.select_units([torch.tensor([1, 2, 100, 1, 50, 3.0]), *(torch.ones(len(ranks)) for ranks in own.ranks[1:])], 95)
    assert own.ranks[0].tolist() == [0, 0, 2, 3, 1, 0]  # 150 of 157 are 95.5 %: units 2 and 4


def test_dropped_connections_grow_again_into_idle_units_at_zero() -> None:
    own = built()
    draw = torch.Generator().manual_seed(1)
    own.ranks = [torch.randint(0, 4, (len(ranks),), generator=draw) for ranks in own.ranks]
    before = [mask.clone() for mask in own.masks]
    weights = [layer.module.weight.detach().clone() for layer in own.chain.layers]
    own.rewire()
    for number, layer in enumerate(own.chain.layers):
        mask, idle = own.masks[number], own.ranks[number] == 0
        dropped = grown = 0
        for unit in range(layer.units):
            for source in range(layer.inputs):
                was, has = bool(before[number][unit, source]), bool(mask[unit, source])
                from_idle = number > 0 and int(own.ranks[number - 1][source // layer.span]) == 0
                if was and not has:
                    assert from_idle and not idle[unit]
                    dropped += 1
                elif has and not was:
                    assert idle[unit] and not layer.module.weight[unit, source].any()
                    grown += 1
                elif was and from_idle:
                    assert idle[unit], "a connection from an idle unit to another was kept"
                elif has:
                    assert torch.equal(layer.module.weight[unit, source], weights[number][unit, source])
        room = int((~before[number] & idle[:, None]).sum())
        assert grown == min(dropped, room)


def test_where_there_is_no_room_connections_are_lost() -> None:
    own = built()
    own.ranks = [torch.zeros_like(own.ranks[0]), *(torch.ones_like(ranks) for ranks in own.ranks[1:])]
    own.rewire()
    assert not own.masks[1].any()  # all came from idle units, and no unit is idle to grow into
    assert float(own.masks[2].float().mean()) == pytest.approx(0.4, abs=0.1)


def test_redrawn_units_have_the_spread_that_grows_as_they_get_fewer() -> None:
    own = built(net=Mlp(300, 10, hidden=(400, 60)))
    own.ranks[0][50:] = 2
    with torch.no_grad():
        own.redraw_idle()
    weight, mask = own.chain.layers[0].module.weight.detach(), own.masks[0]
    assert weight[:50][mask[:50]].std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.03)
    assert not weight[~mask].any()


def dense_loss(own: SHARP, samples: Samples, past: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as the equations have it: the whole network, whose absent connections are zero, both entries apart."""
    for layer, mask in zip(own.chain.layers, own.masks, strict=True):
        assert not layer.module.weight[~mask].any()
    keep = torch.tensor([int((samples.y == label).sum()) > 1 for label in samples.y])
    new = own.chain.above(own.chain.below(samples.x[keep]))
    joined = torch.cat([new, own.chain.above(past)]) * (own.ranks[-1] > 0)
    return supervised_contrastive(joined, torch.cat([samples.y[keep], labels]), own.temperature)


@pytest.mark.parametrize("cut", ["conv1", "conv2", "hidden"])
def test_a_step_is_that_of_the_whole_masked_network(cut: str) -> None:
    own = built(cut=cut)
    run(own, stream(2))
    own.ranks[-1][own.ranks[-1] == 0] = torch.randint(0, 2, (int((own.ranks[-1] == 0).sum()),))
    own.rewire()
    own.mask_gradients()
    samples = stream().tasks[2].train[:20] + stream().tasks[3].train[:1]  # the last one is alone with its class
    assert own.short_term is not None
    drawn = own.random.get_state()
    loss = own.loss(samples)
    own.random.set_state(drawn)
    own.replayed = None
    past, labels = own.draw_activations(
        own.short_term, len(samples), own.chain.path([torch.arange(layer.units) for layer in own.chain.layers])
    )
    own.replayed = None
    expected = dense_loss(own, samples, past, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(value, list(own.chain.parameters())) for value in (loss, expected))
    present = [kept for mask in own.masks for kept in (mask, torch.ones(len(mask), dtype=torch.bool))]
    for our, their, mask in zip(ours, theirs, present, strict=True):  # what absent weights get, `mask_gradients` takes away
        assert torch.allclose(our[mask], their[mask], atol=2e-5)


# the run around it
def test_a_fresh_optimizer_each_phase() -> None:
    own = built()
    steps: list[float] = []

    class Look:
        @on(EpochStarted)
        def look(self, event: EpochStarted) -> None:
            states = [float(state["step"]) for state in own.optimizer.state.values()]
            steps.append(max(states, default=0.0))

    run(own, stream(2, epochs=4), Look())
    per_epoch = -(-len(stream(2).tasks[0].train) // 64)
    assert steps[:4] == [0, per_epoch, 0, per_epoch]
