"""The strategies against their definitions."""

from __future__ import annotations

from functools import partial

import clstream.strategies as zoo
import pytest
import torch
from clstream.strategies import Finetune, Joint, Replay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import BatchLearned, BatchReady, Samples, SessionEnded, Strategy, on, run
from clstream.checks import example_model, example_stream
from clstream.seeds import derive


def test_replay_with_everything_kept_is_the_loop_by_hand() -> None:
    """A memory that holds everything makes the draws plain indices, so the whole run can be redone by hand, bit for bit."""
    stream = example_stream(batch_size=10)
    twin = example_model()
    strategy = Replay(example_model(), partial(SGD, lr=0.1), capacity=1000, replay_batch=4)
    run(strategy, stream, seed=2)
    optimizer = SGD(twin.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(derive(2, "Replay.memory.random"))
    kept: list[Samples] = []
    for session in stream.reseeded(2):
        for epoch in session:
            for batch in epoch:
                x, y = batch.samples.x, batch.samples.y
                if kept:
                    whole_x, whole_y = torch.cat([k.x for k in kept]), torch.cat([k.y for k in kept])
                    index = torch.randint(len(whole_y), (4,), generator=draw)
                    x, y = torch.cat([x, whole_x[index]]), torch.cat([y, whole_y[index]])
                optimizer.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                optimizer.step()
                torch.rand(len(batch.samples), generator=draw, dtype=torch.float64)  # the reservoir's draw for each sample
                kept.append(batch.samples)
    for ours, theirs in zip(strategy.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_replay_offers_each_sample_once_whatever_the_epochs() -> None:
    strategy = Replay(example_model(), capacity=20)
    run(strategy, example_stream(epochs=5))
    assert strategy.memory.seen == 180
    assert len(strategy.memory) == 20


def test_replay_draws_from_the_past_before_the_batch_is_kept() -> None:
    """No sample of the batch can be drawn for that batch: it is offered to the memory afterwards."""
    seen: list[tuple[int, int]] = []

    class Watch:
        @on(BatchReady)
        def before(self, event: BatchReady) -> None:
            seen.append((strategy.memory.seen, event.batch.index))

    strategy = Replay(example_model(), capacity=500)
    run(strategy, example_stream(batch_size=10), Watch(), max_sessions=1)
    assert seen == [(10 * index, index) for index in range(6)]


@pytest.mark.parametrize("restart", [True, False])
def test_joint_makes_one_pass_over_everything_an_epoch(restart: bool) -> None:
    """Steps are counted, and each sample so far is in exactly one of an epoch's steps."""
    batches: list[Tensor] = []

    class Counting(Joint):
        def loss(self, samples: Samples) -> Tensor:
            batches.append(samples.x.flatten(1).double() @ torch.arange(1, 65, dtype=torch.float64))
            return super().loss(samples)

    stream = example_stream(epochs=2, batch_size=25)
    run(Counting(example_model(), restart=restart), stream)
    per_session = [torch.cat([t.train.x for t in stream.tasks[: n + 1]]) for n in range(3)]
    start = 0
    for whole in per_session:
        codes = (whole.flatten(1).double() @ torch.arange(1, 65, dtype=torch.float64)).sort().values
        steps = -(-len(whole) // 25)
        for _ in range(2):
            got = torch.cat(batches[start : start + steps]).sort().values
            assert torch.equal(got, codes)
            start += steps
    assert start == len(batches)


def test_joint_restarts_from_the_initial_weights_or_goes_on() -> None:
    starts: dict[bool, list[Tensor]] = {True: [], False: []}

    class Watch:
        def __init__(self, into: list[Tensor], model: torch.nn.Module) -> None:
            self.into, self.model, self.fresh = into, model, True

        @on(BatchReady)
        def see(self, event: BatchReady) -> None:
            if event.batch.index == 0:
                self.into.append(self.model.head.weight.detach().clone())

    for restart, into in starts.items():
        strategy = Joint(example_model(), restart=restart)
        run(strategy, example_stream(), Watch(into, strategy.model))
    initial = example_model().head.weight
    assert all(torch.equal(weight, initial) for weight in starts[True])
    assert torch.equal(starts[False][0], initial) and not torch.equal(starts[False][1], initial)


def test_joint_restart_forgets_the_optimizers_moments() -> None:
    strategy = Joint(example_model(), partial(Adam, lr=1e-3))
    steps: list[float] = []

    class Watch:
        @on(SessionEnded)
        def see(self, event: SessionEnded) -> None:
            steps.append(float(next(iter(strategy.optimizer.state.values()))["step"]))

    run(strategy, example_stream(batch_size=60), Watch())
    assert steps == [1, 2, 3]  # not 1, 3, 6


def test_finetune_forgets_what_joint_keeps() -> None:
    stream = example_stream(epochs=10)
    lost, kept = (run(kind(example_model()), stream) for kind in (Finetune, Joint))
    assert lost.forgetting > 0.9
    assert kept.forgetting < 0.05


def test_loss_reported_is_the_loss_before_the_step() -> None:
    losses: list[float] = []

    class Watch:
        @on(BatchLearned)
        def see(self, event: BatchLearned) -> None:
            losses.append(float(event.loss))

    stream, model = example_stream(batch_size=60), example_model()
    batch = next(iter(next(iter(stream.session(0)))))
    expected = float(F.cross_entropy(model(batch.samples.x), batch.samples.y).detach())
    run(Finetune(example_model()), stream, Watch(), max_sessions=1)
    assert losses == [pytest.approx(expected)]


@pytest.mark.parametrize("name", ["Finetune", "Replay", "DERpp", "EWC", "LwF", "Joint", "AGEM"])
def test_a_model_without_parameters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Flatten has no parameters, so there is nothing that {name} could learn"):
        getattr(zoo, name)(nn.Flatten())
    kept = Strategy(nn.Flatten(), optimizer=lambda parameters: None)  # for a method that learns otherwise
    assert kept.optimizer is None
