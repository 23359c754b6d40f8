"""The vectorised diagonal Fisher against a loop over samples, in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream.fisher import diagonal_fisher
from clstream.models import GrowingHead, Mlp
from clstream.stream import Samples, Subset


class Odd(nn.Module):
    """A layer used twice, a weight used outside of its layer, a parameter of its own, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.norm, self.out = nn.Linear(16, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.scale, self.idle = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.first(x.flatten(1)).tanh()).tanh()
        hidden = self.norm(self.twice(hidden) * self.scale)
        return self.out(hidden + 0.1 * hidden @ self.out.weight.T @ self.out.weight)


class InPlace(nn.Module):
    """Changes what a layer returned in place, and joins weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x.flatten(1))
        hidden *= 1.5
        hidden = hidden.tanh()
        joined = torch.cat([self.b.weight, self.d.weight])
        return self.c(F.relu(self.b(hidden), inplace=True) + (self.d(hidden) @ joined[:6]))


class Prototypes(nn.Module):
    """Puts something else than samples through a linear layer, in as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.maker = nn.Linear(16, 4), nn.Linear(5, 4)
        self.rows = nn.Parameter(torch.randn(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.encoder(x.flatten(1)).tanh() @ self.maker(self.rows).T)[:, :3]


class Temperature(nn.Module):
    """Has a single number as a parameter, a frozen bias, and no statistics of its own in its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)
        self.linear, self.scale = nn.Linear(16, 3), nn.Parameter(torch.tensor(1.3))
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1)) * self.scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x[:, 0])[0][:, -1])


def frozen_norm() -> nn.Module:
    """One batch norm that learns beside one that is kept in evaluation mode."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    net[4].running_mean += 0.5
    net[4].train = lambda mode=True: net[4]
    net[4].training = False
    return net


NETS = {
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    ),
    "in place": InPlace,
    "prototypes": Prototypes,
    "temperature": Temperature,
    "recurrent": Recurrent,
    "frozen batch norm": frozen_norm,
    "convolutions and batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ),
    "odd": Odd,
    "linear over positions": lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.Unflatten(1, (4, 4)), nn.Linear(4, 3), Mean()),
    "growing": lambda: nn.Sequential(nn.Flatten(), grown()),
}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def grown() -> GrowingHead:
    head = GrowingHead(16, 3)
    head.grow([2, 0, 1])
    return head


def samples(n: int = 9) -> Samples:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 4, 4, generator=draw, dtype=torch.float64)
    return Samples(x, torch.randint(3, (n,), generator=draw))


def by_hand(model: nn.Module, given: Samples, weighted: bool) -> dict[str, Tensor]:
    """One sample at a time, as the definition says; in the mode that the model is in."""
    found = {name: torch.zeros_like(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    for x, y in zip(given.x, given.y, strict=True):
        model.zero_grad()
        likelihood = -F.cross_entropy(model(x[None]), y[None])
        likelihood.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None and weight.requires_grad:
                found[name] += (likelihood.detach().exp() if weighted else 1) * weight.grad.square() / len(given)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["empirical", "weighted"])
@pytest.mark.parametrize("name", NETS)
def test_it_equals_the_loop_over_samples(name: str, kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double().train(training)
    before = deepcopy(model.state_dict())
    found, expected = diagonal_fisher(model, samples(), kind), by_hand(deepcopy(model), samples(), kind == "weighted")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-16)
        assert (found[key] >= 0).all()
    assert all(torch.equal(one, two) for one, two in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == list(expected)


@pytest.mark.parametrize("name", ["linear", "odd", "growing", "convolutions and batch norm", "recurrent"])
def test_predicted_labels_and_losses_of_ones_own(name: str) -> None:
    """Of a loss that knows which outputs compete, at the label that is likeliest among them; sample by sample."""
    torch.manual_seed(0)
    model, given = NETS[name]().double(), samples()
    allowed = torch.tensor([[True, True, False], [True, True, False], [False, True, True]])  # by label: not the label alone

    def competing(outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.masked_fill(~allowed[y], float("-inf"))

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        return 2 * F.cross_entropy(outputs[:, :2], y.clamp(max=1), reduction="none")

    found = diagonal_fisher(model, given, "predicted", losses=losses, competing=competing)
    expected = {key: torch.zeros_like(weight) for key, weight in model.named_parameters() if weight.requires_grad}
    twin = deepcopy(model)
    for x, y in zip(given.x, given.y, strict=True):
        twin.zero_grad()
        outputs = twin(x[None])
        label = outputs.detach().masked_fill(~allowed[y][None], float("-inf")).argmax(1)
        losses(outputs, label).sum().backward()
        for key, weight in twin.named_parameters():
            expected[key] += 0 if weight.grad is None else weight.grad.square() / len(given)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-16)


def test_sampled_labels_give_the_fisher_itself_on_average() -> None:
    torch.manual_seed(0)
    model, given = NETS["linear"]().double(), samples(4)
    exact = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    chances = model(given.x).softmax(1).detach()
    for label in range(3):  # the mean over the model's own answer, label by label
        for row in range(4):
            one = by_hand(deepcopy(model), Samples(given.x[row : row + 1], torch.tensor([label])), False)
            for name, value in one.items():
                exact[name] += chances[row, label] * value / 4
    draw = torch.Generator().manual_seed(1)
    many = Samples(given.x.repeat(2000, 1, 1, 1), given.y.repeat(2000))
    found = diagonal_fisher(model, many, "sampled", generator=draw)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=2e-4)


def test_frozen_parameters_are_left_out_and_chunks_make_no_difference() -> None:
    model = Mlp((1, 4, 4), 3, hidden=(5,))
    model.stages.layer1.weight.requires_grad_(False)
    many = samples(3000)
    many = Samples(many.x.float(), many.y)
    found = diagonal_fisher(model, many)
    assert "stages.layer1.weight" not in found and not model.stages.layer1.weight.requires_grad
    thirds = [diagonal_fisher(model, Subset(many, torch.arange(part, 3000, 3))) for part in range(3)]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(third[name] for third in thirds) / 3, rtol=1e-4, atol=1e-8)


def test_odd_requests_are_refused() -> None:
    model = NETS["linear"]().double()
    with pytest.raises(ValueError, match="kind must be one of empirical, weighted, sampled, predicted, not 'exact'"):
        diagonal_fisher(model, samples(), "exact")
    with pytest.raises(ValueError, match="the Fisher of no samples is not defined"):
        diagonal_fisher(model, samples()[:0])
    single = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="has batch norm over single values, and the Fisher takes one sample at a time"):
        diagonal_fisher(single, samples())
    with pytest.raises(ValueError, match="has no parameters that require a gradient"):
        diagonal_fisher(nn.Flatten(), samples())


@pytest.mark.slow
def test_probability_and_gradient_come_from_one_forward_pass() -> None:
    """With dropout, the mean of p g^2 is not the mean of p times the mean of g^2."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    one = samples(1)
    many = Samples(one.x.repeat(4000, 1, 1, 1), one.y.repeat(4000))
    found, expected = diagonal_fisher(net, many, "weighted"), by_hand(net, many, True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.25, atol=float(value.max()) * 0.1)
