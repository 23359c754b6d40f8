"""CLS-ER against its loop by hand; what answers; heads that grow."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from clstream.strategies import CLSER, Replay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchReady, on, run
from clstream.checks import example_model, example_stream


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_it_is_the_loop_by_hand() -> None:
    """What is drawn, and when averages are renewed, is the strategy's; all else is worked out beside it."""
    rates = {"stable_rate": 0.5, "stable_alpha": 0.9, "plastic_rate": 0.8, "plastic_alpha": 0.7}
    strategy = CLSER(example_model(), partial(SGD, lr=0.05), capacity=30, reg_weight=0.3, **rates)
    network = deepcopy(strategy.model)
    stable, plastic = deepcopy(network), deepcopy(network)
    optimizer, chose = SGD(network.parameters(), lr=0.05), []

    class Twin:
        steps, chance = 0, torch.Generator()

        @on(BatchReady)
        def learn(self, event: BatchReady) -> None:
            if self.steps == 0:
                self.chance.set_state(strategy.random.get_state())
            samples, memory = event.batch.samples, strategy.memory
            x, y, loss = samples.x, samples.y, 0
            if len(memory):
                state = memory.random.get_state()
                past = memory.sample(len(samples), repeats=False)
                memory.random.set_state(state)  # the strategy draws the same
                with torch.no_grad():
                    both = stable(past.x), plastic(past.x)
                    right = [outputs.softmax(1).gather(1, past.y[:, None]) for outputs in both]
                    better = torch.where(right[0] > right[1], *both)
                    chose.append((right[0] > right[1]).float().mean())
                loss = 0.3 * F.mse_loss(network(past.x), better)
                x, y = torch.cat([x, past.x]), torch.cat([y, past.y])
            loss = loss + F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.steps += 1
            chance = torch.rand(2, generator=self.chance)
            for (average, rate, alpha), drawn in zip(((plastic, 0.8, 0.7), (stable, 0.5, 0.9)), chance, strict=True):
                if drawn < rate:
                    a = min(1 - 1 / (self.steps + 1), alpha)
                    for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                        mean.data = a * mean.data + (1 - a) * weight.data

    run(strategy, example_stream(batch_size=10, epochs=2), Twin())
    for ours, theirs in ((strategy.model, network), (strategy.stable, stable), (strategy.plastic, plastic)):
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-4, atol=1e-6)
    assert 0 < float(torch.stack(chose).mean()) < 1
    assert not torch.equal(flat(strategy.stable), flat(strategy.plastic))
    x = example_stream().tasks[0].test[:].x
    for answer, model in (("stable", stable), ("plastic", plastic), ("network", network)):
        strategy.answer = answer
        torch.testing.assert_close(strategy.scores(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_without_a_past_the_network_learns_as_replay_does() -> None:
    first = CLSER(example_model(), partial(SGD, lr=0.05), reg_weight=0.0)
    run(first, example_stream(batch_size=60), max_sessions=1)
    other = Replay(example_model(), partial(SGD, lr=0.05))
    run(other, example_stream(batch_size=60), max_sessions=1)
    assert torch.equal(flat(first.model), flat(other.model))
    torch.testing.assert_close(flat(first.stable), flat(first.plastic))


def test_averages_get_the_rows_that_a_head_gets() -> None:
    strategy = CLSER(example_model(head="growing"), stable_rate=0.0, plastic_rate=1.0, plastic_alpha=0.0)
    run(strategy, example_stream())
    assert strategy.stable.head.labels.tolist() == strategy.plastic.head.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(flat(strategy.plastic), flat(strategy.model))  # nothing of it stays
    assert strategy.scores(example_stream().tasks[2].test[:].x).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reg_weight": -1.0}, "reg_weight must be a finite number of at least 0"),
        ({"stable_rate": 1.5}, "stable_rate must be a finite number from 0 to 1"),
        ({"answer": "both"}, "answer must be one of stable, plastic, network"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CLSER(example_model(), **options)
