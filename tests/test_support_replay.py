"""Replay of support sets: the queue never holds a session that goes on, nor more than it may; and sets=0 is fine-tuning."""

from functools import partial

import pytest
import torch
from clstream.strategies import Finetune, SupportReplay
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchReady, on, run
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated
from clstream.serialization.compare import digest


def learner(sets=2, k=10, lr=0.1):
    with isolated(0):
        return SupportReplay(example_model(), partial(SGD, lr=lr), sets, k)


class Watch:
    def __init__(self, strategy):
        self.strategy, self.seen = strategy, []

    @on(BatchReady)
    def look(self, event):
        strategy = self.strategy
        kept = [tuple(sorted({*own.y.tolist()})) for own in strategy.queue]
        drawn = strategy.draw(event.batch.samples)
        self.seen.append((event.batch.task.id, kept, len(drawn[0]) if drawn else 0))


@pytest.mark.parametrize(("sets", "k"), [(1, 10), (2, 10), (2, 500)])
def test_the_queue_has_the_last_sessions_and_never_the_one_that_goes_on(sets, k):
    strategy = learner(sets, k)
    run(strategy, example_stream(epochs=2), watch := Watch(strategy))
    for task, kept, drawn in watch.seen:
        assert kept == [(2 * number, 2 * number + 1) for number in range(max(0, task - sets), task)]
        assert drawn == min(k, 60 * len(kept))  # k is cut to what there is


def test_no_sample_is_drawn_twice_in_a_step_and_each_step_draws_anew():
    strategy = learner(2, 60)
    run(strategy, example_stream(), max_sessions=1)
    samples = strategy.queue[0]
    (drawn,), (again,) = strategy.draw(samples), strategy.draw(samples)
    assert len(drawn.x.flatten(1).unique(dim=0)) == len(samples.x.flatten(1).unique(dim=0))
    assert not torch.equal(drawn.x, again.x)


def test_a_step_minimises_one_mean_over_both():
    strategy = learner(1, 7)
    run(strategy, example_stream(), max_sessions=1)
    samples = example_stream().tasks[1].train[:5]
    drawn = strategy.draw(samples)
    whole = samples + drawn[0]
    assert torch.allclose(strategy.objective_with(samples, drawn), F.cross_entropy(strategy.model(whole.x), whole.y))


def test_without_a_queue_it_is_fine_tuning():
    plain, none = Finetune(example_model(), partial(SGD, lr=0.1)), learner(0)
    run(plain, example_stream())
    run(none, example_stream())
    assert digest(plain.model) == digest(none.model)


def test_replay_holds_what_came_before():
    accuracy = [run(learner(sets, lr=0.05), example_stream(epochs=5)).average for sets in (0, 2)]
    assert accuracy[1] > accuracy[0] + 0.2
