"""FLOPs by hand, and which steps are counted."""

import contextlib

import pytest
import torch
from clstream.strategies import Finetune, Joint, Replay
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from clstream import Event, on, run
from clstream.checks import example_model, example_stream
from clstream.events import BatchLearned, BatchReady, SessionEnded
from clstream.measures.flops import FlopMeter, FlopMode, Steps, consolidating, same_flops
from clstream.models import ConvNet, VitTiny
from clstream.seeds import isolated


def flops(call):
    with FlopMode(lambda: False) as mode:
        call()
    return mode.flops


def test_a_linear_layer():
    layer, x = nn.Linear(16, 4), torch.rand(8, 16)
    assert flops(lambda: layer(x)) == 2 * 8 * 16 * 4 == 1024
    assert flops(lambda: layer(x).sum().backward()) == 2048  # the input needs no gradient
    assert flops(lambda: layer(x.requires_grad_()).sum().backward()) == 3072
    with torch.inference_mode():
        assert flops(lambda: layer(x)) == 1024
    assert flops(lambda: layer.weight @ x[0]) == 2 * 16 * 4


def test_a_network_has_the_gradient_of_inputs_for_all_layers_but_the_first():
    first, last = 2 * 5 * 784 * 100, 2 * 5 * 100 * 10
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    x, y = torch.rand(5, 784), torch.zeros(5, dtype=torch.int64)
    assert flops(lambda: F.cross_entropy(model(x), y).backward()) == 2 * first + 3 * last


def test_a_convolution():
    layer, x = nn.Conv2d(3, 8, 5, stride=2), torch.rand(4, 3, 21, 21)
    forward = 2 * 4 * 8 * 9 * 9 * 3 * 5 * 5
    assert flops(lambda: layer(x)) == forward
    assert flops(lambda: layer(x).sum().backward()) == 2 * forward
    assert flops(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * forward


@pytest.mark.parametrize(
    ("layer", "multiplications"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), 8 * 81 * 2 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), 8 * 16 * 1 * 9),
        (nn.ConvTranspose2d(4, 8, 3), 4 * 81 * 8 * 9),  # each input goes to every output near it
        (nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), 4 * 81 * 4 * 9),
    ],
    ids=["groups", "depthwise", "transposed", "transposed groups"],
)
def test_convolutions_of_other_kinds(layer, multiplications):
    x = torch.rand(5, 4, 9, 9)
    forward = 2 * 5 * multiplications
    assert flops(lambda: layer(x)) == forward
    assert flops(lambda: layer(x).sum().backward()) == 2 * forward
    assert flops(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * forward


@pytest.mark.parametrize("fused", [False, True])
def test_attention(fused):
    n, heads, length, width = 2, 4, 16, 8
    q, k, v = (torch.rand(n, heads, length, width, requires_grad=True) for _ in range(3))
    product = 2 * n * heads * length * length * width

    def attend() -> Tensor:
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(2, 3) / width**0.5).softmax(3) @ v

    assert flops(attend) == 2 * product
    assert flops(lambda: attend().sum().backward()) == (7 if fused else 6) * product  # fused, scores are computed again


def test_layers_that_run_as_one_operation_cost_what_their_parts_do():
    x = torch.rand(2, 5, 16)
    attention, whole = nn.MultiheadAttention(16, 4, batch_first=True), nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
    for layer in (lambda: attention(x, x, x, need_weights=False)[0], lambda: whole(x)):
        in_parts = flops(layer)
        attention.eval(), whole.eval()
        with torch.no_grad():
            assert flops(layer) == in_parts > 0
        attention.train(), whole.train()


def test_a_recurrent_layer():
    layer, x = nn.LSTM(16, 8), torch.rand(5, 3, 16)
    forward = 2 * 5 * 3 * 4 * 8 * (16 + 8)
    assert flops(lambda: layer(x)) == forward
    assert flops(lambda: layer(x)[0].sum().backward()) == 3 * forward


def test_under_vmap_and_grad():
    weight, x = torch.rand(4, 16), torch.rand(8, 16)
    squares = lambda weight, row: (weight @ row).square().sum()  # noqa: E731
    assert flops(lambda: vmap(grad(squares), (None, 0))(weight, x)) >= 2 * 8 * 16 * 4
    assert flops(lambda: vmap(lambda weight: x @ weight.T)(weight.expand(3, 4, 16))) == 3 * 1024


def test_elementwise_operations_are_not_counted():
    x = torch.rand(100, 100, requires_grad=True)
    assert flops(lambda: (x.softmax(1) * x + x.sum()).exp().mean().backward()) == 0


@pytest.mark.parametrize(
    ("costs", "counted"),
    [
        ([6] * 1000, {1, 2, 9, 37, 149, 597}),
        ([3, *[6] * 999], {1, 2, 3, 13, 53, 213, 853}),
        ([10 * min(step, 40) for step in range(1000)], None),
    ],
)
def test_steps_between_those_that_are_counted_lie_on_a_line(costs, counted):
    steps, total, looked_at = Steps(), 0, set()
    for number, cost in enumerate(costs, 1):
        if steps.left:
            steps.left -= 1
        else:
            total += steps.count(cost)
            looked_at.add(number)
    total += steps.flush()
    assert total == (sum(costs) if counted else pytest.approx(sum(costs), rel=0.01)) and steps.flush() == 0
    assert looked_at == counted if counted else len(looked_at) < 50


SKIPS = FlopMeter.skips


def counted_run(strategy, stream, monkeypatch, **options):
    """Return the FLOPs of each session as a run counts them, and as it does if it counts each step."""
    make, costs = strategy, []
    for skips in (SKIPS, lambda self, size: False):
        monkeypatch.setattr(FlopMeter, "skips", skips)
        costs.append(run(make(), stream, **options).cost.flops)
    return costs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sessions"),
    [({"replay_batch": 64}, 3), ({"retrieval": "mir"}, 3), ({"capacity": 16, "memory": "class_balanced"}, 30)],
)
def test_a_memory_that_fills_up(options, sessions, monkeypatch):
    strategy = lambda: Replay(example_model(), **options)  # noqa: E731
    stream = example_stream(tuple(number % 3 for number in range(sessions)), batch_size=1)
    cost, each = counted_run(strategy, stream, monkeypatch)
    assert torch.allclose(cost, each, rtol=0.01)


class Doubled(Event):
    pass


class Doubles(Finetune):
    """Learns each batch twice from the 20th on, and says so."""

    def __init__(self, model: nn.Module, says_so: bool = True) -> None:
        super().__init__(model)
        self.steps, self.says_so = 0, says_so

    def learn(self, batch):
        self.steps += 1
        if self.steps == 20 and self.says_so:
            self.emit(Doubled())
        if self.steps >= 20:
            super().learn(batch)
        return super().learn(batch)


@pytest.mark.slow
def test_what_a_strategy_tells_of_is_counted_anew(monkeypatch):
    stream = example_stream(batch_size=1)
    cost, each = counted_run(lambda: Doubles(example_model()), stream, monkeypatch)
    assert torch.allclose(cost, each, rtol=0.01)
    cost, each = counted_run(lambda: Doubles(example_model(), says_so=False), stream, monkeypatch)
    assert not torch.allclose(cost[:1], each[:1], rtol=0.01)  # nothing tells of it


class Asks:
    """Asks the strategy before each batch, as an observer may."""

    def __init__(self, strategy):
        self.strategy = strategy

    @on(BatchReady)
    def ask(self, event):
        self.strategy.predict(event.batch.samples.x)

    @on(SessionEnded)
    def ask_again(self, event):
        self.strategy.predict(event.session.samples.x)


def test_what_observers_ask_is_not_counted():
    plain = Joint(example_model())
    watched = Joint(example_model())
    cost, other = run(plain, example_stream()).cost, run(watched, example_stream(), Asks(watched)).cost
    assert torch.equal(cost.flops, other.flops)


@pytest.mark.parametrize(
    "model", [lambda: VitTiny((1, 8, 8), 6, width=16, depth=1, heads=2), lambda: ConvNet((1, 8, 8), 6)], ids=["attention", "conv"]
)
def test_counting_changes_no_bit(model, monkeypatch):
    def weights():
        with isolated(0, "model"):
            strategy = Replay(model(), capacity=20)
        run(strategy, example_stream())
        return [*strategy.model.parameters(), strategy.memory.all().x]

    usual = weights()
    monkeypatch.setattr(FlopMeter, "skips", lambda self, size: False)
    always = weights()
    monkeypatch.setattr(FlopMeter, "_mode", lambda self, on: contextlib.nullcontext())
    never = weights()
    for left, middle, right in zip(usual, always, never, strict=True):
        assert torch.equal(left, middle) and torch.equal(left, right)


def test_blocks_outside_of_a_run_are_only_run():
    counts = {}
    with same_flops(1, counts), consolidating():
        pass
    assert not counts


class InBlocks(Finetune):
    """Works when a session ends, and in blocks: the same work for the same key, or work that it says nothing of."""

    def __init__(self, model: nn.Module, repeats: int = 5) -> None:
        super().__init__(model)
        self.repeats = repeats

    @on(SessionEnded)
    def work(self, event):
        counts = {}
        for number in range(self.repeats):
            with same_flops(number % 2, counts):
                torch.rand(4 + number % 2, 8) @ torch.rand(8, 2)
                with same_flops("within", {}):
                    torch.rand(number + 1, 1) @ torch.rand(1, 1)
        torch.rand(3, 3) @ torch.rand(3, 3)


def test_blocks_within_blocks():
    cost = run(InBlocks(example_model()), example_stream()).cost
    assert cost.consolidating_flops.tolist() == [3 * 2 * 4 * 8 * 2 + 2 * 2 * 5 * 8 * 2 + 2 * (1 + 2 + 3 + 4 + 5) + 54] * 3


class Fails(Finetune):
    """Fails in a step, or at the end of a session."""

    def __init__(self, model: nn.Module, at: type) -> None:
        super().__init__(model)
        self.at = at

    @on(BatchLearned)
    @on(SessionEnded)
    def fail(self, event):
        if isinstance(event, self.at):
            with same_flops("failing"):
                raise KeyError("mine")


@pytest.mark.parametrize("at", [BatchLearned, SessionEnded])
def test_a_run_that_fails_leaves_no_mode_behind(at):
    with pytest.raises(KeyError, match="mine"):
        run(Fails(example_model(), at), example_stream())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.zeros(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5)), 2 * 3 * 7 * 5),
        (lambda: torch.zeros(2, 3, 5).baddbmm_(torch.ones(2, 3, 7), torch.ones(2, 7, 5)), 2 * 2 * 3 * 7 * 5),
        (lambda: torch.zeros(3, 5).addbmm_(torch.ones(2, 3, 7), torch.ones(2, 7, 5)), 2 * 2 * 3 * 7 * 5),
        (lambda: torch.addbmm(torch.zeros(3, 5), torch.ones(2, 3, 7), torch.ones(2, 7, 5)), 2 * 2 * 3 * 7 * 5),
        (lambda: torch.zeros(3).addmv_(torch.ones(3, 7), torch.ones(7)), 2 * 3 * 7),
        (lambda: torch.ones(7) @ torch.ones(7), 2 * 7),
    ],
)
def test_products_that_are_added_in_place_count_as_others(call, expected):
    assert flops(call) == expected
