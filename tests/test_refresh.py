"""Refresh against its specification: the size of its moves, what it leaves alone, its Fisher, and its host."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import AGEM, DER, ERACE, DERpp, Finetune, Joint, Refresh, Replay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchLearned, BatchReady, Samples, Strategy, TaskEnded, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.strategy import needs


def samples(n: int = 16, dtype: torch.dtype = torch.uint8) -> Samples:
    draw = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, 255, (n, 1, 8, 8), generator=draw).to(dtype), torch.randint(6, (n,), generator=draw))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def test_each_tensor_moves_by_delta_of_its_norm_along_its_gradient() -> None:
    torch.manual_seed(0)
    strategy = Refresh(Finetune(Mlp((1, 8, 8), 6, hidden=(100, 100))), noise=0)
    model, given = strategy.model, samples(128)
    with torch.no_grad():
        model.stages.layer1.bias.zero_()
    before = weights_of(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(given.x), given.y), list(model.parameters()))
    strategy.delta = 1e-3  # large enough for float32 to tell direction and size
    strategy.unlearn(given)
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        move = new.detach() - old
        if not old.any():
            assert not move.any()  # a tensor without a norm stays
            continue
        assert float(move.norm() / old.norm()) == pytest.approx(1e-3, rel=5e-3)
        assert float(F.cosine_similarity(move.flatten(), gradient.flatten(), dim=0)) > 0.999


def test_the_default_move_is_a_hundred_thousandth_and_the_loss_rises() -> None:
    torch.manual_seed(0)

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 6)).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.double() / 255)

    strategy = Refresh(Finetune(Double()), noise=0)
    given, before = samples(), weights_of(strategy.model)
    loss = F.cross_entropy(strategy.model(given.x), given.y).item()
    strategy.unlearn(given)
    assert F.cross_entropy(strategy.model(given.x), given.y).item() > loss
    for old, new in zip(before, strategy.model.parameters(), strict=True):
        assert float((new.detach() - old).norm() / old.norm()) == pytest.approx(1e-5, rel=1e-6)


def test_noise_and_fisher_enter_as_written() -> None:
    strategy = Refresh(Finetune(example_model()), delta=1e-2, noise=0.5, fisher_weight=2.0)
    given, before = samples(), weights_of(strategy.model)
    names = [name for name, _ in strategy.model.named_parameters()]
    strategy.fisher = {name: torch.rand_like(old) for name, old in zip(names, before, strict=True)}
    strategy.random.manual_seed(5)
    gradients = torch.autograd.grad(F.cross_entropy(strategy.model(given.x), given.y), list(strategy.model.parameters()))
    strategy.unlearn(given)
    drawn = torch.randn(sum(old.numel() for old in before), generator=torch.Generator().manual_seed(5))
    normals = drawn.split([old.numel() for old in before])
    for name, old, new, gradient, normal in zip(names, before, strategy.model.parameters(), gradients, normals, strict=True):
        direction = old.norm() * gradient / (gradient.norm() + 1e-20)
        expected = old + 1e-2 * (direction + 0.5 * normal.view_as(old)) / (1 + 2.0 * strategy.fisher[name])
        torch.testing.assert_close(new.detach(), expected)


def test_no_gradient_and_no_norm_give_no_nan() -> None:
    strategy = Refresh(Finetune(example_model()))
    with torch.no_grad():
        for weight in strategy.model.parameters():
            weight.zero_()
    strategy.unlearn(samples())
    assert all(weight.isfinite().all() for weight in strategy.model.parameters())
    mute = Refresh(Finetune(example_model()), noise=0)  # no gradient reaches what comes before a head of zeros, which has norms
    with torch.no_grad():
        mute.model.head.weight.zero_()
    before = weights_of(mute.model)
    mute.unlearn(samples())
    assert torch.equal(before[0], mute.model.stages.layer1.weight) and mute.model.head.bias.isfinite().all()
    assert max(float(weight.detach().abs().max()) for weight in strategy.model.parameters()) < 1e-7  # the noise alone: 1e-8


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_batch_norms_statistics_are_touched_by_the_host_alone(form: str) -> None:
    strategy = Refresh(Finetune(Normed()), form=form)
    before = [buffer.clone() for buffer in strategy.model.buffers()]
    (strategy.unlearn if form == "released" else strategy.ascend)(samples())
    assert all(torch.equal(one, two) for one, two in zip(before, strategy.model.buffers(), strict=True))
    assert all(weight.grad is None for weight in strategy.model.parameters())


HOSTS = {
    "Replay": Replay,
    "DERpp": DERpp,
    "Finetune with Adam": lambda model: Finetune(model, partial(Adam, lr=1e-3)),
    "Finetune with momentum": lambda model: Finetune(model, partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)),
    "Joint": Joint,
    "A-GEM": AGEM,
    "MIR": lambda model: Replay(model, retrieval="mir"),
    "nested": lambda model: Refresh(Replay(model), delta=0.0),
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("augmented", [False, True])
def test_without_a_move_it_is_the_host_bit_for_bit(name: str, augmented: bool) -> None:
    """The wrapper draws from a generator of its own, and leaves the run's random numbers, buffers and gradients alone."""

    def jitter(x: Tensor) -> Tensor:
        return x.roll(int(torch.randint(3, ())), -1)

    def play(wrap: bool) -> tuple[Strategy, Tensor]:
        stream = example_stream(epochs=2)
        object.__setattr__(stream, "augment", jitter if augmented else None)
        with isolated(0, "strategy"):
            host = HOSTS[name](Normed())
        result = run(Refresh(host, delta=0.0) if wrap else host, stream, seed=3)
        return host, result.accuracy

    (plain, accuracy), (wrapped, same) = play(False), play(True)
    assert torch.equal(accuracy, same)
    for name_, old in plain.model.state_dict().items():
        assert torch.equal(old, wrapped.model.state_dict()[name_]), name_
    if not augmented:
        assert digest(plain) == digest(wrapped)


@pytest.mark.parametrize("host", [DER, DERpp, ERACE, Finetune])
@pytest.mark.parametrize("normed", [False, True])
def test_what_is_unlearned_is_the_very_augmented_batch_that_is_learned(host: type[Strategy], normed: bool) -> None:
    stream, asked = example_stream(epochs=2), []
    object.__setattr__(stream, "augment", lambda x: x + torch.randint(0, 9, (len(x), 1, 1, 1), dtype=torch.uint8))
    model = Normed() if normed else example_model()
    model.register_forward_pre_hook(lambda module, given: asked.append(given[0]) if torch.is_grad_enabled() else None)
    told: list[Tensor] = []

    class Watch:
        @on(BatchReady)
        def see(self, event: BatchReady) -> None:
            asked.clear()
            told[:] = [event.batch.samples.x]

        @on(BatchLearned)
        def look(self, event: BatchLearned) -> None:
            assert torch.equal(asked[0], asked[1]) and not torch.equal(asked[0], told[0])
            counted.append(len(asked))

    counted: list[int] = []
    run(Refresh(host(model), fisher_weight=0.0), stream, Watch())
    assert len(counted) > 10 and min(counted) >= 2


def test_the_move_is_kept_and_the_host_steps_from_there() -> None:
    stream, seen = example_stream(), []

    class Spy(Finetune):
        def loss(self, samples: Samples) -> Tensor:
            seen.append(weights_of(self.model))
            return super().loss(samples)

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            before.append(weights_of(strategy.model))

    before: list[list[Tensor]] = []
    strategy = Refresh(Spy(example_model(), partial(SGD, lr=0.0)), delta=1e-3, noise=0, fisher_weight=0)
    run(strategy, stream, Watch(), max_sessions=1)
    for first, moved, then in zip(before, seen, before[1:], strict=False):
        for old, new, kept in zip(first, moved, then, strict=True):
            assert torch.equal(new, kept)  # a host that doesn't step leaves the move where it is
            assert float((new - old).norm() / old.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_steps_move_so_often() -> None:
    one, three = (Refresh(Finetune(example_model(), partial(SGD, lr=0.0)), delta=1e-3, steps=steps) for steps in (1, 3))
    start = weights_of(one.model)
    stream = example_stream(batch_size=60)
    for strategy in (one, three):
        run(strategy, stream, max_sessions=1)
    moved = [
        sum((new - old).norm().item() for new, old in zip(base.model.parameters(), start, strict=True)) for base in (one, three)
    ]
    assert 2 < moved[1] / moved[0] < 3.1


def test_the_fisher_is_zero_through_the_first_session_and_then_the_last_ones() -> None:
    strategy, found = Refresh(DERpp(example_model()), tau=0.25), []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            if event.batch.index == 0:
                found.append({name: value.clone() for name, value in strategy.fisher.items()})

        @on(TaskEnded)
        def after(self, event: TaskEnded) -> None:
            from clstream.fisher import diagonal_fisher

            own.append(diagonal_fisher(strategy.model, event.task.train, "weighted"))

    own: list[dict[str, Tensor]] = []
    run(strategy, example_stream(), Watch())
    assert found[0] == {}
    for name, value in found[1].items():
        torch.testing.assert_close(value, own[0][name])
        torch.testing.assert_close(found[2][name], own[1][name] + 0.25 * own[0][name])
    without = Refresh(DERpp(example_model()), fisher_weight=0)
    run(without, example_stream())
    assert not without.fisher


def test_form_paper_ascends_the_whole_loss_through_the_damped_inverse() -> None:
    strategy = Refresh(Finetune(example_model()), form="paper", gamma=0.1, damping=0.5, noise=0)
    given, before = samples(), weights_of(strategy.model)
    names = [name for name, _ in strategy.model.named_parameters()]
    strategy.fisher = {name: torch.rand_like(old) for name, old in zip(names, before, strict=True)}
    slopes = torch.autograd.grad(strategy.base.loss(given), list(strategy.model.parameters()))
    strategy.ascend(given)
    for name, old, new, slope in zip(names, before, strategy.model.parameters(), slopes, strict=True):
        torch.testing.assert_close(new.detach(), old + 0.1 * slope / (strategy.fisher[name] + 0.5))
    noisy = Refresh(Finetune(example_model()), form="paper", gamma=0.02, damping=4.0, noise=1.0)
    before = weights_of(noisy.model)
    noisy.ascend(given)
    rest = torch.cat([(new.detach() - old).flatten() for new, old in zip(noisy.model.parameters(), before, strict=True)])
    assert float(rest.std()) == pytest.approx((2 * 0.02 / 4.0) ** 0.5, rel=0.05)


def test_its_needs_are_those_of_its_base() -> None:
    class NeedsBoundaries(Finetune):
        @on(TaskEnded)
        def end(self, event: TaskEnded) -> None:
            pass

    hidden = example_stream(boundaries=False)
    assert not needs(Refresh(Replay(example_model())))
    run(Refresh(Replay(example_model())), hidden)
    with pytest.raises(
        ValueError, match=r"Refresh needs boundaries, which example hides \(NeedsBoundaries.end handles TaskEnded\)"
    ):
        run(Refresh(NeedsBoundaries(example_model())), hidden)


def test_it_follows_its_base_to_another_model_and_says_early_what_cannot_be() -> None:
    strategy = Refresh(Finetune(example_model()))
    strategy.base.model = other = example_model(1)
    assert strategy.model is other
    normed = nn.Sequential(nn.Flatten(), Floats(), nn.Linear(64, 6), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="batch norm over single values"):
        run(Refresh(Finetune(normed)), example_stream())
    run(Refresh(Finetune(normed), fisher_weight=0), example_stream())
    with pytest.raises(ValueError, match="needs parameters of float32"):
        run(Refresh(Finetune(nn.Sequential(nn.Flatten(), Floats(), Halves(), nn.Linear(64, 6).half()))), example_stream())


class Floats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half()


@pytest.mark.slow
@pytest.mark.parametrize("net", ["recurrent", "scalar"])
def test_it_runs_with_recurrent_layers_and_single_numbers(net: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.out, self.scale = nn.GRU(8, 5, batch_first=True), nn.Linear(5, 6), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.gru(x[:, 0].float() / 255)[0][:, -1] if net == "recurrent" else x[:, 0, 0, :5].float() / 255
            return self.out(hidden) * self.scale

    strategy = Refresh(Replay(Net()))
    run(strategy, example_stream())
    assert strategy.fisher["scale"].shape == () and all(value.isfinite().all() for value in strategy.fisher.values())


def test_evaluation_stays_one_pass() -> None:
    asked = []

    class Counting(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                asked.append(len(x))
            return super().forward(x)

    run(Refresh(Replay(Counting((1, 8, 8), 6, hidden=(8,))), fisher_weight=0), example_stream())
    assert sum(asked) == 2 + 60 * 4  # whether it fits, asked of both; then each test sample once an evaluation


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda model: Refresh(DERpp(model), form="paper"),
        lambda model: Refresh(Refresh(Finetune(model))),
    ],
)
def test_the_contract_holds_around_any_host(make: object) -> None:
    checks = {check.name: check for check in check_strategy(make)}
    for name in ("is_deterministic", "resumes_exactly", "continues_exactly", "saves_exactly", "learns", "answers_without_trace"):
        checks[name]()  # what the parts alone, which meet all of it, could break together


def test_its_generator_and_fisher_survive_a_checkpoint() -> None:
    kept = Checkpoints()
    run(Refresh(DERpp(example_model())), example_stream(), kept)
    paths = {node["path"] for node in kept.load(-1)["strategy"]["nodes"]}
    assert {"Refresh.random", "Refresh.fisher", "DERpp.memory.random"} <= paths


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"delta": -1.0}, "delta must be a finite number of at least 0, not -1"),
        ({"noise": float("nan")}, "noise must be a finite number"),
        ({"steps": 1.5}, "steps must be a whole number of at least 1"),
        ({"damping": 0.0}, "damping must be a finite number above 0"),
        ({"form": "c"}, "form must be one of released, paper"),
    ],
)
def test_odd_options_are_refused(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Refresh(Finetune(example_model()), **options)
    with pytest.raises(TypeError, match="Refresh wraps a strategy object that has a model"):
        Refresh(Finetune)
