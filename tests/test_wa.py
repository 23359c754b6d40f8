"""WA: aligned weights, the loss, and clipped weights, against what is worked by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from clstream.strategies import WA
from clstream.strategies.wa import align
from conftest import built
from torch import nn
from torch.nn import functional as F

from clstream import BatchLearned, SessionEnded, on, run
from clstream.checks import example_model, example_stream
from clstream.models import GrowingHead, Mlp


def test_new_rows_get_the_mean_length_of_old_ones() -> None:
    head = nn.Linear(2, 4)
    bias = head.bias.detach().clone()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.0, -8.0]]))  # lengths 5, 1, 10, 8
    align(head, torch.tensor([0, 1]), torch.tensor([2, 3]))  # gamma = 3 / 9
    torch.testing.assert_close(head.weight.detach(), torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 8 / 3], [0.0, -8 / 3]]))
    assert torch.equal(head.bias, bias)
    align(head, torch.tensor([0, 1]), torch.tensor([2, 3]))  # a second time changes nothing
    torch.testing.assert_close(head.weight.detach()[2], torch.tensor([2.0, 8 / 3]))
    with torch.no_grad():
        head.weight[2:] = 0
    align(head, torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert not head.weight[2:].any()


def test_the_rows_of_a_growing_head_are_found_by_their_labels() -> None:
    head = GrowingHead(2, 6)
    head.grow([4, 1])
    head.grow([0])
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]))
    align(head, torch.tensor([1, 4]), torch.tensor([0]))
    torch.testing.assert_close(head.weight.detach(), torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.8, 2.4]]))


class Watch:
    """Compares the head before a session's end, the loss of a step, and the least weight."""

    def __init__(self, strategy: WA) -> None:
        self.strategy, self.least, self.looked = strategy, float("inf"), 0

    @on(BatchLearned)
    def compare(self, event: BatchLearned) -> None:
        strategy, samples = self.strategy, event.batch.samples
        self.least = min(self.least, float(strategy.model.head.weight.detach().min()))
        if event.batch.index or strategy.teacher is None:
            return
        x, y = strategy.joined(samples)
        old = len(strategy.old_classes)
        outputs, before = strategy.model(x)[:, : old + 2], strategy.teacher(x)[:, :old]
        kept = -((before / 2).softmax(1) * (outputs[:, :old] / 2).log_softmax(1)).sum(1).mean()
        expected = old / (old + 2) * kept + 2 / (old + 2) * F.cross_entropy(outputs, y)
        torch.testing.assert_close(strategy.loss(samples), expected)
        self.looked += 1


class Lengths:
    """Takes down the mean lengths of old and new rows when a session has ended."""

    def __init__(self, strategy: WA) -> None:
        self.strategy, self.pairs = strategy, list[tuple[float, float]]()

    @on(SessionEnded)
    def look(self, event: SessionEnded) -> None:
        lengths = self.strategy.model.head.weight.detach().norm(dim=1)
        self.pairs.append((float(lengths[self.strategy.old_classes].mean()), float(lengths[self.strategy.new_classes].mean())))


def test_the_loss_and_the_lengths_in_a_run() -> None:
    strategy = built(partial(WA, capacity=60, clip_weights=False))
    run(strategy, example_stream(), watch := Watch(strategy), lengths := Lengths(strategy))
    assert watch.looked == 2 and watch.least < 0
    for old, new in lengths.pairs[1:]:
        assert old == pytest.approx(new, rel=1e-5)
    assert strategy.counts == dict.fromkeys(range(6), 10)


def test_clipped_weights_are_never_negative() -> None:
    strategy = built(partial(WA, capacity=60))
    accuracy = run(strategy, example_stream(epochs=10), watch := Watch(strategy)).average_accuracy
    assert watch.least >= 0 and accuracy > 0.6


def test_what_it_cannot_learn_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="session 2 makes it 6 classes, and capacity=5 exemplars are fewer: take"):
        run(built(partial(WA, capacity=5)), example_stream())
    with pytest.raises(TypeError, match="WA scales the rows of a linear head, and Mlp has none"):
        WA(Mlp(4, 2, head="cosine"))
    with pytest.raises(TypeError, match="WA needs a model with a method `features`, which Linear hasn't"):
        WA(nn.Linear(3, 2))
    for wrong in ({"temperature": 0}, {"clip_weights": 1}, {"capacity": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WA(example_model(), **wrong)
