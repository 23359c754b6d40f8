"""Replay's options, DER and DER++, ER-ACE and A-GEM against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import AGEM, AGEMR, DER, ERACE, DERpp, Finetune, Replay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Batch, BatchLearned, BatchReady, RunStarted, Samples, Strategy, Stream, on, run
from clstream.augmentations import mix
from clstream.checks import example_model, example_stream
from clstream.memory import ClassBalanced, Reservoir
from clstream.models import ConvNet, Mlp
from clstream.seeds import derive


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# DER ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "alpha", "beta", "draws"), [(DER, 0.3, 0.0, 2), (DERpp, 0.3, 0.7, 2), (DERpp, 0.3, 0.7, 1)])
def test_der_is_the_loop_by_hand(make: type[DER], alpha: float, beta: float, draws: int) -> None:
    """With a memory that holds everything, the draws are plain permutations: the run can be redone, bit for bit."""
    stream, twin = example_stream(batch_size=10, epochs=2), example_model()
    given = {} if make is DER else {"beta": beta, "draws": draws}
    strategy = make(example_model(), partial(SGD, lr=0.05), capacity=1000, replay_batch=4, alpha=alpha, **given)
    run(strategy, stream, seed=2)
    optimizer = SGD(twin.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(derive(2, f"{make.__name__}.memory.random"))
    x, y, z = torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), torch.empty(0, 6)
    for session in stream.reseeded(2):
        for epoch in session:
            for batch in epoch:
                outputs = twin(batch.samples.x)
                loss = F.cross_entropy(outputs, batch.samples.y)
                if len(y):
                    one = torch.randperm(len(y), generator=draw)[:4]
                    now = twin(x[one])
                    loss = loss + alpha * F.mse_loss(now, z[one])
                    if beta:
                        two = torch.randperm(len(y), generator=draw)[:4] if draws == 2 else one
                        loss = loss + beta * F.cross_entropy(twin(x[two]) if draws == 2 else now, y[two])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                torch.rand(len(batch.samples), generator=draw, dtype=torch.float64)  # the reservoir's draw for each sample
                x, y = torch.cat([x, batch.samples.x]), torch.cat([y, batch.samples.y])
                z = torch.cat([z, outputs.detach()])  # from before the step
    torch.testing.assert_close(flat(strategy.model), flat(twin), rtol=1e-4, atol=1e-6)
    assert torch.equal(strategy.memory.all().x, x) and strategy.memory.seen == len(y)  # in every epoch
    torch.testing.assert_close(strategy.memory.all().extra["logits"], z, rtol=1e-4, atol=1e-4)


def test_der_keeps_raw_inputs_and_the_outputs_for_augmented_ones() -> None:
    stream = example_stream(batch_size=10)
    object.__setattr__(stream, "augment", lambda x: 255 - x)
    model = example_model()
    strategy = DERpp(model, partial(SGD, lr=0.0), capacity=1000)
    run(strategy, stream)
    kept = strategy.memory.all()
    assert {tuple(row.flatten().tolist()) for row in kept.x} <= {
        tuple(row.flatten().tolist()) for task in stream.tasks for row in task.train.x
    }
    torch.testing.assert_close(kept.extra["logits"], model(255 - kept.x).detach(), rtol=1e-4, atol=1e-5)


def test_der_leaves_out_what_was_not_there_when_it_was_kept() -> None:
    from clstream.strategies.der import drift

    kept = torch.tensor([[1.0, 2.0, float("-inf")], [0.0, float("-inf"), float("-inf")]])
    now = torch.tensor([[2.0, 4.0, 9.0], [3.0, 7.0, float("-inf")]], requires_grad=True)
    loss = drift(now, kept)
    assert loss.item() == pytest.approx((1 + 4 + 9) / 3)
    loss.backward()
    assert torch.equal(now.grad, torch.tensor([[2 / 3, 4 / 3, 0], [2.0, 0, 0]]))
    full = torch.randn(3, 4), torch.randn(3, 4)
    assert float(drift(*full)) == pytest.approx(float(F.mse_loss(*full)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": -1}, "alpha must be a finite number of at least 0"),
        ({"beta": float("nan")}, "beta must be a finite number of at least 0"),
        ({"draws": 3}, "draws must be a whole number from 1 to 2"),
        ({"replay_batch": 2.5}, "replay_batch must be a whole number"),
        ({"capacity": 0}, "capacity must be"),
    ],
)
def test_der_refuses(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DERpp(example_model(), **options)


# ER-ACE -------------------------------------------------------------------------------------------------------------------


def test_er_ace_moves_old_classes_by_replay_alone() -> None:
    strategy = ERACE(example_model())
    x = torch.randint(0, 255, (8, 1, 8, 8), dtype=torch.uint8)
    y = torch.tensor([2, 3] * 4)
    strategy.loss(Samples(x, y)).backward()
    head = strategy.model.head
    assert not head.weight.grad[[0, 1, 4, 5]].any() and head.weight.grad[[2, 3]].any()
    logits = strategy.model(x)
    torch.testing.assert_close(strategy.loss(Samples(x, y)), F.cross_entropy(logits[:, 2:4], y - 2))
    strategy.memory.add(Samples(x[:1], torch.tensor([0])))
    expected = F.cross_entropy(logits[:, 2:4], y - 2) + F.cross_entropy(logits[:1], torch.tensor([0]))
    loss = strategy.loss(Samples(x, y))
    torch.testing.assert_close(loss, expected)
    head.weight.grad = None
    loss.backward()
    assert head.weight.grad[[0, 1, 4, 5]].any(1).all()


def mammoth(model: nn.Module, stream: Stream, seed: int, lr: float, capacity: int, draws: int) -> Reservoir:
    """ER-ACE as in Mammoth's code, by hand; a memory that holds everything, so that its draws are known."""
    optimizer, memory = SGD(model.parameters(), lr=lr), Reservoir(capacity)
    memory.random = torch.Generator().manual_seed(derive(seed, "ERACE.memory.random"))
    highest = 0
    for session in stream.reseeded(seed):
        for epoch in session:
            for batch in epoch:
                x, y = batch.samples.x, batch.samples.y
                highest = max(highest, int(y.max()))
                logits = model(x)
                if session.index:
                    kept = [label in y.tolist() or label >= highest for label in range(logits.shape[1])]
                    logits = logits.masked_fill(~torch.tensor(kept), -1e9)
                loss = F.cross_entropy(logits, y)
                if session.index and len(memory):
                    past = memory.sample(draws)
                    loss = loss + F.cross_entropy(model(past.x), past.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                memory.add(batch.samples)
    return memory


def test_er_ace_can_be_mammoths() -> None:
    stream = example_stream(epochs=2, batch_size=7)
    net = partial(Mlp, stream.input_shape, stream.classes, hidden=(16,), head="cosine")
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    strategy = ERACE(
        one, partial(SGD, lr=0.1), 30, 5, competing="batch_and_above", start="second_task", offer="every_epoch"
    )  # fmt: skip
    run(strategy, stream, seed=3)
    memory = mammoth(two, stream, 3, 0.1, 30, 5)
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-4, atol=1e-6)
    assert torch.equal(strategy.memory.all().x, memory.all().x) and strategy.memory.seen == memory.seen


def test_er_ace_needs_boundaries_only_to_start_late() -> None:
    hidden = example_stream()
    object.__setattr__(hidden, "boundaries", False)
    run(ERACE(example_model(), competing="batch_and_above", offer="every_epoch"), hidden)
    with pytest.raises(ValueError, match="needs boundaries"):
        run(ERACE(example_model(), start="second_task"), hidden)


def test_er_ace_starts_late_in_every_run() -> None:
    """A strategy that is run again forgets the tasks of its first run: nothing is masked in the first task."""
    strategy = ERACE(example_model(), start="second_task", capacity=20)
    run(strategy, example_stream())
    assert strategy.finished is not None and strategy.finished.tasks == len(example_stream().tasks)
    samples = example_stream().tasks[0].train[:8]
    strategy.finished.forget(RunStarted(example_stream(), strategy, 0, False, None))  # type: ignore[arg-type]
    torch.testing.assert_close(strategy.loss(samples), F.cross_entropy(strategy.model(samples.x), samples.y))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"competing": "seen"}, "competing must be one of batch, batch_and_above, not 'seen'"),
        ({"start": "second"}, "start must be one of first_task, second_task, not 'second': did you mean second_task"),
        ({"offer": True}, "offer must be one of first_epoch, every_epoch, not True"),
    ],
)
def test_er_ace_refuses(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ERACE(example_model(), **options)


@pytest.mark.parametrize("make", [Replay, ERACE, DER, DERpp])
@pytest.mark.parametrize("offer", ["first_epoch", "every_epoch"])
def test_a_session_is_offered_once_or_in_every_pass(make: type[Strategy], offer: str) -> None:
    stream = example_stream(epochs=3)
    strategy = make(example_model(), capacity=10_000, offer=offer)  # type: ignore[call-arg]
    run(strategy, stream)
    times = 3 if offer == "every_epoch" else 1
    assert strategy.memory.seen == len(strategy.memory) == times * sum(len(task.train) for task in stream.tasks)  # type: ignore[attr-defined]
    default = "every_epoch" if issubclass(make, DER) else "first_epoch"
    assert make(example_model()).offer == default  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="offer must be one of first_epoch, every_epoch"):
        make(example_model(), offer="each_epoch")  # type: ignore[call-arg]


# A-GEM --------------------------------------------------------------------------------------------------------------------


def gradient(strategy: Strategy, samples: Samples) -> Tensor:
    found = torch.autograd.grad(strategy.loss(samples), list(strategy.model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def test_agem_projects_where_it_must_and_only_there() -> None:
    """At each step the change of the weights is -lr times the projected gradient, as the paper's equation has it."""
    strategy = AGEM(example_model(), partial(SGD, lr=0.1), per_task=20, sample=1000)
    stream = example_stream(batch_size=6)
    projected = []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            g = gradient(strategy, event.batch.samples)
            self.before_step, self.expected = flat(strategy.model), g
            if strategy.past is not None:
                r = gradient(strategy, strategy.past)
                if g @ r < 0:
                    self.expected = g - (g @ r) / (r @ r) * r
                    assert float(self.expected @ r) == pytest.approx(0, abs=1e-4 * float(r.norm() * g.norm()))
                projected.append(bool(g @ r < 0))

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            torch.testing.assert_close(flat(strategy.model), self.before_step - 0.1 * self.expected, rtol=1e-4, atol=1e-5)

    run(strategy, stream, Watch())
    assert any(projected) and len(projected) == 20  # two tasks of ten batches have a past


def test_agemr_projects_on_what_it_holds_without_boundaries() -> None:
    """The memory, drawn whole, is all that came before the batch; so a step's products with its gradient are not below 0."""
    strategy, projected = AGEMR(example_model(), partial(SGD, lr=0.1), capacity=1000, sample=1000), []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            self.before_step, g = flat(strategy.model), gradient(strategy, event.batch.samples)
            self.expected = g
            if len(strategy.memory):
                r = gradient(strategy, strategy.memory.all())
                self.expected = g - min(float(g @ r / (r @ r)), 0.0) * r
                projected.append(bool(g @ r < 0))

        @on(BatchLearned)
        def after(self, event: BatchLearned) -> None:
            torch.testing.assert_close(flat(strategy.model), self.before_step - 0.1 * self.expected, rtol=1e-4, atol=1e-5)

    run(strategy, example_stream(batch_size=6, boundaries=False), Watch())
    assert any(projected) and len(projected) == 29 and len(strategy.memory) == 180


def test_agem_takes_the_plain_step_where_the_past_agrees() -> None:
    samples = Samples(torch.randint(0, 255, (8, 1, 8, 8), dtype=torch.uint8), torch.arange(8) % 6)
    one, two = AGEM(example_model()), Finetune(example_model())
    one.past = samples
    for strategy in (one, two):
        strategy.learn(Batch(samples, None, 0, 0))
    assert torch.equal(flat(one.model), flat(two.model))


def test_agem_keeps_a_sample_of_each_past_task() -> None:
    strategy = AGEM(example_model(), per_task=7)
    run(strategy, example_stream(epochs=3))
    assert [int((strategy.past.y // 2 == task).sum()) for task in range(3)] == [7, 7, 7]
    rows = {tuple(row.flatten().tolist()) for row in strategy.past.x}
    assert len(rows) == 21  # none twice, though each came in three epochs
    run(recurring := AGEM(example_model(), per_task=7), example_stream((0, 1, 0, 1, 0, 1)))
    assert [int((recurring.past.y // 2 == task).sum()) for task in range(2)] == [7, 7]  # and not more the third time


def test_agem_with_a_zero_reference_gradient_takes_the_plain_step() -> None:
    strategy = AGEM(example_model())
    samples = Samples(torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    batch = Batch(samples, None, 0, 0)
    with torch.no_grad():
        for weight in strategy.model.parameters():
            weight.zero_()
    strategy.model.head.bias.data[0] = 1e4  # certain, so without a gradient on class 0
    strategy.past = Samples(samples.x[:1], torch.tensor([0]))
    strategy.learn(batch)
    assert all(weight.isfinite().all() for weight in strategy.model.parameters())


# Replay's options ---------------------------------------------------------------------------------------------------------


def test_so_many_of_each_class() -> None:
    strategy = Replay(example_model(), per_class=4)
    run(strategy, example_stream(epochs=2))
    assert strategy.memory.all().y.bincount().tolist() == [4] * 6
    few = ClassBalanced(100, per_class=3)
    few.add(Samples(torch.arange(10.0)[:, None], torch.tensor([0] * 2 + [1] * 8)))
    assert few.all().y.bincount().tolist() == [2, 3] and few.shares() == {0: 2, 1: 3}


def test_mir_replays_what_a_step_on_the_batch_would_harm_most() -> None:
    strategy = Replay(example_model(), partial(SGD, lr=0.5), retrieval="mir", candidates=6)
    samples = Samples(torch.randint(0, 255, (8, 1, 8, 8), dtype=torch.uint8), torch.tensor([4, 5] * 4))
    past = Samples(torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6))
    strategy.memory.add(past)
    before = F.cross_entropy(strategy.model(past.x), past.y, reduction="none").detach()
    twin = example_model()
    optimizer = SGD(twin.parameters(), lr=0.5)
    F.cross_entropy(twin(samples.x), samples.y).backward()
    optimizer.step()
    harm = F.cross_entropy(twin(past.x), past.y, reduction="none").detach() - before
    chosen = strategy.most_interfered(samples, 2)
    assert sorted(chosen.y.tolist()) == sorted(harm.topk(2).indices.tolist())
    assert torch.equal(flat(strategy.model), flat(example_model()))
    net = nn.Sequential(example_model().stages, nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 6))
    noisy = Replay(net, partial(SGD, lr=0.0), retrieval="mir", candidates=6)
    noisy.memory.add(past)
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in noisy.model.buffers()]
    chosen = {tuple(noisy.most_interfered(samples, 6).y.tolist()) for _ in range(3)}
    assert torch.equal(state, torch.get_rng_state()) and all(map(torch.equal, buffers, noisy.model.buffers()))
    assert len({tuple(sorted(rows)) for rows in chosen}) == 1  # a step of nothing interferes with nothing


def test_mixed_targets_are_shares_of_the_area() -> None:
    torch.manual_seed(0)
    x = torch.stack([torch.full((1, 10, 10), value, dtype=torch.uint8) for value in range(1, 6)])
    y = torch.arange(5)
    for kind in ("cutmix", "resizemix"):
        for _ in range(20):
            mixed, targets = mix(kind, x, y, 7)
            assert mixed.dtype == torch.uint8 and mixed.shape == x.shape and targets.shape == (5, 7)
            torch.testing.assert_close(targets.sum(1), torch.ones(5))
            for row in range(5):
                other = (row - 1) % 5
                share = float((mixed[row] == other + 1).float().mean())
                assert set(mixed[row].unique().tolist()) <= {row + 1, other + 1}
                assert float(targets[row, other]) == pytest.approx(share, abs=1e-6)
    with pytest.raises(ValueError, match="mixes images"):
        mix("cutmix", torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="mix must be one of cutmix, resizemix, not 'mixup'"):
        Replay(example_model(), mix="mixup")


def test_mixed_loss_is_the_cross_entropy_with_soft_targets() -> None:
    strategy = Replay(example_model(), mix="cutmix")
    stream = example_stream()
    strategy.make_memory(RunStarted(stream, strategy))
    samples = stream.tasks[0].train[:12]
    torch.manual_seed(3)
    loss = strategy.loss(samples)
    torch.manual_seed(3)
    mixed, targets = mix("cutmix", samples.x, samples.y, 6)
    torch.testing.assert_close(loss, F.cross_entropy(strategy.model(mixed), targets))


@pytest.mark.parametrize("options", [{"mix": "resizemix"}, {"retrieval": "mir"}, {"memory": "class_balanced"}])
def test_options_work_with_convolutions_and_batch_norm(options: dict) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x / 255)

    result = run(Replay(Normed(), **options), example_stream(epochs=3))
    assert result.average_accuracy > 0.4
    run(Replay(ConvNet((1, 8, 8), 6), **options), example_stream())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"memory": "ring"}, "memory must be one of reservoir"), ({"per_class": 0}, "per_class must be a whole number"),
     ({"retrieval": "gss"}, "retrieval must be one of random"), ({"candidates": 0}, "candidates must be a whole number"),
     ({"retrieval": "mir", "replay_batch": 60}, "mir chooses replay_batch=60 of candidates=50")],
)  # fmt: skip
def test_replay_refuses(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Replay(example_model(), **options)


def test_xavier_initialisation() -> None:
    model = Mlp((1, 28, 28), 10, hidden=(100, 100), init="xavier")
    first = model.stages.layer1
    assert not first.bias.any() and first.weight.abs().max().item() <= (6 / 884) ** 0.5
    assert first.weight.std().item() == pytest.approx((2 / 884) ** 0.5, rel=0.02)
    assert sum(weight.numel() for weight in model.parameters()) == 89_610
    with pytest.raises(ValueError, match="init must be one of torch, xavier"):
        Mlp(4, 2, init="kaiming")
