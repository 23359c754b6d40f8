"""Prequential accuracy: by hand, and without any change to the run."""

from __future__ import annotations

import math

import pytest
import torch
from clstream.strategies import TAME, Refresh, Replay, WithDetectedBoundaries
from torch import Tensor

from clstream import Batch, Samples, Strategy, Stream, Task, on, run
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.online_metrics import Prequential, PrequentialMeasured
from clstream.serialization.compare import digest


class Constant(Strategy):
    """Answers 0, and after 2 batches 1."""

    learned = 0

    def learn(self, batch: Batch) -> Tensor:
        self.learned += 1
        return torch.zeros(())

    def predict(self, x: Tensor, task: object = None) -> Tensor:
        return torch.full((len(x),), int(self.learned >= 2))


class Ear:
    def __init__(self) -> None:
        self.heard: list[PrequentialMeasured] = []

    @on(PrequentialMeasured)
    def hear(self, event: PrequentialMeasured) -> None:
        self.heard.append(event)


def halves() -> Stream:
    """Two sessions of 8 samples, of the labels 0 and 1: batches of 4."""
    tasks = []
    for label in range(2):
        samples = Samples(torch.zeros(8, 1, 8, 8), torch.full((8,), label))
        tasks.append(Task(label, (label,), samples, samples))
    return Stream("halves", tasks, epochs=1, batch_size=4)


def test_each_batch_is_asked_before_it_is_learned() -> None:
    observer, ear = Prequential(), Ear()
    run(Constant(example_model()), halves(), observer, ear)
    assert [counts.tolist() for counts in observer.counts] == [[4, 4, 4, 4]] * 2
    assert observer.accuracy == 1.0

    class Late(Constant):
        def predict(self, x: Tensor, task: object = None) -> Tensor:
            return torch.full((len(x),), int(self.learned >= 3))

    run(Late(example_model()), halves(), observer, ear)
    assert observer.counts[0].tolist() == [4, 4, 0, 4] and observer.accuracy == 0.75
    torch.testing.assert_close(observer.curve(2), torch.tensor([1, 1, 0.5, 0.5], dtype=torch.float64))
    assert observer.curve().tolist() == [1, 1, 2 / 3, 0.75]
    assert [(event.session, event.mean) for event in ear.heard[2:]] == [(1.0, 1.0), (0.5, 0.75)]


def test_the_first_epoch_counts_alone_and_every_nth_batch() -> None:
    observer = Prequential(every=3)
    run(Replay(example_model()), example_stream(epochs=3), observer)
    assert len(observer.sizes) == 3 * 3  # 8 batches an epoch: number 0, 3 and 6
    assert math.isnan(Prequential().accuracy)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
        Prequential(every=0)


@pytest.mark.parametrize("make", [Replay, lambda model: TAME(model, window=10, selector_epochs=5)], ids=["Replay", "TAME"])
def test_it_changes_nothing(make: type[Strategy]) -> None:
    states, results = [], []
    for observers in ((), (Prequential(),)):
        torch.manual_seed(0)
        strategy = make(example_model())
        results.append(run(strategy, example_stream(epochs=2), *observers).accuracy)
        states.append(digest(strategy))
    assert states[0] == states[1] and torch.equal(*results)


def test_a_resumed_run_goes_on_counting() -> None:
    again, kept = Prequential(), Checkpoints()
    run(Replay(example_model()), example_stream(), again, kept, max_sessions=2)
    third = Prequential()
    run(Replay(example_model()), example_stream(), third, Checkpoints(every=0), max_sessions=2, resume=kept.load(9))
    assert third.counts[0].tolist() == again.counts[0].tolist() and third.first == again.first


def test_wrappers_ask_what_they_wrap() -> None:
    x = example_stream().tasks[0].test.x
    for wrap in (Refresh, WithDetectedBoundaries):
        base = TAME(example_model(), window=10)
        base.learn(Batch(example_stream().tasks[0].train[:8], None, 0, 0))
        base.experts.append(base.new_expert())  # with two experts, `predict` asks the selector
        assert torch.equal(wrap(base).predict_online(x), base.predict_online(x))
        assert torch.equal(base.predict_online(x), base.model(x).argmax(1))


def test_events_have_curves() -> None:
    assert PrequentialMeasured(0.5, 0.25).curves() == {"prequential/session": 0.5, "prequential/mean": 0.25}
